"""The parts of the slot curriculum: schedule, errors, allotment, children, optimizer state."""

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from golden_neighbors import Golden, deviation, golden_names
from meter import Meter
from ssync_loss.curriculum import (
    allot_children,
    hold_rows,
    inherit_moments,
    milestones,
    slot_error,
    slot_schedule,
    spawn_children,
)
from ssync_loss.methods.slotcurri.curriculum.children import place_children
from ssync_loss.methods.slotcurri.reference import (
    reference_allot_children,
    reference_place_children,
    reference_slot_error,
)

NAN, INF = float("nan"), float("inf")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- schedule ---


@pytest.mark.parametrize(("total", "sigma", "budgets"), [(7, 1, [2, 3, 7]), (11, 3, [2, 5, 11]), (15, 5, [2, 7, 15])])
def test_both_rules_give_the_published_schedules(total: int, sigma: int, budgets: list[int]) -> None:
    assert slot_schedule(total) == slot_schedule(total, sigma=sigma) == budgets


@given(total=st.integers(1, 60), start=st.integers(1, 60), stages=st.sampled_from((2, 3)))
def test_a_schedule_grows_from_start_to_total(total: int, start: int, stages: int) -> None:
    assume(start <= total)
    budgets = slot_schedule(total, stages=stages, start=start)
    assert budgets[0] == start
    assert budgets[-1] == total
    assert all(one < other for one, other in pairwise(budgets))
    assert len(budgets) <= stages
    if stages == 3 and start < total // 2 < total:
        assert budgets[1] == total // 2


@given(start=st.integers(1, 5), stages=st.integers(2, 6), sigma=st.integers(1, 8))
def test_a_schedule_equals_the_papers_formula(start: int, stages: int, sigma: int) -> None:
    expected = [start + m * sigma + 3 * m * (m - 1) // 2 for m in range(stages)]
    assert slot_schedule(expected[-1], stages=stages, start=start, sigma=sigma) == expected


def test_a_stage_without_new_slots_is_dropped() -> None:
    assert [slot_schedule(total) for total in (2, 3, 4, 5, 6)] == [[2], [2, 3], [2, 4], [2, 5], [2, 3, 6]]
    assert slot_schedule(8, start=5) == [5, 8]
    assert slot_schedule(8, stages=2) == [2, 8]


@given(max_steps=st.integers(1, 10**6))
def test_milestones_are_a_tenth_and_a_quarter(max_steps: int) -> None:
    first, second = milestones(max_steps)
    assert 0 <= first <= second < max_steps
    assert first <= max_steps / 10 < first + 1
    assert second <= max_steps / 4 < second + 1


@pytest.mark.parametrize(
    ("total", "knobs", "error", "message"),
    [
        (1, {}, ValueError, r"`total` must be at least 2; got 1"),
        (4, {"start": 5}, ValueError, r"`total` must be at least 5; got 4"),
        (7.0, {}, TypeError, r"`total` must be an integer; got float"),
        (7, {"start": 0}, ValueError, r"`start` must be at least 1; got 0"),
        (7, {"stages": 1}, ValueError, r"`stages` must be at least 2; got 1"),
        (12, {"stages": 4}, ValueError, r"`sigma` must be given for more than 3 stages; got None for stages=4"),
        (7, {"sigma": 2}, ValueError, r"`sigma` must be 1 to end at total=7 after 3 stages; got 2"),
        (8, {"sigma": 1.5}, ValueError, r"`sigma` must give budgets that grow by whole slots; got 1.5, .* 2, 3.5, 8"),
        (5, {"sigma": 0}, ValueError, r"`sigma` must give budgets that grow by whole slots; got 0, .* 2, 2, 5"),
        (7, {"sigma": INF}, ValueError, r"`sigma` must be finite .*; got inf"),
        (7, {"sigma": "1"}, TypeError, r"`sigma` must be a number; got str"),
    ],
)
def test_impossible_schedules_are_refused(
    total: Any, knobs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        slot_schedule(total, **knobs)


@pytest.mark.parametrize(("wrong", "error"), [(0, ValueError), (1e5, TypeError)])
def test_wrong_milestones_are_named(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`max_steps` must be a"):
        milestones(wrong)


# --- errors ---


def scene(
    *shape: int, num_slots: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a reconstruction, its target and masks; the shape is (B, T, D, H, W)."""
    clips, frames, channels, height, width = shape or (2, 3, 5, 2, 4)
    recon, target = randn(2, clips, frames, channels, height, width, seed=seed, dtype=dtype)
    masks = (2 * randn(clips, frames, num_slots, height, width, seed=seed + 1)).softmax(2).to(dtype)
    return recon, target, masks


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", ["slot_error_K2", "slot_error_K5"])
def test_published_errors(name: str, dtype: torch.dtype, tol: float) -> None:
    golden = Golden(name)
    recon, target, logits = (golden.tensor(one, dtype).requires_grad_() for one in ("recon", "target", "mask_logits"))
    errors = slot_error(recon, target, logits.softmax(2))
    assert errors.dtype == dtype
    assert not errors.requires_grad
    assert deviation(errors, golden.tensor("errors_f64")) <= tol
    assert deviation(errors.sum(), golden.tensor("loss_f64")) <= tol


@settings(max_examples=40)
@given(
    shape=st.tuples(*(st.sampled_from(sizes) for sizes in ((0, 1, 2), (1, 3), (1, 2, 70), (1, 2), (1, 3)))),
    num_slots=st.sampled_from((1, 2, 5)),
    seed=st.integers(0, 999),
)
def test_errors_equal_the_reference_and_sum_to_the_mean_squared_error(
    shape: tuple[int, ...], num_slots: int, seed: int
) -> None:
    recon, target, masks = scene(*shape, num_slots=num_slots, seed=seed)
    errors = slot_error(recon, target, masks)
    torch.testing.assert_close(errors, reference_slot_error(recon, target, masks), rtol=1e-12, atol=1e-14)
    assert (errors >= 0).all()
    whole = (recon - target).square().sum() / max(recon.numel(), 1)
    torch.testing.assert_close(errors.sum(), whole, rtol=1e-12, atol=0)
    order = torch.arange(num_slots).flip(0)
    torch.testing.assert_close(slot_error(recon, target, masks[:, :, order]), errors[order], rtol=1e-12, atol=0)
    torch.testing.assert_close(slot_error(3 * recon, 3 * target, masks), 9 * errors, rtol=1e-12, atol=0)


def test_an_idle_slot_has_no_error() -> None:
    recon, target, masks = scene()
    masks[:, :, 1] = 0
    errors = slot_error(recon, target, masks)
    assert errors[1] == 0
    assert (errors[[0, 2]] > 0).all()
    assert allot_children(errors, 9)[1] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errors_of_half_precision_are_float32(dtype: torch.dtype) -> None:
    data = scene(dtype=dtype)
    errors = slot_error(*data)
    assert errors.dtype == torch.float32
    assert torch.equal(errors, slot_error(*(one.float() for one in data)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(slot_error(*(one.float() for one in data)), errors)
    assert slot_error(data[0], data[1].double(), data[2]).dtype == torch.float64


def test_errors_take_less_memory_than_a_difference() -> None:
    recon, target, masks = scene(2, 2, 512, 8, 8, num_slots=9, dtype=torch.float32)
    with Meter([recon, target, masks]) as meter:
        slot_error(recon, target, masks)
    assert meter.peak < recon.numel() * 4 / 2
    with FakeTensorMode():
        assert slot_error(*(torch.zeros(one.shape) for one in (recon, target, masks))).shape == (9,)


@pytest.mark.usefixtures("fresh_compiler")
def test_errors_and_their_allotment_compile_to_one_graph() -> None:
    def allotted(recon: Tensor, target: Tensor, masks: Tensor) -> Tensor:
        return allot_children(slot_error(recon, target, masks), 5)

    counter = CompileCounterWithBackend("aot_eager")
    data = scene()
    assert torch.equal(torch.compile(allotted, fullgraph=True, backend=counter)(*data), allotted(*data))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("recon", torch.zeros(2, 0, 5, 2, 4), ValueError, r"`recon` must have T >= 1; got T=0"),
        ("target", torch.zeros(2, 3, 4, 2, 4), ValueError, r"`target` must have shape \(B=2, T=3, D=5, H=2, W=4\)"),
        ("masks", torch.zeros(2, 3, 0, 2, 4), ValueError, r"`masks` must have S >= 1; got S=0"),
    ],
)
def test_wrong_tensors_are_named(name: str, value: Any, error: type[Exception], message: str) -> None:
    names = ("recon", "target", "masks")
    with pytest.raises(error, match=message):
        slot_error(**{**dict(zip(names, scene(), strict=True)), name: value})


# --- allotment ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_published_allotments(dtype: torch.dtype) -> None:
    golden = Golden("allotment_ties")
    cases = list(zip(*(golden.tensor(one) for one in ("errors", "K", "n_new", "counts", "tie")), strict=True))
    assert len(cases) == 5
    for errors, size, n_new, expected, tie in cases:
        known = errors[: int(size)].to(dtype)
        counts = allot_children(known, int(n_new))
        assert counts.sum() == n_new
        assert ((counts - known.double() * n_new / known.double().sum()).abs() < 1).all()
        if not tie:
            assert torch.equal(counts, expected[: int(size)])
    assert golden.tensor("tie").any()


@settings(max_examples=300)
@given(
    errors=st.lists(st.integers(0, 12) | st.floats(0.125, 1024, width=32), min_size=1, max_size=9),
    n_new=st.integers(0, 24),
)
@example(errors=[1, 1, 1], n_new=2)
@example(errors=[0, 3, 0], n_new=5)
@example(errors=[1, 1], n_new=1)
def test_children_are_allotted_by_largest_remainders(errors: list[float], n_new: int) -> None:
    tensor = torch.tensor(errors, dtype=torch.float64)
    counts = allot_children(tensor, n_new)
    assert counts.dtype == torch.int64
    assert counts.sum() == n_new
    assert (counts >= 0).all()
    total = sum(Fraction(one) for one in errors)
    if total == 0:
        assert counts.max() - counts.min() <= 1
        assert torch.equal(counts, counts.sort(descending=True).values)
        return
    shares = [Fraction(one) * n_new / total for one in errors]
    for error, count, share in zip(errors, counts.tolist(), shares, strict=True):
        assert abs(count - share) < 1
        assert error > 0 or count == 0
    for i, j in zip(*torch.triu_indices(len(errors), len(errors), 1).tolist(), strict=True):
        if errors[i] >= errors[j]:
            assert counts[i] >= counts[j]
        else:
            assert counts[i] <= counts[j]
    # fractions, because different remainders may be equal in float64
    remainders = sorted(share - int(share) for share in shares)
    gaps = [other - one for one, other in pairwise(remainders)]
    assume(all(gap == 0 or gap > 1e-9 for gap in gaps) and all(one == 0 or 1e-9 < one < 1 - 1e-9 for one in remainders))
    if len(set(remainders)) == len(remainders) or len(set(errors)) == 1:
        assert counts.tolist() == reference_allot_children(errors, n_new)
    assert torch.equal(allot_children(tensor * 4, n_new), counts)


def test_ties_go_to_the_lower_index() -> None:
    assert allot_children(torch.ones(4), 6).tolist() == [2, 2, 1, 1]
    assert allot_children(torch.tensor([1.0, 2.0, 1.0]), 2).tolist() == [1, 1, 0]
    assert reference_allot_children([1.0, 2.0, 1.0], 2) == [1, 1, 0]


def test_shares_are_computed_in_float64() -> None:
    assert allot_children(torch.tensor([2.0**24, 2.0**24 + 1], dtype=torch.float64), 1).tolist() == [0, 1]
    # float32 cannot represent a third of this number
    assert allot_children(torch.full((3,), 2.0**100), 2**30).tolist() == [357913942, 357913941, 357913941]


@pytest.mark.parametrize("unknown", [[0.0, 0.0, 0.0], [1.0, NAN, 2.0], [1.0, INF, 2.0], [3.0, -1.0, 2.0]])
def test_useless_errors_allot_children_in_turn(unknown: list[float]) -> None:
    assert allot_children(torch.tensor(unknown), 4).tolist() == [2, 1, 1]
    assert reference_allot_children(unknown, 4) == [2, 1, 1]


@pytest.mark.parametrize(
    ("errors", "n_new", "error", "message"),
    [
        (torch.ones(0), 2, ValueError, r"`errors` must have K >= 1; got K=0"),
        (torch.ones(2), -1, ValueError, r"`n_new` must be at least 0; got -1"),
        (torch.ones(2), torch.tensor(2), TypeError, r"`n_new` must be an integer; got Tensor"),
    ],
)
def test_wrong_allotments_are_refused(errors: Any, n_new: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        allot_children(errors, n_new)


# --- children ---


@pytest.mark.parametrize(("dtype", "suffix", "tol"), [(torch.float64, "_f64", 1e-10), (torch.float32, "", 1e-5)])
@pytest.mark.parametrize("rule", ["active", "all"])
@pytest.mark.parametrize("name", golden_names("spawn_", 3))
def test_published_children(name: str, rule: Any, dtype: torch.dtype, suffix: str, tol: float) -> None:
    golden = Golden(name)
    num_active = golden.count("n_active")
    slots = golden.tensor("slots_before", dtype)
    counts = allot_children(golden.tensor("errors", dtype), golden.count("n_new"))
    assert torch.equal(counts, golden.tensor("counts"))
    directions = golden.tensor(f"direction_{rule}{suffix}", dtype)
    children = place_children(
        slots[:num_active],
        counts,
        directions,
        beta=golden.number("beta"),
        neighbors=rule,
        min_radius=0.0,
        unborn=slots[num_active:],
    )
    expected = golden.tensor(f"slots_after_{rule}{suffix}", torch.float64)
    assert torch.equal(expected[:num_active], slots[:num_active].double())
    assert deviation(children, expected[num_active : num_active + len(children)]) <= tol
    parents = slots[golden.tensor("parent").long()]
    radius = (children.double() - parents.double()).norm(dim=1)
    assert deviation(radius, golden.tensor(f"radius_{rule}{suffix}", torch.float64)) <= tol


@st.composite
def families(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Draw slots (some equal or zero), numbers and directions of children, and settings."""
    num_active, num_unborn, width = draw(st.integers(1, 5)), draw(st.integers(0, 6)), draw(st.integers(1, 6))
    rows = randn(num_active + num_unborn, width, seed=draw(st.integers(0, 999)))
    what = draw(st.sampled_from(["plain", "twins", "zero", "nothing"]))
    if what == "twins" and num_active > 1:
        rows[1] = rows[0]
    if what == "zero":
        rows[0] = 0
    if what == "nothing":
        rows *= 0
    places = draw(st.lists(st.integers(0, num_active - 1), max_size=num_unborn))
    counts = torch.bincount(torch.tensor(places, dtype=torch.int64), minlength=num_active)
    directions = torch.nn.functional.normalize(randn(len(places), width, seed=1), dim=1)
    knobs = {
        "beta": draw(st.sampled_from((0.2, 0.0, 1.0))),
        "neighbors": draw(st.sampled_from(("active", "all"))),
        "min_radius": draw(st.sampled_from((0.0, 1e-3, 0.5))),
        "unborn": rows[num_active:],
    }
    return rows[:num_active], counts, directions, knobs


@settings(max_examples=150)
@given(family=families())
def test_children_equal_the_reference(
    family: tuple[Tensor, Tensor, Tensor, dict[str, Any]],
) -> None:
    slots, counts, directions, knobs = family
    before = slots.clone(), knobs["unborn"].clone()
    # in one dimension all slots are equally similar, and rounding decides
    assume(slots.shape[1] > 1)
    children = place_children(slots, counts, directions, **knobs)
    expected = reference_place_children(slots, counts.tolist(), directions, **knobs)
    torch.testing.assert_close(children, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(before[0], slots)
    assert torch.equal(before[1], knobs["unborn"])
    assert children.isfinite().all()


def test_the_distance_of_a_child_is_the_radius_of_its_parent() -> None:
    slots, counts = randn(4, 8), torch.tensor([2, 0, 1, 3])
    children = spawn_children(slots, counts, generator=torch.Generator().manual_seed(0))
    units = torch.nn.functional.normalize(slots, dim=1)
    nearest = (units @ units.T - 2 * torch.eye(4, dtype=torch.float64)).argmax(1)
    length = slots.norm(dim=1)
    radius = 0.2 * (slots - slots[nearest]).norm(dim=1) * length / length.mean()
    parents = torch.tensor([0, 0, 2, 3, 3, 3])
    torch.testing.assert_close((children - slots[parents]).norm(dim=1), radius[parents], rtol=1e-7, atol=0)
    # every child has its own direction
    directions = torch.nn.functional.normalize(children - slots[parents], dim=1)
    assert (directions @ directions.T - torch.eye(6, dtype=torch.float64)).abs().max() < 0.95


def test_directions_are_uniform_on_the_sphere() -> None:
    slots = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    children = spawn_children(slots, torch.tensor([4000, 0]), generator=torch.Generator().manual_seed(0))
    directions = torch.nn.functional.normalize(children - slots[0], dim=1)
    assert directions.mean(0).abs().max() < 0.05
    torch.testing.assert_close(directions.T @ directions / 4000, torch.eye(3) / 3, rtol=0, atol=0.03)


def test_the_seed_determines_the_children() -> None:
    slots, counts = randn(3, 4), torch.tensor([1, 1, 0])
    first, again, other = (
        spawn_children(slots, counts, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    assert torch.equal(spawn_children(slots, counts), first)


@pytest.mark.parametrize("neighbors", ["active", "all"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_children_in_half_precision_are_computed_in_float32(dtype: torch.dtype, neighbors: Any) -> None:
    slots, unborn = randn(3, 4, dtype=dtype), randn(2, 4, seed=1, dtype=dtype)
    knobs: dict[str, Any] = {"neighbors": neighbors, "beta": 0.2, "min_radius": 1e-3}
    directions, counts = randn(2, 4, seed=2, dtype=torch.float32), torch.tensor([1, 0, 1])
    children = place_children(slots, counts, directions, unborn=unborn, **knobs)
    wide = place_children(slots.float(), counts, directions, unborn=unborn.float(), **knobs)
    assert torch.equal(children, wide.to(dtype))


def test_children_have_no_graph() -> None:
    slots = nn.Parameter(randn(3, 4))
    assert not spawn_children(slots, torch.tensor([1, 0, 1])).requires_grad


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"slots_active": torch.ones(3, 0)}, ValueError, r"`slots_active` must have D >= 1; got D=0"),
        ({"counts": torch.ones(2).long()}, ValueError, r"`counts` must have shape \(K=3\); got \(2,\)"),
        ({"counts": torch.tensor([1, -1, 0])}, ValueError, r"`counts` must be at least 0; got \[1, -1, 0\]"),
        ({"beta": -0.1}, ValueError, r"`beta` must be finite and at least 0.0; got -0.1"),
        ({"min_radius": NAN}, ValueError, r"`min_radius` must be finite and at least 0.0; got nan"),
        ({"neighbors": "all"}, ValueError, r"`unborn` must be given with neighbors='all'; got None"),
        ({"unborn": torch.ones(3, 5)}, ValueError, r"`unborn` must have shape \(U, D=4\); got"),
        ({"unborn": torch.ones(2, 4)}, ValueError, r"`unborn` must have a row per child, 3; got 2"),
    ],
)
def test_wrong_arguments_of_children_are_refused(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"slots_active": torch.ones(3, 4), "counts": torch.tensor([1, 0, 2]), **wrong}
    with pytest.raises(error, match=message):
        spawn_children(**given)


# --- optimizer state ---

OPTIMIZERS: dict[str, Any] = {
    "Adam": lambda one: torch.optim.Adam([one], lr=0.01, amsgrad=True),
    "AdamW": lambda one: torch.optim.AdamW([one], lr=0.01, weight_decay=0.5),
    "decaying Adam": lambda one: torch.optim.Adam([one], lr=0.01, weight_decay=0.5),
    "SGD": lambda one: torch.optim.SGD([one], lr=0.01, momentum=0.9, weight_decay=0.5),
}
ALL_OPTIMIZERS = pytest.mark.parametrize("name", OPTIMIZERS)


def train(slots: nn.Parameter, optimizer: torch.optim.Optimizer, num_active: int, steps: int, seed: int = 0) -> None:
    """Run steps in which only the active rows get gradients."""
    for step in range(steps):
        optimizer.zero_grad()
        active = slots[..., :num_active, :]
        (active * (1 + randn(*active.shape, seed=seed + step, dtype=slots.dtype) / 2)).sum().backward()
        optimizer.step()


@ALL_OPTIMIZERS
@pytest.mark.parametrize("leading", [(), (1,)])
def test_children_inherit_the_moments_of_their_parents(name: str, leading: tuple[int, ...]) -> None:
    slots = nn.Parameter(randn(*leading, 5, 3))
    optimizer = OPTIMIZERS[name](slots)
    train(slots, optimizer, 2, 5)
    before = {key: one.clone() for key, one in optimizer.state[slots].items()}
    inherit_moments(optimizer, slots, torch.tensor([1, 1, 0]), 2)
    changed = 0
    for key, one in optimizer.state[slots].items():
        if one.shape != slots.shape:
            assert torch.equal(one, before[key])
            continue
        changed += 1
        rows, old = one.view(5, 3), before[key].view(5, 3)
        assert torch.equal(rows[:2], old[:2])
        assert torch.equal(rows[2:], old[[1, 1, 0]])
        assert rows[2:].any()
    assert changed == {"Adam": 3, "SGD": 1}.get(name, 2)


def test_an_optimizer_before_its_first_step_stays_empty() -> None:
    slots = nn.Parameter(randn(5, 3))
    optimizer = torch.optim.Adam([slots])
    inherit_moments(optimizer, slots, torch.tensor([0]), 2)
    assert not optimizer.state


@ALL_OPTIMIZERS
@pytest.mark.parametrize("leading", [(), (1,)])
def test_held_rows_do_not_change(name: str, leading: tuple[int, ...]) -> None:
    slots = nn.Parameter(randn(*leading, 5, 3))
    alone = nn.Parameter(slots.detach()[..., :2, :].clone())
    before = slots.detach().clone().view(5, 3)
    optimizer, beside = OPTIMIZERS[name](slots), OPTIMIZERS[name](alone)
    first = 2
    hold_rows(optimizer, slots, lambda: first)
    train(slots, optimizer, 2, 5)
    train(alone, beside, 2, 5)
    rows = slots.detach().view(5, 3)
    assert torch.equal(rows[2:], before[2:])
    torch.testing.assert_close(rows[:2], alone.detach().view(2, 3), rtol=1e-12, atol=0)
    for one in optimizer.state[slots].values():
        if one.shape == slots.shape:
            assert not one.view(5, 3)[2:].any()
            assert one.view(5, 3)[:2].any()
    # then fewer rows are held
    first = 4
    train(slots, optimizer, 4, 1)
    assert (rows[2:4] != before[2:4]).all()
    assert torch.equal(rows[4:], before[4:])


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    slots = nn.Parameter(randn(5, 3))
    other = torch.optim.Adam([nn.Parameter(randn(5, 3))])
    message = r"`optimizer` must hold `slots_param`, \(5, 3\); got another optimizer"
    with pytest.raises(ValueError, match=message):
        inherit_moments(other, slots, torch.tensor([0]), 2)
    with pytest.raises(ValueError, match=message):
        hold_rows(other, slots, lambda: 2)


def test_wrong_generators_and_optimizers_are_refused() -> None:
    wrong: Any = "x"
    with pytest.raises(TypeError, match="`generator` must be Generator; got str"):
        spawn_children(torch.ones(3, 4), torch.tensor([1, 0, 2]), generator=wrong)
    slots = nn.Parameter(torch.zeros(3, 1))
    with pytest.raises(TypeError, match="`optimizer` must be Optimizer; got str"):
        inherit_moments(wrong, slots, torch.tensor([0]), 2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8])
def test_parents_may_be_integers_of_any_width(dtype: torch.dtype) -> None:
    # a uint8 index would be a mask, which selects other rows
    slots = nn.Parameter(torch.tensor([[1.0], [2.0], [0.0], [0.0]]))
    optimizer = torch.optim.Adam([slots])
    (slots[:2] * torch.tensor([[2.0], [3.0]])).sum().backward()
    optimizer.step()
    inherit_moments(optimizer, slots, torch.tensor([1, 1]).to(dtype), 2)
    assert optimizer.state[slots]["exp_avg"].flatten().tolist() == pytest.approx([0.2, 0.3, 0.3, 0.3])
