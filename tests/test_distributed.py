"""Two processes over gloo give the gradients of one process with the whole batch."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import two_processes
from ranks import run_ranks
from refusals import refuses
from sample_maps import sample_maps
from ssync_loss import BoundaryRefinementLoss, SSyncLoss
from ssync_loss.distributed import global_mean
from two_processes import CASES, Host, scene, whole_batch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of every rank."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(two_processes.__file__, folder)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return whole_batch()


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() == {"enc_mix", "dec_mix"}
    for name, grad in actual.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_one_process(name: str, ranks: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    for rank in ranks:
        assert_close(rank["global"][name]["gradients"], whole[name]["gradients"])


@pytest.mark.parametrize("name", CASES)
def test_ranks_average_to_the_whole_batch(name: str, ranks: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    values = torch.stack([rank["global"][name]["value"] for rank in ranks])
    torch.testing.assert_close(values.mean(), whole[name]["value"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", [one for one in CASES if one not in ("nothing anywhere", "before the start")])
def test_the_mean_of_rank_means_is_a_different_loss(
    name: str, ranks: list[dict[str, Any]], whole: dict[str, Any]
) -> None:
    for rank in ranks:
        different = [
            not torch.allclose(grad, whole[name]["gradients"][key], rtol=1e-2, atol=1e-6)
            for key, grad in rank["local"][name]["gradients"].items()
        ]
        assert any(different)


@pytest.mark.parametrize("name", CASES)
def test_one_collective_of_two_integers_and_none_before_the_start(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["global"][name]["sent"] == ([] if name == "before the start" else [("all_reduce", 2, torch.int64)])
        # the criterion alone calls no collective
        assert rank["local"][name]["sent"] == []


def test_a_rank_without_a_region_contributes_nothing(ranks: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    first, second = (rank["global"]["nothing on one rank"]["value"] for rank in ranks)
    torch.testing.assert_close(first, 2.0 * whole["nothing on one rank"]["value"])
    assert second == 0


def test_ranks_may_have_different_batches(ranks: list[dict[str, Any]]) -> None:
    model = Host()
    loss = SSyncLoss()(*model(*scene()))
    expected = two_processes.gradients(model, loss)
    for rank in ranks:
        assert_close(rank["uneven"]["gradients"], expected)
    values = torch.stack([rank["uneven"]["value"] for rank in ranks])
    torch.testing.assert_close(values.mean(), loss.detach())


def test_the_cases_differ(whole: dict[str, Any]) -> None:
    shares = []
    for half in (slice(0, 2), slice(2, 4)):
        terms = SSyncLoss().terms(*(maps[half].requires_grad_() for maps in scene()))
        shares.append([terms.num_boundary.item(), terms.num_interior.item()])
    assert all(first != second for first, second in zip(*shares, strict=True))
    assert min(map(min, shares)) > 0
    assert len({round(case["value"].item(), 5) for case in whole.values()}) >= len(CASES) - 1


@pytest.mark.parametrize(("settings", "step"), [({}, None), ({"start_step": 3}, 2), ({"ramp_steps": 4}, 3)])
def test_without_a_process_group_it_equals_the_loss(settings: dict[str, Any], step: int | None) -> None:
    assert not dist.is_initialized()
    maps = sample_maps()
    criterion = SSyncLoss(**settings)
    valid = torch.tensor([[True, True], [True, False]])
    expected = criterion(*maps, step=step, valid=valid)
    actual = global_mean(criterion, *maps, step=step, valid=valid)
    assert torch.equal(actual, expected)
    for one, other in zip(torch.autograd.grad(actual, maps), torch.autograd.grad(expected, maps), strict=True):
        assert torch.equal(one, other)


class Renamed(SSyncLoss):
    """A subclass is also a valid criterion."""


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("make", [Renamed, lambda: torch.compile(SSyncLoss(), backend="eager")])
def test_subclasses_and_compiled_losses_are_accepted(make: Any) -> None:
    maps = sample_maps(requires_grad=False)
    assert torch.equal(global_mean(make().eval(), *maps), SSyncLoss().eval()(*maps))


@pytest.mark.parametrize("wrong", [None, "loss", SSyncLoss, BoundaryRefinementLoss(), torch.nn.MSELoss()])
def test_other_criteria_are_refused(wrong: Any) -> None:
    refuses(
        TypeError, f"`criterion` must be SSyncLoss; got {type(wrong).__name__}.", global_mean, wrong, *sample_maps()
    )


def test_a_group_needs_a_process_group() -> None:
    message = "`group` must be None where no process group is initialized; got 'g'."
    refuses(TypeError, message, global_mean, SSyncLoss(), *sample_maps(), group="g")


def test_a_schedule_without_a_step_is_an_error() -> None:
    refuses(ValueError, "`step` must be given with a schedule", global_mean, SSyncLoss(start_step=3), *sample_maps())
