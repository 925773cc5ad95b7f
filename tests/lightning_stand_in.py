"""The part of ``lightning`` that training needs, for machines without it. The order of calls is Lightning's."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class LightningModule(nn.Module):
    """The base class of a user's module."""

    global_step = 0

    def log(self, name: str, value: Any) -> None:
        """Store the last value."""
        self.logged = {name: float(value)}


class Trainer:
    """Calls ``on_fit_start``, a sanity validation, training steps and a validation after every epoch, as Lightning."""

    def __init__(self, *, max_epochs: int, accumulate_grad_batches: int = 1, **_: Any) -> None:
        self.max_epochs, self.accumulate = max_epochs, accumulate_grad_batches

    def fit(self, model: Any, train_dataloaders: Iterable[Any], val_dataloaders: Iterable[Any]) -> None:
        """Train the module."""
        optimizer = model.configure_optimizers()
        model.on_fit_start()
        self._validate(model, val_dataloaders)
        for _ in range(self.max_epochs):
            for index, batch in enumerate(train_dataloaders):
                (model.train().training_step(batch) / self.accumulate).backward()
                if (index + 1) % self.accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    model.global_step += 1
            self._validate(model, val_dataloaders)
        model.on_fit_end()

    @torch.no_grad()
    def _validate(self, model: Any, batches: Iterable[Any]) -> None:
        model.eval()
        for batch in batches:
            model.validation_step(batch)
