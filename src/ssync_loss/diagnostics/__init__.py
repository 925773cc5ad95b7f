"""Statistics of a run, and whether to switch the loss on: plain tensors for any logger."""

from ssync_loss.diagnostics.fit import edge_alignment, explained_variance
from ssync_loss.diagnostics.statistics import (
    Summary,
    agreement,
    label_flips,
    merges,
    region_share,
    slots_in_use,
    summary,
)
from ssync_loss.diagnostics.threshold import MergeAdvice, SlotStatistics, slot_statistics, suggest_merge_threshold
from ssync_loss.diagnostics.verdict import Memorization, Premise, memorization, pool, premise
from ssync_loss.diagnostics.words import report

__all__ = [
    "Memorization",
    "MergeAdvice",
    "Premise",
    "SlotStatistics",
    "Summary",
    "agreement",
    "edge_alignment",
    "explained_variance",
    "label_flips",
    "memorization",
    "merges",
    "pool",
    "premise",
    "region_share",
    "report",
    "slot_statistics",
    "slots_in_use",
    "suggest_merge_threshold",
    "summary",
]
