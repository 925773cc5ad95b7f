"""Instance consistency: published values and assignments, the reference, scipy, errors."""

import math
import sys
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contract import EXPORTS, NAN, Case, LossContract, refusal
from golden_neighbors import Golden, golden_names
from ssync_loss import InstanceConsistencyLoss
from ssync_loss.functional import instance_consistency_loss, valid_instances
from ssync_loss.methods.smtc._assignment import best_assignment
from ssync_loss.methods.smtc.reference import reference_instance_consistency_loss, reference_valid_instances
from steps import assert_same, step_of


class Scene(NamedTuple):
    embeddings: Tensor
    teacher: Tensor
    valid: Tensor
    teacher_valid: Tensor


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, share: float = 0.6) -> Scene:
    """Return unit vectors of a student and a teacher, and valid masks, for the shape (B, T, S, P, D)."""
    size = shape or (2, 3, 2, 3, 5)
    generator = torch.Generator().manual_seed(seed)
    embeddings, teacher = (
        torch.nn.functional.normalize(torch.randn(size, generator=generator, dtype=torch.float64), dim=-1).to(dtype)
        for _ in range(2)
    )
    valid, teacher_valid = (torch.rand(size[:4], generator=generator) < share for _ in range(2))
    return Scene(embeddings, teacher, valid, teacher_valid)


def step(case: Scene, loss_of: Any = instance_consistency_loss, **given: Any) -> tuple[Tensor, Tensor]:
    return step_of(loss_of, *case, **given)


DRAWN = {
    "shape": st.tuples(*(st.sampled_from(sizes) for sizes in ((1, 2), (1, 2, 3), (1, 2), (1, 2, 3, 4), (3, 5)))),
    "seed": st.integers(0, 2**31),
    "share": st.sampled_from((0.0, 0.5, 1.0)),
    "metric": st.sampled_from(("cosine", "euclidean")),
    "margin": st.sampled_from((0.1, 0.5, 1.0)),
    "same_frame": st.booleans(),
}

# --- values ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden_names("instance_consistency_", 3))
def test_published_numbers_and_assignments(name: str, dtype: torch.dtype) -> None:
    golden = Golden(name)
    embeddings, teacher = (golden.tensor(one, dtype) for one in ("O", "O_teacher"))
    valid, teacher_valid = (golden.tensor(one).bool() for one in ("valid", "valid_teacher"))
    source = embeddings.requires_grad_()
    loss = instance_consistency_loss(
        source,
        teacher,
        valid,
        teacher_valid,
        margin=golden.number("margin"),
        metric=golden.text("metric", ""),  # type: ignore[arg-type]
    )
    golden.assert_same_step(loss, source, "O")
    scores = torch.einsum("btspd,bjsqd->tjbspq", embeddings.detach(), teacher)
    assert torch.equal(best_assignment(scores), golden.tensor("assignment"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("p_thr", "published"), [(0.5, "valid_p05"), (0.3, "valid_p03")])
@pytest.mark.parametrize("name", golden_names("valid_instances_", 1))
def test_published_validity(name: str, p_thr: float, published: str, dtype: torch.dtype) -> None:
    golden = Golden(name)
    logits, slots, instances = (golden.tensor(one, dtype) for one in ("Z", "U", "I"))
    knobs = {"area_thr": golden.number("area_thr"), "sim_thr": golden.number("sim_thr")}
    valid = valid_instances(logits, slots, instances, p_thr=p_thr, **knobs)
    assert valid.any()
    assert torch.equal(valid, golden.tensor(published).bool())


@settings(max_examples=100)
@given(**DRAWN)
def test_value_and_gradient_equal_the_reference(shape: tuple[int, ...], seed: int, share: float, **knobs: Any) -> None:
    case = sample(*shape, dtype=torch.float64, seed=seed, share=share)
    assert_same(step(case, **knobs), step(case, reference_instance_consistency_loss, **knobs), 1e-11)


def test_more_than_six_instances_equal_the_reference() -> None:
    case = sample(1, 2, 1, 7, 9, dtype=torch.float64)
    assert_same(step(case), step(case, reference_instance_consistency_loss), 1e-12)


@pytest.mark.parametrize("num_instances", [3, 7])
def test_perfectly_matched_instances_have_the_value_minus_one(num_instances: int) -> None:
    embeddings = torch.eye(num_instances).expand(2, 3, 2, -1, -1)
    everyone = torch.ones(2, 3, 2, num_instances, dtype=torch.bool)
    order = torch.randperm(num_instances)
    assert math.isclose(step(Scene(embeddings, embeddings[:, :, :, order], everyone, everyone))[0].item(), -1.0)


def test_invalid_teacher_instances_only_repel() -> None:
    case = sample(share=1.0)
    nobody = torch.zeros_like(case.valid)
    close = case._replace(embeddings=case.teacher, teacher_valid=nobody)
    assert 0 <= step(close)[0] <= 0.5
    # a close instance repels even if it is invalid
    twins = torch.ones(1, 1, 1, 2, 1)
    everyone = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    assert step(Scene(twins, twins, everyone, ~everyone))[0] == 0.5
    assert step(Scene(twins, twins, everyone, everyone))[0] == -0.5


def test_margins_of_distances_and_cosines() -> None:
    half = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]]).view(1, 1, 1, 2, 2)
    everyone = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    case = Scene(half, half, everyone, ~everyone)
    assert math.isclose(step(case, metric="euclidean", margin=1.1)[0].item(), 0.1, rel_tol=1e-5)
    assert math.isclose(step(case, metric="euclidean", margin=0.99)[0].item(), 0.0)
    assert math.isclose(step(case, metric="cosine", margin=0.4)[0].item(), 0.1, rel_tol=1e-5)


# --- assignment ---


@settings(max_examples=60)
@given(size=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_permutations_and_scipy_agree(size: int, seed: int) -> None:
    from scipy.optimize import linear_sum_assignment

    scores = torch.randn(3, 2, size, size, generator=torch.Generator().manual_seed(seed))
    expected = [[linear_sum_assignment(one, maximize=True)[1].tolist() for one in some] for some in scores.numpy()]
    assert best_assignment(scores).tolist() == expected


def test_the_first_of_equal_assignments_wins() -> None:
    for size in range(1, 7):
        assert best_assignment(torch.zeros(size, size)).tolist() == list(range(size))
    tied = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert best_assignment(tied.flip(1)).tolist() == [1, 2, 0]


def test_only_many_instances_need_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert step(sample(1, 1, 1, 6, 3))[0].isfinite()
    with pytest.raises(ImportError, match=r"More than 6 instances .* pip install \"ssync-loss\[metrics\]\""):
        step(sample(1, 1, 1, 7, 3))


# --- edge cases ---


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_equal_vectors_have_a_finite_gradient(metric: str) -> None:
    case = sample(share=1.0)
    loss, gradient = step(case._replace(teacher=case.embeddings), metric=metric, margin=1.0)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.usefixtures("fresh_compiler")
def test_scipy_only_breaks_the_graph() -> None:
    case = sample(1, 2, 1, 7, 4)
    compiled = torch.compile(instance_consistency_loss, backend="aot_eager")
    assert_same((compiled(*case),), (instance_consistency_loss(*case),), 1e-6)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"compiler.disable|_on_host"):
        torch.compile(instance_consistency_loss, backend="aot_eager", fullgraph=True)(*case)


# --- validity ---


def found(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return maps, semantic slots and instances for the shape (B, T, S, P)."""
    generator = torch.Generator().manual_seed(seed)
    clips, frames, semantics, num_instances = shape or (2, 2, 3, 4)
    logits = 3 * torch.randn(clips, frames, semantics, 3, 3, generator=generator, dtype=torch.float64)
    slots = torch.randn(clips, frames, semantics, 3, generator=generator, dtype=torch.float64)
    instances = torch.randn(clips, frames, semantics, num_instances, 3, generator=generator, dtype=torch.float64)
    return logits, slots, instances


@settings(max_examples=40)
@given(
    shape=st.tuples(*(st.integers(1, 3) for _ in range(4))),
    seed=st.integers(0, 2**31),
    p_thr=st.sampled_from((0.0, 0.3, 0.5, 0.9)),
    area_thr=st.sampled_from((0.0, 0.2, 0.5)),
    sim_thr=st.sampled_from((-0.5, 0.0, 0.5)),
)
def test_validity_equals_the_reference(shape: tuple[int, ...], seed: int, **knobs: Any) -> None:
    data = found(*shape, seed=seed)
    assert torch.equal(valid_instances(*data, **knobs), reference_valid_instances(*data, **knobs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_an_area_at_the_threshold_is_not_enough(dtype: torch.dtype) -> None:
    logits = torch.zeros(1, 1, 2, 5, 5, dtype=dtype)
    logits[0, 0, 0, 0] = 9
    logits[0, 0, 1, 1:] = 9
    slots = torch.ones(1, 1, 2, 3, dtype=dtype)
    assert valid_instances(logits, slots, slots.unsqueeze(3)).flatten().tolist() == [False, True]
    logits[0, 0, :, 1, 0] = torch.tensor([9, 0])
    assert valid_instances(logits, slots, slots.unsqueeze(3)).all()


def test_zero_vectors_and_nan_are_invalid() -> None:
    logits, slots, instances = found()
    assert not valid_instances(logits, slots * 0, instances, area_thr=0.0, sim_thr=0.0).any()
    assert not valid_instances(logits, slots, instances * 0, area_thr=0.0, sim_thr=0.0).any()
    assert not valid_instances(logits * NAN, slots, instances, area_thr=0.0).any()


def test_the_validity_of_an_empty_batch_is_empty() -> None:
    logits, slots, instances = (one[:0] for one in found())
    assert valid_instances(logits, slots, instances).shape == (0, 2, 3, 4)


@pytest.mark.usefixtures("fresh_compiler")
def test_validity_compiles_to_one_graph_and_has_no_gradient() -> None:
    data = tuple(one.requires_grad_() for one in found())
    valid = torch.compile(valid_instances, fullgraph=True, backend="aot_eager")(*data, area_thr=0.1)
    assert torch.equal(valid, valid_instances(*data, area_thr=0.1))
    assert not valid.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(valid_instances(*data, area_thr=0.1), valid)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"p_thr": 1.5}, ValueError, r"`p_thr` must be within \[0.0, 1.0\]; got 1.5"),
        ({"area_thr": -1}, ValueError, r"`area_thr` must be within \[0.0, 1.0\]; got -1"),
        ({"slots": torch.zeros(2, 2, 4, 3)}, ValueError, r"`slots` must have shape \(B=2, T=2, S=3, D\); got"),
        ({"instances": torch.zeros(2, 2, 3, 4, 2)}, ValueError, r"`instances` must have shape .*D=3\); got"),
        ({"instances": torch.zeros(2, 2, 3, 0, 3)}, ValueError, r"`instances` must have P >= 1; got P=0"),
    ],
)
def test_wrong_arguments_of_validity_are_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("logits", "slots", "instances")
    with pytest.raises(error, match=message):
        valid_instances(**{**dict(zip(names, found(), strict=True)), **wrong})


# --- the contract of every loss ---

MASK = torch.ones(2, 3, 2, 3, dtype=torch.bool)


class TestContract(LossContract):
    loss = InstanceConsistencyLoss
    function = staticmethod(instance_consistency_loss)
    twice_differentiable = True
    settings: ClassVar = {"margin": 0.1, "metric": "euclidean", "same_frame": False}
    not_applicable: ClassVar = {"poison": "the assignment reads invalid vectors, too"}
    refused: ClassVar = [
        ({"margin": 1.5}, ValueError, r"`margin` must be within \[-1.0, 1.0\]; got 1.5"),
        ({"margin": -0.1, "metric": "euclidean"}, ValueError, r"`margin` must be within \[0.0, 2.0\]; got -0.1"),
        ({"embeddings": torch.zeros(2, 3, 2, 0, 5)}, ValueError, r"`embeddings` must have P >= 1; got P=0"),
        ({"teacher_embeddings": torch.zeros(2, 3, 2, 4, 5)}, ValueError, r"`teacher_embeddings` must have shape \(B=2"),
        ({"valid": MASK[..., :2]}, ValueError, r"`valid` must have shape \(B=2, T=3, S=2, P=3\); got \(2, 3, 2, 2\)"),
        ({"teacher_valid": MASK[:, :2]}, ValueError, r"`teacher_valid` must have shape .*; got \(2, 2, 2, 3\)"),
    ]

    # (B, T, S, P, D)
    shape = (2, 3, 2, 3, 5)

    def case(self) -> Case:
        embeddings, teacher, valid, teacher_valid = sample(*self.shape)
        # positive channels give an infinite teacher an infinite cosine, not a value of 0
        valid[0] = teacher_valid[0] = True
        embeddings[..., 0].abs_()
        others = {"teacher_embeddings": teacher, "valid": valid, "teacher_valid": teacher_valid}
        return Case(self.make(), {"embeddings": embeddings}, others)

    def empty_cases(self, case: Case) -> dict[str, Case]:
        return {"no valid instance": case.replaced(valid=case.others["valid"] & False), **super().empty_cases(case)}


class TestDistances(TestContract):
    knobs: ClassVar = {"metric": "euclidean", "margin": 0.9, "same_frame": False}
    settings: ClassVar = {"margin": 0.7, "metric": "cosine", "same_frame": True}
    # torch can differentiate its distances twice from 2.14 on
    twice_differentiable = torch.__version__ >= "2.14"

    def empty_cases(self, case: Case) -> dict[str, Case]:
        return {"one frame": case.mapped(lambda one: one[:, :1]), **super().empty_cases(case)}


class TestByScipy(TestContract):
    """The contract with so many instances that scipy assigns them."""

    not_applicable: ClassVar = TestContract.not_applicable | dict.fromkeys(
        ("compile", "default_compiler", "fake_tensors"), "scipy assigns on the host"
    )
    shape = (2, 2, 2, 7, 5)

    @pytest.mark.compiles
    @EXPORTS
    def test_export(self, strict: bool) -> None:
        message = refusal(r"assigned by scipy, which torch\.export cannot follow", strict)
        with pytest.raises(RuntimeError, match=message):
            super().test_export(strict)
