"""Centered cross-entropy: published values and centers, updates of the center, two processes."""

from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import two_centers
from contract import INF, NAN, Case, LossContract
from golden_neighbors import GRADIENT_TOL, LOSS_TOL, Golden, deviation, golden_names
from ranks import run_ranks
from ssync_loss import CenteredCrossEntropy
from ssync_loss.functional import masked_token_loss, out_generative_loss
from ssync_loss.methods.ino.reference import reference_centered_cross_entropy, reference_moved_center
from steps import step_of
from two_centers import NUM_PROTOTYPES, SHARES, scene


def sample(
    num_rows: int = 6, Kp: int = 5, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return logits (R, Kp) of a student and its teacher, in the range of cosines."""
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.rand(num_rows, Kp, generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(2))
    return s.to(dtype).requires_grad_(), t.to(dtype)


def centered(center: Tensor | None = None, Kp: int = 5, **given: Any) -> CenteredCrossEntropy:
    criterion = CenteredCrossEntropy(Kp, **given)
    if center is not None:
        criterion.center = center.clone()
    return criterion


def step(criterion: CenteredCrossEntropy, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return step_of(criterion, s, t)


# --- values ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden_names("ino_centered_ce_", 2))
def test_published_numbers(name: str, dtype: torch.dtype) -> None:
    golden = Golden(name)
    students, teachers = golden.tensor("student_logits", dtype), golden.tensor("teacher_logits", dtype)
    criterion = CenteredCrossEntropy(students.shape[2], **golden.numbers("tau_s", "tau_t", "m_c"))
    for number, (s, t) in enumerate(zip(students, teachers, strict=True), 1):
        loss, gradient = step(criterion, s, t)
        criterion.update_center(t)
        assert loss.dtype == dtype
        assert deviation(loss, golden.tensor(f"loss_{number}_f64")) <= LOSS_TOL[dtype]
        assert deviation(gradient, golden.tensor(f"grad_student_logits_{number}_f64")) <= GRADIENT_TOL[dtype]
        assert deviation(criterion.center, golden.tensor(f"center_{number}_f64")) <= LOSS_TOL[dtype]


@settings(max_examples=60)
@given(
    num_rows=st.integers(0, 4),
    Kp=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    taus=st.sampled_from(((0.1, 0.04), (1.0, 2.0), (0.01, 0.003))),
    m_c=st.sampled_from((0.0, 0.9, 1.0)),
)
def test_value_gradient_and_update_equal_the_reference(
    num_rows: int, Kp: int, seed: int, taus: tuple[float, float], m_c: float
) -> None:
    s, t = sample(num_rows, Kp, dtype=torch.float64, seed=seed)
    center = torch.randn(Kp, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    criterion = centered(center, Kp, tau_s=taus[0], tau_t=taus[1], m_c=m_c)
    loss, gradient = step(criterion, s, t)
    expected = reference_centered_cross_entropy(s, t, center, tau_s=taus[0], tau_t=taus[1])
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, s)[0], rtol=1e-10, atol=1e-12)
    criterion.update_center(t)
    torch.testing.assert_close(criterion.center, reference_moved_center(center, t, m_c=m_c), rtol=1e-12, atol=1e-14)


def test_rows_may_have_any_shape() -> None:
    s, t = sample()
    expected = step(centered(), s, t)
    for shape in ((2, 3), (1, 6, 1)):
        loss, gradient = step(centered(), s.detach().view(*shape, 5), t.view(*shape, 5))
        torch.testing.assert_close((loss, gradient.view(6, 5)), expected)
    loss, gradient = step(centered(), s[0], t[0])
    torch.testing.assert_close(loss, step(centered(), s[:1], t[:1])[0])


# --- the center ---


def test_the_loss_does_not_change_the_center() -> None:
    s, t = sample()
    criterion = centered(torch.arange(5.0))
    for mode in (criterion.train, criterion.eval):
        mode()
        criterion(s, t).backward()
        assert torch.equal(criterion.center, torch.arange(5.0))


@pytest.mark.parametrize("training", [True, False])
def test_update_center_works_in_any_mode(training: bool) -> None:
    _, t = sample()
    criterion = centered(torch.arange(5.0)).train(training)
    criterion.update_center(t.requires_grad_())
    torch.testing.assert_close(criterion.center, (0.9 * torch.arange(5.0) + 0.1 * t.mean(0)).detach())
    assert not criterion.center.requires_grad


def test_masked_rows_do_not_count() -> None:
    _, t = sample()
    mask = torch.tensor([True, False, True, True, False, False])
    criterion, expected = centered(), centered()
    expected.update_center(t[mask])
    spoiled = t.clone()
    spoiled[~mask] = NAN
    criterion.update_center(spoiled.view(2, 3, 5), mask=mask.view(2, 3))
    torch.testing.assert_close(criterion.center, expected.center)


@pytest.mark.parametrize(("num_rows", "mask"), [(0, None), (6, torch.zeros(6, dtype=torch.bool))])
def test_without_rows_the_center_stays(num_rows: int, mask: Tensor | None) -> None:
    _, t = sample(num_rows)
    criterion = centered(torch.arange(5.0))
    criterion.update_center(t, mask=mask)
    assert torch.equal(criterion.center, torch.arange(5.0))


def test_a_center_from_inference_mode_can_be_updated() -> None:
    with torch.inference_mode():
        criterion = CenteredCrossEntropy(2)
    criterion.update_center(torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(criterion.center, torch.tensor([0.0, 0.1]))


def test_updates_are_in_place() -> None:
    criterion = centered()
    memory = criterion.center.data_ptr()
    criterion.update_center(sample()[1])
    assert criterion.center.any()
    assert criterion.center.data_ptr() == memory


def test_the_center_has_the_widest_type_of_the_logits() -> None:
    _, t = sample(dtype=torch.float64)
    for dtypes, expected in (
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float32,), torch.float32),
        ((torch.float32, torch.float64, torch.float32), torch.float64),
    ):
        criterion = centered().half()
        for dtype in dtypes:
            criterion.update_center(t.to(dtype))
        assert criterion.center.dtype == expected
        assert criterion(t.half(), t.half()).dtype == torch.float32


def test_the_mean_of_many_float16_rows_is_exact() -> None:
    t = torch.ones(100_000, 2, dtype=torch.float16)
    criterion = centered(Kp=2, m_c=0.0)
    criterion.update_center(t)
    assert criterion.center.tolist() == [1.0, 1.0]


# --- empty, undefined, gradients, types ---


def test_tiny_temperatures_are_finite() -> None:
    loss, gradient = step(centered(tau_s=1e-5, tau_t=1e-5), *sample())
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_a_center_gets_no_gradient() -> None:
    criterion = centered()
    criterion.center.requires_grad_()
    criterion(*sample()).backward()
    assert criterion.center.grad is None


def test_autocast_does_not_change_updates() -> None:
    _, t = sample()
    expected, criterion = centered(), centered()
    expected.update_center(t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        criterion.update_center(t)
    assert torch.equal(criterion.center, expected.center)


# --- graphs ---


@pytest.mark.usefixtures("fresh_compiler")
def test_a_step_and_its_update_compile_to_one_graph() -> None:
    s, t = sample()
    criterion, expected = centered(), centered()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def train(s: Tensor, t: Tensor) -> Tensor:
        loss: Tensor = criterion(s, t)
        criterion.update_center(t, mask=t[:, 0] > 0)
        return loss

    for _ in range(3):
        loss = train(s, t)
        torch.testing.assert_close((loss.detach(), torch.autograd.grad(loss, s)[0]), step(expected, s, t))
        expected.update_center(t, mask=t[:, 0] > 0)
        torch.testing.assert_close(criterion.center, expected.center)
    assert counter.frame_count == 1


def test_fake_tensors_update_a_center() -> None:
    with FakeTensorMode():
        criterion = CenteredCrossEntropy(5)
        criterion.update_center(torch.randn(6, 5), mask=torch.ones(6, dtype=torch.bool))
        assert criterion.center.shape == (5,)


# --- two processes ---


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of every rank."""
    return run_ranks(two_centers.__file__, tmp_path_factory.mktemp("ranks"))


KINDS = ("explicit", "masked", "frames", "pairs")


@pytest.mark.parametrize("group", ["all ranks", "a named group"])
@pytest.mark.parametrize("share", SHARES)
def test_two_processes_update_the_center_like_one(share: str, group: str, ranks: list[dict[str, Any]]) -> None:
    whole = two_centers.moved(**scene(), all_reduce=False)
    for found, _ in (rank[f"{share}, {group}"] for rank in ranks):
        for kind in KINDS:
            torch.testing.assert_close(found[kind], whole[kind], rtol=1e-12, atol=1e-15)
    if share == "one empty":
        # a rank with all clips has the same centers as one process
        torch.testing.assert_close(ranks[0][f"{share}, {group}"][0], whole, rtol=1e-12, atol=1e-15)


def test_without_all_reduce_every_process_has_its_own_center(ranks: list[dict[str, Any]]) -> None:
    for share in SHARES:
        (first, first_sent), (second, second_sent) = (rank[f"{share}, alone"] for rank in ranks)
        assert first_sent == second_sent == []
        assert all(not torch.allclose(first[kind], second[kind]) for kind in KINDS)


def test_a_group_of_one_rank_uses_only_its_rows(ranks: list[dict[str, Any]]) -> None:
    for share in SHARES:
        for rank in ranks:
            found, sent = rank[f"{share}, by itself"]
            torch.testing.assert_close(found, rank[f"{share}, alone"][0], rtol=1e-12, atol=1e-15)
            assert len(sent) == 8


def test_an_update_is_one_collective(ranks: list[dict[str, Any]]) -> None:
    # two steps of each kind: one update, one update, four frames, two pairs
    expected = [(NUM_PROTOTYPES + 1) * moves for moves in (1, 1, 1, 1, 4, 4, 2, 2)]
    for rank in ranks:
        for share in SHARES:
            assert rank[f"{share}, all ranks"][1] == expected


def test_all_reduce_does_nothing_without_a_process_group() -> None:
    _, t = sample()
    asked, unasked = centered(all_reduce=True), centered()
    asked.update_center(t)
    unasked.update_center(t)
    assert torch.equal(asked.center, unasked.center)


# --- errors ---


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([True], TypeError, r"`mask` must be a tensor; got list"),
        (torch.ones(6), TypeError, r"`mask` must be boolean; got torch.float32"),
        (torch.ones(5, dtype=torch.bool), ValueError, r"`mask` must have the shape of the rows, \(6,\); got \(5,\)"),
        (torch.ones(6, dtype=torch.bool, device="meta"), ValueError, r"`mask` must be on the device of `t`"),
    ],
)
def test_a_wrong_mask_is_named(mask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        centered().update_center(sample()[1], mask=mask)


# --- nonfinite rows ---


@pytest.mark.parametrize("dirt", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["explicit", "mask", "frames", "pairs"])
def test_nonfinite_rows_are_skipped_and_counted(kind: str, dirt: float) -> None:
    torch.manual_seed(0)
    t = torch.randn(2, 2, 3, 5)
    dirty = t.clone()
    dirty[1, 0, 2, 4] = dirt
    clean = torch.ones(2, 2, 3, dtype=torch.bool)
    clean[1, 0, 2] = False
    found, wanted = centered(m_c=0.5), centered(m_c=0.5)
    if kind == "frames":
        loss = masked_token_loss(t, dirty, torch.ones_like(clean), found, update_center=True)
        masked_token_loss(t, t, clean, wanted, update_center=True)
    elif kind == "pairs":
        loss = out_generative_loss(t, t[:, :, :0], dirty, found, update_center=True)
        wanted.update_center(t, mask=clean)
    else:
        found.update_center(dirty, mask=torch.ones_like(clean) if kind == "mask" else None)
        wanted.update_center(t, mask=clean)
        loss = found(t, dirty)
    torch.testing.assert_close(found.center, wanted.center)
    assert found.num_left_out == 1
    # the loss shows NaN and infinity; a logit of -inf is a probability of 0
    assert dirt == -INF or loss.isnan()
    assert wanted.num_left_out == 0
    assert list(found.state_dict()) == ["center"]


def test_the_center_stays_without_a_finite_row() -> None:
    criterion = centered(torch.arange(5.0))
    criterion.update_center(torch.full((4, 5), NAN))
    assert criterion.center.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert criterion.num_left_out == 4


def test_the_center_stays_if_the_sum_overflows() -> None:
    criterion = centered(torch.arange(5.0))
    criterion.update_center(torch.full((4, 5), 3e38))
    assert criterion.center.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("all_reduce", [False, True])
def test_wrong_groups_are_refused(*, all_reduce: bool) -> None:
    wrong: Any = "g"
    criterion = CenteredCrossEntropy(5, all_reduce=all_reduce, group=wrong)
    with pytest.raises(TypeError, match="`group` must be None where no process group is initialized; got 'g'"):
        criterion.update_center(torch.zeros(1, 5))


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`t` must have shape \(..., Kp=5\); got \(6, 4\)"):
        centered().update_center(torch.zeros(6, 4))


# --- the contract of every loss ---


class TestContract(LossContract):
    loss = CenteredCrossEntropy
    twice_differentiable = True
    settings: ClassVar = {"tau_s": 0.2, "tau_t": 0.1}
    inert: ClassVar = {"m_c": 0.5, "all_reduce": True, "group": "a group"}
    state: ClassVar = ["center"]
    not_applicable: ClassVar = {"poison": "every row counts"}
    refused: ClassVar = [
        ({"Kp": 0}, ValueError, r"`Kp` must be at least 1; got 0"),
        ({"Kp": 2.0}, TypeError, r"`Kp` must be an integer; got float"),
        ({"tau_s": 0.0}, ValueError, r"`tau_s` must be finite and above 0.0; got 0.0"),
        ({"tau_t": INF}, ValueError, r"`tau_t` must be finite and above 0.0; got inf"),
        ({"m_c": 1.5}, ValueError, r"`m_c` must be within \[0.0, 1.0\]; got 1.5"),
        ({"s": torch.zeros(6, 4)}, ValueError, r"`s` must have the shape of `t`, \(6, 5\); got \(6, 4\)"),
        ({"s": torch.zeros(5)}, ValueError, r"`s` must have the shape of `t`, \(6, 5\); got \(5,\)"),
        ({"t": torch.zeros(())}, ValueError, r"`t` must have shape \(..., Kp=5\); got \(\)"),
    ]

    def make(self, **settings: Any) -> CenteredCrossEntropy:
        return centered(torch.arange(5.0) / 5, **settings)

    def case(self) -> Case:
        s, t = sample()
        return Case(self.make(), {"s": s}, {"t": t})
