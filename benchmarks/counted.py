"""What is counted and not timed: bytes that a step takes beyond its inputs, launches, and host reads."""

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# what asks a device for a number
HOST_READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")


def peak_memory(work: Callable[[], object], device: str) -> dict[str, int]:
    """Run a piece of work once; return the bytes it held at its peak, with what it returns and without its inputs.

    ``allocated`` is the sum of what torch's allocator handed out and had not got back, at its largest: exact, the same
    in every run, and without pages. ``kept`` is what it has not got back at the end, with what the work returns.
    ``resident``, on a CPU and where the system tells it, is the growth of the process at its peak: what a machine has
    to have, but it comes in pages, holds the profiler's and the interpreter's own too, and says nothing below a few
    MB. Memory that an operator takes past torch's allocator is in ``resident`` alone.
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
        resident_peak = _field("status", "VmHWM")
    del kept
    values = _allocated(record)
    if resident_before is not None and resident_peak is not None:
        values["resident"] = max(resident_peak - resident_before, 0)
    return values


def recorder() -> profile:
    """Return a recorder of every allocation on the CPU."""
    # or torch 2.11 warns that the events of a cycle are forgotten after it
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)


def _allocated(record: profile) -> dict[str, int]:
    """Return how many bytes were held at the peak, and how many at the end."""
    kineto: Any = record.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return {"allocated": peak, "kept": now}


def _reset_resident_peak() -> int | None:
    """Forget the peak of the process; return how large it is now, or None where the system does not say."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _field("smaps_rollup", "Rss")


def _field(file: str, name: str) -> int | None:
    path = Path("/proc/self") / file
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


class OperatorCount(TorchDispatchMode):
    """Counts operators that are no views, and those that read data on the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = 0
        self.host_reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches += not func.is_view
        self.host_reads += func._schema.name in HOST_READS
        return func(*args, **(kwargs or {}))


def count(work: Callable[[], object], device: str) -> dict[str, int]:
    """Count launches and host reads once; on a CPU an operator stands for the launch that it would be."""
    if device == "cuda":
        return _count_on_gpu(work)
    with OperatorCount() as counts:
        work()
    return {"launches": counts.launches, "host_reads": counts.host_reads}


def _count_on_gpu(work: Callable[[], object]) -> dict[str, int]:
    """Count kernels, copies and memory sets on the device's own record, and synchronizations by their warnings."""
    work()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    synchronizing = [one for one in caught if "synchronizing" in str(one.message)]
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as record:
        work()
        torch.cuda.synchronize()
    on_device = [one for one in record.events() or [] if one.device_type.name == "CUDA"]
    launches = [one for one in on_device if not one.is_user_annotation]
    return {"launches": len(launches), "host_reads": len(synchronizing)}
