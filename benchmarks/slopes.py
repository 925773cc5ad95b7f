"""Growth as the exponent of a power: cost ~ size^p."""

import math
from collections.abc import Sequence
from typing import NamedTuple

MIN_SIZES = 5


class Slope(NamedTuple):
    """A fitted exponent and what it was fitted to."""

    exponent: float
    first: int
    last: int
    num_sizes: int

    @property
    def enough(self) -> bool:
        """Whether enough sizes entered the fit."""
        return self.num_sizes >= MIN_SIZES


def fit(points: Sequence[tuple[int, float]], *, start: int = 0) -> Slope | None:
    """Fit a line to the logarithms of sizes and costs by least squares; None below two sizes.

    Args:
        points: (size, cost), in any order.
        start: the least size that enters.

    >>> fit([(1, 5.0), (2, 20.0), (4, 80.0), (8, 320.0)], start=2)
    Slope(exponent=2.0, first=2, last=8, num_sizes=3)
    """
    used = sorted((size, cost) for size, cost in points if size >= start)
    if len(used) < 2:
        return None
    xs, ys = [math.log(size) for size, _ in used], [math.log(cost) for _, cost in used]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    run = sum((x - mean_x) ** 2 for x in xs)
    return Slope(round(rise / run, 3), used[0][0], used[-1][0], len(used))


def predict(points: Sequence[tuple[int, float]], size: int) -> float | None:
    """Say what a larger size should cost, from the two largest before it; None without any.

    Growth is taken to be at least linear; one size alone is taken to grow quadratically, to be safe.

    >>> predict([(8, 1.0), (16, 4.0)], 32)
    16.0
    >>> predict([(16, 4.0)], 32)
    16.0
    """
    known = sorted(point for point in points if point[0] < size)[-2:]
    if not known:
        return None
    exponent = 2.0
    if len(known) == 2:
        (small, before), (large, after) = known
        exponent = max(math.log(after / before) / math.log(large / small), 1.0)
    largest, cost = known[-1]
    return cost * math.pow(size / largest, exponent)
