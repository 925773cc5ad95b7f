"""The C library's functions as operators of torch, with shapes for fake tensors and with gradients.

The forward writes the weighted gradients of both maps. The backward multiplies them by the incoming gradient, unless
the incoming gradient is 1.
"""

from collections.abc import Callable

# torch 2.6 infers an operator's schema only from `typing.Sequence`
from typing import Any, Sequence, TypeAlias  # noqa: UP035

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from ssync_loss._autograd import differentiable, learns, once_differentiable, plain
from ssync_loss._checks import read_numbers
from ssync_loss._inputs import widest
from ssync_loss.ssync.engines.contract import in_bytes, new_labels, new_slots
from ssync_loss.ssync.engines.cpu.calls import INTEGERS, KINDS, NUMBERS, REDUCTIONS, call
from ssync_loss.ssync.maps import Maps
from ssync_loss.ssync.settings import Reduction, Settings
from ssync_loss.ssync.types import PseudoLabels, SlotLabels

# the fields of PseudoLabels
Labels: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
# boundary mean and interior mean (or their weighted sum and an empty tensor), both counts of selected patches, the
# wanted gradients of decoder and encoder, anchor
Step: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def step(
    maps: Maps, settings: Settings, found: SlotLabels | None = None, *, summed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute both means (if ``summed`` their weighted sum and an empty tensor), and both counts of patches."""
    weights = (settings.boundary_weight, settings.interior_weight) if summed else (1.0, 1.0)
    boundary, interior, counts, *_ = _differentiable_step(
        maps.enc,
        maps.dec,
        maps.valid,
        maps.slot_mask,
        maps.clean if found is None else found.clean,
        *in_bytes(found),
        _knobs(settings.merge_threshold, *weights),
        *_numbers(settings),
        summed,
        learns(maps.dec),
        learns(maps.enc),
    )
    return boundary, interior, counts


def find_slots(maps: Maps, settings: Settings) -> SlotLabels:
    """Compute labels before merging, and representatives."""
    knobs = _knobs(settings.merge_threshold, 1.0, 1.0)
    inputs = maps.enc.detach(), maps.dec.detach(), maps.valid, maps.slot_mask, maps.clean, knobs
    found: tuple[Tensor, Tensor, Tensor] = _plain_find(*inputs)
    return SlotLabels(*found)


def pseudo_labels(maps: Maps, settings: Settings) -> PseudoLabels:
    """Compute labels, regions and representatives."""
    labels: Labels = _plain_label(
        maps.enc.detach(),
        maps.dec.detach(),
        maps.valid,
        maps.slot_mask,
        _knobs(settings.merge_threshold, 1.0, 1.0),
        *_numbers(settings),
    )
    return PseudoLabels(*labels)


def distill(
    logits: Tensor,
    target: Tensor,
    region: Tensor,
    slot_mask: Tensor | None,
    settings: Settings,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compare one map with labels on a region."""
    value: Tensor
    value, *_ = _differentiable_distill(
        logits, target, region, slot_mask, *_numbers(settings), reduction, learns(logits)
    )
    return value


def _numbers(settings: Settings) -> tuple[list[int], list[float]]:
    """Return the settings that are always numbers, in the order of the call's fields."""
    regions = settings.min_different, settings.min_same, settings.max_different
    return [*regions, int(settings.criterion == "cross_entropy")], [settings.label_smoothing, settings.temperature]


def _fields(slot_mask: Tensor | None, integers: Sequence[int], numbers: Sequence[float]) -> dict[str, Any]:
    """Return the fields that all calls share."""
    names = (*INTEGERS, *NUMBERS)
    contiguous = None if slot_mask is None else slot_mask.contiguous()
    return {"slot_mask": contiguous, **dict(zip(names, (*integers, *numbers), strict=True))}


def _knobs(merge_threshold: float | Tensor | None, *weights: float | Tensor) -> Tensor:
    """Put the settings that may be numbers or tensors into one tensor (3,), which the library reads."""
    knobs = [float("inf") if merge_threshold is None else merge_threshold, *weights]
    if not any(isinstance(knob, Tensor) for knob in knobs):
        return torch.tensor(knobs, dtype=torch.float64, device="cpu")
    return torch.stack([torch.as_tensor(knob, dtype=torch.float64, device="cpu").detach() for knob in knobs])


def _operator(name: str, compute: Callable[..., Any], allocate: Callable[..., Any]) -> CustomOpDef:
    """Register a function as an operator of torch; ``allocate`` makes its outputs for fake tensors."""
    operator = torch.library.custom_op(f"ssync_loss::cpu_{name}", compute, mutates_args=())
    operator.register_fake(allocate)
    return operator


def _step(
    enc: Tensor,
    dec: Tensor,
    valid: Tensor | None,
    slot_mask: Tensor | None,
    clean: Tensor | None,
    hard: Tensor | None,
    names: Tensor | None,
    knobs: Tensor,
    integers: Sequence[int],
    numbers: Sequence[float],
    summed: bool,
    for_dec: bool,
    for_enc: bool,
) -> Step:
    boundary, interior, counts, grads, _ = outputs = _new_step(enc, dec, summed, for_dec, for_enc)
    call(
        "step",
        enc.shape,
        widest(enc, dec),
        {"enc": enc, "dec": dec, "valid": valid},
        **_fields(slot_mask, integers, numbers),
        clean=clean,
        hard=hard,
        names=names,
        knobs=knobs,
        boundary_mean=boundary,
        interior_mean=None if summed else interior,
        counts=counts,
        grad_dec=grads[0] if for_dec else None,
        grad_enc=grads[-1] if for_enc else None,
    )
    return outputs


def _new_step(enc: Tensor, dec: Tensor, summed: bool, for_dec: bool, for_enc: bool) -> Step:
    dtype = widest(enc, dec)
    # one allocation: malloc would return two smaller ones to the system, and every step would fault their pages again
    return (
        enc.new_empty((), dtype=dtype),
        enc.new_empty(0 if summed else (), dtype=dtype),
        enc.new_empty(2, dtype=torch.int64),
        enc.new_empty((for_dec + for_enc, *enc.shape), dtype=dtype),
        enc.new_empty(0, dtype=dtype),
    )


_step_operator = _operator("step", _step, lambda enc, dec, *settings: _new_step(enc, dec, *settings[-3:]))


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: Step) -> None:
    enc, dec, *_ = inputs
    _, interior, counts, grads, anchor = output
    ctx.dtypes, ctx.summed = (dec.dtype, enc.dtype), interior.dim() == 1
    ctx.mark_non_differentiable(counts, grads)
    # autograd would fill zeros for unused outputs
    ctx.set_materialize_grads(False)
    # the anchor has the graph of this function, which `once_differentiable` needs
    ctx.save_for_backward(grads, anchor)


@once_differentiable
def _derive_step(
    ctx: Any, of_boundary: Tensor | None, of_interior: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    grads, _ = ctx.saved_tensors
    if ctx.summed:
        of_interior = of_boundary
    is_one = _are_one(of_boundary) if ctx.summed else _are_one(of_boundary, of_interior)
    grad_enc = grad_dec = None
    if of_boundary is not None and ctx.needs_input_grad[1]:
        grad_dec = _times(grads[0], of_boundary, ctx.dtypes[0], is_one)
    if of_interior is not None and ctx.needs_input_grad[0]:
        grad_enc = _times(grads[-1], of_interior, ctx.dtypes[1], is_one)
    return grad_enc, grad_dec, *(None,) * 11


_differentiable_step = differentiable(_step_operator, _step, _save_step, _derive_step)


def _are_one(*incoming: Tensor | None) -> bool:
    """Tell whether incoming gradients are known to be 1, and the graph is not kept for another backward."""
    scalars = [one for one in incoming if one is not None and one.dim() == 0]
    if not scalars or _is_kept():
        return False
    numbers = [read_numbers(one) for one in scalars]
    return all(number is not None and number.item() == 1 for number in numbers)


def _times(grad: Tensor, incoming: Tensor, dtype: torch.dtype, is_one: bool) -> Tensor:
    """Multiply a gradient that the forward wrote, never in place; a factor of 1 returns the gradient itself."""
    if is_one and grad.dtype == dtype:
        return grad
    result: Tensor = _plain_scale(grad, incoming, dtype)
    return result


def _is_kept() -> bool:
    """Tell whether the graph is kept for another backward; True if torch cannot tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def _scale(grad: Tensor, incoming: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a gradient times a number, or times a number per patch, in the type of its map."""
    scaled = torch.empty_like(grad, dtype=dtype)
    factor = incoming.to(grad.dtype).contiguous()
    call(
        "scale",
        grad.shape,
        grad.dtype,
        {"enc": grad},
        kind=KINDS[dtype],
        values=factor,
        reduction=int(incoming.dim() == 0),
        grad_enc=scaled,
    )
    return scaled


_scale_operator = _operator("scale", _scale, lambda grad, _, dtype: torch.empty_like(grad, dtype=dtype))
_plain_scale = plain(_scale_operator, _scale)


def _find(
    enc: Tensor, dec: Tensor, valid: Tensor | None, slot_mask: Tensor | None, clean: Tensor | None, knobs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    hard, names, found_clean = _new_find(enc)
    call(
        "find",
        enc.shape,
        widest(enc, dec),
        {"enc": enc, "dec": dec, "valid": valid},
        slot_mask=None if slot_mask is None else slot_mask.contiguous(),
        clean=clean,
        knobs=knobs,
        hard=hard,
        names=names,
        found_clean=found_clean,
    )
    return hard, names, found_clean


def _new_find(enc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return *new_slots(enc), enc.new_empty((), dtype=torch.bool)


_find_operator = _operator("find", _find, lambda enc, *_: _new_find(enc))
_plain_find = plain(_find_operator, _find)


def _label(
    enc: Tensor,
    dec: Tensor,
    valid: Tensor | None,
    slot_mask: Tensor | None,
    knobs: Tensor,
    integers: Sequence[int],
    numbers: Sequence[float],
) -> Labels:
    labels = new_labels(enc)
    call(
        "step",
        enc.shape,
        widest(enc, dec),
        {"enc": enc, "dec": dec, "valid": valid},
        **_fields(slot_mask, integers, numbers),
        knobs=knobs,
        **dict(zip(PseudoLabels._fields, labels, strict=True)),
    )
    return labels


_label_operator = _operator("label", _label, lambda enc, *_: new_labels(enc))
_plain_label = plain(_label_operator, _label)


def _distill(
    logits: Tensor,
    target: Tensor,
    region: Tensor,
    slot_mask: Tensor | None,
    integers: Sequence[int],
    numbers: Sequence[float],
    reduction: str,
    for_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    value, grad, anchor = _new_distillation(logits, reduction, for_logits)
    call(
        "distill",
        logits.shape,
        widest(logits),
        {"enc": logits, "target": target.long(), "region": region},
        **_fields(slot_mask, integers, numbers),
        reduction=REDUCTIONS[reduction],
        values=value,
        grad_enc=grad if for_logits else None,
    )
    return value, grad, anchor


def _new_distillation(logits: Tensor, reduction: str, for_logits: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = widest(logits)
    clips, frames, _, height, width = logits.shape
    patches = (clips, frames, height, width) if reduction == "none" else ()
    return (
        logits.new_empty(patches, dtype=dtype),
        logits.new_empty(logits.shape if for_logits else 0, dtype=dtype),
        logits.new_empty(0, dtype=dtype),
    )


_distill_operator = _operator("distill", _distill, lambda logits, *settings: _new_distillation(logits, *settings[-2:]))


def _save_distillation(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, *_ = inputs
    _, grad, anchor = output
    ctx.dtype = logits.dtype
    ctx.mark_non_differentiable(grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, anchor)


@once_differentiable
def _derive_distillation(ctx: Any, incoming: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, _ = ctx.saved_tensors
    return None if incoming is None else _times(grad, incoming, ctx.dtype, _are_one(incoming)), *(None,) * 7


_differentiable_distill = differentiable(_distill_operator, _distill, _save_distillation, _derive_distillation)
