"""Cross-entropies of similarities with soft targets, computed with their gradients, some rows at a time.

The gradient of a row's loss with respect to the row's scores is the softmax minus the targets. The forward has both, so
it also computes the gradients of queries and keys. No score is saved or computed twice.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# exponentials of scores up to this size and their sums neither overflow nor underflow in float32
LARGEST_SCORE = 40.0


class Targets(NamedTuple):
    """Targets of rows, whose loss is ``share log sum_j exp(s_j) - linear - weight sum_j marks_j s_j``.

    ``marks`` are (w, r, M), the other tensors (w, r, 1). The caller differentiates ``linear``. ``close`` writes
    :func:`lowest` over the scores that are not in the softmax, where marks are 0.
    """

    share: Tensor
    linear: Tensor
    weight: Tensor
    marks: Tensor | None = None
    close: Callable[[Tensor], Tensor] | None = None


def lowest(scores: Tensor) -> float:
    """Return a finite score whose exponential is 0."""
    return torch.finfo(scores.dtype).min / 2


def slices(size: int, step: int | None) -> list[slice]:
    """Cut an axis into pieces; without a step it stays whole, so that a compiler need not fix its size.

    >>> slices(5, 3), slices(5, None)
    ([slice(0, 3, None), slice(3, 6, None)], [slice(None, None, None)])
    """
    return [slice(None)] if step is None else [slice(first, first + step) for first in range(0, size, step)]


def soft_cross_entropy(
    queries: Tensor,
    keys: Tensor,
    center: Tensor,
    targets: Callable[[slice, slice], Targets],
    slopes: tuple[Tensor | None, Tensor | None],
    *,
    temperature: float,
    chunk_size: int | None,
) -> Tensor:
    """Return the sum of the losses of all rows of all windows, with the scores ``s_ij = q_i k_j / temperature``.

    Queries (W, M, D) have length 1 or 0, and so have keys plus their center (W, 1, D). The center does not change the
    softmax; subtracting it from nearly equal keys reduces rounding. Gradients are added to the ``slopes``, except for
    the component along a key, see :func:`through_lengths`. ``targets`` is called for ``chunk_size`` rows at a time: for
    whole windows if they fit, else for rows of one window.
    """
    num_windows, num_rows, _ = queries.shape
    windows = rows = None
    if chunk_size is not None:
        windows, rows = max(chunk_size // num_rows, 1), min(chunk_size, num_rows)
    total = queries.new_zeros(())
    for some in slices(num_windows, windows):
        for part in slices(num_rows, rows):
            by_query, by_key = (None if one is None else one[some] for one in slopes)
            by_query = None if by_query is None else by_query[:, part]
            vectors = queries[some][:, part], keys[some], center[some]
            total += _loss(*vectors, targets(some, part), by_query, by_key, temperature)
    return total


def _loss(
    queries: Tensor,
    keys: Tensor,
    center: Tensor,
    wanted: Targets,
    by_query: Tensor | None,
    by_key: Tensor | None,
    temperature: float,
) -> Tensor:
    share, linear, weight, marks, close = wanted
    scores = (queries / temperature) @ keys.mT
    losses = -linear
    if close is not None:
        close(scores)
    if marks is not None:
        # products of rows allocate no second map
        losses = losses - weight * (marks.unsqueeze(2) @ scores.unsqueeze(3)).squeeze(3)
    if 2 / temperature > LARGEST_SCORE:
        shift = scores.amax(2, keepdim=True)
        scores.sub_(shift)
        losses = losses + share * shift
    # an empty sum becomes the smallest normal number
    total = scores.exp_().sum(2, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    if by_query is not None:
        scores.mul_(share / total)
        if marks is not None:
            scores.addcmul_(marks, weight, value=-1)
        # in place: torch 2.13 compiles an expression here to wrong numbers on a CPU
        by_query.baddbmm_(scores, keys, alpha=1 / temperature)
        if by_key is not None:
            by_key.baddbmm_(scores.mT, queries - center, alpha=1 / temperature)
            # both updates subtract the unit key from the queries, which changes only the component along the key
            by_key.addcmul_(scores.sum(1).unsqueeze(2), keys, value=-1 / temperature)
    return (losses + share * total.log()).sum()
