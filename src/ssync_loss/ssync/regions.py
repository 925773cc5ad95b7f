"""Where each map is reliable: differing neighbors, boundaries and interiors."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ssync_loss._checks import as_index, check_int, check_not_empty, check_shape
from ssync_loss.ssync.maps import check_valid

NUM_NEIGHBORS = 10


def neighbor_difference(labels: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Count, for every patch, those of its ten neighbors that have another label.

    ``n[p] = #{q in neighbors(p): labels[q] != labels[p]}``: eight neighbors in the frame, one in the previous and one
    in the next frame. The nearest patch inside the clip replaces a neighbor outside it. The neighbors along an edge
    thus replace diagonal ones and count twice. An invalid patch has count 0, and an invalid neighbor never differs.

    Shape: labels: (B, T, H, W) integers. valid: (B, T) or (B, T, H, W) bool. Returns (B, T, H, W) uint8 within [0, 10].

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), selection of boundary and interior patches.
    Raises: TypeError if labels are no integers or ``valid`` is not boolean; ValueError if a shape does not fit.

    >>> neighbor_difference(torch.tensor([[[[0, 0, 1]]]])).tolist()
    [[[[0, 3, 3]]]]
    """
    return _count_differing(*_check(labels, valid))


def boundary_region(
    labels: Tensor, *, min_different: int = 1, min_same: int = 1, valid: Tensor | None = None
) -> Tensor:
    """Select the patches on boundaries, where the encoder teaches the decoder.

    ``n >= min_different and 10 - n >= min_same`` with n from :func:`neighbor_difference`. A patch that agrees
    with fewer than ``min_same`` neighbors is noise, not a boundary. Invalid patches are never selected.

    Shape: labels: (B, T, H, W) integers. valid: (B, T) or (B, T, H, W) bool. Returns (B, T, H, W) bool.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), boundary refinement.
    Raises: TypeError, ValueError on a count that is no integer within [0, 10], or wrong labels.

    >>> boundary_region(torch.tensor([[[[0, 0, 1]]]])).tolist()
    [[[[False, True, True]]]]
    """
    check_int("min_different", min_different, 0, NUM_NEIGHBORS)
    check_int("min_same", min_same, 0, NUM_NEIGHBORS)
    return select_boundary(*_check(labels, valid), min_different, min_same)


def interior_region(labels: Tensor, *, max_different: int = 0, valid: Tensor | None = None) -> Tensor:
    """Select the patches inside objects, where the decoder teaches the encoder.

    ``n <= max_different`` with n from :func:`neighbor_difference`. Invalid patches are never selected.

    Shape: labels: (B, T, H, W) integers. valid: (B, T) or (B, T, H, W) bool. Returns (B, T, H, W) bool.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), interior denoising.
    Raises: TypeError, ValueError on a count that is no integer within [0, 10], or wrong labels.

    >>> interior_region(torch.tensor([[[[0, 0, 1]]]])).tolist()
    [[[[True, False, False]]]]
    """
    check_int("max_different", max_different, 0, NUM_NEIGHBORS)
    return select_interior(*_check(labels, valid), max_different)


def select_boundary(labels: Tensor, valid: Tensor | None, min_different: int, min_same: int) -> Tensor:
    """Apply the rule of :func:`boundary_region`, without checks."""
    different = _count_differing(labels, valid)
    selected = (different >= min_different) & (NUM_NEIGHBORS - different >= min_same)
    return selected if valid is None else selected & valid


def select_interior(labels: Tensor, valid: Tensor | None, max_different: int) -> Tensor:
    """Apply the rule of :func:`interior_region`, without checks."""
    selected = _count_differing(labels, valid) <= max_different
    return selected if valid is None else selected & valid


def _check(labels: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Check labels and ``valid``, and return both as (B, T, H, W)."""
    size = check_shape("labels", labels, "B T H W")
    check_not_empty("labels", size, "T H W")
    labels = as_index("labels", labels)
    return labels, check_valid(valid, size, labels=labels)


def _count_differing(labels: Tensor, valid: Tensor | None) -> Tensor:
    differs = [neighbor != labels for neighbor in _neighbors(labels)]
    if valid is not None:
        differs = [one & counts for one, counts in zip(differs, _neighbors(valid), strict=True)]
    # one by one: torch 2.6 compiles a sum of uint8 to invalid C++
    count = differs[0].to(torch.uint8)
    for one in differs[1:]:
        count += one
    return count if valid is None else count * valid


def _neighbors(cells: Tensor) -> Iterator[Tensor]:
    """Yield the ten neighbors of all patches; coordinates are clamped into the clip."""
    height, width = cells.shape[2:]
    wide = torch.cat([cells[..., :1], cells, cells[..., -1:]], 3)
    around = torch.cat([wide[:, :, :1], wide, wide[:, :, -1:]], 2)
    for down in (0, 1, 2):
        for across in (0, 1, 2):
            if (down, across) != (1, 1):
                yield around[:, :, down : down + height, across : across + width]
    yield torch.cat([cells[:, :1], cells[:, :-1]], 1)
    yield torch.cat([cells[:, 1:], cells[:, -1:]], 1)
