"""Cyclic inference with a trained model."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ssync_loss._checks import check_not_empty, check_tensor

Step: TypeAlias = Callable[[Any, Tensor, int | None], Mapping[str, Any]]


def cyclic_scan(step: Step, init_state: Any, inputs: Tensor) -> dict[str, Tensor]:
    """Run a recurrent model over a clip forward and then backward, and return the outputs of the backward pass.

    The forward pass goes from the first frame to the last. The backward pass starts with the state that the last frame
    predicts, and goes from the last frame but one to the first. Its slots have then seen the whole clip. The last frame
    is used once. The scan is not causal and not for training; call it under ``torch.no_grad()``.

    Args:
        step: ``step(state, frame, t)`` with frame (B, ...) returns a mapping of tensors with ``"state_predicted"``, the
            state of the next call. ``t`` is the index of the frame in the forward pass and None in the backward pass,
            where, as published, no frame is treated as the first one.
        init_state: the state of the first call.
        inputs: (B, T, ...), the model's input for every frame.

    Returns: every output of ``step``, of shape (B, ...), as (B, T, ...), in the order of time.
    Source: Moon, Seong & Heo, CVPR 2026 (arXiv:2603.22758), cyclic inference.
    Raises: TypeError if the inputs or an output are no tensors, or ``"state_predicted"`` is missing; ValueError if
        there is no frame.

    >>> def step(state, frame, t):
    ...     return {"state": state + frame, "state_predicted": state + frame}
    >>> clip = torch.tensor([[1.0, 10.0, 100.0]])
    >>> cyclic_scan(step, torch.zeros(1), clip)["state"].tolist()  # 111 + 10 + 1, 111 + 10, 1 + 10 + 100
    [[122.0, 121.0, 111.0]]
    """
    check_tensor("inputs", inputs)
    if inputs.ndim < 2:
        raise ValueError(f"`inputs` must have shape (B, T, ...); got {tuple(inputs.shape)}.")
    check_not_empty("inputs", {"T": inputs.shape[1]}, "T")
    frames = inputs.unbind(1)
    state, outputs = init_state, []
    for t, frame in [*enumerate(frames), *((None, frame) for frame in reversed(frames[:-1]))]:
        outputs.append(_checked(step(state, frame, t)))
        state = outputs[-1]["state_predicted"]
    # the last frame and the backward pass, in the order of time
    outputs = outputs[len(frames) - 1 :][::-1]
    return {name: torch.stack([one[name] for one in outputs], 1) for name in outputs[0]}


def _checked(output: object) -> Mapping[str, Any]:
    if not isinstance(output, Mapping):
        raise TypeError(f"`step` must return a mapping; got {type(output).__name__}.")
    if "state_predicted" not in output:
        raise TypeError(f"`step` must return a 'state_predicted'; got {sorted(output)}.")
    for name, value in output.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            given = "a scalar" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"`step` must return tensors (B, ...); got {given} as {name!r}.")
    return output
