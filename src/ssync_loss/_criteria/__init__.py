"""What the probabilities of a map are compared with hard labels by, and its slope, a group of clips at a time.

Operator by operator in :mod:`_eager`, a few passes over a map for a compiler in :mod:`_fused`.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ssync_loss._blocks import ALL, Blocks, frames_of, in_one
from ssync_loss._criteria import _eager, _fused
from ssync_loss._criteria._lesson import Lesson, present_slots

__all__ = ["Criterion", "evaluate", "present_slots", "steepness"]

Criterion: TypeAlias = Literal["mse", "cross_entropy"]


def evaluate(
    pupils: Sequence[Tensor],
    label: Tensor,
    chosen: Tensor,
    slot_mask: Tensor | None,
    blocks: Blocks,
    slopes: Tensor | None,
    *,
    each: bool,
    peaks: Tensor,
    nan_allowed: bool,
    criterion: Criterion,
    smoothing: float,
    temperature: float,
) -> Tensor:
    """Compute the criterion of the chosen patches, summed over slots, and write its slope.

    The slope times :func:`steepness` is the gradient, 0 for a patch that is not chosen, or has nothing but -inf.
    Neither is NaN, whatever the logits hold, unless that is allowed.

    Args:
        pupils: K maps (B, T, S, H, W) of logits, a group of clips.
        label: (K, B, T, H, W) integers.
        chosen: (K, B, T, H, W) of the scratch memory's dtype, 1 where a patch counts and 0 elsewhere.
        slot_mask: (B, S) bool, or None.
        blocks: how to walk through the logits, with scratch memory for K maps, float32 or wider.
        slopes: (K, B, T, S, H, W), written to, every map of it contiguous; None if they are not wanted.
        each: whether the patches are wanted one by one, (K, B, T, H, W), or their sum (K,).
        peaks: (K, B, T, H, W), the largest logit of a present slot of every patch, at least the lowest finite number.
        nan_allowed: whether values and slopes may be NaN where logits are NaN or +inf.
        criterion: ``"mse"`` or ``"cross_entropy"``.
        smoothing: of the labels, for ``"cross_entropy"``.
        temperature: of the softmax.
    """
    chosen, peaks = chosen.unsqueeze(3), peaks.unsqueeze(3)
    values = []
    for frames in blocks.frames:
        chosen_, slope, peak, *some = frames_of(frames, chosen, slopes, peaks, *pupils)
        label_ = label if frames == ALL else label[:, :, frames]
        lesson = Lesson(some, label_, chosen_, slot_mask, temperature, smoothing, slope, each, peak, nan_allowed)
        if torch.compiler.is_compiling():
            value = _fused.squared_error(lesson) if criterion == "mse" else _fused.cross_entropy(lesson)
        else:
            memory = blocks.scratch(len(some), *some[0].shape)
            compute = _eager.squared_error if criterion == "mse" else _eager.cross_entropy
            value = compute(lesson, memory, blocks.patches)
        values.append(value)
    return in_one(values, 2) if each else sum(values[1:], values[0])


def steepness(criterion: Criterion, temperature: float) -> float:
    """Return the factor that :func:`evaluate` leaves out of its slope."""
    return (2 if criterion == "mse" else 1) / temperature
