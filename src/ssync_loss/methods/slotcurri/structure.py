"""Structure of features: a reconstruction must vary in space and time as its target does."""

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ssync_loss._autocast import no_autocast
from ssync_loss._autograd import learns
from ssync_loss._checks import check_int
from ssync_loss._inputs import check_floats, widest
from ssync_loss._module import LossModule
from ssync_loss._rows import slices
from ssync_loss._settings import OPTIONAL_COUNT, POSITIVE, check_by, one_of
from ssync_loss._vectors import known_gradient
from ssync_loss.methods.slotcurri._ssim import Similarity, kornia_dissimilarity, own_dissimilarity, why_not_kornia

Normalize: TypeAlias = Literal["joint", "channel"]
Filters: TypeAlias = Literal["auto", "kornia", "torch"]
NORMALIZE = get_args(Normalize)
FILTERS = get_args(Filters)


def _check_odd(name: str, value: int) -> None:
    check_int(name, value, 1)
    if value % 2 == 0:
        raise ValueError(f"`{name}` must be odd; got {value}.")


_check_settings = check_by(
    window=_check_odd,
    sigma=POSITIVE,
    k1=POSITIVE,
    k2=POSITIVE,
    eps=POSITIVE,
    normalize=one_of(*NORMALIZE),
    chunk_size=OPTIONAL_COUNT,
    filters=one_of(*FILTERS),
)


def structure_aware_loss(
    pred: Tensor,
    target: Tensor,
    *,
    window: int = 3,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
    eps: float = 1e-6,
    normalize: Normalize = "joint",
    chunk_size: int | None = 64,
    filters: Filters = "auto",
) -> Tensor:
    """Compare cubes of reconstructed features with those of their target, channel by channel.

    Let x and y be both values scaled to [0, 1] together, ``v -> (v - lo) / (hi - lo + eps)``, with means, variances and
    the covariance under a Gaussian over ``window**3`` cells:
    ``loss = 1 - mean over cubes of (2 m_x m_y + c1) (2 s_xy + c2) / ((m_x^2 + m_y^2 + c1) (s_x^2 + s_y^2 + c2))``
    with ``c1 = k1^2`` and ``c2 = k2^2``. The loss is within [0, 2]. The published weight, relative to a mean squared
    error, is 0.05. Cubes lie inside the clip. An axis shorter than the window is not averaged: images and clips of two
    frames are compared frame by frame. Without clips the loss is exactly 0, attached to the graph. lo and hi have no
    gradient. The forward also computes the gradient, and saves only that.

    Args:
        pred: (B, T, D, H, W), reconstructed features; the only argument that gets a gradient.
        target: (B, T, D, H, W), features of the backbone.
        window: edge of a cube, odd.
        sigma: width of the Gaussian, above 0.
        k1: constant of the ratio of means, above 0.
        k2: constant of the ratio of variances, above 0.
        eps: constant that keeps a clip without contrast finite, above 0.
        normalize: ``"joint"``, as published, uses one lo and hi for all channels of a clip, so that an outlier channel,
            which large backbones have, hides the others. ``"channel"`` uses a lo and hi per channel.
        chunk_size: channels at a time; None for all. The value is the same up to rounding.
        filters: ``"torch"`` and ``"auto"`` use the library's separable filters. ``"kornia"`` uses
            ``kornia.metrics.ssim3d`` as a check; it is several times slower and in float32 a hundred times less exact.
            Before kornia 0.9 its window is rounded to float32, an error of 1e-6. It needs the published constants, T, H
            and W of at least ``window``, a CPU, and no hooks for saved tensors, such as those of a checkpoint.

    Returns: a scalar in float32, or float64 if one of the features is.
    Source: Moon, Seong & Heo, CVPR 2026 (arXiv:2603.22758), and its public code.
    Raises: TypeError on a wrong dtype, ValueError on wrong shapes or settings.

    >>> pred = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1)
    >>> target = torch.tensor([0.5, 1.0]).view(1, 1, 2, 1, 1)
    >>> # a cell is its own mean: 1 - 0.0001 / (0.5^2 + 0.0001) = 0.9996 and 1 - 1 = 0
    >>> round(structure_aware_loss(pred, target).item(), 4)
    0.4998
    """
    _check_settings(window=window, sigma=sigma, k1=k1, k2=k2, eps=eps)
    _check_settings(normalize=normalize, chunk_size=chunk_size, filters=filters)
    size = check_floats("pred", pred, "B T D H W", filled="T D H W")
    check_floats("target", target, "B T D H W", size, pred=pred)
    like = Similarity(window, sigma, k1**2, k2**2)
    if filters == "kornia" and (missing := why_not_kornia(pred, like)) is not None:
        raise ValueError(f"filters='kornia' needs {missing}; got {tuple(pred.shape)} on {pred.device}, {like}.")
    dissimilarity = kornia_dissimilarity if filters == "kornia" else own_dissimilarity
    dtype = widest(pred, target)
    with_slope = learns(pred)
    share = 1 / max(size["B"] * size["D"] * like.num_cubes(pred), 1)
    with torch.no_grad(), no_autocast(pred):
        total = torch.zeros((), dtype=dtype, device=pred.device)
        slope = torch.empty(pred.shape, dtype=dtype, device=pred.device) if with_slope else None
        span = _span(pred, target, (1, 2, 3, 4)) if normalize == "joint" else None
        for some in slices(size["D"], chunk_size):
            parts = pred[:, :, some], target[:, :, some]
            low, high = (one.to(dtype) for one in span or _span(*parts, (1, 3, 4)))
            scale = 1 / (high - low + eps)
            x, y = ((one.to(dtype) - low) * scale for one in parts)
            value, gradient = dissimilarity(x, y, like, with_slope=with_slope)
            if slope is not None and gradient is not None:
                slope[:, :, some] = gradient * scale * share
            # last, as torch 2.14 on Python 3.13 does not trace a loop that ends in a condition
            total += value * share
    return total if slope is None else known_gradient(pred, total, slope)


class StructureAwareLoss(LossModule, check=_check_settings):
    """Module of :func:`structure_aware_loss`, with the same shapes and errors: ``forward(pred, target)``.

    >>> pred = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1)
    >>> target = torch.tensor([0.5, 1.0]).view(1, 1, 2, 1, 1)
    >>> round(StructureAwareLoss()(pred, target).item(), 4)
    0.4998
    """

    def __init__(
        self,
        *,
        window: int = 3,
        sigma: float = 1.5,
        k1: float = 0.01,
        k2: float = 0.03,
        eps: float = 1e-6,
        normalize: Normalize = "joint",
        chunk_size: int | None = 64,
        filters: Filters = "auto",
    ) -> None:
        self.remember(locals())

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the term; see :func:`structure_aware_loss`."""
        return structure_aware_loss(pred, target, **self.settings)


def _span(pred: Tensor, target: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of both."""
    low = torch.minimum(pred.amin(axes, keepdim=True), target.amin(axes, keepdim=True))
    return low, torch.maximum(pred.amax(axes, keepdim=True), target.amax(axes, keepdim=True))
