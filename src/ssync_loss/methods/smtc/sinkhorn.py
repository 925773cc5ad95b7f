"""Optimal transport with an entropy, by rescaling rows and columns in turn."""

import torch
from torch import Tensor

from ssync_loss._autocast import no_autocast
from ssync_loss._checks import check_positive
from ssync_loss._inputs import check_floats, widest
from ssync_loss._settings import COUNT, POSITIVE, check_by

_check_settings = check_by(eps=POSITIVE, iters=COUNT)


@torch.no_grad()
def sinkhorn(cost: Tensor, mu: Tensor, nu: Tensor, *, eps: float = 0.05, iters: int = 3) -> Tensor:
    """Return a plan that transports one set of weights to another at low cost, without gradient.

    With ``K = exp(-cost / eps)`` and mu, nu scaled to sum 1: ``b = 1``, then ``iters`` times ``a = mu / (K b)`` and
    ``b = nu / (K^T a)``; ``plan[n, m] = a[n] K[n, m] b[m]``. Columns sum to nu exactly, as they are scaled last. Rows
    sum to mu in the limit of many iterations. The computation uses logarithms, so a small ``eps`` does not underflow.

    Args:
        cost: (B, N, M), cost of moving one unit from n to m.
        mu: (B, N), weights of the sources, above 0.
        nu: (B, M), weights of the destinations, above 0.
        eps: weight of the entropy; a small weight uses only the cheapest moves.
        iters: number of rescalings of both sides.

    Returns: (B, N, M) in float32, or float64 if an argument is.
    Source: Cuturi, NeurIPS 2013; settings of Qian et al., ICCV 2023 (arXiv:2308.09951).
    Raises: TypeError on a wrong dtype; ValueError on wrong shapes or settings, or on a weight that is not positive, if
        reading it waits for no device.

    >>> free = torch.zeros(1, 2, 2)  # all moves are free: the plan is mu x nu
    >>> sinkhorn(free, torch.tensor([[1.0, 3.0]]), torch.ones(1, 2))
    tensor([[[0.1250, 0.1250],
             [0.3750, 0.3750]]])
    """
    _check_settings(eps=eps, iters=iters)
    size = check_floats("cost", cost, "B N M", filled="N M")
    check_floats("mu", mu, "B N", size, cost=cost)
    check_floats("nu", nu, "B M", size, cost=cost)
    check_positive("mu", mu)
    check_positive("nu", nu)
    with no_autocast(cost):
        dtype = widest(cost, mu, nu)
        cost, mu, nu = (one.to(dtype) for one in (cost, mu, nu))
        mu, nu = (one / one.sum(1, keepdim=True) for one in (mu, nu))
        return transport_plan(cost / -eps, mu, nu, iters)


def transport_plan(scores: Tensor, mu: Tensor, nu: Tensor, iters: int) -> Tensor:
    """Return the plan of a kernel ``exp(scores)`` (..., N, M) between weights (..., N) and (..., M) of sum 1.

    A weight of 0 gives a row or a column of 0.
    """
    log_mu, log_nu = mu.log().unsqueeze(-1), nu.log().unsqueeze(-2)
    log_a = log_mu - scores.logsumexp(-1, keepdim=True)
    for _ in range(iters - 1):
        log_b = log_nu - (scores + log_a).logsumexp(-2, keepdim=True)
        log_a = log_mu - (scores + log_b).logsumexp(-1, keepdim=True)
    # a softmax scales the columns last, so that their sums are right even for large scores
    return (scores + log_a).softmax(-2) * nu.unsqueeze(-2)


def scalings(kernel: Tensor, mu: Tensor, nu: Tensor, iters: int) -> tuple[Tensor, Tensor]:
    """Return the scalings of rows, (..., N, 1), and columns, (..., 1, M), of a kernel that does not underflow.

    ``a * kernel * b`` is the plan of :func:`transport_plan`, computed without logarithms.
    """
    mu, nu = mu.unsqueeze(-1), nu.unsqueeze(-1)
    b = torch.ones_like(nu)
    for _ in range(iters):
        a = mu / (kernel @ b)
        b = nu / (kernel.mT @ a)
    return a, b.mT
