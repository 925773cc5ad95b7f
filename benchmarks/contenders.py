"""Who is measured, by name: SSync by each of its backends and in other ways, and a step of anyone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.add_ons import BY_NAME
from benchmarks.inputs import Inputs, Step
from ssync_loss import SSyncLoss, testing
from ssync_loss.functional import pseudo_labels, selective_distillation_loss

# everything that could be measured, the fastest first; "reference" is what the gate compares with
BACKENDS = ("cpu", "triton", "torch")
# what backend="auto" takes on a device where it can
AUTO = {"cpu": "cpu", "cuda": "triton"}
MERGE_THRESHOLD = 0.7
COMPILED = " compiled"
STEP = "step, mse"
OPERATIONS = (
    "labels",
    "pseudo-labels",
    "distillation, mse",
    "distillation, cross_entropy",
    STEP,
    "step, cross_entropy",
)
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


def ssync_criterion(contender: str, criterion: str = "mse") -> Callable[[Tensor, Tensor], Tensor]:
    """Build the loss of a contender; compiled, it is compiled once for every shape.

    Dynamic shapes would also make the settings symbols, and compile to slower code.
    """
    chosen: dict[str, Any] = {"criterion": criterion, "backend": _backend_of(contender)}
    loss = SSyncLoss(merge_threshold=MERGE_THRESHOLD, **chosen)
    if base_of(contender).endswith(COMPILED):
        compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(loss, fullgraph=True, dynamic=False)
        return compiled
    return loss


def step_of(case: str, contender: str, inputs: Inputs, *, gate: bool = False) -> Step:
    """Make a step of whatever is measured: a method by its name, a yardstick, or an operation of SSync.

    At the gate, the settings of a method are those for which its definition is fast enough.
    """
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
        # without merging, these are hard labels and regions alone
        threshold = None if kind == "labels" else MERGE_THRESHOLD
        find = partial(pseudo_labels, merge_threshold=threshold, backend=_backend_of(name))
        definition = partial(testing.reference_pseudo_labels, merge_threshold=threshold)
        step = Step.of(find, definition, enc.detach(), dec.detach())
        # two planes of labels in int64 and two regions in bytes
        step.num_bytes = 2 * map_bytes + 2 * 8 * patches + 2 * patches
    return step


def _backend_of(contender: str) -> Any:
    return base_of(contender).removesuffix(COMPILED).removeprefix("SSync ")


def _by_definition(enc: Tensor, dec: Tensor, criterion: str) -> Tensor:
    terms = testing.reference_ssync(enc.float(), dec.float(), merge_threshold=MERGE_THRESHOLD, criterion=criterion)
    return terms.boundary + terms.interior


def _yardstick(case: str, inputs: Inputs) -> Step:
    """Make a copy that no cache helps, or the exponentials of both maps."""
    if case == COPY:
        source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=inputs.device)
        target = torch.empty_like(source)
        return Step(lambda: target.copy_(source), lambda: source)
    maps = [one.detach() for one in inputs.maps]
    space = torch.empty_like(maps[0])

    def exponentials() -> None:
        for one in maps:
            torch.exp(one, out=space)

    return Step(exponentials, lambda: space)
