"""The contenders by name: SSync by each backend, and a step of anything that is measured."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from examples.inputs import Inputs, Step
from torch import Tensor

from benchmarks.add_ons import BY_NAME
from ssync_loss import SSyncLoss, testing
from ssync_loss.functional import pseudo_labels, selective_distillation_loss

# the fastest first
BACKENDS = ("cpu", "triton", "torch")
# the backend that "auto" prefers
AUTO = {"cpu": "cpu", "cuda": "triton"}
MERGE_THRESHOLD = 0.7
STEP = "step, mse"
OPERATIONS = (
    "labels",
    "pseudo-labels",
    "distillation, mse",
    "distillation, cross_entropy",
    STEP,
    "step, cross_entropy",
)
# the yardsticks of all operations, and the contender that runs them
COPY, EXP, TORCH = "copy", "exp of both maps", "torch"
COPY_BYTES = 128 << 20
# how often a step reads or writes a map: for statistics, counts and targets
STEP_PASSES = 9
# suffixes of a contender
COMPILED, TWO_THREADS, REPLAY, USUAL_MALLOC = " compiled", ", 2 threads", ", graph replay", ", malloc as it comes"


def name_of(backend: str) -> str:
    """Name SSync by one of its backends."""
    return f"SSync {backend}"


def base_of(contender: str) -> str:
    """Remove the suffixes that say how a contender runs. Compiled code is a contender of its own."""
    for how in (TWO_THREADS, REPLAY, USUAL_MALLOC):
        contender = contender.removesuffix(how)
    return contender


def _backend_of(contender: str) -> Any:
    return base_of(contender).removesuffix(COMPILED).removeprefix("SSync ")


def ssync_criterion(contender: str, criterion: Any = "mse") -> Callable[[Tensor, Tensor], Tensor]:
    """Build the loss of a contender."""
    loss = SSyncLoss(merge_threshold=MERGE_THRESHOLD, criterion=criterion, backend=_backend_of(contender))
    if base_of(contender).endswith(COMPILED):
        # dynamic shapes would make the settings symbols, and the code slower
        compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(loss, fullgraph=True, dynamic=False)
        return compiled
    return loss


def step_of(case: str, contender: str, inputs: Inputs, *, gate: bool = False) -> Step:
    """Make a step of a method, a yardstick or an operation of SSync; at the gate, with the settings for the gate."""
    name = base_of(contender)
    if name in BY_NAME:
        return BY_NAME[name].make(inputs, **(BY_NAME[name].gate if gate else {}))
    if name == TORCH:
        return _yardstick(case, inputs)
    enc, dec = inputs.maps
    map_bytes, patches = enc.numel() * enc.element_size(), enc[:, :, 0].numel()
    kind, _, criterion = case.partition(", ")
    if kind == "distillation":
        chosen: dict[str, Any] = {"criterion": criterion, "backend": _backend_of(name)}
        distill = partial(selective_distillation_loss, **chosen)
        definition: Any = partial(testing.reference_selective_distillation_loss, criterion=criterion)
        labels = pseudo_labels(enc, dec, merge_threshold=MERGE_THRESHOLD)
        step = Step.of(distill, definition, dec, labels.enc_labels, labels.boundary)
        step.num_bytes = 2 * map_bytes + 9 * patches
    elif kind == "step":
        step = Step.of(ssync_criterion(name, criterion), partial(_by_definition, criterion=criterion), enc, dec)
        step.num_bytes = STEP_PASSES * map_bytes
    else:
        # "labels" are not merged
        threshold = None if kind == "labels" else MERGE_THRESHOLD
        find = partial(pseudo_labels, merge_threshold=threshold, backend=_backend_of(name))
        definition = partial(testing.reference_pseudo_labels, merge_threshold=threshold)
        step = Step.of(find, definition, enc.detach(), dec.detach())
        # two planes of int64 labels and two regions of bytes
        step.num_bytes = 2 * map_bytes + 2 * 8 * patches + 2 * patches
    return step


def _by_definition(enc: Tensor, dec: Tensor, criterion: str) -> Tensor:
    terms = testing.reference_ssync(enc.float(), dec.float(), merge_threshold=MERGE_THRESHOLD, criterion=criterion)
    return terms.boundary + terms.interior


def _yardstick(case: str, inputs: Inputs) -> Step:
    """Make a copy too large for a cache, or the exponentials of both maps."""
    if case == COPY:
        source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=inputs.device)
        target = torch.empty_like(source)
        return Step(lambda: target.copy_(source), lambda: source, num_bytes=2 * COPY_BYTES)
    maps = [one.detach() for one in inputs.maps]
    space = torch.empty_like(maps[0])
    return Step(lambda: [torch.exp(one, out=space) for one in maps], lambda: space)
