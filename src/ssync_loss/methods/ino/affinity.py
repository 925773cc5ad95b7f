"""Affinity consistency: which patch of the next frame a patch is like, as a teacher sees it."""

import torch
from torch import Tensor, nn

from ssync_loss._attached import attached_zero
from ssync_loss._autocast import no_autocast
from ssync_loss._checks import check_equal_counts, check_int, check_number, check_same_device
from ssync_loss._chunks import Chunks
from ssync_loss._module import settings_of
from ssync_loss._vectors import directions, known_gradient
from ssync_loss.methods.ino._tokens import as_list, check_mask, check_tokens, positions_of


def affinity_consistency_loss(
    s: Tensor,
    t: Tensor,
    *,
    mask: Tensor | None = None,
    tau_s: float = 0.1,
    tau_t: float = 0.04,
    chunk_size: int | None = None,
) -> Tensor:
    """Ask a student to find a patch again in the next frame where its teacher finds it.

    With the tokens at length 1, ``A_i[u, v] = token u of frame i times token v of frame i + 1``, one direction:
    ``loss = mean over clips, i < T and u of -sum_v softmax_v(A^t_i / tau_t) log softmax_v(A^s_i / tau_s)``. The
    temperatures differ, so that the loss of a student that equals its teacher is above 0. No position is a label:
    frames may be cropped each on its own.

    Time is quadratic in the n tokens of a frame: two products of B (T-1) n x n x D numbers, and two more for the
    gradient, which is formed in the forward. Memory is two maps of B (T-1) n x n, or of ``chunk_size`` x n with the
    same value and gradient. Pool the grid, or keep some positions: a list of n of N tokens costs n^2, where a
    ``mask`` over all N costs N^2.

    A zero vector has cosine 0 with everything and gets no gradient. A single frame, no clips, no tokens and an empty
    mask give exactly 0, attached to the graph (the published code: NaN). Several crops of a frame are clips of
    their own, (B g, T, n, D).

    Shape:
        s, t: (B, T, D, H, W), or kept positions (B, T, n, D); t may have channels of its own. mask: (B, T, H, W) or
        (B, T, n), bool. Returns a scalar in float32, or float64 if one of both is.

    Args:
        s: the student's features of what may be masked frames; the only argument that gets a gradient. A trained
            encoder's output, or reconstructed features; published are the logits of a :class:`PrototypeHead`
            at the masked positions.
        t: the teacher's features of whole frames.
        mask: positions that take part, as many in every frame; None for all. On an accelerator and under
            compilation numbers that differ cannot be seen without waiting: every patch then counts alike.
        tau_s: temperature of the student, above 0.
        tau_t: temperature of the teacher, above 0.
        chunk_size: rows of affinities that are held at once, over all pairs of frames; None for all.

    Source: Pan et al., ACM MM 2022 (arXiv:2203.15312), in-generative learning, L_in_aff of Fig. 2.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on wrong shapes or settings, or a mask that keeps more positions in one frame than in another.

    >>> import torch
    >>> frames = torch.eye(2).expand(1, 2, 2, 2)  # two tokens, nothing moves
    >>> # the teacher is e : 1 sure of a token, the student too: -(0.7311 log 0.7311 + 0.2689 log 0.2689)
    >>> round(affinity_consistency_loss(frames, frames, tau_s=1.0, tau_t=1.0).item(), 4)
    0.5822
    """
    _check_settings(tau_s, tau_t, chunk_size)
    size = check_tokens("s", s, "D")
    check_tokens("t", t, "C", **positions_of(size))
    check_same_device("t", t, s=s)
    kept = None
    if mask is not None:
        check_mask("mask", mask, size, s=s)
        kept = mask.flatten(2)
        check_equal_counts("mask", kept)
    tokens, targets = as_list(s), as_list(t)
    if size["T"] == 1 or tokens.shape[0] == 0 or tokens.shape[2] == 0:
        return attached_zero(s, t.detach())
    with_slope = torch.is_grad_enabled() and s.requires_grad
    with torch.no_grad(), no_autocast(s):
        value, slope = _value_and_slope(tokens, targets, kept, tau_s, tau_t, chunk_size, with_slope)
    return value if slope is None else known_gradient(tokens, value, slope)


def _value_and_slope(
    s: Tensor, t: Tensor, kept: Tensor | None, tau_s: float, tau_t: float, chunk_size: int | None, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of tokens (B, T, n, D), and its gradient with respect to the student's."""
    dtype = torch.promote_types(torch.promote_types(s.dtype, t.dtype), torch.float32)
    s, t = s.to(dtype), t.to(dtype)
    if kept is not None:
        # what is dropped may hold anything
        s, t = (torch.where(kept.unsqueeze(3), one, 0.0) for one in (s, t))
    units, inverse = directions(s)
    targets, _ = directions(t)
    # every pair of frames by itself, (B (T-1), n, .)
    (here, there), (from_, to) = _pairs(units), _pairs(targets)
    num_pairs, num_tokens, _ = here.shape
    counted = closed = None
    number: Tensor | int = num_pairs * num_tokens
    if kept is not None:
        rows, columns = _pairs(kept)
        counted, closed = rows & columns.any(1, keepdim=True), ~columns.unsqueeze(1)
        number = counted.sum().clamp_min(1)

    chunks = Chunks(num_pairs, num_tokens, chunk_size)
    losses = here.new_zeros(num_pairs, num_tokens)
    slopes = (torch.zeros_like(here), torch.zeros_like(there)) if with_slope else None
    # finite, so that times a probability of 0 it is 0
    far = torch.finfo(dtype).min / 2
    for some in chunks.windows:
        for part in chunks.rows:
            scores = chunks.products("student", here[some][:, part], there[some], 1 / tau_s)
            aims = chunks.products("teacher", from_[some][:, part], to[some], 1 / tau_t)
            if closed is not None:
                scores.masked_fill_(closed[some], far)
                aims.masked_fill_(closed[some], far)
            aims.sub_(aims.amax(2, keepdim=True)).exp_()
            aims.div_(aims.sum(2, keepdim=True))
            scores.sub_(scores.amax(2, keepdim=True))
            # as products of rows: no other map is needed
            aimed = torch.matmul(aims.unsqueeze(2), scores.unsqueeze(3)).flatten(1)
            total = scores.exp_().sum(2, keepdim=True)
            losses[some][:, part] = total.log().squeeze(2) - aimed
            if slopes is not None:
                # 0 where a token is dropped: as a target both are 0, and as a query it is a zero vector
                scores.div_(total).sub_(aims)
                # in place: as an expression, torch 2.13 compiles this and what follows to wrong numbers on a CPU
                slopes[0][some][:, part].baddbmm_(scores, there[some], beta=0)
                slopes[1][some].baddbmm_(scores.mT, here[some][:, part])
    value = (losses if counted is None else losses * counted).sum() / number
    if slopes is None:
        return value, None
    slope = torch.zeros_like(units)
    slope[:, :-1] += slopes[0].view_as(units[:, :-1])
    slope[:, 1:] += slopes[1].view_as(units[:, 1:])
    # along the vector nothing changes, as its length is divided out
    along = (slope * units).sum(3, keepdim=True)
    return value, slope.addcmul_(units, along, value=-1).mul_(inverse / tau_s / number)


def _pairs(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Return every frame but the last, and beside each the next one, over all clips."""
    return frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)


class AffinityConsistencyLoss(nn.Module):
    """Module of :func:`affinity_consistency_loss`: a student finds patches again where its teacher does.

    ``forward(s, t, mask=None)``.

    Source: Pan et al., ACM MM 2022 (arXiv:2203.15312), in-generative learning, L_in_aff of Fig. 2.

    >>> frames = torch.eye(2).expand(1, 2, 2, 2)
    >>> round(AffinityConsistencyLoss(tau_s=1.0, tau_t=1.0)(frames, frames).item(), 4)
    0.5822
    """

    def __init__(self, *, tau_s: float = 0.1, tau_t: float = 0.04, chunk_size: int | None = None) -> None:
        super().__init__()
        _check_settings(tau_s, tau_t, chunk_size)
        self.tau_s = tau_s
        self.tau_t = tau_t
        self.chunk_size = chunk_size

    def forward(self, s: Tensor, t: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the term; see :func:`affinity_consistency_loss`."""
        return affinity_consistency_loss(s, t, mask=mask, **settings_of(self, AffinityConsistencyLoss))

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"tau_s={self.tau_s}, tau_t={self.tau_t}, chunk_size={self.chunk_size}"


def _check_settings(tau_s: object, tau_t: object, chunk_size: object) -> None:
    check_number("tau_s", tau_s, 0.0, open_low=True)
    check_number("tau_t", tau_t, 0.0, open_low=True)
    if chunk_size is not None:
        check_int("chunk_size", chunk_size, 1)
