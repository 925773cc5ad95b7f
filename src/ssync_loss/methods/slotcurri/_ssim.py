"""Structural similarity of cubes and its gradient, computed by the library's filters or by kornia.

Both compare volumes (B, T, C, H, W) with values within [0, 1], and agree up to rounding. The library's filters are
separable, and do not average over an axis shorter than the window. kornia supports one Gaussian and whole cubes.
"""

from math import exp
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssync_loss._compilers import is_exporting

# axes of time, height and width
AXES = (1, 3, 4)


class Similarity(NamedTuple):
    """Settings of the index: the odd edge of a cube, the width of its Gaussian, the constants of both ratios."""

    window: int
    sigma: float
    c1: float
    c2: float

    def weights(self) -> list[float]:
        """Return the Gaussian along one axis; it sums to 1."""
        bell = [exp(-(((i - self.window // 2) / self.sigma) ** 2) / 2) for i in range(self.window)]
        return [one / sum(bell) for one in bell]

    def axes(self, volumes: Tensor) -> list[int]:
        """Return the axes that are at least as long as the window."""
        return [axis for axis in AXES if volumes.shape[axis] >= self.window]

    def num_cubes(self, volumes: Tensor) -> int:
        """Return the number of cubes of one channel of a clip."""
        inside = self.axes(volumes)
        frames, height, width = (volumes.shape[axis] - (self.window - 1 if axis in inside else 0) for axis in AXES)
        return frames * height * width

    def blurred(self, volumes: Tensor, axes: list[int]) -> Tensor:
        """Average windows along some axes, which become shorter."""
        last, weights = self.window - 1, self.weights()
        for axis in axes:
            size = volumes.shape[axis] - last
            total = volumes.narrow(axis, last // 2, size) * weights[last // 2]
            for i in range(last // 2):
                # the Gaussian is symmetric
                pair = volumes.narrow(axis, i, size) + volumes.narrow(axis, last - i, size)
                total.add_(pair, alpha=weights[i])
            volumes = total
        return volumes

    def passed_back(self, cubes: Tensor, axes: list[int]) -> Tensor:
        """Apply the transpose of blurring: as the Gaussian is symmetric, blur the padded cubes."""
        for axis in axes:
            pad = [0, 0] * (cubes.ndim - 1 - axis) + [self.window - 1] * 2
            cubes = self.blurred(F.pad(cubes, pad), [axis])
        return cubes


def own_dissimilarity(x: Tensor, y: Tensor, like: Similarity, *, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Return the sum over cubes of 1 - SSIM and, if wanted, its gradient with respect to ``x``.

    With d = x - y, 1 - SSIM is ``p + q - p q`` with ``p = mean(d)^2 / (mean(x)^2 + mean(y)^2 + c1)`` and
    ``q = var(d) / (var(x) + var(y) + c2)``. This form is precise for small differences.
    """
    axes = like.axes(x)
    # variances are differences of squares; around the mean of a channel the squares are small, and little cancels
    center = y.mean(AXES, keepdim=True)
    x, y = x - center, y - center
    apart = x - y
    mean_x, mean_y = like.blurred(x, axes), like.blurred(y, axes)
    mean_apart, level = mean_x - mean_y, mean_x + center
    # the operations are in place, because memory takes more time here than arithmetic
    size = (mean_y + center).square_().addcmul_(level, level).add_(like.c1)
    spread = like.blurred((x * x).addcmul_(y, y), axes)
    spread.addcmul_(mean_x, mean_x, value=-1).addcmul_(mean_y, mean_y, value=-1).add_(like.c2)
    p = mean_apart.square().div_(size)
    q = like.blurred(apart.square(), axes).addcmul_(mean_apart, mean_apart, value=-1).div_(spread)
    total = torch.addcmul(p + q, p, q, value=-1).sum()
    if not with_slope:
        return total, None
    # half the slopes with respect to the means of d^2, of x^2 and of x
    by_apart = (1 - p).div_(spread)
    by_square = (by_apart * q).neg_()
    by_mean = (1 - q).div_(size).mul_(torch.addcmul(mean_apart, p, level, value=-1))
    by_mean.addcmul_(by_apart, mean_apart, value=-1).addcmul_(by_square, mean_x, value=-1)
    slope = like.passed_back(by_mean, axes).addcmul_(x, like.passed_back(by_square, axes))
    return total, slope.addcmul_(apart, like.passed_back(by_apart, axes)).mul_(2)


def kornia_dissimilarity(x: Tensor, y: Tensor, like: Similarity, *, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Return the same, computed by kornia; :func:`why_not_kornia` must return None. This imports kornia."""
    from kornia.metrics import ssim3d

    def total_of(volumes: Tensor) -> Tensor:
        # eps=0: kornia's default increases the denominator, by 1e-5 of its value in dark cubes
        index = ssim3d(volumes.transpose(1, 2), y.transpose(1, 2), like.window, eps=0.0, padding="valid")
        return (1 - index).sum()

    if not with_slope:
        return total_of(x), None
    slope, total = torch.func.grad_and_value(total_of)(x)
    return total, slope


def why_not_kornia(volumes: Tensor, like: Similarity) -> str | None:
    """Return a condition that kornia needs for the exact index and that is not met, or None."""
    if (like.sigma, like.c1, like.c2) != (1.5, 0.01**2, 0.03**2):
        return "sigma=1.5, k1=0.01 and k2=0.03"
    if len(like.axes(volumes)) < len(AXES):
        return f"T, H and W of at least {like.window}"
    if volumes.device.type != "cpu":
        # by default cuDNN convolves float32 with 10 bits, too few for differences of squares
        return "a CPU tensor"
    if is_exporting():
        return "no torch.export"
    try:
        # `torch.func` enters the same context
        with torch.autograd.graph.disable_saved_tensors_hooks(""):
            return None
    except RuntimeError:
        return "no hooks for saved tensors, such as those of a checkpoint"
