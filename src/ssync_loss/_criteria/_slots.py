"""What both ways of computing a criterion share."""

from math import log

import torch
from torch import Tensor

from ssync_loss._maps import TINY, only_present

# what a slot that cannot win costs in the cross-entropy
LOG_TINY = log(TINY)


def present_slots(slot_mask: Tensor) -> Tensor:
    """Count the present slots of every clip, at least 1: (B, S) -> (B,)."""
    return slot_mask.sum(1).clamp_min(1)


def num_slots_of(maps: Tensor, slot_mask: Tensor | None, dtype: torch.dtype) -> Tensor | int:
    """Return S, or the number of present slots as it broadcasts against (K, B, T, S, H, W)."""
    if slot_mask is None:
        return maps.shape[2]
    # no integers: 1 / 3 of those is float32, beside float64 logits too
    return present_slots(slot_mask)[:, None, None, None, None].to(dtype)


def scores_of(logits: Tensor, slot_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return logits in the type that is computed in, absent slots at -inf."""
    return only_present(logits.to(dtype), slot_mask)


def below_peak(scores: Tensor, peak: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """Return how far every slot lies below the largest, over the temperature.

    Taken off before the division, the largest cannot overflow, however small the temperature. Where all slots
    are -inf there is nothing to take off.
    """
    below = torch.sub(scores, torch.where(peak == float("-inf"), 0.0, peak), out=out)
    return below if temperature == 1.0 else below.div_(temperature)
