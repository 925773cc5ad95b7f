"""The suggested merge threshold against the slowest search, and by hand."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from refusals import refuses
from ssync_loss.diagnostics import (
    MergeAdvice,
    SlotStatistics,
    explained_variance,
    premise,
    slot_statistics,
    suggest_merge_threshold,
)
from ssync_loss.testing import SSyncCase, reference_pseudo_labels, reference_slot_overlap, ssync_cases

few = settings(max_examples=25, deadline=None)
# far from small fractions, so that rounding does not decide
KEEP = st.sampled_from([0.3183098862, 0.6180339887, 0.9091909391])


def features_of(enc: Tensor, seed: int) -> Tensor:
    B, T, _, H, W = enc.shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (B, T, 3, H, W), generator=generator) / 2


def advise(*given: Tensor, keep: float = 0.95, **named: Any) -> MergeAdvice:
    return suggest_merge_threshold([slot_statistics(*given, **named)], keep=keep)


def row(*slots: list[float]) -> Tensor:
    """One clip of one frame of one row."""
    return torch.tensor(slots)[None, None, :, None]


# --- the slow search: every threshold that matters, one after the other ---


def slow_explained(case: SSyncCase, features: Tensor, threshold: float | None) -> float:
    labels = reference_pseudo_labels(**case._asdict(), merge_threshold=threshold).enc_labels
    # invalid patches have labels, too, and a clip without slots has no valid patch
    valid = torch.ones_like(labels, dtype=torch.bool)
    if case.valid is not None:
        valid = valid & (case.valid if case.valid.dim() == 4 else case.valid[:, :, None, None])
    if case.slot_mask is not None:
        valid = valid & case.slot_mask.any(1)[:, None, None, None]
    return explained_variance(features, labels, num_slots=case.enc_logits.shape[2], valid=valid).mean().item()


@few
@given(ssync_cases(), st.integers(0, 99), KEEP)
def test_no_lower_threshold_keeps_enough(case: SSyncCase, seed: int, keep: float) -> None:
    features = features_of(case.enc_logits, seed)
    overlap = reference_slot_overlap(case.enc_logits, valid=case.valid, slot_mask=case.slot_mask)
    levels = sorted({0.0, *overlap.triu(1).flatten().tolist()})
    # equal overlaps with different rounding
    assume(all(high - low > 1e-6 for low, high in pairwise(levels)))
    advice = advise(case.enc_logits, case.dec_logits, features, keep=keep, valid=case.valid, slot_mask=case.slot_mask)
    whole = slow_explained(case, features, None)
    assert advice.explained == pytest.approx(whole, abs=1e-6)
    if whole < 1e-9:
        assert advice.threshold == 1
        return
    kept = [slow_explained(case, features, level) for level in levels]
    # more merging explains less
    assert all(low <= high + 1e-6 for low, high in pairwise(kept))
    lowest = next(number for number, one in enumerate(kept) if one >= keep * whole - 1e-9)
    above = [*levels[1:], 1.0][lowest]
    assert advice.threshold == pytest.approx((levels[lowest] + above) / 2, abs=1e-6)
    assert advice.merged_explained == pytest.approx(kept[lowest], abs=1e-6)
    merged = reference_pseudo_labels(**case._asdict(), merge_threshold=advice.threshold)
    for clip, representative in enumerate(merged.representative.tolist()):
        present = list(range(len(representative)))
        if case.slot_mask is not None:
            present = [slot for slot in present if case.slot_mask[clip, slot]]
        is_measured = case.valid is None or bool(case.valid[clip].any())
        linked = [(i, j) for i in present for j in present if i < j and overlap[clip, i, j] > advice.threshold]
        assert advice.pairs[clip] == len(linked)
        assert advice.groups[clip] == (len({representative[slot] for slot in present}) if is_measured else 0)


@few
@given(ssync_cases(), st.integers(0, 99))
def test_batches_of_a_set_are_one_set(case: SSyncCase, seed: int) -> None:
    features = features_of(case.enc_logits, seed)
    whole = slot_statistics(**case._asdict(), features=features)
    clips = [SlotStatistics(*(one[clip : clip + 1] for one in whole)) for clip in range(len(features))]
    for one, other in zip(suggest_merge_threshold(clips), suggest_merge_threshold([whole]), strict=True):
        assert torch.allclose(torch.as_tensor(one), torch.as_tensor(other))


def test_the_advice_means_what_the_premise_says() -> None:
    enc, dec, features = torch.randn(3, 2, 6, 4, 5), torch.randn(3, 2, 6, 4, 5), torch.randn(3, 2, 70, 4, 5) + 1e4
    enc[:, :, 1] = enc[:, :, 0] + 0.3 * torch.randn(3, 2, 4, 5)
    advice = advise(enc, dec, features, keep=0.8)
    asked = premise(enc, dec, features, merge_threshold=advice.threshold)
    assert asked.merged_explained is not None
    assert advice.pairs.sum() > 0
    assert advice.explained == pytest.approx(asked.enc_explained.mean().item(), rel=1e-3)
    assert advice.merged_explained == pytest.approx(asked.merged_explained.mean().item(), rel=1e-3)


# --- by hand ---

# 0 and 1 overlap by 1/2, 2 and 3 by 2/3; the features are those of the doctest, and two more
CHAIN = row(
    [9.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [8.0, 9.0, 0.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 9.0, 8.0, 8.0, 0.0],
    [0.0, 0.0, 0.0, 9.0, 9.0, 0.0],
)
STEPS = row([0.0, 4.0, 9.0, 9.0, 9.0, 9.0])


def test_what_is_worth_keeping_is_not_merged() -> None:
    # slots 2 and 3 hold the same features, and merge without loss; 0 and 1 do not
    advice = advise(CHAIN, CHAIN.clone(), STEPS, keep=1.0)
    assert advice.threshold == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert (advice.pairs.tolist(), advice.groups.tolist()) == ([1], [3])
    assert advice.merged_explained == pytest.approx(advice.explained)
    # six pairs: four without overlap, 1/2 and 2/3
    assert {step: count for step, count in enumerate(advice.histogram.tolist()) if count} == {0: 4, 10: 1, 13: 1}


def test_all_that_overlaps_is_merged_where_nothing_must_be_kept() -> None:
    advice = advise(CHAIN, CHAIN.clone(), STEPS, keep=0.0)
    assert advice.threshold == pytest.approx(1 / 4)
    assert (advice.pairs.tolist(), advice.groups.tolist()) == ([2], [2])


def test_pairs_that_tie_are_merged_together_or_not_at_all() -> None:
    # 0 and 1 overlap as much as 2 and 3; the first two have different features, the last two equal ones
    enc = row([9.0, 0, 0, 0], [8.0, 9, 0, 0], [0, 0, 9.0, 0], [0, 0, 8.0, 9])
    advice = advise(enc, enc.clone(), row([0.0, 4.0, 9.0, 9.0]), keep=1.0)
    assert advice.threshold == pytest.approx((1 / 2 + 1) / 2)
    assert (advice.pairs.tolist(), advice.groups.tolist()) == ([0], [4])


def test_slots_that_lie_on_each_other_may_be_worth_keeping() -> None:
    # a threshold of 1 does not merge an overlap of 1
    enc = row([9.0, 8.0, 0.0, 0.0], [8.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0])
    advice = advise(enc, enc.clone(), row([0.0, 6.0, 3.0, 3.0]), keep=0.5)
    assert (advice.threshold, advice.pairs.tolist(), advice.groups.tolist()) == (1.0, [0], [3])
    assert advice.histogram[-1] == 1


@pytest.mark.parametrize(
    ("enc", "features"),
    [
        (CHAIN[:, :, :1], STEPS),  # one slot, no pair
        (CHAIN, torch.full_like(STEPS, 0.1, dtype=torch.float64)),  # constant features
        (torch.zeros_like(CHAIN), STEPS),  # everything in one slot
        (CHAIN[:0], STEPS[:0]),  # no clip
    ],
)
def test_without_anything_to_go_by_nothing_is_merged(enc: Tensor, features: Tensor) -> None:
    advice = advise(enc, enc.clone(), features)
    assert (advice.threshold, advice.explained, advice.merged_explained) == (1.0, 0.0, 0.0)
    assert advice.pairs.sum() == 0
    assert advice.groups.tolist() == [enc.shape[2]] * len(enc)


def test_what_is_masked_does_not_count() -> None:
    valid = torch.tensor([True, True, True, True, True, False]).view(1, 1, 1, 6)
    slot_mask = torch.tensor([[True, True, True, False]])
    features = STEPS.masked_fill(~valid.unsqueeze(2), torch.nan)
    advice = advise(CHAIN, CHAIN.clone(), features, valid=valid, slot_mask=slot_mask)
    assert advice.histogram.sum() == 3
    assert advice.groups.item() <= 3
    nowhere = advise(CHAIN, CHAIN.clone(), features, valid=torch.zeros_like(valid))
    assert (nowhere.threshold, nowhere.groups.tolist()) == (1.0, [0])
    assert nowhere.histogram.sum() == 0


def test_the_settings_of_the_criterion_are_taken() -> None:
    flat = CHAIN.flatten(3).transpose(2, 3)
    features = STEPS.expand(1, 1, 2, 1, 6)
    plain = advise(CHAIN, CHAIN.clone(), features)
    laid_out = slot_statistics(
        flat, flat.clone(), features.flatten(3).mT, axes="b t (h w) s", grid=(1, 6), features_axes="b t (h w) d"
    )
    assert suggest_merge_threshold([laid_out]).threshold == plain.threshold


def test_bad_arguments_are_named() -> None:
    maps = CHAIN, CHAIN.clone()
    good = slot_statistics(*maps, STEPS)
    refuses(ValueError, "`statistics` must hold those of at least one batch; got none.", suggest_merge_threshold, [])
    refuses(TypeError, "`statistics` must be SlotStatistics; got Tensor.", suggest_merge_threshold, good)
    refuses(ValueError, "`keep` must be within [0.0, 1.0]; got 2.", suggest_merge_threshold, [good], keep=2)
    refuses(ValueError, "`features` must have shape (B=1, T=1, D, H=1, W=6)", slot_statistics, *maps, STEPS[..., :3])
    for broken in ((*maps, STEPS / 0), (CHAIN * torch.nan, CHAIN, STEPS)):
        refuses(ValueError, "`statistics` must be of finite maps and features;", advise, *broken)


def test_autocast_changes_nothing() -> None:
    # more patches than bfloat16 can count
    enc, features = torch.randn(1, 1, 3, 20, 20), torch.randn(1, 1, 3, 20, 20)
    plain = slot_statistics(enc, enc.clone(), features)
    with torch.autocast("cpu", torch.bfloat16):
        other = slot_statistics(enc, enc.clone(), features)
        assert suggest_merge_threshold([other]).threshold == suggest_merge_threshold([plain]).threshold
    assert all(torch.equal(one, two) for one, two in zip(plain, other, strict=True))
