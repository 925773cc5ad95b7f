"""The tests that every engine passes, and the choice of an engine."""

import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from golden_cases import NAMES, load_golden
from kernel_runs import quick_interpreter
from sample_maps import leaf, sample_maps
from ssync_loss import SSyncLoss
from ssync_loss.functional import (
    boundary_refinement_loss,
    interior_denoising_loss,
    pseudo_labels,
    selective_distillation_loss,
)
from ssync_loss.ssync import engines
from ssync_loss.ssync.engines import ENGINES, check_backend, resolve
from ssync_loss.ssync.engines.triton._limits import MIN_VERSION
from ssync_loss.ssync.maps import Maps
from ssync_loss.ssync.settings import Settings
from ssync_loss.ssync.types import SlotLabels
from ssync_loss.testing import (
    SSyncCase,
    assert_close_gradient,
    assert_close_loss,
    assert_same_labels,
    decidable_clips,
    gradient_scale,
    map_pairs,
    region_knobs,
    ssync_cases,
    thresholds,
)

__all__ = ["quick_interpreter"]

# some drawn maps and masks look like mistakes
pytestmark = pytest.mark.filterwarnings("ignore:.*looks like probabilities", "ignore:.*`slot_mask` leaves")

INF, NAN = math.inf, math.nan
# without a GPU the kernels run in Triton's interpreter
DEVICES = dict.fromkeys(ENGINES, "cpu") | {"triton": "cuda" if torch.cuda.is_available() else "cpu"}
SOFT = [("mse", 0.0), ("cross_entropy", 0.0), ("cross_entropy", 0.2)]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"criterion": "cross_entropy", "label_smoothing": 0.1, "temperature": 0.5},
    {"boundary_weight": 0.5, "interior_weight": 0.0},
    {"kind": "probs"},
    {"kind": ("probs", "logits")},
    {"min_different": 2, "min_same": 3, "max_different": 1},
    {"merge_threshold": None},
    {"merge_threshold": 0.3, "temperature": 2.0},
]


class Step:
    """The terms, loss and gradients of a case from one engine, moved to the CPU."""

    def __init__(self, backend: str, case: SSyncCase, **knobs: Any) -> None:
        device = DEVICES[backend]
        # a copy keeps the strides
        maps = [one.detach().to(device) for one in case[:2]]
        masks: dict[str, Any] = {"valid": case.valid, "slot_mask": case.slot_mask}
        masks = {name: None if one is None else one.to(device) for name, one in masks.items()}
        criterion = SSyncLoss(**knobs, backend=backend).eval()  # type: ignore[arg-type]
        terms = criterion.terms(*maps, **masks)
        self.labels = type(terms.labels)._make(one.cpu() for one in terms.labels)
        self.values = [one.cpu() for one in terms[:5]]
        taught = [one.requires_grad_() for one in maps]
        self.loss = criterion(*taught, **masks)
        self.grads = [one.cpu() for one in torch.autograd.grad(self.loss, taught)]
        self.loss = self.loss.detach().cpu()


def assert_same_step(actual: Step, wanted: Step, case: SSyncCase, **knobs: Any) -> None:
    assert_same_labels(actual.labels, wanted.labels)
    for got, right in zip(actual.values, wanted.values, strict=True):
        assert_close_loss(got, right)
    assert_close_loss(actual.loss, wanted.loss)
    for got, right, region, weight in zip(
        actual.grads,
        wanted.grads,
        (wanted.labels.interior, wanted.labels.boundary),
        (knobs.get("interior_weight", 1.0), knobs.get("boundary_weight", 1.0)),
        strict=True,
    ):
        assert got.dtype == right.dtype
        names = ("criterion", "temperature")
        how = {name: knobs[name] for name in names if name in knobs}
        scale = weight * gradient_scale(region, right.shape[2], slot_mask=case.slot_mask, **how)
        if "kind" in knobs:
            # the derivative of the logarithm divides by a probability
            scale = max(scale, float(right.abs().max()))
        if got.dtype in (torch.float16, torch.bfloat16):
            # halves may round differently
            eps = torch.finfo(got.dtype).eps
            torch.testing.assert_close(got, right, rtol=2 * eps, atol=1e-3 * eps * min(scale, 1e3) + 1e-7)
        elif scale > 0:
            assert_close_gradient(got, right, scale=scale)


def plain_case() -> SSyncCase:
    enc, dec = sample_maps(requires_grad=False)
    return SSyncCase(enc, dec, None, None)


FAST = [pytest.param(name, id=name) for name in ("torch", "cpu", "triton")]


@pytest.mark.parametrize("backend", FAST)
class TestEveryEngine:
    """Engines against the reference and the golden files of the published code."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", NAMES)
    def test_golden_files(self, backend: str, name: str, dtype: torch.dtype) -> None:
        if backend == "triton" and dtype == torch.float64:
            pytest.skip("the kernels do not take float64")
        case = load_golden(name)
        knobs = {**case.label_args, "temperature": case.temperature}
        step = Step(backend, SSyncCase(case.enc_logits.to(dtype), case.dec_logits.to(dtype), None, None), **knobs)
        wanted = case.expected
        for field, key in (
            ("enc_labels", "enc_labels_merged"),
            ("dec_labels", "dec_labels_merged"),
            ("boundary", "is_boundary"),
            ("interior", "is_interior"),
        ):
            assert torch.equal(getattr(step.labels, field), wanted[key])
        assert step.values[3:] == [wanted["is_boundary"].sum(), wanted["is_interior"].sum()]
        losses = [wanted[f"loss_{way}_f64"] for way in ("enc2dec", "dec2enc")]
        for got, right in zip(step.values, (losses[0] + losses[1], *losses), strict=False):
            assert_close_loss(got, right.to(dtype))
        for got, key, region in zip(
            step.grads, ("grad_enc_f64", "grad_dec_f64"), ("interior", "boundary"), strict=True
        ):
            scale = gradient_scale(getattr(step.labels, region), got.shape[2], temperature=case.temperature)
            assert_close_gradient(got, wanted[key], scale=scale)

    @given(data=st.data())
    @settings(max_examples=20)
    def test_drawn_cases(self, backend: str, data: st.DataObject) -> None:
        # the interpreter's time grows with the number of clips
        times, batch, dtypes = (
            (1, 2, [torch.float32]) if backend == "triton" else (3, 8, [torch.float32, torch.float64])
        )
        for _ in range(times):
            maps = map_pairs(batch=batch, max_frames=2, minus_inf=True, dtype=data.draw(st.sampled_from(dtypes)))
            case = data.draw(ssync_cases(maps=maps))
            threshold = data.draw(thresholds(tied=False))
            criterion, smoothing = data.draw(st.sampled_from(SOFT))
            how: dict[str, Any] = {
                "criterion": criterion,
                "label_smoothing": smoothing,
                "temperature": data.draw(st.sampled_from((1.0, 0.5))),
                "merge_threshold": threshold,
                **data.draw(region_knobs()),
            }
            clips = decidable_clips(
                case.enc_logits, merge_threshold=threshold, valid=case.valid, slot_mask=case.slot_mask, dyadic=True
            )
            if not clips.all():
                case = SSyncCase._make(None if one is None else one[clips] for one in case)
            assert_same_step(Step(backend, case, **how), Step("reference", case, **how), case, **how)

    @pytest.mark.parametrize("knobs", SETTINGS, ids=lambda knobs: ", ".join(knobs) or "default")
    @pytest.mark.parametrize("masked", [False, True])
    def test_every_setting(self, backend: str, knobs: dict[str, Any], masked: bool) -> None:
        enc, dec = (one.detach() for one in sample_maps())
        kind = knobs.get("kind", "logits")
        kinds = (kind, kind) if isinstance(kind, str) else kind
        enc, dec = (one.softmax(2) if kind == "probs" else one for one, kind in zip((enc, dec), kinds, strict=True))
        valid = torch.rand(2, 2, 5, 12) > 0.2 if masked else None
        slot_mask = torch.tensor([[True] * 4, [True, True, False, True]]) if masked else None
        case = SSyncCase(enc, dec, valid, slot_mask)
        assert_same_step(Step(backend, case, **knobs), Step("reference", case, **knobs), case, **knobs)

    @pytest.mark.parametrize(
        ("enc_type", "dec_type"),
        [
            (torch.float16, torch.float16),
            (torch.bfloat16, torch.bfloat16),
            (torch.float16, torch.float32),
            (torch.float64, torch.float64),
            (torch.float32, torch.float64),
        ],
    )
    def test_every_dtype(self, backend: str, enc_type: torch.dtype, dec_type: torch.dtype) -> None:
        enc, dec = (one.detach() for one in sample_maps())
        case = SSyncCase(enc.to(enc_type), dec.to(dec_type), None, None)
        if backend == "triton" and torch.float64 in (enc_type, dec_type):
            with pytest.raises(ValueError, match="`backend`='triton' needs float16, bfloat16 or float32"):
                Step(backend, case)
            return
        step = Step(backend, case)
        assert step.loss.dtype == (torch.float64 if torch.float64 in (enc_type, dec_type) else torch.float32)
        assert_same_step(step, Step("reference", case), case)

    def test_extreme_values_of_half_precision(self, backend: str) -> None:
        # subnormal and large logits, and gradients too small for half precision
        enc, dec = (one.detach() * torch.tensor([1e-7, 3e-5, 1.0, 1e4]).view(4, 1, 1) for one in sample_maps())
        for dtype in (torch.float16, torch.bfloat16):
            case = SSyncCase(enc.to(dtype), dec.to(dtype), None, None)
            assert_same_step(Step(backend, case), Step("reference", case), case)

    def test_any_strides(self, backend: str) -> None:
        enc, dec = (one.detach() for one in sample_maps(2, 3, 4, 5, 12))
        wanted = Step(backend, SSyncCase(enc, dec, None, None))
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "slots last": lambda one: one.movedim(2, -1).contiguous().movedim(-1, 2),
            "columns first": lambda one: one.mT.contiguous().mT,
            "time inside": lambda one: one.transpose(1, 2).contiguous().transpose(1, 2),
            "part of more": lambda one: torch.cat([one, one], 4)[..., :12],
            "every other": lambda one: torch.stack([one, one], 5)[..., 0],
            "one channel of several": lambda one: torch.stack([one, one, one], 3)[:, :, :, 1],
        }
        # the other map has the next layout
        changes = list(ways.values())
        for one, other in zip(changes, [*changes[1:], changes[0]], strict=True):
            step = Step(backend, SSyncCase(one(enc), other(dec), None, None))
            assert_same_labels(step.labels, wanted.labels)
            assert torch.equal(step.loss, wanted.loss)
            assert all(torch.equal(*pair) for pair in zip(step.grads, wanted.grads, strict=True))

    def test_expanded_maps_and_masks(self, backend: str) -> None:
        enc, dec = (one.detach()[:, :1].expand(2, 3, 4, 5, 12) for one in sample_maps())
        valid = torch.tensor([[True], [False]]).expand(2, 3)
        slot_mask = torch.tensor([True, True, True, False]).expand(2, 4)
        case = SSyncCase(enc, dec, valid, slot_mask)
        whole = SSyncCase(enc.contiguous(), dec.contiguous(), valid.contiguous(), slot_mask.contiguous())
        assert_same_step(Step(backend, case), Step(backend, whole), case)

    def test_two_runs_are_bitwise_equal(self, backend: str) -> None:
        case = plain_case()
        one, other = Step(backend, case), Step(backend, case)
        assert torch.equal(one.loss, other.loss)
        assert all(torch.equal(*pair) for pair in zip(one.grads, other.grads, strict=True))

    def test_no_clips(self, backend: str) -> None:
        enc, dec = (one.detach()[:0] for one in sample_maps())
        step = Step(backend, SSyncCase(enc, dec, None, None))
        assert step.loss == 0
        assert step.labels.enc_labels.shape == (0, 2, 5, 12)
        assert all(one.shape == (0, 2, 4, 5, 12) for one in step.grads)

    @pytest.mark.parametrize("masks", ["no valid patch", "no slot", "one slot", "no edge and nothing but edges"])
    def test_the_loss_of_empty_regions_is_zero(self, backend: str, masks: str) -> None:
        enc, dec = (one.detach() for one in sample_maps())
        if masks == "no edge and nothing but edges":
            enc, dec = torch.zeros_like(enc), torch.nn.functional.one_hot(torch.arange(60).view(5, 12) % 4)
            dec = dec.movedim(-1, 0).expand_as(enc).float()
        valid = torch.zeros(2, 2, dtype=torch.bool) if masks == "no valid patch" else None
        slot_mask = torch.zeros(2, 4, dtype=torch.bool) if masks == "no slot" else None
        if masks == "one slot":
            enc, dec = enc[:, :, :1], dec[:, :, :1]
        step = Step(backend, SSyncCase(enc, dec, valid, slot_mask))
        assert step.loss == 0
        assert not any(one.any() for one in step.grads)

    @pytest.mark.parametrize("value", [NAN, INF])
    @pytest.mark.parametrize("dirty", ["enc", "dec"])
    @pytest.mark.parametrize("region", ["both", "nothing is selected"])
    def test_nan_makes_everything_nan(self, backend: str, value: float, dirty: str, region: str) -> None:
        enc, dec = (one.detach().clone() for one in sample_maps())
        (enc if dirty == "enc" else dec)[1, 0, 1, 2, 3] = value
        knobs = {} if region == "both" else {"min_different": 10, "min_same": 10}
        valid = None if region == "both" else torch.rand(2, 2, 5, 12) > 0.1
        if valid is not None:
            valid[1, 0, 2, 3] = True
        step = Step(backend, SSyncCase(enc, dec, valid, None), **knobs)
        assert step.loss.isnan()
        assert all(one.isnan() for one in step.values[:3])
        assert all(one.isnan().all() for one in step.grads)

    def test_settings_may_be_tensors(self, backend: str) -> None:
        case = plain_case()
        device = DEVICES[backend]
        numbers = {"merge_threshold": 0.3, "boundary_weight": 0.5, "interior_weight": 2.0}
        tensors = {name: torch.tensor(value, device=device) for name, value in numbers.items()}
        assert_same_step(Step(backend, case, **tensors), Step(backend, case, **numbers), case, **numbers)
        off = {"merge_threshold": torch.tensor(INF, device=device), "boundary_weight": torch.tensor(0.0, device=device)}
        none: dict[str, Any] = {"merge_threshold": None, "boundary_weight": 0.0}
        assert_same_step(Step(backend, case, **off), Step(backend, case, **none), case, **none)

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("threshold", [None, 0.3])
    def test_given_slot_labels_are_used(self, backend: str, threshold: float | None, masked: bool) -> None:
        device, knobs = DEVICES[backend], Settings(threshold)
        valid = slot_mask = None
        if masked:
            valid = torch.rand(2, 2, 5, 12, device=device) > 0.2
            slot_mask = torch.tensor([[True] * 4, [True, True, False, True]], device=device)
        enc, dec = (leaf(one.detach().to(device)) for one in sample_maps())
        maps = Maps(enc, dec, valid, slot_mask)
        engine = ENGINES[backend]
        found, slow = (ENGINES[name].slot_labels(maps, knobs) for name in (backend, "reference"))
        cells = torch.ones_like(slow.hard, dtype=torch.bool) if valid is None else valid.expand_as(slow.hard)
        assert torch.equal(found.hard[cells].long(), slow.hard[cells])
        assert torch.equal(found.representative.long(), slow.representative)
        assert found.clean

        def step(knobs: Settings, found: SlotLabels | None) -> list[Tensor]:
            loss = engine.loss(maps, knobs, found)
            return [loss, *torch.autograd.grad(loss, (maps.enc, maps.dec))]

        itself = torch.arange(4, device=device).to(found.representative).expand(2, 4)
        for again, plain in (
            (step(knobs, found), step(knobs, None)),
            (step(knobs, found._replace(representative=itself)), step(Settings(None), None)),
        ):
            assert all(torch.equal(*pair) for pair in zip(again, plain, strict=True))
        # with constant labels there is no boundary
        assert not step(knobs, found._replace(hard=torch.zeros_like(found.hard)))[2].any()

    def test_slot_labels_of_maps_with_nan_are_not_clean(self, backend: str) -> None:
        enc, dec = (one.detach().to(DEVICES[backend]) for one in sample_maps())
        enc[1, 0, 2, 3, 4] = NAN
        engine, maps = ENGINES[backend], Maps(enc, dec, None, None)
        found = engine.slot_labels(maps, Settings())
        assert not found.clean
        assert engine.loss(maps, Settings(), found).isnan()

    @pytest.mark.parametrize("function", [boundary_refinement_loss, interior_denoising_loss])
    def test_single_terms(self, backend: str, function: Any) -> None:
        pairs = []
        for name in (backend, "reference"):
            maps = [leaf(one.detach().to(DEVICES[name])) for one in sample_maps()]
            loss = function(*maps, backend=name)
            loss.backward()
            pairs.append((loss.cpu(), [None if one.grad is None else one.grad.cpu() for one in maps]))
        (actual, grads), (wanted, wanted_grads) = pairs
        assert_close_loss(actual, wanted)
        for got, grad in zip(grads, wanted_grads, strict=True):
            assert (got is None) == (grad is None)
            if grad is not None:
                assert_close_gradient(got, grad, scale=float(grad.abs().max()))

    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    @pytest.mark.parametrize("target_type", [torch.int64, torch.int32, torch.uint8])
    def test_distillation(self, backend: str, reduction: Any, target_type: torch.dtype) -> None:
        _, dec = sample_maps()
        target, region = torch.randint(4, (2, 2, 5, 12)).to(target_type), torch.rand(2, 2, 12, 5).mT < 0.6
        results = []
        for name in (backend, "reference"):
            logits, *rest = (one.detach().to(DEVICES[name]) for one in (dec, target, region))
            logits.requires_grad_()
            loss = selective_distillation_loss(logits, *rest, reduction=reduction, backend=name)  # type: ignore[arg-type]
            upstream = torch.linspace(0.5, 2.0, loss.numel()).view(loss.shape).to(loss)
            results.append((loss.detach().cpu(), torch.autograd.grad(loss, logits, upstream)[0].cpu()))
        assert_close_loss(results[0][0], results[1][0])
        assert_close_gradient(results[0][1], results[1][1], scale=float(results[1][1].abs().max()))

    @pytest.mark.parametrize("rubbish", [0.0, NAN, -INF])
    @pytest.mark.parametrize("criterion", ["mse", "cross_entropy"])
    def test_an_empty_region(self, backend: str, criterion: Any, rubbish: float) -> None:
        logits = torch.full((2, 1, 3, 2, 2), rubbish, device=DEVICES[backend], requires_grad=True)
        target = torch.zeros_like(logits[:, :, 0], dtype=torch.int64)
        knobs: dict[str, Any] = {"criterion": criterion, "backend": backend}
        for reduction in ("none", "sum", "mean"):
            loss = selective_distillation_loss(logits, target, target == 1, reduction=reduction, **knobs)
            assert not loss.any()
            assert not torch.autograd.grad(loss.sum(), logits)[0].any()

    def test_fake_tensors(self, backend: str) -> None:
        with FakeTensorMode() as mode:
            maps = [mode.from_tensor(one.detach()).requires_grad_() for one in sample_maps()]
            loss = SSyncLoss(backend=backend)(*maps)  # type: ignore[arg-type]
            loss.backward()
            assert all(one.grad is not None and one.grad.shape == one.shape for one in maps)
            assert SSyncLoss(backend=backend).terms(*maps).labels.boundary.dtype == torch.bool  # type: ignore[arg-type]

    # the compiler reads the .grad of all inputs
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    @pytest.mark.usefixtures("fresh_compiler")
    @pytest.mark.parametrize("knobs", [{}, {"criterion": "cross_entropy", "boundary_weight": 0.5}])
    def test_one_graph(self, backend: str, knobs: dict[str, Any]) -> None:
        maps = [leaf(one.detach().to(DEVICES[backend])) for one in sample_maps()]
        criterion = SSyncLoss(backend=backend, **knobs)  # type: ignore[arg-type]
        compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
        assert_close_loss(compiled(*maps), criterion(*maps))
        actual, wanted = (torch.autograd.grad(call(*maps), maps) for call in (compiled, criterion))
        for one, other in zip(actual, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_the_second_derivative_of_a_function_is_refused_by_the_library() -> None:
    enc, dec = (one.detach() for one in sample_maps())
    criterion = SSyncLoss(backend="cpu").eval()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda one: torch.func.grad(criterion)(one, dec).square().sum())(enc)


class TestChoice:
    def test_auto_selects_c_on_a_cpu_and_torch_elsewhere(self) -> None:
        assert resolve("auto", torch.zeros(1, 1, 2, 1, 1)) is ENGINES["cpu"]
        assert resolve("auto", torch.zeros(1, 1, 2, 1, 1, device="meta")) is ENGINES["torch"]
        assert resolve("auto", torch.zeros(1, 1, 65, 1, 1)) is ENGINES["torch"]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_auto_selects_the_kernels_on_cuda(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
        maps = torch.zeros(1, 1, 64, 1, 1, dtype=dtype)
        on_cuda(monkeypatch)
        assert resolve("auto", maps, maps.float()) is ENGINES["triton"]

    @pytest.mark.parametrize(
        ("maps", "text"),
        [
            (torch.zeros(1, 1, 65, 1, 1), "S <= 64; got S=65"),
            (torch.zeros(1, 1, 2, 1, 1, dtype=torch.float64), "float16, bfloat16 or float32; got torch.float64"),
        ],
    )
    def test_auto_falls_back_outside_the_limits_of_the_kernels(
        self, monkeypatch: pytest.MonkeyPatch, maps: Tensor, text: str
    ) -> None:
        on_cuda(monkeypatch)
        assert resolve("auto", maps, maps) is ENGINES["torch"]
        with pytest.raises(ValueError, match=f"^`backend`='triton' needs {text}"):
            resolve("triton", maps, maps)

    def test_auto_falls_back_on_an_old_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        maps = torch.zeros(1, 1, 2, 1, 1)
        gpu = SimpleNamespace(major=6, minor=0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
        on_cuda(monkeypatch)
        assert resolve("auto", maps) is ENGINES["torch"]
        with pytest.raises(ValueError, match=r"needs a GPU of compute capability 7.0 or above; got 6.0"):
            resolve("triton", maps)

    def test_auto_falls_back_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        maps = torch.zeros(1, 1, 2, 1, 1)
        monkeypatch.setattr("ssync_loss.ssync.engines.triton._limits.INSTALLED", False)
        on_cuda(monkeypatch)
        assert resolve("auto", maps) is ENGINES["torch"]
        for ask in (
            lambda: resolve("triton", maps),
            lambda: check_backend("triton"),
            lambda: SSyncLoss(backend="triton"),
        ):
            with pytest.raises(ValueError, match="`backend`='triton' needs the package triton, which is not installed"):
                ask()

    def test_auto_falls_back_with_an_old_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        maps = torch.zeros(1, 1, 2, 1, 1)
        on_cuda(monkeypatch)
        monkeypatch.setattr("ssync_loss.ssync.engines.triton._limits.VERSION", (3, 5))
        assert resolve("auto", maps) is ENGINES["torch"]
        with pytest.raises(ValueError, match=r"`backend`='triton' needs Triton 3.6 or above; got 3.5"):
            check_backend("triton")
        # the version of a package with another name is unknown
        monkeypatch.setattr("ssync_loss.ssync.engines.triton._limits.VERSION", (0, 0))
        assert resolve("auto", maps) is ENGINES["triton"]

    def test_the_limits_of_an_engine_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ssync_loss.ssync.engines.triton._limits.VERSION", MIN_VERSION)
        monkeypatch.setattr("ssync_loss.ssync.engines.triton._limits.INTERPRETED", False)
        enc, dec = torch.zeros(2, 1, 1, 2, 2, 2).unbind(0)
        target, region = torch.zeros(1, 1, 2, 2).long(), torch.ones(1, 1, 2, 2).bool()
        for call in (
            lambda: SSyncLoss(backend="triton").eval()(enc, dec),
            lambda: SSyncLoss(backend="triton", start_step=5).eval()(enc, dec, step=0),
            lambda: pseudo_labels(enc, dec, backend="triton"),
            lambda: selective_distillation_loss(enc, target, region, backend="triton"),
        ):
            with pytest.raises(ValueError, match="`backend`='triton' needs a CUDA tensor; got cpu"):
                call()
        with pytest.raises(ValueError, match="`backend`='cpu' needs CPU tensors; got meta"):
            SSyncLoss(backend="cpu").eval()(enc.to("meta"), dec.to("meta"))
        many = torch.randn(1, 1, 65, 2, 2)
        for name in ("cpu", "triton"):
            with pytest.raises(ValueError, match=f"`backend`='{name}' needs .*"):
                SSyncLoss(backend=name).eval()(many, many.clone())
        assert_close_loss(
            SSyncLoss().eval()(many, many.clone()), SSyncLoss(backend="reference").eval()(many, many.clone())
        )

    @pytest.mark.parametrize("call", [check_backend, resolve])
    def test_an_unknown_name_is_an_error(self, call: Any) -> None:
        with pytest.raises(ValueError, match=r"`backend` must be one of 'auto', 'torch', 'cpu', 'triton', 'reference'"):
            call("cuda")


def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that maps are on a trusted CUDA device, and that Triton is new enough."""
    monkeypatch.setattr("ssync_loss.ssync.engines.triton._limits.VERSION", MIN_VERSION)
    monkeypatch.setattr(Tensor, "device", property(lambda _: torch.device("cuda", 0)))
    monkeypatch.setattr(engines, "_answers", {("triton", "cuda:0"): True})


class TestTrust:
    """``"auto"`` selects a fast engine only after a comparison with torch."""

    @pytest.fixture(autouse=True)
    def unasked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engines, "_answers", {})

    def test_engines_are_trusted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("cpu", "torch", "reference"):
            assert engines.is_trusted(name, "cpu")
        assert engines._answers == {("cpu", "cpu"): True, ("torch", "cpu"): True, ("reference", "cpu"): True}

    @pytest.mark.parametrize("part", ["loss", "terms", "pseudo_labels"])
    def test_a_wrong_or_failing_engine_is_reported_once(self, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
        enc, dec = sample_maps()
        wanted = SSyncLoss(backend="torch")(enc, dec)
        right = getattr(ENGINES["cpu"], part)

        def wrong(*arguments: Any) -> Any:
            result = right(*arguments)
            if part == "loss":
                return result * 1.001
            if part == "terms":
                return result._replace(labels=result.labels._replace(interior=~result.labels.interior))
            raise OSError("out of order")

        monkeypatch.setattr(ENGINES["cpu"], part, wrong)
        with pytest.warns(UserWarning, match=r"Engine 'cpu' does not agree with plain torch on cpu.*report this"):
            loss = SSyncLoss()(enc, dec)
        assert torch.equal(loss, wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(SSyncLoss()(enc, dec), wanted)
        if part != "terms":
            # a named engine is not compared
            assert resolve("cpu", enc, dec) is ENGINES["cpu"]

    @pytest.mark.usefixtures("fresh_compiler")
    def test_the_comparison_runs_while_a_compiler_traces(self) -> None:
        maps = sample_maps()
        compiled = torch.compile(SSyncLoss(), fullgraph=True, backend="aot_eager")
        assert_close_loss(compiled(*maps), SSyncLoss(backend="torch")(*maps))
        assert engines._answers == {("cpu", "cpu"): True}

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, FakeTensorMode])
    def test_the_comparison_runs_in_any_mode(self, mode: Any) -> None:
        with mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert engines.is_trusted("cpu", "cpu")

    def test_the_comparison_runs_within_torch_func(self) -> None:
        enc, dec = (one.detach() for one in sample_maps())
        grad = torch.func.grad(lambda one: SSyncLoss().eval()(one, dec))(enc)
        assert engines._answers == {("cpu", "cpu"): True}
        assert grad.shape == enc.shape

    def test_the_comparison_does_not_run_while_a_graph_is_captured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(engines, "complaint_about", None)
        assert not engines.is_trusted("triton", "cuda:0")
        engines._answers["triton", "cuda:0"] = True
        assert engines.is_trusted("triton", "cuda:0")
