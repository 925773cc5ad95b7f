"""A curriculum of slots (SlotCurri): training begins with few slots, and later copies slots with large errors."""

from ssync_loss.methods.slotcurri.curriculum.allotment import allot_children
from ssync_loss.methods.slotcurri.curriculum.children import spawn_children
from ssync_loss.methods.slotcurri.curriculum.controller import SlotCurriculum
from ssync_loss.methods.slotcurri.curriculum.error import slot_error
from ssync_loss.methods.slotcurri.curriculum.moments import hold_rows, inherit_moments
from ssync_loss.methods.slotcurri.curriculum.schedule import milestones, slot_schedule

__all__ = [
    "SlotCurriculum",
    "allot_children",
    "hold_rows",
    "inherit_moments",
    "milestones",
    "slot_error",
    "slot_schedule",
    "spawn_children",
]
