"""Temporal slot contrast: a slot is similar to itself in other frames, and differs from other slots."""

from typing import Literal, TypeAlias, get_args

import torch
from einops import rearrange
from torch import Tensor

from ssync_loss._autocast import at_least_float32, no_autocast
from ssync_loss._autograd import attached_zero
from ssync_loss._inputs import check_floats
from ssync_loss._module import LossModule
from ssync_loss._settings import POSITIVE, check_by, one_of
from ssync_loss._vectors import directions, products

Contrast: TypeAlias = Literal["adjacent", "supervised"]
Negatives: TypeAlias = Literal["batch", "video"]
CONTRASTS = get_args(Contrast)
NEGATIVES = get_args(Negatives)

_check_settings = check_by(temperature=POSITIVE, kind=one_of(*CONTRASTS), negatives=one_of(*NEGATIVES))

BASE_TEMPERATURE = 0.07


def temporal_slot_contrast_loss(
    slots: Tensor, *, temperature: float = 0.1, kind: Contrast = "adjacent", negatives: Negatives = "batch"
) -> Tensor:
    """Make every slot more similar to itself in the neighboring frames than to any other slot.

    With z the slots at length 1, ``"adjacent"`` is ``mean over t and slots i of frame t + 1 of
    -log softmax_j(z_j z_i / temperature)[i]``, where j runs over the slots of frame t.

    ``"supervised"`` averages over the slots of all frames: ``(temperature / 0.07) * mean over slots i of
    -mean over positives p of log(exp(z_i z_p / temperature) / sum_j exp(z_i z_j / temperature))``. Positives are the
    same slot in the previous and the next frame. j runs over the positives and over all other slots of all frames, but
    not over the same slot in other frames. With a single frame or no clips the loss is exactly 0, attached to the
    graph. A zero vector has cosine 0 with all others and no gradient.

    Args:
        slots: (B, T, S, D), slots of every frame, in the same order in all frames.
        temperature: temperature of the softmax, above 0.
        kind: ``"adjacent"`` or ``"supervised"``.
        negatives: other slots come from all clips (``"batch"``) or from the same clip (``"video"``).

    Returns: a scalar in float32, or float64 if the slots are.
    Source: Manasyan et al., CVPR 2025 (arXiv:2412.14295; ``"adjacent"``); Seong, Moon & Heo, ICLR 2026
        (arXiv:2602.03390; ``"supervised"``).
    Raises: TypeError on a wrong dtype, ValueError on wrong shapes or settings.

    >>> slots = torch.eye(2).repeat(2, 1).view(1, 2, 2, 2)  # two frames, nothing moves: -log(e / (e + 1))
    >>> round(temporal_slot_contrast_loss(slots, temperature=1.0).item(), 4)
    0.3133
    """
    _check_settings(temperature=temperature, kind=kind, negatives=negatives)
    size = check_floats("slots", slots, "B T S D", filled="T S D")
    if size["T"] == 1 or size["B"] == 0:
        return attached_zero(slots)
    with no_autocast(slots):
        units, _ = directions(at_least_float32(slots))
        # slots of a group are negatives of each other, (G, T, n, D)
        pattern = "b t s d -> () t (b s) d" if negatives == "batch" else "b t s d -> b t s d"
        units = rearrange(units, pattern)
        return _adjacent(units, temperature) if kind == "adjacent" else _supervised(units, temperature)


def _adjacent(units: Tensor, temperature: float) -> Tensor:
    scores = products(units[:, 1:] / temperature, units[:, :-1])
    gaps = scores - scores.diagonal(dim1=2, dim2=3).unsqueeze(3)
    own = torch.eye(gaps.shape[3], dtype=torch.bool, device=gaps.device)
    others = gaps.masked_fill(own, float("-inf")).logsumexp(3)
    # if a slot matches itself, the loss is the small sum of the others, which adding 1 would round off
    return torch.logaddexp(others, torch.zeros_like(others)).mean()


def _supervised(units: Tensor, temperature: float) -> Tensor:
    _, num_frames, num_slots, _ = units.shape
    tokens = units.flatten(1, 2)
    # scaling makes a second tensor: a compiler refuses one tensor as both arguments
    scores = products(tokens / temperature, tokens)
    time = torch.arange(num_frames, device=units.device).repeat_interleave(num_slots)
    slot = torch.arange(num_slots, device=units.device).repeat(num_frames)
    same = slot.unsqueeze(1) == slot
    positive = same & ((time.unsqueeze(1) - time).abs() == 1)
    log_probs = scores.masked_fill(same & ~positive, float("-inf")).log_softmax(2)
    # a product with 0 would give NaN for log(0)
    means = torch.where(positive, log_probs, 0.0).sum(2) / positive.sum(1)
    return means.mean() * (-temperature / BASE_TEMPERATURE)


class TemporalSlotContrastLoss(LossModule, check=_check_settings):
    """Module of :func:`temporal_slot_contrast_loss`, with the same shapes and errors: ``forward(slots)``.

    >>> slots = torch.eye(2).repeat(2, 1).view(1, 2, 2, 2)
    >>> round(TemporalSlotContrastLoss(temperature=1.0)(slots).item(), 4)
    0.3133
    """

    def __init__(
        self, *, temperature: float = 0.1, kind: Contrast = "adjacent", negatives: Negatives = "batch"
    ) -> None:
        self.remember(locals())

    def forward(self, slots: Tensor) -> Tensor:
        """Return the term; see :func:`temporal_slot_contrast_loss`."""
        return temporal_slot_contrast_loss(slots, **self.settings)
