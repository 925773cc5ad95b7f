"""All functions of the library. The modules in ``losses`` keep their settings."""

from ssync_loss.curriculum import allot_children, milestones, slot_error, slot_schedule, spawn_children
from ssync_loss.methods.ino.affinity import affinity_consistency_loss
from ssync_loss.methods.ino.masked_tokens import masked_token_loss
from ssync_loss.methods.ino.out_generative import out_generative_loss
from ssync_loss.methods.ino.propagation import propagate_labels, propagate_masks
from ssync_loss.methods.ino.tube_mask import clip_mask
from ssync_loss.methods.slotcurri.inference import cyclic_scan
from ssync_loss.methods.slotcurri.structure import structure_aware_loss
from ssync_loss.methods.smtc.diversity import mask_diversity_loss
from ssync_loss.methods.smtc.instance import instance_consistency_loss, valid_instances
from ssync_loss.methods.smtc.semantic import semantic_consistency_loss
from ssync_loss.methods.smtc.sinkhorn import sinkhorn
from ssync_loss.methods.srl.dense import dense_decoder_alignment_loss, dense_encoder_alignment_loss
from ssync_loss.methods.srl.redundancy import slot_redundancy_loss
from ssync_loss.methods.srl.temporal import temporal_slot_contrast_loss
from ssync_loss.ssync.functions import (
    boundary_refinement_loss,
    interior_denoising_loss,
    pseudo_labels,
    selective_distillation_loss,
)
from ssync_loss.ssync.merging import merge_slots, slot_overlap
from ssync_loss.ssync.regions import boundary_region, interior_region, neighbor_difference

__all__ = [
    "affinity_consistency_loss",
    "allot_children",
    "boundary_refinement_loss",
    "boundary_region",
    "clip_mask",
    "cyclic_scan",
    "dense_decoder_alignment_loss",
    "dense_encoder_alignment_loss",
    "instance_consistency_loss",
    "interior_denoising_loss",
    "interior_region",
    "mask_diversity_loss",
    "masked_token_loss",
    "merge_slots",
    "milestones",
    "neighbor_difference",
    "out_generative_loss",
    "propagate_labels",
    "propagate_masks",
    "pseudo_labels",
    "selective_distillation_loss",
    "semantic_consistency_loss",
    "sinkhorn",
    "slot_error",
    "slot_overlap",
    "slot_redundancy_loss",
    "slot_schedule",
    "spawn_children",
    "structure_aware_loss",
    "temporal_slot_contrast_loss",
    "valid_instances",
]
