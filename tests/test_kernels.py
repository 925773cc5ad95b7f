"""The kernels in Triton's interpreter (on a GPU where there is one) against the golden files and the torch path."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from golden_cases import NAMES, load_golden
from kernel_runs import (
    DEVICE,
    LABEL_SETTINGS,
    SETTINGS,
    assert_same_run,
    on_device,
    quick_interpreter,
    through_kernels,
    through_torch,
    whole_valid,
)
from sample_maps import leaf, sample_maps
from ssync_loss import PseudoLabels
from ssync_loss.functional import pseudo_labels, selective_distillation_loss
from ssync_loss.ssync.engines import triton as kernels
from ssync_loss.ssync.engines.triton import _launch, _tiling
from ssync_loss.testing import (
    DistillationCase,
    SSyncCase,
    assert_close_gradient,
    assert_close_loss,
    assert_same_labels,
    decidable_clips,
    distillation_cases,
    gradient_scale,
    map_pairs,
    reference_pseudo_labels,
    reference_selective_distillation_loss,
    region_knobs,
    ssync_cases,
    thresholds,
)

__all__ = ["quick_interpreter"]

INF, NAN = math.inf, math.nan
CRITERIA = [("mse", 0.0), ("cross_entropy", 0.0), ("cross_entropy", 0.2)]
# an interpreter's work grows with the number of tiles, and every clip has at least one a frame
MAPS = map_pairs(batch=3, max_frames=2, minus_inf=True)
TOP = math.log(2.0)


def labels_of(case: SSyncCase, **changes: Any) -> PseudoLabels:
    chosen = {name: (SETTINGS | changes)[name] for name in LABEL_SETTINGS}
    case = on_device(case)
    labels = kernels.pseudo_labels(*case[:2], valid=whole_valid(case), slot_mask=case.slot_mask, **chosen)
    return PseudoLabels._make(one.cpu() for one in labels)


def distilled(case: DistillationCase, **how: Any) -> Tensor:
    usual: dict[str, Any] = {"criterion": "mse", "label_smoothing": 0.0, "temperature": 1.0, "reduction": "mean"}
    logits, target, region, slot_mask = (None if part is None else part.to(DEVICE) for part in case)
    assert logits is not None
    assert target is not None
    assert region is not None
    return kernels.distill(logits, target, region, slot_mask=slot_mask, **usual | how).cpu()


def random_case(
    *shape: int, seed: int = 0, masks: bool = True, dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32,) * 2
) -> SSyncCase:
    """Return blurred noise, in which slots overlap, neighbors agree and nothing is at a threshold."""
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


def assert_kernels_equal_torch(case: SSyncCase, **how: Any) -> None:
    assert_same_run(through_kernels(case, **how), through_torch(case, **how), case, **how)


class TestGolden:
    @pytest.mark.parametrize("name", NAMES)
    def test_a_step(self, name: str) -> None:
        golden = load_golden(name)
        wanted = golden.expected
        case = SSyncCase(golden.enc_logits.float(), golden.dec_logits.float(), None, None)
        run = through_kernels(case, temperature=golden.temperature, **golden.label_args)
        labels = run.terms.labels
        assert labels is not None
        assert torch.equal(labels.enc_labels, wanted["enc_labels_merged"])
        assert torch.equal(labels.dec_labels, wanted["dec_labels_merged"])
        assert torch.equal(labels.boundary, wanted["is_boundary"])
        assert torch.equal(labels.interior, wanted["is_interior"])
        losses = [wanted[f"loss_{way}_f64"].float() for way in ("enc2dec", "dec2enc")]
        assert_close_loss(run.terms.boundary, losses[0])
        assert_close_loss(run.terms.interior, losses[1])
        assert_close_loss(run.terms.total, losses[0] + losses[1])
        for grad, key, region in (
            (run.grad_enc, "grad_enc_f64", "is_interior"),
            (run.grad_dec, "grad_dec_f64", "is_boundary"),
        ):
            scale = gradient_scale(wanted[region], grad.shape[2], temperature=golden.temperature)
            assert_close_gradient(grad, wanted[key].reshape(grad.shape), scale=scale)

    @pytest.mark.parametrize("name", NAMES)
    def test_one_map_alone(self, name: str) -> None:
        golden = load_golden(name)
        wanted = golden.expected
        logits = golden.dec_logits.float().requires_grad_()
        case = DistillationCase(logits, wanted["enc_labels_merged"], wanted["is_boundary"], None)
        loss = distilled(case, temperature=golden.temperature)
        assert_close_loss(loss, wanted["loss_enc2dec_f64"].float())
        (grad,) = torch.autograd.grad(loss, logits)
        scale = gradient_scale(case.region, logits.shape[2], temperature=golden.temperature)
        assert_close_gradient(grad, wanted["grad_dec_f64"].reshape(grad.shape), scale=scale)


class TestDrawn:
    @given(ssync_cases(maps=MAPS), thresholds(tied=False), region_knobs())
    @settings(max_examples=30)
    def test_labels_equal_the_definition(self, case: SSyncCase, threshold: float | None, knobs: dict[str, Any]) -> None:
        actual = labels_of(case, merge_threshold=threshold, **knobs)
        expected = reference_pseudo_labels(**case._asdict(), merge_threshold=threshold, **knobs)
        clips = decidable_clips(
            case.enc_logits, merge_threshold=threshold, valid=case.valid, slot_mask=case.slot_mask, dyadic=True
        )
        assert_same_labels(actual, expected, clips=clips)

    @pytest.mark.parametrize(("criterion", "smoothing"), CRITERIA)
    @given(
        case=ssync_cases(maps=MAPS),
        threshold=thresholds(tied=False),
        temperature=st.sampled_from((1.0, 0.5, 2.0)),
        weights=st.sampled_from(((1.0, 1.0), (0.25, 3.0))),
    )
    @settings(max_examples=8)
    def test_a_step_equals_the_torch_path(
        self,
        criterion: str,
        smoothing: float,
        case: SSyncCase,
        threshold: float | None,
        temperature: float,
        weights: tuple[float, float],
    ) -> None:
        clips = decidable_clips(
            case.enc_logits, merge_threshold=threshold, valid=case.valid, slot_mask=case.slot_mask, dyadic=True
        )
        assert_kernels_equal_torch(
            SSyncCase._make(None if part is None else part[clips] for part in case),
            merge_threshold=threshold,
            criterion=criterion,
            label_smoothing=smoothing,
            temperature=temperature,
            boundary_weight=weights[0],
            interior_weight=weights[1],
        )

    @pytest.mark.parametrize(("criterion", "smoothing"), CRITERIA)
    @given(
        case=distillation_cases(maps=MAPS),
        temperature=st.sampled_from((1.0, 0.5, 2.0)),
        reduction=st.sampled_from(("mean", "sum", "none")),
    )
    @settings(max_examples=15)
    def test_a_distillation_equals_the_definition(
        self, criterion: str, smoothing: float, case: DistillationCase, temperature: float, reduction: str
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

    @pytest.mark.parametrize(("criterion", "smoothing"), CRITERIA)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_a_distillation_of_some_slots(self, criterion: str, smoothing: float, reduction: str) -> None:
        logits = torch.randn(3, 2, 5, 3, 4)
        slot_mask = torch.tensor([[True] * 5, [True, False, True, False, False], [False] * 5])
        target = 2 * torch.randint(2, (3, 2, 3, 4))
        target[0] += 1
        region = torch.rand(3, 2, 3, 4) < 0.6
        how: dict[str, Any] = {"criterion": criterion, "label_smoothing": smoothing, "reduction": reduction}
        fast, slow = leaf(logits), leaf(logits)
        actual = distilled(DistillationCase(fast, target, region, slot_mask), **how)
        expected = reference_selective_distillation_loss(slow, target, region, slot_mask=slot_mask, **how)
        assert_close_loss(actual, expected)
        upstream = torch.rand(actual.shape)
        (grad,) = torch.autograd.grad(actual, fast, upstream)
        (other,) = torch.autograd.grad(expected, slow, upstream)
        assert_close_gradient(grad, other, scale=float(other.abs().max()))


class TestSizes:
    @pytest.mark.parametrize("num_slots", [1, 2, 3, 5, 8, 11, 16, 17, 33, 64])
    def test_any_number_of_slots(self, num_slots: int) -> None:
        assert_kernels_equal_torch(random_case(2, 2, num_slots, 4, 7, masks=num_slots > 1), merge_threshold=0.35)

    @pytest.mark.parametrize("num_slots", [64, 41])
    def test_a_chain_of_slots_is_merged_to_its_end(self, num_slots: int) -> None:
        # neighbors share one of the two patches each is active on, so every overlap is 1/3
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

    def test_an_empty_batch(self) -> None:
        case = SSyncCase(torch.zeros(0, 2, 3, 4, 5), torch.zeros(0, 2, 3, 4, 5), None, torch.zeros(0, 3).bool())
        run = through_kernels(case)
        assert [one.item() for one in run.terms[:5]] == [0.0, 0.0, 0.0, 0, 0]
        assert run.grad_enc.shape == run.grad_dec.shape == case.enc_logits.shape
        assert_kernels_equal_torch(case)
        logits, patches = leaf(case.enc_logits), torch.zeros(0, 2, 4, 5, dtype=torch.int64)
        for reduction in ("mean", "sum", "none"):
            loss = distilled(DistillationCase(logits, patches, patches.bool(), None), reduction=reduction)
            assert loss.sum() == 0
            assert torch.autograd.grad(loss.sum(), logits)[0].shape == logits.shape

    @pytest.mark.parametrize("num_warps", [1, 4])
    @pytest.mark.parametrize("criterion", ["mse", "cross_entropy"])
    def test_work_cut_into_many_pieces(self, criterion: str, num_warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        # several tiles a frame, parts a clip, chunks a frame, shares a loss; none of them a divisor of anything
        monkeypatch.setattr(_tiling, "THREAD_CELLS", 2)
        monkeypatch.setattr(_tiling, "NUM_WARPS", num_warps)
        monkeypatch.setattr(_tiling, "MANY_TILES", 1)
        for name, value in {
            "MAX_PARTS": 5,
            "OVERLAP_PATCHES": 24,
            "PATCHES_PER_PART": 1,
            "OVERLAP_TILE": 16,
            "PARTS_CELLS": 32,
            "MAX_SHARES": 7,
            "SHARES_AT_ONCE": 4,
            "MERGE_CELLS": 256,
            "TARGET_TILE": 32,
        }.items():
            monkeypatch.setattr(_launch, name, value)
        case = random_case(2, 3, 5, 7, 11)
        tiling = _tiling.Tiling.of(case.enc_logits)
        assert (tiling.tile, tiling.num_chunks) == ((8, 10) if num_warps == 1 else (32, 3))
        assert_kernels_equal_torch(case, merge_threshold=0.2, criterion=criterion)

    @pytest.mark.parametrize("group_frames", [2, 3])
    def test_small_frames_share_a_program(self, group_frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_launch, "OVERLAP_PATCHES", group_frames * 6)
        monkeypatch.setattr(_launch, "PATCHES_PER_PART", 1)
        assert_kernels_equal_torch(random_case(2, 5, 4, 2, 3), merge_threshold=0.2)

    def test_many_clips_share_fewer_programs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_launch, "LABEL_PROGRAMS", 4)
        assert_kernels_equal_torch(random_case(3, 4, 4, 2, 3), merge_threshold=0.2)


class TestMemoryLayout:
    """Maps, masks and gradients that lie in memory in another order than their axes, with gaps, or twice."""

    @pytest.mark.parametrize(
        "view",
        [
            pytest.param(lambda one: one.movedim(2, -1).contiguous().movedim(-1, 2), id="slots last"),
            pytest.param(lambda one: torch.stack([one, one - 1], -1)[..., 0], id="a channel of many"),
            pytest.param(lambda one: torch.cat([one, one], 3)[:, :, :, ::2], id="every other row"),
            pytest.param(lambda one: one.repeat_interleave(2, -1)[..., ::2], id="every other column"),
            pytest.param(lambda one: one.transpose(0, 1).contiguous().transpose(0, 1), id="frames first"),
            pytest.param(lambda one: one.mT.contiguous().mT, id="columns first"),
            pytest.param(lambda one: one[:, :1].expand_as(one), id="one frame for all"),
            pytest.param(lambda one: one[:1, :, :1, :, :1].expand_as(one), id="one column for all"),
        ],
    )
    def test_strided_maps(self, view: Any) -> None:
        case = on_device(random_case(2, 2, 3, 4, 6))
        strided = case._replace(enc_logits=view(case.enc_logits), dec_logits=view(case.dec_logits))
        assert strided.enc_logits.shape[:3] == case.enc_logits.shape[:3]
        valid = case.valid
        assert valid is not None
        valid = valid[..., : strided.enc_logits.shape[3], : strided.enc_logits.shape[4]]
        assert_kernels_equal_torch(strided._replace(valid=valid), merge_threshold=0.2)

    def test_maps_of_different_strides(self) -> None:
        case = on_device(random_case(2, 2, 3, 4, 6))
        assert_kernels_equal_torch(case._replace(enc_logits=case.enc_logits.mT.contiguous().mT), merge_threshold=0.2)

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
            patches = kernels.distill(
                *case[:3], slot_mask=None, criterion="mse", label_smoothing=0.0, temperature=1.0, reduction="none"
            )
            expected = selective_distillation_loss(*case[:3], reduction="none", backend="torch")
            ones = torch.ones((), device=DEVICE)
            for upstream in ((2 * ones).expand(2, 2, 4, 6), torch.randn(2, 2, 6, 4, device=DEVICE).mT):
                (grad,) = torch.autograd.grad(patches, logits, upstream, retain_graph=True)
                (other,) = torch.autograd.grad(expected, logits, upstream, retain_graph=True)
                assert_close_gradient(grad, other, scale=2.0 * float(upstream.abs().max()))

    def test_offsets_beyond_32_bits(self) -> None:
        # memory that is reserved, and never touched but for a few pages
        far = 2**30 + 64
        try:
            memory = torch.empty(2 * far + 256, dtype=torch.float16, device=DEVICE)
        except RuntimeError as error:
            pytest.fail(f"4 GiB of address space are needed: {error}")
        case = on_device(random_case(1, 3, 3, 3, 4, dtypes=(torch.float16, torch.float16)))
        # from slot to slot, from frame to frame, from row to row
        for strides in ((0, 16, far, 4, 1), (0, far, 16, 4, 1), (0, 64, 16, far, 1)):
            enc = memory.as_strided(case.enc_logits.shape, strides)
            enc.copy_(case.enc_logits)
            assert_kernels_equal_torch(case._replace(enc_logits=enc), merge_threshold=0.2)

    def test_gradients_lie_as_their_maps_do(self) -> None:
        case = on_device(random_case(2, 2, 3, 4, 6))
        enc = case.enc_logits.movedim(2, -1).contiguous().movedim(-1, 2)
        run = through_kernels(case._replace(enc_logits=enc))
        assert run.grad_enc.stride() == enc.stride()
        assert run.grad_dec.stride() == case.dec_logits.stride()


class TestPrecision:
    @pytest.mark.parametrize(
        "dtypes",
        [
            (torch.float16, torch.float16),
            (torch.bfloat16, torch.bfloat16),
            (torch.float16, torch.float32),
            (torch.float32, torch.bfloat16),
        ],
    )
    @pytest.mark.parametrize(("criterion", "smoothing"), CRITERIA[::2])
    def test_halves(self, dtypes: tuple[torch.dtype, torch.dtype], criterion: str, smoothing: float) -> None:
        case = random_case(2, 2, 5, 4, 7, dtypes=dtypes)
        how: dict[str, Any] = {"criterion": criterion, "label_smoothing": smoothing, "merge_threshold": 0.2}
        run = through_kernels(case, **how)
        assert run.terms.total.dtype == torch.float32
        assert (run.grad_enc.dtype, run.grad_dec.dtype) == dtypes
        assert_same_run(run, through_torch(case, **how), case, **how)

    @pytest.mark.parametrize(("criterion", "smoothing"), CRITERIA)
    @pytest.mark.parametrize("confidence", [1e-3, 3.0, 8.0, 15.0, 40.0, 3e4])
    def test_from_undecided_to_saturated(self, confidence: float, criterion: str, smoothing: float) -> None:
        # the label's slot ahead on even patches, behind on odd ones
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

    # a sum of what wrong labels cost at the smallest temperature
    @pytest.mark.filterwarnings("ignore:overflow encountered in reduce:RuntimeWarning")
    @pytest.mark.parametrize("temperature", [1.2e-38, 0.07, 1e4])
    @pytest.mark.parametrize("criterion", ["mse", "cross_entropy"])
    def test_any_temperature(self, temperature: float, criterion: str) -> None:
        case = random_case(1, 2, 4, 3, 5)
        how: dict[str, Any] = {"temperature": temperature, "criterion": criterion}
        actual, expected = through_kernels(case, **how), through_torch(case, **how)
        for one, other in zip(actual.terms[:3], expected.terms[:3], strict=True):
            assert_close_loss(one, other)
        torch.testing.assert_close(actual.grad_enc * temperature, expected.grad_enc * temperature, rtol=0, atol=1e-6)
        torch.testing.assert_close(actual.grad_dec * temperature, expected.grad_dec * temperature, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("num_patches", [41, 47, 55, 61, 83])
    def test_a_mean_is_a_sum_divided_by_a_count(self, num_patches: int) -> None:
        # times the rounded 1/41 a sum of ones is below 1: all slots would be active everywhere, and one
        enc = torch.ones(1, 1, 3, 1, num_patches)
        labels = labels_of(SSyncCase(enc, enc, None, None), merge_threshold=0.0)
        assert labels.representative.tolist() == [[0, 1, 2]]


class TestUndefined:
    @pytest.mark.parametrize("value", [NAN, -NAN, INF])
    @pytest.mark.parametrize("criterion", ["mse", "cross_entropy"])
    @pytest.mark.parametrize("which", [0, 1])
    def test_dirt_that_counts_makes_all_of_it_nan(self, value: float, criterion: str, which: int) -> None:
        case = random_case(2, 2, 3, 4, 5)
        assert case.valid is not None
        assert case.slot_mask is not None
        case.valid[1, 1, 2, 3] = case.slot_mask[1, 2] = True
        (case.enc_logits, case.dec_logits)[which][1, 1, 2, 2, 3] = value
        run = through_kernels(case, criterion=criterion)
        assert all(one.isnan() for one in run.terms[:3])
        assert run.terms.labels is not None
        for grad, region in (
            (run.grad_enc, run.terms.labels.interior),
            (run.grad_dec, run.terms.labels.boundary),
        ):
            assert region.any()
            assert torch.equal(grad.isnan().all(2), region)
            assert torch.equal(grad.isnan().any(2), region)
            assert not grad.movedim(2, -1)[~region].any()
        expected = through_torch(case, criterion=criterion)
        assert all(one.isnan() for one in expected.terms[:3])

    @pytest.mark.parametrize("value", [NAN, INF, -INF, 3.0])
    def test_dirt_that_does_not_count_changes_nothing(self, value: float) -> None:
        case = random_case(2, 2, 4, 3, 5)
        assert case.valid is not None
        assert case.slot_mask is not None
        seen = case.valid[:, :, None] & case.slot_mask[:, None, :, None, None]
        dirty = case._replace(
            enc_logits=torch.where(seen, case.enc_logits, value), dec_logits=torch.where(seen, case.dec_logits, value)
        )
        clean, actual = through_kernels(case), through_kernels(dirty)
        assert actual.terms.labels is not None
        assert clean.terms.labels is not None
        assert_same_labels(actual.terms.labels, clean.terms.labels)
        assert all(torch.equal(one, other) for one, other in zip(actual.terms[:5], clean.terms[:5], strict=True))
        assert torch.equal(actual.grad_enc, clean.grad_enc)
        assert torch.equal(actual.grad_dec, clean.grad_dec)

    def test_dirt_is_seen_where_nothing_is_taught(self) -> None:
        # one slot: no boundary, and an interior everywhere but beside what differs
        enc = torch.zeros(1, 1, 2, 1, 4)
        dec = torch.tensor([[9.0, 0.0, 9.0, 0.0], [0.0, 9.0, 0.0, 9.0]]).view(1, 1, 2, 1, 4)
        dec[0, 0, 0, 0, 0] = NAN
        run = through_kernels(SSyncCase(enc, dec, None, None))
        assert run.terms.num_boundary == run.terms.num_interior == 0
        assert all(one.isnan() for one in run.terms[:3])
        assert not run.grad_enc.any()
        assert not run.grad_dec.any()

    @pytest.mark.parametrize("clean", [True, False])
    def test_what_was_found_before_counts_too(self, clean: bool) -> None:
        case = random_case(1, 2, 3, 4, 5)
        run = through_kernels(case, clean=torch.tensor(clean, device=DEVICE))
        assert run.terms.total.isnan() == (not clean)
        assert run.grad_enc.isnan().any() == (not clean)

    def test_a_patch_with_nan_is_labeled_with_a_present_slot(self) -> None:
        enc = torch.full((1, 1, 3, 1, 2), NAN)
        mask = torch.tensor([[False, True, True]])
        labels = labels_of(SSyncCase(enc, torch.zeros_like(enc), None, mask))
        assert labels.enc_labels.unique().tolist() == [1]

    @pytest.mark.parametrize(("criterion", "smoothing"), CRITERIA)
    @pytest.mark.parametrize("value", [NAN, INF])
    def test_a_distillation_looks_at_selected_patches_only(
        self, value: float, criterion: str, smoothing: float
    ) -> None:
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

    def test_a_label_that_is_no_slot_makes_its_patch_nan(self) -> None:
        logits = leaf(torch.zeros(1, 1, 2, 1, 5))
        target = torch.tensor([[[[0, 2, -1, 1, 2**40]]]])
        region = torch.tensor([[[[True, True, True, False, True]]]])
        patches = distilled(DistillationCase(logits, target, region, None), reduction="none")
        assert patches.isnan().flatten().tolist() == [False, True, True, False, True]
        # and nothing outside the map is read or written
        (grad,) = torch.autograd.grad(patches, logits, torch.ones_like(patches))
        assert grad[..., [1, 2, 4]].eq(0).all()

    def test_all_slots_at_minus_infinity_are_uniform(self) -> None:
        logits = leaf(torch.full((1, 1, 4, 1, 2), -INF))
        case = DistillationCase(logits, torch.zeros(1, 1, 1, 2, dtype=torch.int64), torch.ones(1, 1, 1, 2).bool(), None)
        squared = distilled(case)
        assert_close_loss(squared, torch.tensor((9 / 16 + 3 / 16) / 4))
        entropy = distilled(case, criterion="cross_entropy")
        assert_close_loss(entropy, torch.tensor(math.log(4)))
        for loss in (squared, entropy):
            assert not torch.autograd.grad(loss, logits)[0].any()


class TestMeaning:
    """A few numbers by hand, so that not everything hangs on another implementation."""

    def test_two_patches(self) -> None:
        # the encoder: slot 0 left, slot 1 right; the decoder is undecided: (1/2)^2 each
        enc = torch.tensor([[2.0, 0.0], [0.0, 2.0]]).view(1, 1, 2, 1, 2)
        case = SSyncCase(enc, torch.zeros_like(enc), None, None)
        run = through_kernels(case, interior_weight=0.5)
        assert run.terms.boundary == 0.25
        assert run.terms.num_boundary == run.terms.num_interior == 2
        # undecided, the first slot is the label: at the left P = (1, e^-2) / (1 + e^-2), at the right the other way
        wrong = 1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))
        interior = torch.tensor(sum(p * p for p in wrong) / 2)
        assert_close_loss(run.terms.interior, interior)
        assert_close_loss(run.terms.total, 0.25 + 0.5 * interior)
        # -(2 / (M S)) P_y (r^2 + Q) = -(1/2) (1/2) (1/2) on the label, the opposite off it
        assert run.grad_dec.flatten().tolist() == [-0.125, 0.125, 0.125, -0.125]

    def test_nothing_selected_is_exactly_zero(self) -> None:
        maps = torch.zeros(1, 1, 1, 3, 3)
        case = SSyncCase(maps, maps, torch.zeros(1, 1, 3, 3, dtype=torch.bool), None)
        run = through_kernels(case)
        assert [one.item() for one in run.terms[:5]] == [0.0, 0.0, 0.0, 0, 0]
        assert not run.grad_enc.any()
        assert not run.grad_dec.any()

    def test_cross_entropy_of_a_slot_that_cannot_win(self) -> None:
        logits = leaf(torch.tensor([-INF, 0.0, TOP]).view(1, 1, 3, 1, 1))
        case = DistillationCase(logits, torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, 1).bool(), None)
        loss = distilled(case, criterion="cross_entropy")
        assert_close_loss(loss, torch.tensor(-math.log(torch.finfo(torch.float32).tiny)))
        assert not torch.autograd.grad(loss, logits)[0].any()

    def test_labels_are_those_of_the_public_function(self) -> None:
        enc, dec = sample_maps(requires_grad=False)
        actual = labels_of(SSyncCase(enc, dec, None, None))
        assert_same_labels(actual, pseudo_labels(enc, dec, backend="torch"))
