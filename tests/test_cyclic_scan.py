"""Cyclic inference: a forward scan, then a backward scan from the prediction of the last frame."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from ssync_loss.functional import cyclic_scan
from ssync_loss.methods.slotcurri.reference import reference_cyclic_scan


class Recurrence:
    """A step with weights that records its calls."""

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


def clip(clips: int = 2, frames: int = 4, slots: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(clips, slots, 3, generator=generator), torch.randn(clips, frames, 3, generator=generator)


@settings(max_examples=20)
@given(frames=st.integers(1, 6), clips=st.integers(0, 2))
def test_it_scans_forward_and_backward(frames: int, clips: int) -> None:
    state, inputs = clip(clips, frames)
    outputs = cyclic_scan(Recurrence(), state, inputs)
    expected = reference_cyclic_scan(Recurrence(), state, inputs)
    assert outputs.keys() == expected.keys() == {"state", "state_predicted", "masks"}
    for name, values in outputs.items():
        assert torch.equal(values, expected[name])


def test_the_backward_scan_has_no_time() -> None:
    step = Recurrence()
    cyclic_scan(step, *clip(2, 4))
    assert step.calls == [0, 1, 2, 3, None, None, None]


def test_inputs_may_have_any_axes_and_the_state_any_type() -> None:
    def step(state: Any, frame: Tensor, t: int | None) -> dict[str, Tensor]:
        return {"seen": frame.flatten(1).sum(1) + state, "state_predicted": torch.zeros(2) + state + 1}

    inputs = torch.ones(2, 3, 4, 2, 2)
    assert cyclic_scan(step, 0, inputs)["seen"].tolist() == [[20.0, 19.0, 18.0]] * 2


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
        ({"state_predicted": torch.zeros(())}, r"`step` must return tensors \(B, ...\); got a scalar as 'state_pred"),
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
