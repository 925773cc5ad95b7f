"""Work and memory are linear in patches and clips for all settings."""

import gc
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engines_in_turn import ENGINES_IN_TURN
from meter import Meter
from ssync_loss import SSyncLoss

# slots and grid of the published configurations
MOVI_C = (11, 24, 24)
YTVIS = (7, 37, 37)

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "cross entropy": {"criterion": "cross_entropy", "label_smoothing": 0.1},
    "no merging": {"merge_threshold": None},
    "probabilities": {"kind": "probs"},
    "masks, another grid": {"masks": True, "other_grid": True},
}
PLAIN = [name for name, settings in SETTINGS.items() if "masks" not in settings]


def random_maps(*shape: int, device: str = "cpu", probs: bool = False) -> list[Tensor]:
    maps = [torch.randn(shape, device=device) for _ in range(2)]
    return [(one.softmax(2) if probs else one).requires_grad_() for one in maps]


def measure(*shape: int, device: str = "cpu", masks: bool = False, other_grid: bool = False, **settings: Any) -> Meter:
    """Run a step, forward and backward."""
    enc, dec = random_maps(*shape, device=device, probs="kind" in settings)
    if other_grid:
        dec = dec.detach()[..., ::2, ::2].clone().requires_grad_()
    given: dict[str, Any] = {}
    if masks:
        given["valid"] = torch.rand(*shape[:2], *shape[3:], device=device) > 0.1
        given["slot_mask"] = torch.ones(shape[0], shape[2], dtype=torch.bool, device=device)
    meter = Meter([enc, dec, *given.values()])
    with meter:
        loss: Tensor = SSyncLoss(**settings)(enc, dec, **given)
        loss.backward()
    return meter


def slope(sizes: list[float], costs: list[float]) -> float:
    """Return the largest p with cost ~ size^p between neighboring sizes."""
    steps = zip(sizes, sizes[1:], costs, costs[1:], strict=False)
    return max(math.log(after / before) / math.log(big / small) for small, big, before, after in steps)


@ENGINES_IN_TURN
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("grows", ["B", "T", "H", "W"])
def test_work_and_memory_are_linear(engine: Any, name: str, grows: str) -> None:
    sizes = [8, 16, 32]
    meters = []
    for size in sizes:
        shape = {"B": 2, "T": 2, "S": 5, "H": 16, "W": 16, grows: size}
        with engine():
            meters.append(measure(*shape.values(), **SETTINGS[name]))
    for costs in ([one.num_elements for one in meters], [one.peak for one in meters]):
        assert 0.7 < slope([float(one) for one in sizes], [float(one) for one in costs]) <= 1.05


def test_the_meter_detects_quadratic_costs() -> None:
    costs = []
    for size in (64, 128, 256):
        x = torch.randn(size, 2)
        with Meter([x]) as meter:
            (x @ x.T).exp().sum()
        costs.append((meter.num_elements, meter.peak))
    for one in zip(*costs, strict=True):
        assert slope([64.0, 128.0, 256.0], [float(cost) for cost in one]) > 1.8


def test_the_meter_counts_elements_operators_and_bytes() -> None:
    x = torch.ones(100)
    with Meter([x]) as meter:
        y = x + 1.0
        z = y * y
        assert meter.alive == 800
        del y
        assert meter.alive == 400
        z.add_(1.0)
        z.view(10, 10)
    # elements of x, y; of y, y, z; of z, z
    assert meter.num_elements == 700
    assert meter.num_operators == 3
    assert meter.peak == 800


@ENGINES_IN_TURN
@pytest.mark.parametrize("name", SETTINGS)
def test_the_number_of_operators_does_not_depend_on_the_size(engine: Any, name: str) -> None:
    with engine():
        counts = {measure(*size, *MOVI_C, **SETTINGS[name]).num_operators for size in [(1, 1), (2, 3), (16, 4)]}
    assert len(counts) == 1


@pytest.mark.parametrize("name", ["default", "cross entropy", "no merging"])
@pytest.mark.parametrize("frame", [MOVI_C, YTVIS])
@pytest.mark.parametrize("masks", [False, True])
def test_the_library_saves_only_gradients(name: str, frame: tuple[int, int, int], masks: bool) -> None:
    enc, dec = random_maps(16, 4, *frame)
    given: dict[str, Any] = {}
    if masks:
        given = {"valid": torch.rand(16, 4, *frame[1:]) > 0.1, "slot_mask": torch.ones(16, frame[0]) > 0}
    one_map = enc.numel() * 4
    with Meter([enc, dec, *given.values()]) as meter:
        loss = SSyncLoss(**SETTINGS[name], backend="cpu")(enc, dec, **given)
        assert 2.0 <= meter.alive / one_map < 2.001
        # an upstream gradient of 1 needs no third map
        grads = torch.autograd.grad(loss, (enc, dec))
        assert meter.peak / one_map < 2.001
        del grads, loss
        assert meter.alive == 0


@pytest.mark.parametrize("taught", ["enc", "dec", "neither"])
def test_the_library_computes_only_needed_gradients(taught: str) -> None:
    enc, dec = random_maps(4, 4, *MOVI_C)
    enc, dec = enc.detach().requires_grad_(taught == "enc"), dec.detach().requires_grad_(taught == "dec")
    criterion = SSyncLoss(backend="cpu").eval()
    with Meter([enc, dec]) as meter:
        criterion(enc, dec)
    assert meter.peak / (enc.numel() * 4) < (0.001 if taught == "neither" else 1.001)
    with torch.no_grad(), Meter([enc, dec]) as meter:
        criterion(enc.detach().requires_grad_(), dec)
    assert meter.peak / (enc.numel() * 4) < 0.001


@pytest.mark.parametrize("kind", ["logits", "probs"])
def test_before_the_start_nothing_is_allocated_or_read(kind: Any) -> None:
    enc, dec = random_maps(8, 4, *MOVI_C)
    masks: dict[str, Any] = {
        "valid": torch.ones(8, 4, dtype=torch.bool),
        "slot_mask": torch.ones(8, 11, dtype=torch.bool),
    }
    with Meter([enc, dec, *masks.values()]) as meter:
        loss = SSyncLoss(start_step=1, kind=kind)(enc, dec, step=0, **masks)
    assert loss == 0
    assert meter.peak < 100
    assert meter.num_elements < 20


@ENGINES_IN_TURN
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("backward", [True, False])
def test_all_memory_is_freed_with_the_loss(engine: Any, name: str, backward: bool) -> None:
    enc, dec = random_maps(2, 2, 4, 8, 8, probs="kind" in SETTINGS[name])
    gc.collect()
    gc.disable()
    try:
        with engine(), Meter([enc, dec]) as meter:
            terms = SSyncLoss(**SETTINGS[name]).terms(enc, dec)
            assert meter.alive > 0
            if backward:
                terms.total.backward()
                enc.grad = dec.grad = None
            del terms
            # reference counting frees everything; a cycle would need the collector
            assert meter.alive == 0
    finally:
        gc.enable()
