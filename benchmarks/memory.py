"""How much memory a step takes beyond its inputs: counted to the byte, and as the system sees it."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

SMAPS = Path("/proc/self/smaps_rollup")
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_memory(work: Callable[[], object], device: str) -> dict[str, int]:
    """Run a piece of work once; return the bytes it held at its peak, with what it returns and without its inputs.

    ``allocated`` is the sum of what the allocator of torch handed out and had not got back, at its largest: on a
    CPU from the events of every allocation, on a GPU the allocator's own count. It is exact, the same in every
    run, and knows nothing of pages. ``resident``, on a CPU and where the system tells it, is the growth of the
    process at its peak: it is what a machine has to have, but it comes in pages, holds the profiler's and the
    interpreter's own too, and says nothing below a few MB. ``kept`` is what the allocator has not got back at the end,
    with what the work returns. Memory that an operator takes past the allocator of torch is in ``resident`` alone.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = work()
        torch.cuda.synchronize()
        held = {"allocated": torch.cuda.max_memory_allocated(), "kept": torch.cuda.memory_allocated()}
        del kept
        return {name: value - before for name, value in held.items()}
    # starting the first one takes memory that is not the work's
    with recorder():
        pass
    resident_before = _reset_resident_peak()
    with recorder() as record:
        kept = work()
        resident_peak = _field(STATUS, "VmHWM")
    del kept
    largest, last = _allocated(record)
    values = {"allocated": largest, "kept": last}
    if resident_before is not None and resident_peak is not None:
        values["resident"] = max(resident_peak - resident_before, 0)
    return values


def recorder() -> profile:
    """Return a recorder of every allocation on the CPU."""
    # or torch 2.11 warns that the events of a cycle are forgotten after it
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)


def _allocated(record: profile) -> tuple[int, int]:
    """Return how many bytes were held at the peak, and how many at the end."""
    kineto = record.profiler
    if kineto is None or kineto.kineto_results is None:
        raise RuntimeError("the profiler recorded nothing")
    # torch types these events without their bytes
    events: list[Any] = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now


def _reset_resident_peak() -> int | None:
    """Forget the peak of the process; return how large it is now, or None where the system does not say."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return None
    return _field(SMAPS, "Rss")


def _field(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
