"""What a metric adds up before it divides."""

from typing import NamedTuple

import torch
from torch import Tensor

from ssync_loss.metrics._contingency import Per


class Scores(NamedTuple):
    """A sum and its weight for each video, both (B,) float64; the metric is their quotient.

    The weight is the number of things counted, and ``counted`` names them. Kept apart so that a mean over a
    data set weighs every video, frame, object or slot alike, and so that one with nothing to score weighs
    nothing.
    """

    total: Tensor
    weight: Tensor
    counted: str

    def mean(self, *, empty: float) -> Tensor:
        """Divide, with ``empty`` where nothing was counted."""
        return torch.where(self.weight > 0, self.total / self.weight.clamp_min(1.0), empty)


def scores_of_units(value: Tensor, scored: Tensor, *, batch: int, per: Per) -> Scores:
    """Gather one value per unit into videos, leaving out the units that have nothing to score."""
    kept = torch.where(scored, value, 0.0)
    # the quotient rather than -1, which an empty batch leaves undefined
    shape = (batch, len(value) // max(batch, 1))
    total, weight = (x.to(torch.float64).view(shape).sum(1) for x in (kept, scored))
    return Scores(total, weight, "videos" if per == "video" else "frames")
