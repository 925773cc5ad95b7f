"""Semantic consistency: corresponding patches of different frames belong to the same semantic."""

from typing import Literal, TypeAlias, get_args

import torch
from einops import reduce
from torch import Tensor

from ssync_loss._autocast import no_autocast
from ssync_loss._autograd import attached_zero
from ssync_loss._inputs import check_floats, widest
from ssync_loss._module import LossModule
from ssync_loss._rows import slices
from ssync_loss._settings import COUNT, OPTIONAL_COUNT, POSITIVE, check_by, one_of
from ssync_loss._vectors import directions
from ssync_loss.methods.smtc.sinkhorn import scalings, transport_plan

Marginals: TypeAlias = Literal["l1", "uniform"]
MARGINALS = get_args(Marginals)

# keeps the logarithm of a probability of 0 finite
EPSILON = 1e-8

_check_settings = check_by(
    eps=POSITIVE, iters=COUNT, marginals=one_of(*MARGINALS), pool=COUNT, chunk_size=OPTIONAL_COUNT
)

# float32 needs no logarithms for a kernel within exp(-25) and exp(25): scalings stay within the cubes of these bounds
LARGEST_SCORE = 25.0


def semantic_consistency_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    feats: Tensor,
    *,
    eps: float = 0.05,
    iters: int = 3,
    marginals: Marginals = "l1",
    pool: int = 1,
    chunk_size: int | None = 1,
) -> Tensor:
    """Teach every patch the semantics that a teacher gives the corresponding patches of other frames.

    Let f be the features at length 1, M the softmax over S of the logits, and M' the softmax of the teacher's logits.
    For all ordered pairs of frames t != j, ``plan = sinkhorn(1 - f_t f_j^T, mu_t, mu_j)`` and
    ``l_tj = -sum_{u,v} plan[u, v] sum_s M'_j[s, v] log(M_t[s, u] + 1e-8)``. The loss is the mean over clips and pairs.
    Slot s must have the same meaning in all frames, like global slots or slots that are passed from frame to frame.

    Time is quadratic in the patches N of a frame, for each of T (T - 1) / 2 pairs of frames. Memory is
    B x ``chunk_size`` kernels of N x N in the forward, and linear in N for the backward. With a single frame or no
    clips the loss is exactly 0, attached to the graph. A zero vector has cosine 0 with all others, and no weight under
    ``"l1"``. A frame of zero vectors is consistent with all frames.

    Args:
        logits: (B, T, S, H, W), the student's map; the only argument that gets a gradient.
        teacher_logits: (B, T, S, H, W), the map of a teacher, such as :class:`ssync_loss.ema.EmaTeacher`.
        feats: (B, T, D, H, W), features for correspondences, such as keys of a backbone.
        eps: weight of the entropy in the plan.
        iters: iterations of the plan.
        marginals: weight of a patch in the plan: ``"l1"``, as published, the sum of the absolute values of f, or
            ``"uniform"``.
        pool: side of the squares of patches that are averaged first; it must divide H and W. Time falls with its
            fourth power. The published loss has 1.
        chunk_size: pairs of frames at a time; None for all. More than 1 saves launches.

    Returns: a scalar in float32, or float64 if one of the tensors is.
    Source: Qian et al., ICCV 2023 (arXiv:2308.09951); the paper sums over pairs, the authors' code averages.
    Raises: TypeError on a wrong dtype, ValueError on wrong shapes or settings.

    >>> feats = torch.eye(2).view(1, 1, 2, 1, 2).repeat(1, 2, 1, 1, 1)  # nothing moves, and patches differ
    >>> maps = feats * 4  # every patch has another slot: log(1 + exp(-4)) = 0.0181
    >>> round(semantic_consistency_loss(maps, maps * 100, feats).item(), 4)
    0.0181
    """
    _check_settings(eps=eps, iters=iters, marginals=marginals, pool=pool, chunk_size=chunk_size)
    size = check_floats("logits", logits, "B T S H W", filled="T S H W")
    check_floats("teacher_logits", teacher_logits, "B T S H W", size, logits=logits)
    check_floats("feats", feats, "B T D H W", size, filled="D", logits=logits)
    if size["H"] % pool or size["W"] % pool:
        raise ValueError(f"`pool` must divide the grid, H={size['H']} and W={size['W']}; got {pool}.")
    dtype = widest(logits, teacher_logits, feats)
    if size["T"] == 1 or size["B"] == 0:
        return attached_zero(logits).to(dtype)
    with no_autocast(logits):
        with torch.no_grad():
            units, _ = directions(_pooled(feats.to(dtype), pool).mT)
            wanted = _wanted(
                _pooled(teacher_logits.to(dtype).softmax(2), pool),
                units,
                units.abs().sum(3) if marginals == "l1" else torch.ones_like(units[..., 0]),
                eps=eps,
                iters=iters,
                chunk_size=chunk_size,
            )
        log_probs = (_pooled(logits.to(dtype).softmax(2), pool) + EPSILON).log()
        return -(wanted * log_probs).sum() / (size["B"] * size["T"] * (size["T"] - 1))


def _wanted(maps: Tensor, units: Tensor, weights: Tensor, *, eps: float, iters: int, chunk_size: int | None) -> Tensor:
    """Return the target of every patch: the teacher's maps (B, T, S, N) of all other frames, transported and summed."""
    num_frames, num_patches = units.shape[1:3]
    mass = weights.sum(2, keepdim=True)
    # `!= 0` keeps NaN, which `> 0` would not
    known = mass != 0
    weights = torch.where(known, weights / torch.where(known, mass, 1.0), 1 / num_patches)
    known = known.unsqueeze(3)
    maps = torch.where(known, maps, 0.0)
    # every pair once: the opposite direction has the transposed cost
    first, second = torch.triu_indices(num_frames, num_frames, 1, device=units.device)
    wanted = torch.zeros_like(maps)
    by_products = 1 / eps <= LARGEST_SCORE
    for some in slices(len(first), chunk_size):
        pair = first[some], second[some]
        # the 1 in the cost 1 - cosine only scales the kernel, and the plan does not depend on its scale
        scores = (units[:, pair[0]] / eps) @ units[:, pair[1]].mT
        if by_products:
            scores.exp_()
        for here, there in (pair, pair[::-1]):
            carried, mu, nu = maps[:, there], weights[:, here], weights[:, there]
            if by_products:
                a, b = scalings(scores, mu, nu, iters)
                carried = ((carried * b) @ scores.mT) * a.mT
            else:
                carried = carried @ transport_plan(scores, mu, nu, iters).mT
            wanted.index_add_(1, here, carried)
            scores = scores.mT
        # free the memory before the next pairs
        del scores
    return torch.where(known, wanted, 0.0)


def _pooled(frames: Tensor, pool: int) -> Tensor:
    """Average squares of cells: (B, T, S, H, W) -> (B, T, S, N)."""
    return reduce(frames, "b t s (h i) (w j) -> b t s (h w)", "mean", i=pool, j=pool)


class SemanticConsistencyLoss(LossModule, check=_check_settings):
    """Module of :func:`semantic_consistency_loss`, with the same shapes and errors.

    ``forward(logits, teacher_logits, feats)``.

    >>> feats = torch.eye(2).view(1, 1, 2, 1, 2).repeat(1, 2, 1, 1, 1)
    >>> round(SemanticConsistencyLoss()(feats * 4, feats * 400, feats).item(), 4)
    0.0181
    """

    def __init__(
        self,
        *,
        eps: float = 0.05,
        iters: int = 3,
        marginals: Marginals = "l1",
        pool: int = 1,
        chunk_size: int | None = 1,
    ) -> None:
        self.remember(locals())

    def forward(self, logits: Tensor, teacher_logits: Tensor, feats: Tensor) -> Tensor:
        """Return the term; see :func:`semantic_consistency_loss`."""
        return semantic_consistency_loss(logits, teacher_logits, feats, **self.settings)
