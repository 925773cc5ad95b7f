"""Updates centers in two processes: python two_centers.py RANK FOLDER.

Each rank writes its last centers, its losses and the sizes of its collectives to FOLDER/RANK.pt.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ranks import WORLD_SIZE, meet, recorded
from ssync_loss import CenteredCrossEntropy
from ssync_loss.functional import masked_token_loss, out_generative_loss

NUM_PROTOTYPES = 5

# clips of each rank
SHARES = {
    "equal": [slice(0, 2), slice(2, 4)],
    "uneven": [slice(0, 1), slice(1, 4)],
    "one empty": [slice(0, 4), slice(0)],
}


def scene() -> dict[str, Tensor]:
    """Return a batch of four clips of four frames. The clips have different numbers of masked positions."""
    generator = torch.Generator().manual_seed(3)
    shape = (4, 4, 6, NUM_PROTOTYPES)
    s, t = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(2))
    mask = torch.rand(shape[:3], generator=generator) < torch.tensor([0.2, 0.8, 0.5, 0.0]).view(4, 1, 1)
    # no clip masks this frame
    mask[:, 2] = False
    return {"s": s, "t": t, "mask": mask}


def moved(s: Tensor, t: Tensor, mask: Tensor, *, all_reduce: bool, group: Any = None) -> dict[str, Tensor]:
    """Return the centers after two steps of every kind, and the losses."""
    found = {}
    for kind in ("explicit", "masked", "frames", "pairs"):
        criterion = CenteredCrossEntropy(NUM_PROTOTYPES, m_c=0.7, all_reduce=all_reduce, group=group)
        for step in range(2):
            if kind == "explicit":
                loss = criterion(s, t + step)
                criterion.update_center(t + step)
            elif kind == "masked":
                loss = criterion(s, t + step)
                criterion.update_center(t + step, mask=mask)
            elif kind == "frames":
                loss = masked_token_loss(s, t + step, mask, criterion, update_center=True)
            else:
                views = t[:, :, :1] + step
                loss = out_generative_loss(s[:, :, :1], s[:, :, 1:], views, criterion, update_center=True)
            found[f"{kind}, loss {step}"] = loss
        found[kind] = criterion.center
    return found


def of_rank(rank: int) -> dict[str, Any]:
    """Return the updates of one rank, with the other rank and alone."""
    results: dict[str, Any] = {}
    # every rank must create every group
    groups = [dist.new_group([one]) for one in range(WORLD_SIZE)]
    for name, shares in SHARES.items():
        mine = {key: one[shares[rank]] for key, one in scene().items()}
        for kind, group in (("all ranks", None), ("a named group", dist.group.WORLD), ("by itself", groups[rank])):
            with recorded("all_reduce") as calls:
                centers = moved(**mine, all_reduce=True, group=group)
            results[f"{name}, {kind}"] = centers, [numel for _, numel, _ in calls]
        with recorded("all_reduce") as calls:
            centers = moved(**mine, all_reduce=False)
        results[f"{name}, alone"] = centers, calls
    return results


if __name__ == "__main__":
    meet(of_rank)
