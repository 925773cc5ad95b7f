"""The overlap of slots, and the merging of slots that overlap."""

import torch
from torch import Tensor

from ssync_loss._autocast import at_least_float32, no_autocast
from ssync_loss._checks import (
    FLOATS,
    INTEGERS,
    as_index,
    check_floating,
    check_not_empty,
    check_same_device,
    check_shape,
)
from ssync_loss.ssync.maps import check_slot_mask, check_valid
from ssync_loss.ssync.settings import check_scalar


def slot_overlap(logits: Tensor, *, valid: Tensor | None = None, slot_mask: Tensor | None = None) -> Tensor:
    """Measure the overlap of every two slots: the IoU of their active patches.

    A slot is active where its logit exceeds the slot's mean over the clip, ``A = logits > mean``. The overlap is the
    mean over frames of ``IoU[i, j] = |A_i and A_j| / |A_i or A_j|`` (0 where the union is empty). No slot is active on
    an invalid patch, and the means leave it out. Frames without valid patches do not count. An absent slot has overlap
    0. No gradient flows.

    The rule is meant for logits: log-probabilities have another shift at every patch, which changes the overlap.

    Shape: logits: (B, T, S, H, W). valid: (B, T) or (B, T, H, W) bool. slot_mask: (B, S) bool. Returns (B, S, S) within
        [0, 1], symmetric; the diagonal is the share of frames a slot is active in.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), spatio-temporal activation consistency.
    Raises: TypeError, ValueError on a wrong dtype or shape.

    >>> logits = torch.tensor([[4.0, 4.0, 0.0, 0.0], [0.0, 6.0, 0.0, 0.0]]).view(1, 1, 2, 1, 4)
    >>> slot_overlap(logits)[0, 0, 1].item()  # one patch in common, two in the union
    0.5
    """
    size = check_shape("logits", logits, "B T S H W")
    check_not_empty("logits", size, "T S H W")
    check_floating("logits", logits)
    valid = check_valid(valid, size, logits=logits)
    check_slot_mask(slot_mask, size, logits=logits)
    with torch.no_grad(), no_autocast(logits):
        return mean_overlap(at_least_float32(logits), valid, slot_mask)


def mean_overlap(logits: Tensor, valid: Tensor | None, slot_mask: Tensor | None) -> Tensor:
    """Compute :func:`slot_overlap` without checks, for float32 or float64."""
    active = logits > slot_mean(logits, valid)
    if valid is not None:
        active = active & valid.unsqueeze(2)
    if slot_mask is not None:
        active = active & slot_mask[:, None, :, None, None]
    # sums of zeros and ones are exact in float32 up to 2^24 patches a frame
    active = active.flatten(3).to(logits.dtype)
    both, area = active @ active.mT, active.sum(3)
    either = area.unsqueeze(3) + area.unsqueeze(2) - both
    iou = both / either.clamp_min(1)
    if valid is None:
        return iou.sum(1) / iou.shape[1]
    num_frames = valid.flatten(2).any(2).sum(1).clamp_min(1)
    return iou.sum(1) / num_frames[:, None, None]


def slot_mean(logits: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean of every slot over the valid patches of a clip, (B, 1, S, 1, 1)."""
    if valid is None:
        return logits.sum((1, 3, 4), keepdim=True) / (logits.shape[1] * logits.shape[3] * logits.shape[4])
    total = torch.where(valid.unsqueeze(2), logits, 0.0).sum((1, 3, 4), keepdim=True)
    return total / valid.sum((1, 2, 3)).clamp_min(1)[:, None, None, None, None]


def merge_slots(overlap: Tensor, area: Tensor, *, threshold: float | Tensor | None) -> Tensor:
    """Merge slots transitively, and return each slot's representative.

    Slots i != j are linked when ``overlap[i, j] > threshold``. The connected components of that graph are the groups:
    links A-B and B-C merge A with C, too. The representative of a group is its member with the largest area, or the
    lowest index among equals. Repeated squaring of a boolean matrix finds the groups. It is batched, has a fixed length
    and reads no value on the host.

    Shape: overlap: (B, S, S). A link in either direction counts. area: (B, S), integer or floating point. Returns (B,
        S) int64: the representative of every slot.

    Args:
        overlap: overlap of every two slots, see :func:`slot_overlap`.
        area: number of patches with the label of each slot; NaN is less than any number.
        threshold: within [0, 1], or a scalar tensor. 1 and None merge nothing.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), transitive pseudo-label merging.
    Raises: TypeError if the threshold is no number, or a tensor of the wrong dtype; ValueError if the threshold lies
        outside [0, 1] or a shape does not fit.

    >>> chain = torch.tensor([[[1.0, 0.8, 0.0], [0.8, 1.0, 0.8], [0.0, 0.8, 1.0]]])
    >>> merge_slots(chain, torch.tensor([[3, 5, 5]]), threshold=0.6).tolist()
    [[1, 1, 1]]
    """
    size = check_shape("overlap", overlap, "B S S")
    check_not_empty("overlap", size, "S")
    check_floating("overlap", overlap)
    check_shape("area", area, "B S", **size)
    if area.dtype not in (*FLOATS, *INTEGERS):
        raise TypeError(f"`area` must hold integers or floating-point numbers; got {area.dtype}.")
    check_same_device("area", area, overlap=overlap)
    if threshold is None:
        return unmerged(size["B"], size["S"], overlap.device)
    check_scalar("threshold", threshold, 0.0, 1.0)
    with torch.no_grad(), no_autocast(overlap):
        overlap = at_least_float32(overlap)
        area = area if area.is_floating_point() else as_index("area", area)
        numbers = ~area.isnan()
        # only the order of areas matters: each is replaced by the number of smaller ones
        smaller = (area.unsqueeze(-1) > area.unsqueeze(-2)) | (numbers.unsqueeze(-1) & ~numbers.unsqueeze(-2))
        return representatives(torch.fmax(overlap, overlap.mT), smaller.sum(-1), threshold)


def representatives(overlap: Tensor, area: Tensor, threshold: float | Tensor) -> Tensor:
    """Compute :func:`merge_slots` without checks, for a symmetric overlap and integer areas."""
    num_slots = overlap.shape[-1]
    itself = torch.eye(num_slots, dtype=torch.bool, device=overlap.device)
    linked = (overlap > threshold) | itself
    # a path has at most S - 1 links, and every squaring doubles its length
    for _ in range((int(num_slots) - 1).bit_length()):
        linked = linked.float() @ linked.float() > 0
    return area.unsqueeze(-2).masked_fill(~linked, -1).argmax(-1)


def unmerged(num_clips: int, num_slots: int, device: torch.device) -> Tensor:
    """Return representatives (B, S) where every slot represents itself."""
    return torch.arange(num_slots, device=device).repeat(num_clips, 1)
