"""Test your own merging against the reference: python -m pytest examples/property_test.py."""

import torch
from hypothesis import given, settings
from torch import Tensor

from ssync_loss.testing import SlotGraph, reference_merge_slots, slot_graphs, thresholds


def my_merging(overlap: Tensor, area: Tensor, threshold: float | None) -> Tensor:
    """Return the slot that represents each slot's group, (B, S). Repeated squaring closes the graph."""
    slots = area.shape[1]
    joined = torch.eye(slots, dtype=torch.bool).expand_as(overlap)
    if threshold is not None:
        joined = joined | (overlap > threshold)
    for _ in range(slots.bit_length()):
        joined = joined.float() @ joined.float() > 0
    # the largest slot represents its group; of equal slots, the first
    rank = area.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    return torch.where(joined, rank[:, None], slots).argmin(dim=2)


@settings(deadline=None)
@given(slot_graphs(), thresholds())
def test_merging_equals_the_reference(graph: SlotGraph, threshold: float | None) -> None:
    """The drawn graphs include chains, cliques, ties and overlaps equal to the threshold."""
    wanted = reference_merge_slots(graph.overlap, graph.area, threshold=threshold)
    assert torch.equal(my_merging(graph.overlap, graph.area, threshold), wanted)


@settings(deadline=None)
@given(slot_graphs(), thresholds())
def test_merging_twice_changes_nothing(graph: SlotGraph, threshold: float | None) -> None:
    """A slot that represents others represents itself."""
    merged = my_merging(graph.overlap, graph.area, threshold)
    assert torch.equal(merged.gather(1, merged), merged)
