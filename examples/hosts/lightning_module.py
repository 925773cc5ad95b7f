"""A LightningModule that trains a slot model with SSync. If your host is a LightningModule itself, subclass it.

``global_step`` counts optimizer steps even under gradient accumulation, so schedules stay right. The maps are attached
when fitting starts, before the sanity validation. The checkpoint does not hold them.
"""

from collections.abc import Callable
from typing import Any

import lightning  # type: ignore[import-not-found, unused-ignore]
import torch
from torch import Tensor, nn

from ssync_loss import SSyncLoss
from ssync_loss.adapters import attach


class SSyncModule(lightning.LightningModule):  # type: ignore[misc, unused-ignore]
    """Trains ``model`` with its own loss, ``host_loss(model, batch)``, and SSync."""

    def __init__(self, model: nn.Module, host_loss: Callable[[nn.Module, Any], Tensor], **settings: Any) -> None:
        super().__init__()
        self.model, self.host_loss = model, host_loss
        self.criterion = SSyncLoss(**settings)

    def on_fit_start(self) -> None:
        """Attach the maps once."""
        self.maps = attach(self.model)

    def on_fit_end(self) -> None:
        """Detach the maps."""
        self.maps.remove()

    def training_step(self, batch: Any) -> Tensor:
        """Add SSync to the host's loss."""
        loss = self.host_loss(self.model, batch)
        return loss + self.criterion(**self.maps(), step=self.global_step)

    def validation_step(self, batch: Any) -> None:
        """Log the host's loss. The next forward pass discards maps that were not read."""
        self.log("val/loss", self.host_loss(self.model, batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer that the field's papers use."""
        return torch.optim.Adam(self.model.parameters(), lr=4e-4)
