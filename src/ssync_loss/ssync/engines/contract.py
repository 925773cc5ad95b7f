"""The interface of an engine, and functions that compute both terms with an engine."""

from typing import Protocol

import torch
from torch import Tensor

from ssync_loss._forks import take_one_thread_if_forked
from ssync_loss.ssync.labels import merge_labels
from ssync_loss.ssync.maps import Maps
from ssync_loss.ssync.settings import Reduction, Settings
from ssync_loss.ssync.types import PseudoLabels, SlotLabels, SSyncTerms


class Engine(Protocol):
    """Computes SSync outside autocast, on checked maps of one grid. Values do not depend on the engine.

    To add an engine, write a subclass in a module of this package, and add an entry to ``ENGINES``.
    """

    def missing(self, *maps: Tensor) -> str | None:  # noqa: ARG002 (an engine may look at them)
        """Return a requirement that maps (B, T, S, H, W) or the machine do not meet, or None; this reads no data."""
        return None

    def pseudo_labels(self, maps: Maps, settings: Settings) -> PseudoLabels:
        """Compute labels, regions and representatives."""

    def distill(
        self,
        logits: Tensor,
        target: Tensor,
        region: Tensor,
        slot_mask: Tensor | None,
        settings: Settings,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Compare one map with labels on a region."""

    def slot_labels(self, maps: Maps, settings: Settings) -> SlotLabels:
        """Compute labels before merging, and representatives."""

    def loss(self, maps: Maps, settings: Settings, found: SlotLabels | None = None) -> Tensor:
        """Compute the weighted sum of both terms, with the labels ``found`` or with new labels."""
        if found is None:
            return self.terms(maps, settings).total
        return _teach(self, maps, settings, merge_labels(found.hard, found.representative, maps, settings)).total

    def terms(self, maps: Maps, settings: Settings) -> SSyncTerms:
        """Compute the sum, both terms and the labels. Both terms can be differentiated, and may share one graph."""
        return _teach(self, maps, settings, self.pseudo_labels(maps, settings))


def new_slots(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate labels of both maps before merging, (2, B, T, H, W), and representatives, (B, S), in int8."""
    clips, frames, slots, height, width = maps.shape
    hard = maps.new_empty((2, clips, frames, height, width), dtype=torch.int8)
    return hard, maps.new_empty((clips, slots), dtype=torch.int8)


def new_labels(maps: Tensor, *, wanted: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the fields of ``PseudoLabels``, with no clips unless they are ``wanted``."""
    clips, frames, slots, height, width = maps.shape
    clips = clips if wanted else 0
    kinds = (torch.int64, torch.int64, torch.bool, torch.bool)
    enc, dec, boundary, interior = (maps.new_empty((clips, frames, height, width), dtype=one) for one in kinds)
    return enc, dec, boundary, interior, maps.new_empty((clips, slots), dtype=torch.int64)


def in_bytes(found: SlotLabels | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return given labels and representatives as contiguous int8."""
    if found is None:
        return None, None
    return found.hard.to(torch.int8).contiguous(), found.representative.to(torch.int8).contiguous()


def _teach(engine: Engine, maps: Maps, settings: Settings, labels: PseudoLabels) -> SSyncTerms:
    boundary = one_term(engine, maps.dec, labels.enc_labels, labels.boundary, maps, settings)
    interior = one_term(engine, maps.enc, labels.dec_labels, labels.interior, maps, settings)
    total = weigh(boundary, interior, settings)
    return SSyncTerms(total, boundary, interior, labels.boundary.sum(), labels.interior.sum(), labels)


def one_term(engine: Engine, student: Tensor, target: Tensor, region: Tensor, maps: Maps, settings: Settings) -> Tensor:
    """Compute one term; the term and its whole gradient are NaN if a map holds NaN or +inf."""
    take_one_thread_if_forked(student.device.type)
    spoil = maps.spoil()
    return engine.distill(student.to(maps.dtype) * spoil, target, region, maps.slot_mask, settings) * spoil


def weigh(boundary: Tensor, interior: Tensor, settings: Settings) -> Tensor:
    """Return the weighted sum of both terms; a weight of 1 costs no multiplication."""
    weights = settings.boundary_weight, settings.interior_weight
    parts = [
        part if not isinstance(weight, Tensor) and weight == 1 else weight * part
        for part, weight in zip((boundary, interior), weights, strict=True)
    ]
    return parts[0] + parts[1]
