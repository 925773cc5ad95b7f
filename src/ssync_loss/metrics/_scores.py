"""The sums of a metric before the division, and a decorator that makes a metric of them."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor

from ssync_loss.metrics._contingency import Per

P = ParamSpec("P")


class Scores(NamedTuple):
    """A sum and the number of things ``counted``, both (B,) float64 for each video.

    The metric is their quotient. A mean over a data set gives every video, frame, object or slot the same weight.
    """

    total: Tensor
    weight: Tensor
    counted: str


# the sums of every metric of the package
SCORES: dict[Callable[..., Tensor], Callable[..., Scores]] = {}


def averaged(*, empty: float) -> Callable[[Callable[P, Scores]], Callable[P, Tensor]]:
    """Make a metric of its sums: one value per video, ``empty`` where nothing was counted."""

    def decorate(scores: Callable[P, Scores]) -> Callable[P, Tensor]:
        @wraps(scores)
        def metric(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            total, weight, _ = scores(*args, **kwargs)
            return torch.where(weight > 0, total / weight.clamp_min(1.0), empty)

        shown: Any = metric
        shown.__signature__ = signature(scores).replace(return_annotation=Tensor)
        SCORES[metric] = scores
        return metric

    return decorate


def scores_of_units(value: Tensor, scored: Tensor, *, batch: int, per: Per) -> Scores:
    """Sum one value per unit over videos, without the units that have nothing to score."""
    kept = torch.where(scored, value, 0.0)
    # not -1, which an empty batch leaves undefined
    shape = (batch, len(value) // max(batch, 1))
    total, weight = (x.to(torch.float64).view(shape).sum(1) for x in (kept, scored))
    return Scores(total, weight, "videos" if per == "video" else "frames")


def assignment(needed_by: str) -> Any:
    """Return scipy's linear assignment, which few metrics need."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(f'{needed_by} needs scipy: pip install "ssync-loss[metrics]".') from error
    return linear_sum_assignment
