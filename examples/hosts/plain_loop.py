"""A plain training loop: attach once, and add one line after the host's loss.

It suits STEVE, SPOT, slot attention with your own decoder, and any other model that a script trains.
``host_loss(model, batch)`` is the loss that the script had before. ``dec`` is your own decoder, see `attach`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ssync_loss import SSyncLoss
from ssync_loss.adapters import attach


def train(
    model: nn.Module,
    batches: Iterable[Any],
    host_loss: Callable[[nn.Module, Any], Tensor],
    *,
    start_step: int = 0,
    dec: Any = None,
) -> Tensor:
    """Train on the batches, and return the loss of every step."""
    maps = attach(model, dec=dec)
    criterion = SSyncLoss.from_preset("ytvis", start_step=start_step)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-4)
    losses = []
    for step, batch in enumerate(batches):
        loss = host_loss(model, batch)
        loss = loss + criterion(**maps(), step=step)  # the line
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        losses.append(loss.detach())
    maps.remove()
    return torch.stack(losses)
