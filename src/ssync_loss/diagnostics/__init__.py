"""What goes on while the loss is on, and whether to switch it on: plain tensors for any logger."""

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
from ssync_loss.diagnostics.verdict import Premise, pool, premise, report

__all__ = [
    "Premise",
    "Summary",
    "agreement",
    "edge_alignment",
    "explained_variance",
    "label_flips",
    "merges",
    "pool",
    "premise",
    "region_share",
    "report",
    "slots_in_use",
    "summary",
]
