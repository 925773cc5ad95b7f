"""The measurements of steps on the same inputs: losses are compared, time is taken in turn, the rest is counted."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from examples.inputs import Inputs, Step

from benchmarks.add_ons import BY_NAME, CHANNELS
from benchmarks.contenders import (
    COMPILED,
    COPY,
    COPY_BYTES,
    EXP,
    REPLAY,
    STEP,
    TORCH,
    TWO_THREADS,
    base_of,
    name_of,
    step_of,
)
from benchmarks.counted import count, peak_memory
from benchmarks.plan import Options, attempt
from benchmarks.results import Key, Row, Spread, Values
from benchmarks.timing import Work, clock_of, interleave, over

# multiples of the budget of a job
BUDGETS = {"kernels": 4, "add_ons": 2}
# losses add millions of patches in different orders
LOSS_RTOL = 1e-4


def measure(keys: Sequence[Key], options: Options) -> list[Row]:
    """Measure the steps of all keys, which share a shape; return their rows."""
    inputs = Inputs({"D": CHANNELS, **keys[0].sizes}, options.device, dtype=keys[0].dtype)
    rows: dict[Key, Row] = {}
    steps: dict[Key, tuple[Step, Callable[[], object]]] = {}
    losses: dict[Key, float] = {}
    for key in keys:
        status, note, checked = attempt(_checked, key, name_of(options.backends[0]), inputs, losses)
        rows[key] = Row(key, status, note)
        if checked is not None:
            steps[key] = checked
    together = attempt(times, steps, options).value
    for key, one in steps.items():
        # where a contender fails in its turn, the others are timed alone
        status, note, timed = attempt(times, {key: one}, options) if together is None else ("measured", "", together)
        rows[key] = Row(key, status, note)
        if timed is not None:
            status, note, counted = attempt(counts, key, one[0], options.device)
            rows[key] = Row(key, status, note, {**timed[key], **counted} if counted is not None else {})
    return list(rows.values())


def _checked(key: Key, first: str, inputs: Inputs, losses: dict[Key, float]) -> tuple[Step, Callable[[], object]]:
    """Take a first step; return it and the call to time.

    Its loss must be that of the contender that computes the same: the gate sees no large size.
    """
    # the case of another suite is an axis
    step = step_of(key.case if key.suite == "kernels" else STEP, key.contender, inputs)
    step.prepare()
    loss = step.once()[0]
    if step.leaves and loss is not None and loss.ndim == 0 and key.dtype == "float32":
        losses[key] = loss.item()
        twin = BY_NAME[key.contender].twin if key.contender in BY_NAME else first
        expected = losses.get(key._replace(contender=twin), losses[key])
        if abs(losses[key] - expected) > LOSS_RTOL * abs(expected):
            raise AssertionError(f"the loss is {losses[key]:.8g}, and {expected:.8g} by {twin}")
    return step, _call(key, step)


def counts(key: Key, step: Step, device: str) -> Values:
    """Count the bytes of a step; of an operation of SSync, launches and host reads, too."""
    if key.contender.endswith((TWO_THREADS, REPLAY)):
        return {}
    step.prepare()
    values: dict[str, float] = {**peak_memory(step.once, device)}
    if key.suite != "kernels" or key.contender == TORCH:
        return values
    if step.leaves:
        one_map = step.leaves[0].numel() * step.leaves[0].element_size()
        grads, waiting = len(step.leaves), peak_memory(step.forward, device)["kept"]
        values["maps_beyond_gradients"] = round(values["allocated"] / one_map - grads, 4)
        values["maps_waiting"] = round(waiting / one_map - grads, 4)
    # on a CPU no operator of compiled code can be counted
    countable = device == "cuda" or not key.contender.endswith(COMPILED)
    return {**values, **count(step.once, device)} if countable else values


def times(steps: dict[Key, tuple[Step, Callable[[], object]]], options: Options) -> dict[Key, Values]:
    """Time the calls of steps in turn. Ratios are taken within a round."""
    works = {(key, "step"): Work(call, step.before) for key, (step, call) in steps.items()}
    for key, (step, _) in steps.items():
        if key.suite == "kernels" and step.leaves and key.contender == base_of(key.contender):
            works[key, "forward"] = Work(step.forward)
    budget = options.budget * max((BUDGETS.get(key.suite, 1) for key in steps), default=1)
    rounds = interleave(works, clock_of(options.device), budget)
    return {key: _values(key, step, rounds, options) for key, (step, _) in steps.items()}


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
        # 1 is the speed of the copy
        values["over_floor"] = over(own, copy, 2 * COPY_BYTES / step.num_bytes)
        values["over_exp"] = over(own, exp)
    if key.contender.endswith(TWO_THREADS) and one_thread:
        values["speedup"] = over(one_thread, own)
    return values


def _call(key: Key, step: Step) -> Callable[[], object]:
    if key.contender.endswith(TWO_THREADS):
        return partial(on_two_threads, step.once)
    return _replay(step) if key.contender.endswith(REPLAY) else step.once


def on_two_threads(call: Callable[[], Any]) -> None:
    """Give torch two threads during a call."""
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
        # the gradients lie in the graph's memory
        step.once()
    return graph.replay
