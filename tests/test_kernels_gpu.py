"""The kernels on a GPU: values, races, synchronization, CUDA graphs, access out of bounds."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_runs import KERNELS, Run
from sample_maps import leaf
from ssync_loss import SSyncTerms
from ssync_loss.ssync.engines import ENGINES
from ssync_loss.ssync.maps import Maps
from ssync_loss.ssync.settings import Settings
from ssync_loss.testing import SSyncCase, assert_close_gradient, assert_close_loss, assert_same_labels, gradient_scale
from test_engines import assert_same_step

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PUBLISHED = [(64, 4, 11, 24, 24), (64, 4, 7, 37, 37), (16, 4, 15, 24, 24)]
# tiles of four warps, chunks of frames, all powers of two for slots, very many patches, very many clips
LARGE = [(2, 3, 8, 96, 128), (2, 2, 24, 130, 67), (1, 2, 64, 80, 80), (1, 16, 11, 256, 256), (4096, 1, 5, 6, 6)]
# not close to any small fraction
THRESHOLD = 0.6180339887
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
CRITERIA = [("mse", 0.0), ("cross_entropy", 0.0), ("cross_entropy", 0.2)]


def scene(*shape: int, dtype: torch.dtype = torch.float32, masks: bool = False, seed: int = 0) -> SSyncCase:
    """Return blobs and noise on the device in multiples of 1/8, whose sums do not depend on the order."""
    generator = torch.Generator("cuda").manual_seed(seed)
    B, T, S, H, W = shape
    maps = []
    for _ in range(2):
        coarse = torch.randint(-24, 25, (B * T, S, (H + 5) // 6, (W + 5) // 6), generator=generator, device="cuda")
        blobs = torch.nn.functional.interpolate(coarse.float(), size=(H, W)).view(shape)
        maps.append(((blobs + torch.randint(-6, 7, shape, generator=generator, device="cuda")) / 8).to(dtype))
    # copied slots merge
    maps[0][:, :, 1::3] = maps[0][:, :, : maps[0][:, :, 1::3].shape[2]].clone()
    enc, dec = maps
    if not masks:
        return SSyncCase(enc, dec, None, None)
    valid = torch.rand(B, T, H, W, generator=generator, device="cuda") < 0.9
    slot_mask = torch.rand(B, S, generator=generator, device="cuda") < 0.8
    slot_mask[:, 0] = True
    return SSyncCase(enc, dec, valid, slot_mask)


def leaves(case: SSyncCase) -> Maps:
    return Maps(leaf(case.enc_logits), leaf(case.dec_logits), case.valid, case.slot_mask, None)


def taken(case: SSyncCase, *, backend: str = "triton", **settings: Any) -> tuple[SSyncTerms, tuple[Tensor, ...]]:
    """Run one step without leaving the GPU."""
    maps = leaves(case)
    terms = ENGINES[backend].terms(maps, Settings(**settings))
    return terms, torch.autograd.grad(terms.total, (maps.enc, maps.dec))


@pytest.fixture
def no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


class TestValues:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("masks", [False, True])
    @pytest.mark.parametrize("num_slots", [1, 3, 8, 11, 16, 24, 33, 64])
    def test_any_number_of_slots(self, num_slots: int, masks: bool, dtype: torch.dtype) -> None:
        case = scene(3, 2, num_slots, 13, 21, dtype=dtype, masks=masks)
        how: dict[str, Any] = {"merge_threshold": THRESHOLD}
        on_host = SSyncCase._make(None if one is None else one.cpu() for one in case)
        actual: Any = Run("triton", case, **how)
        expected: Any = Run("torch", case, **how)
        assert_same_step(actual, expected, on_host, **how)

    @pytest.mark.parametrize(("criterion", "smoothing"), CRITERIA)
    @pytest.mark.parametrize("shape", [*PUBLISHED, *LARGE])
    def test_large_maps_equal_the_torch_path(self, shape: tuple[int, ...], criterion: str, smoothing: float) -> None:
        case = scene(*shape, masks=True)
        how: dict[str, Any] = {"criterion": criterion, "label_smoothing": smoothing, "merge_threshold": THRESHOLD}
        (actual, grads), (expected, expected_grads) = taken(case, **how), taken(case, backend="torch", **how)
        assert_same_labels(actual.labels, expected.labels)
        for one, other in zip(actual[:3], expected[:3], strict=True):
            assert_close_loss(one, other)
        assert actual.num_boundary == expected.num_boundary
        regions = (expected.labels.interior, expected.labels.boundary)
        for grad, other, region in zip(grads, expected_grads, regions, strict=True):
            scale = gradient_scale(region, shape[2], criterion=criterion, slot_mask=case.slot_mask)
            assert_close_gradient(grad, other, scale=scale)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [*PUBLISHED, *LARGE])
    def test_runs_are_bitwise_equal(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        case = scene(*shape, dtype=dtype)
        first, first_grads = taken(case)
        for _ in range(10):
            again, grads = taken(case)
            assert_same_labels(again.labels, first.labels)
            assert all(torch.equal(one, other) for one, other in zip(again[:5], first[:5], strict=True))
            assert all(torch.equal(one, other) for one, other in zip(grads, first_grads, strict=True))

    def test_maps_of_more_than_2_31_cells(self) -> None:
        # every clip is the first clip, and a map takes 4.3 GB
        if torch.cuda.mem_get_info()[0] < 40 * 2**30:
            pytest.skip("needs 40 GB of the GPU's memory")
        shape = (65, 16, 8, 512, 512)
        case = scene(1, *shape[1:], dtype=torch.float16)
        enc, dec = (one.expand(shape).contiguous() for one in case[:2])
        labels = KERNELS.pseudo_labels(Maps(enc, dec, None, None, None), Settings())
        for one in labels:
            assert torch.equal(one[-1], one[0])
        # without these weights, gradients of a mean would underflow float16
        weights: dict[str, Any] = {"boundary_weight": 2.0**24, "interior_weight": 2.0**24}
        terms, grads = taken(SSyncCase(enc, dec, None, None), **weights)
        for one in grads:
            assert torch.equal(one[-1], one[0])
            assert one[-1].any()
        assert terms.num_boundary == shape[0] * labels.boundary[0].sum()

    def test_maps_may_be_on_another_device_than_the_current_one(self) -> None:
        if torch.cuda.device_count() == 1:
            # one GPU can only test that the device is restored
            with torch.cuda.device(0):
                taken(scene(1, 1, 3, 8, 8))
            assert torch.cuda.current_device() == 0
            return
        case = SSyncCase._make(None if one is None else one.to("cuda:1") for one in scene(1, 2, 3, 8, 8))
        terms, _ = taken(case, merge_threshold=THRESHOLD)
        assert_close_loss(terms.total.cpu(), Run("torch", case, merge_threshold=THRESHOLD).loss)


class TestWaiting:
    @pytest.mark.usefixtures("no_waiting")
    @pytest.mark.parametrize("masks", [False, True])
    def test_a_step_never_waits_for_the_gpu(self, masks: bool) -> None:
        case = scene(4, 2, 5, 16, 16, masks=masks)
        # the first run compiles
        taken(case)
        torch.cuda.set_sync_debug_mode("error")
        taken(case)

    @pytest.mark.parametrize("criterion", ["mse", "cross_entropy"])
    @pytest.mark.parametrize("masks", [False, True])
    def test_a_captured_step_can_be_replayed_on_new_data(self, masks: bool, criterion: Any) -> None:
        case = scene(8, 4, 11, 24, 24, dtype=torch.float16, masks=masks)
        maps, settings = leaves(case), Settings(criterion=criterion)

        def step() -> tuple[Tensor, tuple[Tensor, ...]]:
            loss = KERNELS.loss(maps, settings)
            return loss, torch.autograd.grad(loss, (maps.enc, maps.dec))

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            total, grads = step()
        for seed in (1, 2):
            new = scene(8, 4, 11, 24, 24, dtype=torch.float16, seed=seed)
            with torch.no_grad():
                maps.enc.copy_(new.enc_logits)
                maps.dec.copy_(new.dec_logits)
            graph.replay()
            expected, expected_grads = step()
            assert torch.equal(total, expected)
            assert all(torch.equal(one, other) for one, other in zip(grads, expected_grads, strict=True))

    def test_seven_kernels_run_and_nothing_is_filled(self) -> None:
        case = scene(4, 2, 5, 16, 16, dtype=torch.float16)
        taken(case)
        maps = leaves(case)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            torch.autograd.grad(KERNELS.loss(maps, Settings()), (maps.enc, maps.dec))
            torch.cuda.synchronize()
        launches = [one.name for one in profile.events() or [] if one.device_type.name == "CUDA"]
        # seven kernels, and the 1 at the start of the backward pass
        assert len(launches) == 8, launches


SANITIZED = """
import torch
from test_kernels_gpu import scene, taken
for slots in (1, 5, 8, 16, 33, 64):
    for masks in (False, True):
        taken(scene(2, 3, slots, 7, 11, dtype=torch.float16, masks=masks))
taken(scene(1, 2, 11, 130, 67, masks=True))
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_the_sanitizer_reports_nothing(tool: str) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "1", sys.executable, "-c", SANITIZED]
    # torch's memory pool would hide reads of neighboring and of freed memory
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
