"""The mean of a metric over a data set, one batch at a time."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssync_loss._checks import check_type
from ssync_loss.metrics._scores import SCORES


class MetricAverage:
    """Mean of a metric over all batches, in float64, printed with its definition.

    The metric decides what is counted: videos (``per="video"``), frames (``per="image"``), objects (J, F), objects in
    frames (recall, fragmentation) or slots. ``mean = state[0] / state[1]``, sum over count. Videos with nothing to
    score do not count.

    No method calls a collective. Under data parallelism sum the state over processes before :meth:`compute`:
    ``dist.all_reduce(average.state)``. The state is one float64 tensor, on the CPU unless moved.

    ``metric`` is a function of this package, e.g. ``video_fg_ari``, and ``options`` are its keyword arguments.

    Raises: TypeError if ``metric`` is no function of this package or the options do not fit it.

    >>> from ssync_loss.metrics import video_fg_ari
    >>> average = MetricAverage(video_fg_ari, background=0)
    >>> target = torch.tensor([[[[0, 1, 1, 2, 2]]], [[[0, 1, 1, 2, 2]]], [[[0, 0, 0, 0, 0]]]])
    >>> pred = torch.tensor([[[[5, 5, 5, 6, 6]]], [[[5, 5, 5, 5, 5]]], [[[5, 6, 7, 8, 9]]]])
    >>> average.update(pred, target)  # 1, 0, and a video without an object
    >>> average
    video_fg_ari(background=0) = 0.5000 over 2 videos
    """

    state: Tensor
    """The sum and the count so far: (2,), float64."""

    def __init__(self, metric: Callable[..., Tensor], **options: Any) -> None:
        if not callable(metric) or metric not in SCORES:
            listed = ", ".join(known.__name__ for known in SCORES)
            raise TypeError(f"`metric` must be one of the functions {listed}; got {metric!r}.")
        signature = inspect.signature(metric)
        tensors = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
        try:
            signature.bind(*tensors, **options)
        except TypeError as error:
            raise TypeError(f"`options` must fit {metric.__name__}: {error}; got {options}.") from None
        self.metric = metric
        self.options = options
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self.state = torch.zeros(2, dtype=torch.float64)
        self._counted = ""

    def update(self, *labels: Tensor) -> None:
        """Add a batch: the tensors of the metric, usually ``pred, target``.

        Raises: TypeError, ValueError as the metric does, or if there are too few or too many tensors.
        """
        total, weight, self._counted = SCORES[self.metric](*labels, **self.options)
        self.state = self.state + torch.stack([total.sum(), weight.sum()]).to(self.state.device)

    def merge(self, other: "MetricAverage") -> None:
        """Add all batches of another average of the same metric.

        Raises: TypeError if ``other`` is no average; ValueError if its metric or options differ.
        """
        check_type("other", other, MetricAverage)
        if other.metric is not self.metric or other.options != self.options:
            raise ValueError(f"`other` must average {self._definition()}; got {other._definition()}.")
        self.state = self.state + other.state.to(self.state.device)
        self._counted = self._counted or other._counted

    def compute(self) -> Tensor:
        """Return the mean, a float64 tensor without axes.

        Raises: RuntimeError if no batch had anything to score.
        """
        if self.state[1] == 0:
            wanted = "call update() first, with at least one video that has something to score"
            raise RuntimeError(f"{self._definition()} has nothing to average: {wanted}.")
        return self.state[0] / self.state[1]

    def _definition(self) -> str:
        listed = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.metric.__name__}({listed})"

    def __repr__(self) -> str:
        if self.state[1] == 0:
            return f"{self._definition()}, nothing to average yet"
        counted = f" {self._counted}" if self._counted else ""
        return f"{self._definition()} = {self.compute().item():.4f} over {int(self.state[1])}{counted}"
