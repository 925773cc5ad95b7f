"""Every pure function of the library in one place; modules only remember their arguments."""

from ssync_loss.distillation import selective_distillation_loss
from ssync_loss.losses.boundary import boundary_refinement_loss
from ssync_loss.losses.dense import dense_decoder_alignment_loss, dense_encoder_alignment_loss
from ssync_loss.losses.interior import interior_denoising_loss
from ssync_loss.losses.redundancy import slot_redundancy_loss
from ssync_loss.losses.temporal import temporal_slot_contrast_loss
from ssync_loss.merging import merge_slots, slot_overlap
from ssync_loss.pseudo_labels import pseudo_labels
from ssync_loss.regions import boundary_region, interior_region, neighbor_difference

__all__ = [
    "boundary_refinement_loss",
    "boundary_region",
    "dense_decoder_alignment_loss",
    "dense_encoder_alignment_loss",
    "interior_denoising_loss",
    "interior_region",
    "merge_slots",
    "neighbor_difference",
    "pseudo_labels",
    "selective_distillation_loss",
    "slot_overlap",
    "slot_redundancy_loss",
    "temporal_slot_contrast_loss",
]
