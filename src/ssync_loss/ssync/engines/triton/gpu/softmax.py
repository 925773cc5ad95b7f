"""One tile in registers: what its patches pay for missing their labels, and the gradient of that.

Tiles are (slots, patches) of float32 with absent slots at -inf; a label below 0 hits no slot. ``criterion`` is
(log2(e) / temperature, 1 / temperature, None for the squared error, label smoothing or None).
"""

import triton
import triton.language as tl

# minus the logarithm of the smallest normal float32: what a slot at -inf pays in cross-entropy
FLOOR = tl.constexpr(87.33654475055310898657)


@triton.jit
def _split(x, hit, exponent):
    """Return exponentials of a tile, those that miss the label, and two sums: of the label's own and the others.

    ``2^((x - peak) * exponent)`` with ``exponent = log2(e) / temperature``: the peak is taken off first, so that
    it cannot overflow. The sums are NaN where a slot holds NaN or +inf, and 0 where all slots are at -inf.
    """
    level = _level(x)
    exps = tl.exp2((x - level[None, :]) * exponent)
    misses = tl.where(hit, 0.0, exps)
    return exps, misses, tl.sum(tl.where(hit, exps, 0.0), 0), tl.sum(misses, 0)


@triton.jit
def _level(x):
    peak = tl.max(x, 0)
    # where all slots are at -inf there is nothing to take off
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def patch_values(x, label, slots, criterion):
    """Return what each patch pays, for the squared error summed over slots, and whether its softmax is defined."""
    number, present, num_present = slots
    hit = number[:, None] == label[None, :]
    _, misses, own, wrong = _split(x, hit, criterion[0])
    total = own + wrong
    num_present = num_present.to(tl.float32)
    # all slots at -inf are uniform probabilities 1/S: ((S-1)/S)^2 + (S-1)/S^2 = (S-1)/S, or log S
    uniform = total == 0.0
    if criterion[2] is not None:
        log_total = _log_total(own, wrong)
        # the temperature is at work after the peak is taken off, here as there
        level = _level(x)
        own_x = tl.sum(tl.where(hit, x, 0.0), 0)
        value = tl.where(own_x == float("-inf"), FLOOR, log_total - (own_x - level) * criterion[1])
        if criterion[3] is not None:
            pays = log_total[None, :] - (x - level[None, :]) * criterion[1]
            pays = tl.where(x == float("-inf"), FLOOR, pays)
            spread = tl.sum(tl.where(present[:, None], pays, 0.0), 0)
            value = (1.0 - criterion[3]) * value + (criterion[3] / num_present) * spread
        value = tl.where(uniform, tl.log(num_present), value)
    else:
        # r^2 + Q with r and Q over the slots that miss: nothing cancels
        total = tl.where(uniform, 1.0, total)
        value = (wrong * wrong + tl.sum(misses * misses, 0)) / (total * total)
        value = tl.where(uniform, 1.0 - 1.0 / num_present, value)
    # NaN fails this comparison
    return value, total >= 0.0


@triton.jit
def _log_total(own, wrong):
    """Return log(own + wrong), where own is often 1 and wrong so small that it is lost in the sum."""
    total = own + wrong
    lost = total - 1.0
    # Higham's log1p: the error of the sum is undone by a quotient
    ratio = tl.where(lost == 0.0, 1.0, wrong / tl.where(lost == 0.0, 1.0, lost))
    log1p = tl.where(lost == 0.0, wrong, tl.log(tl.where(total == 0.0, 1.0, total)) * ratio)
    plain = tl.log(tl.where(total == 0.0, 1.0, total))
    return tl.where(own == 1.0, log1p, plain)


@triton.jit
def patch_slopes(x, label, slots, upstream, criterion):
    """Return the gradient of ``upstream`` (patches) times :func:`patch_values`, a tile."""
    number, present, num_present = slots
    hit = number[:, None] == label[None, :]
    exps, misses, own, wrong = _split(x, hit, criterion[0])
    total = own + wrong
    upstream = tl.where(label >= 0, upstream * criterion[1], 0.0)
    num_present = num_present.to(tl.float32)
    # all slots at -inf: no gradient
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    if criterion[2] is not None:
        aim = tl.where(hit, 1.0, 0.0)
        if criterion[3] is not None:
            aim = (1.0 - criterion[3]) * aim + tl.where(present[:, None], criterion[3] / num_present, 0.0)
        # what a slot at -inf pays is constant
        aim = tl.where(x > float("-inf"), aim, 0.0)
        slope = (exps * (inverse * tl.sum(aim, 0))[None, :] - aim) * upstream[None, :]
    else:
        upstream = 2.0 * upstream * inverse
        own *= inverse
        wrong *= inverse
        squares = tl.sum(misses * misses, 0) * (inverse * inverse)
        # 2 P (P + P_y r - Q) off the label, -2 P_y (r^2 + Q) on it
        off = exps * (exps * (upstream * inverse)[None, :] + (upstream * (own * wrong - squares))[None, :])
        on = -exps * (upstream * (wrong * wrong + squares))[None, :]
        slope = tl.where(hit, on, off)
    return slope
