"""Object recall, fragmentation and unused slots."""

from typing import Literal

import torch
from torch import Tensor

from ssync_loss._checks import as_index, check_choice, check_int, check_label_range, check_shape
from ssync_loss.metrics._contingency import Contingency, Per, check_data, check_unit, contingency, unit_index
from ssync_loss.metrics._scores import Scores, averaged

Over = Literal["all", "found"]


@averaged(empty=0.0)
def object_recall(pred: Tensor, target: Tensor, *, background: int | None) -> Scores:
    """Share of objects, frame by frame, that some slot overlaps with an IoU above one half.

    As code, over the objects of all frames of a video, with ``iou`` (objects, slots of the frame)::

        recall = (iou > 0.5).any(1).mean()

    An object counts once in every frame that shows it. Arguments, results and errors are as in
    :func:`mean_best_overlap`.

    Source: W. Moon and J.-P. Heo, Selective synergistic learning, 2026.

    >>> target = torch.tensor([[[[0, 1, 1, 2, 2, 2]]]])
    >>> pred = torch.tensor([[[[5, 5, 6, 7, 7, 8]]]])  # object 1: IoU 1/3 and 1/2, object 2: 2/3 and 1/3
    >>> object_recall(pred, target, background=0).tolist()
    [0.5]
    """
    table = contingency(*check_unit(pred, target, background), "image")
    hits = table.per_object(2 * table.shared > table.union())
    return _over_objects(hits > 0, table.is_object(background), table, pred)


@averaged(empty=0.0)
def fragmentation(pred: Tensor, target: Tensor, *, background: int | None, over: Over = "all") -> Scores:
    """Mean over objects of the number of slots that lie mostly inside the object, frame by frame.

    A slot belongs to an object if more than half of the slot's area lies inside the object. As code, over the objects
    of all frames of a video, with ``shared`` (objects, slots of the frame)::

        pieces = (shared > 0.5 * slot_area).sum(1)
        fragmentation = pieces.mean()                    # over="all"
        fragmentation = pieces[pieces > 0].mean()        # over="found"

    1.0 means one slot for each object. Objects without a slot lower the mean over all objects, which hides split
    objects. ``over="found"`` leaves out objects without a slot, so its mean is at least 1. Other arguments, results and
    errors are as in :func:`mean_best_overlap`.

    Source: W. Moon and J.-P. Heo, Selective synergistic learning, 2026.

    >>> target = torch.tensor([[[[0, 1, 1, 1, 2, 0]]]])
    >>> pred = torch.tensor([[[[5, 5, 6, 7, 8, 8]]]])  # 6 and 7 lie in object 1; 5 and 8 only by half
    >>> fragmentation(pred, target, background=0).tolist()
    [1.0]
    >>> fragmentation(pred, target, background=0, over="found").tolist()
    [2.0]
    """
    check_choice("over", over, ("all", "found"))
    table = contingency(*check_unit(pred, target, background), "image")
    pieces = table.per_object(2 * table.shared > table.slot_area[table.pair_slot])
    counted = table.is_object(background)
    if over == "found":
        counted = counted & (pieces > 0)
    return _over_objects(pieces, counted, table, pred)


@averaged(empty=0.0)
def unused_slots(pred: Tensor, *, num_slots: int, per: Per = "video") -> Scores:
    """Share of the slots that win no patch.

    As code, with ``area`` (S,) the patches of each slot in a video or frame::

        unused = (area == 0).mean()

    The function needs no ground truth: a slot on the background is in use.

    Shape: pred: (B, T, H, W), slot labels within [0, num_slots). Returns (B,), float64, within [0, 1].

    ``num_slots`` is the model's number of slots. With ``per="video"`` a slot is unused if no frame of the video uses
    it. "image" counts in each frame and returns the mean over frames.

    Raises: TypeError if labels or ``num_slots`` are not integers; ValueError if the rank differs, a label is out of
        range, ``num_slots`` is below 1 or ``per`` is unknown.

    >>> pred = torch.tensor([[[[0, 0]], [[0, 3]]]])
    >>> unused_slots(pred, num_slots=4).tolist(), unused_slots(pred, num_slots=4, per="image").tolist()
    ([0.5], [0.625])
    """
    batch, frames, _, _ = check_shape("pred", pred, "B T H W").values()
    check_int("num_slots", num_slots, 1)
    check_choice("per", per, ("video", "image"))
    labels = as_index("pred", pred)
    check_data("pred", pred)
    if labels.numel() > 0:
        # the check reads two numbers from an accelerator, not all labels
        check_label_range("pred", torch.stack(labels.aminmax()).cpu(), num_slots)
    slot = unit_index(labels, per) * num_slots + labels
    per_video = num_slots if per == "video" else frames * num_slots
    area = torch.bincount(slot.flatten(), minlength=batch * per_video)
    unused = (area == 0).to(torch.float64).view(batch, per_video).sum(1)
    return Scores(unused, torch.full_like(unused, per_video), "slots")


def _over_objects(value: Tensor, counted: Tensor, table: Contingency, pred: Tensor) -> Scores:
    total, count = (
        table.per_unit(one, table.object_unit).view(pred.shape[:2]).sum(1)
        for one in (torch.where(counted, value, 0), counted)
    )
    return Scores(total, count, "objects in frames")
