"""Number of children of each slot."""

import torch
from torch import Tensor

from ssync_loss._checks import check_int
from ssync_loss._inputs import check_floats


@torch.no_grad()
def allot_children(errors: Tensor, n_new: int) -> Tensor:
    """Allot new slots to present slots in proportion to their errors, by largest remainders: (K,), int64.

    ``a = n_new errors / sum errors``, in float64. Every slot gets ``floor(a)``. The slots with the largest remainders
    ``a - floor(a)`` get one more each, the lower index on ties, until ``n_new`` are allotted. If all errors are 0, or
    one is negative, NaN or infinite, the slots take turns, from the first on.

    Args:
        errors: (K,), of the present slots, see :func:`slot_error`.
        n_new: new slots, at least 0.

    Source: Moon, Seong & Heo, CVPR 2026 (arXiv:2603.22758), the allotment of new slots.
    Raises: TypeError on a wrong type, ValueError on a wrong shape or number.

    >>> allot_children(torch.tensor([5.0, 3.0, 0.0, 2.0]), 4).tolist()  # shares 2, 1.2, 0, 0.8
    [2, 1, 0, 1]
    """
    size = check_floats("errors", errors, "K", filled="K")
    check_int("n_new", n_new, 0)
    index = torch.arange(size["K"], device=errors.device)
    errors = errors.double()
    total = errors.sum()
    share = errors * n_new / total
    whole = share.floor()
    order = (share - whole).argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, index)
    counts = whole + (rank < n_new - whole.sum())
    in_turn = n_new // size["K"] + (index < n_new % size["K"])
    known = total.isfinite() & (total > 0) & (errors >= 0).all()
    # NaN must be replaced before the conversion to integers
    return torch.where(known, counts, in_turn.double()).to(torch.int64)
