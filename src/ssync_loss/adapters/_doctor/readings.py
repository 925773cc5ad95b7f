"""Which layouts of a map a tensor may have."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from typing import NamedTuple

from ssync_loss._axes import square
from ssync_loss._checks import check_int
from ssync_loss.adapters._doctor.values import Values
from ssync_loss.ssync.maps import Size

# einops patterns of maps, with what speaks against each; "heads" is the only axis the losses do not know
PATTERNS = {
    "b t s h w": 0,
    "b t h w s": 0,
    "b s t h w": 2,
    "t b s h w": 2,
    "b t s (h w)": 0,
    "b t (h w) s": 0,
    "b s h w": 0,
    "b h w s": 0,
    "b s t (h w)": 2,
    "t b s (h w)": 2,
    "t b (h w) s": 2,
    "(b t) s h w": 0,
    "(b t) h w s": 0,
    "b s (h w)": 0,
    "b (h w) s": 0,
    "(b t) s (h w)": 0,
    "(b t) (h w) s": 0,
    "(b t s) h w": 0,
    "(b t s) (h w)": 0,
    "s (h w)": 2,
    "(h w) s": 2,
    "b heads s (h w)": 1,
    "b heads (h w) s": 1,
    "b t heads s (h w)": 1,
    "b t heads (h w) s": 1,
    "(b t) heads s (h w)": 1,
    "(b t) heads (h w) s": 1,
    "b t heads s h w": 1,
}
# a reading that costs more is none
IMPLAUSIBLE = 4


def axes_in(pattern: str) -> list[str]:
    """Return the axes of a pattern: of ``"b (h w)"``, ``["b", "(h w)"]``."""
    return re.findall(r"\([^)]*\)|\S+", pattern)


@dataclass(frozen=True)
class Hints:
    """What the user knows: B, T, S, grids, and H, W of the video, whose ratio a grid has."""

    batch: int | None = None
    frames: int | None = None
    slots: int | None = None
    grids: tuple[Size, ...] = ()
    video: Size | None = None

    def __post_init__(self) -> None:
        for name, value in (("num_frames", self.frames), ("num_slots", self.slots)):
            if value is not None:
                check_int(name, value, 1)


class Reading(NamedTuple):
    """One layout of a tensor: ``frames`` is T and ``total`` B*T; ``size`` is (H, W) where the tensor shows it."""

    axes: str
    frames: int | None
    total: int
    slots: int
    size: Size | None
    patches: int
    cost: int
    sums_over: str | None
    heads: int | None = None


def readings_of(shape: tuple[int, ...], values: Values | None, hints: Hints, slots: frozenset[int]) -> list[Reading]:
    """Return all readings that the values allow and nothing known forbids; ``slots`` are the S of maps beside it."""
    readings = []
    for axes, cost in _patterns(shape):
        for one in _bind(axes, shape, hints, slots):
            evidence = _evidence(axes_in(axes), one.slots, values)
            # of two axes without a clip's only values can tell
            if evidence is not None and (evidence[1] is not None or "b" in axes):
                cost_of_values, over = evidence
                cost_of_sizes = _implausible(one, hints)
                readings.append(one._replace(cost=cost + cost_of_values + cost_of_sizes, sums_over=over))
    return [one for one in readings if one.cost < IMPLAUSIBLE]


def grid_of(reading: Reading, beside: Reading, hints: Hints) -> Size | None:
    """Return H, W of a reading: its own, one given, of the other map's or the video's ratio, or a square's."""
    if reading.size is not None:
        return reading.size
    ratios = [one for one in (beside.size, *hints.grids, hints.video) if one is not None]
    given = [one for one in hints.grids if one[0] * one[1] == reading.patches]
    scaled = [_scaled(reading.patches, one) for one in ratios]
    return next((one for one in (*given, *scaled, square(reading.patches)) if one is not None), None)


def _scaled(patches: int, like: Size) -> Size | None:
    height, width = like
    scale = patches * height
    side = isqrt(scale // width) if scale % width == 0 else 0
    return (side, patches // side) if side and side * side * width == scale else None


def _patterns(shape: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    for axes, cost in PATTERNS.items():
        names = axes_in(axes)
        if len(names) == len(shape):
            yield axes, cost
        elif len(names) == len(shape) - 1 and "heads" not in names:
            for index, size in enumerate(shape):
                if size == 1 and index:
                    yield " ".join((*names[:index], "1", *names[index:])), cost + 1


def _bind(axes: str, shape: tuple[int, ...], hints: Hints, slots: frozenset[int]) -> Iterator[Reading]:
    size = dict(zip(axes_in(axes), shape, strict=True))
    height, width = size.get("h"), size.get("w")
    grid = None if height is None or width is None else (height, width)
    patches = size["(h w)"] if grid is None else grid[0] * grid[1]
    heads = axes_in(axes).index("heads") if "heads" in size else None
    merged = size.get("(b t s)", size.get("(b t)"))
    for num_slots in [size["s"]] if "s" in size else sorted(slots):
        if merged is None:
            total = size.get("b", 1) * size.get("t", 1)
        else:
            total, rest = divmod(merged, 1 if "s" in size else num_slots)
            if rest:
                continue
        frames = hints.frames if merged else size.get("t", 1)
        if merged and frames is None and hints.batch:
            frames = max(1, total // hints.batch)
        fits = frames is None or (hints.frames in (None, frames) and total % frames == 0)
        fits = fits and (hints.batch is None or frames is None or hints.batch * frames == total)
        # frames in the batch of images are images
        fits = fits and not (frames == 1 and "(b t)" in size) and hints.slots in (None, num_slots)
        if fits and min(num_slots, patches) > 1:
            yield Reading(axes, frames, total, num_slots, grid, patches, 0, None, heads)


def _evidence(names: list[str], slots: int, values: Values | None) -> tuple[int, str | None] | None:
    """Return what the sums say against a reading, and which of its axes they are over; None if they forbid it."""
    if values is None or not (values.sums or values.groups):
        return 0, None
    if "s" not in names:
        if slots in values.groups:
            return 0, "s"
    elif (axis := names.index("s"),) in values.sums:
        return 0, "s"
    elif "heads" in names and tuple(sorted((axis, names.index("heads")))) in values.sums:
        return 0, "heads s"
    patches = tuple(names.index(one) for one in ("(h w)", "h", "w") if one in names)
    return (2, "h w") if patches in values.sums else None


def _implausible(reading: Reading, hints: Hints) -> int:
    """Return what the sizes say against a reading."""
    cost = 0
    if reading.slots > reading.patches:
        cost += IMPLAUSIBLE
    if reading.slots > 64 and hints.slots is None:
        cost += IMPLAUSIBLE
    if reading.size is not None and max(reading.size) > 2 * min(reading.size) and reading.size not in hints.grids:
        cost += IMPLAUSIBLE
    if reading.size is None and square(reading.patches) is None:
        cost += all(height * width != reading.patches for height, width in hints.grids)
    return cost
