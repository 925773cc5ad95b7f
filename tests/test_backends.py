"""Which implementation computes, what is missing when it cannot be had, and that no value depends on it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from golden_cases import NAMES, load_golden
from sample_maps import leaf, sample_maps
from ssync_loss import BoundaryRefinementLoss, InteriorDenoisingLoss, SSyncLoss, kernels
from ssync_loss._backends import BACKENDS, check_backend, resolve_backend
from ssync_loss.functional import (
    boundary_refinement_loss,
    interior_denoising_loss,
    pseudo_labels,
    selective_distillation_loss,
)
from ssync_loss.testing import (
    SSyncCase,
    assert_close_gradient,
    assert_close_loss,
    assert_same_labels,
)

# on a CPU the kernels run under Triton's interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make maps say that they are on a CUDA device, to a backend that asks."""
    monkeypatch.setattr(Tensor, "device", property(lambda _: torch.device("cuda", 0)))


class TestChoice:
    @pytest.mark.parametrize("maps", [torch.zeros(1, 1, 2, 1, 1), torch.zeros(1, 1, 2, 1, 1, device="meta")])
    def test_auto_is_torch_off_cuda(self, maps: Tensor) -> None:
        assert resolve_backend("auto", maps, maps) == "torch"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_auto_takes_the_kernels_on_cuda(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
        maps = torch.zeros(1, 1, 64, 1, 1, dtype=dtype)
        on_cuda(monkeypatch)
        assert resolve_backend("auto", maps, maps.float()) == "triton"

    @pytest.mark.parametrize(
        ("maps", "text"),
        [
            (torch.zeros(1, 1, 65, 1, 1), "S <= 64; got S=65"),
            (torch.zeros(1, 1, 2, 1, 1, dtype=torch.float64), "float16, bfloat16 or float32; got torch.float64"),
        ],
    )
    def test_auto_falls_back_where_the_kernels_end(
        self, monkeypatch: pytest.MonkeyPatch, maps: Tensor, text: str
    ) -> None:
        on_cuda(monkeypatch)
        assert resolve_backend("auto", maps, maps) == "torch"
        with pytest.raises(ValueError, match=f"^`backend`='triton' needs {text}"):
            resolve_backend("triton", maps, maps)

    def test_on_an_old_gpu_auto_falls_back_and_asking_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        maps = torch.zeros(1, 1, 2, 1, 1)
        gpu = SimpleNamespace(major=6, minor=0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
        on_cuda(monkeypatch)
        assert resolve_backend("auto", maps) == "torch"
        with pytest.raises(ValueError, match=r"needs a GPU of compute capability 7.0 or above; got 6.0"):
            resolve_backend("triton", maps)

    def test_without_triton_auto_falls_back_and_asking_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        maps = torch.zeros(1, 1, 2, 1, 1)
        monkeypatch.setattr("ssync_loss.kernels._facts.INSTALLED", False)
        on_cuda(monkeypatch)
        assert resolve_backend("auto", maps) == "torch"
        with pytest.raises(ValueError, match="`backend`='triton' needs the package triton, which is not installed"):
            resolve_backend("triton", maps)
        with pytest.raises(ValueError, match="the package triton"):
            check_backend("triton")
        with pytest.raises(ValueError, match="the package triton"):
            SSyncLoss(backend="triton")

    def test_a_cpu_tensor_is_refused_outside_the_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ssync_loss.kernels._facts.INTERPRETED", False)
        enc, dec = torch.zeros(2, 1, 1, 2, 2, 2).unbind(0)
        with pytest.raises(ValueError, match="`backend`='triton' needs a CUDA tensor; got cpu"):
            SSyncLoss(backend="triton").eval()(enc, dec)
        with pytest.raises(ValueError, match="a CUDA tensor; got cpu"):
            pseudo_labels(enc, dec, backend="triton")
        target, region = torch.zeros(1, 1, 2, 2).long(), torch.ones(1, 1, 2, 2).bool()
        with pytest.raises(ValueError, match="a CUDA tensor; got cpu"):
            selective_distillation_loss(enc, target, region, backend="triton")

    def test_too_many_slots_are_refused_when_asked_for_and_fall_back_else(self) -> None:
        enc, dec = (torch.randn(1, 1, 65, 2, 2, device=DEVICE) for _ in range(2))
        with pytest.raises(ValueError, match="`backend`='triton' needs S <= 64; got S=65"):
            SSyncLoss(backend="triton").eval()(enc, dec)
        assert_close_loss(SSyncLoss().eval()(enc, dec), SSyncLoss(backend="reference").eval()(enc, dec))

    @pytest.mark.parametrize("call", [check_backend, resolve_backend])
    def test_an_unknown_name_is_an_error(self, call: Any) -> None:
        with pytest.raises(ValueError, match=r"`backend` must be one of 'auto', 'torch', 'triton', 'reference'"):
            call("cuda")


def both_ways(backend: str, case: SSyncCase, **settings: Any) -> tuple[Any, list[Tensor | None]]:
    """Terms and gradients of a loss that computes as it is told."""
    maps = [leaf(one.detach().to(DEVICE)) for one in case[:2]]
    masks = {name: None if one is None else one.to(DEVICE) for name, one in case._asdict().items() if "mask" in name}
    valid = None if case.valid is None else case.valid.to(DEVICE)
    terms = SSyncLoss(**settings, backend=backend).terms(*maps, valid=valid, **masks)  # type: ignore[arg-type]
    terms.total.backward()
    return terms, [one.grad for one in maps]


def assert_backends_agree(case: SSyncCase, **settings: Any) -> None:
    wanted, wanted_grads = both_ways("torch", case, **settings)
    actual, grads = both_ways("triton", case, **settings)
    assert_same_labels(actual.labels, wanted.labels)
    assert actual.num_boundary == wanted.num_boundary
    assert actual.num_interior == wanted.num_interior
    for name in ("total", "boundary", "interior"):
        assert_close_loss(getattr(actual, name), getattr(wanted, name))
    for got, grad in zip(grads, wanted_grads, strict=True):
        assert got is not None
        assert grad is not None
        assert got.dtype == grad.dtype
        # a half may round to either side
        rounding = 0.0 if grad.dtype == torch.float32 else torch.finfo(grad.dtype).eps
        scale = float(grad.abs().max())
        torch.testing.assert_close(got, grad, rtol=2 * rounding, atol=3e-6 * scale + rounding * 1e-3 * scale)


class TestValues:
    @pytest.mark.parametrize("name", NAMES)
    def test_golden_cases(self, name: str) -> None:
        case = load_golden(name)
        maps = SSyncCase(case.enc_logits.float(), case.dec_logits.float(), None, None)
        assert_backends_agree(maps, **case.label_args, temperature=case.temperature)

    @pytest.mark.parametrize(
        "settings",
        [
            {"criterion": "cross_entropy", "label_smoothing": 0.1, "temperature": 0.5},
            {"boundary_weight": 0.5, "interior_weight": 0.0},
            {"kind": "probs"},
            {"kind": ("probs", "logits")},
            {"min_different": 2, "min_same": 3, "max_different": 1},
            {"merge_threshold": None},
        ],
    )
    def test_every_setting(self, settings: dict[str, Any]) -> None:
        enc, dec = (one.detach() for one in sample_maps())
        if "kind" in settings:
            enc = enc.softmax(2)
            dec = dec.softmax(2) if settings["kind"] == "probs" else dec
        assert_backends_agree(SSyncCase(enc, dec, None, None), **settings)

    def test_another_grid_halves_and_masks(self) -> None:
        enc, dec = (one.detach() for one in sample_maps())
        valid = torch.rand(2, 2, 5, 12) > 0.2
        slot_mask = torch.tensor([[True] * 4, [True, True, False, True]])
        assert_backends_agree(SSyncCase(enc.half(), dec[..., 1:, ::2].contiguous(), valid, slot_mask))
        assert_backends_agree(SSyncCase(enc.bfloat16(), dec.bfloat16(), None, None))

    def test_a_ramp_weighs_alike(self) -> None:
        enc, dec = (one.to(DEVICE) for one in sample_maps())
        losses = [SSyncLoss(ramp_steps=8, backend=name)(enc, dec, step=3) for name in ("torch", "triton")]
        assert_close_loss(losses[1], losses[0])
        assert losses[0] > 0

    @pytest.mark.parametrize("function", [boundary_refinement_loss, interior_denoising_loss])
    def test_the_halves(self, function: Any) -> None:
        enc, dec = (one.detach().to(DEVICE) for one in sample_maps())
        pairs = []
        for name in ("torch", "triton"):
            maps = leaf(enc.clone()), leaf(dec.clone())
            loss = function(*maps, backend=name)
            loss.backward()
            pairs.append((loss, [one.grad for one in maps]))
        (wanted, wanted_grads), (actual, grads) = pairs
        assert_close_loss(actual, wanted)
        for got, grad in zip(grads, wanted_grads, strict=True):
            assert (got is None) == (grad is None)
            if got is not None and grad is not None:
                assert_close_gradient(got, grad, scale=float(grad.abs().max()))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_nan_makes_every_term_nan(self, backend: str) -> None:
        enc, dec = (one.detach().clone().to(DEVICE) for one in sample_maps())
        dec[0, 0, 1, 2, 3] = float("nan")
        maps = leaf(enc), leaf(dec)
        terms = SSyncLoss(backend=backend).terms(*maps)  # type: ignore[arg-type]
        terms.total.backward()
        assert terms.boundary.isnan()
        assert terms.interior.isnan()
        assert all(one.grad is not None and one.grad.isnan().any() for one in maps)

    @pytest.mark.parametrize("module", [SSyncLoss, BoundaryRefinementLoss, InteriorDenoisingLoss])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_every_module_takes_every_backend(self, module: Any, backend: str) -> None:
        maps = [one.to(DEVICE) for one in sample_maps()]
        assert_close_loss(module(backend=backend)(*maps), module(backend="reference")(*maps))


def test_the_kernels_know_their_largest_number_of_slots() -> None:
    assert kernels.MAX_SLOTS == 64
