"""What is measured of steps, in whatever process it is asked for: memory, counts, and time in turn."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.add_ons import CHANNELS
from benchmarks.contenders import COMPILED, COPY, COPY_BYTES, EXP, REPLAY, TORCH, TWO_THREADS, base_of, name_of, step_of
from benchmarks.counted import count, peak_memory
from benchmarks.inputs import Inputs, Step
from benchmarks.plan import Options
from benchmarks.results import Key, Spread, Values
from benchmarks.timing import Work, clock_of, interleave, over

# so many times the seconds of a session for everyone together
BUDGETS = {"kernels": 4, "add_ons": 2}


def steps_of(keys: Sequence[Key], options: Options) -> dict[Key, Step]:
    """Make steps on the same inputs."""
    inputs = Inputs({"D": CHANNELS, **keys[0].sizes}, options.device, dtype=keys[0].dtype)
    return {key: step_of(key.case, key.contender, inputs) for key in keys}


def memory(keys: Sequence[Key], options: Options) -> list[Values]:
    """Measure the peak of a step, of one contender; keep the value of a loss, and in maps what its backward adds."""
    ((key, step),) = steps_of(keys, options).items()
    # what the first step alone takes is no part of it
    step.prepare()
    first = step.once()[0]
    values: dict[str, float] = {}
    if step.leaves and first is not None and first.ndim == 0:
        values["loss"] = first.item()
    del first
    step.prepare()
    values |= peak_memory(step.once, options.device)
    if key.suite == "kernels":
        one_map = step.leaves[0].numel() * step.leaves[0].element_size()
        waiting = peak_memory(step.forward, options.device)["kept"]
        values["maps_beyond_gradients"] = round(values["allocated"] / one_map - 2, 4)
        values["maps_waiting"] = round(waiting / one_map - 2, 4)
    return [values]


def counts(keys: Sequence[Key], options: Options) -> list[Values]:
    """Count the launches and host reads of steps."""
    return [count(step.once, options.device) for step in steps_of(keys, options).values()]


def times(keys: Sequence[Key], options: Options) -> list[Values]:
    """Time steps in turn; ratios are formed within a round, to those who take part."""
    steps = steps_of(keys, options)
    works = {(key, "step"): Work(_call(key, step), step.before) for key, step in steps.items()}
    if keys[0].suite == "kernels":
        plain = {key: step for key, step in steps.items() if step.leaves and key.contender == base_of(key.contender)}
        works |= {(key, "forward"): Work(step.forward) for key, step in plain.items()}
    rounds = interleave(works, clock_of(options.device), options.budget * BUDGETS.get(keys[0].suite, 1))
    return [_values(key, step, rounds, options) for key, step in steps.items()]


def _values(key: Key, step: Step, rounds: dict[tuple[Key, str], list[float]], options: Options) -> Values:
    def of(contender: str, case: str = key.case) -> list[float] | None:
        return rounds.get((key._replace(contender=contender, case=case), "step"))

    own = rounds[key, "step"]
    values = {part: Spread.of(rounds[key, part]) for part in ("step", "forward") if (key, part) in rounds}
    first, one_thread = of(name_of(options.backends[0])), of(base_of(key.contender))
    copy, exp = of(TORCH, COPY), of(TORCH, EXP)
    if key.suite != "kernels" and first is not None:
        values["ratio"] = over(own, first)
    if copy and exp and key.contender != TORCH:
        # moving the bytes at the speed of the copy is 1
        values["over_floor"] = over(own, copy, 2 * COPY_BYTES / step.num_bytes)
        values["over_exp"] = over(own, exp)
    if key.contender.endswith(TWO_THREADS) and one_thread:
        values["speedup"] = over(one_thread, own)
    return values


def _call(key: Key, step: Step) -> Callable[[], object]:
    if key.contender.endswith(TWO_THREADS):
        return partial(on_two_threads, step.once)
    if key.contender.endswith(COMPILED):
        # compiling is no part of it
        step.once()
    return _replay(step) if key.contender.endswith(REPLAY) else step.once


def on_two_threads(call: Callable[[], Any]) -> None:
    """Let a call have two threads while it runs."""
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        call()
    finally:
        torch.set_num_threads(usual)


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
