"""A LightningModule that trains a slot model with the line; for a host that is a LightningModule itself, subclass it.

``global_step`` counts steps of the optimizer, also under gradient accumulation, so schedules mean what they say. The
maps are attached when fitting starts, before the sanity validation; nothing of them is in the checkpoint.
"""

from collections.abc import Callable
from typing import Any

import lightning  # type: ignore[import-not-found, unused-ignore]
import torch
from torch import Tensor, nn

from ssync_loss import SSyncLoss
from ssync_loss.adapters import attach


class SSyncModule(lightning.LightningModule):  # type: ignore[misc, unused-ignore]
    """Trains ``model`` with ``host_loss(model, batch)``, the loss it had before, and the line."""

    def __init__(self, model: nn.Module, host_loss: Callable[[nn.Module, Any], Tensor], **settings: Any) -> None:
        super().__init__()
        self.model, self.host_loss = model, host_loss
        self.criterion = SSyncLoss(**settings)

    def on_fit_start(self) -> None:
        """Attach, once."""
        self.maps = attach(self.model)

    def on_fit_end(self) -> None:
        """Let the model go."""
        self.maps.remove()

    def training_step(self, batch: Any) -> Tensor:
        """Return the loss of the host and the line."""
        loss = self.host_loss(self.model, batch)
        return loss + self.criterion(**self.maps(), step=self.global_step)

    def validation_step(self, batch: Any) -> None:
        """Validate as before; maps that nobody asks for are forgotten at the next forward."""
        self.log("val/loss", self.host_loss(self.model, batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer that the fields' papers use."""
        return torch.optim.Adam(self.model.parameters(), lr=4e-4)
