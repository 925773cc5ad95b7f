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
    """A sum, and its weight: the number of videos, frames, objects or slots. Both are (B,) float64, one per video.

    The metric is their quotient. A mean over a data set gives the same weight to everything that is ``counted``.
    """

    total: Tensor
    weight: Tensor
    counted: str


# the sums of every metric of the package
SCORES: dict[Callable[..., Tensor], Callable[..., Scores]] = {}


def averaged(*, empty: float) -> Callable[[Callable[P, Scores]], Callable[P, Tensor]]:
    """Turn a function that returns sums into a metric: one value per video, ``empty`` if the weight is 0."""

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
    # in an empty batch, torch could not infer an axis of -1
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
