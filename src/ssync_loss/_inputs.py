"""Checks of the tensors that losses take."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ssync_loss._checks import (
    check_bool,
    check_floating,
    check_integer,
    check_not_empty,
    check_same_device,
    check_shape,
    check_tensor,
)

NO_SIZES: Mapping[str, int] = {}


def check_floats(
    name: str, tensor: Tensor, axes: str, known: Mapping[str, int] = NO_SIZES, *, filled: str = "", **beside: Tensor
) -> dict[str, int]:
    """Require a floating-point tensor whose axes, e.g. ``"B T D H W"``, have the known sizes, and return all sizes.

    Axes in ``filled`` must not be empty. The tensor must be on the device of the tensors ``beside``.
    """
    size = _check_axes(name, tensor, axes, known)
    check_not_empty(name, size, filled)
    check_floating(name, tensor)
    check_same_device(name, tensor, **beside)
    return size


def check_rows(name: str, rows: Tensor, axis: str, size: int, **beside: Tensor) -> None:
    """Require a floating-point tensor whose last axis has the given ``size``; other axes are free."""
    check_tensor(name, rows)
    if rows.ndim < 1 or rows.shape[-1] != size:
        raise ValueError(f"`{name}` must have shape (..., {axis}={size}); got {tuple(rows.shape)}.")
    check_floating(name, rows)
    check_same_device(name, rows, **beside)


def check_mask(name: str, mask: Tensor, axes: str, known: Mapping[str, int], **beside: Tensor) -> None:
    """Require a boolean tensor whose axes have the known sizes."""
    _check_axes(name, mask, axes, known)
    check_bool(name, mask)
    check_same_device(name, mask, **beside)


def check_labels(name: str, labels: Tensor, axes: str, known: Mapping[str, int], **beside: Tensor) -> dict[str, int]:
    """Require a tensor of integers whose axes have the known sizes, and return all sizes."""
    size = _check_axes(name, labels, axes, known)
    check_integer(name, labels)
    check_same_device(name, labels, **beside)
    return size


def _check_axes(name: str, tensor: Tensor, axes: str, known: Mapping[str, int]) -> dict[str, int]:
    return check_shape(name, tensor, axes, **{axis: known[axis] for axis in axes.split() if axis in known})


def widest(*tensors: Tensor) -> torch.dtype:
    """Return float64 if one of the tensors has it, else float32."""
    # `promote_types` takes as long as an operator
    return torch.float64 if any(one.dtype == torch.float64 for one in tensors) else torch.float32
