"""Sizes, tiles, strides and precision of the kernels. ``test_engines.py`` tests all engines.

The kernels run in Triton's interpreter, or on a GPU if there is one, against the torch path and the references.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_runs import DEVICE, Run, distilled, labels_of, quick_interpreter
from sample_maps import leaf
from ssync_loss.functional import selective_distillation_loss
from ssync_loss.ssync.engines.triton import _labels, _launch, _tiling
from ssync_loss.testing import (
    DistillationCase,
    SSyncCase,
    assert_close_gradient,
    assert_close_loss,
    assert_same_labels,
    distillation_cases,
    gradient_scale,
    map_pairs,
    reference_selective_distillation_loss,
)
from test_engines import assert_same_step

__all__ = ["quick_interpreter"]

INF, NAN = math.inf, math.nan
CRITERIA = [("mse", 0.0), ("cross_entropy", 0.0), ("cross_entropy", 0.2)]
# the interpreter's time grows with the number of tiles, and every frame has at least one
MAPS = map_pairs(batch=3, max_frames=2, minus_inf=True)


def random_case(
    *shape: int, seed: int = 0, masks: bool = True, dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32,) * 2
) -> SSyncCase:
    """Return blurred noise, so that slots overlap, neighbors agree, and no comparison is close."""
    generator = torch.Generator().manual_seed(seed)
    B, T, S, H, W = shape

    def blurred(dtype: torch.dtype) -> Tensor:
        coarse = torch.randn(B * T, S, (H + 2) // 3, (W + 2) // 3, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, size=(H, W)) * 3
        return (fine.view(shape) + torch.randn(shape, generator=generator)).to(dtype)

    enc, dec = blurred(dtypes[0]), blurred(dtypes[1])
    if not masks:
        return SSyncCase(enc, dec, None, None)
    valid = torch.rand(B, T, H, W, generator=generator) < 0.9
    slot_mask = torch.rand(B, S, generator=generator) < 0.8
    slot_mask[:, -1] |= ~slot_mask.any(1)
    return SSyncCase(enc, dec, valid, slot_mask)


def on_device(case: SSyncCase) -> SSyncCase:
    return SSyncCase._make(None if part is None else part.to(DEVICE) for part in case)


def assert_kernels_equal_torch(case: SSyncCase, **how: Any) -> None:
    actual: Any = Run("triton", case, **how)
    expected: Any = Run("torch", case, **how)
    assert_same_step(actual, expected, case, **how)


@pytest.mark.parametrize(("criterion", "smoothing"), CRITERIA)
@given(
    case=distillation_cases(maps=MAPS),
    temperature=st.sampled_from((1.0, 0.5, 2.0)),
    reduction=st.sampled_from(("mean", "sum", "none")),
)
@settings(max_examples=8)
def test_a_distillation_equals_the_reference(
    criterion: str, smoothing: float, case: DistillationCase, temperature: float, reduction: str
) -> None:
    how: dict[str, Any] = {
        "criterion": criterion,
        "label_smoothing": smoothing,
        "temperature": temperature,
        "reduction": reduction,
    }
    fast, slow = leaf(case.logits), leaf(case.logits)
    actual = distilled(case._replace(logits=fast), **how)
    expected = reference_selective_distillation_loss(**case._replace(logits=slow)._asdict(), **how)
    assert_close_loss(actual, expected)
    upstream = torch.randn(actual.shape)
    actual.backward(upstream)
    expected.backward(upstream)
    scale = 2.0 / temperature
    if reduction == "mean":
        scale = gradient_scale(
            case.region, fast.shape[2], criterion=criterion, temperature=temperature, slot_mask=case.slot_mask
        )
    assert_close_gradient(fast.grad, slow.grad, scale=scale * float(upstream.abs().max()))


class TestSizes:
    @pytest.mark.parametrize("num_slots", [1, 2, 3, 5, 8, 11, 16, 17, 33, 64])
    def test_any_number_of_slots(self, num_slots: int) -> None:
        assert_kernels_equal_torch(random_case(2, 2, num_slots, 4, 7, masks=num_slots > 1), merge_threshold=0.35)

    @pytest.mark.parametrize("num_slots", [64, 41])
    def test_a_long_chain_of_slots_merges(self, num_slots: int) -> None:
        # every slot is active on two patches and shares one with each neighbor, so overlaps are 1/3
        enc = torch.zeros(1, 1, num_slots, 1, num_slots + 1)
        for slot in range(num_slots):
            enc[0, 0, slot, 0, slot : slot + 2] = 9.0
        case = SSyncCase(enc, enc, None, None)
        assert labels_of(case, merge_threshold=0.3).representative.unique().numel() == 1
        assert torch.equal(labels_of(case, merge_threshold=0.34).representative, torch.arange(num_slots)[None])

    @pytest.mark.parametrize(
        "shape", [(1, 1, 3, 1, 1), (1, 5, 3, 1, 1), (2, 1, 4, 1, 9), (2, 1, 4, 9, 1), (1, 2, 3, 13, 3)]
    )
    def test_any_grid(self, shape: tuple[int, ...]) -> None:
        assert_kernels_equal_torch(random_case(*shape))

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_a_distillation_of_no_clips(self, reduction: str) -> None:
        logits, patches = leaf(torch.zeros(0, 2, 3, 4, 5)), torch.zeros(0, 2, 4, 5, dtype=torch.int64)
        loss = distilled(DistillationCase(logits, patches, patches.bool(), None), reduction=reduction)
        assert loss.sum() == 0
        assert torch.autograd.grad(loss.sum(), logits)[0].shape == logits.shape

    @pytest.mark.parametrize("num_warps", [1, 4])
    @pytest.mark.parametrize("criterion", ["mse", "cross_entropy"])
    def test_work_cut_into_many_pieces(self, criterion: str, num_warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        # several tiles per frame, parts per clip, chunks per frame and shares per loss, without common divisors
        monkeypatch.setattr(_tiling, "THREAD_CELLS", 2)
        monkeypatch.setattr(_tiling, "NUM_WARPS", num_warps)
        monkeypatch.setattr(_tiling, "MANY_TILES", 1)
        for name, value in {
            "MAX_PARTS": 5,
            "OVERLAP_PATCHES": 24,
            "PATCHES_PER_PART": 1,
            "OVERLAP_TILE": 16,
            "PARTS_CELLS": 32,
            "MERGE_CELLS": 256,
            "TARGET_TILE": 32,
        }.items():
            monkeypatch.setattr(_labels, name, value)
        monkeypatch.setattr(_launch, "MAX_SHARES", 7)
        monkeypatch.setattr(_launch, "SHARES_AT_ONCE", 4)
        case = random_case(2, 3, 5, 7, 11)
        tiling = _tiling.Tiling.of(case.enc_logits)
        assert (tiling.tile, tiling.num_chunks) == ((8, 10) if num_warps == 1 else (32, 3))
        assert_kernels_equal_torch(case, merge_threshold=0.2, criterion=criterion)

    @pytest.mark.parametrize("group_frames", [2, 3])
    def test_small_frames_share_a_program(self, group_frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_labels, "OVERLAP_PATCHES", group_frames * 6)
        monkeypatch.setattr(_labels, "PATCHES_PER_PART", 1)
        assert_kernels_equal_torch(random_case(2, 5, 4, 2, 3), merge_threshold=0.2)

    def test_many_clips_share_fewer_programs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_labels, "LABEL_PROGRAMS", 4)
        assert_kernels_equal_torch(random_case(3, 4, 4, 2, 3), merge_threshold=0.2)


class TestMemoryLayout:
    """Maps, masks and gradients with permuted, strided or repeated memory."""

    @pytest.mark.parametrize(
        "view",
        [
            pytest.param(lambda one: torch.cat([one, one], 3)[:, :, :, ::2], id="every other row"),
            pytest.param(lambda one: one[:1, :, :1, :, :1].expand_as(one), id="one column for all"),
        ],
    )
    def test_strided_maps(self, view: Any) -> None:
        case = on_device(random_case(2, 2, 3, 4, 6))
        strided = case._replace(enc_logits=view(case.enc_logits), dec_logits=view(case.dec_logits))
        assert_kernels_equal_torch(strided, merge_threshold=0.2)

    def test_strided_masks(self) -> None:
        case = on_device(random_case(2, 3, 4, 3, 5))
        for valid in (
            torch.tensor([[True, False, True], [True, True, True]], device=DEVICE)[:, :, None, None].expand(2, 3, 3, 5),
            torch.ones(3, 5, dtype=torch.bool, device=DEVICE).tril().expand(2, 3, 3, 5),
            torch.ones(2, 3, 5, 3, dtype=torch.bool, device=DEVICE).tril().mT,
        ):
            slot_mask = torch.tensor([[True, True], [False, True], [True, True], [True, False]], device=DEVICE).T
            assert_kernels_equal_torch(case._replace(valid=valid, slot_mask=slot_mask), merge_threshold=0.2)

    def test_strided_labels_and_gradients_of_a_distillation(self) -> None:
        logits = leaf(random_case(2, 2, 3, 4, 6).enc_logits.to(DEVICE))
        target = torch.randint(3, (2, 2, 6, 8), device=DEVICE).mT[:, :, ::2]
        region = torch.rand(2, 1, 4, 6, device=DEVICE).gt(0.4).expand(2, 2, 4, 6)
        for dtype in (torch.int64, torch.int32, torch.uint8, torch.int8):
            case = DistillationCase(logits, target.to(dtype), region, None)
            patches = selective_distillation_loss(*case[:3], reduction="none", backend="triton")
            expected = selective_distillation_loss(*case[:3], reduction="none", backend="torch")
            ones = torch.ones((), device=DEVICE)
            for upstream in ((2 * ones).expand(2, 2, 4, 6), torch.randn(2, 2, 6, 4, device=DEVICE).mT):
                (grad,) = torch.autograd.grad(patches, logits, upstream, retain_graph=True)
                (other,) = torch.autograd.grad(expected, logits, upstream, retain_graph=True)
                assert_close_gradient(grad, other, scale=2.0 * float(upstream.abs().max()))

    def test_offsets_beyond_32_bits(self) -> None:
        # only a few pages of this memory are used
        far = 2**30 + 64
        try:
            memory = torch.empty(2 * far + 256, dtype=torch.float16, device=DEVICE)
        except RuntimeError as error:
            pytest.fail(f"4 GiB of address space are needed: {error}")
        case = on_device(random_case(1, 3, 3, 3, 4, dtypes=(torch.float16, torch.float16)))
        # large strides of slots, of frames, of rows
        for strides in ((0, 16, far, 4, 1), (0, far, 16, 4, 1), (0, 64, 16, far, 1)):
            enc = memory.as_strided(case.enc_logits.shape, strides)
            enc.copy_(case.enc_logits)
            assert_kernels_equal_torch(case._replace(enc_logits=enc), merge_threshold=0.2)

    def test_gradients_have_the_strides_of_their_maps(self) -> None:
        case = on_device(random_case(2, 2, 3, 4, 6))
        enc = case.enc_logits.movedim(2, -1).contiguous().movedim(-1, 2)
        run = Run("triton", case._replace(enc_logits=enc))
        assert [one.stride() for one in run.grads] == [enc.stride(), case.dec_logits.stride()]


class TestPrecision:
    @pytest.mark.parametrize(("criterion", "smoothing"), CRITERIA)
    @pytest.mark.parametrize("confidence", [1e-3, 3.0, 8.0, 15.0, 40.0, 3e4])
    def test_any_confidence(self, confidence: float, criterion: str, smoothing: float) -> None:
        # the target has the largest logit on even patches and the smallest on odd patches
        logits = torch.randn(1, 2, 6, 3, 4)
        target = torch.randint(6, (1, 2, 3, 4))
        sign = torch.tensor([1.0, -1.0]).repeat(12).view(1, 2, 1, 3, 4)
        logits += confidence * sign * torch.nn.functional.one_hot(target, 6).movedim(-1, 2)
        case = DistillationCase(leaf(logits), target, torch.ones_like(target, dtype=torch.bool), None)
        how: dict[str, Any] = {"criterion": criterion, "label_smoothing": smoothing, "reduction": "none"}
        actual = distilled(case, **how)
        slow = leaf(logits)
        expected = reference_selective_distillation_loss(**case._replace(logits=slow)._asdict(), **how)
        assert_close_loss(actual, expected)
        (grad,) = torch.autograd.grad(actual.sum(), case.logits)
        assert_close_gradient(grad, torch.autograd.grad(expected.sum(), slow)[0], scale=2.0)

    # losses of wrong labels at the smallest temperature overflow in a sum
    @pytest.mark.filterwarnings("ignore:overflow encountered in reduce:RuntimeWarning")
    @pytest.mark.parametrize("temperature", [1.2e-38, 0.07, 1e4])
    @pytest.mark.parametrize("criterion", ["mse", "cross_entropy"])
    def test_any_temperature(self, temperature: float, criterion: str) -> None:
        case = random_case(1, 2, 4, 3, 5)
        how: dict[str, Any] = {"temperature": temperature, "criterion": criterion}
        actual, expected = Run("triton", case, **how), Run("torch", case, **how)
        for one, other in zip(actual.values, expected.values, strict=True):
            assert_close_loss(one, other)
        for one, other in zip(actual.grads, expected.grads, strict=True):
            torch.testing.assert_close(one * temperature, other * temperature, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("num_patches", [41, 47, 55, 61, 83])
    def test_a_mean_divides_a_sum_by_a_count(self, num_patches: int) -> None:
        # a sum of ones times the rounded 1/41 is below 1, which would make all slots active
        enc = torch.ones(1, 1, 3, 1, num_patches)
        labels = labels_of(SSyncCase(enc, enc, None, None), merge_threshold=0.0)
        assert labels.representative.tolist() == [[0, 1, 2]]


class TestUndefined:
    @pytest.mark.parametrize("value", [NAN, INF, -INF, 3.0])
    def test_nan_in_masked_cells_changes_nothing(self, value: float) -> None:
        case = random_case(2, 2, 4, 3, 5)
        assert case.valid is not None
        assert case.slot_mask is not None
        seen = case.valid[:, :, None] & case.slot_mask[:, None, :, None, None]
        dirty = case._replace(
            enc_logits=torch.where(seen, case.enc_logits, value), dec_logits=torch.where(seen, case.dec_logits, value)
        )
        clean, actual = Run("triton", case), Run("triton", dirty)
        assert_same_labels(actual.labels, clean.labels)
        assert all(torch.equal(*pair) for pair in zip(actual.values, clean.values, strict=True))
        assert all(torch.equal(*pair) for pair in zip(actual.grads, clean.grads, strict=True))

    @pytest.mark.parametrize("clean", [True, False])
    def test_a_given_flag_of_nan_counts(self, clean: bool) -> None:
        case = random_case(1, 2, 3, 4, 5)
        run = Run("triton", case, clean=torch.tensor(clean, device=DEVICE))
        assert run.loss.isnan() == (not clean)
        assert run.grads[0].isnan().any() == (not clean)

    def test_the_label_of_a_nan_patch_is_a_present_slot(self) -> None:
        enc = torch.full((1, 1, 3, 1, 2), NAN)
        mask = torch.tensor([[False, True, True]])
        labels = labels_of(SSyncCase(enc, torch.zeros_like(enc), None, mask))
        assert labels.enc_labels.unique().tolist() == [1]

    @pytest.mark.parametrize(("criterion", "smoothing"), CRITERIA)
    @pytest.mark.parametrize("value", [NAN, INF])
    def test_a_distillation_reads_only_selected_patches(self, value: float, criterion: str, smoothing: float) -> None:
        logits = torch.zeros(1, 1, 2, 1, 3)
        logits[..., :2] = value
        logits = leaf(logits)
        region = torch.tensor([[[[True, False, True]]]])
        case = DistillationCase(logits, torch.zeros(1, 1, 1, 3, dtype=torch.int64), region, None)
        how: dict[str, Any] = {"criterion": criterion, "label_smoothing": smoothing}
        patches = distilled(case, **how, reduction="none")
        assert patches.isnan().flatten().tolist() == [True, False, False]
        (grad,) = torch.autograd.grad(patches.sum(), logits)
        assert grad.isnan().any(2).flatten().tolist() == [True, False, False]
        assert not grad[..., 1].any()
        assert distilled(case, **how).isnan()

    def test_a_label_out_of_range_makes_its_patch_nan(self) -> None:
        logits = leaf(torch.zeros(1, 1, 2, 1, 5))
        target = torch.tensor([[[[0, 2, -1, 1, 2**40]]]])
        region = torch.tensor([[[[True, True, True, False, True]]]])
        patches = distilled(DistillationCase(logits, target, region, None), reduction="none")
        assert patches.isnan().flatten().tolist() == [False, True, True, False, True]
        # no memory outside the map is read or written
        (grad,) = torch.autograd.grad(patches, logits, torch.ones_like(patches))
        assert grad[..., [1, 2, 4]].eq(0).all()
