"""INO in loops, see :mod:`ssync_loss.methods._slow`: one token, one view, one patch at a time.

Source: Pan et al., ACM MM 2022 (arXiv:2203.15312).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssync_loss.methods._slow import mean, unit, widened


def reference_affinity_consistency_loss(
    s: Tensor, t: Tensor, *, mask: Tensor | None = None, tau_s: float = 0.1, tau_t: float = 0.04
) -> Tensor:
    """Compare the student's and the teacher's affinities of every token (B, T, N, D) with the next frame."""
    num_clips, num_frames, num_tokens, _ = s.shape
    values = []
    for b in range(num_clips):
        kept = [[n for n in range(num_tokens) if mask is None or mask[b, i, n]] for i in range(num_frames)]
        for i in range(num_frames - 1):
            for u in kept[i] if kept[i + 1] else []:
                ours, theirs = (
                    torch.stack([unit(one[b, i, u]) @ unit(one[b, i + 1, v]) / tau for v in kept[i + 1]])
                    for one, tau in ((s, tau_s), (t, tau_t))
                )
                values.append(_cross_entropy(ours, theirs))
    return widened(mean(values, s), s, t)


def reference_centered_cross_entropy(
    s: Tensor, t: Tensor, center: Tensor, *, tau_s: float = 0.1, tau_t: float = 0.04
) -> Tensor:
    """Compare rows (R, Kp) of student logits with those of the teacher minus the center (Kp,).

    >>> logits = torch.tensor([[0.0, 1.0]])
    >>> round(reference_centered_cross_entropy(logits, logits, torch.zeros(2), tau_s=1.0, tau_t=1.0).item(), 4)
    0.5822
    """
    values = [
        _cross_entropy(ours.double() / tau_s, (theirs.double() - center.double()) / tau_t)
        for ours, theirs in zip(s, t, strict=True)
    ]
    return widened(mean(values, s), s, t)


def reference_moved_center(center: Tensor, t: Tensor, *, m_c: float = 0.9) -> Tensor:
    """Move a center (Kp,) toward the mean of rows (R, Kp) of teacher logits, in float64; without rows it stays.

    >>> reference_moved_center(torch.zeros(2), torch.tensor([[0.0, 1.0], [0.0, 3.0]])).tolist()
    [0.0, 0.19999999999999996]
    """
    if len(t) == 0:
        return center.double()
    return m_c * center.double() + (1 - m_c) * torch.stack([row.double() for row in t]).mean(0)


def reference_masked_token_loss(
    s_pat: Tensor,
    t_pat: Tensor,
    mask: Tensor,
    center: Tensor,
    *,
    tau_s: float = 0.1,
    tau_t: float = 0.04,
    m_c: float = 0.9,
    update_center: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compare the masked rows of (B, T, N, Kp) frame by frame; if asked, move the center after each frame.

    Returns the loss and the last center.
    """
    values = []
    for i in range(s_pat.shape[1]):
        ours, theirs = s_pat[:, i][mask[:, i]].double(), t_pat[:, i][mask[:, i]].double()
        if len(ours):
            values.append(reference_centered_cross_entropy(ours, theirs, center, tau_s=tau_s, tau_t=tau_t))
        if update_center:
            center = reference_moved_center(center, theirs, m_c=m_c)
    return widened(mean(values, s_pat), s_pat, t_pat), center


def reference_out_generative_loss(
    s_glob: Tensor,
    s_loc: Tensor,
    t_glob: Tensor,
    center: Tensor,
    *,
    tau_s: float = 0.1,
    tau_t: float = 0.04,
    m_c: float = 0.9,
    balance: str = "flat",
    update_center: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compare every student view with every other teacher view, pair by pair of frames.

    Returns the loss and the last center.
    """
    num_clips, num_frames, num_global, _ = s_glob.shape
    half = num_frames // 2
    to_global, to_local = [], []
    for i in range(half):
        pair = (i, i + half)
        for b in range(num_clips):
            for target in ((frame, crop) for frame in pair for crop in range(num_global)):
                wanted = (t_glob[b][target].double() - center.double()) / tau_t
                for frame in pair:
                    for crop in range(num_global):
                        if (frame, crop) != target:
                            to_global.append(_cross_entropy(s_glob[b, frame, crop].double() / tau_s, wanted))
                    for crop in range(s_loc.shape[2]):
                        to_local.append(_cross_entropy(s_loc[b, frame, crop].double() / tau_s, wanted))
        if update_center:
            center = reference_moved_center(center, t_glob[:, pair].flatten(0, 2), m_c=m_c)
    if balance == "flat" or not to_local:
        loss = mean(to_global + to_local, s_glob)
    else:
        loss = (mean(to_global, s_glob) + mean(to_local, s_loc)) / 2
    return widened(loss, s_glob, s_loc, t_glob), center


def reference_propagate_masks(
    features: Tensor,
    masks: Tensor,
    *,
    num_context: int = 10,
    radius: int = 40,
    top_k: int = 5,
    temperature: float = 0.1,
) -> Tensor:
    """Give every patch the masks of the most similar places in its context."""
    num_clips, num_frames, _, height, width = features.shape
    places = [(row, column) for row in range(height) for column in range(width)]
    result = masks.double().unsqueeze(1).repeat(1, num_frames, 1, 1, 1)
    for b in range(num_clips):
        for now in range(1, num_frames):
            context = [0, *range(max(1, now - num_context), now)]
            for row, column in places:
                query = unit(features[b, now, :, row, column])
                near = {
                    (i, y, x): torch.exp(query @ unit(features[b, i, :, y, x]) / temperature)
                    for i in context
                    for y, x in places
                    if abs(y - row) <= radius and abs(x - column) <= radius
                }
                least = sorted(near.values(), reverse=True)[:top_k][-1]
                used = {place: weight for place, weight in near.items() if weight >= least}
                total = sum(used.values())
                result[b, now, :, row, column] = sum(
                    weight * result[b, i, :, y, x] / total for (i, y, x), weight in used.items()
                )
    return result


def reference_propagate_labels(features: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    """Carry the masks of labels (B, H, W) on the grid of the features, stretch each to [0, 1], and take the largest.

    >>> reference_propagate_labels(torch.eye(2).view(1, 2, 2, 1, 1), torch.tensor([[[3]]])).flatten().tolist()
    [3, 3]
    """
    clips = []
    for video, first in zip(features, labels, strict=True):
        names = first.unique()
        masks = torch.stack([first == name for name in names]).unsqueeze(0)
        frames = [first]
        for frame in reference_propagate_masks(video.unsqueeze(0), masks, **settings)[0, 1:]:
            spans = [(mask.min(), mask.max() - mask.min()) for mask in frame]
            scores = [(mask - low) / span if span else mask for mask, (low, span) in zip(frame, spans, strict=True)]
            frames.append(names[torch.stack(scores).argmax(0)])
        clips.append(torch.stack(frames))
    return torch.stack(clips)


def reference_prototype_head(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the cosines of tokens (..., C) with the prototypes; the weights of a head by name.

    >>> layer = {"mlp.0.weight": torch.eye(2), "mlp.0.bias": torch.zeros(2)}
    >>> prototypes = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> cosines = reference_prototype_head(torch.tensor([[3.0, 4.0]]), layer | {"prototypes": prototypes})
    >>> [[round(one, 6) for one in row] for row in cosines.tolist()]
    [[0.6, 0.8]]
    """
    known = {name: one.double() for name, one in weights.items()}
    tokens = x.double().flatten(0, -2)
    layers = sorted(int(name.split(".")[1]) for name in known if name.startswith("mlp") and name.endswith("weight"))
    for layer in layers:
        if layer != layers[0]:
            tokens = tokens * (1 + torch.erf(tokens / 2**0.5)) / 2
        tokens = tokens @ known[f"mlp.{layer}.weight"].T + known[f"mlp.{layer}.bias"]
    cosines = torch.stack([torch.stack([unit(one) @ unit(other) for other in known["prototypes"]]) for one in tokens])
    return widened(cosines.unflatten(0, x.shape[:-1]), x)


def _cross_entropy(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the cross-entropy of scores (K,) with the distribution of other scores, which get no gradient."""
    return -(theirs.detach().softmax(0) * ours.log_softmax(0)).sum()
