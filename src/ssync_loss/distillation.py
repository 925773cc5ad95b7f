"""Teaching one map the hard labels of the other, on selected patches only."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ssync_loss import kernels
from ssync_loss._autocast import no_autocast
from ssync_loss._autograd import Slopes, once_differentiable, signature_kept
from ssync_loss._backends import Backend, check_backend, resolve_backend
from ssync_loss._blocks import Blocks, in_one, indicator
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
from ssync_loss._criteria import Criterion, evaluate, present_slots, steepness
from ssync_loss._maps import TINY, check_slot_mask, peak_of
from ssync_loss.reference.ssync import reference_selective_distillation_loss

Reduction: TypeAlias = Literal["none", "sum", "mean"]

CRITERIA = ("mse", "cross_entropy")
REDUCTIONS = ("none", "sum", "mean")


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
        values = []
        slope = torch.empty(logits.shape if with_slope else 0, device=logits.device, dtype=dtype)
        blocks = Blocks(logits, dtype)
        of_clips = blocks.groups(logits, target, region, slot_mask, slope if with_slope else None)
        for narrow, labels, regions, mask, some_slope in of_clips:
            # values have the strides of labels and regions, and are added up in that order
            some, label, chosen = narrow.to(dtype), labels.contiguous(), as_numbers(regions.contiguous(), dtype)
            peak = peak_of(some, mask)
            (value,) = evaluate(
                [some],
                label[None],
                chosen[None],
                mask,
                blocks,
                None if some_slope is None else some_slope[None],
                each=True,
                peaks=peak.clamp_min(torch.finfo(dtype).min)[None],
                nan_allowed=False,
                criterion=criterion,
                smoothing=smoothing,
                temperature=temperature,
            )
            # a selected patch whose largest logit is NaN or +inf has no value: 0 times 1/0 there, 0 times 1/1 elsewhere
            below = indicator(torch.lt, peak, float("inf"))
            if torch.compiler.is_compiling():
                # nor has one with a label out of range, which elsewhere is an error
                below = below * ((label >= 0) & (label < logits.shape[2]))
            # not in place: compiled by torch 2.11, what an operator has written into gets no gradient as an output
            values.append(value + (1 - chosen + chosen * below).reciprocal_().mul_(0.0))
        return in_one(values), slope

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
