"""Time SSync and dense alignment on growing frames: python examples/linear_vs_quadratic.py."""

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

from ssync_loss import DenseDecoderAlignmentLoss, DenseEncoderAlignmentLoss, SSyncLoss

SLOTS, DIM = 11, 64
LARGEST = 64  # largest frame for dense alignment; at twice its side, one map of all pairs takes a gigabyte


def ssync(side: int) -> float:
    """Time SSync on two maps of slot logits."""
    criterion = SSyncLoss(merge_threshold=0.7)
    maps = torch.randn(2, 1, 1, SLOTS, side, side).requires_grad_()
    return milliseconds(lambda: criterion(*maps), maps)


def dense(side: int) -> float:
    """Time both terms of dense alignment on features."""
    decoder, encoder = DenseDecoderAlignmentLoss(group_frames=1), DenseEncoderAlignmentLoss(group_frames=1)
    features = torch.randn(2, 1, 1, DIM, side, side).requires_grad_()
    anchors, labels = torch.randn(1, 1, DIM, side, side), torch.randint(SLOTS, (1, 1, side, side))
    return milliseconds(lambda: decoder(features[0], anchors, labels) + encoder(features[1], anchors, labels), features)


def milliseconds(forward: Callable[[], Tensor], learned: Tensor) -> float:
    """Return the shortest time of four forward and backward passes, after one warm-up."""
    times = []
    for _ in range(5):
        start = perf_counter()
        torch.autograd.grad(forward(), learned)
        times.append(perf_counter() - start)
    return 1e3 * min(times[1:])


print(f"a step of one frame in ms, threads: {torch.get_num_threads()}\n{'patches':>8}{'SSync':>10}{'dense':>10}")
for side in (16, 32, 64, 128, 256):
    print(f"{side**2:8,}{ssync(side):10.2f}" + (f"{dense(side):10.2f}" if side <= LARGEST else "         -"))
