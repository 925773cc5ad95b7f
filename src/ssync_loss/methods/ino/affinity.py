"""Affinity consistency: a student matches patches of consecutive frames as its teacher does."""

import torch
from torch import Tensor

from ssync_loss._autocast import no_autocast
from ssync_loss._autograd import attached_zero, learns
from ssync_loss._checks import check_equal_counts, check_same_device
from ssync_loss._inputs import widest
from ssync_loss._module import LossModule
from ssync_loss._rows import Targets, lowest, soft_cross_entropy
from ssync_loss._settings import OPTIONAL_COUNT, POSITIVE, check_by
from ssync_loss._vectors import directions, known_gradient, through_lengths
from ssync_loss.methods.ino._tokens import as_list, check_kept, check_tokens, positions_of

_check_settings = check_by(tau_s=POSITIVE, tau_t=POSITIVE, chunk_size=OPTIONAL_COUNT)


def affinity_consistency_loss(
    s: Tensor,
    t: Tensor,
    *,
    mask: Tensor | None = None,
    tau_s: float = 0.1,
    tau_t: float = 0.04,
    chunk_size: int | None = None,
) -> Tensor:
    """Teach a student the teacher's affinities between the patches of consecutive frames.

    With tokens of length 1, ``A_i[u, v]`` is the product of token u of frame i and token v of frame i + 1:
    ``loss = mean over clips, i < T and u of -sum_v softmax_v(A^t_i / tau_t) log softmax_v(A^s_i / tau_s)``. As the
    temperatures differ, the loss of a student that equals its teacher is above 0. The loss uses no positions, so frames
    may be cropped independently. Pass several crops of a frame as separate clips, (B g, T, n, D).

    Time is quadratic in the n tokens of a frame, kept or not. The forward also computes the gradient. Memory is two
    maps of B (T-1) n x n, or of ``chunk_size`` x n with the same value and gradient. A zero vector has cosine 0 with
    all others and gets no gradient. With a single frame, an empty mask, no clips or no tokens the loss is exactly 0,
    attached to the graph (the published code: NaN).

    Args:
        s: (B, T, D, H, W), or kept positions (B, T, n, D), the student's features of frames that may be masked; the
            only argument that gets a gradient. The published features are the logits of a :class:`PrototypeHead`.
        t: the same shape, the teacher's features of whole frames; the number of channels may differ.
        mask: (B, T, H, W) or (B, T, n), bool, kept positions, the same number in every frame; None keeps all. The
            number is not checked on an accelerator or under compilation.
        tau_s: temperature of the student, above 0.
        tau_t: temperature of the teacher, above 0.
        chunk_size: number of rows of affinities at a time, over all pairs of frames; None for all.

    Returns: a scalar in float32, or float64 if one of the features is.
    Source: Pan et al., ACM MM 2022 (arXiv:2203.15312), in-generative learning, L_in_aff of Fig. 2.
    Raises: TypeError on a wrong dtype; ValueError on wrong shapes or settings, or a mask that keeps more positions in
        one frame than in another.

    >>> import torch
    >>> frames = torch.eye(2).expand(1, 2, 2, 2)  # two tokens, nothing moves
    >>> # teacher and student give odds of e : 1: -(0.7311 log 0.7311 + 0.2689 log 0.2689)
    >>> round(affinity_consistency_loss(frames, frames, tau_s=1.0, tau_t=1.0).item(), 4)
    0.5822
    """
    _check_settings(tau_s=tau_s, tau_t=tau_t, chunk_size=chunk_size)
    size = check_tokens("s", s, "D")
    check_tokens("t", t, "C", **positions_of(size))
    check_same_device("t", t, s=s)
    tokens, targets = as_list(s), as_list(t)
    kept = torch.ones(tokens.shape[:3], dtype=torch.bool, device=s.device)
    if mask is not None:
        check_kept("mask", mask, size, s=s)
        kept = mask.flatten(2)
        check_equal_counts("mask", kept)
    if size["T"] == 1 or tokens.shape[0] == 0 or tokens.shape[2] == 0:
        return attached_zero(s, t.detach())
    with_slope = learns(s)
    with torch.no_grad(), no_autocast(s):
        # dropped positions may hold anything
        vectors, aims = (torch.where(kept.unsqueeze(3), one.to(widest(s, t)), 0.0) for one in (tokens, targets))
        units, inverse = directions(vectors)
        aims, _ = directions(aims)
        # pairs of frames, (B (T-1), n, .)
        (here, there), (source, goal), (rows, columns) = map(_pairs, (units, aims, kept))
        counted, closed = rows & columns.any(1, keepdim=True), ~columns.unsqueeze(1)

        def seen_by_the_teacher(some: slice, part: slice) -> Targets:
            def close(scores: Tensor) -> Tensor:
                # as marks sum to 1, a shift of the scores does not change the loss, but reduces rounding
                scores.masked_fill_(closed[some], lowest(scores))
                return scores.sub_(scores.amax(2, keepdim=True))

            marks = close((source[some][:, part] / tau_t) @ goal[some].mT).softmax(2)
            weight = counted[some][:, part].unsqueeze(2).to(marks)
            return Targets(weight, torch.zeros_like(weight), weight, marks, close)

        slopes = (torch.zeros_like(here), torch.zeros_like(there)) if with_slope else (None, None)
        center = there.mean(1, keepdim=True)
        total = soft_cross_entropy(
            here, there - center, center, seen_by_the_teacher, slopes, temperature=tau_s, chunk_size=chunk_size
        )
        number = counted.sum().clamp_min(1)
        by_here, by_there = slopes
        if by_here is None or by_there is None:
            return total / number
        slope = torch.zeros_like(units)
        slope[:, :-1] += by_here.view_as(slope[:, :-1])
        slope[:, 1:] += by_there.view_as(slope[:, 1:])
        slope = through_lengths(slope, units, inverse / number)
    return known_gradient(tokens, total / number, slope)


def _pairs(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Return all frames but the last, and the next frame of each, in one list over all clips."""
    return frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)


class AffinityConsistencyLoss(LossModule, check=_check_settings):
    """Module of :func:`affinity_consistency_loss`, with the same shapes and errors: ``forward(s, t, mask=None)``.

    >>> frames = torch.eye(2).expand(1, 2, 2, 2)
    >>> round(AffinityConsistencyLoss(tau_s=1.0, tau_t=1.0)(frames, frames).item(), 4)
    0.5822
    """

    def __init__(self, *, tau_s: float = 0.1, tau_t: float = 0.04, chunk_size: int | None = None) -> None:
        self.remember(locals())

    def forward(self, s: Tensor, t: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the term; see :func:`affinity_consistency_loss`."""
        return affinity_consistency_loss(s, t, mask=mask, **self.settings)
