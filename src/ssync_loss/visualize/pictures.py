"""Draw slots, outlines and roles over videos (B, T, 3, h, w), and put frames side by side."""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ssync_loss._checks import (
    as_index,
    check_int,
    check_nonnegative,
    check_not_empty,
    check_number,
    check_shape,
    check_type,
)
from ssync_loss._inputs import check_labels, check_mask
from ssync_loss.ssync.maps import check_valid
from ssync_loss.ssync.types import PseudoLabels
from ssync_loss.visualize.colors import (
    BY_ROLE,
    DECODER_TAUGHT,
    ENCODER_TAUGHT,
    INVALID,
    NUM_COLORS,
    WHITE,
    palette,
)

_GRAY_WEIGHTS = (0.299, 0.587, 0.114)


def overlay(video: Tensor, labels: Tensor, *, alpha: float = 0.4, valid: Tensor | None = None) -> Tensor:
    """Draw the colors of slots over their patches: ``(1 - alpha) * video + alpha * palette[label]``.

    Labels are enlarged to the frames by nearest neighbor. Invalid patches become dark.

    Shape: video: (B, T, 3, h, w), floating point within [0, 1] (clamped into it, NaN to 0), or uint8. labels: (B, T, H,
        W) integers >= 0; from 256 on the colors repeat. valid: (B, T) or (B, T, H, W) bool, or None. Returns
        (B, T, 3, h, w), uint8.

    ``alpha`` is the weight of the colors, within [0, 1].

    Raises: TypeError, ValueError if a dtype, shape, device or ``alpha`` does not fit, or labels are seen to be
        negative.

    >>> black = torch.zeros(1, 1, 3, 1, 2)
    >>> overlay(black, torch.tensor([[[[0, 1]]]]), alpha=0.5)[0, 0, :, 0].T.tolist()  # half the palette
    [[31, 68, 123], [121, 71, 22]]
    """
    size = check_video(video)
    grid = check_labels("labels", labels, "B T H W", {"B": size["B"], "T": size["T"]}, video=video)
    check_not_empty("labels", grid, "H W")
    index = as_index("labels", labels)
    check_nonnegative("labels", index)
    check_number("alpha", alpha, 0.0, 1.0)
    valid = check_valid(valid, grid, video=video)
    with torch.no_grad():
        colors = palette(NUM_COLORS).to(video.device)[index % NUM_COLORS]
        return blended(video, _planes(colors, valid), alpha)


def outline(video: Tensor, region: Tensor, color: Sequence[int] = WHITE, *, width: int = 1) -> Tensor:
    """Draw the inner border of a region: the pixels of the region within ``width`` of a pixel outside.

    The region is enlarged to the frames by nearest neighbor. The edge of a frame counts as outside.

    Shape: video: (B, T, 3, h, w), as in :func:`overlay`. region: (B, T, H, W), bool, for example
        ``PseudoLabels.boundary``. Returns (B, T, 3, h, w), uint8.

    ``color`` is red, green and blue within 0..255, ``width`` the width of the line in pixels of the video.

    Raises: TypeError, ValueError if a dtype, shape, device, color or width does not fit.

    >>> black = torch.zeros(1, 1, 3, 4, 4)
    >>> everywhere = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    >>> outline(black, everywhere, (255, 0, 0))[0, 0, 0].tolist()
    [[255, 255, 255, 255], [255, 0, 0, 255], [255, 0, 0, 255], [255, 255, 255, 255]]
    """
    size = check_video(video)
    grid = check_shape("region", region, "B T H W", B=size["B"], T=size["T"])
    check_not_empty("region", grid, "H W")
    check_mask("region", region, "B T H W", grid, video=video)
    check_int("width", width, 1)
    if not isinstance(color, Sequence):
        raise TypeError(f"`color` must be three integers: red, green and blue; got {type(color).__name__}.")
    if len(color) != 3:
        raise ValueError(f"`color` must have three parts: red, green and blue; got {color!r}.")
    for part in color:
        check_int("color", part, 0, 255)
    with torch.no_grad():
        inside = enlarged(region, size["h"], size["w"])
        # dilate the complement, with the outside of the frame, along one axis after the other
        near_outside = F.pad(~inside, [width] * 4, value=True)
        for axis in (-2, -1):
            inner = near_outside.shape[axis] - 2 * width
            moved = [near_outside.narrow(axis, step, inner) for step in range(2 * width + 1)]
            near_outside = reduce(torch.logical_or, moved)
        line = (inside & near_outside).unsqueeze(2)
        return torch.where(line, _color(color, video.device)[:, None, None], as_bytes(video))


def roles(labels: PseudoLabels, *, valid: Tensor | None = None) -> Tensor:
    """Color every patch by its student, as in ``ROLE_COLORS``.

    The color is ``ENCODER_TAUGHT`` in interiors, ``DECODER_TAUGHT`` on boundaries, ``BOTH_TAUGHT`` where the two
    overlap, ``NOBODY_TAUGHT`` outside both, and ``INVALID`` at invalid patches.

    Shape: labels: from ``pseudo_labels`` or ``SSyncLoss.terms``. valid: (B, T) or (B, T, H, W) bool, as passed to those
        functions. Returns (B, T, 3, H, W), uint8, one pixel per patch.

    Raises: TypeError, ValueError if ``labels`` are no PseudoLabels, or a dtype, shape or device does not fit.

    >>> from ssync_loss.visualize import ENCODER_TAUGHT
    >>> row = torch.zeros(1, 1, 1, 2, dtype=torch.int64)
    >>> labels = PseudoLabels(row, row, row == 1, row == 0, torch.zeros(1, 1, dtype=torch.int64))
    >>> roles(labels)[0, 0, :, 0, 0].tolist() == list(ENCODER_TAUGHT)
    True
    """
    check_type("labels", labels, PseudoLabels)
    boundary, interior = labels.boundary, labels.interior
    grid = check_shape("labels.boundary", boundary, "B T H W")
    valid = check_valid(valid, grid, labels=boundary)
    check_mask("labels.boundary", boundary, "B T H W", grid)
    check_mask("labels.interior", interior, "B T H W", grid, **{"labels.boundary": boundary})
    of_role = torch.tensor(BY_ROLE, dtype=torch.uint8, device=boundary.device)
    return _planes(of_role[interior.long() + 2 * boundary.long()], valid)


def filmstrip(video: Tensor, *, gap: int = 0) -> Tensor:
    """Put the frames of every clip side by side.

    Shape: video: (B, T, 3, h, w), as in :func:`overlay`. Returns (B, 3, h, T * w + (T - 1) * gap), uint8, with ``gap``
        white pixels between two frames.

    Raises: TypeError, ValueError if the video's dtype or shape does not fit, or ``gap`` is no integer of at least 0.

    >>> filmstrip(torch.zeros(2, 4, 3, 8, 8), gap=1).shape
    torch.Size([2, 3, 8, 35])
    """
    size = check_video(video)
    check_int("gap", gap, 0)
    with torch.no_grad():
        # a gap to the right of every frame but the last
        frames = F.pad(as_bytes(video), [0, gap], value=255)
        strip = rearrange(frames, "b t c h w -> b c h (t w)")
        return strip[..., : size["T"] * (size["w"] + gap) - gap]


def histogram(counts: Tensor, *, at: float | None = None, height: int = 64, width: int = 8) -> Tensor:
    """Draw counts in bins of equal width from 0 to 1 as bars, and a line at the value ``at``.

    The height of a bar is proportional to the square root of its count, so that small counts are visible, too. With the
    counts of ``diagnostics.overlap_histogram`` and a line at the merge threshold, merged pairs are right of the line.

    Shape: counts: (N,) integers >= 0. Returns (3, height, N * width), uint8.

    Raises: TypeError, ValueError if a dtype, shape or number does not fit.

    >>> histogram(torch.tensor([4, 1, 0]), height=4, width=1)[0].tolist()  # red is 58 in bars of height 4, 2 and 0
    [[58, 255, 255], [58, 255, 255], [58, 58, 255], [58, 58, 255]]
    """
    size = check_shape("counts", counts, "N")
    check_not_empty("counts", size, "N")
    counts = as_index("counts", counts)
    check_nonnegative("counts", counts)
    check_int("height", height, 1)
    check_int("width", width, 1)
    levels = counts.double().sqrt()
    bars = (height * levels / levels.amax().clamp_min(1)).round().repeat_interleave(width)
    filled = bars >= torch.arange(height, 0, -1, device=bars.device).unsqueeze(1)
    blue, white, line = (_color(one, bars.device)[:, None, None] for one in (ENCODER_TAUGHT, WHITE, DECODER_TAUGHT))
    picture = torch.where(filled, blue, white)
    if at is not None:
        check_number("at", at, 0.0, 1.0)
        column = min(int(at * len(bars)), len(bars) - 1)
        picture[:, :, column] = line.squeeze(2)
    return picture


def check_video(video: Tensor) -> dict[str, int]:
    """Require a video (B, T, 3, h, w), floating point or uint8, and return its sizes."""
    size = check_shape("video", video, "B T C h w", C=3)
    check_not_empty("video", size, "T h w")
    if not video.is_floating_point() and video.dtype != torch.uint8:
        raise TypeError(f"`video` must be floating point within [0, 1] or uint8; got {video.dtype}.")
    return size


def _levels(video: Tensor) -> Tensor:
    """Convert a video to float32 within 0..255, not rounded."""
    levels = video.float()
    return levels if video.dtype == torch.uint8 else levels.nan_to_num(0.0).clamp(0.0, 1.0) * 255.0


def as_bytes(video: Tensor) -> Tensor:
    """Convert a video to uint8."""
    return video if video.dtype == torch.uint8 else _levels(video).round().to(torch.uint8)


def as_gray(video: Tensor) -> Tensor:
    """Convert a video to gray, in uint8 and three channels."""
    weights = torch.tensor(_GRAY_WEIGHTS, device=video.device)[:, None, None]
    return (_levels(video) * weights).sum(2, keepdim=True).expand_as(video).round().to(torch.uint8)


def enlarged(cells: Tensor, height: int, width: int) -> Tensor:
    """Enlarge the last two axes; pixel i of n shows cell floor(i * cells / n)."""
    rows = torch.arange(height, device=cells.device) * cells.shape[-2] // height
    columns = torch.arange(width, device=cells.device) * cells.shape[-1] // width
    # one axis at a time: ten times as fast as both at once
    return cells.index_select(-2, rows).index_select(-1, columns)


def blended(video: Tensor, colors: Tensor, alpha: float) -> Tensor:
    """Draw the colors (B, T, 3, H, W) of patches over a video."""
    planes = enlarged(colors, video.shape[-2], video.shape[-1]).float()
    return ((1.0 - alpha) * _levels(video) + alpha * planes).round().to(torch.uint8)


def _planes(colors: Tensor, valid: Tensor | None) -> Tensor:
    """Turn the colors (B, T, H, W, 3) of patches into a video; invalid patches are dark."""
    if valid is not None:
        colors = torch.where(valid.unsqueeze(-1), colors, _color(INVALID, colors.device))
    return rearrange(colors, "b t h w c -> b t c h w")


def _color(color: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(color), dtype=torch.uint8, device=device)
