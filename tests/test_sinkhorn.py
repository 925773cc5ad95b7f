"""Optimal transport: published plans, the reference, marginals, extreme values, errors."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from golden_neighbors import Golden, deviation, golden_names
from ssync_loss.methods.smtc.reference import reference_sinkhorn
from ssync_loss.methods.smtc.sinkhorn import scalings, sinkhorn, transport_plan

NAN, INF = float("nan"), float("inf")
TOL = {torch.float32: 1e-6, torch.float64: 1e-10}


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return costs (B, N, M) between 0 and 2, and marginals."""
    clips, rows, columns = shape or (2, 5, 7)
    generator = torch.Generator().manual_seed(seed)
    cost = 2 * torch.rand(clips, rows, columns, generator=generator, dtype=torch.float64)
    mu, nu = (0.2 + torch.rand(clips, size, generator=generator, dtype=torch.float64) for size in (rows, columns))
    return cost.to(dtype), mu.to(dtype), nu.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden_names("sinkhorn_", 2))
def test_published_plans(name: str, dtype: torch.dtype) -> None:
    golden = Golden(name)
    given = (golden.tensor(one, dtype) for one in ("cost", "mu", "nu"))
    plan = sinkhorn(*given, eps=golden.number("eps"), iters=golden.count("iters"))
    assert plan.dtype == dtype
    assert deviation(plan, golden.tensor("plan_f64")) <= TOL[dtype]


DRAWN = {
    "shape": st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    "seed": st.integers(0, 2**31),
    "iters": st.integers(1, 6),
}


@settings(max_examples=60)
@given(**DRAWN, eps=st.sampled_from((0.01, 0.05, 0.3, 5.0)))
def test_a_plan_equals_the_reference(shape: tuple[int, ...], seed: int, iters: int, eps: float) -> None:
    data = sample(*shape, dtype=torch.float64, seed=seed)
    expected = reference_sinkhorn(*data, eps=eps, iters=iters)
    torch.testing.assert_close(sinkhorn(*data, eps=eps, iters=iters), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("eps", [1e-6, 1e-3, 1e3])
def test_extreme_entropies(eps: float) -> None:
    cost, mu, nu = sample()
    plan = sinkhorn(cost, mu, nu, eps=eps)
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum((1, 2)), torch.ones(2), rtol=1e-5, atol=0)


def test_plans_with_and_without_logarithms_agree() -> None:
    cost, mu, nu = sample(dtype=torch.float64)
    mu, nu = mu / mu.sum(1, keepdim=True), nu / nu.sum(1, keepdim=True)
    mu[0, 2] = nu[1, 3] = 0
    kernel = (-cost / 0.05).exp()
    a, b = scalings(kernel, mu, nu, 3)
    plan = transport_plan(-cost / 0.05, mu, nu, 3)
    torch.testing.assert_close(a * kernel * b, plan, rtol=1e-11, atol=0)
    assert not plan[0, 2].any()
    assert not plan[1, :, 3].any()


def test_a_plan_has_no_gradient() -> None:
    cost, mu, nu = (one.requires_grad_() for one in sample())
    assert not sinkhorn(cost, mu, nu).requires_grad


def test_an_empty_batch_has_an_empty_plan() -> None:
    assert sinkhorn(*sample(0, 3, 4)).shape == (0, 3, 4)


@pytest.mark.parametrize("dirt", [NAN, INF, -INF])
def test_nonfinite_costs_give_nan(dirt: float) -> None:
    cost, mu, nu = sample()
    spoiled = cost.clone()
    spoiled[0] = dirt
    plan = sinkhorn(spoiled, mu, nu)
    assert plan[0].isnan().all()
    assert torch.equal(plan[1], sinkhorn(cost, mu, nu)[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    data = sample(dtype=dtype)
    plan = sinkhorn(*data)
    assert plan.dtype == torch.float32
    cost, mu, nu = (one.float() for one in data)
    assert torch.equal(plan, sinkhorn(cost, mu, nu))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn(*data), plan)


def test_the_widest_type_is_used() -> None:
    cost, mu, nu = sample()
    assert sinkhorn(cost, mu.double(), nu.half()).dtype == torch.float64


@pytest.mark.usefixtures("fresh_compiler")
def test_it_compiles_to_one_graph() -> None:
    data = sample()
    counter = CompileCounterWithBackend("aot_eager")
    plan = torch.compile(sinkhorn, fullgraph=True, backend=counter)(*data)
    assert counter.frame_count == 1
    torch.testing.assert_close(plan, sinkhorn(*data))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        assert sinkhorn(torch.rand(2, 3, 4), torch.rand(2, 3), torch.rand(2, 4)).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"eps": 0.0}, ValueError, r"`eps` must be finite and above 0.0; got 0.0"),
        ({"iters": 0}, ValueError, r"`iters` must be at least 1; got 0"),
        ({"cost": torch.zeros(2, 0, 7)}, ValueError, r"`cost` must have N >= 1; got N=0"),
        ({"cost": torch.zeros(2, 5, 0)}, ValueError, r"`cost` must have M >= 1; got M=0"),
        ({"mu": torch.ones(2, 7)}, ValueError, r"`mu` must have shape \(B=2, N=5\); got \(2, 7\)"),
        ({"nu": torch.ones(2, 5)}, ValueError, r"`nu` must have shape \(B=2, M=7\); got \(2, 5\)"),
        ({"mu": torch.ones(2, 5).index_fill(1, torch.tensor([3]), 0.0)}, ValueError, r"`mu` must be above 0 .*got 0.0"),
        ({"nu": torch.ones(2, 7).index_fill(1, torch.tensor([6]), -2)}, ValueError, r"`nu` must be above 0 .*got -2.0"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    cost, mu, nu = sample()
    with pytest.raises(error, match=message):
        sinkhorn(**{"cost": cost, "mu": mu, "nu": nu, **wrong})
