"""Who is measured, by name: SSync by each of its backends and in other ways, and a step of anyone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.add_ons import BY_NAME
from benchmarks.inputs import Inputs, Step
from ssync_loss import SSyncLoss
from ssync_loss.functional import pseudo_labels, selective_distillation_loss
from ssync_loss.testing import reference_ssync

# everything that could be measured, the fastest first; "reference" is what the gate compares with
BACKENDS = ("cpu", "triton", "torch")
# what backend="auto" takes on a device where it can
AUTO = {"cpu": "cpu", "cuda": "triton"}
MERGE_THRESHOLD = 0.7
COMPILED = " compiled"
# not contenders: what others are measured in
TORCH, COPY, EXP = "torch", "copy", "exp of both maps"
COPY_BYTES = 128 << 20
# the maps of a step, each read or written once, with separate passes for statistics, counts and targets
STEP_PASSES = 9
# behind the name of a contender
TWO_THREADS, REPLAY, USUAL_MALLOC = ", 2 threads", ", graph replay", ", malloc as it comes"


def name_of(backend: str) -> str:
    """Name SSync by one of its backends."""
    return f"SSync {backend}"


def base_of(contender: str) -> str:
    """Name who is measured, without how."""
    for how in (TWO_THREADS, REPLAY, USUAL_MALLOC):
        contender = contender.removesuffix(how)
    return contender


def backend_of(contender: str) -> Any:
    """Return the backend of SSync by its name."""
    return base_of(contender).removesuffix(COMPILED).removeprefix("SSync ")


def ssync_criterion(contender: str, **settings: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Build the loss of a contender; compiled, it is compiled once for every shape.

    Dynamic shapes would also make the settings symbols, and compile to slower code.
    """
    criterion = SSyncLoss(**{"merge_threshold": MERGE_THRESHOLD, "backend": backend_of(contender), **settings})
    if base_of(contender).endswith(COMPILED):
        compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(criterion, fullgraph=True, dynamic=False)
        return compiled
    return criterion


def step_of(case: str, contender: str, inputs: Inputs) -> Step:
    """Make a step of whatever is measured: a method by its name, a yardstick, or an operation of SSync."""
    name = base_of(contender)
    if name in BY_NAME:
        return BY_NAME[name].make(inputs, **BY_NAME[name].settings)
    if name == TORCH:
        return _yardstick(case, inputs)
    (enc, dec), backend = inputs.maps, backend_of(name)
    kind, _, criterion = case.partition(", ")
    map_bytes, patches = enc.numel() * enc.element_size(), enc[:, :, 0].numel()
    if kind == "distillation":
        labels = pseudo_labels(enc, dec, merge_threshold=MERGE_THRESHOLD)
        chosen: Any = criterion
        distill: Any = partial(selective_distillation_loss, criterion=chosen, backend=backend)
        step = Step.of(distill, distill, dec, labels.enc_labels, labels.boundary)
        step.num_bytes = 2 * map_bytes + 9 * patches
    elif kind in ("labels", "pseudo-labels"):
        # without merging, these are hard labels and regions alone
        threshold = None if kind == "labels" else MERGE_THRESHOLD
        find: Any = partial(pseudo_labels, merge_threshold=threshold, backend=backend)
        step = Step.of(find, find, enc.detach(), dec.detach())
        # two planes of labels in int64 and two regions in bytes
        step.num_bytes = 2 * map_bytes + 2 * 8 * patches + 2 * patches
    else:
        loss = ssync_criterion(name, criterion=criterion or "mse")
        step = Step.of(loss, partial(_by_definition, criterion=criterion or "mse"), enc, dec)
        step.num_bytes = STEP_PASSES * map_bytes
    return step


def _by_definition(enc: Tensor, dec: Tensor, criterion: Any) -> Tensor:
    terms = reference_ssync(enc.float(), dec.float(), merge_threshold=MERGE_THRESHOLD, criterion=criterion)
    return terms.boundary + terms.interior


def _yardstick(case: str, inputs: Inputs) -> Step:
    """Make a copy that no cache helps, or the exponentials of both maps."""
    if case == COPY:
        source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=inputs.device)
        target = torch.empty_like(source)
        return Step(lambda: target.copy_(source), lambda: source, num_bytes=2 * COPY_BYTES)
    maps = [one.detach() for one in inputs.maps]
    space = torch.empty_like(maps[0])

    def exponentials() -> None:
        for one in maps:
            torch.exp(one, out=space)

    return Step(exponentials, lambda: space)
