"""Centered cross-entropy: published numbers and centers, what moves the center and what does not, two processes."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import two_centers
from golden_neighbors import GRADIENT_TOL, LOSS_TOL, Golden, deviation, golden_names
from ssync_loss.methods.ino.centered import CenteredCrossEntropy
from ssync_loss.methods.ino.masked_tokens import masked_token_loss
from ssync_loss.methods.ino.out_generative import out_generative_loss
from ssync_loss.methods.ino.reference import reference_centered_cross_entropy, reference_moved_center
from two_centers import NUM_PROTOTYPES, SHARES, WORLD_SIZE, scene

TESTS = Path(__file__).parent
NAN, INF = float("nan"), float("inf")


def sample(
    num_rows: int = 6, Kp: int = 5, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return logits (R, Kp) of a student and of its teacher, in the range of cosines."""
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.rand(num_rows, Kp, generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(2))
    return s.to(dtype).requires_grad_(), t.to(dtype)


def centered(center: Tensor | None = None, Kp: int = 5, **given: Any) -> CenteredCrossEntropy:
    criterion = CenteredCrossEntropy(Kp, **given)
    if center is not None:
        criterion.center = center.clone()
    return criterion


def step(criterion: CenteredCrossEntropy, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    source = s.detach().requires_grad_()
    loss = criterion(source, t)
    (gradient,) = torch.autograd.grad(loss, source)
    return loss.detach(), gradient


# --- values ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden_names("ino_centered_ce_"))
def test_published_numbers(name: str, dtype: torch.dtype) -> None:
    golden = Golden(name)
    students, teachers = golden.tensor("student_logits", dtype), golden.tensor("teacher_logits", dtype)
    criterion = CenteredCrossEntropy(
        students.shape[2], tau_s=golden.number("tau_s"), tau_t=golden.number("tau_t"), m_c=golden.number("m_c")
    )
    for number, (s, t) in enumerate(zip(students, teachers, strict=True), 1):
        loss, gradient = step(criterion, s, t)
        criterion.update_center(t)
        assert loss.dtype == dtype
        assert deviation(loss, golden.tensor(f"loss_{number}_f64")) <= LOSS_TOL[dtype]
        assert deviation(gradient, golden.tensor(f"grad_student_logits_{number}_f64")) <= GRADIENT_TOL[dtype]
        assert deviation(criterion.center, golden.tensor(f"center_{number}_f64")) <= LOSS_TOL[dtype]


def test_all_golden_files_are_here() -> None:
    assert golden_names("ino_centered_ce_") == ["ino_centered_ce_cosines", "ino_centered_ce_small"]


@settings(max_examples=60)
@given(
    num_rows=st.integers(0, 4),
    Kp=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    taus=st.sampled_from(((0.1, 0.04), (1.0, 2.0), (0.01, 0.003))),
    m_c=st.sampled_from((0.0, 0.9, 1.0)),
)
def test_value_gradient_and_move_are_those_of_the_slow_definition(
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


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), constant=st.floats(-5, 5))
def test_bound_gradient_and_what_means_nothing(seed: int, constant: float) -> None:
    s, t = sample(dtype=torch.float64, seed=seed)
    center = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    criterion = centered(center)
    loss, gradient = step(criterion, s, t)
    q = ((t - center) / 0.04).softmax(1)
    # no student is below the entropy of its teacher
    assert loss >= torch.special.entr(q).sum(1).mean()
    torch.testing.assert_close(gradient, ((s / 0.1).softmax(1) - q).detach() / 0.1 / 6, rtol=1e-9, atol=1e-12)
    for moved in (step(criterion, s + constant, t), step(criterion, s, t + constant)):
        torch.testing.assert_close(moved, (loss, gradient), rtol=1e-8, atol=1e-10)


def test_a_teacher_that_stays_is_approached_geometrically() -> None:
    criterion = CenteredCrossEntropy(3)
    _, t = sample(4, 3, dtype=torch.float64)
    for moves in range(1, 30):
        criterion.update_center(t)
        torch.testing.assert_close(criterion.center, t.mean(0) * (1 - 0.9**moves), rtol=1e-12, atol=1e-15)


def test_rows_may_have_any_shape() -> None:
    s, t = sample()
    expected = step(centered(), s, t)
    for shape in ((2, 3), (1, 6, 1)):
        loss, gradient = step(centered(), s.detach().view(*shape, 5), t.view(*shape, 5))
        torch.testing.assert_close((loss, gradient.view(6, 5)), expected)
    loss, gradient = step(centered(), s[0], t[0])
    torch.testing.assert_close(loss, step(centered(), s[:1], t[:1])[0])


# --- the center ---


def test_a_loss_does_not_move_the_center() -> None:
    s, t = sample()
    criterion = centered(torch.arange(5.0))
    for mode in (criterion.train, criterion.eval):
        mode()
        criterion(s, t).backward()
        assert torch.equal(criterion.center, torch.arange(5.0))


@pytest.mark.parametrize("training", [True, False])
def test_an_explicit_call_moves_it_in_any_mode(training: bool) -> None:
    _, t = sample()
    criterion = centered(torch.arange(5.0)).train(training)
    criterion.update_center(t.requires_grad_())
    torch.testing.assert_close(criterion.center, (0.9 * torch.arange(5.0) + 0.1 * t.mean(0)).detach())
    assert not criterion.center.requires_grad


def test_rows_outside_a_mask_do_not_move_it() -> None:
    _, t = sample()
    mask = torch.tensor([True, False, True, True, False, False])
    criterion, expected = centered(), centered()
    expected.update_center(t[mask])
    spoiled = t.clone()
    spoiled[~mask] = NAN
    criterion.update_center(spoiled.view(2, 3, 5), mask=mask.view(2, 3))
    torch.testing.assert_close(criterion.center, expected.center)


@pytest.mark.parametrize(("num_rows", "mask"), [(0, None), (6, torch.zeros(6, dtype=torch.bool))])
def test_no_rows_move_nothing(num_rows: int, mask: Tensor | None) -> None:
    _, t = sample(num_rows)
    criterion = centered(torch.arange(5.0))
    criterion.update_center(t, mask=mask)
    assert torch.equal(criterion.center, torch.arange(5.0))


def test_it_is_in_the_checkpoint_and_stays_in_its_memory() -> None:
    _, t = sample()
    criterion, twin = centered(), centered()
    memory = criterion.center.data_ptr()
    criterion.update_center(t)
    assert criterion.center.data_ptr() == memory
    assert list(criterion.state_dict()) == ["center"]
    twin.load_state_dict(criterion.state_dict())
    assert torch.equal(twin.center, criterion.center)
    assert criterion.center.any()
    assert not list(criterion.parameters())


def test_it_is_as_wide_as_the_widest_logits_and_never_narrower_than_float32() -> None:
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


def test_in_float16_a_mean_of_many_rows_is_exact_and_finite() -> None:
    t = torch.ones(100_000, 2, dtype=torch.float16)
    criterion = centered(Kp=2, m_c=0.0)
    criterion.update_center(t)
    assert criterion.center.tolist() == [1.0, 1.0]


# --- empty, undefined, gradients, types ---


def test_no_rows_are_an_attached_zero() -> None:
    loss, gradient = step(centered(), *sample(0))
    assert loss == 0
    assert gradient.shape == (0, 5)


@pytest.mark.parametrize("dirt", [NAN, INF])
@pytest.mark.parametrize("dirty", [0, 1])
def test_dirt_is_never_finite(dirty: int, dirt: float) -> None:
    pair = [one.detach().clone() for one in sample()]
    pair[dirty][2, 1] = dirt
    assert not step(centered(), pair[0], pair[1])[0].isfinite()


def test_tiny_temperatures_are_finite() -> None:
    loss, gradient = step(centered(tau_s=1e-5, tau_t=1e-5), *sample())
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_gradcheck() -> None:
    s, t = sample(3, 4, dtype=torch.float64)
    criterion = centered(torch.randn(4, dtype=torch.float64), 4, tau_s=0.5)
    assert torch.autograd.gradcheck(lambda one: criterion(one, t), (s,))
    assert torch.autograd.gradgradcheck(lambda one: criterion(one, t), (s,))


def test_only_the_student_gets_a_gradient() -> None:
    s, t = sample()
    criterion = centered()
    criterion.center.requires_grad_()
    criterion(s, t.requires_grad_()).backward()
    assert t.grad is None
    assert criterion.center.grad is None
    assert s.grad is not None
    assert s.grad.any()
    assert not criterion(s.detach(), t).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_widened_and_their_gradient_is_of_their_type(dtype: torch.dtype) -> None:
    s, t = sample(dtype=dtype)
    loss, gradient = step(centered(), s, t)
    wide, wide_gradient = step(centered(), s.float(), t.float())
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    assert torch.equal(loss, wide)
    assert torch.equal(gradient, wide_gradient.to(dtype))


def test_autocast_changes_nothing() -> None:
    s, t = sample()
    expected, criterion = centered(), centered()
    loss, gradient = step(expected, s, t)
    expected.update_center(t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = step(criterion, s, t)
        criterion.update_center(t)
    assert torch.equal(actual[0], loss)
    assert torch.equal(actual[1], gradient)
    assert torch.equal(criterion.center, expected.center)


# --- graphs ---


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_step_and_its_move_compile_to_one_graph() -> None:
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


def test_fake_tensors_carry_a_step() -> None:
    with FakeTensorMode():
        criterion = CenteredCrossEntropy(5)
        s, t = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
        criterion(s, t).backward()
        criterion.update_center(t, mask=torch.ones(6, dtype=torch.bool))
        assert s.grad is not None
        assert criterion.center.shape == (5,)


# --- two processes ---


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = [str(TESTS.parent / "src"), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    # gloo looks up the machine's name unless it is told an interface
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, two_centers.__file__]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(WORLD_SIZE)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output.decode()
    finally:
        # where one has failed the other waits for it
        for process in processes:
            process.kill()
            process.communicate()
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


KINDS = ("explicit", "masked", "frames", "pairs")


@pytest.mark.parametrize("group", ["all ranks", "a named group"])
@pytest.mark.parametrize("share", SHARES)
def test_two_processes_move_the_center_as_one(share: str, group: str, ranks: list[dict[str, Any]]) -> None:
    whole = two_centers.moved(**scene(), all_reduce=False)
    for found, _ in (rank[f"{share}, {group}"] for rank in ranks):
        for kind in KINDS:
            torch.testing.assert_close(found[kind], whole[kind], rtol=1e-12, atol=1e-15)
    if share == "one empty":
        # who has all clips meets the centers of one process on the way, too
        torch.testing.assert_close(ranks[0][f"{share}, {group}"][0], whole, rtol=1e-12, atol=1e-15)


def test_unasked_every_process_has_a_center_of_its_own(ranks: list[dict[str, Any]]) -> None:
    for share in SHARES:
        (first, first_sent), (second, second_sent) = (rank[f"{share}, alone"] for rank in ranks)
        assert first_sent == second_sent == []
        assert all(not torch.allclose(first[kind], second[kind]) for kind in KINDS)


def test_a_group_of_one_rank_is_that_rank(ranks: list[dict[str, Any]]) -> None:
    for share in SHARES:
        for rank in ranks:
            found, sent = rank[f"{share}, by itself"]
            torch.testing.assert_close(found, rank[f"{share}, alone"][0], rtol=1e-12, atol=1e-15)
            assert len(sent) == 8


def test_a_move_is_one_collective(ranks: list[dict[str, Any]]) -> None:
    # two steps each: a move, a move, those of four frames, those of two pairs
    expected = [(NUM_PROTOTYPES + 1) * moves for moves in (1, 1, 1, 1, 4, 4, 2, 2)]
    for rank in ranks:
        for share in SHARES:
            assert rank[f"{share}, all ranks"][1] == expected


def test_without_a_process_group_a_rank_is_all_there_is() -> None:
    _, t = sample()
    asked, unasked = centered(all_reduce=True), centered()
    asked.update_center(t)
    unasked.update_center(t)
    assert torch.equal(asked.center, unasked.center)


# --- the module, bad input ---


def test_a_module_remembers_its_settings() -> None:
    s, t = sample()
    criterion = centered(torch.arange(5.0) / 5, tau_s=0.2, tau_t=0.1, m_c=0.5, all_reduce=True)
    assert repr(criterion) == "CenteredCrossEntropy(5, tau_s=0.2, tau_t=0.1, m_c=0.5, all_reduce=True)"
    twins = (pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion))
    loss = criterion(s, t)
    criterion.update_center(t)
    for twin in twins:
        assert torch.equal(twin(s, t), loss)
        twin.update_center(t)
        assert torch.equal(twin.center, criterion.center)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"Kp": 0}, ValueError, r"`Kp` must be at least 1; got 0"),
        ({"Kp": 2.0}, TypeError, r"`Kp` must be an integer; got float"),
        ({"tau_s": 0.0}, ValueError, r"`tau_s` must be finite and above 0.0; got 0.0"),
        ({"tau_t": INF}, ValueError, r"`tau_t` must be finite and above 0.0; got inf"),
        ({"m_c": 1.5}, ValueError, r"`m_c` must be within \[0.0, 1.0\]; got 1.5"),
        ({"m_c": "0.9"}, TypeError, r"`m_c` must be a number; got str"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CenteredCrossEntropy(**{"Kp": 5, **wrong})


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("s", None, TypeError, r"`s` must be a tensor; got NoneType"),
        ("s", torch.zeros(6, 4), ValueError, r"`s` must have the shape of `t`, \(6, 5\); got \(6, 4\)"),
        ("s", torch.zeros(5), ValueError, r"`s` must have the shape of `t`, \(6, 5\); got \(5,\)"),
        ("s", torch.zeros(6, 5).int(), TypeError, r"`s` must be floating point; got"),
        ("s", torch.zeros(6, 5, device="meta"), ValueError, r"`s` must be on the device of `t`"),
        ("t", [1.0], TypeError, r"`t` must be a tensor; got list"),
        ("t", torch.zeros(6, 4), ValueError, r"`t` must have shape \(..., Kp=5\); got \(6, 4\)"),
        ("t", torch.zeros(()), ValueError, r"`t` must have shape \(..., Kp=5\); got \(\)"),
        ("t", torch.zeros(6, 5).long(), TypeError, r"`t` must be floating point; got torch.int64"),
        ("t", torch.zeros(6, 5, device="meta"), ValueError, r"`t` must be on the device of `center`"),
    ],
)
def test_a_wrong_tensor_is_named(name: str, value: Any, error: type[Exception], message: str) -> None:
    s, t = sample()
    with pytest.raises(error, match=message):
        centered()(**{"s": s, "t": t, name: value})
    if name == "t":
        with pytest.raises(error, match=message):
            centered().update_center(value)


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


# --- what is not finite moves nothing ---


@pytest.mark.parametrize("dirt", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["explicit", "mask", "frames", "pairs"])
def test_rows_that_are_not_finite_are_left_out_and_counted(kind: str, dirt: float) -> None:
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
    # what was lost is not hidden
    assert dirt == -INF or loss.isnan()
    assert wanted.num_left_out == 0
    assert list(found.state_dict()) == ["center"]


def test_a_batch_without_a_finite_row_moves_nothing() -> None:
    criterion = centered(torch.arange(5.0))
    criterion.update_center(torch.full((4, 5), NAN))
    assert criterion.center.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert criterion.num_left_out == 4


def test_finite_rows_that_overflow_together_move_nothing() -> None:
    criterion = centered(torch.arange(5.0))
    criterion.update_center(torch.full((4, 5), 3e38))
    assert criterion.center.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("all_reduce", [False, True])
def test_a_group_that_is_none_is_named(*, all_reduce: bool) -> None:
    wrong: Any = "g"
    criterion = CenteredCrossEntropy(5, all_reduce=all_reduce, group=wrong)
    with pytest.raises(TypeError, match="`group` must be None where no process group is initialized; got 'g'"):
        criterion.update_center(torch.zeros(1, 5))
