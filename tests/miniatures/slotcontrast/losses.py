"""A miniature of the SlotContrast family's losses. A configuration names a class of this module."""

import sys
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import Tensor, nn


def build(config: Mapping[str, Any]) -> nn.Module:
    """Build the class ``config["name"]`` with the rest of the configuration as its arguments."""
    cls = getattr(sys.modules[__name__], config["name"], None)
    if cls is None:
        raise ValueError(f"Unknown loss `{config['name']}`")
    built: nn.Module = cls(target_transform=None, **{key: value for key, value in config.items() if key != "name"})
    return built


class Loss(nn.Module):
    """A loss. The host calls ``get_target`` in the forward pass, then ``get_prediction`` and the loss."""

    def __init__(
        self,
        pred_key: str,
        target_key: str,
        video_inputs: bool = False,
        patch_inputs: bool = True,
        target_transform: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.pred_path, self.target_path = pred_key.split("."), target_key.split(".")
        self.n_expected_dims = 2 + (1 if patch_inputs else 2) + bool(video_inputs)
        grid = {(True, True): "b t p d -> b (t p) d", (True, False): "b t d h w -> b (t h w) d"}
        image = {(False, True): "b p d -> b p d", (False, False): "b d h w -> b (h w) d"}
        self.to_canonical_dims = Rearrange({**grid, **image}[bool(video_inputs), bool(patch_inputs)])

    def get_target(self, inputs: dict[str, Tensor], outputs: dict[str, Any]) -> Tensor:
        target = _read(outputs, self.target_path).detach()
        return target.flatten(1, -2)

    def get_prediction(self, outputs: dict[str, Any]) -> Tensor:
        prediction = _read(outputs, self.pred_path)
        if prediction.dim() != self.n_expected_dims:
            raise ValueError(f"Prediction has {prediction.dim()} dimensions, but expected {self.n_expected_dims}.")
        made: Tensor = self.to_canonical_dims(prediction)
        return made


class MSELoss(Loss):
    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target)


def _read(tree: Any, path: list[str]) -> Tensor:
    for one in path:
        tree = tree[one]
    found: Tensor = tree
    return found
