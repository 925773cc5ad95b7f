"""What the loss adds to a run on many GPUs, counted and not measured: ``python -m benchmarks.in_a_run``.

One rank of a group that is only pretended takes a step. The lines go into benchmarks/README.md, between their markers.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

# before Triton is imported
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.distributed as dist
from examples.files import write_text
from examples.markdown import between
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.counted import Operators, peak_memory
from benchmarks.inputs import Inputs
from benchmarks.report import HERE
from benchmarks.slot_video_model import PUBLISHED, published_model
from ssync_loss import AdaptiveSSyncLoss, SSyncLoss
from ssync_loss.distributed import global_mean
from ssync_loss.ssync.engines.triton import _launch

MARKERS = ("<!-- counted: python -m benchmarks.in_a_run -->", "<!-- end of counted -->")
RANKS = (8, 1000)
# of one rank: the published batch over 8
SHAPE = {"B": 8, "T": 4, "S": 11, "H": 24, "W": 24, "D": 64}
SMALL = {"B": 1, "T": 2, "S": 4, "H": 4, "W": 4, "D": 4}


def forms(inputs: Inputs, backend: Any) -> dict[str, Callable[[], Tensor]]:
    """Return the forms of the loss on some inputs."""
    settings: dict[str, Any] = {"merge_threshold": 0.7, "backend": backend}
    plain, adaptive = SSyncLoss(**settings), AdaptiveSSyncLoss(SSyncLoss(**settings))
    maps = inputs.maps
    return {
        "SSyncLoss": lambda: plain(*maps),
        "global_mean": lambda: global_mean(plain, *maps),
        "AdaptiveSSyncLoss": lambda: adaptive(*maps, inputs.features.anchors),
    }


def collectives(num_ranks: int) -> dict[str, list[tuple[str, int]]]:
    """Count the collectives of a step of one rank among so many, forward and backward: names and bytes."""
    inputs, found = Inputs(SMALL), {}
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        for name, form in forms(inputs, "torch").items():
            with Operators() as record:
                torch.autograd.grad(form(), inputs.maps)
            handed_over = [one for one in record.calls if one[0].namespace in ("c10d", "_c10d_functional")]
            found[name] = [(func.__name__.partition("_.")[0], num_bytes) for func, num_bytes in handed_over]
    finally:
        dist.destroy_process_group()
    return found


def launches() -> int:
    """Count the kernels of a step, as they are launched."""
    inputs = Inputs(SMALL, "cuda" if torch.cuda.is_available() else "cpu")
    with patch.object(_launch, "launch", wraps=_launch.launch) as launch:
        torch.autograd.grad(forms(inputs, "triton")["SSyncLoss"](), inputs.maps)
    return launch.call_count


def held(name: str) -> int:
    """Count the bytes that a step of one rank holds at its peak beyond its inputs, both gradients included."""
    inputs = Inputs(SHAPE)
    form = forms(inputs, "cpu")[name]
    # what the first step alone takes is no part of it
    torch.autograd.grad(form(), inputs.maps)
    return peak_memory(lambda: torch.autograd.grad(form(), inputs.maps), "cpu")["allocated"]


def lines() -> str:
    """Say it, line by line."""
    own = PUBLISHED["MOVi-C"]
    model = published_model(own["S"], own["H"] * own["W"], own["D"])
    gradients = sum(4 * one.numel() for one in model.parameters())
    said = [
        f"Each rank has {SHAPE['B']} clips of {SHAPE['T']} frames, {SHAPE['S']} slots, {SHAPE['H']}x{SHAPE['W']} "
        f"patches and {SHAPE['D']} channels in float32; the model's gradients are {gradients / 1e6:.1f} MB."
    ]
    for num_ranks in RANKS:
        for name, calls in collectives(num_ranks).items():
            # a ring sends every byte to all but one, and back
            sent = 2 * (num_ranks - 1) / num_ranks
            what = [f"one {call} of {size} bytes, {size * sent:.0f} sent by a rank in a ring" for call, size in calls]
            said.append(f"{num_ranks:,} GPUs, `{name}`: {', '.join(what) or 'no collective'}.")
    said.append(f"Kernel launches, by Triton: {launches()}.")
    for name in ("SSyncLoss", "AdaptiveSSyncLoss"):
        said.append(f"`{name}` holds {held(name) / 1e6:.1f} MB at its peak, both gradients included.")
    return "\n".join(f"- {one}" for one in said)


def main(readme: Path = HERE / "README.md") -> int:
    """Write the lines into the page."""
    write_text(readme, between(readme.read_text(encoding="utf-8"), lines(), str(readme), MARKERS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
