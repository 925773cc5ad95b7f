"""The settings of SSync, as all stages and engines take them."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ssync_loss._checks import check_choice, check_int, check_number, read_numbers

Criterion: TypeAlias = Literal["mse", "cross_entropy"]
Reduction: TypeAlias = Literal["none", "sum", "mean"]

CRITERIA = ("mse", "cross_entropy")
REDUCTIONS = ("none", "sum", "mean")
# the smallest normal float32: the least temperature, and the least probability before a logarithm
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Settings:
    """The settings of both terms; :class:`ssync_loss.SSyncLoss` explains each.

    The merge threshold and the weights may be scalar tensors on the maps' device, which a caller can change without
    waiting for the device. A threshold of None or infinity merges nothing.
    """

    merge_threshold: float | Tensor | None = 0.6
    min_different: int = 1
    min_same: int = 1
    max_different: int = 0
    criterion: Criterion = "mse"
    label_smoothing: float = 0.0
    temperature: float = 1.0
    boundary_weight: float | Tensor = 1.0
    interior_weight: float | Tensor = 1.0

    def check(self) -> None:
        """Require all settings to be in range.

        Raises: TypeError if a setting has another type; ValueError if it is out of range; the message names it.
        """
        if self.merge_threshold is not None:
            check_scalar("merge_threshold", self.merge_threshold, 0.0, 1.0)
        check_int("min_different", self.min_different, 0, 10)
        check_int("min_same", self.min_same, 0, 10)
        check_int("max_different", self.max_different, 0, 10)
        check_choice("criterion", self.criterion, CRITERIA)
        check_number("label_smoothing", self.label_smoothing, 0.0, 1.0)
        check_number("temperature", self.temperature, 0.0, open_low=True)
        check_number("temperature", self.temperature, TINY)
        if self.criterion == "mse" and self.label_smoothing != 0:
            raise ValueError(
                f"`label_smoothing` must be 0 with criterion='mse'; got {self.label_smoothing}. "
                "Smoothing is defined for criterion='cross_entropy'."
            )
        check_scalar("boundary_weight", self.boundary_weight, 0.0)
        check_scalar("interior_weight", self.interior_weight, 0.0)


def check_scalar(name: str, value: object, low: float, high: float | None = None) -> None:
    """Require a number within [low, high], or a floating-point tensor without axes.

    Only ``low`` applies to a tensor, if reading it waits for no device. An infinite threshold turns merging off.
    """
    if not isinstance(value, Tensor):
        check_number(name, value, low, high)
    elif value.dim() != 0 or not value.is_floating_point():
        raise ValueError(
            f"`{name}` must be a number or a floating-point tensor without axes; "
            f"got a tensor of {value.dtype} and shape {tuple(value.shape)}."
        )
    elif (number := read_numbers(value)) is not None and not number >= low:
        raise ValueError(f"`{name}` must be at least {low}; got {number.item()}.")
