"""Launches and host reads of a piece of work, counted and not timed."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.results import Value

# what asks a device for a number
HOST_READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")


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


def count(work: Callable[[], object], device: str) -> dict[str, Value]:
    """Count once; on a CPU an operator stands for the launch that it would be."""
    if device == "cuda":
        return _count_on_gpu(work)
    with OperatorCount() as counts:
        work()
    return {"launches": counts.launches, "host_reads": counts.host_reads}


def _count_on_gpu(work: Callable[[], object]) -> dict[str, Value]:
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
