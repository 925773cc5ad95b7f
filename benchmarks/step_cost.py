"""What one SSync step costs on this machine, in units of ``torch.exp`` over both maps.

Run ``python -m benchmarks.step_cost``. A step is the forward and the backward to both logit gradients, one
thread, float32, at the shape of MOVi-C training clips (T=4, S=11, 24x24 patches). The exponentials of both maps
are the least work the loss can do, so the ratio carries over from machine to machine better than milliseconds.
Steps and exponentials are timed in turn; medians are shown, and the quartiles of the ratio. ``--out`` writes the
rows as JSON with the machine, the versions and the commit.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from ssync_loss import SSyncLoss

NUM_FRAMES, NUM_SLOTS, HEIGHT, WIDTH = 4, 11, 24, 24


def moving_blobs(num_clips: int) -> tuple[Tensor, Tensor]:
    """Return an encoder and a decoder map (B, T, S, H, W): drifting blobs, every third slot redundant."""
    generator = torch.Generator().manual_seed(0)
    center = torch.rand(num_clips, 1, NUM_SLOTS, 1, 1, 2, generator=generator)
    center[:, :, 1::3] = center[:, :, 0::3]
    drift = 0.01 * torch.arange(NUM_FRAMES).view(1, NUM_FRAMES, 1, 1, 1)
    down = center[..., 0] + drift - torch.linspace(0, 1, HEIGHT).view(HEIGHT, 1)
    across = center[..., 1] - torch.linspace(0, 1, WIDTH)
    near = -20 * (down.square() + across.square())
    noise = torch.randn(2, *near.shape, generator=generator)
    return near + 0.5 * noise[0], near + 0.2 * noise[1]


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(num_clips: int, *, repeats: int) -> dict[str, Any]:
    """Time steps and exponentials in turn."""
    enc, dec = (one.requires_grad_() for one in moving_blobs(num_clips))
    memory = torch.empty_like(enc, requires_grad=False)
    criterion = SSyncLoss(merge_threshold=0.7)

    def exponentials() -> None:
        for one in (enc, dec):
            torch.exp(one.detach(), out=memory)

    def step() -> None:
        enc.grad = dec.grad = None
        torch.autograd.backward(criterion(enc, dec))

    for _ in range(3):
        exponentials()
        step()
    pairs = [(seconds(exponentials), seconds(step)) for _ in range(repeats)]
    ratios = [cost / unit for unit, cost in pairs]
    low, middle, high = quantiles(ratios, n=4)
    return {
        "clips": num_clips,
        "exp_ms": round(1e3 * median(unit for unit, _ in pairs), 3),
        "step_ms": round(1e3 * median(cost for _, cost in pairs), 3),
        "ratio": round(middle, 2),
        "ratio_quartiles": [round(low, 2), round(high, 2)],
        "repeats": repeats,
    }


def environment() -> dict[str, Any]:
    """Return what a number must travel with."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "machine": processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git.stdout.strip() or "unknown",
        "date": date.today().isoformat(),
    }


def processor_name() -> str:
    """Return the processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, nargs="+", default=[4, 64], help="batch sizes")
    parser.add_argument("--repeats", type=int, default=40, help="timed steps of each")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(num_clips, repeats=options.repeats) for num_clips in options.clips]
    print(f"{'clips':>6} {'exp ms':>8} {'step ms':>8} {'step / exp':>11}")
    for row in rows:
        low, high = row["ratio_quartiles"]
        print(f"{row['clips']:>6} {row['exp_ms']:>8} {row['step_ms']:>8} {row['ratio']:>11} ({low} to {high})")
    if options.out:
        options.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
