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


def trajectory(center: Tensor, sums: Tensor, counts: Tensor, momentum: float) -> Tensor:
    """Return the center (Kp,) before and after each of n moves, ``c <- momentum * c + (1 - momentum) * mean``.

    The means are those of groups of rows, from their sums (n, Kp) and counts (n,); no rows move nothing.

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
