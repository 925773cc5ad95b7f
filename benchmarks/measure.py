"""What is measured of steps, in whatever process it is asked for: memory, counts, and time in turn."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.add_ons import CHANNELS
from benchmarks.contenders import (
    COMPILED,
    COPY,
    COPY_BYTES,
    EXP,
    REPLAY,
    TORCH,
    TWO_THREADS,
    base_of,
    name_of,
    step_of,
)
from benchmarks.counted import count, peak_memory
from benchmarks.inputs import Inputs, Step
from benchmarks.plan import Options
from benchmarks.results import Key, Spread, Values
from benchmarks.timing import Work, clock_of, interleave, over

# so many times the seconds of a session for everyone together
BUDGETS = {"kernels": 4, "add_ons": 2}


def inputs_of(key: Key, options: Options) -> Inputs:
    """Make what a row is measured on."""
    return Inputs({"D": CHANNELS, **key.sizes}, options.device, dtype=key.dtype)


def memory(keys: Sequence[Key], options: Options) -> list[Values]:
    """Measure the peak of a step, of one contender; keep the value of a loss, and in maps what its backward adds."""
    (key,) = keys
    step = step_of(key.case, key.contender, inputs_of(key, options))
    if key.suite == "kernels":
        # what the first step alone takes is no part of it
        step.once()
    step.prepare()
    taken: list[tuple[Any, ...]] = []
    values: dict[str, float] = {**peak_memory(lambda: taken.append(step.once()), options.device)}
    outputs = taken[0][0]
    if step.leaves and outputs is not None and outputs.ndim == 0:
        values["loss"] = outputs.item()
    if key.suite == "kernels":
        taken.clear()
        one_map = step.leaves[0].numel() * step.leaves[0].element_size()
        waiting = peak_memory(step.forward, options.device)["kept"]
        values["maps_beyond_gradients"] = round(values["allocated"] / one_map - 2, 4)
        values["maps_waiting"] = round(waiting / one_map - 2, 4)
    return [values]


def counts(keys: Sequence[Key], options: Options) -> list[Values]:
    """Count the launches and host reads of steps."""
    inputs = inputs_of(keys[0], options)
    return [count(step_of(key.case, key.contender, inputs).once, options.device) for key in keys]


def times(keys: Sequence[Key], options: Options) -> list[Values]:
    """Time steps in turn; ratios are formed within a round, to those who take part."""
    inputs = inputs_of(keys[0], options)
    steps = {key: step_of(key.case, key.contender, inputs) for key in keys}
    works = {(key, "step"): Work(_call(key, step), step.before) for key, step in steps.items()}
    if keys[0].suite == "kernels":
        parts = {(key, "forward"): Work(step.forward) for key, step in steps.items() if step.leaves}
        works |= {part: work for part, work in parts.items() if part[0].contender == base_of(part[0].contender)}
    rounds = interleave(works, clock_of(options.device), options.budget * BUDGETS.get(keys[0].suite, 1))
    return [_values(key, step, rounds, options) for key, step in steps.items()]


def _values(key: Key, step: Step, rounds: dict[tuple[Key, str], list[float]], options: Options) -> Values:
    own = rounds[key, "step"]
    values: dict[str, float | Spread] = {"step": Spread.of(own)}
    if (key, "forward") in rounds:
        values["forward"] = Spread.of(rounds[key, "forward"])
    if key.contender == TORCH:
        return values
    first = rounds.get((key._replace(contender=name_of(options.backends[0])), "step"))
    if first is not None and key.suite != "kernels":
        values["ratio"] = over(own, first)
    copy, exp = (rounds.get((key._replace(case=case, contender=TORCH), "step")) for case in (COPY, EXP))
    if copy is not None and exp is not None:
        # moving the bytes at the speed of the copy is 1
        values["over_floor"] = over(own, copy, 2 * COPY_BYTES / step.num_bytes)
        values["over_exp"] = over(own, exp)
    one_thread = rounds.get((key._replace(contender=base_of(key.contender)), "step"))
    if key.contender.endswith(TWO_THREADS) and one_thread is not None:
        values["speedup"] = over(one_thread, own)
    return values


def _call(key: Key, step: Step) -> Callable[[], object]:
    if key.contender.endswith(TWO_THREADS):
        return on_two_threads(step.once)
    if key.contender.endswith(REPLAY):
        return _replay(step)
    if key.contender.endswith(COMPILED):
        step.once()
    return step.once


def on_two_threads(call: Callable[[], object]) -> Callable[[], object]:
    """Let a call have two threads while it runs."""

    def threaded() -> None:
        usual = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            call()
        finally:
            torch.set_num_threads(usual)

    return threaded


def _replay(step: Step) -> Callable[[], object]:
    """Capture a step as a CUDA graph; return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step.once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # the gradients lie in the graph's own memory
        step.once()
    return graph.replay
