"""The computation of dense alignment: targets of every patch, and the mean over patches of all windows.

Targets that are uniform over a label need only the sum of the label's vectors, which takes time linear in the patches.
"""

import torch
from einops import rearrange
from torch import Tensor

from ssync_loss._autocast import no_autocast
from ssync_loss._autograd import learns
from ssync_loss._inputs import widest
from ssync_loss._rows import Targets, lowest, soft_cross_entropy
from ssync_loss._vectors import directions, known_gradient, through_lengths


def align(
    features: Tensor,
    anchors: Tensor,
    labels: Tensor,
    *,
    num_neighbors: int | None,
    group_frames: int,
    temperature: float,
    base_temperature: float,
    chunk_size: int | None,
) -> Tensor:
    """Compare all patches of a window with the window's anchors, or with each other if ``num_neighbors`` is given.

    Only the features get a gradient.
    """
    _, num_frames, _, height, _ = features.shape
    with_slope = learns(features)
    with torch.no_grad(), no_autocast(features):
        dtype = widest(features, anchors)
        units, inverse = directions(_windows(features, group_frames).to(dtype))
        aims, _ = directions(_windows(anchors, group_frames).to(dtype))
        to_anchors = num_neighbors is None
        keys = aims if to_anchors else units
        center = keys.mean(1, keepdim=True)
        keys = keys - center
        sums, counts = _sums_of_labels(keys, _windows(labels.unsqueeze(2), group_frames))
        if to_anchors:
            # the patch's anchor is half the target, the anchors of its label are the other half
            linear = (sums / counts + keys) / 2
        else:
            # the other patches of a patch's label; they have the patch as a target with the same weight
            counts -= 1
            linear = (sums - keys) * _half_of(counts)

        # divide first, which rounds as in the scores
        hits = (units / temperature * linear).sum(2, keepdim=True)

        def wanted(some: slice, rows: slice) -> Targets:
            part = hits[some][:, rows]
            if num_neighbors is None:
                return Targets(torch.ones_like(part), part, torch.zeros_like(part))
            return _neighbors(aims[some], counts[some][:, rows] > 0, part, rows, num_neighbors)

        slope = None
        if with_slope:
            slope = linear * (-(1 if to_anchors else 2) / temperature)
            if not to_anchors:
                # replaces the center by the patch itself, which changes only the component along the patch
                slope.addcmul_((counts > 0) / 2, keys, value=1 / temperature)
        total = soft_cross_entropy(
            units,
            keys,
            center,
            wanted,
            (slope, None if to_anchors else slope),
            temperature=temperature,
            chunk_size=chunk_size,
        )
        scale = temperature / base_temperature / max(labels.numel(), 1)
        if slope is None:
            return total * scale
        slope = through_lengths(slope, units, inverse * scale)
        # without clips, einops cannot infer the number of windows per clip
        per_clip = num_frames // group_frames
        slope = rearrange(slope, "(b k) (g h w) d -> b (k g) d h w", k=per_clip, g=group_frames, h=height)
    return known_gradient(features, total * scale, slope)


def _neighbors(anchors: Tensor, is_labeled: Tensor, linear: Tensor, rows: slice, num_neighbors: int) -> Targets:
    """Return the targets of some patches: other patches with the nearest anchors, and other patches of their label."""
    near = anchors[:, rows] @ anchors.mT
    # ties with the last neighbor are neighbors, too
    farthest = near.topk(num_neighbors, dim=2, sorted=False).values.amin(2, keepdim=True)
    first = rows.start or 0
    near.ge_(farthest).diagonal(first, 1, 2).zero_()
    counts = near.sum(2, keepdim=True)
    # NaN among the anchors must give NaN, not a patch without neighbors
    share = ((counts > 0).to(near) + is_labeled) / 2 + farthest * 0
    return Targets(
        share, linear, _half_of(counts), near, lambda scores: scores.diagonal(first, 1, 2).fill_(lowest(scores))
    )


def _windows(frames: Tensor, group_frames: int) -> Tensor:
    """Reshape (B, T, D, H, W) to (B T / g, g H W, D)."""
    return rearrange(frames, "b (k g) d h w -> (b k) (g h w) d", g=group_frames)


def _half_of(counts: Tensor) -> Tensor:
    """Return the weight of each of ``counts`` targets in half a mean, 0 if there are none."""
    return (counts > 0) / (2 * counts.clamp_min(1))


def _sums_of_labels(vectors: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return for every patch the sum (w, M, D) and the number (w, M, 1) of the vectors with its label (w, M, 1)."""
    labels = labels.squeeze(2).to(torch.int64).contiguous()
    ordered = labels.sort(1).values
    # rename a label to the index of its first patch in sorted order
    names = torch.searchsorted(ordered, labels).unsqueeze(2)
    counts = torch.searchsorted(ordered, labels, right=True).unsqueeze(2) - names
    names = names.expand_as(vectors)
    return torch.zeros_like(vectors).scatter_add_(1, names, vectors).gather(1, names), counts.to(vectors)
