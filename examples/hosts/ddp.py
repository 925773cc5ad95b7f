"""Data parallelism with gradient accumulation and mixed precision, in a script that ``torchrun`` starts.

::

    torchrun --nproc-per-node 2 train.py      # builds the model and its data, then calls `train`

`global_mean` averages over the patches of *all* ranks, as if one process had the whole batch. A plain
``criterion(...)`` would give each rank's mean the same weight. A schedule counts optimizer steps.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssync_loss import SSyncLoss
from ssync_loss.adapters import attach
from ssync_loss.distributed import global_mean


def train(
    model: nn.Module,
    batches: Iterable[Sequence[Any]],
    host_loss: Callable[[nn.Module, Any], Tensor],
    *,
    device: str = "cpu",
    amp: bool = True,
) -> nn.Module:
    """Train this rank's replica. A batch is a sequence of parts whose gradients accumulate to one step."""
    maps = attach(model)
    replica = DistributedDataParallel(model)
    criterion = SSyncLoss.from_preset("ytvis")
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-4)
    scaler = torch.amp.GradScaler(device, enabled=amp)
    for step, parts in enumerate(batches):
        for part in parts:
            # ranks exchange gradients at the last part only
            with nullcontext() if part is parts[-1] else replica.no_sync():
                with torch.autocast(device, enabled=amp):
                    loss = host_loss(replica, part)
                    loss = loss + global_mean(criterion, **maps(), step=step)  # the line
                scaler.scale(loss / len(parts)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    maps.remove()
    return model
