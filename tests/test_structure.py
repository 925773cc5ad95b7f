"""The structure-aware loss: published values, the reference, both filters, chunks, gradients, memory, errors."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from contract import EXPORTS, Case, LossContract, refusal
from golden_neighbors import Golden, deviation, golden_names
from meter import Meter
from ssync_loss import StructureAwareLoss
from ssync_loss.functional import structure_aware_loss
from ssync_loss.methods.slotcurri.reference import reference_structure_aware_loss
from steps import saved_elements, step_of

# relative to the largest magnitude
EXACT = {torch.float64: 1e-10, torch.float32: 5e-6}
# this gives kornia an error of 1e-6, even in float64
ROUNDED = "kornia 0.8 rounds its window to float32" if version("kornia").startswith("0.8.") else ""
EXACT_KORNIA = pytest.mark.skipif(bool(ROUNDED), reason=ROUNDED)
FILTERS = pytest.mark.parametrize("filters", ["torch", "kornia"])


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return features close to their target for the shape (B, T, D, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    target, noise = torch.randn(2, *(shape or (2, 4, 5, 5, 4)), generator=generator, dtype=torch.float64)
    return (target + noise / 2).to(dtype).requires_grad_(), target.to(dtype)


def step(pred: Tensor, target: Tensor, loss_of: Any = structure_aware_loss, **given: Any) -> tuple[Tensor, Tensor]:
    return step_of(loss_of, pred, target, **given)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tol: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        scale = other.abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=tol * scale)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Draw small clips, some with short axes, equal channels, constants or an outlier channel, and draw settings."""
    shape = [draw(st.sampled_from(sizes)) for sizes in ((1, 2), (1, 2, 3, 4), (1, 2, 3), (1, 2, 3, 5), (1, 3, 4))]
    pred, target = (one.detach().clone() for one in sample(*shape, dtype=torch.float64, seed=draw(st.integers(0, 999))))
    what = draw(st.sampled_from(["plain", "twins", "constant channel", "outlier", "shifted"]))
    if what == "twins":
        pred[:, :, 0] = target[:, :, 0]
    if what == "constant channel":
        pred[:, :, -1] = target[:, :, -1] = 3.0
    if what == "outlier":
        pred[:, :, 0] *= 50
    if what == "shifted":
        pred += 7
    return (
        pred,
        target,
        {
            "window": draw(st.sampled_from((1, 3, 3, 3, 5))),
            "sigma": draw(st.sampled_from((1.5, 0.5))),
            "k1": draw(st.sampled_from((0.01, 0.3))),
            "k2": draw(st.sampled_from((0.03, 0.1))),
            "eps": draw(st.sampled_from((1e-6, 0.1))),
            "normalize": draw(st.sampled_from(("joint", "channel"))),
        },
    )


# --- values ---


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("name", "filters"), [("ssim3d_T4", "torch"), ("ssim3d_T4", "kornia"), ("ssim3d_T4", "auto"), ("ssim3d_T1", "auto")]
)
def test_published_numbers(name: str, filters: Any, dtype: torch.dtype, chunk_size: int | None) -> None:
    if ROUNDED and filters == "kornia" and dtype == torch.float64:
        pytest.skip(ROUNDED)
    golden = Golden(name)
    pred, target = (golden.tensor(one, dtype).requires_grad_() for one in ("pred", "target"))
    knobs = golden.numbers("sigma", "k1", "k2", "eps") | {"window": golden.count("window")}
    loss = structure_aware_loss(pred, target, chunk_size=chunk_size, filters=filters, **knobs)
    (gradient,) = torch.autograd.grad(loss, pred)
    assert loss.dtype == dtype
    assert deviation(loss, golden.tensor("loss_exact_window_f64")) <= EXACT[dtype]
    assert deviation(gradient, golden.tensor("grad_pred_exact_window_f64")) <= EXACT[dtype]
    # the published code rounds its window
    assert deviation(loss, golden.tensor("loss_f64")) <= 5e-6
    assert deviation(gradient, golden.tensor("grad_pred_f64")) <= 5e-6
    assert golden.count("window") == 3
    assert [int(golden.tensor(f"flow_{one}")) for one in ("pred", "target")] == [1, 0]
    (unused,) = torch.autograd.grad(structure_aware_loss(pred, target), target, allow_unused=True)
    assert unused is None


def test_the_defaults_are_published() -> None:
    for name in golden_names("ssim3d", 2):
        golden = Golden(name)
        wanted = golden.numbers("window", "sigma", "k1", "k2", "eps")
        assert wanted == {key: StructureAwareLoss().settings[key] for key in wanted}


@settings(max_examples=80)
@given(case=cases(), chunk_size=st.sampled_from((None, 1, 2, 64)))
def test_value_and_gradient_equal_the_reference(
    case: tuple[Tensor, Tensor, dict[str, Any]], chunk_size: int | None
) -> None:
    pred, target, knobs = case
    expected = step(pred, target, reference_structure_aware_loss, **knobs)
    actual = step(pred, target, chunk_size=chunk_size, filters="torch", **knobs)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("normalize", ["joint", "channel"])
@pytest.mark.parametrize("window", [1, pytest.param(3, marks=EXACT_KORNIA), pytest.param(5, marks=EXACT_KORNIA)])
def test_both_filters_agree(window: int, normalize: str) -> None:
    data = [one.detach() for one in sample(2, 6, 7, 6, 8)]
    knobs: dict[str, Any] = {"window": window, "normalize": normalize, "chunk_size": 3}
    expected = step(*(one.double() for one in data), filters="torch", **knobs)
    assert_same(step(*(one.double() for one in data), filters="kornia", **knobs), expected, 1e-12)
    for filters, tol in (("kornia", 5e-5), ("torch", 2e-6)):
        loss, gradient = step(*data, filters=filters, **knobs)
        assert_same((loss.double(), gradient.double()), expected, tol)
    chosen = step(*data, **knobs)
    assert all(torch.equal(*both) for both in zip(chosen, (loss, gradient), strict=True))


def test_own_filters_are_exact_with_outliers() -> None:
    pred, target = (one.detach().clone() for one in sample(1, 4, 16, 8, 8))
    # normalization puts all other values near 1, where squares are large and their differences small
    pred[:, :, 0, 0, 0] = target[:, :, 0, 0, 0] = -20.0
    expected = step(pred.double(), target.double(), filters="torch")
    for filters, tol in (("torch", 5e-6), ("kornia", 5e-4)):
        loss, gradient = step(pred, target, filters=filters)
        assert_same((loss.double(), gradient.double()), expected, tol)


@FILTERS
def test_equal_features_have_no_loss(filters: Any) -> None:
    _, target = sample(2, 4, 5, 6, 6)
    for features in (target, torch.full_like(target, 3.5), torch.zeros_like(target)):
        loss, gradient = step(features, features, filters=filters)
        # the library's own filters are exact here
        assert loss.abs() <= (0.0 if filters == "torch" else 1e-6)
        # kornia's error of about 1e-8 is divided by constants of 1e-6
        assert gradient.abs().max() <= (0.0 if filters == "torch" else 1e-2)


# --- constant features ---


def test_a_constant_clip_has_finite_gradients() -> None:
    flat = torch.ones(1, 4, 3, 5, 5)
    # float32 resolves no contrast below 1e-7, which is a tenth of eps
    almost = flat + 1e-7 * torch.randn(1, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    for pred, target in ((flat, flat), (almost, flat), (flat, almost), (flat * 0, flat * 0)):
        for filters in ("torch", "kornia"):
            loss, gradient = step(pred, target, filters=filters)
            assert loss.isfinite()
            assert gradient.isfinite().all()


# --- gradients ---


@FILTERS
def test_functional_gradients_work(filters: Any) -> None:
    pred, target = sample()
    actual = torch.func.grad(lambda one: structure_aware_loss(one, target, filters=filters))(pred.detach())
    assert_same((actual,), step(pred, target, filters=filters)[1:], 1e-6)


# --- chunks, memory, work ---


def measure(channels: int, chunk_size: int | None, *, filters: Any = "torch", backward: bool = True) -> float:
    """Return the peak memory of a step without its inputs, in multiples of the prediction."""
    pred, target = sample(1, 4, channels, 8, 8)
    if not backward:
        pred = pred.detach()
    with Meter([pred, target]) as meter:
        loss = structure_aware_loss(pred, target, filters=filters, chunk_size=chunk_size)
        if backward:
            loss.backward()
    return float(meter.peak / (pred.numel() * 4))


def test_memory_is_the_gradient_and_a_chunk() -> None:
    whole = measure(64, None)
    # the gradient, and its product with the upstream gradient
    assert measure(64, 1) < 2.3
    assert measure(64, 8) < 1 + 2 * whole / 8 + 0.5
    assert whole > 8
    assert measure(64, 8, backward=False) < 2
    # with a fixed chunk, the memory per channel approaches that of the gradient
    assert measure(512, 64) < 1 + 2 * whole / 8 + 0.5


def test_chunks_limit_the_memory_of_kornia() -> None:
    whole = measure(32, None, filters="kornia")
    assert whole > 12
    assert measure(32, 1, filters="kornia") < 2.8


@pytest.mark.parametrize("backward", [True, False])
def test_work_is_linear_in_cells(backward: bool) -> None:
    work = []
    for clips in (2, 4, 8):
        pred, target = sample(clips, 4, 4, 8, 8)
        with Meter([pred, target]) as meter:
            loss = structure_aware_loss(pred if backward else pred.detach(), target, filters="torch")
            if backward:
                loss.backward()
        work.append((meter.num_operators, meter.num_elements))
    operators, elements = zip(*work, strict=True)
    assert len(set(operators)) == 1
    assert elements[2] - elements[1] == pytest.approx(2 * (elements[1] - elements[0]), rel=1e-3)


def test_only_the_gradient_is_saved_for_backward() -> None:
    pred, target = sample()
    assert saved_elements(structure_aware_loss, pred, target, filters="torch") == [pred.numel()] * 2


# --- kornia ---


def test_kornia_is_imported_on_first_use() -> None:
    code = """
import sys
import torch
from ssync_loss.functional import structure_aware_loss
clips = torch.rand(1, 3, 2, 3, 3)
before = "kornia" in sys.modules
structure_aware_loss(clips, clips, filters="torch")
structure_aware_loss(clips[:, :2], clips[:, :2])
structure_aware_loss(clips, clips)
between = "kornia" in sys.modules
structure_aware_loss(clips, clips, filters="kornia")
print(before, between, "kornia" in sys.modules)
"""
    source = str(Path(__file__).parents[1] / "src")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r})\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False", "True"]


@pytest.mark.parametrize(
    ("shape", "knobs", "missing"),
    [
        ((1, 2, 3, 5, 5), {}, "T, H and W of at least 3; got"),
        ((1, 4, 3, 2, 5), {}, "T, H and W of at least 3; got"),
        ((1, 4, 3, 5, 5), {"window": 5}, "T, H and W of at least 5; got"),
        ((1, 4, 3, 5, 5), {"sigma": 1.0}, "sigma=1.5, k1=0.01 and k2=0.03; got"),
        ((1, 4, 3, 5, 5), {"k2": 0.02}, "sigma=1.5, k1=0.01 and k2=0.03; got"),
    ],
)
def test_kornia_is_refused_and_not_selected_if_inexact(
    shape: tuple[int, ...], knobs: dict[str, Any], missing: str
) -> None:
    data = sample(*shape)
    with pytest.raises(ValueError, match=f"filters='kornia' needs {missing}"):
        structure_aware_loss(*data, filters="kornia", **knobs)
    actual, expected = (step(*data, filters=one, **knobs) for one in ("auto", "torch"))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_kornia_is_not_used_in_a_checkpoint() -> None:
    data = sample()
    expected = step(*data, filters="torch")
    loss = checkpoint(structure_aware_loss, *data, use_reentrant=False)
    (gradient,) = torch.autograd.grad(loss, data[0])
    assert_same((loss.detach(), gradient), expected, 0.0)
    with (
        torch.autograd.graph.save_on_cpu(),
        pytest.raises(ValueError, match="filters='kornia' needs no hooks for saved tensors"),
    ):
        structure_aware_loss(*data, filters="kornia")


def test_kornia_is_not_used_on_other_devices() -> None:
    data = torch.zeros(1, 4, 3, 5, 5, device="meta")
    with pytest.raises(ValueError, match=r"filters='kornia' needs a CPU tensor; got .* on meta"):
        structure_aware_loss(data, data, filters="kornia")
    assert structure_aware_loss(data, data).device.type == "meta"


# --- the contract of every loss ---


class TestContract(LossContract):
    loss = StructureAwareLoss
    function = staticmethod(structure_aware_loss)
    knobs: ClassVar = {"filters": "torch"}
    settings: ClassVar = {"window": 1, "sigma": 1.0, "k1": 3.0, "k2": 0.5, "eps": 0.1, "normalize": "channel"}
    # both filters agree up to rounding
    inert: ClassVar = {"chunk_size": None, "filters": "auto"}
    tolerance = 1e-5
    not_applicable: ClassVar = {"poison": "every cell counts"}
    refused: ClassVar = [
        ({"window": 2}, ValueError, r"`window` must be odd; got 2"),
        ({"window": 0}, ValueError, r"`window` must be at least 1; got 0"),
        ({"sigma": 0.0}, ValueError, r"`sigma` must be finite and above 0.0; got 0.0"),
        ({"k1": -1.0}, ValueError, r"`k1` must be finite and above 0.0; got -1.0"),
        ({"eps": 0}, ValueError, r"`eps` must be finite and above 0.0; got 0"),
        ({"chunk_size": 0}, ValueError, r"`chunk_size` must be at least 1; got 0"),
        ({"pred": torch.zeros(2, 0, 2, 3, 4)}, ValueError, r"`pred` must have T >= 1; got T=0"),
        ({"pred": torch.zeros(2, 4, 0, 3, 4)}, ValueError, r"`pred` must have D >= 1; got D=0"),
        ({"target": torch.zeros(2, 4, 2, 4, 3)}, ValueError, r"`target` must have shape \(B=2, T=4, D=2, H=3, W=4\)"),
    ]

    def case(self, *shape: int) -> Case:
        pred, target = sample(*(shape or (2, 4, 2, 3, 4)))
        # the extremes belong to the target, one pair per channel, so that they get no gradient
        ends = 9.0 - torch.arange(target.shape[2]) / 2
        target[:, 0, :, 0, 0], target[:, 0, :, 0, 1] = -ends, ends
        return Case(self.make(), {"pred": pred}, {"target": target})

    def large_case(self) -> Case:
        # only one axis is larger than the window, because each such axis takes the compiler several seconds
        return self.case(2, 2, 8, 6, 2)

    def empty_cases(self, case: Case) -> dict[str, Case]:
        return {"no clips of a frame": case.clips().mapped(lambda one: one[:, :1]), **super().empty_cases(case)}


class TestByKornia(TestContract):
    """The contract with kornia, which a compiler replaces by the library's own filters."""

    knobs: ClassVar = {"normalize": "channel", "chunk_size": 1, "filters": "kornia"}
    settings: ClassVar = {**TestContract.settings, "normalize": "joint"}
    inert: ClassVar = {"chunk_size": None, "filters": "torch"}
    tolerance = 1e-4
    not_applicable: ClassVar = TestContract.not_applicable | {
        "settings": "kornia accepts only the published settings",
        "function": "kornia accepts only the published settings",
        "default_compiler": "a compiler uses other filters",
        "checkpoint": "torch.func refuses hooks on saved tensors",
        "save_on_cpu": "torch.func refuses hooks on saved tensors",
    }

    def empty_cases(self, case: Case) -> dict[str, Case]:
        return LossContract.empty_cases(self, case)

    @EXPORTS
    @pytest.mark.usefixtures("fresh_compiler")
    def test_export(self, strict: bool) -> None:
        message = refusal(r"filters='kornia' needs no torch\.export", strict)
        with pytest.raises((RuntimeError, ValueError), match=message):
            super().test_export(strict)


# --- the default ---


def test_own_filters_are_the_default_and_as_exact_as_float32() -> None:
    data = [one.detach() for one in sample(2, 6, 7, 6, 8)]
    expected = step(*(one.double() for one in data))
    loss, gradient = step(*data)
    assert (loss - expected[0]).abs() <= 1e-6
    assert (gradient - expected[1]).abs().max() <= 2e-6 * expected[1].abs().max()
    chosen = step(*data, filters="torch")
    assert torch.equal(loss, chosen[0])
    assert torch.equal(gradient, chosen[1])


def test_the_default_works_with_hooks_for_saved_tensors() -> None:
    pred, target = sample(2, 6, 7, 6, 8)
    expected = step(pred, target)
    with torch.autograd.graph.save_on_cpu():
        loss = StructureAwareLoss()(pred, target)
    assert_same((loss.detach(), torch.autograd.grad(loss, pred)[0]), expected, 0.0)
