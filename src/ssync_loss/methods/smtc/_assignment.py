"""The one-to-one assignment of P rows to P columns with the largest sum, exactly."""

from collections.abc import Callable
from math import factorial

import torch
from torch import Tensor

from ssync_loss._compilers import is_exporting

# 6 instances have 720 permutations, 7 have 5040
MOST_ENUMERATED = 6


@torch.no_grad()
def best_assignment(scores: Tensor) -> Tensor:
    """Assign the rows of scores (..., P, P) to different columns, (..., P), such that the sum of scores is largest.

    For P up to 6, tensor operations compare all permutations, and the lexicographically first wins ties. For larger P,
    scipy solves one problem after the other on the host.
    """
    num_things = scores.shape[-1]
    if num_things > MOST_ENUMERATED:
        if is_exporting():
            raise RuntimeError(
                f"More than {MOST_ENUMERATED} instances are assigned by scipy, which torch.export cannot follow."
            )
        # not at import, as `torch.compiler.disable` imports the whole compiler
        assign: Callable[[Tensor], Tensor] = torch.compiler.disable(_on_host)
        return assign(scores)
    orders = _permutations(num_things, scores.device)
    # with problems in the last axis, selecting a column copies contiguous memory
    columns = scores.reshape(-1, num_things, num_things).permute(1, 2, 0).contiguous()
    sums = columns[0].index_select(0, orders[:, 0])
    for row in range(1, num_things):
        sums += columns[row].index_select(0, orders[:, row])
    best: Tensor = orders[sums.mT.contiguous().argmax(1)]
    return best.view(scores.shape[:-1])


def _permutations(size: int, device: torch.device) -> Tensor:
    """Return all permutations of 0, 1, ..., size - 1 in lexicographic order."""
    number = torch.arange(factorial(size), device=device)
    # first the rank of each entry among the remaining entries, then, from the end, its value
    orders = torch.stack([number // factorial(size - 1 - i) % (size - i) for i in range(size)], 1)
    for i in reversed(range(size - 1)):
        orders[:, i + 1 :] += orders[:, i + 1 :] >= orders[:, i : i + 1]
    return orders


def _on_host(scores: Tensor) -> Tensor:
    try:
        # an optional extra, not needed for few instances
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            f'More than {MOST_ENUMERATED} instances are assigned by scipy: pip install "ssync-loss[metrics]".'
        ) from error
    # scipy refuses NaN, and any assignment gives a loss of NaN
    problems = scores.nan_to_num().reshape(-1, *scores.shape[-2:]).cpu().numpy()
    columns = [torch.from_numpy(linear_sum_assignment(one, maximize=True)[1]) for one in problems]
    empty = torch.empty(0, scores.shape[-1], dtype=torch.int64)
    return torch.stack(columns or [empty]).view(scores.shape[:-1]).to(scores.device)
