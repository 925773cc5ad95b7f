"""Accepted inputs (shapes, grids, probabilities, NaN, precisions, strides) and the messages for refused ones."""

import inspect
import math
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refusals import refuses
from sample_maps import sample_maps
from ssync_loss import BoundaryRefinementLoss, InteriorDenoisingLoss, PseudoLabels, SSyncLoss, SSyncTerms
from ssync_loss.distributed import global_mean
from ssync_loss.functional import (
    boundary_refinement_loss,
    boundary_region,
    interior_denoising_loss,
    interior_region,
    merge_slots,
    neighbor_difference,
    pseudo_labels,
    selective_distillation_loss,
    slot_overlap,
)
from ssync_loss.testing import assert_close_loss, assert_same_labels

INF, NAN = math.inf, math.nan
TINY = torch.finfo(torch.float32).tiny
SOFT = [("mse", 0.0), ("cross_entropy", 0.0), ("cross_entropy", 0.2)]
CRITERIA = pytest.mark.parametrize(("criterion", "smoothing"), SOFT, ids=["mse", "cross_entropy", "smoothed"])
Settings: TypeAlias = dict[str, Any]

# the encoder grid of `maps`
H, W = 4, 6


def maps(*size: int, clips: int = 2, frames: int = 2, slots: int = 3, dtype: torch.dtype = torch.float32) -> Any:
    """Return an encoder map on 4 x 6 and a decoder map of its own size. Both have patches to select."""
    enc, dec = (
        torch.randn(clips, frames, slots, *one, dtype=dtype).requires_grad_() for one in ((H, W), size or (H, W))
    )
    return enc, dec


def masks() -> Settings:
    """Return masks that exclude some patches and slots of `maps`."""
    return {
        "valid": torch.rand(2, 2, H, W) < 0.8,
        "slot_mask": torch.tensor([[True, True, True], [True, False, True]]),
    }


def loss_of(enc: Tensor, dec: Tensor, **arguments: Any) -> SSyncTerms:
    """Return terms whose regions are seldom empty, whether or not slots merge."""
    call = {key: arguments.pop(key) for key in ("step", "valid", "slot_mask") if key in arguments}
    return SSyncLoss(**{"max_different": 4, **arguments}).train(enc.requires_grad).terms(enc, dec, **call)


def grads(terms: SSyncTerms, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(terms.total, leaves, retain_graph=True))


def assert_same_terms(actual: SSyncTerms, expected: SSyncTerms) -> None:
    """Compare two non-trivial terms to the last bit."""
    assert expected.num_boundary > 0
    assert expected.num_interior > 0
    assert_same_labels(actual.labels, expected.labels)
    for got, wanted in zip(actual[:5], expected[:5], strict=True):
        assert torch.equal(got, wanted)


def assert_close_terms(actual: SSyncTerms, expected: SSyncTerms) -> None:
    assert expected.num_boundary > 0
    assert expected.num_interior > 0
    assert_same_labels(actual.labels, expected.labels)
    for got, wanted in zip(actual[:3], expected[:3], strict=True):
        assert_close_loss(got, wanted)


def resized(logits: Tensor, *size: int) -> Tensor:
    frames = F.interpolate(logits.flatten(0, 1), size=size, mode="bilinear", align_corners=False)
    return frames.view(*logits.shape[:3], *size)


class TestShapes:
    def test_flat_maps_with_a_grid(self) -> None:
        enc, dec = maps()
        wanted = loss_of(enc, dec)
        wanted_grads = grads(wanted, enc, dec)
        for grid in ((H, W), [H, W], ((H, W), (H, W)), torch.Size((H, W))):
            # slots are last in memory, like the output of attention
            strided = enc.flatten(3).mT.contiguous().mT
            for flat in ((enc.flatten(3), dec.flatten(3)), (enc, dec.flatten(3)), (strided, dec), (enc, dec)):
                actual = loss_of(*flat, grid=grid)
                assert_same_terms(actual, wanted)
                for got, grad in zip(grads(actual, enc, dec), wanted_grads, strict=True):
                    assert torch.equal(got, grad)

    def test_flat_maps_without_a_grid_are_square(self) -> None:
        enc, dec = torch.randn(2, 2, 3, 5, 5), torch.randn(2, 2, 3, 5, 5)
        assert_same_terms(loss_of(enc.flatten(3), dec.flatten(3)), loss_of(enc, dec))

    def test_a_grid_is_rows_by_columns(self) -> None:
        enc, dec = (torch.randn(2, 2, 3, 24) for _ in range(2))
        labels = loss_of(enc, dec, grid=(3, 8)).labels
        assert labels.enc_labels.shape == (2, 2, 3, 8)
        for got, wanted in zip(labels[:2], (enc, dec), strict=True):
            apart = pseudo_labels(wanted, wanted, grid=(3, 8), merge_threshold=None).enc_labels
            assert torch.equal(apart.flatten(2), wanted.argmax(2))
            assert torch.equal(got, labels.representative.gather(1, apart.flatten(1)).view_as(got))

    def test_a_flat_map_takes_the_grid_of_the_other_map(self) -> None:
        # 2 * 8 is the square of 4
        enc, dec = torch.randn(2, 2, 3, 2, 8), torch.randn(2, 2, 3, 2, 8)
        wanted = loss_of(enc, dec)
        assert_same_terms(loss_of(enc.flatten(3), dec), wanted)
        assert_same_terms(loss_of(enc, dec.flatten(3)), wanted)

    def test_a_flat_map_with_another_number_of_patches_is_square(self) -> None:
        enc, dec = torch.randn(2, 2, 3, 2, 8), torch.randn(2, 2, 3, 4, 4)
        wanted = loss_of(enc[..., :4], dec)
        assert_same_terms(loss_of(enc[..., :4], dec.flatten(3)), wanted)
        assert_same_terms(loss_of(dec.flatten(3), enc[..., :4]), loss_of(dec, enc[..., :4]))

    def test_a_pair_of_grids(self) -> None:
        enc, dec = maps(3, 8)
        wanted = loss_of(enc, dec)
        assert_same_terms(loss_of(enc.flatten(3), dec.flatten(3), grid=((H, W), (3, 8))), wanted)
        # the grid of the encoder does not constrain a decoder map that has its own grid
        assert_same_terms(loss_of(enc.flatten(3), dec, grid=(H, W)), wanted)

    def test_a_mask_of_frames_applies_to_all_their_patches(self) -> None:
        enc, dec = maps()
        valid = torch.tensor([[True, False], [True, True]])
        assert_same_terms(
            loss_of(enc, dec, valid=valid), loss_of(enc, dec, valid=valid[:, :, None, None].expand(2, 2, H, W))
        )
        labels = torch.randint(3, (2, 2, H, W))
        spelled = valid[:, :, None, None].expand(2, 2, H, W)
        assert torch.equal(neighbor_difference(labels, valid=valid), neighbor_difference(labels, valid=spelled))
        assert torch.equal(boundary_region(labels, valid=valid), boundary_region(labels, valid=spelled))
        assert torch.equal(interior_region(labels, valid=valid), interior_region(labels, valid=spelled))


class TestOtherGrids:
    SIZES = pytest.mark.parametrize("size", [(2 * H, 2 * W), (H // 2, W // 2), (4 * H, 4 * W), (3, 5), (7, 4), (1, 1)])

    @SIZES
    def test_the_decoder_is_interpolated_bilinearly(self, size: tuple[int, int]) -> None:
        enc, dec = maps(*size)
        actual = loss_of(enc, dec)
        wanted = loss_of(enc, resized(dec, H, W))
        assert_same_terms(actual, wanted)
        for got, grad in zip(grads(actual, enc, dec), grads(wanted, enc, dec), strict=True):
            assert grad.any()
            torch.testing.assert_close(got, grad)

    @SIZES
    def test_masks_of_ones_change_nothing(self, size: tuple[int, int]) -> None:
        enc, dec = maps(*size)
        wanted = loss_of(enc, dec)
        for hide in ({"valid": torch.ones(2, 2, H, W).bool()}, {"slot_mask": torch.ones(2, 3).bool()}):
            assert_close_terms(loss_of(enc, dec, **hide), wanted)

    def test_interpolation_reads_only_valid_cells(self) -> None:
        # two decoder cells, 10 and 20, cover four patches; all patches of the second are invalid
        enc = torch.randn(1, 1, 2, 1, 4)
        valid = torch.tensor([[[[True, True, False, False]]]])
        half_valid = torch.tensor([[[[True, True, True, False]]]])
        rows = torch.tensor([[10.0, 20.0], [0.0, 0.0]]).view(1, 1, 2, 1, 2)
        zeros = torch.zeros(1, 1, 1, 4).long()
        labels = PseudoLabels(zeros, zeros, zeros == 0, zeros == 0, torch.tensor([[0, 1]]))
        for mask, seen in ((valid, [10.0, 10.0]), (half_valid, [10.0, 12.5, 17.5])):
            wanted = torch.tensor([seen, [0.0] * len(seen)]).view(1, 1, 2, 1, -1)
            target = zeros[..., : len(seen)]
            assert_close_loss(
                boundary_refinement_loss(enc, rows, labels=labels, valid=mask),
                selective_distillation_loss(wanted, target, target == 0),
            )

    def test_minus_infinity_spreads_where_it_has_weight(self) -> None:
        # the first patch reads cell 0, the next two read both cells, and the last reads cell 1
        enc = torch.randn(1, 1, 2, 1, 4)
        dec = torch.tensor([[-INF, 1.0], [0.0, 0.0]]).view(1, 1, 2, 1, 2).requires_grad_()
        spelled = torch.tensor([[-INF, -INF, -INF, 1.0], [0.0] * 4]).view(1, 1, 2, 1, 4)
        for criterion, smoothing in SOFT:
            knobs: Settings = {"criterion": criterion, "label_smoothing": smoothing, "merge_threshold": None}
            actual = loss_of(enc, dec.detach(), min_different=0, **knobs)
            assert_same_labels(actual.labels, loss_of(enc, spelled, min_different=0, **knobs).labels)
            assert_close_loss(actual.boundary, loss_of(enc, spelled, min_different=0, **knobs).boundary)
            taught = boundary_refinement_loss(enc, dec, min_different=0, **knobs)
            assert taught.isfinite()
            (grad,) = torch.autograd.grad(taught, dec)
            assert grad.isfinite().all()
            assert grad[0, 0, 0, 0, 0] == 0
        assert actual.labels.dec_labels.tolist() == [[[[1, 1, 1, 0]]]]

    @SIZES
    def test_a_decoder_map_of_minus_infinity_has_a_finite_loss(self, size: tuple[int, int]) -> None:
        enc, dec = maps(*size)
        dead = torch.full_like(dec, -INF).requires_grad_()
        terms = loss_of(enc, dead, merge_threshold=None)
        # every patch is uniform: ((S-1)/S)^2 + (S-1)/S^2 over S
        assert terms.boundary.item() == pytest.approx(2 / 9)
        assert not grads(terms, dead)[0].any()
        assert not terms.labels.dec_labels.any()


def shares(logits: Tensor) -> Tensor:
    return torch.softmax(logits, 2)


class TestProbabilities:
    @CRITERIA
    @pytest.mark.parametrize("kind", ["probs", ("probs", "logits"), ["logits", "probs"]])
    def test_losses_equal_those_of_logits(self, kind: Any, criterion: Any, smoothing: float) -> None:
        enc, dec = maps()
        knobs: Settings = {"criterion": criterion, "label_smoothing": smoothing, "merge_threshold": None}
        kinds = (kind, kind) if isinstance(kind, str) else kind
        given = [shares(one) if what == "probs" else one for one, what in zip((enc, dec), kinds, strict=True)]
        for hide in ({}, masks()):
            wanted = loss_of(enc, dec, **knobs | hide)
            actual = loss_of(*given, **knobs | hide, kind=kind)
            assert_close_terms(actual, wanted)
            for got, grad in zip(grads(actual, enc, dec), grads(wanted, enc, dec), strict=True):
                torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-7)

    def test_they_are_renormalized(self) -> None:
        enc, dec = maps()
        # powers of two, so that only the exponent changes
        scale = torch.tensor([0.25, 1.0, 8.0, 64.0])[torch.randint(4, (2, 2, 1, H, W))]
        wanted = loss_of(shares(enc), shares(dec), kind="probs")
        assert_close_terms(loss_of(shares(enc) * scale, shares(dec) * scale, kind="probs"), wanted)

    def test_absent_slots_leave_the_sum(self) -> None:
        enc, dec = maps()
        present = torch.tensor([[True, False, True]] * 2)
        wanted = loss_of(*(shares(one[:, :, [0, 2]]) for one in (enc, dec)), kind="probs")
        actual = loss_of(shares(enc), shares(dec), kind="probs", slot_mask=present)
        assert_close_loss(actual.total, wanted.total)
        assert torch.equal(actual.labels.boundary, wanted.labels.boundary)

    @CRITERIA
    def test_zero_counts_as_the_smallest_normal_number(self, criterion: Any, smoothing: float) -> None:
        probs = torch.rand(2, 2, 3, H, W)
        # the first slot has no zeros, so that no patch has sum 0
        probs[:, :, 1:][torch.rand(2, 2, 2, H, W) < 0.3] = 0.0
        spelled = (probs / probs.sum(2, keepdim=True)).clamp_min(TINY).log()
        probs.requires_grad_()
        knobs: Settings = {"criterion": criterion, "label_smoothing": smoothing}
        actual = loss_of(probs, probs.clone(), kind="probs", **knobs)
        assert_close_terms(actual, loss_of(spelled, spelled, **knobs))
        (grad,) = grads(actual, probs)
        assert grad.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_patch_of_zeros_is_uniform(self, dtype: torch.dtype) -> None:
        probs = torch.zeros(1, 1, 4, 1, 2, dtype=dtype).requires_grad_()
        terms = loss_of(probs, probs.clone(), kind="probs", merge_threshold=None)
        assert terms.interior.item() == pytest.approx(3 / 16)
        assert not grads(terms, probs)[0].any()
        assert not terms.labels.dec_labels.any()

    @pytest.mark.parametrize("call", [loss_of, pseudo_labels, boundary_refinement_loss, interior_denoising_loss])
    @pytest.mark.parametrize("dirty", [0, 1])
    @pytest.mark.parametrize("size", [(H, W), (2, 3)])
    def test_negative_ones_are_refused_unless_masked(self, call: Any, dirty: int, size: tuple[int, int]) -> None:
        given = [shares(one).detach().requires_grad_() for one in maps(*size)]
        wrong = given[dirty].detach().clone()
        wrong[1, 1, 2, -1, -1] = -0.5
        given[dirty] = wrong.requires_grad_()
        name = ("enc_logits", "dec_logits")[dirty]
        refuses(ValueError, f"`{name}` must be at least 0; got -0.5.", call, *given, kind="probs")
        valid = torch.ones(2, 2, H, W).bool()
        valid[1, 1, H // 2 :, W // 2 :] = False
        for hide in ({"valid": valid}, {"slot_mask": torch.tensor([[True] * 3, [True, True, False]])}):
            call(*given, kind="probs", **hide)

    @pytest.mark.usefixtures("fresh_compiler")
    def test_negative_ones_give_nan_under_compile(self) -> None:
        enc, dec = (shares(one).detach() for one in maps())
        enc[1, 1, 2, -1, -1] = -0.5
        criterion = SSyncLoss(kind="probs").eval()
        assert torch.compile(criterion, fullgraph=True, backend="aot_eager")(enc, dec).isnan()

    def test_they_are_resized_as_logarithms(self) -> None:
        enc, dec = maps(3, 5)
        wanted = loss_of(enc, resized(shares(dec).log(), H, W))
        assert_close_terms(loss_of(enc, shares(dec), kind=("logits", "probs")), wanted)

    def test_probabilities_and_logits_merge_differently(self) -> None:
        # a third slot takes the right half, where the logarithms of both other slots fall below their means
        rows = [[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 9.0, 9.0]]
        logits = torch.tensor(rows).view(1, 1, 3, 1, 4)
        assert slot_overlap(logits)[0, 0, 1] == 0
        assert slot_overlap(shares(logits).log())[0, 0, 1] == 1
        assert pseudo_labels(logits, logits).representative.tolist() == [[0, 1, 2]]
        probs = shares(logits)
        assert pseudo_labels(probs, probs, kind="probs").representative.tolist() == [[0, 0, 2]]
        # only the encoder's slots merge, so the decoder's kind changes no group
        assert pseudo_labels(logits, probs, kind=("logits", "probs")).representative.tolist() == [[0, 1, 2]]

    def test_probabilities_merge_like_their_logarithms(self) -> None:
        enc, dec = maps(slots=5)
        for threshold in (0.2, 0.3, 0.4):
            actual = pseudo_labels(shares(enc), dec, kind=("probs", "logits"), merge_threshold=threshold)
            wanted = pseudo_labels(torch.log_softmax(enc, 2), dec, merge_threshold=threshold)
            assert_same_labels(actual, wanted)


class TestDirt:
    """NaN and +inf in a valid patch of a present slot make the loss NaN; -inf is legal."""

    @pytest.mark.parametrize("value", [NAN, INF])
    @pytest.mark.parametrize("dirty", [0, 1])
    @pytest.mark.parametrize("size", [(H, W), (2 * H, 2 * W), (3, 5)])
    @pytest.mark.parametrize("kind", ["logits", "probs"])
    def test_dirt_anywhere_makes_the_total_nan(
        self, value: float, dirty: int, size: tuple[int, int], kind: Any
    ) -> None:
        clean = [shares(one) if kind == "probs" else one for one in maps(*size)]
        knobs: Settings = {"kind": kind}
        assert loss_of(*clean, **knobs).total.isfinite()
        for _ in range(3):
            given = [one.detach().clone() for one in clean]
            given[dirty].view(-1)[torch.randint(given[dirty].numel(), ())] = value
            for one in given:
                one.requires_grad_()
            terms = loss_of(*given, **knobs)
            assert terms.total.isnan()
            assert terms.boundary.isnan()
            assert terms.interior.isnan()
            assert SSyncLoss(**knobs, interior_weight=0.0)(*given).isnan()
            assert boundary_refinement_loss(*given, **knobs).isnan()
            assert interior_denoising_loss(*given, **knobs).isnan()
            # labels remain slots, and the loss is 0 before its start
            assert terms.labels.enc_labels.max() < 3
            assert terms.labels.enc_labels.min() >= 0
            off = SSyncLoss(**knobs, start_step=2)
            assert off(*given, step=1) == 0
            assert off.terms(*given, step=1).total == 0
            assert off(*given, step=2).isnan()

    @pytest.mark.parametrize("value", [NAN, INF])
    def test_dirt_counts_in_a_cell_that_resizing_never_reads(self, value: float) -> None:
        enc, dec = maps(4 * H, 4 * W)
        dirty = dec.detach().clone()
        dirty[1, 0, 2, 0, 0] = value
        assert torch.equal(resized(dirty, H, W), resized(dec, H, W))
        assert loss_of(enc, dec).total.isfinite()
        assert loss_of(enc, dirty.requires_grad_()).total.isnan()
        # the cell does not count under invalid patches or in an absent slot
        valid = torch.ones(2, 2, H, W).bool()
        valid[1, 0, 0, 0] = False
        assert loss_of(enc, dirty, valid=valid).total.isfinite()
        assert loss_of(enc, dirty, slot_mask=torch.tensor([[True] * 3, [True, True, False]])).total.isfinite()

    @pytest.mark.parametrize("value", [NAN, INF])
    def test_dirt_counts_in_a_partly_valid_decoder_cell(self, value: float) -> None:
        # one decoder cell covers two patches, of which one is valid
        enc, dec = torch.randn(1, 1, 2, 1, 4), torch.randn(1, 1, 2, 1, 2)
        dec[..., 1] = value
        valid = torch.tensor([[[[True, True, False, False]]]])
        assert loss_of(enc, dec, valid=valid).total.isfinite()
        valid[..., 2] = True
        assert loss_of(enc, dec, valid=valid).total.isnan()

    @pytest.mark.parametrize("value", [NAN, INF])
    def test_dirt_counts_in_a_patch_outside_both_regions(self, value: float) -> None:
        # there is no boundary, and only the boundary teaches the decoder
        enc = 2.0 * F.one_hot(torch.zeros(1, 1, 2, 2).long(), 2).movedim(-1, 2)
        dec = enc.clone()
        dec[0, 0, 1, 0, 0] = value
        terms = loss_of(enc, dec)
        assert terms.num_boundary == 0
        assert terms.total.isnan()

    @pytest.mark.parametrize("backend", ["torch", "cpu"])
    @pytest.mark.parametrize("value", [NAN, INF])
    @pytest.mark.parametrize("label", [0, 1])
    @CRITERIA
    def test_dirt_in_a_selected_patch_is_nan(
        self, backend: Any, value: float, label: int, criterion: Any, smoothing: float
    ) -> None:
        logits = torch.tensor([[0.0, 1.0], [value, 0.0]]).view(1, 1, 2, 1, 2)
        target, region = torch.full((1, 1, 1, 2), label), torch.ones(1, 1, 1, 2).bool()
        knobs: Settings = {"criterion": criterion, "label_smoothing": smoothing, "backend": backend}
        patches = selective_distillation_loss(logits, target, region, **knobs, reduction="none")
        assert patches.isnan().flatten().tolist() == [True, False]
        assert selective_distillation_loss(logits, target, region, **knobs).isnan()

    def test_a_slot_at_minus_infinity_throughout_is_inactive_and_counts(self) -> None:
        enc, dec = maps()
        lost = [one.detach().clone() for one in (enc, dec)]
        for one in lost:
            one[:, :, 1] = -INF
        overlap = slot_overlap(lost[0])
        assert not overlap[:, 1].any()
        assert not overlap[:, :, 1].any()
        counted = loss_of(*(one.requires_grad_() for one in lost), merge_threshold=0.0)
        # it wins no patch and adds nothing to a sum, but the mean is over S slots with it and over S - 1 without it
        present = torch.tensor([[True, False, True]] * 2)
        masked = loss_of(enc, dec, merge_threshold=0.0, slot_mask=present)
        assert_same_labels(counted.labels, masked.labels)
        assert_close_loss(counted.boundary * 3, masked.boundary * 2)
        assert_close_loss(counted.interior * 3, masked.interior * 2)
        for grad in grads(counted, *lost):
            assert grad.isfinite().all()
            assert not grad[:, :, 1].any()

    def test_a_patch_of_minus_infinity_belongs_to_the_first_present_slot(self) -> None:
        logits = torch.full((1, 1, 3, 1, 2), -INF)
        labels = pseudo_labels(logits, logits, slot_mask=torch.tensor([[False, True, True]]))
        assert labels.enc_labels.tolist() == [[[[1, 1]]]]
        assert labels.dec_labels.tolist() == [[[[1, 1]]]]

    def test_losses_of_confident_patches_are_exact(self) -> None:
        logits = torch.tensor([0.0, 200.0]).view(1, 1, 2, 1, 1)
        target, region = torch.zeros(1, 1, 1, 1).long(), torch.ones(1, 1, 1, 1).bool()
        assert selective_distillation_loss(logits, target, region, criterion="cross_entropy").item() == 200.0
        assert selective_distillation_loss(logits, target, region).item() == 1.0
        # a small loss keeps its digits: r^2 + Q with r = Q^(1/2) = e^-20
        confident = torch.tensor([20.0, 0.0]).view(1, 1, 2, 1, 1)
        assert selective_distillation_loss(confident, target, region).item() == pytest.approx(math.exp(-40), rel=1e-5)
        entropy = selective_distillation_loss(confident, target, region, criterion="cross_entropy")
        assert entropy.item() == pytest.approx(math.exp(-20), rel=1e-5)


class TestPrecision:
    def test_float16_means_do_not_overflow(self) -> None:
        # 4096 * 60000 overflows float16; the mean of a constant is the constant, which no value exceeds
        logits = torch.full((1, 1, 2, 64, 64), 60000.0, dtype=torch.float16)
        assert not slot_overlap(logits).any()
        logits[0, 0, :, 0, 0] = 0.0
        assert slot_overlap(logits).tolist() == [[[1.0, 1.0], [1.0, 1.0]]]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_counts_are_exact_beyond_the_range_of_half_precision(self, dtype: torch.dtype) -> None:
        def active(*places: slice) -> Tensor:
            logits = torch.zeros(1, 1, len(places), 4096, dtype=dtype)
            for slot, place in enumerate(places):
                logits[:, :, slot, place] = 1.0
            return logits.view(1, 1, len(places), 64, 64)

        # 2049 of 4095 patches in common, 257 of 515
        cases = [
            (slice(0, 3072), slice(1023, 4095), Fraction(2049, 4095)),
            (slice(0, 386), slice(129, 515), Fraction(257, 515)),
        ]
        for first, second, share in cases:
            for enabled in (False, True):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                    overlap = slot_overlap(active(first, second))
                assert overlap.dtype == torch.promote_types(dtype, torch.float32)
                assert overlap[0, 0, 1] == torch.tensor(share.numerator, dtype=overlap.dtype) / share.denominator

    def test_autocast_changes_no_piece(self) -> None:
        enc, dec = maps(slots=5)
        probs = [shares(one) for one in (enc, dec)]
        overlap, area = torch.rand(2, 5, 5), torch.rand(2, 5)

        def pieces() -> list[Tensor]:
            return [
                merge_slots(overlap, area, threshold=0.9),
                *pseudo_labels(*probs, kind="probs", merge_threshold=0.3),
                boundary_refinement_loss(*probs, kind="probs"),
                interior_denoising_loss(enc, dec),
            ]

        plain = pieces()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = pieces()
        for got, wanted in zip(cast, plain, strict=True):
            assert torch.equal(got, wanted)


class TestStrides:
    def test_strided_masks_and_labels(self) -> None:
        enc, dec = maps()
        valid = (torch.rand(2, W, H, 2) < 0.8).movedim((1, 2, 3), (3, 2, 1))
        slot_mask = torch.tensor([[True, True], [True, False], [True, True]]).T
        assert not valid.is_contiguous()
        assert not slot_mask.is_contiguous()
        assert_same_terms(
            loss_of(enc, dec, valid=valid, slot_mask=slot_mask),
            loss_of(enc, dec, valid=valid.contiguous(), slot_mask=slot_mask.contiguous()),
        )
        labels = torch.randint(3, (2, W, H, 2)).movedim((1, 2, 3), (3, 2, 1))
        plain = labels.contiguous()
        for strided in (labels, plain.to(memory_format=torch.channels_last), plain.mT.contiguous().mT):
            assert not strided.is_contiguous()
            assert torch.equal(
                neighbor_difference(strided, valid=valid), neighbor_difference(plain, valid=valid.contiguous())
            )
            assert torch.equal(boundary_region(strided), boundary_region(plain))
        for criterion, smoothing in SOFT:
            knobs: Settings = {"criterion": criterion, "label_smoothing": smoothing}
            assert torch.equal(
                selective_distillation_loss(dec, labels, valid, **knobs),
                selective_distillation_loss(dec, plain, valid.contiguous(), **knobs),
            )
        one_label, everywhere = torch.ones(1, 1, 1, 1).long(), torch.ones(1, 1, 1, 1).bool()
        assert torch.equal(
            selective_distillation_loss(dec, one_label.expand(2, 2, H, W), everywhere.expand(2, 2, H, W)),
            selective_distillation_loss(dec, torch.ones(2, 2, H, W).long(), torch.ones(2, 2, H, W).bool()),
        )
        overlap = torch.rand(2, 3, 3)
        area = torch.rand(3, 2).T
        assert torch.equal(
            merge_slots(overlap.mT, area, threshold=0.6), merge_slots(overlap, area.clone(), threshold=0.6)
        )

    def test_unreduced_losses_may_be_weighted_in_place(self) -> None:
        _, dec = maps()
        target, region = torch.randint(3, (2, 2, H, W)), torch.rand(2, 2, H, W) < 0.7
        for criterion, smoothing in SOFT:
            knobs: Settings = {"criterion": criterion, "label_smoothing": smoothing, "reduction": "none"}
            patches = selective_distillation_loss(dec, target, region, **knobs)
            wanted = torch.autograd.grad((2 * patches).sum(), dec, retain_graph=True)
            torch.testing.assert_close(torch.autograd.grad(patches.mul_(2).sum(), dec), wanted)

    def test_the_upstream_gradient_may_be_expanded_or_strided(self) -> None:
        _, dec = maps()
        target, region = torch.randint(3, (2, 2, H, W)), torch.rand(2, 2, H, W) < 0.7
        for criterion, smoothing in SOFT:
            knobs: Settings = {"criterion": criterion, "label_smoothing": smoothing}
            patches = selective_distillation_loss(dec, target, region, **knobs, reduction="none")
            for upstream in (torch.tensor(2.0).expand(2, 2, H, W), torch.randn(2, W, H, 2).transpose(1, 3)):
                (got,) = torch.autograd.grad(patches, dec, upstream, retain_graph=True)
                (wanted,) = torch.autograd.grad(patches, dec, upstream.contiguous(), retain_graph=True)
                assert torch.equal(got, wanted)

    def test_a_map_may_have_other_uses(self) -> None:
        enc, dec = maps()
        # both maps enter two losses, before and after other operations
        total = loss_of(2.0 * enc, dec * dec).total + enc.square().sum() + loss_of(enc, dec).total
        both = torch.autograd.grad(total, (enc, dec))
        parts = [
            torch.autograd.grad(loss_of(2.0 * enc, dec * dec).total, (enc, dec)),
            (2.0 * enc, torch.zeros_like(dec)),
            torch.autograd.grad(loss_of(enc, dec).total, (enc, dec)),
        ]
        for got, *terms in zip(both, *parts, strict=True):
            torch.testing.assert_close(got, sum(terms, torch.zeros_like(got)))


class TestGradcheck:
    @CRITERIA
    @pytest.mark.parametrize("kind", ["logits", "probs"])
    @pytest.mark.parametrize("size", [(2, 4), (6, 6)])
    def test_the_whole_loss(self, criterion: Any, smoothing: float, kind: Any, size: tuple[int, int]) -> None:
        enc, dec = (torch.randn(2, 1, 3, *one, dtype=torch.float64) for one in ((3, 3), size))
        if kind == "probs":
            # unnormalized, so that the gradient passes through the normalization
            enc, dec = enc.exp(), dec.exp()
        hide: dict[str, Any] = {
            "valid": torch.rand(2, 1, 3, 3) < 0.8,
            "slot_mask": torch.tensor([[True, True, True], [True, False, True]]),
        }
        module = SSyncLoss(
            criterion=criterion,
            label_smoothing=smoothing,
            temperature=0.7,
            kind=kind,
            max_different=5,
            boundary_weight=0.5,
            interior_weight=2.0,
            ramp_steps=4,
        )

        def loss(*given: Tensor) -> Tensor:
            return module(*given, step=3, **hide)

        assert torch.autograd.gradcheck(loss, (enc.requires_grad_(), dec.requires_grad_()))


class TestEmptyBatch:
    @pytest.mark.parametrize("backend", ["torch", "cpu", "reference"])
    def test_results_are_empty(self, backend: Any) -> None:
        logits, labels = torch.zeros(0, 2, 3, H, W, requires_grad=True), torch.zeros(0, 2, H, W).long()
        region = labels.bool()
        assert slot_overlap(logits).shape == (0, 3, 3)
        assert merge_slots(torch.zeros(0, 3, 3), torch.zeros(0, 3), threshold=0.5).shape == (0, 3)
        assert neighbor_difference(labels).shape == region.shape
        assert boundary_region(labels).shape == region.shape
        assert interior_region(labels).shape == region.shape
        for criterion, smoothing in SOFT:
            knobs: Settings = {"criterion": criterion, "label_smoothing": smoothing, "backend": backend}
            for reduction, shape in (("mean", ()), ("sum", ()), ("none", (0, 2, H, W))):
                knobs["reduction"] = reduction
                loss = selective_distillation_loss(logits, labels, region, **knobs)
                assert loss.shape == shape
                assert loss.sum() == 0
                assert torch.autograd.grad(loss.sum(), logits)[0].shape == logits.shape


LOGITS = torch.zeros(2, 3, 4, 5, 6)
FLAT = torch.zeros(2, 3, 4, 30)
LABELS = torch.zeros(2, 3, 5, 6, dtype=torch.int64)
REGION = torch.zeros(2, 3, 5, 6, dtype=torch.bool)
SLOTS = torch.ones(2, 4, dtype=torch.bool)
OVERLAP, AREA = torch.zeros(2, 4, 4), torch.zeros(2, 4)
PSEUDO = PseudoLabels(LABELS, LABELS, REGION, REGION, torch.zeros(2, 4, dtype=torch.int64))


def made(make: Any, use: Any = nn.Module.__call__, **settings: Any) -> Any:
    """Return a function of maps, masks and settings that builds a module and calls it, if possible before its start."""
    early = {"step": 0} if settings else {}

    def call(enc: Any, dec: Any, *, valid: Any = None, slot_mask: Any = None, **others: Any) -> Any:
        return use(make(**settings, **others).eval(), enc, dec, valid=valid, slot_mask=slot_mask, **early)

    return call


FUNCTIONS = {one.__name__: one for one in (pseudo_labels, boundary_refinement_loss, interior_denoising_loss)}
MODULES = {one.__name__: made(one) for one in (SSyncLoss, BoundaryRefinementLoss, InteriorDenoisingLoss)}
BEFORE_THE_START_AND_OVER_RANKS = {
    "before the start": made(SSyncLoss, start_step=1),
    "terms before the start": made(SSyncLoss, SSyncLoss.terms, start_step=1),
    "over ranks": made(SSyncLoss, global_mean),
}
TWO_MAPS: dict[str, Any] = FUNCTIONS | MODULES | BEFORE_THE_START_AND_OVER_RANKS


@pytest.mark.parametrize("call", TWO_MAPS.values(), ids=TWO_MAPS)
class TestRefusedMaps:
    """All calls with two maps give the same messages, even before the start step."""

    @pytest.mark.parametrize(
        ("enc", "dec", "message"),
        [
            (LOGITS, LOGITS[:1], "`dec_logits` must have shape (B=2, T=3, S=4, H_d, W_d); got (1, 3, 4, 5, 6)."),
            (LOGITS, LOGITS[:, :2], "`dec_logits` must have shape (B=2, T=3, S=4, H_d, W_d); got (2, 2, 4, 5, 6)."),
            (LOGITS, LOGITS[:, :, :3], "`dec_logits` must have shape (B=2, T=3, S=4, H_d, W_d); got (2, 3, 3, 5, 6)."),
            (LOGITS[:, :, :0], LOGITS[:, :, :0], "`enc_logits` must have S >= 1; got S=0."),
            (LOGITS[:, :0], LOGITS[:, :0], "`enc_logits` must have T >= 1; got T=0."),
            (LOGITS[:, :, :, :0], LOGITS, "`enc_logits` must have H >= 1; got H=0."),
            (LOGITS[..., :0], LOGITS, "`enc_logits` must have W >= 1; got W=0."),
            (LOGITS, LOGITS[:, :, :, :0], "`dec_logits` must have H_d >= 1; got H_d=0."),
            (LOGITS, LOGITS[..., :0], "`dec_logits` must have W_d >= 1; got W_d=0."),
            (FLAT, FLAT, "`enc_logits` has N=30 patches, which is no square: pass grid=(H, W); got (2, 3, 4, 30)."),
            (LOGITS, FLAT[..., :24], "`dec_logits` has N=24 patches, which is no square: pass grid=(H, W); got"),
        ],
    )
    def test_maps(self, call: Any, enc: Any, dec: Any, message: str) -> None:
        refuses(ValueError, message, call, enc, dec)

    @pytest.mark.parametrize(
        ("enc", "dec", "grid", "message"),
        [
            (FLAT, FLAT, (4, 6), "`enc_logits` must have N = H*W = 4*6 = 24 patches as `grid` says; got (2, 3, 4, 30)"),
            (FLAT, FLAT, ((5, 6), (4, 6)), "`dec_logits` must have N = H*W = 4*6 = 24 patches as `grid` says; got"),
            (LOGITS, LOGITS, (6, 5), "`enc_logits` must have H, W = (6, 5) as `grid` says; got (2, 3, 4, 5, 6)."),
            (LOGITS, LOGITS, ((5, 6), (10, 12)), "`dec_logits` must have H, W = (10, 12) as `grid` says; got"),
        ],
    )
    def test_grids(self, call: Any, enc: Tensor, dec: Tensor, grid: Any, message: str) -> None:
        refuses(ValueError, message, call, enc, dec, grid=grid)

    @pytest.mark.parametrize(
        "grid",
        [30, (30,), (5, 6, 1), (5.0, 6.0), (0, 30), (-5, -6), (True, 30), "56", ((5, 6),), ((5, 6), 4)],
    )
    def test_values_that_are_no_grid(self, call: Any, grid: Any) -> None:
        wanted = "`grid` must be (H, W) or ((H, W), (H_d, W_d)) for encoder and decoder, positive integers; "
        refuses(ValueError, f"{wanted}got {grid!r}.", call, FLAT, FLAT, grid=grid)

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("prob", "one of 'logits', 'probs'; got 'prob'."),
            (("logits", "softmax"), "one of 'logits', 'probs'; got 'softmax'."),
            (("logits", None), "one of 'logits', 'probs'; got None."),
            (("probs",), "'logits', 'probs' or a pair of them (encoder, decoder); got ('probs',)."),
            (None, "'logits', 'probs' or a pair of them (encoder, decoder); got None."),
            (7, "'logits', 'probs' or a pair of them (encoder, decoder); got 7."),
        ],
    )
    def test_kinds(self, call: Any, kind: Any, message: str) -> None:
        refuses(ValueError, f"`kind` must be {message}", call, LOGITS, LOGITS, kind=kind)

    @pytest.mark.parametrize(
        ("name", "mask", "message"),
        [
            ("valid", REGION[:1], "(B=2, T=3, H=5, W=6); got (1, 3, 5, 6)."),
            ("valid", REGION.mT, "(B=2, T=3, H=5, W=6); got (2, 3, 6, 5)."),
            ("valid", SLOTS, "(B=2, T=3); got (2, 4)."),
            ("slot_mask", SLOTS[:, :3], "(B=2, S=4); got (2, 3)."),
        ],
    )
    def test_masks(self, call: Any, name: str, mask: Any, message: str) -> None:
        hide: Settings = {name: mask}
        refuses(ValueError, f"`{name}` must have shape {message}", call, LOGITS, LOGITS, **hide)


# the range of every setting, and values outside
RANGES: dict[str, tuple[str, tuple[float, ...]]] = {
    "merge_threshold": ("within [0.0, 1.0]", (-0.1, 1.5, NAN, INF)),
    "label_smoothing": ("within [0.0, 1.0]", (-0.1, 1.1, NAN)),
    "temperature": ("finite and above 0.0", (0.0, -1, NAN, INF)),
    "boundary_weight": ("finite and at least 0.0", (-1.0, NAN, INF)),
    "interior_weight": ("finite and at least 0.0", (-1.0, NAN, INF)),
    "min_different": ("within [0, 10]", (-1, 11)),
    "min_same": ("within [0, 10]", (-1, 11)),
    "max_different": ("within [0, 10]", (-1, 11)),
    "start_step": ("at least 0", (-1,)),
    "ramp_steps": ("at least 0", (-1,)),
}


class TestRefusedSettings:
    @pytest.mark.parametrize(
        ("call", "name"),
        [
            pytest.param(TWO_MAPS[one.__name__], name, id=f"{one.__name__}-{name}")
            for one in (SSyncLoss, BoundaryRefinementLoss, InteriorDenoisingLoss, *FUNCTIONS.values())
            for name in sorted(RANGES.keys() & inspect.signature(one).parameters.keys())
        ],
    )
    def test_ranges(self, call: Any, name: str) -> None:
        wanted, values = RANGES[name]
        for value in values:
            knobs: Settings = {name: value}
            refuses(ValueError, f"`{name}` must be {wanted}; got {value}.", call, LOGITS, LOGITS, **knobs)

    @pytest.mark.parametrize("call", BEFORE_THE_START_AND_OVER_RANKS.values())
    def test_settings_are_refused_before_the_start_and_over_ranks(self, call: Any) -> None:
        refuses(
            ValueError, "`merge_threshold` must be within [0.0, 1.0]; got 2.", call, LOGITS, LOGITS, merge_threshold=2
        )

    @pytest.mark.parametrize("call", [*MODULES.values(), boundary_refinement_loss, interior_denoising_loss])
    def test_smoothing_needs_the_cross_entropy(self, call: Any) -> None:
        wanted = "`label_smoothing` must be 0 with criterion='mse'; got 0.1. Smoothing is defined for "
        refuses(ValueError, f"{wanted}criterion='cross_entropy'.", call, LOGITS, LOGITS, label_smoothing=0.1)

    def test_settings_are_refused_by_the_constructor(self) -> None:
        for make in (SSyncLoss, BoundaryRefinementLoss, InteriorDenoisingLoss):
            refuses(ValueError, "`merge_threshold` must be within [0.0, 1.0]; got 2.", make, merge_threshold=2)
            refuses(ValueError, "`kind` must be one of", make, kind="p")
            refuses(ValueError, "`grid` must be", make, grid=3)
            refuses(ValueError, "`criterion` must be one of", make, criterion="x")
            refuses(ValueError, "`backend` must be one of", make, backend="x")

    def test_presets(self) -> None:
        wanted = "`name` must be one of 'movi_c', 'movi_e', 'ytvis', 'coco'; got 'imagenet'."
        refuses(ValueError, wanted, SSyncLoss.from_preset, "imagenet")
        refuses(ValueError, "`merge_threshold` must be within", SSyncLoss.from_preset, "coco", merge_threshold=7)

    @pytest.mark.parametrize("settings", [{"start_step": 3}, {"ramp_steps": 5}, {"start_step": 3, "ramp_steps": 5}])
    def test_a_schedule_without_a_step(self, settings: Settings) -> None:
        criterion = SSyncLoss(**settings).eval()
        start, ramp = settings.get("start_step", 0), settings.get("ramp_steps", 0)
        message = f"`step` must be given with a schedule (start_step={start}, ramp_steps={ramp}); got None."
        for call in (criterion, criterion.terms):
            refuses(ValueError, message, call, LOGITS, LOGITS)
        refuses(ValueError, message, global_mean, criterion, LOGITS, LOGITS)

    @pytest.mark.parametrize("step", [1.0, True, torch.tensor(1), "1", np.float64(1), np.bool_(True), np.array([1])])
    @pytest.mark.parametrize("settings", [{}, {"start_step": 3}])
    def test_a_step_must_be_an_integer(self, step: Any, settings: Settings) -> None:
        criterion = SSyncLoss(**settings).eval()
        message = f"`step` must be a Python int; got {type(step).__name__}."
        for call in (criterion, criterion.terms):
            refuses(TypeError, message, call, LOGITS, LOGITS, step=step)
        refuses(TypeError, message, global_mean, criterion, LOGITS, LOGITS, step=step)

    @pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.array])
    def test_numpy_integers_are_steps(self, kind: Any) -> None:
        """Differences of unsigned integers would wrap around."""
        criterion = SSyncLoss(start_step=3, ramp_steps=4)
        enc, dec = sample_maps()
        for step in (2, 3, 5, 9):
            value = criterion(enc, dec, step=kind(step))
            assert torch.equal(value, criterion(enc, dec, step=step))
            terms = criterion.terms(enc, dec, step=kind(step))
            assert torch.equal(value, terms.total)
            assert torch.equal(value, global_mean(criterion, enc, dec, step=kind(step)))
            if step >= 3:
                weighed = criterion.weigh(terms.boundary, terms.interior, kind(step))
                torch.testing.assert_close(weighed, value)


@pytest.mark.parametrize(
    ("call", "label_name", "region_name"),
    [
        (boundary_refinement_loss, "enc_labels", "boundary"),
        (interior_denoising_loss, "dec_labels", "interior"),
        (BoundaryRefinementLoss().eval(), "enc_labels", "boundary"),
        (InteriorDenoisingLoss().eval(), "dec_labels", "interior"),
    ],
    ids=["boundary", "interior", "boundary module", "interior module"],
)
class TestRefusedLabels:
    """Precomputed labels with errors."""

    def test_labels(self, call: Any, label_name: str, region_name: str) -> None:
        name = f"`labels.{label_name}`"
        for wrong, message in (
            (LABELS[:1], "must have shape (B=2, T=3, H=5, W=6); got (1, 3, 5, 6)."),
            (LABELS + 4, "must lie within [0, 3]; got values from 4 to 4."),
            (LABELS - 1, "must lie within [0, 3]; got values from -1 to -1."),
        ):
            labels = PSEUDO._replace(**{label_name: wrong})
            refuses(ValueError, f"{name} {message}", call, LOGITS, LOGITS, labels=labels)
        labels = PSEUDO._replace(**{region_name: REGION[..., :2]})
        message = f"`labels.{region_name}` must have shape (B=2, T=3, H=5, W=6); got (2, 3, 5, 2)."
        refuses(ValueError, message, call, LOGITS, LOGITS, labels=labels)

    def test_fields_of_the_other_loss_are_not_read(self, call: Any, label_name: str, region_name: str) -> None:
        others: Settings = dict.fromkeys(set(PseudoLabels._fields) - {label_name, region_name})
        labels = PSEUDO._replace(**others)
        assert call(LOGITS, LOGITS, labels=labels) == 0


class TestRefusedPieces:
    @pytest.mark.parametrize(
        ("overlap", "area", "threshold", "error", "message"),
        [
            (OVERLAP[:, :3], AREA, 0.5, ValueError, "`overlap` must have shape (B, S, S); got (2, 3, 4)."),
            (OVERLAP[:, :0, :0], AREA[:, :0], 0.5, ValueError, "`overlap` must have S >= 1; got S=0."),
            (OVERLAP, AREA[:1], 0.5, ValueError, "`area` must have shape (B=2, S=4); got (1, 4)."),
            (OVERLAP, AREA, 1.01, ValueError, "`threshold` must be within [0.0, 1.0]; got 1.01."),
            (OVERLAP, AREA, -1, ValueError, "`threshold` must be within [0.0, 1.0]; got -1."),
            (OVERLAP, AREA, NAN, ValueError, "`threshold` must be within [0.0, 1.0]; got nan."),
            (OVERLAP, AREA, False, TypeError, "`threshold` must be a number; got bool."),
        ],
    )
    def test_merge_slots(self, overlap: Any, area: Any, threshold: Any, error: type[Exception], message: str) -> None:
        refuses(error, message, merge_slots, overlap, area, threshold=threshold)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"logits": FLAT}, "`logits` must have shape (B, T, S, H, W); got (2, 3, 4, 30)."),
            ({"logits": LOGITS[:, :, :0]}, "`logits` must have S >= 1; got S=0."),
            ({"logits": LOGITS[:, :0]}, "`logits` must have T >= 1; got T=0."),
            ({"valid": REGION[:1]}, "`valid` must have shape (B=2, T=3, H=5, W=6); got (1, 3, 5, 6)."),
            ({"slot_mask": SLOTS.T}, "`slot_mask` must have shape (B=2, S=4); got (4, 2)."),
        ],
    )
    def test_slot_overlap(self, given: Settings, message: str) -> None:
        refuses(ValueError, message, slot_overlap, **{"logits": LOGITS} | given)

    @pytest.mark.parametrize("call", [neighbor_difference, boundary_region, interior_region])
    @pytest.mark.parametrize(
        ("labels", "valid", "message"),
        [
            (LABELS[:, :0], None, "`labels` must have T >= 1; got T=0."),
            (LABELS[:, :, :0], None, "`labels` must have H >= 1; got H=0."),
            (LABELS[..., :0], None, "`labels` must have W >= 1; got W=0."),
            (LABELS, REGION.mT, "`valid` must have shape (B=2, T=3, H=5, W=6); got (2, 3, 6, 5)."),
            (LABELS, SLOTS, "`valid` must have shape (B=2, T=3); got (2, 4)."),
        ],
    )
    def test_regions(self, call: Any, labels: Any, valid: Any, message: str) -> None:
        refuses(ValueError, message, call, labels, valid=valid)

    @pytest.mark.parametrize(
        ("call", "name"),
        [(boundary_region, "min_different"), (boundary_region, "min_same"), (interior_region, "max_different")],
    )
    def test_neighbor_counts(self, call: Any, name: str) -> None:
        for value in (-1, 11):
            knobs: Settings = {name: value}
            refuses(ValueError, f"`{name}` must be within [0, 10]; got {value}.", call, LABELS, **knobs)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"logits": FLAT}, "`logits` must have shape (B, T, S, H, W); got (2, 3, 4, 30)."),
            ({"logits": LOGITS[:, :, :0]}, "`logits` must have S >= 1; got S=0."),
            ({"target": LABELS[:1]}, "`target` must have shape (B=2, T=3, H=5, W=6); got (1, 3, 5, 6)."),
            ({"target": LABELS + 4}, "`target` must lie within [0, 3]; got values from 4 to 4."),
            ({"target": LABELS - 2}, "`target` must lie within [0, 3]; got values from -2 to -2."),
            ({"region": REGION[:, :2]}, "`region` must have shape (B=2, T=3, H=5, W=6); got (2, 2, 5, 6)."),
            ({"slot_mask": SLOTS[:1]}, "`slot_mask` must have shape (B=2, S=4); got (1, 4)."),
            ({"criterion": "kl"}, "`criterion` must be one of 'mse', 'cross_entropy'; got 'kl'."),
            ({"reduction": "batchmean"}, "`reduction` must be one of 'none', 'sum', 'mean'; got 'batchmean'."),
            ({"temperature": 0}, "`temperature` must be finite and above 0.0; got 0."),
            ({"label_smoothing": -0.5}, "`label_smoothing` must be within [0.0, 1.0]; got -0.5."),
            ({"label_smoothing": 0.5}, "`label_smoothing` must be 0 with criterion='mse'; got 0.5."),
            ({"backend": "fast"}, "`backend` must be one of 'auto', 'torch', 'cpu', 'triton', 'reference'; got 'fast'"),
        ],
    )
    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_distillation(self, backend: str, changes: Settings, message: str) -> None:
        arguments: Settings = {"logits": LOGITS, "target": LABELS, "region": REGION, "backend": backend} | changes
        refuses(ValueError, message, selective_distillation_loss, **arguments)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_label_of_an_absent_slot_is_refused(backend: Any) -> None:
    logits = torch.randn(2, 1, 3, 1, 2)
    target = torch.tensor([[[[0, 1]]], [[[2, 0]]]])
    slot_mask = torch.tensor([[True, True, False], [True, True, False]])
    region = torch.ones(2, 1, 1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"`target` must name .*present slot.*\[0, 1\].*; got 2"):
        selective_distillation_loss(logits, target, region, slot_mask=slot_mask, backend=backend)
    # labels outside the region or in a clip without slots are not read
    region[1, 0, 0, 0] = False
    assert selective_distillation_loss(logits, target, region, slot_mask=slot_mask, backend=backend).isfinite()
    region[1] = True
    slot_mask[1] = False
    assert selective_distillation_loss(logits, target, region, slot_mask=slot_mask, backend=backend).isfinite()


def test_given_labels_of_an_absent_slot_are_refused() -> None:
    enc, dec = torch.randn(2, 1, 2, 3, 4, 4, requires_grad=True).unbind(0)
    labels = pseudo_labels(enc, dec, merge_threshold=None)
    absent = labels.enc_labels[labels.boundary][0]
    slot_mask = (torch.arange(3) != absent)[None]
    with pytest.raises(ValueError, match=r"`labels.enc_labels` must name present slots on selected patches"):
        BoundaryRefinementLoss()(enc, dec, labels=labels, slot_mask=slot_mask)


@pytest.mark.parametrize("criterion", ["mse", "cross_entropy"])
def test_a_tiny_temperature_gives_hard_probabilities(criterion: Any) -> None:
    logits = torch.tensor([1e3, -1e3, 1e3 - 1]).view(1, 1, 3, 1, 1).requires_grad_()
    region = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    for label, value in ((0, 0.0), (1, 2 / 3 if criterion == "mse" else None)):
        target = torch.full((1, 1, 1, 1), label)
        loss = selective_distillation_loss(logits, target, region, criterion=criterion, temperature=2e-38)
        assert value is None or loss.item() == pytest.approx(value, abs=1e-7)
    with pytest.raises(ValueError, match="`temperature` must be finite and at least"):
        selective_distillation_loss(logits, target, region, temperature=1e-39)


def test_a_float_of_eight_bits_is_refused_by_name() -> None:
    small = torch.zeros(1, 1, 2, 2, 2).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"`enc_logits` must have 16, 32 or 64 bits; got torch.float8_e4m3fn"):
        pseudo_labels(small, small)


def test_the_representative_is_a_member_of_the_group_for_any_area() -> None:
    linked = torch.tensor([[[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int64, torch.float16, torch.float64):
        area = torch.tensor([[1, 2, 9]]).to(dtype)
        assert merge_slots(linked, area, threshold=0.5).tolist() == [[1, 1, 2]]
    extremes = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    assert merge_slots(linked, torch.tensor([[*extremes, 9]]), threshold=0.5).tolist() == [[1, 1, 2]]
    assert merge_slots(linked, torch.tensor([[-5, extremes[0], 9]]), threshold=0.5).tolist() == [[0, 0, 2]]
    nan, inf = float("nan"), float("inf")
    assert merge_slots(linked, torch.tensor([[-inf, -1e38, inf]]), threshold=0.5).tolist() == [[1, 1, 2]]
    assert merge_slots(linked, torch.tensor([[nan, 2.0, nan]]), threshold=0.5).tolist() == [[1, 1, 2]]
    assert merge_slots(linked, torch.tensor([[nan, -inf, nan]]), threshold=0.5).tolist() == [[1, 1, 2]]
    assert merge_slots(linked, torch.tensor([[nan, nan, nan]]), threshold=0.5).tolist() == [[0, 0, 2]]


def test_a_link_in_one_direction_suffices() -> None:
    for other in (0.0, float("nan"), float("-inf")):
        overlap = torch.tensor([[[1.0, 0.9], [other, 1.0]]])
        for one in (overlap, overlap.mT):
            assert merge_slots(one, torch.tensor([[1, 2]]), threshold=0.5).tolist() == [[1, 1]]
    alone = torch.ones(1, 2, 2)
    assert merge_slots(alone, torch.tensor([[1, 2]]), threshold=1).tolist() == [[0, 1]]
    nothing = torch.full((1, 2, 2), float("nan"))
    assert merge_slots(nothing, torch.tensor([[1, 2]]), threshold=0.5).tolist() == [[0, 1]]


def test_any_nonzero_byte_is_true() -> None:
    target = torch.zeros(1, 1, 2, 2, dtype=torch.int64)
    region = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8).view(torch.bool)
    logits = torch.randn(1, 1, 3, 2, 2)
    expected = selective_distillation_loss(logits, target, torch.ones(1, 1, 2, 2, dtype=torch.bool))
    assert_close_loss(selective_distillation_loss(logits, target, region), expected)
