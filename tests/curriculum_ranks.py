"""Trains a curriculum in one or two processes: python curriculum_ranks.py RANK FOLDER.

Each rank writes the slots, errors, moments and collectives of every step to FOLDER/RANK.pt.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ranks import WORLD_SIZE, meet, recorded
from ssync_loss.curriculum import SlotCurriculum

NUM_CLIPS = 6
NUM_STEPS = 6
# unequal batches
SHARES = (slice(0, 2), slice(2, NUM_CLIPS))
BUDGETS, MILESTONES = [2, 3, 5], [1, 3]


class Host(nn.Module):
    """A model whose slots are colors and whose masks compare them with the target. It contains the curriculum."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(3)))
        self.curriculum = SlotCurriculum(BUDGETS, MILESTONES, window=2)

    def forward(self, target: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.curriculum.take(self.slots)
        masks = torch.einsum("btdhw,sd->btshw", target, slots).softmax(2)
        return torch.einsum("btshw,sd->btdhw", masks, slots), masks


def clips(step: int) -> Tensor:
    """Return the whole batch of a step. Later clips are harder."""
    target = torch.randn(NUM_CLIPS, 2, 4, 3, 3, generator=torch.Generator().manual_seed(step))
    return target * torch.arange(1, NUM_CLIPS + 1).view(-1, 1, 1, 1, 1)


def train(share: slice, *, distributed: bool) -> dict[str, Any]:
    """Train on some of the clips."""
    host = Host()
    model: nn.Module = DistributedDataParallel(host) if distributed else host
    optimizer = torch.optim.AdamW(host.parameters(), lr=0.01)
    results: dict[str, Any] = {"slots": [], "errors": [], "sent": [], "expanded": [], "moments": []}
    for step in range(NUM_STEPS):
        target = clips(step)[share]
        recon, masks = model(target)
        with recorded("all_reduce", "broadcast") as observed:
            host.curriculum.observe(recon, target, masks, step)
        results["errors"].append(host.curriculum.errors.clone())
        optimizer.zero_grad()
        # the weight makes the mean over ranks the mean over all clips
        weight = len(target) * (WORLD_SIZE if distributed else 1) / NUM_CLIPS
        ((recon - target).square().mean() * weight).backward()
        optimizer.step()
        with recorded("all_reduce", "broadcast") as expanded:
            results["expanded"].append(host.curriculum.maybe_expand(host.slots, step, optimizer))
        results["sent"].append([(name, numel) for name, numel, _ in observed + expanded])
        results["slots"].append(host.slots.detach().clone())
        results["moments"].append(optimizer.state[host.slots]["exp_avg"].clone())
    return results


def of_rank(rank: int) -> dict[str, Any]:
    # the jitter differs between ranks unless the curriculum prevents it
    torch.manual_seed(rank)
    return train(SHARES[rank], distributed=True)


if __name__ == "__main__":
    meet(of_rank)
