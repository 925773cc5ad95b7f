"""The slot curriculum in training: events, checkpoints, optimizers, two processes, errors."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import curriculum_ranks
from curriculum_ranks import MILESTONES, NUM_CLIPS, NUM_STEPS
from ranks import run_ranks
from ssync_loss.curriculum import SlotCurriculum, milestones, slot_error, slot_schedule


def scene(num_slots: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    recon, target = torch.randn(2, 2, 3, 4, 2, 2, generator=generator)
    masks = (2 * torch.randn(2, 3, num_slots, 2, 2, generator=generator)).softmax(2)
    return recon, target, masks


def placeholders(num_rows: int = 7, width: int = 8, *leading: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*leading, num_rows, width, generator=torch.Generator().manual_seed(1)))


def run(
    curriculum: SlotCurriculum, slots: nn.Parameter, steps: range, optimizer: torch.optim.Optimizer | None = None
) -> list[int]:
    """Run a training loop, and return the number of active slots at every step."""
    counts = []
    for step in steps:
        counts.append(curriculum.take(slots).shape[-2])
        curriculum.observe(*scene(counts[-1], seed=step), step)
        curriculum.maybe_expand(slots, step, optimizer)
    return counts


# --- events ---


def test_slots_are_added_after_milestones() -> None:
    curriculum, slots = SlotCurriculum(slot_schedule(7), milestones(40)), placeholders()
    counts = run(curriculum, slots, range(40))
    # the step of a milestone is the last one of its stage
    assert counts == [2] * 5 + [3] * 6 + [7] * 29
    assert counts == [curriculum.n_active(step) for step in range(40)]
    assert curriculum.n_active() == 7


@settings(max_examples=30)
@given(
    growth=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    gaps=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    first=st.integers(0, 3),
    window=st.integers(1, 9),
)
def test_there_is_an_event_per_milestone(growth: list[int], gaps: list[int], first: int, window: int) -> None:
    budgets = [sum(growth[: i + 1]) for i in range(len(growth))]
    times = [first + sum(gaps[:i]) for i in range(len(budgets) - 1)]
    curriculum, slots = SlotCurriculum(budgets, times, window=window), placeholders(budgets[-1] + 1)
    counts = run(curriculum, slots, range(25))
    assert counts == [curriculum.n_active(step) for step in range(25)]
    assert counts == sorted(counts)
    assert counts[-1] == budgets[-1]
    assert sorted(set(counts)) == budgets


def test_children_are_copies_of_the_slots_with_errors() -> None:
    slots = placeholders()
    before = slots.detach().clone()
    curriculum = SlotCurriculum([3, 6], [4])
    for step in range(5):
        recon, target, masks = scene(3, seed=step)
        # only slot 1 has an error
        recon = torch.where(masks.argmax(2, keepdim=True) == 1, recon, target)
        masks = torch.nn.functional.one_hot(masks.argmax(2), 3).movedim(-1, 2).float()
        curriculum.observe(recon, target, masks, step)
        assert curriculum.maybe_expand(slots, step) is (step == 4)
    after = slots.detach()
    assert torch.equal(after[:3], before[:3])
    assert torch.equal(after[6], before[6])
    assert ((after[3:6] - before[1]).norm(dim=1) < 0.5 * before[1].norm()).all()
    assert ((after[3:6] - before[1]).norm(dim=1) > 0).all()


@pytest.mark.parametrize("window", [1, 3, 10])
def test_errors_are_summed_over_the_window_before_a_milestone(window: int) -> None:
    curriculum = SlotCurriculum([2, 4], [5], window=window)
    for step in range(6):
        curriculum.observe(*scene(2, seed=step), step)
    watched = range(max(0, 5 - window), 5)
    expected = torch.stack([slot_error(*scene(2, seed=step)) for step in watched]).sum(0)
    torch.testing.assert_close(curriculum.errors[:2], expected)
    assert not curriculum.errors[2:].any()
    assert curriculum.num_observed == len(watched)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_is_not_observed_again(*, use_reentrant: bool) -> None:
    curriculum, (recon, target, masks) = SlotCurriculum([2, 3], [5]), scene(2)

    def host(recon: Tensor) -> Tensor:
        curriculum.observe(recon, target, masks, 4)
        return recon.square().sum()

    checkpoint(host, recon.requires_grad_(), use_reentrant=use_reentrant).backward()
    assert curriculum.num_observed == 1
    assert torch.equal(curriculum.errors[:2], slot_error(recon, target, masks))


def test_a_curriculum_from_inference_mode_works() -> None:
    with torch.inference_mode():
        curriculum = SlotCurriculum([2, 3], [1])
    assert run(curriculum, placeholders(3), range(3)) == [2, 2, 3]


def test_every_stage_starts_with_zero_errors() -> None:
    curriculum, slots = SlotCurriculum([2, 3, 7], [1, 4], window=2), placeholders()
    run(curriculum, slots, range(2))
    assert curriculum.n_active() == 3
    assert curriculum.num_observed == 0
    assert not curriculum.errors.any()
    run(curriculum, slots, range(2, 4))
    expected = slot_error(*scene(3, seed=2)) + slot_error(*scene(3, seed=3))
    torch.testing.assert_close(curriculum.errors[:3], expected)


def test_arguments_are_ignored_outside_the_window() -> None:
    curriculum = SlotCurriculum([2, 3], [5])
    nothing: Any = None
    for step in (0, 1, 2, 3):
        curriculum.observe(nothing, nothing, nothing, step)
    with pytest.raises(TypeError, match="`masks` must be a tensor"):
        curriculum.observe(nothing, nothing, nothing, 4)
    assert curriculum.errors.sum() == 0


def test_the_generator_and_the_settings_determine_the_jitter() -> None:
    found = []
    for knobs in ({}, {}, {"beta": 0.4}, {"neighbors": "all"}, {"min_radius": 5.0}):
        curriculum, slots = SlotCurriculum([2, 3], [0], **knobs), placeholders()
        curriculum.observe(*scene(2), 0)
        before = slots.detach().clone()
        assert curriculum.maybe_expand(slots, 0, generator=torch.Generator().manual_seed(0))
        parent = int(slot_error(*scene(2)).argmax())
        found.append(slots.detach()[2] - before[parent])
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[2], 2 * found[0], rtol=1e-4, atol=1e-6)
    assert (found[3] - found[0]).norm() > 1e-3
    assert found[4].norm() > 4
    torch.testing.assert_close(*(torch.nn.functional.normalize(found[i], dim=0) for i in (0, 3)))


def test_missed_milestones_are_caught_up() -> None:
    # a run that resumes at step 20 has missed its milestones
    curriculum, slots = SlotCurriculum([2, 3, 7], [4, 10]), placeholders()
    assert run(curriculum, slots, range(20, 24)) == [2, 3, 7, 7]
    # this run skips the step of a milestone
    curriculum, slots = SlotCurriculum([2, 3, 7], [4, 10]), placeholders()
    assert run(curriculum, slots, range(4)) == [2] * 4
    assert run(curriculum, slots, range(6, 16)) == [2, 3, 3, 3, 3, 7, 7, 7, 7, 7]


@pytest.mark.parametrize(("last", "written"), [(9, r"\(1, 0\)"), (10, r"\(1, 1\)")])
def test_overwritten_buffers_are_an_error(last: int, written: str) -> None:
    # only the first rank loads a checkpoint, and its buffers are copied to the others
    first, other = (SlotCurriculum([2, 3, 7], [4, 10]) for _ in range(2))
    run(first, placeholders(), range(last))
    for name, one in other.named_buffers():
        one.copy_(first.get_buffer(name))
    message = rf"are {written} in the buffers and \(0, 0\) by .*\. Every rank must load the checkpoint itself"
    with pytest.raises(RuntimeError, match=message):
        other.observe(*scene(2), last)
    other.load_state_dict(first.state_dict())
    slots = placeholders()
    assert run(other, slots, range(last, 12))[0] == 3
    assert other.n_active() == 7


def test_a_milestone_without_observed_errors_is_an_error() -> None:
    curriculum, slots = SlotCurriculum([2, 3], [4]), placeholders()
    assert not curriculum.maybe_expand(slots, 3)
    with pytest.raises(
        RuntimeError, match=r"No errors were observed before the milestone 4 \(step 4\): call `observe`"
    ):
        curriculum.maybe_expand(slots, 4)


def test_negative_errors_are_refused() -> None:
    curriculum, slots = SlotCurriculum([2, 3], [0]), placeholders()
    recon, target, masks = scene(2)
    curriculum.observe(recon, target, masks.log(), 0)
    with pytest.raises(ValueError, match="`masks` must be at least 0, after the softmax; observed errors are"):
        curriculum.maybe_expand(slots, 0)


def test_nan_errors_give_every_slot_a_child() -> None:
    curriculum, slots = SlotCurriculum([2, 4], [0]), placeholders()
    recon, target, masks = scene(2)
    curriculum.observe(recon * float("nan"), target, masks, 0)
    assert curriculum.maybe_expand(slots, 0)
    assert slots.isfinite().all()
    distance = (slots.detach()[2:4] - slots.detach()[:2]).norm(dim=1)
    assert (distance < slots.detach()[:2].norm(dim=1)).all()


@pytest.mark.parametrize("leading", [(), (1,)])
def test_a_parameter_may_have_an_axis_of_clips(leading: tuple[int, ...]) -> None:
    curriculum, slots = SlotCurriculum([2, 5], [0]), placeholders(7, 8, *leading)
    before = slots.detach().clone()
    assert run(curriculum, slots, range(2)) == [2, 5]
    changed = (slots != before).flatten(0, -2).any(1)
    assert changed.tolist() == [False] * 2 + [True] * 3 + [False] * 2


def test_the_first_slots_are_active() -> None:
    curriculum = SlotCurriculum([2, 3], [4])
    for shape in ((7, 8), (1, 7, 8), (3, 7, 8), (3, 2, 7, 8)):
        slots = torch.randn(shape)
        assert torch.equal(curriculum.take(slots), slots[..., :2, :])
    slots = placeholders()
    curriculum.take(slots).sum().backward()
    assert slots.grad is not None
    assert slots.grad[:2].all()
    assert not slots.grad[2:].any()


# --- optimizers ---


def test_children_inherit_moments_only_if_the_optimizer_is_given() -> None:
    for given_one in (True, False):
        curriculum, slots = SlotCurriculum([2, 3], [3]), placeholders()
        optimizer = torch.optim.Adam([slots])
        for step in range(4):
            curriculum.observe(*scene(2, seed=step), step)
            optimizer.zero_grad()
            curriculum.take(slots).square().sum().backward()
            optimizer.step()
            curriculum.maybe_expand(slots, step, optimizer if given_one else None)
        parent = int(slot_error(*scene(2, seed=2)).argmax())
        for name in ("exp_avg", "exp_avg_sq"):
            moment = optimizer.state[slots][name]
            assert torch.equal(moment[2], moment[parent] if given_one else torch.zeros(8))


def test_inactive_rows_do_not_change() -> None:
    curriculum, slots = SlotCurriculum([2, 3, 7], [3, 6], neighbors="all"), placeholders()
    before = slots.detach().clone()
    optimizer = torch.optim.AdamW([slots], lr=0.1, weight_decay=0.5)
    curriculum.hold_unborn(slots, optimizer)
    for step in range(9):
        num_active = curriculum.n_active()
        unborn = slots.detach()[num_active:].clone()
        curriculum.observe(*scene(num_active, seed=step), step)
        optimizer.zero_grad()
        curriculum.take(slots).square().sum().backward()
        optimizer.step()
        assert torch.equal(slots.detach()[num_active:], unborn)
        curriculum.maybe_expand(slots, step, optimizer)
        assert torch.equal(slots.detach()[curriculum.n_active() :], before[curriculum.n_active() :])
    assert (slots != before).all()


# --- checkpoints, copies, compilation ---


@pytest.mark.parametrize("at", range(12))
def test_training_resumes_from_a_checkpoint(at: int, tmp_path: Path) -> None:
    def fresh() -> tuple[SlotCurriculum, nn.Parameter]:
        return SlotCurriculum([2, 3, 7], [4, 9], window=3), placeholders()

    def go_on(curriculum: SlotCurriculum, slots: nn.Parameter, *steps: int) -> list[int]:
        counts = []
        for step in range(*steps):
            # the seed of a step makes its jitter independent of the first step
            torch.manual_seed(step)
            counts += run(curriculum, slots, range(step, step + 1))
        return counts

    (whole, slots), (first, first_slots), (second, second_slots) = fresh(), fresh(), fresh()
    counts = go_on(whole, slots, 12)
    go_on(first, first_slots, at)
    torch.save({"curriculum": first.state_dict(), "slots": first_slots.data}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second.load_state_dict(loaded["curriculum"], strict=True)
    second_slots.data = loaded["slots"]
    assert go_on(second, second_slots, at, 12) == counts[at:]
    assert torch.equal(second_slots, slots)


def test_the_state_dict_holds_the_stage() -> None:
    curriculum, other = (SlotCurriculum([2, 3], [1]) for _ in range(2))
    run(curriculum, placeholders(), range(3))
    state = nn.ModuleDict({"curriculum": curriculum}).state_dict()
    assert set(state) == {f"curriculum.{name}" for name in ("stage", "num_observed", "errors")}
    assert state["curriculum.stage"] == 1
    for assign in (False, True):
        assert other.n_active() == 2
        nn.ModuleDict({"curriculum": other}).load_state_dict(state, assign=assign)
        assert other.n_active() == 3
        other = SlotCurriculum([2, 3], [1])


def test_a_stage_of_another_curriculum_is_refused() -> None:
    state = SlotCurriculum([2, 3, 7], [1, 2]).state_dict()
    state["stage"] = torch.tensor(2)
    with pytest.raises(ValueError, match=r"`stage` must be within \[0, 1\]; got 2"):
        SlotCurriculum([2, 7], [1]).load_state_dict(state)


def test_copies_are_independent() -> None:
    curriculum, slots = SlotCurriculum([2, 3, 7], [1, 3]), placeholders()
    run(curriculum, slots, range(2))
    for twin in (copy.deepcopy(curriculum), pickle.loads(pickle.dumps(curriculum))):
        assert twin.n_active() == 3
        assert run(twin, placeholders(), range(2, 5)) == [3, 3, 7]
        assert curriculum.n_active() == 3
        twin.load_state_dict(curriculum.state_dict())
        assert twin.n_active() == 3
    assert repr(curriculum) == (
        "SlotCurriculum(budgets=(2, 3, 7), milestones=(1, 3), beta=0.2, neighbors='active', min_radius=0.001, "
        "window=1, stage=1)"
    )


@pytest.mark.usefixtures("fresh_compiler")
def test_taking_slots_compiles_to_one_graph_per_stage() -> None:
    curriculum, slots = SlotCurriculum([2, 3], [1]), placeholders()
    counter = CompileCounterWithBackend("eager")
    take = torch.compile(lambda one: curriculum.take(one).square().sum(), fullgraph=True, backend=counter)
    for step in range(4):
        torch.testing.assert_close(take(slots), curriculum.take(slots).square().sum())
        run(curriculum, slots, range(step, step + 1))
    assert counter.frame_count == 2


def test_a_curriculum_works_in_half_precision() -> None:
    curriculum, slots = SlotCurriculum([2, 3], [1]).half(), placeholders().to(torch.float16)
    slots = nn.Parameter(slots)
    assert run(curriculum, slots, range(3)) == [2, 2, 3]
    assert slots.isfinite().all()


# --- two processes ---


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of every rank."""
    return run_ranks(curriculum_ranks.__file__, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """Return the results of one process with all clips."""
    return curriculum_ranks.train(slice(0, NUM_CLIPS), distributed=False)


def test_all_ranks_have_the_same_slots_and_moments(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert first["expanded"] == second["expanded"] == [step in MILESTONES for step in range(NUM_STEPS)]
    for name in ("slots", "moments", "errors"):
        for one, other in zip(first[name], second[name], strict=True):
            assert torch.equal(one, other)
    assert len({tuple(one.flatten().tolist()) for one in first["slots"]}) == NUM_STEPS


def test_errors_are_averaged_over_all_clips(ranks: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    # later steps differ in their jitter
    for step in range(MILESTONES[0] + 1):
        torch.testing.assert_close(ranks[0]["errors"][step], whole["errors"][step])


def test_one_collective_for_the_errors_and_one_for_the_rows(ranks: list[dict[str, Any]]) -> None:
    expected: list[list[tuple[str, int]]] = [[] for _ in range(NUM_STEPS)]
    # the windows have two steps, and the start of training cuts off the first; errors are sent with their weight
    expected[0] = [("all_reduce", 3)]
    expected[1] = [("broadcast", 4)]
    expected[2] = [("all_reduce", 4)]
    expected[3] = [("broadcast", 8)]
    # step 1 is also in the window of milestone 3, but that stage has not begun
    for rank in ranks:
        assert rank["sent"] == expected


# --- errors ---


@pytest.mark.parametrize(
    ("budgets", "times", "knobs", "error", "message"),
    [
        ([2, 2, 7], [1, 2], {}, ValueError, r"`budgets` must grow; got \[2, 2, 7\]"),
        ([2, 7, 3], [1, 2], {}, ValueError, r"`budgets` must grow; got \[2, 7, 3\]"),
        ([0, 3], [1], {}, ValueError, r"`budgets` must be at least 1; got 0"),
        ([2, 3.0], [1], {}, TypeError, r"`budgets` must be an integer; got float"),
        ([], [], {}, ValueError, r"`budgets` must have at least one entry; got \[\]"),
        (7, [1], {}, TypeError, r"`budgets` must be a sequence of integers; got int"),
        ("27", [1], {}, TypeError, r"`budgets` must be a sequence of integers; got str"),
        ([2, 3, 7], [9, 5], {}, ValueError, r"`milestones` must grow; got \[9, 5\]"),
        ([2, 3, 7], [-1, 5], {}, ValueError, r"`milestones` must be at least 0; got -1"),
        ([2, 3, 7], [5], {}, ValueError, r"`milestones` must have 2 entries, one fewer than budgets=\[2, 3, 7\]; got"),
        ([2, 3], [1], {"beta": -1}, ValueError, r"`beta` must be finite and at least 0.0; got -1"),
        ([2, 3], [1], {"neighbors": "none"}, ValueError, r"`neighbors` must be one of 'active', 'all'; got 'none'"),
        ([2, 3], [1], {"min_radius": "0"}, TypeError, r"`min_radius` must be a number; got str"),
        ([2, 3], [1], {"window": 0}, ValueError, r"`window` must be at least 1; got 0"),
    ],
)
def test_wrong_settings_are_named(
    budgets: Any, times: Any, knobs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SlotCurriculum(budgets, times, **knobs)


@pytest.mark.parametrize(
    ("slots", "error", "message"),
    [
        (nn.Parameter(torch.zeros(7, 8).int(), False), TypeError, r"`slots_param` must be floating point; got"),
        (torch.zeros(7, 8), TypeError, r"`slots_param` must be a parameter; got Tensor"),
        (placeholders(6), ValueError, r"`slots_param` must have at least 7 rows, the last of budgets=.*; got 6"),
        (placeholders(7, 8, 2), ValueError, r"`slots_param` must have shape \(S, D\) or \(1, S, D\); got \(2, 7, 8\)"),
        (nn.Parameter(torch.zeros(7)), ValueError, r"`slots_param` must have shape .*; got \(7,\)"),
    ],
)
def test_wrong_slots_are_refused_at_the_first_step(slots: Any, error: type[Exception], message: str) -> None:
    curriculum = SlotCurriculum([2, 3, 7], [4, 9])
    with pytest.raises(error, match=message):
        curriculum.maybe_expand(slots, 0)
    with pytest.raises(error, match=message):
        curriculum.hold_unborn(slots, torch.optim.Adam([placeholders()]))


def test_wrong_arguments_are_named() -> None:
    curriculum = SlotCurriculum([2, 3], [1])
    step: Any = 1.0
    with pytest.raises(TypeError, match="`step` must be an integer; got float"):
        curriculum.maybe_expand(placeholders(), step)
    with pytest.raises(TypeError, match="`step` must be an integer; got float"):
        curriculum.observe(*scene(2), step)
    with pytest.raises(TypeError, match="`step` must be an integer; got float"):
        curriculum.n_active(step)
    with pytest.raises(ValueError, match=r"`masks` must have shape \(B, T, S=2, H, W\); got"):
        curriculum.observe(*scene(3), 0)
    with pytest.raises(ValueError, match=r"`slots` must have shape \(..., S >= 2, D\); got \(1, 8\)"):
        curriculum.take(torch.zeros(1, 8))
    nothing: Any = [[0.0]]
    with pytest.raises(TypeError, match="`slots` must be a tensor; got list"):
        curriculum.take(nothing)
    curriculum.observe(*scene(2), 0)
    with pytest.raises(ValueError, match="`optimizer` must hold `slots_param`"):
        curriculum.maybe_expand(placeholders(), 1, torch.optim.Adam([placeholders()]))
    # an error leaves no partial change
    assert curriculum.n_active() == 2
    assert curriculum.maybe_expand(placeholders(), 1)


# --- the documented recipe, for every number of slots and steps ---


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 7, 10, 40])
@pytest.mark.parametrize("total", [2, 3, 4, 5, 6, 7, 11])
def test_the_documented_recipe_ends_with_all_slots(total: int, num_steps: int) -> None:
    budgets, times = slot_schedule(total), milestones(num_steps)
    curriculum, slots = SlotCurriculum(budgets, times), placeholders(total)
    counts = run(curriculum, slots, range(num_steps))
    # the stage of a step is the last one whose milestone has passed
    passed = [sum(step > one for one in times[: len(budgets) - 1]) for step in range(num_steps)]
    assert counts == [budgets[one] for one in passed]
    assert counts == [curriculum.n_active(step) for step in range(num_steps)]
    assert curriculum.n_active() == total
    assert slots.isfinite().all()


def test_the_last_of_simultaneous_stages_counts() -> None:
    curriculum = SlotCurriculum([2, 3, 5, 7], [1, 4, 4, 9, 12])
    assert (curriculum.budgets, curriculum.milestones) == ((2, 3, 7), (1, 4))


@pytest.mark.parametrize("dirt", [float("nan"), float("inf")])
def test_a_nonfinite_batch_is_skipped_and_counted(dirt: float) -> None:
    curriculum, clean = (SlotCurriculum([2, 4], [2], window=3) for _ in range(2))
    for step in range(3):
        recon, target, masks = scene(2, seed=step)
        if step != 1:
            clean.observe(recon, target, masks, step)
        else:
            recon[0, 0, 0, 0, 0] = dirt
        curriculum.observe(recon, target, masks, step)
    assert curriculum.errors.isfinite().all()
    assert torch.equal(curriculum.errors, clean.errors)
    assert [one.num_left_out.item() for one in (curriculum, clean)] == [1, 0]
    assert "num_left_out" not in curriculum.state_dict()
    one, other = placeholders(), placeholders()
    for number, (slots, each) in enumerate(((one, curriculum), (other, clean))):
        assert each.maybe_expand(slots, 2, generator=torch.Generator().manual_seed(0)), number
    assert torch.equal(one, other)


def test_wrong_optimizers_generators_and_groups_are_refused_at_the_first_step() -> None:
    curriculum, slots = SlotCurriculum([2, 3], [9]), placeholders()
    wrong: Any = "adam"
    with pytest.raises(TypeError, match="`optimizer` must be Optimizer; got str"):
        curriculum.maybe_expand(slots, 0, wrong)
    with pytest.raises(TypeError, match="`generator` must be Generator; got str"):
        curriculum.maybe_expand(slots, 0, generator=wrong)
    with pytest.raises(TypeError, match="`group` must be None where no process group is initialized; got 'adam'"):
        curriculum.maybe_expand(slots, 0, group=wrong)
    with pytest.raises(TypeError, match="`group` must be None where no process group is initialized; got 'adam'"):
        curriculum.observe(*scene(2), 0, group=wrong)
    with pytest.raises(TypeError, match="`optimizer` must be Optimizer; got str"):
        curriculum.hold_unborn(slots, wrong)


@pytest.mark.parametrize("shape", [(1, 8), (7, 1), (1, 1, 8)])
def test_expanded_slots_are_refused_at_the_first_step(shape: tuple[int, ...]) -> None:
    slots = nn.Parameter(torch.zeros(shape).expand(*shape[:-2], 7, 8))
    with pytest.raises(ValueError, match="`slots_param` must have memory of its own for every row; got an expanded"):
        SlotCurriculum([2, 3], [9]).maybe_expand(slots, 0)
    turned = nn.Parameter(torch.randn(8, 7).T)
    assert run(SlotCurriculum([2, 3], [0]), turned, range(2)) == [2, 3]
