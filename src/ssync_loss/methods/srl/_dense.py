"""How dense alignment is computed: the targets of a patch, and the mean over all patches of all windows."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from ssync_loss._autocast import no_autocast
from ssync_loss._inputs import widest
from ssync_loss._rows import soft_cross_entropy
from ssync_loss._vectors import directions, known_gradient, through_lengths

# from unit anchors (w, M, C) of some windows, their labels (w, M) and some of their patches
Rule = Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor | None]]


def decoder_targets(anchors: Tensor, labels: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Draw a patch to its own anchor, and as much to those of its label."""
    weights = _half_each(_same(labels, rows).to(anchors.dtype))
    weights.diagonal(rows.start or 0, 1, 2).add_(0.5)
    return weights, None


def encoder_targets(anchors: Tensor, labels: Tensor, rows: slice, *, num_neighbors: int) -> tuple[Tensor, Tensor]:
    """Draw a patch to those whose anchors are nearest, and as much to those of its label; it is not among them."""
    places = torch.arange(labels.shape[1], device=labels.device)
    itself = places[rows].unsqueeze(1) == places
    # in place: two maps are held at most
    near = anchors[:, rows] @ anchors.mT
    # ties with the last neighbor are neighbors too
    farthest = near.topk(num_neighbors, dim=2, sorted=False).values.amin(2, keepdim=True)
    weights = _half_each(near.ge_(farthest).masked_fill_(itself, 0.0))
    weights += _half_each(_same(labels, rows).to(anchors.dtype).masked_fill_(itself, 0.0))
    # what is NaN among the anchors must not pass for a patch without neighbors
    return weights.add_(farthest * 0), itself


def align(
    features: Tensor,
    anchors: Tensor,
    labels: Tensor,
    rule: Rule,
    *,
    to_anchors: bool,
    group_frames: int,
    temperature: float,
    base_temperature: float,
    chunk_size: int | None,
) -> Tensor:
    """Compare all patches of a window with its anchors, or with each other; only the features get a gradient."""
    _, num_frames, _, height, _ = features.shape
    with_slope = torch.is_grad_enabled() and features.requires_grad
    with torch.no_grad(), no_autocast(features):
        dtype = widest(features, anchors)
        units, inverse = directions(_windows(features, group_frames).to(dtype))
        unit_anchors, _ = directions(_windows(anchors, group_frames).to(dtype))
        names = _windows(labels.unsqueeze(2), group_frames).squeeze(2)
        slope = torch.zeros_like(units) if with_slope else None
        total = soft_cross_entropy(
            units,
            unit_anchors if to_anchors else units,
            lambda some, rows: rule(unit_anchors[some], names[some], rows),
            (slope, None if to_anchors else slope),
            temperature=temperature,
            chunk_size=chunk_size,
        )
        # no mean: without clips that is NaN
        scale = temperature / base_temperature / max(names.numel(), 1)
        if slope is None:
            return total * scale
        slope = through_lengths(slope, units, inverse * scale)
        # by the windows of a clip: the number of clips may be 0
        per_clip = num_frames // group_frames
        slope = rearrange(slope, "(b k) (g h w) d -> b (k g) d h w", k=per_clip, g=group_frames, h=height)
    return known_gradient(features, total * scale, slope)


def _windows(frames: Tensor, group_frames: int) -> Tensor:
    """(B, T, D, H, W) -> (B T / g, g H W, D)."""
    return rearrange(frames, "b (k g) d h w -> (b k) (g h w) d", g=group_frames)


def _same(labels: Tensor, rows: slice) -> Tensor:
    """Tell which patches have the label of each of some: (w, M) -> (w, r, M)."""
    return labels[:, rows].unsqueeze(2) == labels.unsqueeze(1)


def _half_each(chosen: Tensor) -> Tensor:
    """Divide 1/2 among what is chosen in a row, as ones of (w, r, M), in place; where nothing is, it is 0."""
    return chosen.div_(2 * chosen.sum(2, keepdim=True).clamp_min(1))
