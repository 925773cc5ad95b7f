"""The criteria operator by operator, of all maps at once, in memory that is there already."""

from math import log

import torch
from torch import Tensor

from ssync_loss._criteria._lesson import LOG_TINY, Lesson, below_peak

# on a CPU `exp2` takes a quarter of the time of `exp`
LOG2_E = 1 / log(2)


def squared_error(lesson: Lesson, scratch: Tensor, patches: Tensor) -> Tensor:
    """Return ``r^2 + Q`` with ``r = sum_{s != y} P_s`` and ``Q = sum_{s != y} P_s^2``, and write its slope.

    Half of it, times tau, is ``-P_y (r^2 + Q)`` at y, and ``P_s (P_s + P_y r - Q)`` elsewhere. Nothing is taken from
    1, so that nothing cancels in a patch which is sure, and right.
    """
    for k in range(len(scratch)):
        below_peak(lesson.scores(k), lesson.peaks[k], lesson.temperature, out=scratch[k])
    exps = scratch.mul_(LOG2_E).exp2_()
    if not lesson.nan_allowed:
        exps.nan_to_num_()
    rows, cells = _in_rows(exps), _cells_of(lesson.label, patches)
    own = _take(rows, cells, lesson.chosen)
    wrong, nothing = exps, torch.zeros_like(own)
    _put(rows, cells, nothing)
    # Beside the largest exponential, 1, this is nothing. A patch without any gets the error of a uniform one,
    # r^2 = (S-1)/S = ((S-1)/S)^2 + (S-1)/S^2, and no slope. Times a root it has to stay
    # a normal number: others may be flushed to 0.
    small = 64 * torch.finfo(exps.dtype).tiny
    others = wrong.sum(3, keepdim=True).add_(small * (1 - 1 / lesson.num_slots) ** 0.5)
    scale = lesson.chosen / (others + own).clamp_min_(small)
    own.mul_(scale)
    others.mul_(scale)
    wrong = torch.mul(wrong, scale, out=wrong if lesson.slope is None else lesson.slope)
    squares = torch.mul(wrong, wrong, out=scratch)
    square = squares.sum(3, keepdim=True)
    excess = None if lesson.slope is None else torch.addcmul(square, own, others, value=-1, out=scale)
    error = square.addcmul_(others, others)
    if excess is not None:
        # nothing is added there: it is not among the wrong ones
        _put(rows, cells, nothing.addcmul_(own, error, value=-1))
        torch.addcmul(squares, wrong, excess, value=-1, out=lesson.slope)
    return error.squeeze(3) if lesson.each else error.sum((1, 2, 3, 4, 5))


def cross_entropy(lesson: Lesson, scratch: Tensor, patches: Tensor) -> Tensor:
    """Return ``-(1 - e) log P_y - (e/S) sum_s log P_s`` with smoothing e, and write its slope times tau.

    With aims ``q_s = (1 - e) 1[s = y] + e/S`` the gradient is ``(1/tau) (P_s sum_k q_k - q_s)``, where slots
    with a logit of -inf, whose log-probability is a constant, leave both terms.
    """
    slope, smoothing, num_slots = lesson.slope, lesson.smoothing, lesson.num_slots
    impossible = torch.empty_like(scratch, dtype=torch.bool)
    for k in range(len(scratch)):
        _write_below_peak(lesson, k, out=scratch[k], impossible=impossible[k])
    below = scratch
    exps = torch.mul(below, LOG2_E, out=slope).exp2_()
    rows, cells = _in_rows(exps), _cells_of(lesson.label, patches)
    own = _take(rows, cells, lesson.chosen)
    _put(rows, cells, torch.zeros_like(own))
    others = exps.sum(3, keepdim=True)
    total = others + own
    # a confident patch's loss is all in the others: adding them to 1 first would round it off
    log_total = torch.where(own == 1, others.log1p(), total.log())
    log_probs = below.sub_(log_total).masked_fill_(impossible, LOG_TINY)
    entropy = _take(_in_rows(log_probs), cells, own).mul_(smoothing - 1)
    if smoothing:
        if lesson.slot_mask is not None:
            log_probs.masked_fill_(~lesson.slot_mask[:, None, :, None, None], 0.0)
        entropy -= log_probs.sum(3, keepdim=True) * (smoothing / num_slots)
    # uniform probabilities where there is nothing
    uniform = log(num_slots) if isinstance(num_slots, int) else num_slots.log()
    value = torch.where(total == 0, uniform, entropy.nan_to_num_()).mul_(lesson.chosen)
    if slope is not None:
        aims = scratch.zero_()
        _put(_in_rows(aims), cells, lesson.chosen * (1 - smoothing))
        if smoothing:
            aims += lesson.chosen * (smoothing / num_slots)
        aims.masked_fill_(impossible, 0.0)
        _put(rows, cells, own)
        probs = exps.div_(total)
        probs.mul_(aims.sum(3, keepdim=True)).sub_(aims).nan_to_num_()
    return value.squeeze(3) if lesson.each else value.flatten(1).sum(1)


def _write_below_peak(lesson: Lesson, k: int, *, out: Tensor, impossible: Tensor) -> None:
    """Write how far every slot of a map lies below the largest, and which slots are -inf."""
    scores = lesson.scores(k)
    # before the peak is taken off: beside a +inf every finite logit would look like this
    torch.eq(scores, float("-inf"), out=impossible)
    below_peak(scores, lesson.peaks[k], lesson.temperature, out=out)


def _in_rows(cells: Tensor) -> Tensor:
    """View the cells of every frame as a row: (K, B, T, S, H, W) -> (K, B, T, S H W)."""
    return cells.view(*cells.shape[:3], cells.shape[3:].numel())


def _cells_of(label: Tensor, patches: Tensor) -> Tensor:
    """Tell which cells of such rows are those of the labels: (K, B, T, H, W), (H W,) -> (K, B, T, H W).

    Along the last axis a cell is picked in half the time it takes along slots.
    """
    return torch.add(patches, label.flatten(3), alpha=patches.numel())


def _take(rows: Tensor, which: Tensor, like: Tensor) -> Tensor:
    """Return some cells of every row, as a tensor of the shape of another."""
    return rows.gather(3, which).view(like.shape)


def _put(rows: Tensor, which: Tensor, values: Tensor) -> None:
    """Overwrite some cells of every row."""
    rows.scatter_(3, which, values.flatten(3))
