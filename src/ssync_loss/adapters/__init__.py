"""How a host that keeps its maps to itself gives them up, without being edited.

`attach` finds the maps of a known model, and gives them after every forward. What it is made of works on any model:
`LogitTap` rebuilds the dots of slot attention, `OutputTap` takes a decoder's alpha, and `SlotMaps.join` makes them the
two arguments of a criterion. `doctor` finds the maps in what a model returns. `HeadSoftmax` is the type of the argument
`head_softmax`: ``"per_head"`` or ``"joint"``.
"""

from ssync_loss.adapters.attach import attach
from ssync_loss.adapters.attached_maps import AttachedMaps
from ssync_loss.adapters.doctor import doctor
from ssync_loss.adapters.logit_tap import HeadSoftmax, LogitTap
from ssync_loss.adapters.output_tap import OutputTap
from ssync_loss.adapters.slot_maps import SlotMaps

__all__ = ["AttachedMaps", "HeadSoftmax", "LogitTap", "OutputTap", "SlotMaps", "attach", "doctor"]
