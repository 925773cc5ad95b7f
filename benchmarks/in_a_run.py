"""Count what the loss adds to a run on many GPUs, without any: ``python -m benchmarks.in_a_run``.

One rank of a pretended group takes a step. The lines go into benchmarks/README.md, between their markers.
"""

import os
from unittest.mock import patch

# before Triton is imported
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.distributed as dist
from examples.files import write_text
from examples.inputs import Inputs
from examples.markdown import between
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.counted import Operators, peak_memory
from benchmarks.report import HERE
from benchmarks.suites.training_step import PUBLISHED, published_model
from ssync_loss import AdaptiveSSyncLoss, SSyncLoss
from ssync_loss.distributed import global_mean
from ssync_loss.ssync.engines.triton import _launch

MARKERS = ("<!-- counted: python -m benchmarks.in_a_run -->", "<!-- end of counted -->")
RANKS = (8, 1000)
# a rank of 8 has an eighth of the published batch
SHAPE = {"B": 8, "T": 4, "S": 11, "H": 24, "W": 24, "D": 64}
SMALL = {"B": 1, "T": 2, "S": 4, "H": 4, "W": 4, "D": 4}
FORMS = ("SSyncLoss", "global_mean", "AdaptiveSSyncLoss")


def step(form: str, inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    """Take a step with a form of the loss; return its gradients."""
    criterion = SSyncLoss(merge_threshold=0.7, backend=backend)  # type: ignore[arg-type]
    if form == "global_mean":
        loss = global_mean(criterion, *inputs.maps)
    elif form == "AdaptiveSSyncLoss":
        loss = AdaptiveSSyncLoss(criterion)(*inputs.maps, inputs.features.anchors)
    else:
        loss = criterion(*inputs.maps)
    return torch.autograd.grad(loss, inputs.maps)


def collectives(form: str, num_ranks: int) -> list[tuple[str, int]]:
    """Count the collectives of a step of one rank, forward and backward: names and bytes."""
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        with Operators() as record:
            step(form, Inputs(SMALL), "torch")
    finally:
        dist.destroy_process_group()
    handed_over = [one for one in record.calls if one[0].namespace in ("c10d", "_c10d_functional")]
    return [(func.__name__.partition("_.")[0], num_bytes) for func, num_bytes in handed_over]


def launches() -> int:
    """Count the kernels that a step launches."""
    with patch.object(_launch, "launch", wraps=_launch.launch) as launch:
        step("SSyncLoss", Inputs(SMALL, "cuda" if torch.cuda.is_available() else "cpu"), "triton")
    return launch.call_count


def held(form: str) -> int:
    """Count the bytes that a step of one rank holds at its peak beyond its inputs, with both gradients."""
    inputs = Inputs(SHAPE)
    # the first step alone makes the inputs
    step(form, inputs, "cpu")
    return peak_memory(lambda: step(form, inputs, "cpu"), "cpu")["allocated"]


def lines() -> str:
    """Write all counts, line by line."""
    own = PUBLISHED["MOVi-C"]
    model = published_model(own["S"], own["H"] * own["W"], own["D"])
    gradients = sum(4 * one.numel() for one in model.parameters())
    said = [
        f"Each rank has {SHAPE['B']} clips of {SHAPE['T']} frames, {SHAPE['S']} slots, {SHAPE['H']}x{SHAPE['W']} "
        f"patches and {SHAPE['D']} channels in float32; the model's gradients are {gradients / 1e6:.1f} MB."
    ]
    for num_ranks in RANKS:
        # a ring sends every byte to all but one rank, and back
        ring = 2 * (num_ranks - 1) / num_ranks
        for form in FORMS:
            calls = collectives(form, num_ranks)
            what = [f"one {call} of {size} bytes, {size * ring:.0f} sent by a rank in a ring" for call, size in calls]
            said.append(f"{num_ranks:,} GPUs, `{form}`: {', '.join(what) or 'no collective'}.")
    said.append(f"Kernel launches, by Triton: {launches()}.")
    for form in (FORMS[0], FORMS[2]):
        said.append(f"`{form}` holds {held(form) / 1e6:.1f} MB at its peak, both gradients included.")
    return "\n".join(f"- {one}" for one in said)


if __name__ == "__main__":
    page = HERE / "README.md"
    write_text(page, between(page.read_text(encoding="utf-8"), lines(), str(page), MARKERS))
