"""Contours of masks, and the share of one contour that is close to another."""

from math import isqrt

import torch
from torch import Tensor


def contours(masks: Tensor) -> Tensor:
    """Mark the pixels of masks (..., H, W) that differ from the pixel to the right, below, or to the lower right."""
    # a pixel at the border replaces its neighbor outside the frame, so they do not differ
    right = torch.cat([masks[..., 1:], masks[..., -1:]], -1)
    below, right_below = (torch.cat([one[..., 1:, :], one[..., -1:, :]], -2) for one in (masks, right))
    return (masks ^ right) | (masks ^ below) | (masks ^ right_below)


def within(marks: Tensor, radius: int) -> Tensor:
    """Mark the pixels of (..., H, W) at a distance of at most ``radius`` from a mark."""
    # columns of the disk grow toward its middle: each extends the one before
    near, column = marks.clone(), marks.clone()
    height = 0
    for across in range(radius, -1, -1):
        for down in range(height + 1, isqrt(radius**2 - across**2) + 1):
            _add_moved(column, marks, down, -2)
            height = down
        _add_moved(near, column, across, -1)
    return near


def share_near(marks: Tensor, near: Tensor) -> Tensor:
    """Return the share of ``marks`` (F, N, H, W) that lies in ``near`` (F, K, H, W): (F, N, K), 0 without marks."""
    frame, name, row, column = marks.nonzero(as_tuple=True)
    mask = frame * marks.shape[1] + name
    num_masks = marks.shape[0] * marks.shape[1]
    # few pixels are marked: looking them up costs less than products of whole maps
    hits = torch.zeros(num_masks, near.shape[1], dtype=torch.float64, device=marks.device)
    hits.index_add_(0, mask, near[frame, :, row, column].to(torch.float64))
    total = torch.bincount(mask, minlength=num_masks)
    return (hits / total.clamp_min(1).unsqueeze(1)).view(*marks.shape[:2], near.shape[1])


def _add_moved(into: Tensor, marks: Tensor, step: int, dim: int) -> None:
    rest = marks.shape[dim] - step
    if rest > 0:
        into.narrow(dim, step, rest).logical_or_(marks.narrow(dim, 0, rest))
        into.narrow(dim, 0, rest).logical_or_(marks.narrow(dim, step, rest))
