"""Where each map is reliable: counting differing neighbors, boundaries, interiors."""

from itertools import product

import torch
from torch import Tensor

from ssync_loss._checks import check_int, check_integer, check_not_empty, check_shape
from ssync_loss._maps import check_valid

# eight neighbors in the frame; the two in time are added to them
_SPATIAL = [(dy, dx) for dy, dx in product((0, 1, 2), repeat=2) if (dy, dx) != (1, 1)]


def neighbor_difference(labels: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Count, for every patch, how many of its ten neighbors carry another label.

    ``n[p] = #{q in neighbors(p): labels[q] != labels[p]}``: eight neighbors in the frame, one in the previous
    and one in the next frame. A neighbor outside the clip is clamped to the nearest patch inside it, so that
    at an edge a diagonal neighbor falls on the along-edge one, which then counts twice. An invalid patch has
    count 0 and, as a neighbor, agrees with everyone.

    Shape:
        labels: (B, T, H, W) integers. valid: (B, T) or (B, T, H, W) bool. Returns (B, T, H, W) uint8 within
        [0, 10].

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), selection of boundary and interior patches.

    Raises:
        TypeError: if labels are no integers or ``valid`` is not boolean.
        ValueError: if a shape does not fit.

    >>> neighbor_difference(torch.tensor([[[[0, 0, 1]]]])).tolist()
    [[[[0, 3, 3]]]]
    """
    return count_differing(labels, _check(labels, valid))


def _check(labels: Tensor, valid: Tensor | None) -> Tensor | None:
    """Check labels and ``valid``, and return the latter as (B, T, H, W)."""
    size = check_shape("labels", labels, "B T H W")
    check_not_empty("labels", size, "T H W")
    check_integer("labels", labels)
    return None if valid is None else check_valid(valid, size, labels=labels)


def count_differing(labels: Tensor, valid: Tensor | None) -> Tensor:
    """Count as :func:`neighbor_difference` does, without checks."""
    differs = [labels != other for other in _neighbors(labels)]
    if valid is not None:
        differs = [one & counts for one, counts in zip(differs, _neighbors(valid), strict=True)]
    count = differs[0].to(torch.uint8)
    for one in differs[1:]:
        count = count + one
    return count if valid is None else count * valid


def _neighbors(cells: Tensor) -> list[Tensor]:
    """What the ten neighbors of every cell hold, ten times (B, T, H, W)."""
    around = _with_edges(cells)
    height, width = cells.shape[2:]
    return [*_replicated(cells, 1), *(around[:, :, dy : dy + height, dx : dx + width] for dy, dx in _SPATIAL)]


def _replicated(cells: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The cells before and after along an axis, the ends clamped."""
    length = cells.shape[dim]
    first, last = cells.narrow(dim, 0, 1), cells.narrow(dim, length - 1, 1)
    before = torch.cat([first, cells.narrow(dim, 0, length - 1)], dim)
    after = torch.cat([cells.narrow(dim, 1, length - 1), last], dim)
    return before, after


def _with_edges(cells: Tensor) -> Tensor:
    """Add a replicated rim of one cell around every frame: (B, T, H, W) -> (B, T, H+2, W+2)."""
    cells = torch.cat([cells[:, :, :1], cells, cells[:, :, -1:]], 2)
    return torch.cat([cells[..., :1], cells, cells[..., -1:]], 3)


def boundary_region(
    labels: Tensor, *, min_different: int = 1, min_same: int = 1, valid: Tensor | None = None
) -> Tensor:
    """Select patches on an edge that are not isolated: there the encoder teaches the decoder.

    ``n >= min_different and 10 - n >= min_same`` with n from :func:`neighbor_difference`. A patch that agrees
    with fewer than ``min_same`` neighbors is noise, not a boundary. Invalid patches are never selected.

    Shape:
        labels: (B, T, H, W) integers. valid: (B, T) or (B, T, H, W) bool. Returns (B, T, H, W) bool.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), boundary refinement.

    Raises:
        TypeError, ValueError: on a count that is no integer within [0, 10], or wrong labels.

    >>> boundary_region(torch.tensor([[[[0, 0, 1]]]])).tolist()
    [[[[False, True, True]]]]
    """
    check_int("min_different", min_different, 0, 10)
    check_int("min_same", min_same, 0, 10)
    valid = _check(labels, valid)
    return select_boundary(count_differing(labels, valid), min_different, min_same, valid)


def select_boundary(count: Tensor, min_different: int, min_same: int, valid: Tensor | None) -> Tensor:
    """Select from counts as :func:`boundary_region` does, without checks."""
    selected = (count >= min_different) & (count <= 10 - min_same)
    return selected if valid is None else selected & valid


def interior_region(labels: Tensor, *, max_different: int = 0, valid: Tensor | None = None) -> Tensor:
    """Select patches inside an object: there the decoder teaches the encoder.

    ``n <= max_different`` with n from :func:`neighbor_difference`. Invalid patches are never selected.

    Shape:
        labels: (B, T, H, W) integers. valid: (B, T) or (B, T, H, W) bool. Returns (B, T, H, W) bool.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), interior denoising.

    Raises:
        TypeError, ValueError: on a count that is no integer within [0, 10], or wrong labels.

    >>> interior_region(torch.tensor([[[[0, 0, 1]]]])).tolist()
    [[[[True, False, False]]]]
    """
    check_int("max_different", max_different, 0, 10)
    valid = _check(labels, valid)
    return select_interior(count_differing(labels, valid), max_different, valid)


def select_interior(count: Tensor, max_different: int, valid: Tensor | None) -> Tensor:
    """Select from counts as :func:`interior_region` does, without checks."""
    selected = count <= max_different
    return selected if valid is None else selected & valid
