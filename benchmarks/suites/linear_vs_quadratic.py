"""SSync against dense alignment as a clip, or a batch, grows: time, memory, and where each has to stop."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.contenders import (
    CONTENDERS,
    DENSE,
    DENSE_CHUNKED,
    DENSE_WINDOWS,
    PARTS,
    Contender,
    loss_and_leaves,
    run_once,
    ssync_contender,
    step_of,
)
from benchmarks.memory import peak_memory
from benchmarks.results import Results, values_to_json
from benchmarks.session import Options, Task
from benchmarks.suites.sweep import Growth
from benchmarks.timing import clock_of, interleave

SUITE = "linear_vs_quadratic"
MODULE = "benchmarks.suites.linear_vs_quadratic"
NUM_SLOTS = 11
DTYPE = "float32"


class Sweep(NamedTuple):
    """One axis that grows.

    Attributes:
        name: of the axis.
        shapes: from small to large.
    """

    name: str
    shapes: list[dict[str, int]]


def sweeps(options: Options) -> list[Sweep]:
    """Return the three sweeps: frames of 16 to 65,536 patches, clips of 4 frames and more, 1 clip and more.

    A GPU takes larger clips, as it takes them to keep it busy.
    """
    spatial = [_shape(1, 16, *_grid(size // 16)) for size in _ladder(options, 256, 2)]
    temporal = [_shape(1, size // 256, 16, 16) for size in _ladder(options, 1024, 4)]
    clips = [_shape(size // 1024, 4, 16, 16) for size in _ladder(options, 1024, 4)]
    return [Sweep("H*W", spatial), Sweep("T", temporal), Sweep("B", clips)]


def _ladder(options: Options, first: int, quick_step: int) -> list[int]:
    """Return powers of two of patches: few for a rehearsal, and every second on a GPU where no fit needs the others."""
    powers = range(first.bit_length() - 1, 25 if options.device == "cuda" else 21)
    if options.quick:
        return [1 << k for k in powers[::quick_step]]
    if options.device == "cuda":
        return [1 << k for k in powers if k % 2 == 0 or 12 <= k <= 16 or k >= 20]
    return [1 << k for k in powers]


def contenders(options: Options, sweep: str, shape: dict[str, int]) -> list[Contender]:
    """Return who takes part at a size; the first is what the others are compared with.

    Windows are linear in time, dense alignment in clips: there, larger sizes than these say nothing new.
    """
    chosen = [ssync_contender(backend) for backend in options.backends]
    if sweep != "B" or shape["B"] <= 64:
        chosen += [DENSE, DENSE_CHUNKED]
    if sweep == "H*W" or (sweep == "T" and shape["T"] <= 512):
        chosen += DENSE_WINDOWS
    return chosen


def num_patches(shape: Mapping[str, int]) -> int:
    """Count the patches of a batch."""
    return shape["B"] * shape["T"] * shape["H"] * shape["W"]


def plan(options: Options) -> list[Task]:
    """Plan a task for every size of every sweep."""
    return [
        GROWTH.task(
            sweep.name,
            shape,
            [one.name for one in contenders(options, sweep.name, shape)],
            # a rehearsal asks for it in one sweep only
            usual_allocator=options.device == "cpu" and (sweep.name == "H*W" or not options.quick),
        )
        for sweep in sweeps(options)
        for shape in sweep.shapes
    ]


def contenders_of(options: Options) -> list[Contender]:
    """Return everyone who takes part somewhere, in order."""
    everyone = {
        one.name: one
        for sweep in sweeps(options)
        for shape in sweep.shapes
        for one in contenders(options, sweep.name, shape)
    }
    return [one for name, one in CONTENDERS.items() if name in everyone]


def history(results: Results, sweep: str, contender: Contender, measure: str, value: str) -> list[tuple[int, float]]:
    """Return what was measured of a contender in a sweep: (patches, value), from small to large."""
    return GROWTH.history(results, sweep, contender.name, measure, value)


def _computes_the_same(one: str, other: str) -> bool:
    first, second = CONTENDERS[one], CONTENDERS[other]
    return (first.backend is None, first.group_frames) == (second.backend is None, second.group_frames)


GROWTH = Growth(
    SUITE,
    MODULE,
    DTYPE,
    size_of=lambda _, shape: num_patches(shape),
    unit=lambda _: "patches",
    same=_computes_the_same,
)


def _shape(clips: int, frames: int, height: int, width: int) -> dict[str, int]:
    return {"B": clips, "T": frames, "S": NUM_SLOTS, "H": height, "W": width}


def _grid(patches: int) -> tuple[int, int]:
    """Return the most square grid of a power of two of patches."""
    height = 1 << (patches.bit_length() - 1) // 2
    return height, patches // height


def measure_memory(contender: str, shape: dict[str, int], device: str) -> dict[str, Any]:
    """Measure the peak of one step, in this process."""
    forward, leaves = loss_and_leaves(CONTENDERS[contender], shape, dtype=getattr(torch, DTYPE), device=device)
    losses: list[Tensor] = []

    def step() -> object:
        loss, *grads = run_once(forward, leaves)
        losses.append(loss)
        return grads

    return values_to_json(peak_memory(step, device) | {"loss": losses[0].item()})


def measure_times(contenders: list[str], shape: dict[str, int], device: str, budget: float) -> dict[str, Any]:
    """Time forward and backward of all in turn; the first is what ratios are taken to."""
    works = {}
    for name in contenders:
        works[name] = step_of(*loss_and_leaves(CONTENDERS[name], shape, dtype=getattr(torch, DTYPE), device=device))
    samples = interleave(works, clock_of(device), budget=budget)
    base = samples[contenders[0]]
    return {name: values_to_json({**one.values(PARTS), "ratio": one.over(base)}) for name, one in samples.items()}
