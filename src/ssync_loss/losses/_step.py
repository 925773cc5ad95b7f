"""Both terms of SSync at once: all clips are labeled, then taught a group of clips at a time, slopes included."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssync_loss import kernels
from ssync_loss._autocast import no_autocast
from ssync_loss._autograd import Slopes, once_differentiable, signature_kept, untracked
from ssync_loss._backends import Backend, resolve_backend
from ssync_loss._blocks import ALL, Blocks, in_blocks, in_one
from ssync_loss._criteria import Criterion, evaluate, steepness
from ssync_loss._maps import Maps
from ssync_loss._types import PseudoLabels, Terms
from ssync_loss.distillation import num_averaged, slope_again
from ssync_loss.losses._teaching import teach
from ssync_loss.pseudo_labels import Found, find_labels, labels_of, largest_of


class Settings(NamedTuple):
    """What decides the value of both terms."""

    merge_threshold: float | None
    min_different: int
    min_same: int
    max_different: int
    criterion: Criterion
    label_smoothing: float
    temperature: float


def terms_of(
    maps: Maps,
    settings: Settings,
    weights: tuple[float, float],
    ramp: Tensor | float,
    *,
    backend: Backend,
    with_labels: bool,
) -> Terms:
    """Compute both terms of SSync, and the ramp times their sum with the weights of boundary and interior.

    Where a map holds NaN or +inf, labels mean nothing: all of it, and every gradient, is NaN.
    """
    backend = resolve_backend(backend, maps.enc, maps.dec)
    if backend == "reference":
        return _reference(maps, settings, weights, ramp)
    if backend == "triton":
        return _kernels(maps, settings, weights, ramp, with_labels)
    with_slope = tuple(one.requires_grad and torch.is_grad_enabled() for one in (maps.dec, maps.enc))
    with no_autocast(maps.enc):
        boundary, interior, nums, _, _, _, _, _, *labels = _step(*maps, settings, with_slope, with_labels, Slopes())
    total = weigh(boundary, interior, weights, ramp)
    num_boundary, num_interior = nums.unbind()
    return Terms(total, boundary, interior, num_boundary, num_interior, PseudoLabels(*labels) if with_labels else None)


def weigh(boundary: Tensor, interior: Tensor, weights: tuple[float, float], ramp: Tensor | float) -> Tensor:
    """Add both terms with their weights, and multiply by the ramp; what is 1 costs nothing."""
    parts = [one if weight == 1 else weight * one for one, weight in zip((boundary, interior), weights, strict=True)]
    total = parts[0] + parts[1]
    return total if isinstance(ramp, float) and ramp == 1 else total * ramp


def _reference(maps: Maps, settings: Settings, weights: tuple[float, float], ramp: Tensor | float) -> Terms:
    maps = maps.widened()
    threshold, min_different, min_same, max_different, *criterion = settings
    labels = labels_of(
        maps,
        merge_threshold=threshold,
        min_different=min_different,
        min_same=min_same,
        max_different=max_different,
        backend="reference",
    )
    how: dict[str, Any] = dict(zip(("criterion", "label_smoothing", "temperature"), criterion, strict=True))
    boundary = teach(maps.dec, labels.enc_labels, labels.boundary, maps, **how, backend="reference")
    interior = teach(maps.enc, labels.dec_labels, labels.interior, maps, **how, backend="reference")
    total = weigh(boundary, interior, weights, ramp)
    return Terms(total, boundary, interior, labels.boundary.sum(), labels.interior.sum(), labels)


def _kernels(
    maps: Maps, settings: Settings, weights: tuple[float, float], ramp: Tensor | float, with_labels: bool
) -> Terms:
    # a number is weighed in by the kernel, and a launch saved
    known = ramp if isinstance(ramp, float) else 1.0
    step = kernels.step(
        maps.enc,
        maps.dec,
        valid=maps.valid,
        slot_mask=maps.slot_mask,
        clean=maps.clean,
        **settings._asdict(),
        boundary_weight=weights[0] * known,
        interior_weight=weights[1] * known,
        with_labels=with_labels,
    )
    return step if isinstance(ramp, float) else step._replace(total=step.total * ramp)


def _memory(like: Tensor, dtype: torch.dtype, num_maps: int, wanted: bool) -> Tensor:
    """Return uninitialized slopes of some maps, or as many tensors without elements.

    Of two maps in one piece: a CPU's malloc gives two pieces back, and faults in every page at the next step.
    """
    return torch.empty(num_maps, *(like.shape if wanted else (0,)), device=like.device, dtype=dtype)


def _teach_both(
    maps: Maps, found: Found, blocks: Blocks, taught: list[slice], slopes: list[Tensor], settings: Settings
) -> Tensor:
    """Add up the criterion over the patches of both regions, (2,), and write the slopes of decoder and encoder."""
    of_clips = blocks.groups(maps.dec, maps.enc, maps.slot_mask)
    wanted = (slope if slope.dim() > 2 else None for slope in slopes)
    of_both = blocks.groups(found.labels, found.regions, found.peaks, *wanted, dim=1)
    sums = []
    # the maps that were read last are still in a cache
    for (*pupils, mask), (labels, regions, peaks, *some) in reversed(list(zip(of_clips, of_both, strict=True))):
        # the decoder learns what the encoder's labels say, and the other way round
        lessons = labels, regions.to(maps.dtype), peaks
        errors = []
        for part, slope in zip(taught, some, strict=True):
            label, chosen, peak = lessons if part == ALL else (one[part] for one in lessons)
            value = evaluate(
                pupils[part],
                label,
                chosen,
                mask,
                blocks,
                slope,
                each=False,
                peaks=peak,
                # where every patch counts, one of those makes NaN of all values and gradients in the end
                nan_allowed=maps.valid is None,
                criterion=settings.criterion,
                smoothing=settings.label_smoothing,
                temperature=settings.temperature,
            )
            errors.append(value)
        sums.append(in_one(errors))
    return sum(sums[1:], sums[0])


@signature_kept
class _Step(torch.autograd.Function):
    """Both means, and the slopes that become their gradients.

    The slopes wait, unscaled, for the backward, which knows what to scale them by and does so in place. A second
    backward computes them again, from the targets.
    """

    @staticmethod
    def forward(
        enc: Tensor,
        dec: Tensor,
        valid: Tensor | None,
        slot_mask: Tensor | None,
        clean: Tensor | None,
        settings: Settings,
        with_slope: tuple[bool, bool],
        with_labels: bool,
        unscaled: Slopes,  # noqa: ARG004 (for the backward)
    ) -> tuple[Tensor, ...]:
        maps = Maps(enc, dec, valid, slot_mask, clean)
        dtype, num_slots = maps.dtype, enc.shape[2]
        # while clips are small, both maps at once take half as many operators
        at_once = with_slope[0] == with_slope[1] and in_blocks(enc)
        taught = [ALL] if at_once else [slice(0, 1), slice(1, 2)]
        with untracked():
            blocks = Blocks(enc, dtype, num_maps=2 if at_once else 1)
            found = find_labels(
                maps,
                blocks,
                merge_threshold=settings.merge_threshold,
                min_different=settings.min_different,
                min_same=settings.min_same,
                max_different=settings.max_different,
            )
            # half the time of a sum in int64
            selected = found.regions.sum((2, 3, 4), dtype=torch.int32)
            averaged = num_averaged(selected, num_slots, slot_mask, settings.criterion).clamp_min(1)
            # NaN where a map is not clean: it reaches the values and, by way of the shares, the gradients
            averaged = averaged + largest_of(found.peaks, maps.counted) * 0.0
            if clean is not None:
                averaged = torch.where(clean, averaged, float("nan"))
        slopes = [_memory(enc, dtype, 2 // len(taught), with_slope[part.start or 0]) for part in taught]
        with untracked():
            means = _teach_both(maps, found, blocks, taught, slopes, settings) / averaged
        boundary, interior = means.unbind()
        shares = steepness(settings.criterion, settings.temperature) / averaged
        each = [slope for part in slopes for slope in part.unbind()]
        kept = found.regions.clone(), found.labels.clone(), shares, *each
        labels = found.as_pseudo_labels() if with_labels else ()
        return boundary.clone(), interior.clone(), selected.sum(1), *kept, *labels

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        enc, dec, _, slot_mask, _, settings, _, _, ctx.unscaled = inputs
        ctx.settings = settings.criterion, settings.label_smoothing, settings.temperature
        _, _, _, regions, targets, shares, *ctx.slopes = output[:8]
        ctx.mark_non_differentiable(*output[2:])
        # or autograd makes maps of zeros as the gradients of the slopes
        ctx.set_materialize_grads(False)
        pupils = (one if needed else None for one, needed in zip((enc, dec), ctx.needs_input_grad, strict=False))
        ctx.save_for_backward(*pupils, slot_mask, regions, targets, shares)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_boundary: Tensor | None, grad_interior: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        enc, dec, slot_mask, regions, targets, shares = ctx.saved_tensors
        grads: list[Tensor | None] = []
        for k, (grad, pupil) in enumerate(((grad_boundary, dec), (grad_interior, enc))):
            if grad is None or pupil is None:
                grads.append(None)
                continue
            scale = grad * shares[k]
            slope: Tensor | None = ctx.slopes[k]
            if torch.compiler.is_compiling() and slope is not None:
                grads.append((slope * scale).to(pupil.dtype))
                continue
            ctx.slopes[k] = None
            # of another level of torch.func, where the map may need no gradient
            if slope is None or slope.dim() == 1 or not ctx.unscaled.take(k):
                wide = pupil.to(shares.dtype)
                slope = slope_again(wide, targets[k], regions[k], slot_mask, *ctx.settings)
            grads.append(slope.mul_(scale).to(pupil.dtype))
        return grads[1], grads[0], *(None,) * 7


# typed: autograd's own `apply` is not
_step: Callable[..., tuple[Tensor, ...]] = _Step.apply
