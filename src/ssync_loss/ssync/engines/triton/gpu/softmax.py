"""One tile in registers: the values of its patches, and their gradients.

Tiles are (slots, patches) of float32 with absent slots at -inf. A label below 0 is no slot. ``criterion`` is
(log2(e) / temperature, 1 / temperature, None for the squared error, label smoothing or None).
"""

import triton
import triton.language as tl

# minus the logarithm of the smallest normal float32: the value of a slot at -inf in the cross-entropy
FLOOR = tl.constexpr(87.33654475055310898657)


@triton.jit
def _split(x, hit, exponent):
    """Return a tile's exponentials, these with 0 at the label, the label's exponential, and the sum of the others.

    Exponentials are ``2^((x - peak) * exponent)`` with ``exponent = log2(e) / temperature``, and cannot overflow. The
    sums are NaN if a slot holds NaN or +inf, and 0 if all slots are at -inf.
    """
    level = _level(x)
    exps = tl.exp2((x - level[None, :]) * exponent)
    misses = tl.where(hit, 0.0, exps)
    return exps, misses, tl.sum(tl.where(hit, exps, 0.0), 0), tl.sum(misses, 0)


@triton.jit
def _level(x):
    peak = tl.max(x, 0)
    # -inf - -inf would be NaN
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def patch_values(x, label, slots, criterion):
    """Return the value of each patch, the squared error as a sum over slots, and whether its softmax is defined."""
    number, present, num_present = slots
    hit = number[:, None] == label[None, :]
    _, misses, own, wrong = _split(x, hit, criterion[0])
    total = own + wrong
    num_present = num_present.to(tl.float32)
    # with all slots at -inf, probabilities are uniform, 1/S: ((S-1)/S)^2 + (S-1)/S^2 = (S-1)/S, or log S
    uniform = total == 0.0
    if criterion[2] is not None:
        log_total = _log_total(own, wrong)
        # subtract the peak before the temperature, as in `_split`
        level = _level(x)
        own_x = tl.sum(tl.where(hit, x, 0.0), 0)
        value = tl.where(own_x == float("-inf"), FLOOR, log_total - (own_x - level) * criterion[1])
        if criterion[3] is not None:
            minus_log = log_total[None, :] - (x - level[None, :]) * criterion[1]
            minus_log = tl.where(x == float("-inf"), FLOOR, minus_log)
            spread = tl.sum(tl.where(present[:, None], minus_log, 0.0), 0)
            value = (1.0 - criterion[3]) * value + (criterion[3] / num_present) * spread
        value = tl.where(uniform, tl.log(num_present), value)
    else:
        # r^2 + Q with r and Q over the other slots: nothing cancels
        total = tl.where(uniform, 1.0, total)
        value = (wrong * wrong + tl.sum(misses * misses, 0)) / (total * total)
        value = tl.where(uniform, 1.0 - 1.0 / num_present, value)
    # a total of NaN fails this comparison
    return value, total >= 0.0


@triton.jit
def _log_total(own, wrong):
    """Return log(own + wrong), precise even if own is 1 and the sum would round off wrong."""
    total = own + wrong
    lost = total - 1.0
    # Higham's log1p: a quotient corrects the rounding of the sum
    ratio = tl.where(lost == 0.0, 1.0, wrong / tl.where(lost == 0.0, 1.0, lost))
    log1p = tl.where(lost == 0.0, wrong, tl.log(tl.where(total == 0.0, 1.0, total)) * ratio)
    plain = tl.log(tl.where(total == 0.0, 1.0, total))
    return tl.where(own == 1.0, log1p, plain)


@triton.jit
def patch_slopes(x, label, slots, upstream, criterion):
    """Return the gradient of ``upstream`` (patches) times :func:`patch_values`, as a tile."""
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
        # the value of a slot at -inf is constant
        aim = tl.where(x > float("-inf"), aim, 0.0)
        slope = (exps * (inverse * tl.sum(aim, 0))[None, :] - aim) * upstream[None, :]
    else:
        upstream = 2.0 * upstream * inverse
        own *= inverse
        wrong *= inverse
        squares = tl.sum(misses * misses, 0) * (inverse * inverse)
        # 2 P (P + P_y r - Q) at other slots, -2 P_y (r^2 + Q) at the label
        off = exps * (exps * (upstream * inverse)[None, :] + (upstream * (own * wrong - squares))[None, :])
        on = -exps * (upstream * (wrong * wrong + squares))[None, :]
        slope = tl.where(hit, on, off)
    return slope
