"""Cyclic inference: forward, then backward from what the last frame predicts."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ssync_loss.functional import cyclic_scan


class Recurrence:
    """A step with weights; it writes down how it was called."""

    def __init__(self, width: int = 3) -> None:
        generator = torch.Generator().manual_seed(0)
        self.mix, self.predict = torch.randn(2, width, width, generator=generator) / 2
        self.calls: list[int | None] = []

    def __call__(self, state: Tensor, frame: Tensor, t: int | None) -> dict[str, Tensor]:
        self.calls.append(t)
        corrected = (state @ self.mix + frame.unsqueeze(1)).tanh()
        return {
            "state": corrected,
            "state_predicted": corrected @ self.predict,
            "masks": torch.einsum("bsd,bd->bs", corrected, frame).softmax(1),
        }


def forward_scan(step: Any, state: Tensor, inputs: Tensor) -> list[dict[str, Tensor]]:
    outputs = []
    for t in range(inputs.shape[1]):
        outputs.append(step(state, inputs[:, t], t))
        state = outputs[-1]["state_predicted"]
    return outputs


def backward_scan(step: Any, last: dict[str, Tensor], inputs: Tensor) -> list[dict[str, Tensor]]:
    outputs = [last]
    for t in range(inputs.shape[1] - 2, -1, -1):
        outputs.insert(0, step(outputs[0]["state_predicted"], inputs[:, t], None))
    return outputs


def clip(clips: int = 2, frames: int = 4, slots: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(clips, slots, 3, generator=generator), torch.randn(clips, frames, 3, generator=generator)


@settings(max_examples=20)
@given(frames=st.integers(1, 6), clips=st.integers(0, 2))
def test_it_goes_forward_and_then_backward(frames: int, clips: int) -> None:
    state, inputs = clip(clips, frames)
    outputs = cyclic_scan(Recurrence(), state, inputs)
    forward = forward_scan(Recurrence(), state, inputs)
    expected = backward_scan(Recurrence(), forward[-1], inputs)
    assert outputs.keys() == {"state", "state_predicted", "masks"}
    for name, values in outputs.items():
        assert torch.equal(values, torch.stack([one[name] for one in expected], 1))
        # the last frame is not seen twice
        assert torch.equal(values[:, -1], forward[-1][name])


def test_a_clip_is_walked_through_twice_and_the_way_back_has_no_time() -> None:
    step = Recurrence()
    cyclic_scan(step, *clip(2, 4))
    assert step.calls == [0, 1, 2, 3, None, None, None]


def test_a_single_frame_is_a_plain_scan() -> None:
    step = Recurrence()
    state, inputs = clip(2, 1)
    outputs = cyclic_scan(step, state, inputs)
    assert step.calls == [0]
    for name, one in forward_scan(Recurrence(), state, inputs)[0].items():
        assert torch.equal(outputs[name], one.unsqueeze(1))


def test_a_step_that_remembers_nothing_gives_a_plain_scan() -> None:
    def step(state: Tensor, frame: Tensor, t: int | None) -> dict[str, Tensor]:
        return {"state_predicted": frame.square()}

    state, inputs = clip()
    assert torch.equal(cyclic_scan(step, state, inputs)["state_predicted"], inputs.square())


def test_first_frames_are_seen_by_a_state_that_knows_the_clip() -> None:
    state, inputs = clip()
    later = inputs.clone()
    later[:, -1] += 1
    first, other = (cyclic_scan(Recurrence(), state, one)["state"][:, 0] for one in (inputs, later))
    plain, plain_other = (forward_scan(Recurrence(), state, one)[0]["state"] for one in (inputs, later))
    assert torch.equal(plain, plain_other)
    assert (first - other).abs().max() > 1e-4


def test_slots_keep_their_index() -> None:
    state, inputs = clip()
    order = torch.tensor([2, 0, 1])
    outputs, renamed = (cyclic_scan(Recurrence(), one, inputs) for one in (state, state[:, order]))
    torch.testing.assert_close(renamed["state"], outputs["state"][:, :, order])
    torch.testing.assert_close(renamed["masks"], outputs["masks"][:, :, order])


def test_inputs_may_have_any_axes_and_the_state_any_type() -> None:
    def step(state: Any, frame: Tensor, t: int | None) -> dict[str, Tensor]:
        return {"seen": frame.flatten(1).sum(1) + state, "state_predicted": torch.zeros(2) + state + 1}

    inputs = torch.ones(2, 3, 4, 2, 2)
    assert cyclic_scan(step, 0, inputs)["seen"].tolist() == [[20.0, 19.0, 18.0]] * 2


def test_a_module_may_be_the_step() -> None:
    class Model(nn.Module):
        def forward(self, state: Tensor, frame: Tensor, t: int | None) -> dict[str, Tensor]:
            return {"state_predicted": state + frame.unsqueeze(1)}

    state, inputs = clip()
    with torch.no_grad():
        outputs = cyclic_scan(Model(), state, inputs)["state_predicted"]
    torch.testing.assert_close(outputs[:, 0], state + 2 * inputs[:, :3].sum(1)[:, None] + inputs[:, 3:])


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiler_unrolls_it_into_one_graph() -> None:
    state, inputs = clip()
    counter = CompileCounterWithBackend("aot_eager")
    step = Recurrence()
    actual = torch.compile(lambda *given_: cyclic_scan(step, *given_), fullgraph=True, backend=counter)(state, inputs)
    for name, one in cyclic_scan(Recurrence(), state, inputs).items():
        torch.testing.assert_close(actual[name], one)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(2), r"`step` must return a mapping; got Tensor"),
        ({"state": torch.zeros(2)}, r"`step` must return a 'state_predicted'; got \['state'\]"),
        ({"state_predicted": torch.zeros(2), "t": 3}, r"`step` must return tensors \(B, ...\); got int as 't'"),
        (
            {"state_predicted": torch.zeros(())},
            r"`step` must return tensors \(B, ...\); got a scalar as 'state_predicted'",
        ),
    ],
)
def test_a_wrong_output_is_named(output: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        cyclic_scan(lambda state, frame, t: output, torch.zeros(2), torch.zeros(2, 3, 4))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([torch.zeros(2, 4)], TypeError, r"`inputs` must be a tensor; got list"),
        (torch.zeros(3), ValueError, r"`inputs` must have shape \(B, T, ...\); got \(3,\)"),
        (torch.zeros(2, 0, 4), ValueError, r"`inputs` must have T >= 1; got T=0"),
    ],
)
def test_wrong_inputs_are_named(inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cyclic_scan(Recurrence(), torch.zeros(2, 3, 4), inputs)
