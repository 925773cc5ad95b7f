"""Cross-entropies of similarities with soft targets, and their gradients beside them, some rows at a time.

The gradient of a row's loss with respect to its scores is the softmax minus the targets, and both are at hand when
the loss is. Formed there, it costs the products that any backward needs, and no score is kept or computed twice.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# of some windows and some of their rows: the weights of the targets (w, r, M), which are written over, and which keys
# are out of the softmax, as bools that broadcast to them
Targets = Callable[[slice, slice], tuple[Tensor, Tensor | None]]


def slices(size: int, step: int | None) -> list[slice]:
    """Cut an axis into pieces; without a step it stays whole, so that a compiler need not fix its size.

    >>> slices(5, 3), slices(5, None)
    ([slice(0, 3, None), slice(3, 6, None)], [slice(None, None, None)])
    """
    return [slice(None)] if step is None else [slice(first, first + step) for first in range(0, size, step)]


def soft_cross_entropy(
    queries: Tensor,
    keys: Tensor,
    targets: Targets,
    slopes: tuple[Tensor | None, Tensor | None],
    *,
    temperature: float,
    chunk_size: int | None,
) -> Tensor:
    """Return the sum over windows and rows i of ``-sum_j w_ij log softmax_j(q_i k_j / temperature)``.

    A row whose weights are all 0 has a loss of 0. Two maps of ``chunk_size`` rows are held at once: as many windows as
    fit in whole, or else a part of one.

    Shape:
        queries, keys: (W, M, D). Returns a scalar.

    Args:
        queries: the vectors of the rows.
        keys: what they are compared with.
        targets: what is wanted of some rows.
        slopes: what the gradients of both are added to, or None. Along a key its gradient is another one, as
            :func:`through_lengths` takes out what lies there.
        temperature: of the softmax.
        chunk_size: rows that are held at once, over all windows; None for all.
    """
    num_windows, num_rows, _ = queries.shape
    windows = rows = None
    if chunk_size is not None:
        windows, rows = max(chunk_size // num_rows, 1), min(chunk_size, num_rows)
    # no softmax knows what all keys share; without it, of keys that are nearly equal less is lost to rounding
    center = keys.mean(1, keepdim=True)
    keys = keys - center
    total = queries.new_zeros(())
    for some in slices(num_windows, windows):
        for part in slices(num_rows, rows):
            by_query, by_key = (None if one is None else one[some] for one in slopes)
            by_query = None if by_query is None else by_query[:, part]
            total += _loss(
                queries[some][:, part], keys[some], center[some], *targets(some, part), by_query, by_key, temperature
            )
    return total


def shut(scores: Tensor, closed: Tensor | None) -> Tensor:
    """Write over what is closed with a score so low that its exponential is 0, but finite: 0 times it is 0."""
    return scores if closed is None else scores.masked_fill_(closed, torch.finfo(scores.dtype).min / 2)


def _loss(
    queries: Tensor,
    keys: Tensor,
    center: Tensor,
    weights: Tensor,
    closed: Tensor | None,
    by_query: Tensor | None,
    by_key: Tensor | None,
    temperature: float,
) -> Tensor:
    scores = shut((queries / temperature) @ keys.mT, closed)
    scores.sub_(scores.amax(2, keepdim=True))
    hit = torch.einsum("wrm,wrm->wr", weights, scores)
    total = scores.exp_().sum(2, keepdim=True)
    share = weights.sum(2, keepdim=True)
    loss = (share * total.log()).sum() - hit.sum()
    if by_query is not None or by_key is not None:
        slope = scores.mul_(share / total).sub_(weights)
        # in place: as an expression, torch 2.13 compiles this and what follows to wrong numbers on a CPU
        if by_query is not None:
            by_query.baddbmm_(slope, keys, alpha=1 / temperature)
        if by_key is not None:
            by_key.baddbmm_(slope.mT, queries - center, alpha=1 / temperature)
            # the slope along a key is lost with its length: there the center may be the key
            by_key.addcmul_(slope.sum(1).unsqueeze(2), keys, value=-1 / temperature)
    return loss
