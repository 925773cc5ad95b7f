"""The first step of a process, for which the engine has to be compiled: prints its seconds, without torch's import."""

import time

import torch
from examples.inputs import moving_blobs


def main() -> None:
    """Import the package, and take a step by what ``"auto"`` takes."""
    maps = moving_blobs({"B": 4, "T": 4, "S": 11, "H": 24, "W": 24})
    start = time.perf_counter()
    from ssync_loss import SSyncLoss

    torch.autograd.grad(SSyncLoss(merge_threshold=0.7)(*maps), maps)
    seconds = time.perf_counter() - start
    # an error where that was not the engine
    SSyncLoss(backend="cpu")(*maps)
    print(seconds)


if __name__ == "__main__":
    main()
