"""Structure of features: what is reconstructed must vary in space and time as its target does."""

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ssync_loss._autocast import no_autocast
from ssync_loss._checks import (
    check_choice,
    check_floating,
    check_int,
    check_not_empty,
    check_number,
    check_same_device,
    check_shape,
)
from ssync_loss._vectors import known_gradient
from ssync_loss.methods.slotcurri._ssim import Similarity, kornia_dissimilarity, own_dissimilarity, why_not_kornia

Normalize: TypeAlias = Literal["joint", "channel"]
Filters: TypeAlias = Literal["auto", "kornia", "torch"]

NORMALIZE = ("joint", "channel")
FILTERS = ("auto", "kornia", "torch")


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

    With x and y the values of both brought to [0, 1] together, ``v -> (v - lo) / (hi - lo + eps)``, and means,
    variances and the covariance under a Gaussian over ``window**3`` cells:
    ``loss = 1 - mean over cubes of (2 m_x m_y + c1) (2 s_xy + c2) / ((m_x^2 + m_y^2 + c1) (s_x^2 + s_y^2 + c2))``
    with ``c1 = k1^2`` and ``c2 = k2^2``. It lies within [0, 2]; the published weight beside a mean squared error
    is 0.05. Cubes lie inside the clip. An axis shorter than the window is not averaged over: images, and clips of
    two frames, are compared frame by frame. No clips give exactly 0, attached to the graph.

    ``"joint"``, the published way, takes one lo and hi for all channels of a clip. A single outlier channel then
    hides the others, and such channels are common in the features of large backbones: ``"channel"`` takes a lo
    and hi per channel. Neither lo nor hi gets a gradient, nor does the target.

    Time is linear in the cells. The gradient is formed in the forward, ``chunk_size`` channels at a time, and is
    all that is kept.

    Shape:
        pred, target: (B, T, D, H, W). Returns a scalar in float32, or float64 if one of them is.

    Args:
        pred: reconstructed features; the only argument that gets a gradient.
        target: features of the backbone.
        window: edge of a cube, odd.
        sigma: width of the Gaussian, above 0.
        k1: with ``k2``, what keeps the ratios finite, above 0.
        k2: see ``k1``.
        eps: what keeps a clip without contrast finite, above 0.
        normalize: ``"joint"`` or ``"channel"``.
        chunk_size: channels that are compared at once; None for all. The value is the same to rounding.
        filters: ``"kornia"`` takes ``kornia.metrics.ssim3d``, where that is exact: published constants, T, H and W
            of at least ``window``, on a CPU, not compiled. ``"torch"`` takes the library's own separable filters,
            several times faster. ``"auto"`` takes kornia's where they are exact. The value is the same to rounding.

    Source: Moon, Seong & Heo, CVPR 2026 (arXiv:2603.22758), the structure-aware loss; normalization and window
    are those of its public code.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on wrong shapes or settings.

    >>> pred = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1)
    >>> target = torch.tensor([0.5, 1.0]).view(1, 1, 2, 1, 1)
    >>> # a cell is its own mean: 1 - 0.0001 / (0.5^2 + 0.0001) = 0.9996 and 1 - 1 = 0
    >>> round(structure_aware_loss(pred, target).item(), 4)
    0.4998
    """
    _check_settings(window, sigma, k1, k2, eps, normalize, chunk_size, filters)
    size = check_shape("pred", pred, "B T D H W")
    check_not_empty("pred", size, "T D H W")
    check_floating("pred", pred)
    check_shape("target", target, "B T D H W", **size)
    check_floating("target", target)
    check_same_device("target", target, pred=pred)
    like = Similarity(window, sigma, k1**2, k2**2)
    missing = why_not_kornia(pred, like)
    if filters == "kornia" and missing is not None:
        raise ValueError(f"filters='kornia' needs {missing}; got {tuple(pred.shape)} on {pred.device}, {like}.")
    dissimilarity = own_dissimilarity if filters == "torch" or missing is not None else kornia_dissimilarity
    dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    with_slope = torch.is_grad_enabled() and pred.requires_grad
    # whole slices where nothing is cut, so that a compiler need not fix a size
    chunks = [slice(None)]
    if chunk_size is not None and chunk_size < size["D"]:
        chunks = [slice(first, first + chunk_size) for first in range(0, size["D"], chunk_size)]
    # not times a mean: without clips that is NaN
    share = 1 / max(size["B"] * size["D"] * _num_cubes(size, window), 1)
    with torch.no_grad(), no_autocast(pred):
        total = torch.zeros((), dtype=dtype, device=pred.device)
        slope = torch.empty(pred.shape, dtype=dtype, device=pred.device) if with_slope else None
        span = _span(pred, target, (1, 2, 3, 4)) if normalize == "joint" else None
        for some in chunks:
            parts = pred[:, :, some], target[:, :, some]
            low, high = (one.to(dtype) for one in span or _span(*parts, (1, 3, 4)))
            scale = 1 / (high - low + eps)
            x, y = ((one.to(dtype) - low).mul_(scale) for one in parts)
            value, gradient = dissimilarity(x, y, like, with_slope=with_slope)
            total += value * share
            if slope is not None and gradient is not None:
                slope[:, :, some] = gradient.mul_(scale * share)
    return total if slope is None else known_gradient(pred, total, slope)


class StructureAwareLoss(nn.Module):
    """Module of :func:`structure_aware_loss`: features are compared in cubes of space and time.

    ``forward(pred, target)``.

    Source: Moon, Seong & Heo, CVPR 2026 (arXiv:2603.22758), the structure-aware loss.

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
        super().__init__()
        _check_settings(window, sigma, k1, k2, eps, normalize, chunk_size, filters)
        self.settings: dict[str, Any] = {
            "window": window,
            "sigma": sigma,
            "k1": k1,
            "k2": k2,
            "eps": eps,
            "normalize": normalize,
            "chunk_size": chunk_size,
            "filters": filters,
        }

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the term; see :func:`structure_aware_loss`."""
        return structure_aware_loss(pred, target, **self.settings)

    def extra_repr(self) -> str:
        """Show the settings."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def _check_settings(
    window: object,
    sigma: object,
    k1: object,
    k2: object,
    eps: object,
    normalize: object,
    chunk_size: object,
    filters: object,
) -> None:
    check_int("window", window, 1)
    if isinstance(window, int) and window % 2 == 0:
        raise ValueError(f"`window` must be odd; got {window}.")
    for name, value in (("sigma", sigma), ("k1", k1), ("k2", k2), ("eps", eps)):
        check_number(name, value, 0.0, open_low=True)
    check_choice("normalize", normalize, NORMALIZE)
    if chunk_size is not None:
        check_int("chunk_size", chunk_size, 1)
    check_choice("filters", filters, FILTERS)


def _num_cubes(size: dict[str, int], window: int) -> int:
    """Return the cubes of one channel of a clip."""
    lengths = [size[axis] for axis in "THW"]
    frames, height, width = (one - window + 1 if one >= window else one for one in lengths)
    return frames * height * width


def _span(pred: Tensor, target: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value of both."""
    low = torch.minimum(pred.amin(axes, keepdim=True), target.amin(axes, keepdim=True))
    return low, torch.maximum(pred.amax(axes, keepdim=True), target.amax(axes, keepdim=True))
