"""Teaching one map the hard labels of the other, on selected patches only."""

from collections.abc import Callable
from math import log
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ssync_loss._autocast import at_least_float32, no_autocast
from ssync_loss._autograd import once_differentiable
from ssync_loss._backends import Backend, resolve_backend
from ssync_loss._blocks import Blocks, part_of
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
from ssync_loss._maps import TINY, check_slot_mask, peak_of
from ssync_loss.reference import reference_selective_distillation_loss

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
        backend: ``"auto"``, ``"torch"`` or ``"reference"``.

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
        backend=resolve_backend(backend),
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
    peak: Tensor | None = None,
    criterion: Criterion,
    label_smoothing: float,
    temperature: float,
    slot_mask: Tensor | None,
    reduction: Reduction,
    backend: Backend,
) -> Tensor:
    """Compute :func:`selective_distillation_loss` without checks; ``peak`` is ``logits.amax(2)`` if it is known."""
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
    if slot_mask is not None:
        # a clip without slots has nothing to teach
        region = region & slot_mask.any(1)[:, None, None, None]
    with no_autocast(logits):
        # a patch's sum over slots; what it is divided by depends on the reduction
        patches: Tensor
        peak = at_least_float32(peak_of(logits, slot_mask) if peak is None else peak)
        if criterion == "mse":
            with_slope = logits.requires_grad and torch.is_grad_enabled()
            patches, _ = _squared_error(logits, target, region, slot_mask, peak, temperature, with_slope)
        else:
            patches = _cross_entropy(logits, target, region, slot_mask, peak, temperature, label_smoothing)
        if reduction == "mean":
            return patches.sum() / num_averaged(region, logits.shape[2], slot_mask, criterion).clamp_min(1)
        if criterion == "mse":
            slots = logits.shape[2] if slot_mask is None else present_slots(slot_mask)[:, None, None, None]
            patches = patches / slots
        return patches.sum() if reduction == "sum" else patches


def present_slots(slot_mask: Tensor) -> Tensor:
    """Count the present slots of every clip, at least 1: (B, S) -> (B,)."""
    return slot_mask.sum(1).clamp_min(1)


def num_averaged(region: Tensor, num_slots: int, slot_mask: Tensor | None, criterion: Criterion) -> Tensor:
    """Count what a mean divides by: selected patches, for the squared criterion times present slots."""
    if criterion == "cross_entropy":
        return region.sum()
    if slot_mask is None:
        return region.sum() * num_slots
    return (region.sum((1, 2, 3)) * present_slots(slot_mask)).sum()


def _num_slots(logits: Tensor, slot_mask: Tensor | None) -> Tensor | int:
    """Return S, or the number of present slots as it broadcasts against (B, T, H, W)."""
    if slot_mask is None:
        return logits.shape[2]
    # no integers: 1 / 3 of those is float32, beside float64 logits too
    return present_slots(slot_mask)[:, None, None, None].to(torch.promote_types(logits.dtype, torch.float32))


def _scores(piece: Tensor, present: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a piece with absent slots at -inf; the piece itself where nothing is to be done."""
    scores = piece.to(dtype)
    return scores if present is None else scores.masked_fill(~present[:, None, :, None, None], float("-inf"))


def _below_peak(scores: Tensor, peak: Tensor, temperature: float) -> Tensor:
    """Return how far every slot lies below the largest, over the temperature.

    Taken off before the division, the largest cannot overflow, however small the temperature. Where all slots
    are -inf there is nothing to take off.
    """
    below = scores - torch.where(peak == float("-inf"), 0.0, peak).unsqueeze(2)
    return below if temperature == 1.0 else below.div_(temperature)


class _SquaredError(torch.autograd.Function):
    """A patch's ``e = sum_s (P_s - 1[s = y])^2``, 0 where unselected, and half its slope times tau.

    With ``r = sum_{s != y} P_s`` and ``Q = sum_{s != y} P_s^2`` it is ``e = r^2 + Q``, which does not cancel
    as ``sum P^2 - 2 P_y + 1`` does, and the gradient is ``-(2/tau) P_y e`` at y and
    ``(2/tau) P_s (P_s + P_y r - Q)`` elsewhere. It costs little while the probabilities are at hand, so the slope
    is written in the forward, and the backward scales it in place: it becomes the gradient. A second backward
    through the same graph computes it again.
    """

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        region: Tensor,
        slot_mask: Tensor | None,
        peak: Tensor,
        temperature: float,
        with_slope: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        error = torch.empty(target.shape, device=logits.device, dtype=dtype)
        slope = torch.empty(logits.shape if with_slope else 0, device=logits.device, dtype=dtype)
        # the softmax of a patch with NaN, +inf or nothing but -inf is NaN; its largest logit tells them apart:
        # 0 for a patch that is defined, NaN for one that is selected and is not
        undefined = torch.where(region, peak.clamp_min(torch.finfo(dtype).min) * 0.0, 0.0)
        blocks = Blocks(logits)
        probs_memory = blocks.scratch(logits, dtype)
        squares_memory = slope if with_slope else blocks.scratch(logits, dtype)
        for piece in blocks:
            scores = _scores(logits[piece], None if slot_mask is None else slot_mask[piece[0]], dtype)
            if temperature != 1.0:
                scores = _below_peak(scores, peak[piece], temperature)
            probs = torch.softmax(scores, 2, out=part_of(probs_memory, scores)).nan_to_num_()
            label = target[piece].long().unsqueeze(2)
            correct = probs.gather(2, label)
            probs.scatter_(2, label, 0.0)
            wrong = probs.sum(2, keepdim=True)
            part = slope[piece] if with_slope else part_of(squares_memory, scores)
            squares = torch.mul(probs, probs, out=part).sum(2, keepdim=True)
            wrongness = torch.addcmul(squares, wrong, wrong)
            error[piece] = wrongness.squeeze(2)
            if with_slope:
                unclear = undefined[piece].unsqueeze(2)
                pull = torch.addcmul(unclear, correct, wrong).sub_(squares)
                torch.add(probs, pull, out=part).mul_(probs)
                part.scatter_(2, label, torch.addcmul(unclear, correct, wrongness, value=-1))
        # uniform probabilities 1/S are ((S-1)/S)^2 + (S-1)/S^2 = (S-1)/S away from any label
        uniform = (peak == float("-inf")).to(dtype) * (1 - 1 / _num_slots(logits, slot_mask))
        return error.add_(uniform).mul_(region).add_(undefined), slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, target, region, slot_mask, _, ctx.temperature, _ = inputs
        ctx.slope = output[1]
        ctx.mark_non_differentiable(output[1])
        # or autograd makes a map of zeros as the gradient of the slope
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, region, slot_mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_error: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_error is None:
            return None, None, None, None, None, None, None
        logits, target, region, slot_mask = ctx.saved_tensors
        scale = torch.where(region, grad_error * (2 / ctx.temperature), 0.0).unsqueeze(2)
        if torch.compiler.is_compiling():
            grad = ctx.slope * scale
        else:
            slope, ctx.slope = ctx.slope, None
            if slope is None:
                peak = at_least_float32(peak_of(logits, slot_mask))
                slope = _SquaredError.forward(logits, target, region, slot_mask, peak, ctx.temperature, True)[1]
            grad = slope.mul_(scale)
        return grad.to(logits.dtype), None, None, None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    """A patch's ``-(1 - e) log P_y - (e/S) sum_s log P_s`` with smoothing e, 0 where unselected.

    With aims ``q_s = (1 - e) 1[s = y] + e/S`` the gradient is ``(1/tau) (P_s sum_k q_k - q_s)``, where slots
    with a logit of -inf, whose log-probability is a constant, leave both terms.
    """

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        region: Tensor,
        slot_mask: Tensor | None,
        peak: Tensor,
        temperature: float,
        smoothing: float,
    ) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        entropy = torch.empty(target.shape, device=logits.device, dtype=dtype)
        for piece in Blocks(logits):
            present = None if slot_mask is None else slot_mask[piece[0]]
            scores = _scores(logits[piece], present, dtype)
            # before the peak is taken off: beside a +inf every finite logit would look like this
            impossible = scores == float("-inf")
            scores = _below_peak(scores, peak[piece], temperature)
            label = target[piece].long().unsqueeze(2)
            exps = scores.exp()
            own = exps.gather(2, label)
            others = exps.scatter_(2, label, 0.0).sum(2, keepdim=True)
            # a confident patch's loss is all in the others: adding them to 1 first would round it off
            log_total = torch.where(own == 1, others.log1p(), (others + own).log())
            log_probs = (scores - log_total).masked_fill_(impossible, LOG_TINY)
            num_slots = _num_slots(logits, present)
            value = log_probs.gather(2, label).squeeze(2) * (smoothing - 1)
            if smoothing:
                if present is not None:
                    log_probs.masked_fill_(~present[:, None, :, None, None], 0.0)
                value = value - log_probs.sum(2) * (smoothing / num_slots)
            # no finite slot: uniform probabilities
            uniform = log(num_slots) if isinstance(num_slots, int) else num_slots.log()
            value = torch.where(peak[piece] == float("-inf"), uniform, value)
            entropy[piece] = torch.where(region[piece], value, 0.0)
        return entropy

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004 (torch's name)
        logits, target, region, slot_mask, _, ctx.temperature, ctx.smoothing = inputs
        ctx.save_for_backward(logits, target, region, slot_mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, region, slot_mask = ctx.saved_tensors
        scale = torch.where(region, grad_entropy / ctx.temperature, 0.0).unsqueeze(2)
        grad = torch.empty(logits.shape, device=logits.device, dtype=scale.dtype)
        for piece in Blocks(logits):
            present = None if slot_mask is None else slot_mask[piece[0]]
            scores = _scores(logits[piece], present, scale.dtype)
            aims = torch.zeros_like(scores).scatter_(2, target[piece].long().unsqueeze(2), 1 - ctx.smoothing)
            if ctx.smoothing:
                num_slots = _num_slots(logits, present)
                aims += ctx.smoothing / (num_slots if isinstance(num_slots, int) else num_slots.unsqueeze(2))
            # NaN fails this comparison as -inf does, and is brought back by the softmax
            aims *= scores > float("-inf")
            # taken again: kept from the forward, it would be a number a patch until here
            peak = scores.amax(2)
            probs = _below_peak(scores, peak, ctx.temperature).softmax(2)
            part = (probs * aims.sum(2, keepdim=True) - aims) * scale[piece]
            # no finite slot: no gradient; unselected: none either, NaN or not
            taught = region[piece] & (peak != float("-inf"))
            grad[piece] = torch.where(taught.unsqueeze(2), part, 0.0)
        return grad.to(logits.dtype), None, None, None, None, None, None


# typed: autograd's own `apply` is not
_squared_error: Callable[..., tuple[Tensor, Tensor]] = _SquaredError.apply
_cross_entropy: Callable[..., Tensor] = _CrossEntropy.apply
