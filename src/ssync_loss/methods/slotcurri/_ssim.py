"""Structural similarity of cubes, and its gradient beside it: the library's own filters, and kornia's.

Both compare volumes (B, T, C, H, W) whose values lie within [0, 1], and agree to rounding. Own filters are
separable and leave an axis alone that is shorter than the window; kornia's know one Gaussian and whole cubes.
"""

from math import exp
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# axes of time, height and width
AXES = (1, 3, 4)


class Similarity(NamedTuple):
    """What makes two cubes similar.

    Attributes:
        window: length of a cube's edge, odd.
        sigma: width of the Gaussian over the cube.
        c1: keeps the ratio of means finite.
        c2: keeps the ratio of variances finite.
    """

    window: int
    sigma: float
    c1: float
    c2: float

    def weights(self) -> list[float]:
        """Return the Gaussian along one axis; it sums to 1.

        >>> [round(one, 4) for one in Similarity(3, 1.5, 1e-4, 9e-4).weights()]
        [0.3078, 0.3844, 0.3078]
        """
        bell = [exp(-(((i - self.window // 2) / self.sigma) ** 2) / 2) for i in range(self.window)]
        return [one / sum(bell) for one in bell]

    def axes(self, volumes: Tensor) -> list[int]:
        """Return the axes that a window fits into."""
        return [axis for axis in AXES if volumes.shape[axis] >= self.window]

    def num_cubes(self, volumes: Tensor) -> int:
        """Return the cubes of one channel of a clip."""
        inside = self.axes(volumes)
        frames, height, width = (volumes.shape[axis] - (self.window - 1 if axis in inside else 0) for axis in AXES)
        return frames * height * width

    def blurred(self, volumes: Tensor, axes: list[int]) -> Tensor:
        """Average windows along some axes, each of which becomes shorter."""
        for axis in axes:
            size = volumes.shape[axis] - self.window + 1
            total = torch.zeros_like(volumes.narrow(axis, 0, size))
            for first, weight in enumerate(self.weights()):
                total.add_(volumes.narrow(axis, first, size), alpha=weight)
            volumes = total
        return volumes

    def passed_back(self, cubes: Tensor, axes: list[int]) -> Tensor:
        """Give back to every cell what its windows got of it: the transpose of blurring, by a Gaussian of two sides."""
        for axis in axes:
            pad = [0, 0] * (cubes.ndim - 1 - axis) + [self.window - 1] * 2
            cubes = self.blurred(F.pad(cubes, pad), [axis])
        return cubes


def own_dissimilarity(x: Tensor, y: Tensor, like: Similarity, *, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Return the sum over cubes of 1 - SSIM and, if asked for, its gradient with respect to ``x``.

    With d = x - y it is ``p + q - p q`` with ``p = mean(d)^2 / (mean(x)^2 + mean(y)^2 + c1)`` and
    ``q = var(d) / (var(x) + var(y) + c2)``: the same index, and nothing is lost where little differs.
    """
    axes = like.axes(x)
    # variances are differences of squares: around the mean of a channel these are small, and so is what they lose
    center = y.mean(AXES, keepdim=True)
    x, y = x - center, y - center
    apart = x - y
    mean_x, mean_y = like.blurred(x, axes), like.blurred(y, axes)
    mean_apart, level = mean_x - mean_y, mean_x + center
    size = level**2 + (mean_y + center) ** 2 + like.c1
    spread = like.blurred(x**2 + y**2, axes) - mean_x**2 - mean_y**2 + like.c2
    p = mean_apart**2 / size
    q = (like.blurred(apart**2, axes) - mean_apart**2) / spread
    total = (p + q - p * q).sum()
    if not with_slope:
        return total, None
    # half the slopes by the mean of d^2, of x^2 and of x
    by_apart = (1 - p) / spread
    by_square = -by_apart * q
    by_mean = (1 - q) * (mean_apart - p * level) / size - by_apart * mean_apart - by_square * mean_x
    by_cell, by_apart, by_square = (like.passed_back(one, axes) for one in (by_mean, by_apart, by_square))
    return total, 2 * (by_cell + x * by_square + apart * by_apart)


def kornia_dissimilarity(x: Tensor, y: Tensor, like: Similarity, *, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Return the same from kornia's index, which must fit; kornia is imported here, on first use."""
    from kornia.metrics import ssim3d

    def total_of(volumes: Tensor) -> Tensor:
        # what kornia adds to the denominator, 1e-5 of it where all is dark, is no part of the definition
        index = ssim3d(volumes.transpose(1, 2), y.transpose(1, 2), like.window, eps=0.0, padding="valid")
        return (1 - index).sum()

    if not with_slope:
        return total_of(x), None
    slope, total = torch.func.grad_and_value(total_of)(x)
    return total, slope


def why_not_kornia(volumes: Tensor, like: Similarity) -> str | None:
    """Say why kornia cannot tell the similarity of such volumes exactly, or None where it can."""
    if (like.sigma, like.c1, like.c2) != (1.5, 0.01**2, 0.03**2):
        return "sigma=1.5, k1=0.01 and k2=0.03"
    if len(like.axes(volumes)) < len(AXES):
        return f"T, H and W of at least {like.window}"
    if volumes.device.type != "cpu":
        # by default cuDNN convolves float32 with 10 bits, and differences of squares keep none of them
        return "a CPU tensor"
    try:
        # torch.func differentiates kornia's index, and enters this
        with torch.autograd.graph.disable_saved_tensors_hooks(""):
            return None
    except RuntimeError:
        return "no hooks for saved tensors, such as those of a checkpoint"
