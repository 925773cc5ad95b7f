"""The fast path against the reference: labels and regions to the bit, losses and gradients to rounding."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines_in_turn import ENGINES_IN_TURN
from ssync_loss.functional import (
    boundary_region,
    interior_region,
    merge_slots,
    neighbor_difference,
    pseudo_labels,
    selective_distillation_loss,
    slot_overlap,
)
from ssync_loss.testing import (
    DistillationCase,
    SlotGraph,
    SSyncCase,
    assert_close_gradient,
    assert_close_loss,
    assert_same_labels,
    decidable_clips,
    distillation_cases,
    gradient_scale,
    label_videos,
    map_pairs,
    reference_boundary_region,
    reference_interior_region,
    reference_merge_slots,
    reference_neighbor_difference,
    reference_pseudo_labels,
    reference_selective_distillation_loss,
    reference_slot_overlap,
    region_knobs,
    slot_graphs,
    ssync_cases,
    thresholds,
    valid_masks,
)

MAPS = map_pairs(minus_inf=True)
ANY_MAPS = MAPS | map_pairs(minus_inf=True, dtype=torch.float64)


@given(slot_graphs() | slot_graphs(dtype=torch.float64), thresholds())
def test_merging_equals_union_find(graph: SlotGraph, threshold: float | None) -> None:
    expected = reference_merge_slots(*graph, threshold=threshold)
    assert torch.equal(merge_slots(*graph, threshold=threshold), expected)


@given(slot_graphs(max_slots=70, batch=2), thresholds())
@settings(max_examples=40)
def test_merging_of_long_chains(graph: SlotGraph, threshold: float | None) -> None:
    expected = reference_merge_slots(*graph, threshold=threshold)
    assert torch.equal(merge_slots(*graph, threshold=threshold), expected)


@given(labels=label_videos(), data=st.data(), knobs=region_knobs())
def test_regions_equal_looped_neighbors(labels: Tensor, data: st.DataObject, knobs: dict[str, Any]) -> None:
    valid = data.draw(st.none() | valid_masks(*labels.shape))
    boundary = {key: knobs[key] for key in ("min_different", "min_same")}
    interior = {"max_different": knobs["max_different"]}
    difference = neighbor_difference(labels, valid=valid)
    regions = boundary_region(labels, **boundary, valid=valid), interior_region(labels, **interior, valid=valid)
    assert torch.equal(difference, reference_neighbor_difference(labels, valid=valid))
    assert torch.equal(regions[0], reference_boundary_region(labels, **boundary, valid=valid))
    assert torch.equal(regions[1], reference_interior_region(labels, **interior, valid=valid))


@given(case=ssync_cases(maps=MAPS))
def test_overlap_equals_sets(case: SSyncCase) -> None:
    masks = {"valid": case.valid, "slot_mask": case.slot_mask}
    expected = reference_slot_overlap(case.enc_logits, **masks)
    actual = slot_overlap(case.enc_logits, **masks)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@ENGINES_IN_TURN
@given(case=ssync_cases(maps=ANY_MAPS), threshold=thresholds(tied=False), knobs=region_knobs())
def test_labels_equal(engine: Any, case: SSyncCase, threshold: float | None, knobs: dict[str, Any]) -> None:
    with engine():
        actual = pseudo_labels(**case._asdict(), merge_threshold=threshold, **knobs)
    expected = reference_pseudo_labels(**case._asdict(), merge_threshold=threshold, **knobs)
    masks = {"valid": case.valid, "slot_mask": case.slot_mask}
    clips = decidable_clips(case.enc_logits, merge_threshold=threshold, dyadic=True, **masks)
    assert_same_labels(actual, expected, clips=clips)


@ENGINES_IN_TURN
@given(
    case=distillation_cases(maps=ANY_MAPS),
    soft=st.sampled_from([("mse", 0.0), ("cross_entropy", 0.0), ("cross_entropy", 0.2)]),
    temperature=st.sampled_from((1.0, 0.5, 2.0)),
    reduction=st.sampled_from(("mean", "sum", "none")),
)
@settings(max_examples=80)
def test_losses_and_gradients_equal(
    engine: Any, case: DistillationCase, soft: tuple[str, float], temperature: float, reduction: str
) -> None:
    criterion, smoothing = soft
    knobs: dict[str, Any] = {
        "criterion": criterion,
        "label_smoothing": smoothing,
        "temperature": temperature,
        "reduction": reduction,
    }
    fast, slow = (case.logits.clone().requires_grad_() for _ in range(2))
    with engine():
        actual = selective_distillation_loss(**case._replace(logits=fast)._asdict(), **knobs)
    expected = reference_selective_distillation_loss(**case._replace(logits=slow)._asdict(), **knobs)
    assert_close_loss(actual, expected)
    upstream = torch.randn(actual.shape, dtype=actual.dtype)
    with engine():
        actual.backward(upstream)
    expected.backward(upstream)
    # the largest gradient of one patch, for a mean over the region or for a single value
    scale = 2.0 / temperature
    if reduction == "mean":
        scale = gradient_scale(
            case.region, fast.shape[2], criterion=criterion, temperature=temperature, slot_mask=case.slot_mask
        )
    assert_close_gradient(fast.grad, slow.grad, scale=scale * float(upstream.abs().max()))
