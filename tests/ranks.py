"""Start two processes that communicate over gloo."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

WORLD_SIZE = 2
TESTS = Path(__file__).parent


def run_ranks(script: str, folder: Path) -> list[dict[str, Any]]:
    """Run ``python SCRIPT RANK FOLDER`` for every rank, and return the contents of the files FOLDER/RANK.pt."""
    paths = [str(TESTS.parent / "src"), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    # without this, gloo looks up the machine's name
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(WORLD_SIZE)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output.decode()
    finally:
        # if one process fails, the other waits
        for process in processes:
            process.kill()
            process.communicate()
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


def meet(work: Callable[[int], dict[str, Any]]) -> None:
    """Join the other process, run `work`, and write its result."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=60),
    )
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


@contextmanager
def recorded(*names: str) -> Iterator[list[tuple[str, int, torch.dtype]]]:
    """Record the name, the number of elements and the type of every call of the collectives `names`."""
    calls: list[tuple[str, int, torch.dtype]] = []

    def recording(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append((name, tensor.numel(), tensor.dtype))
            return collective(tensor, *args, **kwargs)

        return call

    recordings: Any = {name: recording(name, getattr(dist, name)) for name in names}
    with mock.patch.multiple(dist, **recordings):
        yield calls
