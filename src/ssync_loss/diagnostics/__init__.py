"""Statistics of a run, and a test of whether to switch the loss on. Results are plain tensors for any logger."""

from ssync_loss.diagnostics.fit import edge_alignment, explained_variance
from ssync_loss.diagnostics.overlaps import overlap_histogram
from ssync_loss.diagnostics.statistics import (
    Summary,
    agreement,
    label_flips,
    merges,
    region_share,
    slots_in_use,
    summary,
)
from ssync_loss.diagnostics.verdict import Memorization, Premise, memorization, pool, premise
from ssync_loss.diagnostics.words import report

__all__ = [
    "Memorization",
    "Premise",
    "Summary",
    "agreement",
    "edge_alignment",
    "explained_variance",
    "label_flips",
    "memorization",
    "merges",
    "overlap_histogram",
    "pool",
    "premise",
    "region_share",
    "report",
    "slots_in_use",
    "summary",
]
