"""How slots and objects find each other: objects recalled, objects in pieces, slots without work."""

from typing import Literal

import torch
from torch import Tensor

from ssync_loss._checks import check_choice, check_int, check_integer, check_label_range, check_shape
from ssync_loss.metrics._contingency import (
    Contingency,
    Per,
    check_background,
    check_labels,
    check_per,
    contingency,
    unit_index,
)
from ssync_loss.metrics._scores import Scores

Over = Literal["all", "found"]


def object_recall(pred: Tensor, target: Tensor, *, background: int | None) -> Tensor:
    """Share of objects, frame by frame, that some slot overlaps with an IoU above one half.

    As code, for the objects of all frames of a video together, ``iou`` (objects, slots of that frame)::

        recall = (iou > 0.5).any(1).mean()

    An object counts once in every frame that shows it. Background and pixels without annotation as in
    :func:`mean_best_overlap`.

    Shape:
        pred, target: (B, T, H, W). Returns (B,), float64.

    Args:
        pred: slot labels; any integers, they are only names.
        target: object ids; a negative id is a pixel without annotation, dropped from object and slot.
        background: the id of the background, or None if every id is an object.

    Returns:
        One value in [0, 1] per video; 0.0 for a video without an object.

    Raises:
        TypeError: if labels or ``background`` are not integers.
        ValueError: if shapes differ or ``background`` is negative.

    Source: W. Moon and J.-P. Heo, Selective synergistic learning, 2026.

    >>> target = torch.tensor([[[[0, 1, 1, 2, 2, 2]]]])
    >>> pred = torch.tensor([[[[5, 5, 6, 7, 7, 8]]]])  # object 1: IoU 1/3 and 1/2, object 2: 2/3 and 1/3
    >>> object_recall(pred, target, background=0).tolist()
    [0.5]
    """
    return recall_scores(pred, target, background=background).mean(empty=0.0)


def fragmentation(pred: Tensor, target: Tensor, *, background: int | None, over: Over = "all") -> Tensor:
    """Number of slots, frame by frame, that lie mostly inside an object: the mean over objects.

    A slot belongs to an object if more than half of the slot's own area lies inside. As code, for the
    objects of all frames of a video together, ``shared`` (objects, slots of that frame)::

        pieces = (shared > 0.5 * slot_area).sum(1)
        fragmentation = pieces.mean()                    # over="all"
        fragmentation = pieces[pieces > 0].mean()        # over="found"

    1.0 is one slot for each object. Objects that no slot belongs to pull the mean over all objects down,
    which hides the splitting of others; over the found ones it is never below 1. Background and pixels
    without annotation as in :func:`mean_best_overlap`.

    Shape:
        pred, target: (B, T, H, W). Returns (B,), float64.

    Args:
        pred: slot labels; any integers, they are only names.
        target: object ids; a negative id is a pixel without annotation, dropped from object and slot.
        background: the id of the background, or None if every id is an object.
        over: "all" objects, or the "found" ones: those that at least one slot belongs to.

    Returns:
        One value per video; 0.0 for a video without an object to count.

    Raises:
        TypeError: if labels or ``background`` are not integers.
        ValueError: if shapes differ, ``background`` is negative or ``over`` is unknown.

    Source: W. Moon and J.-P. Heo, Selective synergistic learning, 2026.

    >>> target = torch.tensor([[[[0, 1, 1, 1, 2, 0]]]])
    >>> pred = torch.tensor([[[[5, 5, 6, 7, 8, 8]]]])  # 6 and 7 lie in object 1; 5 and 8 only by half
    >>> fragmentation(pred, target, background=0).tolist()
    [1.0]
    >>> fragmentation(pred, target, background=0, over="found").tolist()
    [2.0]
    """
    return fragmentation_scores(pred, target, background=background, over=over).mean(empty=0.0)


def unused_slots(pred: Tensor, *, num_slots: int, per: Per = "video") -> Tensor:
    """Share of the slots that own no patch.

    As code, with ``area`` (S,) the patches of each slot in a video or frame::

        unused = (area == 0).mean()

    Needs no ground truth: a slot that sits on the background is in use.

    Shape:
        pred: (B, T, H, W). Returns (B,), float64.

    Args:
        pred: slot labels within [0, num_slots).
        num_slots: how many slots the model has.
        per: "video" calls a slot unused if no frame of the video uses it; "image" asks in each frame and
            returns the mean over frames.

    Returns:
        One value in [0, 1] per video.

    Raises:
        TypeError: if labels or ``num_slots`` are not integers.
        ValueError: if the rank differs, a label is out of range, ``num_slots`` is below 1 or ``per`` is
            unknown.

    >>> pred = torch.tensor([[[[0, 0]], [[0, 3]]]])
    >>> unused_slots(pred, num_slots=4).tolist(), unused_slots(pred, num_slots=4, per="image").tolist()
    ([0.5], [0.625])
    """
    return unused_scores(pred, num_slots=num_slots, per=per).mean(empty=0.0)


def recall_scores(pred: Tensor, target: Tensor, *, background: int | None) -> Scores:
    """Return what :func:`object_recall` averages."""
    table = _frame_table(pred, target, background)
    hits = table.per_object(2 * table.shared > table.union())
    return _over_objects(hits > 0, table.is_object(background), table, pred)


def fragmentation_scores(pred: Tensor, target: Tensor, *, background: int | None, over: Over = "all") -> Scores:
    """Return what :func:`fragmentation` averages."""
    check_choice("over", over, ("all", "found"))
    table = _frame_table(pred, target, background)
    pieces = table.per_object(2 * table.shared > table.slot_area[table.pair_slot])
    counted = table.is_object(background)
    if over == "found":
        counted = counted & (pieces > 0)
    return _over_objects(pieces, counted, table, pred)


def unused_scores(pred: Tensor, *, num_slots: int, per: Per = "video") -> Scores:
    """Return what :func:`unused_slots` averages."""
    batch, frames, _, _ = check_shape("pred", pred, "B T H W").values()
    check_integer("pred", pred)
    check_int("num_slots", num_slots, 1)
    check_per(per)
    labels = pred.to(torch.int64)
    if labels.numel() > 0:
        # two numbers instead of the labels, so that the check also reads those on an accelerator
        check_label_range("pred", torch.stack(labels.aminmax()).cpu(), num_slots)
    num_units = batch if per == "video" else batch * frames
    slot = unit_index(labels, per) * num_slots + labels
    area = torch.bincount(slot.flatten(), minlength=num_units * num_slots)
    per_video = num_slots if per == "video" else frames * num_slots
    unused = (area == 0).to(torch.float64).view(batch, per_video).sum(1)
    return Scores(unused, torch.full_like(unused, per_video), "slots")


def _frame_table(pred: Tensor, target: Tensor, background: int | None) -> Contingency:
    pred, target, annotated = check_labels(pred, target)
    check_background(background)
    return contingency(pred, target, annotated, "image")


def _over_objects(value: Tensor, counted: Tensor, table: Contingency, pred: Tensor) -> Scores:
    """Sum a value of each object, over the counted objects of all frames of a video."""
    batch, frames = pred.shape[:2]
    total = table.per_unit(torch.where(counted, value, 0), table.object_unit)
    count = table.per_unit(counted, table.object_unit)
    return Scores(total.view(batch, frames).sum(1), count.view(batch, frames).sum(1), "objects in frames")
