"""What the numbers of a tensor say: over which axes they sum to one, and whether they are probabilities."""

from itertools import pairwise
from math import inf, isfinite, prod
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Range: TypeAlias = tuple[float, float]

# how many numbers are read for sums, how many for the least and the largest, and how many terms a sum may have
MAX_SAMPLE = 2**16
MAX_READ = 2**24
MAX_TERMS = 2**20
# tolerance for a sum of probabilities, which may have been float16
ABOUT = 0.01


class Values(NamedTuple):
    """What was read of a tensor.

    Attributes:
        low, high: least and largest number; NaN if one is.
        probs: whether the numbers, apart from those not finite, can be probabilities.
        sums: axes over which they sum to a constant, with the least and the largest sum; of logits, their exponentials.
        groups: S, where every S consecutive entries of axis 0 sum to one; of logits, their exponentials.
        hard: whether all are 0 or 1.
    """

    low: float
    high: float
    probs: bool
    sums: dict[tuple[int, ...], Range]
    groups: tuple[int, ...]
    hard: bool

    @property
    def finite(self) -> bool:
        """Whether there is neither NaN nor +inf; -inf is an absent slot."""
        return self.high < inf


def read_values(tensor: Tensor) -> Values | None:
    """Read a bounded number of values on the host; None where there are none to read (meta, fake)."""
    try:
        low, high = (bound.item() for bound in sample(tensor, (), MAX_READ).aminmax())
    except (RuntimeError, NotImplementedError):
        return None
    some = sample(tensor).to("cpu", torch.float64)
    some = some[some.isfinite()]
    least, largest = (bound.item() for bound in some.aminmax()) if some.numel() else (0.0, 0.0)
    least = low if isfinite(low) else least
    sums = _constant(tensor, exponentials=least < 0, flat=low == high)
    groups = _groups(tensor, exponentials=least < 0) if tensor.dim() in (2, 3) and len(tensor) <= MAX_TERMS else ()
    if groups and not _all_one(sums):
        # what sums to one in groups sums to their number as a whole
        sums = {}
    within = least >= 0 and largest <= 1 + ABOUT and least < largest
    probs = least >= 0 and (within or bool(sums or groups))
    hard = within and bool(((some == 0) | (some == 1)).all())
    return Values(low, high, probs, sums, groups, hard)


def sample(tensor: Tensor, whole: tuple[int, ...] = (), budget: int = MAX_SAMPLE) -> Tensor:
    """Return a view of evenly spaced entries, at most ``budget`` where the axes in ``whole`` allow it."""
    tensor = tensor.detach()
    counts = list(tensor.shape)
    others = [axis for axis in range(tensor.dim()) if axis not in whole]
    while others and prod(counts) > budget and max(counts[axis] for axis in others) > 1:
        longest = max(others, key=counts.__getitem__)
        counts[longest] = (counts[longest] + 1) // 2
    steps = [max(1, -(-size // count)) if count else 1 for size, count in zip(tensor.shape, counts, strict=True)]
    return tensor[tuple(slice(None, None, step) for step in steps)]


def sums_over(tensor: Tensor, axes: tuple[int, ...], *, exponentials: bool = False) -> Range | None:
    """Return the least and the largest sum over some axes; sums of 0, and of what is not finite, do not count."""
    some = sample(tensor, axes).to("cpu", torch.float64)
    total = some.logsumexp(axes).exp() if exponentials else some.sum(axes)
    total = total[total.isfinite() & (total > 0)]
    return (total.min().item(), total.max().item()) if total.numel() else None


def _constant(tensor: Tensor, *, exponentials: bool, flat: bool) -> dict[tuple[int, ...], Range]:
    axes = range(tensor.dim())
    found: dict[tuple[int, ...], Range] = {}
    for some in [*((axis,) for axis in axes), *pairwise(axes)]:
        sizes = [tensor.shape[axis] for axis in some]
        if min(sizes) > 1 and prod(sizes) <= MAX_TERMS:
            total = sums_over(tensor, some, exponentials=exponentials)
            if total is not None and total[1] - total[0] <= 2 * ABOUT * total[1]:
                found[some] = total
    ones = {axes: total for axes, total in found.items() if _all_one({axes: total})}
    if not ones and (flat or exponentials):
        return {}
    if all(len(axes) == 2 for axes in ones):
        # means over heads sum to one over their number, and sums over heads to their number
        ones |= {axes: total for axes, total in found.items() if len(axes) == 1}
    # nearly uniform maps sum to nearly the same over every axis
    spread = {axes: (high - low) / high for axes, (low, high) in ones.items()}
    least = min(spread.values(), default=0.0)
    exact = {axes: total for axes, total in ones.items() if spread[axes] <= 3 * least + 1e-6}
    # means over two heads sum to one over slots and two clips, too
    return {axes: total for axes, total in exact.items() if len(axes) == min(map(len, exact))}


def _all_one(sums: dict[tuple[int, ...], Range]) -> bool:
    return bool(sums) and all(abs(end - 1) <= ABOUT for total in sums.values() for end in total)


def _groups(tensor: Tensor, *, exponentials: bool) -> tuple[int, ...]:
    some = sample(tensor, (0,)).to("cpu", torch.float64).flatten(1)
    some = some.exp() if exponentials else some
    sizes = [size for size in range(2, 65) if len(some) % size == 0]
    sums = {size: some.view(-1, size, some.shape[1]).sum(1) for size in sizes}
    return tuple(size for size, total in sums.items() if bool(((total - 1).abs() <= ABOUT).all()))
