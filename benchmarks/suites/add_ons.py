"""What the neighboring methods cost as what they go by grows, beside SSync on clips of the same shape."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from benchmarks.add_ons import ADD_ONS, BY_NAME, WIDTH, AddOn, Inputs, Step
from benchmarks.contenders import CONTENDERS, PARTS, loss_and_leaves, ssync_contender
from benchmarks.memory import peak_memory
from benchmarks.results import Value, values_to_json
from benchmarks.session import Options, Task
from benchmarks.suites.sweep import Growth
from benchmarks.timing import Work, clock_of, interleave

SUITE = "add_ons"
MODULE = "benchmarks.suites.add_ons"
DTYPE = "float32"
# frames of MOVi-C, features that a CPU can take; every sweep goes through this shape
REFERENCE: dict[str, int] = {"B": 2, "T": 4, "S": 11, "H": 24, "W": 24, "D": 64, "Kp": 4096, "weights": 64 * WIDTH**2}
# what is quadratic says all that it has to say before
LONGEST_STEP = 2.0
UNITS = {"H*W": "patches a frame", "S": "slots", "Kp": "prototypes", "weights": "weights"}


def sizes(axis: str, *, quick: bool) -> list[int]:
    """Return the sizes of an axis, around that of the reference; a rehearsal takes two.

    >>> sizes("H*W", quick=False)
    [72, 144, 288, 576, 1152, 2304, 4608, 9216, 18432, 36864]
    """
    down, up = {"H*W": (3, 6), "S": (0, 5), "Kp": (2, 4), "weights": (2, 4)}[axis]
    middle = size_of(axis, REFERENCE)
    # where none is smaller, a larger one
    powers = (-1, 0) if quick and down else (0, 1) if quick else range(-down, up + 1)
    return [middle << power if power > 0 else middle >> -power for power in powers]


def size_of(axis: str, shape: Mapping[str, int]) -> int:
    """Return how large a shape is along an axis."""
    return prod(shape[one] for one in axis.split("*"))


def shape_of(axis: str, size: int) -> dict[str, int]:
    """Return the shape of a size along an axis, and of the reference otherwise.

    >>> shape = shape_of("H*W", 1152)
    >>> shape["H"], shape["W"], shape["T"]
    (24, 48, 4)
    """
    if axis != "H*W":
        return REFERENCE | {axis: size}
    height = REFERENCE["H"]
    while height**2 > size:
        height //= 2
    while (2 * height) ** 2 <= size:
        height *= 2
    return REFERENCE | {"H": height, "W": size // height}


def add_ons_of(options: Options) -> list[AddOn]:
    """Return those that can be had on a device."""
    return [one for one in ADD_ONS if options.device == "cpu" or not one.cpu_only]


def _same_value(one: str, other: str) -> bool:
    if one == other or one not in BY_NAME or other not in BY_NAME:
        return one == other
    return bool(BY_NAME[one].value) and BY_NAME[one].value == BY_NAME[other].value


GROWTH = Growth(
    SUITE,
    MODULE,
    DTYPE,
    size_of=size_of,
    unit=lambda axis: UNITS[axis],
    same=_same_value,
    longest_step=LONGEST_STEP,
    budgets=2.0,
)


def plan(options: Options) -> list[Task]:
    """Plan a task for every size of every axis, SSync first."""
    tasks = []
    for axis in UNITS:
        names = [one.name for one in add_ons_of(options) if one.axis == axis]
        for size in sizes(axis, quick=options.quick):
            contenders = [ssync_contender(options.backends[0]).name, *names]
            tasks.append(GROWTH.task(axis, shape_of(axis, size), contenders))
    return tasks


def step(contender: str, inputs: Inputs) -> Step:
    """Make a step of an add-on, or of SSync, which has been compared with its definition elsewhere."""
    if contender in BY_NAME:
        return BY_NAME[contender].step(inputs)
    forward, leaves = loss_and_leaves(
        CONTENDERS[contender], inputs.size, dtype=getattr(torch, DTYPE), device=inputs.device
    )
    return Step(forward, forward, leaves)


def work_of(one: Step) -> Work:
    """Return a call that marks its start, the end of the forward and, if there is one, the end of the backward."""
    incoming = one.incoming

    def work(mark: Callable[[], Any]) -> list[Any]:
        nonlocal incoming
        one.before()
        marks = [mark()]
        outputs = one.forward()
        marks.append(mark())
        if one.leaves:
            # at hand from the first call on, as it is where a loss is one of a sum
            incoming = incoming or (torch.ones_like(outputs),)
            torch.autograd.grad(outputs, one.leaves, incoming)
            marks.append(mark())
        return marks

    return work


def measure_memory(contender: str, shape: dict[str, int], device: str) -> dict[str, Any]:
    """Measure the peak of one step, in this process."""
    one = step(contender, Inputs(shape, device))
    found: list[Any] = []

    def once() -> object:
        one.before()
        outputs = one.forward()
        found.append(outputs.detach() if isinstance(outputs, Tensor) and one.leaves else None)
        return torch.autograd.grad(outputs, one.leaves, one.incoming or None) if one.leaves else outputs

    values: dict[str, Value] = {**peak_memory(once, device)}
    if isinstance(found[0], Tensor) and found[0].ndim == 0:
        values["loss"] = found[0].item()
    return values_to_json(values)


def measure_times(contenders: list[str], shape: dict[str, int], device: str, budget: float) -> dict[str, Any]:
    """Time forward and backward of all in turn; the first is what ratios are taken to."""
    inputs = Inputs(shape, device)
    steps = {name: step(name, inputs) for name in contenders}
    samples = interleave({name: work_of(one) for name, one in steps.items()}, clock_of(device), budget=budget)
    base = samples[contenders[0]]
    parts = {name: PARTS if one.leaves else PARTS[:1] for name, one in steps.items()}
    return {name: values_to_json({**one.values(parts[name]), "ratio": one.over(base)}) for name, one in samples.items()}
