"""The table behind every metric: the number of pixels that each object shares with each slot."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ssync_loss._checks import check_choice, check_int, check_same_device, check_shape
from ssync_loss._inputs import check_labels

Per = Literal["video", "image"]

# full tables and id ranges up to this size cost less than sorting
_SMALL = 2**16


class Contingency(NamedTuple):
    """Pixel counts of the (object, slot) pairs that share a pixel, by unit: a video or a frame.

    Pairs that share no pixel are not stored, so ids may be many and large.
    """

    num_units: int
    shared: Tensor
    pair_object: Tensor
    pair_slot: Tensor
    object_area: Tensor
    object_unit: Tensor
    object_id: Tensor
    slot_area: Tensor
    slot_unit: Tensor

    def per_unit(self, values: Tensor, unit: Tensor) -> Tensor:
        return _sum_by(values, unit, self.num_units)

    def per_object(self, values: Tensor) -> Tensor:
        return _sum_by(values, self.pair_object, len(self.object_area))

    def union(self) -> Tensor:
        return self.object_area[self.pair_object] + self.slot_area[self.pair_slot] - self.shared

    def is_object(self, background: int | None) -> Tensor:
        if background is None:
            return torch.ones_like(self.object_id, dtype=torch.bool)
        return self.object_id != background


def contingency(pred: Tensor, target: Tensor, keep: Tensor, per: Per) -> Contingency:
    """Count the pixels in ``keep`` by (unit, object, slot); all inputs are (B, T, H, W)."""
    num_units = len(pred) if per == "video" else len(pred) * pred.shape[1]
    slot_code, slot_names = _encode(pred[keep])
    object_code, object_names = _encode(target[keep])
    num_slots, num_objects = len(slot_names), len(object_names)

    row = unit_index(pred, per)[keep] * num_objects + object_code
    pair, shared = _tally(row * num_slots + slot_code, num_units * num_objects * num_slots)

    # pairs are sorted by (unit, object, slot), so the objects of a unit are adjacent
    rows, pair_object = torch.unique_consecutive(pair // max(num_slots, 1), return_inverse=True)
    object_unit = rows // max(num_objects, 1)
    columns = object_unit[pair_object] * num_slots + pair % max(num_slots, 1)
    columns, pair_slot = torch.unique(columns, return_inverse=True)
    return Contingency(
        num_units=num_units,
        shared=shared,
        pair_object=pair_object,
        pair_slot=pair_slot,
        object_area=_sum_by(shared, pair_object, len(rows)),
        object_unit=object_unit,
        object_id=object_names[rows % max(num_objects, 1)],
        slot_area=_sum_by(shared, pair_slot, len(columns)),
        slot_unit=columns // max(num_slots, 1),
    )


def unit_index(labels: Tensor, per: Per) -> Tensor:
    """Return the index of the unit of every pixel of (B, T, H, W) labels."""
    batch, frames = len(labels), 1 if per == "video" else labels.shape[1]
    return torch.arange(batch * frames, device=labels.device).view(batch, frames, 1, 1).expand(labels.shape)


def check_unit(
    pred: Tensor, target: Tensor, background: object, per: object = "video"
) -> tuple[Tensor, Tensor, Tensor]:
    """Check labels and unit; return both labels as int64, and the annotated pixels."""
    sizes = check_labels("pred", pred, "B T H W", {})
    check_shape("target", target, "B T H W", **sizes)
    check_same_device("pred", pred, target=target)
    check_choice("per", per, ("video", "image"))
    ids, annotated = check_target(target, background)
    check_data("pred", pred)
    return pred.to(torch.int64), ids, annotated


def check_target(target: Tensor, background: object) -> tuple[Tensor, Tensor]:
    """Check a ground truth and the id of its background; return the ids as int64, and the annotated pixels."""
    check_labels("target", target, "B T H W", {})
    if background is not None:
        check_int("background", background, 0)
    ids = target.to(torch.int64)
    # the largest unsigned ids become negative in int64, but are annotated
    annotated = ids >= 0 if target.dtype.is_signed else torch.ones_like(ids, dtype=torch.bool)
    return ids, annotated


def check_data(name: str, tensor: Tensor) -> None:
    """Require a tensor with numbers, which metrics read on the host."""
    # a fake tensor has a real device, but a meta storage
    if tensor.is_meta or (type(tensor) is not Tensor and tensor.untyped_storage().device.type == "meta"):
        raise ValueError(f"`{name}` must hold numbers, which are read here; got a meta or fake tensor.")


def _encode(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Replace ids by codes 0, 1, ... such that ``names[codes] == ids``."""
    if ids.numel() == 0:
        return ids, ids
    low, high = (int(bound) for bound in ids.aminmax())
    if high - low < _SMALL:
        return ids - low, torch.arange(low, high + 1, device=ids.device)
    names, codes = torch.unique(ids, return_inverse=True)
    return codes, names


def _tally(keys: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Return the distinct keys in ascending order, and their counts in float64."""
    if num_keys <= max(keys.numel(), _SMALL):
        table = torch.bincount(keys, minlength=num_keys)
        present = table.nonzero().squeeze(1)
        counts = table[present]
    else:
        present, counts = torch.unique(keys, return_counts=True)
    return present, counts.to(torch.float64)


def _sum_by(values: Tensor, index: Tensor, size: int) -> Tensor:
    total = torch.zeros(size, dtype=torch.float64, device=values.device)
    return total.index_add_(0, index, values.to(torch.float64))
