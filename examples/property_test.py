"""A merging of your own, held to the slow definition: python -m pytest examples/property_test.py."""

import torch
from hypothesis import given, settings
from torch import Tensor

from ssync_loss.testing import SlotGraph, reference_merge_slots, slot_graphs, thresholds


def my_merging(overlap: Tensor, area: Tensor, threshold: float | None) -> Tensor:
    """Name the slot that stands for the group of each slot, (B, S); a graph is squared until it is closed."""
    slots = area.shape[1]
    joined = torch.eye(slots, dtype=torch.bool).expand_as(overlap)
    if threshold is not None:
        joined = joined | (overlap > threshold)
    for _ in range(slots.bit_length()):
        joined = joined.float() @ joined.float() > 0
    # the largest of a group; of several, the first
    rank = area.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    return torch.where(joined, rank[:, None], slots).argmin(dim=2)


@settings(deadline=None)
@given(slot_graphs(), thresholds())
def test_it_merges_as_the_slow_definition(graph: SlotGraph, threshold: float | None) -> None:
    """On drawn graphs: chains, cliques, ties, overlaps that equal the threshold."""
    wanted = reference_merge_slots(graph.overlap, graph.area, threshold=threshold)
    assert torch.equal(my_merging(graph.overlap, graph.area, threshold), wanted)


@settings(deadline=None)
@given(slot_graphs(), thresholds())
def test_merging_twice_changes_nothing(graph: SlotGraph, threshold: float | None) -> None:
    """Every slot that stands for others stands for itself."""
    merged = my_merging(graph.overlap, graph.area, threshold)
    assert torch.equal(merged.gather(1, merged), merged)
