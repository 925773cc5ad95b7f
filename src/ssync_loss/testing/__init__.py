"""Helpers for tests of merging, regions and losses: a slow reference, hypothesis strategies, comparisons.

Only the strategies need ``hypothesis`` (``pip install "ssync-loss[test]"``). They are imported at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ssync_loss.ssync.reference import (
    ReferenceSSync,
    UnionFind,
    reference_boundary_region,
    reference_hard_labels,
    reference_interior_region,
    reference_merge_slots,
    reference_neighbor_difference,
    reference_pseudo_labels,
    reference_selective_distillation_loss,
    reference_slot_overlap,
    reference_ssync,
)
from ssync_loss.testing.comparison import (
    assert_close_gradient,
    assert_close_loss,
    assert_same_labels,
    gradient_scale,
)
from ssync_loss.testing.conditions import decidable_clips, poison, untied_clips

if TYPE_CHECKING:
    from ssync_loss.testing.strategies import (
        DistillationCase,
        MapPair,
        SlotGraph,
        SSyncCase,
        distillation_cases,
        label_videos,
        map_pairs,
        region_knobs,
        slot_graphs,
        slot_masks,
        ssync_cases,
        thresholds,
        valid_masks,
    )

__all__ = [
    "DistillationCase",
    "MapPair",
    "ReferenceSSync",
    "SSyncCase",
    "SlotGraph",
    "UnionFind",
    "assert_close_gradient",
    "assert_close_loss",
    "assert_same_labels",
    "decidable_clips",
    "distillation_cases",
    "gradient_scale",
    "label_videos",
    "map_pairs",
    "poison",
    "reference_boundary_region",
    "reference_hard_labels",
    "reference_interior_region",
    "reference_merge_slots",
    "reference_neighbor_difference",
    "reference_pseudo_labels",
    "reference_selective_distillation_loss",
    "reference_slot_overlap",
    "reference_ssync",
    "region_knobs",
    "slot_graphs",
    "slot_masks",
    "ssync_cases",
    "thresholds",
    "untied_clips",
    "valid_masks",
]

_STRATEGIES = {name for name in __all__ if name not in globals()}


def __getattr__(name: str) -> Any:
    if name not in _STRATEGIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        strategies = import_module("ssync_loss.testing.strategies")
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise ImportError(
            f"`{name}` needs hypothesis, which is not installed: pip install 'ssync-loss[test]'."
        ) from error
    return getattr(strategies, name)


def __dir__() -> list[str]:
    return sorted(__all__)
