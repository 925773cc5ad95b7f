"""Slot redundancy: of two similar slots, the loss pushes the less decided one toward uniform attention."""

from math import log

import torch
from torch import Tensor

from ssync_loss._autocast import at_least_float32, no_autocast
from ssync_loss._checks import check_tensor
from ssync_loss._inputs import check_floats
from ssync_loss._module import LossModule
from ssync_loss._settings import COUNT, check_by
from ssync_loss._vectors import directions

# keeps the logarithm of an attention of 0 finite
EPSILON = 1e-8

_check_settings = check_by(num_picked=COUNT)


def slot_redundancy_loss(attention: Tensor, slots: Tensor, *, num_picked: int = 5) -> Tensor:
    """Push the redundant slots of a clip toward uniform attention.

    ``loss = mean over picked slots of D_s`` with ``D_s = mean over frames of sum_n a_n (log(a_n + 1e-8) + log N)``,
    the divergence of a slot's attention from 1/N. To pick a slot, take the two most similar slots that are left
    (cosine, last frame), and remove the one with the smaller D, or with the lower index on ties. ``num_picked`` slots
    are picked, at most S - 1. With a single slot or no clips the loss is exactly 0, attached to the graph. Slots get no
    gradient.

    Args:
        attention: (B, T, S, N) or (B, T, S, H, W), the softmax of the attention logits over *patches*, not over slots;
            the mean over iterations if there are several.
        slots: (B, T, S, D), the slots of every frame.
        num_picked: number of slots to pick in a clip, at least 1.

    Returns: a scalar in float32, or float64 if the attention is.
    Source: Seong, Moon & Heo, ICLR 2026 (arXiv:2602.03390), regularization of the warm-up.
    Raises: TypeError on a wrong dtype, ValueError on wrong shapes or settings.

    >>> attention = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.75, 0.25]]).view(1, 1, 3, 2)
    >>> slots = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]).view(1, 1, 3, 2)
    >>> # slots 1 and 2 are most similar, and slot 1 is uniform, D = 0; of slots 0 and 2, slot 2 has the smaller D:
    >>> # 3/4 log 3/4 + 1/4 log 1/4 + log 2 = 0.1308
    >>> round(slot_redundancy_loss(attention, slots, num_picked=2).item(), 4)
    0.0654
    """
    _check_settings(num_picked=num_picked)
    check_tensor("attention", attention)
    if attention.ndim == 5:
        attention = attention.flatten(3)
    size = check_floats("attention", attention, "B T S N", filled="T S N")
    check_floats("slots", slots, "B T S D", size, filled="D", attention=attention)
    with no_autocast(attention):
        attention = at_least_float32(attention)
        from_uniform = (attention * ((attention + EPSILON).log() + log(size["N"]))).sum(3).mean(1)
        picks = redundant_slots(from_uniform, slots[:, -1], num_picked=num_picked)
        # NaN among the slots must give NaN, not a similarity
        clean = 1 + (slots.detach() * 0).sum(dtype=from_uniform.dtype)
        return clean * from_uniform.gather(1, picks).sum() / max(picks.numel(), 1)


@torch.no_grad()
def redundant_slots(divergence: Tensor, slots: Tensor, *, num_picked: int) -> Tensor:
    """Pick the redundant slots (B, S, D) of every clip, in order: (B, min(num_picked, S - 1)), int64.

    >>> slots = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]])
    >>> redundant_slots(torch.tensor([[3.0, 1.0, 2.0]]), slots, num_picked=5).tolist()
    [[1, 2]]
    """
    num_clips, num_slots, _ = slots.shape
    units, _ = directions(at_least_float32(slots))
    earlier, later = torch.triu_indices(num_slots, num_slots, 1, device=slots.device)
    similarity = (units @ units.mT)[:, earlier, later]
    picks = []
    for _ in range(min(num_picked, num_slots - 1)):
        pair = similarity.argmax(1)
        first, second = earlier[pair], later[pair]
        both = divergence.gather(1, torch.stack([first, second], 1))
        pick = torch.where(both[:, 1] < both[:, 0], second, first)
        picks.append(pick)
        gone = (earlier == pick.unsqueeze(1)) | (later == pick.unsqueeze(1))
        similarity = similarity.masked_fill(gone, float("-inf"))
    return torch.stack(picks, 1) if picks else torch.empty(num_clips, 0, dtype=torch.int64, device=slots.device)


class SlotRedundancyLoss(LossModule, check=_check_settings):
    """Module of :func:`slot_redundancy_loss`, with the same shapes and errors: ``forward(attention, slots)``.

    >>> attention = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.75, 0.25]]).view(1, 1, 3, 2)
    >>> slots = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]).view(1, 1, 3, 2)
    >>> round(SlotRedundancyLoss(num_picked=2)(attention, slots).item(), 4)
    0.0654
    """

    def __init__(self, *, num_picked: int = 5) -> None:
        self.remember(locals())

    def forward(self, attention: Tensor, slots: Tensor) -> Tensor:
        """Return the term; see :func:`slot_redundancy_loss`."""
        return slot_redundancy_loss(attention, slots, **self.settings)
