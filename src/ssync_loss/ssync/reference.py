"""SSync in loops: one clip, one frame, one slot, one neighbor at a time.

This module defines the values of the library, for tests and for readers. It shares only the result type with the other
engines, so that they cannot share a mistake. Maps are logits ``(B, T, S, H, W)`` on one grid. float64 maps are computed
in float64, all others in float32.

Source: Moon & Heo, Selective Synergistic Learning, ECCV 2026 (arXiv 2606.15527).
"""

import math
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ssync_loss._checks import check_bool, check_choice, check_floating, check_integer, check_number, check_shape
from ssync_loss.ssync.types import PseudoLabels

# eight neighbors in the frame, and the same place one frame before and after
NEIGHBORS = (
    *((0, dh, dw) for dh, dw in product((-1, 0, 1), repeat=2) if (dh, dw) != (0, 0)),
    (-1, 0, 0),
    (1, 0, 0),
)

# the log-probability of a slot at -inf, in the cross-entropy
LOG_TINY = math.log(torch.finfo(torch.float32).tiny)


class UnionFind:
    """Disjoint sets over the integers 0 … size - 1, with path compression.

    Raises: nothing of its own; items are not checked.

    >>> sets = UnionFind(5)
    >>> sets.union(3, 1)
    >>> sets.union(3, 4)
    >>> sets.groups()
    [[0], [1, 3, 4], [2]]
    >>> sets.find(4) == sets.find(1)
    True
    """

    def __init__(self, size: int) -> None:
        self.parent = list(range(size))

    def find(self, item: int) -> int:
        """Return the root of the set of ``item``, and make it the parent of all items on the way."""
        root = item
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[item] != root:
            above = self.parent[item]
            self.parent[item] = root
            item = above
        return root

    def union(self, first: int, second: int) -> None:
        """Join the sets of two items."""
        self.parent[self.find(first)] = self.find(second)

    def groups(self) -> list[list[int]]:
        """Return every set as a sorted list, ordered by lowest member."""
        members: dict[int, list[int]] = {}
        for item in range(len(self.parent)):
            members.setdefault(self.find(item), []).append(item)
        return list(members.values())


class ReferenceSSync(NamedTuple):
    """Both unweighted losses and their labels.

    Attributes:
        boundary, interior: scalars.
        labels: the merged labels and the regions behind them.

    Raises: nothing; fields are not checked.

    >>> terms = reference_ssync(torch.eye(2).view(1, 1, 2, 1, 2), torch.zeros(1, 1, 2, 1, 2))
    >>> terms.boundary.item(), terms.labels.boundary.sum().item()  # (1/2 - 1)^2 on both patches
    (0.25, 2)
    """

    boundary: Tensor
    interior: Tensor
    labels: PseudoLabels


def reference_hard_labels(logits: Tensor, *, valid: Tensor | None = None, slot_mask: Tensor | None = None) -> Tensor:
    """Label every patch with its strongest present slot, the lowest index on ties.

    ``label[b, t, h, w] = argmax_s logits[b, t, s, h, w]``. Invalid patches get 0. A patch whose logits hold
    NaN gets some present slot.

    Shape: logits: (B, T, S, H, W), valid: (B, T) or (B, T, H, W), slot_mask: (B, S). Returns (B, T, H, W), int64.

    Raises: TypeError, ValueError if a dtype or shape does not fit.

    >>> reference_hard_labels(torch.tensor([1.0, 3.0, 3.0]).view(1, 1, 3, 1, 1)).item()
    1
    """
    cells, present = _valid_and_present(_map_size("logits", logits), valid, slot_mask)
    scores = logits.movedim(2, -1).tolist()
    labels = torch.zeros(cells.shape, dtype=torch.int64)
    for b, t, h, w in cells.nonzero().tolist():
        # max returns the first of equals
        labels[b, t, h, w] = max(present[b], key=scores[b][t][h][w].__getitem__)
    return labels.to(logits.device)


def reference_slot_overlap(logits: Tensor, *, valid: Tensor | None = None, slot_mask: Tensor | None = None) -> Tensor:
    """Measure the overlap of every two slots: the IoU of their active patches.

    A slot is active on a patch if its logit exceeds, strictly, the slot's mean over the clip. The overlap is the mean
    over frames of ``IoU(i, j) = |A_i and A_j| / |A_i or A_j|`` (0 if neither is active). No slot is active on an
    invalid patch, and the means leave it out. Frames without a valid patch do not count. Absent slots and clips without
    a valid patch have overlap 0. The diagonal is the share of frames in which the slot is active.

    Shape: logits: (B, T, S, H, W), valid: (B, T) or (B, T, H, W), slot_mask: (B, S). Returns (B, S, S), float32 or
        wider.

    Raises: TypeError, ValueError if a dtype or shape does not fit.

    >>> logits = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).view(1, 1, 2, 1, 4)
    >>> reference_slot_overlap(logits).tolist()
    [[[1.0, 0.5], [0.5, 1.0]]]
    """
    size = _map_size("logits", logits)
    cells, present = _valid_and_present(size, valid, slot_mask)
    device, logits = logits.device, _wide(logits.detach()).cpu()
    overlap = torch.zeros(size["B"], size["S"], size["S"], dtype=logits.dtype)
    for b, slots in enumerate(present):
        frames = [t for t in range(size["T"]) if cells[b, t].any()]
        if not frames:
            continue
        # active[s][t] is the set of places (h, w) where slot s is active in frame t
        active = {s: _active_places(logits[b, :, s], cells[b]) for s in slots}
        for i, j in product(slots, repeat=2):
            per_frame = [_iou(active[i][t], active[j][t]) for t in frames]
            overlap[b, i, j] = torch.tensor(per_frame, dtype=logits.dtype).sum() / len(frames)
    return overlap.to(device)


def _active_places(slot_logits: Tensor, cells: Tensor) -> list[set[tuple[int, int]]]:
    """Return the active places of every frame: a slot's logits (T, H, W) exceed their mean over valid patches."""
    values = slot_logits[cells]
    mean = values.sum() / values.numel()
    active: list[set[tuple[int, int]]] = [set() for _ in range(len(slot_logits))]
    for t, h, w in ((slot_logits > mean) & cells).nonzero().tolist():
        active[t].add((h, w))
    return active


def _iou(first: set[tuple[int, int]], second: set[tuple[int, int]]) -> float:
    union = first | second
    return len(first & second) / len(union) if union else 0.0


def reference_merge_slots(overlap: Tensor, area: Tensor, *, threshold: float | None) -> Tensor:
    """Return the representative of every slot.

    Slots i ≠ j are linked when ``overlap[b, i, j] > threshold``, strictly and in the precision of ``overlap``. The
    connected components of that graph are the groups. The representative of a group is its member with the largest
    area, or the lowest index on ties. ``threshold=None`` links nothing.

    Shape: overlap: (B, S, S), area: (B, S). Returns (B, S), int64.

    Args: as :func:`ssync_loss.functional.merge_slots`; the diagonal of the overlap is not read.

    Raises: TypeError, ValueError if a shape or the dtype of the overlap does not fit. The threshold is not checked.

    >>> chain = torch.tensor([[[1.0, 0.8, 0.0], [0.8, 1.0, 0.7], [0.0, 0.7, 1.0]]])
    >>> reference_merge_slots(chain, torch.tensor([[4, 9, 9]]), threshold=0.6).tolist()
    [[1, 1, 1]]
    >>> reference_merge_slots(chain, torch.tensor([[4, 9, 9]]), threshold=0.7).tolist()
    [[1, 1, 2]]
    """
    size = check_shape("area", area, "B S")
    check_shape("overlap", overlap, "B S S", **size)
    check_floating("overlap", overlap)
    overlap = _wide(overlap)
    # 0.6 in float32 lies above 0.6 in float64, yet an overlap of 0.6 must not exceed that threshold
    limit = torch.tensor(math.inf if threshold is None else threshold, dtype=overlap.dtype).item()
    representative = []
    for links, areas in zip(overlap.tolist(), area.tolist(), strict=True):
        sets = UnionFind(size["S"])
        for i, j in product(range(size["S"]), repeat=2):
            if i != j and links[i][j] > limit:
                sets.union(i, j)
        names = list(range(size["S"]))
        for group in sets.groups():
            # the group is sorted and max returns the first of equals
            largest = max(group, key=areas.__getitem__)
            for s in group:
                names[s] = largest
        representative.append(names)
    return torch.tensor(representative, dtype=torch.int64, device=overlap.device).view(size["B"], size["S"])


def reference_neighbor_difference(labels: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Count, for every patch, those of its ten neighbors that have another label.

    Eight neighbors surround the patch in its frame; two are at the same place one frame earlier and later. Coordinates
    outside the clip are clamped into it. An invalid patch has count 0, and an invalid neighbor never differs.

    Shape: labels: (B, T, H, W), integer, valid: (B, T) or (B, T, H, W). Returns (B, T, H, W), uint8, in [0, 10].

    Raises: TypeError, ValueError if a dtype or shape does not fit.

    >>> reference_neighbor_difference(torch.tensor([[[[0, 0, 1]]]])).tolist()
    [[[[0, 3, 3]]]]
    """
    return _count_differing(labels, valid)[0].to(torch.uint8)


def _count_differing(labels: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the counts of all patches, and which patches are valid."""
    size = check_shape("labels", labels, "B T H W")
    check_integer("labels", labels)
    valid = _valid_cells(valid, size)
    known, label = valid.tolist(), labels.tolist()
    different = torch.zeros(labels.shape, dtype=torch.int64)
    for b, t, h, w in valid.nonzero().tolist():
        count = 0
        for dt, dh, dw in NEIGHBORS:
            tn, hn, wn = (min(max(i, 0), size[axis] - 1) for axis, i in (("T", t + dt), ("H", h + dh), ("W", w + dw)))
            count += known[b][tn][hn][wn] and label[b][tn][hn][wn] != label[b][t][h][w]
        different[b, t, h, w] = count
    return different.to(labels.device), valid.to(labels.device)


def reference_boundary_region(
    labels: Tensor, *, min_different: int = 1, min_same: int = 1, valid: Tensor | None = None
) -> Tensor:
    """Select the valid patches on boundaries.

    ``different >= min_different and 10 - different >= min_same`` with the count of
    :func:`reference_neighbor_difference`.

    Shape: labels: (B, T, H, W), integer, valid: (B, T) or (B, T, H, W). Returns (B, T, H, W), bool.

    Raises: TypeError, ValueError if a dtype or shape does not fit. Settings are not checked.

    >>> reference_boundary_region(torch.tensor([[[[0, 0, 1]]]])).tolist()
    [[[[False, True, True]]]]
    """
    different, cells = _count_differing(labels, valid)
    return (different >= min_different) & (different <= 10 - min_same) & cells


def reference_interior_region(labels: Tensor, *, max_different: int = 0, valid: Tensor | None = None) -> Tensor:
    """Select the valid patches inside objects.

    ``different <= max_different`` with the count of :func:`reference_neighbor_difference`.

    Shape: labels: (B, T, H, W), integer, valid: (B, T) or (B, T, H, W). Returns (B, T, H, W), bool.

    Raises: TypeError, ValueError if a dtype or shape does not fit. Settings are not checked.

    >>> reference_interior_region(torch.tensor([[[[0, 0, 1]]]])).tolist()
    [[[[True, False, False]]]]
    """
    different, cells = _count_differing(labels, valid)
    return (different <= max_different) & cells


def reference_pseudo_labels(
    enc_logits: Tensor,
    dec_logits: Tensor,
    *,
    merge_threshold: float | None = 0.6,
    min_different: int = 1,
    min_same: int = 1,
    max_different: int = 0,
    valid: Tensor | None = None,
    slot_mask: Tensor | None = None,
) -> PseudoLabels:
    """Turn two maps into merged hard labels and the regions where each map teaches the other.

    Slots are merged by their overlap in the encoder's map; areas are counted in its labels before merging. The boundary
    region comes from the encoder's merged labels, the interior region from the decoder's. Invalid patches have label 0
    and lie in no region. A clip without a present slot is invalid throughout. An absent slot represents itself.

    Shape: enc_logits, dec_logits: (B, T, S, H, W), valid: (B, T) or (B, T, H, W), slot_mask: (B, S). Returns labels and
        regions (B, T, H, W) and the representatives (B, S).

    Args: as :func:`ssync_loss.functional.pseudo_labels`.

    Raises: TypeError, ValueError if a dtype or shape does not fit. Settings are not checked.

    >>> logits = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 3.0]]).view(1, 1, 2, 1, 3)
    >>> labels = reference_pseudo_labels(logits, logits)
    >>> labels.enc_labels.tolist(), labels.boundary.tolist(), labels.interior.tolist()
    ([[[[0, 1, 1]]]], [[[[True, True, False]]]], [[[[False, False, True]]]])
    """
    size = _map_size("enc_logits", enc_logits)
    _map_size("dec_logits", dec_logits, **size)
    cells, _ = _valid_and_present(size, valid, slot_mask)
    enc_labels = reference_hard_labels(enc_logits, valid=cells, slot_mask=slot_mask)
    dec_labels = reference_hard_labels(dec_logits, valid=cells, slot_mask=slot_mask)
    overlap = reference_slot_overlap(enc_logits, valid=cells, slot_mask=slot_mask)
    area = torch.zeros(size["B"], size["S"], dtype=torch.int64)
    for b, t, h, w in cells.nonzero().tolist():
        area[b, enc_labels[b, t, h, w]] += 1
    representative = reference_merge_slots(overlap, area, threshold=merge_threshold)
    for b, t, h, w in cells.nonzero().tolist():
        enc_labels[b, t, h, w] = representative[b, enc_labels[b, t, h, w]]
        dec_labels[b, t, h, w] = representative[b, dec_labels[b, t, h, w]]

    return PseudoLabels(
        enc_labels=enc_labels,
        dec_labels=dec_labels,
        boundary=reference_boundary_region(enc_labels, min_different=min_different, min_same=min_same, valid=cells),
        interior=reference_interior_region(dec_labels, max_different=max_different, valid=cells),
        representative=representative,
    )


def reference_selective_distillation_loss(
    logits: Tensor,
    target: Tensor,
    region: Tensor,
    *,
    criterion: str = "mse",
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    slot_mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compare a map with hard labels in a region, in the textbook form and differentiable by autograd.

    With ``P = softmax(logits / temperature)`` over the S_b present slots of a clip and ``q`` the one-hot of the target,
    the value of a selected patch is ``(1 / S_b) Σ_s (P_s - q_s)²`` for "mse" and ``-Σ_s q_s log P_s`` for
    "cross_entropy". Smoothing makes ``q = (1 - ε) onehot + ε / S_b``. The reduction "none" gives these values, 0 where
    unselected, and "sum" their sum. With M_b selected patches in a clip, "mean" divides the sum of squares over patches
    and slots by ``Σ_b M_b S_b``, and the cross-entropy by ``Σ_b M_b``.

    If nothing is selected, the loss is exactly 0, attached to the graph. A clip without a present slot has no selected
    patch. Unselected patches and absent slots may hold anything and have gradient 0. A patch with all present slots at
    -inf has uniform P and gradient 0. Any other slot at -inf has probability 0 and gradient 0; the cross-entropy takes
    log(finfo(float32).tiny) as its log-probability. NaN or +inf in a selected patch makes the patch's value NaN.

    The loss is computed in float64 and returned in float32 (float64 for float64 logits).

    Shape: logits: (B, T, S, H, W), target: (B, T, H, W), integer, region: (B, T, H, W), bool, slot_mask: (B, S).
        Returns a scalar, or (B, T, H, W) for "none".

    Args: as :func:`ssync_loss.functional.selective_distillation_loss`.

    Raises:
        ValueError: for an unknown name, for smoothing with "mse", or for a selected target that is not a
        present slot.

    >>> logits, target = torch.zeros(1, 1, 2, 1, 3), torch.zeros(1, 1, 1, 3, dtype=torch.int64)
    >>> region = torch.tensor([[[[True, True, False]]]])
    >>> reference_selective_distillation_loss(logits, target, region, reduction="none").tolist()
    [[[[0.25, 0.25, 0.0]]]]
    """
    size = _map_size("logits", logits)
    check_shape("target", target, "B T H W", **size)
    check_integer("target", target)
    check_shape("region", region, "B T H W", **size)
    check_bool("region", region)
    check_choice("criterion", criterion, ("mse", "cross_entropy"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_number("label_smoothing", label_smoothing, 0.0, 1.0)
    check_number("temperature", temperature, 0.0, open_low=True)
    if criterion == "mse" and label_smoothing > 0:
        raise ValueError(f"`label_smoothing` needs criterion='cross_entropy'; got {label_smoothing} with 'mse'.")

    # the sum of no elements: 0 for any logits, and attached to the graph
    zero = logits.flatten()[:0].sum().double()
    total, divisor, clips = zero, 0, []
    for b, slots in enumerate(_present_slots(slot_mask, size)):
        chosen = region[b] if slots else torch.zeros_like(region[b])
        # (patches, present slots)
        rows = logits[b].movedim(1, -1)[chosen][:, slots].double()
        onehot = _one_hot(target[b][chosen], slots).to(rows)
        never = rows == -math.inf
        undecided = never.all(dim=1, keepdim=True)
        scores = torch.where(undecided, 0.0, rows) / temperature
        if criterion == "mse":
            weight = max(len(slots), 1)
            values = (torch.softmax(scores, dim=1) - onehot).square().sum(dim=1)
        else:
            smooth = (1 - label_smoothing) * onehot + label_smoothing / max(len(slots), 1)
            logs = torch.where(never & ~undecided, LOG_TINY, torch.log_softmax(scores, dim=1))
            weight = 1
            values = -(smooth * logs).sum(dim=1)
        total, divisor = total + values.sum(), divisor + weight * values.numel()
        clips.append(zero.expand(chosen.shape).masked_scatter(chosen, values / weight))

    if reduction == "mean":
        result = total / max(divisor, 1)
    else:
        result = torch.stack(clips) if clips else zero.expand(region.shape)
        result = result.sum() if reduction == "sum" else result
    return result.to(torch.promote_types(logits.dtype, torch.float32))


def _one_hot(target: Tensor, slots: list[int]) -> Tensor:
    """Return one row per target; its columns are the present slots."""
    for label in target.tolist():
        if label not in slots:
            raise ValueError(f"`target` must name a present slot, one of {slots}; got {label}.")
    return target.long()[:, None] == torch.tensor(slots, dtype=torch.int64, device=target.device)


def reference_ssync(
    enc_logits: Tensor,
    dec_logits: Tensor,
    *,
    merge_threshold: float | None = 0.6,
    min_different: int = 1,
    min_same: int = 1,
    max_different: int = 0,
    criterion: str = "mse",
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    valid: Tensor | None = None,
    slot_mask: Tensor | None = None,
) -> ReferenceSSync:
    """Compute both losses of SSync from two maps.

    Boundary refinement compares the decoder's map with the encoder's merged labels in the boundary region. Interior
    denoising compares the encoder's map with the decoder's merged labels in the interior region. NaN or +inf in a valid
    patch of a present slot of either map makes both losses NaN.

    Shape: enc_logits, dec_logits: (B, T, S, H, W), valid: (B, T) or (B, T, H, W), slot_mask: (B, S). Returns two
        scalars and the labels.

    Args: as :class:`ssync_loss.SSyncLoss`.

    Raises: as :func:`reference_pseudo_labels` and :func:`reference_selective_distillation_loss`.

    >>> enc = torch.tensor([[9.0, 0.0], [0.0, 9.0]]).view(1, 1, 2, 1, 2)
    >>> terms = reference_ssync(enc, torch.zeros_like(enc))
    >>> terms.boundary.item(), round(terms.interior.item(), 4)
    (0.25, 0.4999)
    """
    labels = reference_pseudo_labels(
        enc_logits,
        dec_logits,
        merge_threshold=merge_threshold,
        min_different=min_different,
        min_same=min_same,
        max_different=max_different,
        valid=valid,
        slot_mask=slot_mask,
    )
    distill = partial(
        reference_selective_distillation_loss,
        criterion=criterion,
        label_smoothing=label_smoothing,
        temperature=temperature,
        slot_mask=slot_mask,
    )
    boundary = distill(dec_logits, labels.enc_labels, labels.boundary)
    interior = distill(enc_logits, labels.dec_labels, labels.interior)
    cells, present = _valid_and_present(_map_size("enc_logits", enc_logits), valid, slot_mask)
    for b, slots in enumerate(present):
        values = torch.cat([one[b].movedim(1, -1)[cells[b]][:, slots] for one in (enc_logits, dec_logits)])
        if (values.isnan() | (values == math.inf)).any():
            boundary, interior = boundary * math.nan, interior * math.nan
    return ReferenceSSync(boundary, interior, labels)


def _map_size(name: str, logits: Tensor, **sizes: int) -> dict[str, int]:
    size = check_shape(name, logits, "B T S H W", **sizes)
    check_floating(name, logits)
    return size


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _valid_cells(valid: Tensor | None, size: dict[str, int]) -> Tensor:
    """Return ``valid`` as (B, T, H, W) on the CPU; None is valid everywhere."""
    shape = tuple(size[axis] for axis in "BTHW")
    if valid is None:
        return torch.ones(shape, dtype=torch.bool)
    check_bool("valid", valid)
    check_shape("valid", valid, "B T" if valid.ndim == 2 else "B T H W", **size)
    valid = valid[:, :, None, None] if valid.ndim == 2 else valid
    return valid.cpu().expand(shape)


def _valid_and_present(
    size: dict[str, int], valid: Tensor | None, slot_mask: Tensor | None
) -> tuple[Tensor, list[list[int]]]:
    """Return the valid patches and the present slots of every clip; without a present slot no patch is valid."""
    present = _present_slots(slot_mask, size)
    has_slots = torch.tensor([bool(slots) for slots in present], dtype=torch.bool)
    return _valid_cells(valid, size) & has_slots[:, None, None, None], present


def _present_slots(slot_mask: Tensor | None, size: dict[str, int]) -> list[list[int]]:
    """Return the present slots of every clip; None is all of them."""
    if slot_mask is None:
        return [list(range(size["S"])) for _ in range(size["B"])]
    check_shape("slot_mask", slot_mask, "B S", **size)
    check_bool("slot_mask", slot_mask)
    return [[s for s, present in enumerate(mask) if present] for mask in slot_mask.tolist()]
