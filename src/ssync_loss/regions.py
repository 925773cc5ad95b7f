"""Where each map is reliable: counting differing neighbors, boundaries, interiors."""

import torch
from torch import Tensor

from ssync_loss._checks import check_int, check_integer, check_not_empty, check_shape
from ssync_loss._maps import check_valid

# cells that a CPU compares with their neighbors at a time: what comes out stays in its cache
CELLS = 1 << 16


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
    """Count as :func:`neighbor_difference` does, without checks; fastest for labels of one byte."""
    count = _closed_count if torch.compiler.is_compiling() else _count
    return count(labels, valid)


def _count(labels: Tensor, valid: Tensor | None) -> Tensor:
    # to numbers of their own type bytes are compared twice as fast
    around = _with_edges(labels.view(torch.uint8) if labels.element_size() == 1 else labels)
    valid_around = None if valid is None else _with_edges(valid)
    count = _differing_in_frame(around, valid_around).contiguous()
    # every frame but the first, and every frame but the last
    later, earlier = (1, 1, labels.shape[1] - 1), (1, 0, labels.shape[1] - 1)
    differs = labels.narrow(*later) != labels.narrow(*earlier)
    count.narrow(*later).add_(differs if valid is None else differs & valid.narrow(*earlier))
    count.narrow(*earlier).add_(differs if valid is None else differs & valid.narrow(*later))
    return count if valid is None else count * valid


def _differing_in_frame(around: Tensor, valid: Tensor | None) -> Tensor:
    """Count the differing neighbors among eight: (B, T, H + 2, W + 2), rims included, -> (B, T, H, W) uint8.

    Patches stand in one row, in which every direction is a shift; what that does to the rims is cut off.
    """
    height, width = around.shape[2:]
    cells, counted = around.flatten(), None if valid is None else valid.flatten().view(torch.uint8)
    count = torch.empty(around.shape, device=around.device, dtype=torch.uint8)
    # to the last with a farthest neighbor
    length = max(around.numel() - 2 * width - 2, 0)
    for start, size in _pieces(length, CELLS) if around.device.type == "cpu" else [(0, length)]:
        # a cell and its eight neighbors, (3, 3, size): the same memory at nine shifts
        square = (3, 3, size), (width, 1, 1), start
        differs = torch.empty(3, 3, size, device=around.device, dtype=torch.uint8)
        torch.ne(cells.as_strided(*square), cells.narrow(0, start + width + 1, size), out=differs)
        if counted is not None:
            differs.mul_(counted.as_strided(*square))
        torch.sum(differs, (0, 1), dtype=torch.uint8, out=count.view(-1).narrow(0, start, size))
    return count.narrow(2, 0, height - 2).narrow(3, 0, width - 2)


def _pieces(length: int, step: int) -> list[tuple[int, int]]:
    """Return start and size of every piece: of length 5 in steps of 2 they are (0, 2), (2, 2), (4, 1)."""
    return [(start, min(step, length - start)) for start in range(0, length, step)]


def _with_edges(cells: Tensor) -> Tensor:
    """Add a replicated rim of one cell around every frame: (B, T, H, W) -> (B, T, H + 2, W + 2)."""
    for dim in (2, 3):
        cells = torch.cat([cells.narrow(dim, 0, 1), cells, cells.narrow(dim, -1, 1)], dim)
    return cells


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
    selected = as_bool(_within(count_differing(labels, valid), min_different, 10 - min_same))
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
    selected = as_bool(_within(count_differing(labels, valid), 0, max_different))
    return selected if valid is None else selected & valid


def select_regions(
    labels: Tensor, valid: Tensor | None, min_different: int, min_same: int, max_different: int
) -> Tensor:
    """Select boundary and interior as the functions above do, without checks.

    Shape:
        labels: (2, B, T, H, W) integers, of encoder and decoder; one byte is fastest. valid: (B, T, H, W) bool.
        Returns (2, B, T, H, W) uint8, 1 where selected and 0 elsewhere.
    """
    select = _closed_select if torch.compiler.is_compiling() else _select
    return select(labels, valid, min_different, min_same, max_different)


def _select(labels: Tensor, valid: Tensor | None, min_different: int, min_same: int, max_different: int) -> Tensor:
    both_valid = None if valid is None else valid.expand(labels.shape).flatten(0, 1)
    count = _count(labels.flatten(0, 1), both_valid).view(labels.shape)
    _within(count[0], min_different, 10 - min_same)
    _within(count[1], 0, max_different)
    return count if valid is None else count * valid


def _within(count: Tensor, low: int, high: int) -> Tensor:
    """Write, over counts, 1 where they lie in [low, high] and 0 elsewhere: on a CPU ten times as fast as bool."""
    if high < low:
        return count.zero_()
    if low > 0:
        # of bytes: what is below wraps around to much above
        count.sub_(low)
    return count.le_(high - low)


def as_bool(region: Tensor) -> Tensor:
    """View bytes that are 0 or 1 as bool."""
    # the CPU's compiler cannot view them so
    return region > 0 if torch.compiler.is_compiling() else region.view(torch.bool)


def _bytes_like(labels: Tensor, *_: object) -> Tensor:
    return labels.new_empty(labels.shape, dtype=torch.uint8)


# closed to compilers, which would read neighbors cell by cell, and those of a patch again for each of its slots
_closed_count = torch.library.custom_op("ssync_loss::count_differing", _count, mutates_args=())
_closed_select = torch.library.custom_op("ssync_loss::select_regions", _select, mutates_args=())
_closed_count.register_fake(_bytes_like)
_closed_select.register_fake(_bytes_like)
