"""The criteria operator by operator, of all maps at once, in memory that is there already."""

from math import log

import torch
from torch import Tensor

from ssync_loss._blocks import indicator
from ssync_loss._criteria._lesson import LOG_TINY, Lesson, below_peak

# squares that are added up one after the other, without losing more than the last bits
FEW = 1 << 11
# what autograd calls for every softmax; it writes to contiguous memory
_through_softmax = torch.ops.aten._softmax_backward_data.out


def squared_error(lesson: Lesson, scratch: Tensor) -> Tensor:
    """Return ``sum_s E_s^2`` with errors ``E_s = P_s - 1[s = y]``, and write half its slope times tau.

    That is what the softmax hands back of the errors, ``P_s (E_s - sum_k P_k E_k)``. Of a patch that is sure of its
    label ``P_y - 1`` keeps few digits, and the loss as few: its error is far below that of a batch. :mod:`_fused`
    keeps them, which takes three operators more here.
    """
    _, label, chosen, _, temperature, _, slope, each = lesson
    for k, out in enumerate(scratch):
        _write_probs(lesson.scores(k), temperature, out=out)
    # a patch with NaN, +inf or nothing but -inf has no probabilities
    first = scratch[:, :, :, :1]
    nothing = indicator(torch.ne, first, first)
    probs = scratch.nan_to_num_()
    errors = torch.mul(probs, chosen, out=probs if slope is None else slope)
    # it counts as uniform: what 1/S each is off by, ((S-1)/S)^2 + (S-1)/S^2 = (S-1)/S, is put at its label
    uniform = 1 - (1 - 1 / lesson.num_slots) ** 0.5
    errors.scatter_add_(3, label.long(), nothing.mul_(uniform).sub_(1.0).mul_(chosen))
    if each:
        value: Tensor = (errors.square_() if slope is None else errors.square()).sum(3)
    else:
        value = _sum_of_squares(errors)
    if slope is not None:
        for errors_, probs_ in [(slope, probs)] if slope.is_contiguous() else zip(slope, probs, strict=True):
            # in place: of a cell that has been written nothing is read
            _through_softmax(errors_, probs_, -3, slope.dtype, grad_input=errors_)
    return value


def _sum_of_squares(errors: Tensor) -> Tensor:
    """Add up the squares of every map: (K, ..) -> (K,)."""
    if errors.shape[-1] > FEW:
        return errors.square().flatten(1).sum(1)
    # a norm wants no memory for squares, but adds with no regard to rounding: of small planes or rows at a time
    of_each = (-2, -1) if errors.shape[-2:].numel() <= FEW else -1
    norms: Tensor = torch.linalg.vector_norm(errors, dim=of_each)
    return norms.square_().flatten(1).sum(1)


def cross_entropy(lesson: Lesson, scratch: Tensor) -> Tensor:
    """Return ``-(1 - e) log P_y - (e/S) sum_s log P_s`` with smoothing e, and write its slope times tau.

    With aims ``q_s = (1 - e) 1[s = y] + e/S`` the gradient is ``(1/tau) (P_s sum_k q_k - q_s)``, where slots
    with a logit of -inf, whose log-probability is a constant, leave both terms.
    """
    _, label, chosen, slot_mask, temperature, smoothing, slope, each = lesson
    label = label.long()
    impossible = torch.empty_like(scratch, dtype=torch.bool)
    peak = torch.empty_like(chosen)
    for k, out in enumerate(scratch):
        _write_below_peak(lesson.scores(k), temperature, out=out, impossible=impossible[k], peak=peak[k])
    below, num_slots = scratch, lesson.num_slots
    exps = torch.exp(below) if slope is None else torch.exp(below, out=slope)
    own = exps.gather(3, label)
    others = exps.scatter_(3, label, torch.zeros_like(own)).sum(3, keepdim=True)
    total = others + own
    # a confident patch's loss is all in the others: adding them to 1 first would round it off
    log_total = torch.where(own == 1, others.log1p(), total.log())
    log_probs = below.sub_(log_total).masked_fill_(impossible, LOG_TINY)
    entropy = log_probs.gather(3, label) * (smoothing - 1)
    if smoothing:
        if slot_mask is not None:
            log_probs.masked_fill_(~slot_mask[:, None, :, None, None], 0.0)
        entropy = entropy - log_probs.sum(3, keepdim=True) * (smoothing / num_slots)
    # uniform probabilities where there is nothing
    uniform = log(num_slots) if isinstance(num_slots, int) else num_slots.log()
    value = torch.where(peak == float("-inf"), uniform, entropy.nan_to_num_()).mul_(chosen)
    if slope is not None:
        aims = scratch.zero_().scatter_(3, label, chosen * (1 - smoothing))
        if smoothing:
            aims += chosen * (smoothing / num_slots)
        aims.masked_fill_(impossible, 0.0)
        probs = slope.scatter_(3, label, own).div_(total)
        probs.mul_(aims.sum(3, keepdim=True)).sub_(aims).nan_to_num_()
    return value.squeeze(3) if each else value.flatten(1).sum(1)


def _write_probs(scores: Tensor, temperature: float, *, out: Tensor) -> None:
    """Write the probabilities of all slots; NaN for a patch with NaN, +inf or nothing but -inf."""
    if temperature != 1.0:
        scores = below_peak(scores, scores.amax(2, keepdim=True), temperature)
    torch.softmax(scores, 2, out=out)


def _write_below_peak(scores: Tensor, temperature: float, *, out: Tensor, impossible: Tensor, peak: Tensor) -> None:
    """Write how far every slot lies below the largest, which slots are -inf, and the largest."""
    # before the peak is taken off: beside a +inf every finite logit would look like this
    torch.eq(scores, float("-inf"), out=impossible)
    torch.amax(scores, 2, keepdim=True, out=peak)
    below_peak(scores, peak, temperature, out=out)
