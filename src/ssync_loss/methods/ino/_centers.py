"""The arithmetic of a moving center: what targets it makes, and where it was before each of its moves."""

import torch
from torch import Tensor


def targets(t: Tensor, center: Tensor, tau_t: float) -> Tensor:
    """Return the distributions (..., Kp) that teacher logits ask for; they have no gradient."""
    with torch.no_grad():
        return ((t - center) / tau_t).softmax(-1)


def cross_entropies(s: Tensor, t: Tensor, center: Tensor, tau_s: float, tau_t: float) -> Tensor:
    """Return the cross-entropy of every row (...) of student logits (..., Kp)."""
    return -(targets(t, center, tau_t) * (s / tau_s).log_softmax(-1)).sum(-1)


def sums_of_finite(rows: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add up the rows of n groups that count and hold neither NaN nor infinity.

    Shape:
        rows: (B, n, R, Kp). counted: (B, n, R), bool. Returns the sums (n, Kp), the rows in them (n,), and how many
        rows that count were left out.

    >>> rows = torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]).view(1, 1, 2, 2)
    >>> sums_of_finite(rows, torch.ones(1, 1, 2, dtype=torch.bool))
    (tensor([[1., 2.]]), tensor([1]), tensor(1))
    """
    low, high = rows.aminmax(dim=-1)
    used = counted & low.isfinite() & high.isfinite()
    sums = torch.where(used.unsqueeze(-1), rows, 0.0).sum((0, 2))
    return sums, used.sum((0, 2)), (counted & ~used).sum()


def trajectory(center: Tensor, sums: Tensor, counts: Tensor, momentum: float) -> Tensor:
    """Return the center before and after each of n moves, ``c <- momentum * c + (1 - momentum) * mean``.

    A group without rows moves nothing.

    Shape:
        center: (Kp,). sums: (n, Kp) of the rows of a group. counts: (n,). Returns (n + 1, Kp).

    >>> trajectory(torch.zeros(1), torch.tensor([[2.0], [0.0], [4.0]]), torch.tensor([2, 0, 1]), 0.5).T
    tensor([[0.0000, 0.5000, 0.5000, 2.2500]])
    """
    moves = (counts > 0).cumsum(0)
    # how many moves lie behind each of the centers
    behind = torch.nn.functional.pad(moves, (1, 0))
    since = (behind.unsqueeze(1) - moves).to(sums)
    # a center knows the moves before it
    weights = ((1 - momentum) * momentum**since).tril(-1)
    # 0 where there are no rows
    means = sums / counts.clamp_min(1).unsqueeze(1)
    return (momentum ** behind.to(sums)).unsqueeze(1) * center + weights @ means
