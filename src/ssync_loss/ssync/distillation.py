"""Distillation in plain torch: compare one map with hard labels on the patches of a region."""

from collections.abc import Callable
from math import log
from typing import Any

import torch
from torch import Tensor

from ssync_loss._autocast import at_least_float32
from ssync_loss._autograd import exportable
from ssync_loss.ssync.maps import first_largest, only_present
from ssync_loss.ssync.settings import TINY, Criterion, Reduction, Settings

# the log-probability of a slot at -inf, in the cross-entropy
LOG_TINY = log(TINY)


def distill(
    logits: Tensor,
    target: Tensor,
    region: Tensor,
    slot_mask: Tensor | None,
    settings: Settings,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute :func:`ssync_loss.functional.selective_distillation_loss` without checks."""
    num_slots = logits.shape[2]
    is_slot = (target >= 0) & (target < num_slots)
    target = torch.where(is_slot, target, 0).long()
    if slot_mask is not None:
        region = region & slot_mask.any(1)[:, None, None, None]
    below = _below_peak(at_least_float32(logits), region, slot_mask)
    if settings.criterion == "mse":
        value = squared_error(below / settings.temperature, target)
    else:
        value = cross_entropy(below, target, slot_mask, settings.temperature, settings.label_smoothing)
    # a selected target that names no slot gives NaN
    value = torch.where(region, torch.where(is_slot, value, float("nan")), 0.0)
    if reduction == "mean":
        selected = num_averaged(region.sum((1, 2, 3)), num_slots, slot_mask, settings.criterion)
        return value.sum() / selected.clamp_min(1)
    if settings.criterion == "mse":
        value = value / _num_present(value, num_slots, slot_mask)
    return value.sum() if reduction == "sum" else value


class _SquaredError(torch.autograd.Function):
    """Return ``sum_s (P_s - 1[s = y])^2`` as ``r^2 + Q``, with ``r = sum_{s != y} P_s`` and ``Q = sum_{s != y} P_s^2``.

    Nothing is subtracted from 1, so nothing cancels where P_y is near 1. Half the gradient is ``-P_y (r^2 + Q)`` at y
    and ``P_s (P_s + P_y r - Q)`` elsewhere. The gradient is differentiable, too.
    """

    @staticmethod
    def forward(scores: Tensor, target: Tensor) -> Tensor:
        _, _, total, squares = _wrong_probabilities(scores, target)
        return (total.square() + squares).squeeze(2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004 (autograd has it)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        scores, target = ctx.saved_tensors
        own, wrong, total, squares = _wrong_probabilities(scores, target)
        slope = wrong * (wrong + own * total - squares)
        slope = slope.scatter(2, target.unsqueeze(2), -own * (total.square() + squares))
        return 2 * grad.unsqueeze(2) * slope, None


def _wrong_probabilities(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return P_y, the P_s of all other slots (0 at y), their sum and their sum of squares."""
    probs, target = scores.softmax(2), target.unsqueeze(2)
    wrong = probs.scatter(2, target, 0.0)
    return probs.gather(2, target), wrong, wrong.sum(2, keepdim=True), wrong.square().sum(2, keepdim=True)


squared_error: Callable[[Tensor, Tensor], Tensor] = exportable(_SquaredError)


def cross_entropy(
    below: Tensor, target: Tensor, slot_mask: Tensor | None, temperature: float, smoothing: float
) -> Tensor:
    """Return ``-(1 - e) log P_y - (e / S) sum_s log P_s`` with smoothing e, for logits whose largest is 0.

    A logit of -inf has the log-probability of the smallest normal float32, and no gradient.
    """
    scores = below / temperature
    # the largest exponential is 1 and would round off the others in a sum: `log1p` adds it
    peak = first_largest(scores).unsqueeze(2)
    scores = scores - scores.gather(2, peak)
    log_total = scores.exp().scatter(2, peak, 0.0).sum(2, keepdim=True).log1p()
    log_probs = torch.where(below == float("-inf"), LOG_TINY, scores - log_total)
    value = -(1 - smoothing) * log_probs.gather(2, target.unsqueeze(2)).squeeze(2)
    if smoothing:
        if slot_mask is not None:
            log_probs = torch.where(slot_mask[:, None, :, None, None], log_probs, 0.0)
        value = value - smoothing * log_probs.sum(2) / _num_present(value, scores.shape[2], slot_mask)
    return value


def _below_peak(logits: Tensor, region: Tensor, slot_mask: Tensor | None) -> Tensor:
    """Subtract the largest logit of every patch; absent slots are at -inf.

    Unselected patches, and patches with all slots at -inf, become zeros without a gradient.
    """
    if slot_mask is not None:
        # a clip without slots selects nothing, but its softmax must have slots
        slot_mask = slot_mask | ~slot_mask.any(1, keepdim=True)
    scores = only_present(logits, slot_mask)
    decided = region.unsqueeze(2) & (scores.amax(2, keepdim=True) != float("-inf"))
    scores = only_present(torch.where(decided, scores, 0.0), slot_mask)
    peak = scores.detach().amax(2, keepdim=True)
    # where the peak is +inf, `peak - peak` makes all slots NaN
    return scores - peak + (peak - peak)


def num_averaged(selected: Tensor, num_slots: int, slot_mask: Tensor | None, criterion: Criterion) -> Tensor:
    """Return the divisor of a mean, from the number of selected patches of every clip: (.., B) -> (..).

    The cross-entropy is averaged over selected patches, the squared error over selected patches and present slots.
    """
    if criterion == "cross_entropy":
        return selected.sum(-1)
    if slot_mask is None:
        return selected.sum(-1) * num_slots
    return (selected * slot_mask.sum(1)).sum(-1)


def _num_present(patches: Tensor, num_slots: int, slot_mask: Tensor | None) -> Tensor | int:
    """Return the number of present slots: S, or (B, 1, 1, 1) with a mask."""
    if slot_mask is None:
        return num_slots
    return slot_mask.sum(1).clamp_min(1).to(patches.dtype)[:, None, None, None]
