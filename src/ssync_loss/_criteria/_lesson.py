"""What both ways of computing a criterion share."""

from collections.abc import Sequence
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from ssync_loss._maps import TINY, only_present

# what a slot that cannot win costs in the cross-entropy
LOG_TINY = log(TINY)


def present_slots(slot_mask: Tensor) -> Tensor:
    """Count the present slots of every clip, at least 1: (B, S) -> (B,)."""
    return slot_mask.sum(1).clamp_min(1)


class Lesson(NamedTuple):
    """Some frames of some clips of K maps, and what they are taught.

    Attributes:
        pupils: K maps (B, T, S, H, W) of logits.
        label: (K, B, T, H, W) integers.
        chosen: (K, B, T, 1, H, W), 1 where a patch counts and 0 elsewhere, in the type that is computed in.
        slot_mask: (B, S) bool, or None.
        temperature: of the softmax.
        smoothing: of the labels.
        slope: (K, B, T, S, H, W), written to; None if it is not wanted.
        each: whether values are wanted one by one, (K, B, T, H, W), or their sum (K,).
        peaks: (K, B, T, 1, H, W), the largest score of every patch, or the lowest finite number where all are -inf.
        nan_allowed: whether values and slopes may be NaN where logits are NaN or +inf.
    """

    pupils: Sequence[Tensor]
    label: Tensor
    chosen: Tensor
    slot_mask: Tensor | None
    temperature: float
    smoothing: float
    slope: Tensor | None
    each: bool
    peaks: Tensor
    nan_allowed: bool

    @property
    def num_slots(self) -> Tensor | int:
        """S, or the number of present slots as it broadcasts against (B, T, S, H, W)."""
        if self.slot_mask is None:
            return self.pupils[0].shape[2]
        # no integers: 1 / 3 of those is float32, beside float64 logits too
        return present_slots(self.slot_mask)[:, None, None, None, None].to(self.chosen.dtype)

    def scores(self, k: int) -> Tensor:
        """Return the logits of a map in the type that is computed in, absent slots at -inf."""
        return only_present(self.pupils[k].to(self.chosen.dtype), self.slot_mask)


def below_peak(scores: Tensor, peak: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """Return how far every slot lies below the largest, over the temperature.

    Taken off before the division, the largest cannot overflow, however small the temperature. Where it is the
    lowest finite number, those that are -inf stay so.
    """
    below = torch.sub(scores, peak, out=out)
    return below if temperature == 1.0 else below.div_(temperature)
