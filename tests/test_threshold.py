"""The histogram of slot overlaps, and the rule for the merge threshold that the study tried."""

from itertools import pairwise

import pytest
import torch
from examples.merge_threshold import suggest_merge_threshold
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from refusals import refuses
from ssync_loss.diagnostics import explained_variance, overlap_histogram
from ssync_loss.functional import slot_overlap
from ssync_loss.testing import (
    MapPair,
    SSyncCase,
    map_pairs,
    reference_pseudo_labels,
    reference_slot_overlap,
    ssync_cases,
)

few = settings(max_examples=25, deadline=None)
# not close to small fractions, so that rounding does not decide
KEEP = st.sampled_from([0.3183098862, 0.6180339887, 0.9091909391])


def row(*slots: list[float]) -> Tensor:
    """Return one clip with one frame of one row."""
    return torch.tensor(slots)[None, None, :, None]


# slots 0 and 1 overlap by 1/2, slots 2 and 3 by 2/3
CHAIN = row(
    [9.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [8.0, 9.0, 0.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 9.0, 8.0, 8.0, 0.0],
    [0.0, 0.0, 0.0, 9.0, 9.0, 0.0],
)
STEPS = row([0.0, 4.0, 9.0, 9.0, 9.0, 9.0])


class TestHistogram:
    @few
    @given(ssync_cases(), st.integers(1, 30))
    def test_every_pair_counts_once(self, case: SSyncCase, num_bins: int) -> None:
        overlap = slot_overlap(case.enc_logits, valid=case.valid, slot_mask=case.slot_mask)
        wanted = [0] * num_bins
        for clip, matrix in enumerate(overlap.double().tolist()):
            present = [True] * len(matrix) if case.slot_mask is None else case.slot_mask[clip].tolist()
            for j in range(len(matrix)):
                for i in range(j):
                    if present[i] and present[j]:
                        wanted[min(int(matrix[i][j] * num_bins), num_bins - 1)] += 1
        assert overlap_histogram(overlap, slot_mask=case.slot_mask, num_bins=num_bins).tolist() == wanted

    def test_by_hand(self) -> None:
        # four of six pairs do not overlap, and the others overlap by 1/2 and 2/3
        counts = overlap_histogram(slot_overlap(CHAIN))
        assert {place: count for place, count in enumerate(counts.tolist()) if count} == {0: 4, 10: 1, 13: 1}
        masked = overlap_histogram(slot_overlap(CHAIN), slot_mask=torch.tensor([[True, True, True, False]]))
        assert {place: count for place, count in enumerate(masked.tolist()) if count} == {0: 2, 10: 1}
        assert overlap_histogram(torch.ones(1, 2, 2))[-1] == 1
        assert overlap_histogram(torch.ones(2, 1, 1)).sum() == overlap_histogram(torch.ones(0, 3, 3)).sum() == 0

    def test_bad_arguments_are_named(self) -> None:
        overlap = torch.ones(2, 3, 3)
        refuses(ValueError, "`overlap` must have shape (B, S, S)", overlap_histogram, overlap[0])
        refuses(ValueError, "`overlap` must have", overlap_histogram, overlap[:, :2])
        refuses(TypeError, "`overlap` must be floating point; got torch.int64.", overlap_histogram, overlap.long())
        refuses(ValueError, "`overlap` must be at least 0; got -1", overlap_histogram, -overlap)
        refuses(ValueError, "`num_bins` must be", overlap_histogram, overlap, num_bins=0)
        mask = torch.ones(2, 4, dtype=torch.bool)
        refuses(ValueError, "`slot_mask` must have shape (B=2, S=3)", overlap_histogram, overlap, slot_mask=mask)


class TestRule:
    @few
    @given(map_pairs(), st.integers(0, 99), KEEP)
    def test_it_is_the_lowest_threshold_that_keeps_enough(self, case: MapPair, seed: int, keep: float) -> None:
        enc = case.enc_logits
        B, T, S, H, W = enc.shape
        assume(B > 0)
        features = torch.randint(-2, 3, (B, T, 3, H, W), generator=torch.Generator().manual_seed(seed)) / 2
        levels = sorted({0.0, *reference_slot_overlap(enc).triu(1).flatten().tolist()})
        # equal overlaps may round differently
        assume(all(high - low > 1e-6 for low, high in pairwise(levels)))

        def explained(threshold: float | None) -> float:
            labels = reference_pseudo_labels(enc, enc, merge_threshold=threshold).enc_labels
            return explained_variance(features, labels, num_slots=S).mean().item()

        threshold, whole = suggest_merge_threshold(enc, features, keep=keep), explained(None)
        if whole < 1e-9:
            assert threshold == 1
            return
        kept = [explained(level) for level in levels]
        # merging more slots explains less
        assert all(low <= high + 1e-6 for low, high in pairwise(kept))
        lowest = next(number for number, one in enumerate(kept) if one >= keep * whole - 1e-9)
        assert threshold == pytest.approx((levels[lowest] + [*levels[1:], 1.0][lowest]) / 2, abs=1e-6)

    def test_by_hand(self) -> None:
        # slots 2 and 3 have the same features, so only they merge without loss
        assert suggest_merge_threshold(CHAIN, STEPS, keep=1.0) == pytest.approx((1 / 2 + 2 / 3) / 2)
        assert suggest_merge_threshold(CHAIN, STEPS, keep=0.0) == pytest.approx(1 / 4)
        # both pairs overlap equally, but only the second pair has equal features
        tied = row([9.0, 0, 0, 0], [8.0, 9, 0, 0], [0, 0, 9.0, 0], [0, 0, 8.0, 9])
        assert suggest_merge_threshold(tied, row([0.0, 4.0, 9.0, 9.0]), keep=1.0) == pytest.approx((1 / 2 + 1) / 2)
        # a threshold of 1 does not merge an overlap of 1
        same = row([9.0, 8.0, 0.0, 0.0], [8.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0])
        assert suggest_merge_threshold(same, row([0.0, 6.0, 3.0, 3.0]), keep=0.5) == 1
        # constant features are not explained
        assert suggest_merge_threshold(CHAIN, torch.ones_like(STEPS)) == 1
