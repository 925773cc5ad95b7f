"""The counts of a step: bytes beyond its inputs, launches, and host reads."""

import ctypes
import gc
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operators that ask a device for a number
HOST_READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")
# without this, torch 2.11 warns that a cycle loses events
recorder = partial(profile, acc_events=True)


def peak_memory(work: Callable[[], object], device: str) -> dict[str, int]:
    """Run a piece of work once; return the bytes that it held beyond its inputs, with what it returns.

    ``allocated`` is the peak of torch's allocator, ``kept`` is its end. ``resident``, on a CPU, is the growth of the
    process at its peak, in bytes. It has the memory of the profiler, and of operators that go past the allocator.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = work()
        torch.cuda.synchronize()
        on_gpu = {"allocated": torch.cuda.max_memory_allocated(), "kept": torch.cuda.memory_allocated()}
        del kept
        return {name: value - before for name, value in on_gpu.items()}
    # the first profiler takes memory of its own
    with recorder(activities=[ProfilerActivity.CPU], profile_memory=True):
        pass
    resident = []
    with recorder(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        # memory that malloc kept would hide what this step takes
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            # reset the peak of the process, if the system allows it
            Path("/proc/self/clear_refs").write_text("5")
            resident.append(_resident("smaps_rollup", "Rss"))
        kept = work()
        resident.append(_resident("status", "VmHWM"))
    del kept
    kineto: Any = record.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    now = list(accumulate((event.nbytes() for event in events), initial=0))
    values = {"allocated": max(now), "kept": now[-1]}
    return values | ({"resident": max(resident[1] - resident[0], 0)} if len(resident) == 2 else {})


def _resident(file: str, name: str) -> int:
    lines = (Path("/proc/self") / file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Operators(TorchDispatchMode):
    """Records the operators of a piece of work, and the bytes of their arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [one for one in tree_leaves(args) if isinstance(one, Tensor)]
        self.calls.append((func, sum(one.numel() * one.element_size() for one in tensors)))
        return func(*args, **(kwargs or {}))


def count(work: Callable[[], object], device: str) -> dict[str, int]:
    """Count launches and host reads of a warm piece of work. On a CPU, an operator that is no view is a launch."""
    work()
    if device == "cuda":
        return _count_on_gpu(work)
    with Operators() as record:
        work()
    launches = sum(not func.is_view for func, _ in record.calls)
    return {"launches": launches, "host_reads": sum(func._schema.name in HOST_READS for func, _ in record.calls)}


def _count_on_gpu(work: Callable[[], object]) -> dict[str, int]:
    """Count the kernels, copies and memory sets that the device records, and the warnings of synchronization."""
    # the second call may warn about the maps of the first
    work()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with recorder(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        work()
        torch.cuda.synchronize()
    events = [one for one in record.events() or [] if one.device_type.name == "CUDA"]
    return {
        "launches": sum(not one.is_user_annotation for one in events),
        "host_reads": sum("synchronizing" in str(one.message) for one in caught),
    }
