"""The criteria as a compiler likes them: a pass for exponentials, one for all sums over slots, one for the slope.

What they are is said in :mod:`_eager`. A CPU's compiler vectorizes all of it as long as labels are compared as
numbers of the map's own type, and nothing is gathered or scattered.
"""

from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from ssync_loss._criteria._lesson import LOG_TINY, Lesson, below_peak


class _Exponentials(NamedTuple):
    """Exponentials of a map, and sums of them over slots.

    Attributes:
        below: (B, T, S, H, W), how far a slot lies below the largest logit of its patch, over the temperature.
        own: (B, T, 1, H, W), the exponential of the label.
        wrong: (B, T, S, H, W), those of all others, and 0 at the label.
        others: (B, T, 1, H, W), their sum.
        nothing: (B, T, 1, H, W), whether a patch has none: with NaN, +inf or nothing but -inf.
        is_label: (B, T, S, H, W).
    """

    below: Tensor
    own: Tensor
    wrong: Tensor
    others: Tensor
    nothing: Tensor
    is_label: Tensor

    @classmethod
    def of(cls, lesson: Lesson, k: int) -> "_Exponentials":
        """Take them of one of the maps."""
        scores, label = lesson.scores(k), lesson.label[k].unsqueeze(2)
        below = below_peak(scores, lesson.peaks[k], lesson.temperature)
        # NaN is not at most 0; to ask whether it is NaN would be done cell by cell
        exps = torch.where(below <= 0, below.exp(), 0.0)
        slots = torch.arange(scores.shape[2], device=scores.device, dtype=scores.dtype)[:, None, None]
        is_label = label.to(scores.dtype) == slots
        wrong = torch.where(is_label, 0.0, exps)
        others = wrong.sum(2, keepdim=True)
        own = torch.where(is_label, exps, 0.0).sum(2, keepdim=True)
        return cls(below, own, wrong, others, others + own == 0, is_label)


def squared_error(lesson: Lesson) -> Tensor:
    """Return ``r^2 + Q`` with ``r = sum_{s != y} P_s`` and ``Q = sum_{s != y} P_s^2``, and write its slope.

    Half of it, times tau, is ``-P_y (r^2 + Q)`` at y, and ``P_s (P_s + P_y r - Q)`` elsewhere.
    """
    chosen, slope = lesson.chosen, lesson.slope
    values = []
    for k in range(len(lesson.pupils)):
        exps = _Exponentials.of(lesson, k)
        squares = exps.wrong.square().sum(2, keepdim=True)
        scale = torch.where(exps.nothing, 1.0, exps.others + exps.own).reciprocal()
        wrong, own, others = exps.wrong * scale, exps.own * scale, exps.others * scale
        square = squares * scale * scale
        error = others * others + square
        values.append(torch.where(exps.nothing, 1 - 1 / lesson.num_slots, error) * chosen[k])
        if slope is not None:
            below_label = wrong * (wrong + own * others - square)
            slope[k].copy_(torch.where(exps.is_label, -own * error, below_label) * chosen[k])
    return _of_patches(values, each=lesson.each)


def cross_entropy(lesson: Lesson) -> Tensor:
    """Return the cross-entropy, and write its slope times tau."""
    chosen, slot_mask, slope, smoothing = lesson.chosen, lesson.slot_mask, lesson.slope, lesson.smoothing
    values, num_slots = [], lesson.num_slots
    for k in range(len(lesson.pupils)):
        impossible = lesson.scores(k) == float("-inf")
        exps = _Exponentials.of(lesson, k)
        total = torch.where(exps.nothing, 1.0, exps.others + exps.own)
        log_total = torch.where(exps.own == 1, exps.others.log1p(), total.log())
        log_probs = torch.where(impossible, LOG_TINY, exps.below - log_total)
        entropy = torch.where(exps.is_label, log_probs, 0.0).sum(2, keepdim=True) * (smoothing - 1)
        if smoothing:
            if slot_mask is not None:
                log_probs = torch.where(slot_mask[:, None, :, None, None], log_probs, 0.0)
            entropy = entropy - log_probs.sum(2, keepdim=True) * (smoothing / num_slots)
        # a patch that does not count may overflow, to NaN, too
        largest = torch.finfo(entropy.dtype).max
        entropy = torch.where(entropy <= largest, entropy, largest)
        uniform = log(num_slots) if isinstance(num_slots, int) else num_slots.log()
        values.append(torch.where(exps.nothing, uniform, entropy) * chosen[k])
        if slope is not None:
            aims = torch.where(exps.is_label, 1 - smoothing, 0.0) + (smoothing / num_slots if smoothing else 0.0)
            aims = torch.where(impossible, 0.0, aims)
            probs = torch.where(exps.is_label, exps.own, exps.wrong) / total
            slope[k].copy_((probs * aims.sum(2, keepdim=True) - aims) * chosen[k])
    return _of_patches(values, each=lesson.each)


def _of_patches(values: list[Tensor], *, each: bool) -> Tensor:
    """Return the values (B, T, 1, H, W) of every map as planes, or their sums."""
    # by rows first: a compiler adds up all of it with less regard to rounding
    return torch.stack([value.squeeze(2) if each else value.sum(4).sum() for value in values])
