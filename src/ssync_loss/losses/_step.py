"""Both terms of SSync in one walk over the clips: each is labeled and taught while its maps are in the cache."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssync_loss import kernels
from ssync_loss._autocast import no_autocast
from ssync_loss._autograd import Slopes, once_differentiable, signature_kept
from ssync_loss._backends import Backend, resolve_backend
from ssync_loss._blocks import Blocks
from ssync_loss._maps import Maps
from ssync_loss._types import PseudoLabels
from ssync_loss.distillation import Criterion, as_numbers, evaluate, num_averaged, slope_again, steepness
from ssync_loss.losses._teaching import teach
from ssync_loss.pseudo_labels import joined, labels_of, labels_of_clips


class Settings(NamedTuple):
    """What decides the value of both terms."""

    merge_threshold: float | None
    min_different: int
    min_same: int
    max_different: int
    criterion: Criterion
    label_smoothing: float
    temperature: float


class Terms(NamedTuple):
    """The weighted sum, both means, what they were taken over, and the labels if they were asked for."""

    total: Tensor
    boundary: Tensor
    interior: Tensor
    num_boundary: Tensor
    num_interior: Tensor
    labels: PseudoLabels | None


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
    slopes = [one.requires_grad and torch.is_grad_enabled() for one in (maps.dec, maps.enc)]
    with no_autocast(maps.enc):
        boundary, interior, num, _, _, _, _, _, *labels = _step(*maps, *settings, *slopes, with_labels, Slopes())
    total = weigh(boundary, interior, weights, ramp)
    return Terms(total, boundary, interior, num[0], num[1], PseudoLabels(*labels) if with_labels else None)


def weigh(boundary: Tensor, interior: Tensor, weights: tuple[float, float], ramp: Tensor | float) -> Tensor:
    """Add both terms with their weights, and multiply by the ramp; what is 1 costs nothing."""
    parts = [one if weight == 1 else weight * one for one, weight in zip((boundary, interior), weights, strict=True)]
    total = parts[0] + parts[1]
    return total if isinstance(ramp, float) and ramp == 1 else total * ramp


def _reference(maps: Maps, settings: Settings, weights: tuple[float, float], ramp: Tensor | float) -> Terms:
    maps = maps.of_clips(slice(None))
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
    return Terms(step.total if isinstance(ramp, float) else step.total * ramp, *step[1:])


def _memory(maps: Tensor, dtype: torch.dtype, *wanted: bool) -> list[Tensor]:
    """Return uninitialized slopes of both maps, empty what is not wanted."""
    if all(wanted) and maps.device.type == "cpu" and not torch.compiler.is_compiling():
        # in one piece: malloc gives two back together, and every page is faulted in again at the next step
        return list(torch.empty(2, *maps.shape, device=maps.device, dtype=dtype).unbind(0))
    return [torch.empty(maps.shape if one else 0, device=maps.device, dtype=dtype) for one in wanted]


def _in_one(groups: list[Tensor]) -> Tensor:
    """Put (2, B, ..) of groups of clips together."""
    return groups[0] if len(groups) == 1 else torch.cat(groups, 1)


@signature_kept
class _Step(torch.autograd.Function):
    """Both means, and the slopes that become their gradients.

    The number of selected patches is known after the last clip, so the slopes wait, unscaled, for the backward,
    which scales them in place. A second backward computes them again, from the targets.
    """

    @staticmethod
    def forward(
        enc: Tensor,
        dec: Tensor,
        valid: Tensor | None,
        slot_mask: Tensor | None,
        clean: Tensor | None,
        merge_threshold: float | None,
        min_different: int,
        min_same: int,
        max_different: int,
        criterion: Criterion,
        smoothing: float,
        temperature: float,
        dec_with_slope: bool,
        enc_with_slope: bool,
        with_labels: bool,
        unscaled: Slopes,  # noqa: ARG004 (for the backward)
    ) -> tuple[Tensor, ...]:
        maps = Maps(enc, dec, valid, slot_mask, clean)
        dtype, num_slots = maps.dtype, enc.shape[2]
        blocks = Blocks(enc, dtype)
        slopes = _memory(enc, dtype, dec_with_slope, enc_with_slope)
        sums, regions_, targets_, tops, groups = [], [], [], [], []
        for group in blocks.groups:
            some = maps.of_clips(group)
            found, narrow, peaks, top = labels_of_clips(
                some,
                blocks,
                merge_threshold=merge_threshold,
                min_different=min_different,
                min_same=min_same,
                max_different=max_different,
            )
            errors = torch.empty_like(peaks)
            # the decoder learns what the encoder's labels say, and the other way round
            for k, pupil in enumerate((some.dec, some.enc)):
                evaluate(
                    pupil,
                    found.labels[k],
                    peaks[1 - k],
                    some.slot_mask,
                    blocks,
                    errors[k],
                    slopes[k][group] if slopes[k].dim() > 1 else None,
                    criterion=criterion,
                    smoothing=smoothing,
                    temperature=temperature,
                )
            sums.append(errors.mul_(as_numbers(found.regions, dtype)).sum((1, 2, 3, 4)))
            regions_.append(found.regions)
            targets_.append(narrow)
            tops.append(top)
            if with_labels:
                groups.append(found)
        regions, targets = _in_one(regions_), _in_one(targets_)
        selected = regions.sum((2, 3, 4))
        # NaN where a map is not clean: it reaches the values and, by way of the shares, the gradients
        top = torch.stack(tops).amax() if len(tops) > 1 else tops[0]
        averaged = num_averaged(selected, num_slots, slot_mask, criterion).clamp_min(1) + top * 0.0
        if clean is not None:
            averaged = torch.where(clean, averaged, float("nan"))
        boundary, interior = (sum(sums[1:], sums[0]) / averaged).unbind()
        labels = joined(groups) if with_labels else ()
        shares = steepness(criterion, temperature) / averaged
        return boundary.clone(), interior.clone(), selected.sum(1), regions, targets, shares, *slopes, *labels

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        enc, dec, _, slot_mask, _, _, _, _, _, *ctx.settings, _, _, _, ctx.unscaled = inputs
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
            scale = as_numbers(regions[k], shares.dtype).mul_(grad * shares[k]).unsqueeze(2)
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
        return grads[1], grads[0], *(None,) * 14


# typed: autograd's own `apply` is not
_step: Callable[..., tuple[Tensor, ...]] = _Step.apply
