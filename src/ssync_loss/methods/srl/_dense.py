"""How dense alignment is computed: some rows of the score matrix at a time, their gradient beside their value.

The gradient of a row's loss with respect to its scores is the softmax minus the targets, and both are at hand when
the loss is. Formed there, it costs the products that any backward needs, and no score is kept or computed twice.
Targets that are uniform over a label enter through the sum of the label's vectors: linear in the patches.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ssync_loss._autocast import no_autocast
from ssync_loss._chunks import Chunks
from ssync_loss._vectors import directions, known_gradient

# exponentials of scores of this size neither overflow nor underflow, and sum up in float32
LARGEST_SCORE = 40.0


class Windows(NamedTuple):
    """Windows of M patches: unit vectors (w, M, D) and (w, M, C), names of the labels (w, M) within [0, M)."""

    features: Tensor
    anchors: Tensor
    names: Tensor


# writes the loss of every patch (w, M), and into zeros (w, M, D) the gradient of their sum
Term = Callable[[Windows, Chunks, Tensor, Tensor | None], None]


def decoder_term(*, temperature: float) -> Term:
    """Return the term that draws a patch's feature to its own anchor and to those of the patch's label.

    ``-(mean over the label's j of log P_ij + log P_ii) / 2`` with ``P_i = softmax_j(x_i y_j / temperature)``.
    """
    return partial(_decoder_term, temperature=temperature)


def encoder_term(*, temperature: float, num_neighbors: int) -> Term:
    """Return the term that draws features to those of the nearest anchors and of the patch's label.

    ``-(mean over neighbors j of log P_ij + mean over the label's j of log P_ij) / 2`` with
    ``P_i = softmax_{j != i}(x_i x_j / temperature)``. A mean of nothing is 0.
    """
    return partial(_encoder_term, temperature=temperature, num_neighbors=num_neighbors)


def align(
    features: Tensor,
    anchors: Tensor,
    labels: Tensor,
    term: Term,
    *,
    group_frames: int,
    scale: float,
    chunk_size: int | None,
) -> Tensor:
    """Return ``scale`` times the mean of a term over all patches, attached to the features alone."""
    with_slope = torch.is_grad_enabled() and features.requires_grad
    with torch.no_grad(), no_autocast(features):
        value, slope = _value_and_slope(features, anchors, labels, term, group_frames, scale, chunk_size, with_slope)
    return value if slope is None else known_gradient(features, value, slope)


def _value_and_slope(
    features: Tensor,
    anchors: Tensor,
    labels: Tensor,
    term: Term,
    group_frames: int,
    scale: float,
    chunk_size: int | None,
    with_slope: bool,
) -> tuple[Tensor, Tensor | None]:
    size = dict(zip("BTDHW", features.shape, strict=True))
    dtype = torch.promote_types(torch.promote_types(features.dtype, anchors.dtype), torch.float32)
    num_windows, num_patches = size["B"] * size["T"] // group_frames, group_frames * size["H"] * size["W"]
    features, anchors, labels = (
        rearrange(one, "b (k g) ... -> (b k) g ...", g=group_frames) for one in (features, anchors, labels)
    )
    chunks = Chunks(num_windows, num_patches, chunk_size)
    losses = torch.zeros(num_windows, num_patches, dtype=dtype, device=features.device)
    slope = losses.new_zeros(num_windows, num_patches, size["D"]) if with_slope else None
    scale = scale / max(num_windows * num_patches, 1)
    for some in chunks.windows:
        units, inverse = directions(_patches(features[some], dtype))
        targets, _ = directions(_patches(anchors[some], dtype))
        part = None if slope is None else slope[some]
        term(Windows(units, targets, _names(labels[some].flatten(1))), chunks, losses[some], part)
        if part is not None:
            # along the vector nothing changes, as its length is divided out
            along = (part * units).sum(2, keepdim=True)
            part.addcmul_(units, along, value=-1).mul_(inverse * scale)
    # no mean: without clips that is NaN
    value = losses.sum() * scale
    if slope is not None:
        # by the windows of a clip: the number of clips may be 0
        per_clip = size["T"] // group_frames
        slope = rearrange(slope, "(b k) (g h w) d -> b (k g) d h w", k=per_clip, g=group_frames, h=size["H"])
    return value, slope


def _decoder_term(
    windows: Windows, chunks: Chunks, losses: Tensor, slope: Tensor | None, *, temperature: float
) -> None:
    features, anchors, names = windows
    sums, counts = _sums_of_names(anchors, names)
    # what the targets make of the anchors
    aim = sums.div_(counts).add_(anchors).div_(2)
    losses -= (features * aim).sum(2) / temperature
    for rows in chunks.rows:
        scores = chunks.products("scores", features[:, rows], anchors, 1 / temperature)
        log_total, total = _exponentiate(scores, temperature)
        losses[:, rows] += log_total.squeeze(2)
        if slope is not None:
            # in place: as an expression, torch 2.13 compiles this and what follows to wrong numbers on a CPU
            slope[:, rows].baddbmm_(scores, anchors, beta=0).div_(total)
    if slope is not None:
        slope.sub_(aim).div_(temperature)


def _encoder_term(
    windows: Windows, chunks: Chunks, losses: Tensor, slope: Tensor | None, *, temperature: float, num_neighbors: int
) -> None:
    features, anchors, names = windows
    sums, counts = _sums_of_names(features, names)
    # the other patches of the label, with the weight of each
    others = counts - 1
    aim = sums.sub_(features).mul_(_half_of(others))
    losses -= (features * aim).sum(2) / temperature
    for rows in chunks.rows:
        first = rows.start or 0
        near = chunks.products("near", anchors[:, rows], anchors)
        # ties with the last neighbor are neighbors too
        farthest = near.topk(num_neighbors, dim=2, sorted=False).values.amin(2, keepdim=True)
        near.ge_(farthest).diagonal(first, 1, 2).zero_()
        num_near = near.sum(2, keepdim=True)
        weight = _half_of(num_near)
        scores = chunks.products("scores", features[:, rows], features, 1 / temperature)
        # as products of rows: no other map is needed
        near_scores = torch.matmul(near.unsqueeze(2), scores.unsqueeze(3)).squeeze(3)
        scores.diagonal(first, 1, 2).fill_(float("-inf"))
        log_total, total = _exponentiate(scores, temperature)
        share = ((num_near > 0).to(total) + (others[:, rows] > 0)) / 2
        # what is NaN among the anchors must not pass for a patch without neighbors
        losses[:, rows] += (share * log_total - weight * near_scores + farthest * 0).squeeze(2)
        if slope is not None:
            scores.mul_(share / total).addcmul_(near, weight, value=-1)
            slope[:, rows].baddbmm_(scores, features)
            slope.baddbmm_(scores.mT, features[:, rows])
    if slope is not None:
        # a patch's label-mates point back at it with the same weight
        slope.sub_(aim, alpha=2).div_(temperature)


def _exponentiate(scores: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Replace rows of scores by ``exp(scores - shift)``; return the log of the sum of their exps, and their new sum.

    A sum of nothing counts as the smallest number there is.
    """
    tiny = torch.finfo(scores.dtype).tiny
    if 1 / temperature <= LARGEST_SCORE:
        total = scores.exp_().sum(2, keepdim=True).clamp_min(tiny)
        return total.log(), total
    shift = scores.amax(2, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    total = scores.sub_(shift).exp_().sum(2, keepdim=True).clamp_min(tiny)
    return total.log() + shift, total


def _half_of(counts: Tensor) -> Tensor:
    """Return the weight of one of so many targets in half a mean, 0 where there are none."""
    return (counts > 0) / (2 * counts.clamp_min(1))


def _patches(frames: Tensor, dtype: torch.dtype) -> Tensor:
    return rearrange(frames, "k g d h w -> k (g h w) d").to(dtype)


def _names(labels: Tensor) -> Tensor:
    """Number the labels of every window from 0 on in their order: (w, M) integers -> (w, M) within [0, M)."""
    ordered, order = labels.to(torch.int64).sort(dim=1)
    names = torch.nn.functional.pad((ordered[:, 1:] != ordered[:, :-1]).cumsum(1), (1, 0))
    return torch.empty_like(names).scatter_(1, order, names)


def _sums_of_names(vectors: Tensor, names: Tensor) -> tuple[Tensor, Tensor]:
    """Give every patch the sum of the vectors of its name, (w, M, D), and how many they are, (w, M, 1)."""
    num_windows, num_patches, _ = vectors.shape
    windows = torch.arange(num_windows, device=names.device).unsqueeze(1)
    flat = (names + num_patches * windows).flatten()
    both = []
    for one in (vectors, vectors.new_ones(num_windows, num_patches, 1)):
        rows = one.flatten(0, 1)
        sums = torch.zeros_like(rows).index_add_(0, flat, rows)
        both.append(sums.index_select(0, flat).view_as(one))
    return both[0], both[1]
