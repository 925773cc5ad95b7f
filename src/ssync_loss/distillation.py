"""Teaching one map the hard labels of the other, on selected patches only."""

from collections.abc import Callable, Sequence
from math import log
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ssync_loss import kernels
from ssync_loss._autocast import no_autocast
from ssync_loss._autograd import Slopes, once_differentiable, signature_kept
from ssync_loss._backends import Backend, check_backend, resolve_backend
from ssync_loss._blocks import Blocks, clips_of, frames_of, indicator
from ssync_loss._checks import (
    check_bool,
    check_choice,
    check_floating,
    check_integer,
    check_label_range,
    check_labels_present,
    check_not_empty,
    check_number,
    check_same_device,
    check_shape,
)
from ssync_loss._maps import TINY, check_slot_mask, only_present, peak_of
from ssync_loss.reference.ssync import reference_selective_distillation_loss

Criterion: TypeAlias = Literal["mse", "cross_entropy"]
Reduction: TypeAlias = Literal["none", "sum", "mean"]

CRITERIA = ("mse", "cross_entropy")
REDUCTIONS = ("none", "sum", "mean")
LOG_TINY = log(TINY)


def selective_distillation_loss(
    logits: Tensor,
    target: Tensor,
    region: Tensor,
    *,
    criterion: Criterion = "mse",
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    slot_mask: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Compare a map's slot probabilities with hard labels on the patches of a region.

    With ``P = softmax_s(logits / temperature)`` and y the label, the value of a selected patch is
    ``(1/S) sum_s (P_s - 1[s = y])^2`` for ``"mse"`` and ``-log P_y`` for ``"cross_entropy"`` (with smoothing e,
    ``-(1 - e) log P_y - (e/S) sum_s log P_s``). ``reduction="mean"`` divides by what was selected in the whole
    batch. Nothing selected gives exactly 0, attached to the graph. What unselected patches hold never matters,
    NaN included, and they get no gradient.

    With a slot mask the sums run over present slots and S is their number in each clip, S_b; the mean of the
    squared criterion is then ``sum over selected patches and slots / sum_b M_b S_b`` with M_b selected patches.

    Two limits are fixed by convention. A selected patch whose slots are all -inf counts as uniform, without
    gradient. In the cross-entropy a logit of -inf has the log-probability of the smallest normal float32,
    -87.3, without gradient, so that a slot which cannot win costs much, but not infinitely much.

    Shape:
        logits: (B, T, S, H, W). target: (B, T, H, W) integers within [0, S). region: (B, T, H, W) bool.
        slot_mask: (B, S) bool. Returns a scalar, or (B, T, H, W) with ``reduction="none"``, in float32, or
        float64 if the logits are.

    Args:
        logits: the map to be taught; the only argument that gets a gradient.
        target: slot index of every patch.
        region: the patches that count.
        criterion: ``"mse"`` or ``"cross_entropy"``.
        label_smoothing: within [0, 1], spread over present slots; cross-entropy only.
        temperature: above 0 (at least the smallest normal float32, 1.2e-38).
        slot_mask: slots that are present; absent ones leave the softmax.
        reduction: ``"none"`` (0 where unselected), ``"sum"`` or ``"mean"``.
        backend: what computes, see :class:`ssync_loss.SSyncLoss`.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), boundary refinement and interior denoising.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on wrong shapes or settings. Labels out of range are found where that needs no waiting for
            a device: on a CPU, outside compilation.

    >>> logits = torch.tensor([3.0, 1.0]).log().view(1, 1, 2, 1, 1)  # P = (3/4, 1/4)
    >>> target, region = torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    >>> round(selective_distillation_loss(logits, target, region).item(), 6)  # (1/16 + 1/16) / 2
    0.0625
    """
    size = check_shape("logits", logits, "B T S H W")
    check_not_empty("logits", size, "T S H W")
    check_floating("logits", logits)
    patches = {axis: size[axis] for axis in "BTHW"}
    check_shape("target", target, "B T H W", **patches)
    check_integer("target", target)
    check_same_device("target", target, logits=logits)
    check_shape("region", region, "B T H W", **patches)
    check_bool("region", region)
    check_same_device("region", region, logits=logits)
    if slot_mask is not None:
        check_slot_mask(slot_mask, size, logits=logits)
    check_criterion(criterion, label_smoothing, temperature)
    check_choice("reduction", reduction, REDUCTIONS)
    check_label_range("target", target, size["S"])
    check_backend(backend)
    if slot_mask is not None:
        check_labels_present("target", target, region, slot_mask)
    return distill(
        logits,
        target,
        region,
        criterion=criterion,
        label_smoothing=label_smoothing,
        temperature=temperature,
        slot_mask=slot_mask,
        reduction=reduction,
        backend=backend,
    )


def check_criterion(criterion: object, label_smoothing: object, temperature: object) -> None:
    """Check what :func:`selective_distillation_loss` and the modules are configured with."""
    check_choice("criterion", criterion, CRITERIA)
    check_number("label_smoothing", label_smoothing, 0.0, 1.0)
    check_number("temperature", temperature, 0.0, open_low=True)
    check_number("temperature", temperature, TINY)
    if criterion == "mse" and label_smoothing != 0:
        raise ValueError(
            f"`label_smoothing` must be 0 with criterion='mse'; got {label_smoothing}. "
            "Smoothing is defined for criterion='cross_entropy'."
        )


def distill(
    logits: Tensor,
    target: Tensor,
    region: Tensor,
    *,
    criterion: Criterion,
    label_smoothing: float,
    temperature: float,
    slot_mask: Tensor | None,
    reduction: Reduction,
    backend: Backend,
) -> Tensor:
    """Compute :func:`selective_distillation_loss` without checks."""
    backend = resolve_backend(backend, logits)
    if backend == "reference":
        return reference_selective_distillation_loss(
            logits,
            target,
            region,
            criterion=criterion,
            label_smoothing=label_smoothing,
            temperature=temperature,
            slot_mask=slot_mask,
            reduction=reduction,
        )
    if backend == "triton":
        return kernels.distill(
            logits,
            target,
            region,
            criterion=criterion,
            label_smoothing=label_smoothing,
            temperature=temperature,
            slot_mask=slot_mask,
            reduction=reduction,
        )
    if slot_mask is not None:
        # a clip without slots has nothing to teach
        region = region & slot_mask.any(1)[:, None, None, None]
    with no_autocast(logits):
        with_slope = logits.requires_grad and torch.is_grad_enabled()
        # a patch's sum over slots; what it is divided by depends on the reduction
        how = criterion, label_smoothing, temperature
        patches, _ = _distill(logits, target, region, slot_mask, *how, with_slope, Slopes())
        if reduction == "mean":
            averaged = num_averaged(region.sum((1, 2, 3)), logits.shape[2], slot_mask, criterion)
            return patches.sum() / averaged.clamp_min(1)
        if criterion == "mse":
            slots = logits.shape[2] if slot_mask is None else present_slots(slot_mask)[:, None, None, None]
            patches = patches / slots
        return patches.sum() if reduction == "sum" else patches


def present_slots(slot_mask: Tensor) -> Tensor:
    """Count the present slots of every clip, at least 1: (B, S) -> (B,)."""
    return slot_mask.sum(1).clamp_min(1)


def num_averaged(selected: Tensor, num_slots: int, slot_mask: Tensor | None, criterion: Criterion) -> Tensor:
    """Count what a mean divides by, from the selected patches of every clip: (.., B) -> (..).

    Selected patches, for the squared criterion times present slots.
    """
    if criterion == "cross_entropy":
        return selected.sum(-1)
    if slot_mask is None:
        return selected.sum(-1) * num_slots
    return (selected * present_slots(slot_mask)).sum(-1)


def as_numbers(region: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1 where selected and 0 elsewhere; from bytes, which on a CPU is faster than from bool."""
    if torch.compiler.is_compiling():
        # the CPU's compiler cannot view them so
        return region.to(dtype)
    # True may be any byte but 0
    return region.view(torch.uint8).clamp_max(1).to(dtype)


@signature_kept
class _Distill(torch.autograd.Function):
    """A patch's criterion, 0 where unselected, and its slope.

    The slope costs little while the probabilities are at hand, so it is written in the forward, and the backward
    scales it in place: it becomes the gradient. A second backward through the same graph computes it again.
    """

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        region: Tensor,
        slot_mask: Tensor | None,
        criterion: Criterion,
        smoothing: float,
        temperature: float,
        with_slope: bool,
        unscaled: Slopes,  # noqa: ARG004 (for the backward)
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        values = torch.empty(target.shape, device=logits.device, dtype=dtype)
        slope = torch.empty(logits.shape if with_slope else 0, device=logits.device, dtype=dtype)
        blocks = Blocks(logits, dtype)
        for group in blocks.groups:
            some, label, chosen, mask = clips_of(group, logits, target, region, slot_mask)
            some, chosen = some.to(dtype), as_numbers(chosen, dtype)
            value = values[group]
            evaluate(
                [some],
                label.long()[None],
                mask,
                blocks,
                value[None],
                slope[None, group] if with_slope else None,
                criterion=criterion,
                smoothing=smoothing,
                temperature=temperature,
            )
            peak = peak_of(some, mask)
            # a selected patch whose largest logit is NaN or +inf has no value: 0 times 1/0 there, 0 times 1/1 elsewhere
            below = indicator(torch.lt, peak, float("inf"))
            value.mul_(chosen).add_((1 - chosen + chosen * below).reciprocal_().mul_(0.0))
        return values, slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, target, region, slot_mask, *ctx.settings, _, ctx.unscaled = inputs
        values, ctx.slope = output
        ctx.mark_non_differentiable(ctx.slope)
        # or autograd makes a map of zeros as the gradient of the slope
        ctx.set_materialize_grads(False)
        # 0, or NaN for a selected patch without a value
        ctx.save_for_backward(logits, target, region, slot_mask, values * 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 8
        if grad_values is None:
            return None, *nothing
        logits, target, region, slot_mask, undefined = ctx.saved_tensors
        criterion, smoothing, temperature = ctx.settings
        scale = torch.where(region, grad_values * steepness(criterion, temperature), 0.0) + undefined
        if torch.compiler.is_compiling():
            grad = ctx.slope * scale.unsqueeze(2)
        else:
            slope: Tensor | None = ctx.slope
            ctx.slope = None
            # of another level of torch.func, where the logits may need no gradient
            if slope is None or slope.dim() == 1 or not ctx.unscaled.take(0):
                slope = slope_again(logits, target, region, slot_mask, criterion, smoothing, temperature)
            grad = slope.mul_(scale.unsqueeze(2))
        return grad.to(logits.dtype), *nothing


# typed: autograd's own `apply` is not
_distill: Callable[..., tuple[Tensor, Tensor]] = _Distill.apply


def slope_again(
    logits: Tensor,
    target: Tensor,
    region: Tensor,
    slot_mask: Tensor | None,
    criterion: Criterion,
    smoothing: float,
    temperature: float,
) -> Tensor:
    """Compute the slope of a map as the forward did, for a backward that is not the first."""
    return _Distill.forward(logits, target, region, slot_mask, criterion, smoothing, temperature, True, Slopes())[1]


def evaluate(
    pupils: Sequence[Tensor],
    label: Tensor,
    slot_mask: Tensor | None,
    blocks: Blocks,
    values: Tensor,
    slopes: Tensor | None,
    *,
    criterion: Criterion,
    smoothing: float,
    temperature: float,
) -> None:
    """Write the criterion of every patch, summed over slots, and its slope, selected or not.

    The slope times :func:`steepness` is the gradient, 0 for a patch without a finite logit. Both are finite
    whatever the logits hold.

    Args:
        pupils: K maps (B, T, S, H, W) of logits, a group of clips.
        label: (K, B, T, H, W) int64.
        slot_mask: (B, S) bool, or None.
        blocks: how to walk through the logits, with scratch memory for K maps, float32 or wider.
        values: (K, B, T, H, W), written to.
        slopes: (K, B, T, S, H, W), written to; None if they are not wanted.
        criterion: ``"mse"`` or ``"cross_entropy"``.
        smoothing: of the labels, for ``"cross_entropy"``.
        temperature: of the softmax.
    """
    label, values = label.unsqueeze(3), values.unsqueeze(3)
    for frames in blocks.frames:
        label_, value, slope, *some = frames_of(frames, label, values, slopes, *pupils)
        scratch = blocks.scratch(len(some), *some[0].shape)
        if criterion == "mse":
            _squared_error(some, label_, slot_mask, temperature, scratch, value, slope)
        else:
            _cross_entropy(some, label_, slot_mask, temperature, smoothing, scratch, value, slope)


def steepness(criterion: Criterion, temperature: float) -> float:
    """Return the factor that :func:`evaluate` leaves out of its slope."""
    return (2 if criterion == "mse" else 1) / temperature


def _squared_error(
    pupils: Sequence[Tensor],
    label: Tensor,
    slot_mask: Tensor | None,
    temperature: float,
    scratch: Tensor,
    value: Tensor,
    slope: Tensor | None,
) -> None:
    """Write ``e = sum_s (P_s - 1[s = y])^2`` and half its slope times tau.

    With ``r = sum_{s != y} P_s`` and ``Q = sum_{s != y} P_s^2`` it is ``e = r^2 + Q``, which does not cancel
    as ``sum P^2 - 2 P_y + 1`` does, and the gradient is ``-(2/tau) P_y e`` at y and
    ``(2/tau) P_s (P_s + P_y r - Q)`` elsewhere.
    """
    probs = scratch if slope is None else slope
    for k, one in enumerate(pupils):
        _write_probs(one, slot_mask, temperature, out=probs[k])
    # a patch with NaN, +inf or nothing but -inf has no probabilities
    probs.nan_to_num_()
    correct = probs.gather(3, label)
    # zeros are scattered twice as fast as the number zero
    zero = correct.new_zeros(())
    probs.scatter_(3, label, zero.expand_as(correct))
    wrong = probs.sum(3, keepdim=True)
    # a patch without probabilities counts as uniform: 1/S each is ((S-1)/S)^2 + (S-1)/S^2 = (S-1)/S away from any label
    nothing = (wrong + correct).eq_(0.0)
    squares = torch.square(probs, out=scratch)
    square = squares.sum(3, keepdim=True)
    torch.addcmul(square, wrong, wrong, out=value)
    if slope is not None:
        torch.addcmul(squares, probs, square.addcmul_(correct, wrong, value=-1), value=-1, out=slope)
        slope.scatter_(3, label, torch.addcmul(zero, correct, value, value=-1))
    num_slots = _num_slots(value, pupils[0].shape[2], slot_mask)
    if isinstance(num_slots, int):
        value.add_(nothing, alpha=1 - 1 / num_slots)
    else:
        value.add_(nothing.mul_(1 - 1 / num_slots))


def _cross_entropy(
    pupils: Sequence[Tensor],
    label: Tensor,
    slot_mask: Tensor | None,
    temperature: float,
    smoothing: float,
    scratch: Tensor,
    value: Tensor,
    slope: Tensor | None,
) -> None:
    """Write ``-(1 - e) log P_y - (e/S) sum_s log P_s`` with smoothing e, and its slope times tau.

    With aims ``q_s = (1 - e) 1[s = y] + e/S`` the gradient is ``(1/tau) (P_s sum_k q_k - q_s)``, where slots
    with a logit of -inf, whose log-probability is a constant, leave both terms.
    """
    impossible = torch.empty_like(scratch, dtype=torch.bool)
    peak = torch.empty_like(value)
    for k, one in enumerate(pupils):
        _write_below_peak(one, slot_mask, temperature, out=scratch[k], impossible=impossible[k], peak=peak[k])
    below = scratch
    num_slots = _num_slots(value, pupils[0].shape[2], slot_mask)
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
    value.copy_(torch.where(peak == float("-inf"), uniform, entropy.nan_to_num_()))
    if slope is not None:
        aims = scratch.zero_().scatter_(3, label, torch.full_like(own, 1 - smoothing))
        if smoothing:
            aims += smoothing / num_slots
        aims.masked_fill_(impossible, 0.0)
        probs = slope.scatter_(3, label, own).div_(total)
        probs.mul_(aims.sum(3, keepdim=True)).sub_(aims).nan_to_num_()


def _num_slots(like: Tensor, num_slots: int, slot_mask: Tensor | None) -> Tensor | int:
    """Return S, or the number of present slots as it broadcasts against (K, B, T, S, H, W), in the dtype of another."""
    if slot_mask is None:
        return num_slots
    # no integers: 1 / 3 of those is float32, beside float64 logits too
    return present_slots(slot_mask)[:, None, None, None, None].to(like.dtype)


def _write_probs(logits: Tensor, slot_mask: Tensor | None, temperature: float, *, out: Tensor) -> None:
    """Write the probabilities of all slots; NaN for a patch with NaN, +inf or nothing but -inf."""
    scores = only_present(logits.to(out.dtype), slot_mask)
    if temperature != 1.0:
        scores = _below_peak(scores, scores.amax(2, keepdim=True), temperature)
    torch.softmax(scores, 2, out=out)


def _write_below_peak(
    logits: Tensor, slot_mask: Tensor | None, temperature: float, *, out: Tensor, impossible: Tensor, peak: Tensor
) -> None:
    """Write how far every slot lies below the largest, which slots are -inf, and the largest."""
    scores = only_present(logits.to(out.dtype), slot_mask)
    # before the peak is taken off: beside a +inf every finite logit would look like this
    torch.eq(scores, float("-inf"), out=impossible)
    torch.amax(scores, 2, keepdim=True, out=peak)
    _below_peak(scores, peak, temperature, out=out)


def _below_peak(scores: Tensor, peak: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """Return how far every slot lies below the largest, over the temperature.

    Taken off before the division, the largest cannot overflow, however small the temperature. Where all slots
    are -inf there is nothing to take off.
    """
    below = torch.sub(scores, torch.where(peak == float("-inf"), 0.0, peak), out=out)
    return below if temperature == 1.0 else below.div_(temperature)
