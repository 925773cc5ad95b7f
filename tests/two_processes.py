"""Runs every case of data parallelism in one and in two processes: python two_processes.py RANK FOLDER.

Each rank writes the gradients of the model, the loss and the collectives of every case to FOLDER/RANK.pt.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ranks import WORLD_SIZE, meet, recorded
from sample_maps import sample_maps
from ssync_loss import SSyncLoss
from ssync_loss.distributed import global_mean

NUM_CLIPS = 4

MASKED = torch.ones(NUM_CLIPS, 2, 5, 12, dtype=torch.bool)
MASKED[0, :, 1:4] = False
MASKED[3, 1] = False
# the second process selects nothing
HALF = torch.ones(NUM_CLIPS, 2, dtype=torch.bool)
HALF[2:] = False
SLOTS = torch.tensor([[True] * 4, [True, True, False, False], [True, True, True, False], [False, True, True, True]])
SMOOTHED = {"criterion": "cross_entropy", "label_smoothing": 0.1}

# settings of the loss, masks of the whole batch, step
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int | None]] = {
    "plain": ({}, {}, None),
    "slot mask": ({}, {"slot_mask": SLOTS}, None),
    "valid patches": ({}, {"valid": MASKED}, None),
    "both masks": ({"boundary_weight": 0.3}, {"slot_mask": SLOTS, "valid": MASKED}, None),
    "cross entropy": (SMOOTHED, {}, None),
    "cross entropy, both masks": (SMOOTHED, {"slot_mask": SLOTS, "valid": MASKED}, None),
    "nothing on one rank": ({}, {"valid": HALF}, None),
    "nothing on one rank, cross entropy": (SMOOTHED, {"valid": HALF}, None),
    "nothing anywhere": ({}, {"valid": torch.zeros_like(HALF)}, None),
    "in the ramp": ({"start_step": 10, "ramp_steps": 4}, {}, 13),
    "before the start": ({"start_step": 10}, {}, 9),
}


class Host(nn.Module):
    """A model that computes both maps by mixing the slots of given maps."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.enc_mix = nn.Parameter(torch.eye(4) + 0.1 * torch.randn(4, 4, generator=generator))
        self.dec_mix = nn.Parameter(torch.eye(4) + 0.1 * torch.randn(4, 4, generator=generator))

    def forward(self, enc: Tensor, dec: Tensor) -> tuple[Tensor, Tensor]:
        return (
            torch.einsum("rs,btshw->btrhw", self.enc_mix, enc),
            torch.einsum("rs,btshw->btrhw", self.dec_mix, dec),
        )


def scene() -> tuple[Tensor, Tensor]:
    """Return the whole batch. Later clips have fewer stripes, so the ranks select different numbers of patches."""
    enc, dec = sample_maps(NUM_CLIPS, requires_grad=False)
    for maps in (enc, dec):
        maps[2:, :, 1] += 1.5
        maps[3, :, 2] += 4.0
    return enc, dec


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name.removeprefix("module."): one.grad for name, one in model.named_parameters()}
    return {name: one.clone() for name, one in found.items() if one is not None}


def whole_batch() -> dict[str, Any]:
    """Run all clips in one process."""
    results = {}
    for name, (settings, masks, step) in CASES.items():
        model = Host()
        enc, dec = model(*scene())
        loss = SSyncLoss(**settings)(enc, dec, step=step, **masks)
        value = loss.detach()
        # the host's own loss is a mean over equal shares
        loss = loss + 0.1 * (enc.square().mean() + dec.square().mean())
        results[name] = {"value": value, "gradients": gradients(model, loss)}
    return results


def one_rank(rank: int, *, use_global_mean: bool) -> dict[str, Any]:
    """Run half of the clips in one of two processes."""
    share = slice(rank * NUM_CLIPS // WORLD_SIZE, (rank + 1) * NUM_CLIPS // WORLD_SIZE)
    results = {}
    for name, (settings, masks, step) in CASES.items():
        model = DistributedDataParallel(Host())
        enc, dec = model(*(maps[share] for maps in scene()))
        mine: Any = {key: mask[share] for key, mask in masks.items()}
        criterion = SSyncLoss(**settings)
        with recorded("all_reduce") as calls:
            if use_global_mean:
                loss = global_mean(criterion, enc, dec, step=step, **mine)
            else:
                loss = criterion(enc, dec, step=step, **mine)
        value = loss.detach()
        loss = loss + 0.1 * (enc.square().mean() + dec.square().mean())
        results[name] = {"value": value, "gradients": gradients(model, loss), "sent": calls}
    return results


def uneven(rank: int) -> dict[str, Any]:
    """Run batches of one clip and of three clips, with an explicit group."""
    share = slice(0, 1) if rank == 0 else slice(1, NUM_CLIPS)
    model = DistributedDataParallel(Host())
    enc, dec = model(*(maps[share] for maps in scene()))
    loss = global_mean(SSyncLoss(), enc, dec, group=dist.group.WORLD)
    return {"value": loss.detach(), "gradients": gradients(model, loss)}


def of_rank(rank: int) -> dict[str, Any]:
    return {
        "global": one_rank(rank, use_global_mean=True),
        "local": one_rank(rank, use_global_mean=False),
        "uneven": uneven(rank),
    }


if __name__ == "__main__":
    meet(of_rank)
