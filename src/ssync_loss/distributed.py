"""The mean of SSync over all ranks. The losses themselves call no collectives."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssync_loss._checks import check_group, check_type, has_ranks
from ssync_loss.ssync.distillation import num_averaged
from ssync_loss.ssync.modules import SSyncLoss


def global_mean(
    criterion: SSyncLoss,
    enc_logits: Tensor,
    dec_logits: Tensor,
    *,
    step: int | None = None,
    valid: Tensor | None = None,
    slot_mask: Tensor | None = None,
    num_frames: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Compute the loss so that data parallelism optimizes the mean over the selected patches of *all* ranks.

    Ranks select different numbers of patches, so the average of their means is not the mean of the whole batch. This
    function multiplies each rank's mean by the rank's share, ``world_size * n_rank / sum n``. Gradients that are
    averaged over ranks (DDP, FSDP) then equal the gradients of one process with the whole batch. The value is this
    rank's part; the average over ranks is the loss of the whole batch::

        loss = loss + global_mean(criterion, enc_logits, dec_logits)  # instead of criterion(...)

    The function calls one all-reduce of two integers, and none before ``start_step``. Without an initialized process
    group it returns ``criterion(...)``. All ranks must call it at the same step.

    Shape: As :class:`SSyncLoss`; returns a scalar.

    This rank's maps, ``step``, ``valid``, ``slot_mask`` and ``num_frames`` are as in ``SSyncLoss.forward``. ``group``
    is a process group; None is the default group.

    Raises: TypeError, ValueError as the loss; TypeError if ``criterion`` is no SSyncLoss, or ``group`` no process group
        of this rank.
    Source: the global mean of Moon & Heo, ECCV 2026 (arXiv:2606.15527), over all selected patches and slots.

    >>> sharp = torch.tensor([[2.0, 2.0, 0.0], [0.0, 0.0, 2.0]]).view(1, 1, 2, 1, 3)
    >>> blurred = torch.zeros(1, 1, 2, 1, 3, requires_grad=True)
    >>> global_mean(SSyncLoss(interior_weight=0.0), sharp, blurred).item()
    0.25
    """
    # torch wraps a compiled module
    check_type("criterion", getattr(criterion, "_orig_mod", criterion), SSyncLoss)
    check_group("group", group)
    given: dict[str, Any] = {"step": step, "valid": valid, "slot_mask": slot_mask, "num_frames": num_frames}
    if not has_ranks() or not criterion.is_on(step):
        return criterion(enc_logits, dec_logits, **given)
    terms = criterion.terms(enc_logits, dec_logits, **given)
    selected = torch.stack([terms.labels.boundary, terms.labels.interior]).sum((2, 3, 4))
    local = num_averaged(selected, terms.labels.representative.shape[1], slot_mask, criterion.criterion)
    everywhere = local.clone()
    dist.all_reduce(everywhere, group=group)
    # divide in the loss's type: integers would give float32
    share = local.to(terms.total.dtype) / everywhere.clamp_min(1) * dist.get_world_size(group)
    return criterion.weigh(terms.boundary * share[0], terms.interior * share[1], step)
