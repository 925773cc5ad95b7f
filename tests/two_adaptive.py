"""Trains the adaptive loss in two processes: python two_adaptive.py RANK FOLDER.

Each rank writes its last state and the sizes of its collectives to FOLDER/RANK.pt.
"""

from typing import Any

import torch
from torch import Tensor

from ranks import meet, recorded
from sample_maps import sample_maps
from ssync_loss import AdaptiveSSyncLoss, SSyncLoss

STEPS = 4
# clips of each rank
SHARES = [slice(0, 1), slice(1, 4)]


def scene(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return maps, features and valid patches. The encoder is right in the first clip, the decoder in the others.

    The second rank's features are constant in step 1 and NaN in step 2. In step 3 it has no valid patch.
    """
    enc, dec = sample_maps(4)
    features = torch.stack([enc[0], *dec[1:]]).detach().clone()
    valid = torch.ones(4, 2, dtype=torch.bool)
    if step == 1:
        features[1:] = 0.5
    if step == 2:
        features[3, 0, 0, 0, 0] = float("nan")
    if step == 3:
        valid[1:] = False
    return enc, dec, features, valid


def train(share: slice, *, compiled: bool = False) -> dict[str, Any]:
    """Train on some of the clips, and return the state."""
    loss = AdaptiveSSyncLoss(SSyncLoss(merge_threshold=None), momentum=0.5, warmup=1)
    step_of: Any = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    for step in range(STEPS):
        enc, dec, features, valid = (one[share] for one in scene(step))
        step_of(enc, dec, features, valid=valid).backward()
    return dict(loss.state_dict())


def of_rank(rank: int) -> dict[str, Any]:
    with recorded("all_reduce") as calls:
        together = train(SHARES[rank])
    sent = [numel for _, numel, _ in calls]
    return {"together": together, "sent": sent, "compiled": train(SHARES[rank], compiled=True)}


if __name__ == "__main__":
    meet(of_rank)
