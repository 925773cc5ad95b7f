"""Intersection over union of objects and slots: the best slot for each object, or one slot for each."""

from collections.abc import Callable

import torch
from torch import Tensor

from ssync_loss.metrics._contingency import Contingency, Per, check_unit, contingency
from ssync_loss.metrics._scores import Scores, assignment, averaged, scores_of_units


@averaged(empty=0.0)
def mean_best_overlap(pred: Tensor, target: Tensor, *, background: int | None, per: Per = "video") -> Scores:
    """Mean over objects of the IoU with the slot that fits best (mBO); a slot may serve several objects.

    As code, with ``iou`` (objects, slots)::

        mbo = iou.amax(1).mean()

    The background is no object, but its pixels count against the slots that cover them. Pixels without annotation
    (negative ids) are left out. Published numbers for YouTube-VIS and COCO count pixels outside all objects, so these
    pixels need a background id (:func:`objects_to_labels` makes such labels). ``target`` decides whether objects are
    instances (mBO_i) or classes (mBO_c).

    Shape: pred, target: (B, T, H, W). Returns (B,), float64: one value in [0, 1] per video, 0.0 for a video without an
        object.

    Labels and ``per`` are those of :func:`ari`: "video" compares space-time tubes, "image" takes the mean over the
    frames that show an object. ``background`` is the id of the background, or None if every id is an object.

    Raises: TypeError if labels or ``background`` are not integers; ValueError if shapes differ, ``background`` is
        negative or ``per`` is unknown.
    Source: J. Pont-Tuset et al., Multiscale combinatorial grouping, 2016.

    >>> target = torch.tensor([[[[0, 1, 1, 2]]]])
    >>> pred = torch.tensor([[[[5, 5, 7, 7]]]])
    >>> mean_best_overlap(pred, target, background=0)  # slot 7 twice: (1/3 + 1/2) / 2 = 5/12
    tensor([0.4167], dtype=torch.float64)
    """
    return _overlap_scores(_best_sum, pred, target, background, per)


@averaged(empty=0.0)
def mean_iou(pred: Tensor, target: Tensor, *, background: int | None, per: Per = "video") -> Scores:
    """Mean over objects of the IoU with the matched slot (mIoU): no two objects share a slot, and the sum is largest.

    As code, with ``iou`` (objects, slots)::

        objects, slots = scipy.optimize.linear_sum_assignment(iou, maximize=True)
        miou = iou[objects, slots].sum() / len(iou)      # an object without a slot counts 0

    The value is at most :func:`mean_best_overlap`. Shapes, arguments and errors are those of :func:`mean_best_overlap`.
    The function needs scipy: ``pip install "ssync-loss[metrics]"``.

    Raises: ImportError if scipy is missing.
    Source: H. W. Kuhn, The Hungarian method for the assignment problem, 1955.

    >>> target = torch.tensor([[[[0, 1, 1, 2]]]])
    >>> pred = torch.tensor([[[[5, 5, 7, 7]]]])
    >>> mean_iou(pred, target, background=0)  # slot 5 to 1, slot 7 to 2: (1/3 + 1/2) / 2 = 5/12
    tensor([0.4167], dtype=torch.float64)
    >>> pred = torch.tensor([[[[5, 7, 7, 7]]]])
    >>> mean_iou(pred, target, background=0)  # slot 7 to 1, no slot to 2: (2/3 + 0) / 2
    tensor([0.3333], dtype=torch.float64)
    """
    return _overlap_scores(_matched_sum, pred, target, background, per)


@averaged(empty=0.0)
def video_mbo(pred: Tensor, target: Tensor, *, background: int | None) -> Scores:
    """Overlap of space-time tubes: :func:`mean_best_overlap` with ``per="video"``.

    Shapes and errors are those of :func:`mean_best_overlap`.

    >>> frames = torch.tensor([[[[1, 2]], [[1, 2]]]])
    >>> video_mbo(torch.tensor([[[[5, 6]], [[6, 5]]]]), frames, background=None)
    tensor([0.3333], dtype=torch.float64)
    """
    return _overlap_scores(_best_sum, pred, target, background, "video")


@averaged(empty=0.0)
def image_mbo(pred: Tensor, target: Tensor, *, background: int | None) -> Scores:
    """Overlap in each frame, then the mean: :func:`mean_best_overlap` with ``per="image"``.

    Shapes and errors are those of :func:`mean_best_overlap`.

    >>> frames = torch.tensor([[[[1, 2]], [[1, 2]]]])
    >>> image_mbo(torch.tensor([[[[5, 6]], [[6, 5]]]]), frames, background=None)
    tensor([1.], dtype=torch.float64)
    """
    return _overlap_scores(_best_sum, pred, target, background, "image")


@averaged(empty=0.0)
def video_miou(pred: Tensor, target: Tensor, *, background: int | None) -> Scores:
    """Matched overlap of space-time tubes: :func:`mean_iou` with ``per="video"``.

    Shapes and errors are those of :func:`mean_iou`.

    >>> frames = torch.tensor([[[[1, 2]], [[1, 2]]]])
    >>> video_miou(torch.tensor([[[[5, 5]], [[5, 5]]]]), frames, background=None)
    tensor([0.2500], dtype=torch.float64)
    """
    return _overlap_scores(_matched_sum, pred, target, background, "video")


@averaged(empty=0.0)
def image_miou(pred: Tensor, target: Tensor, *, background: int | None) -> Scores:
    """Matched overlap in each frame, then the mean: :func:`mean_iou` with ``per="image"``.

    Shapes and errors are those of :func:`mean_iou`.

    >>> frames = torch.tensor([[[[1, 2]], [[1, 2]]]])
    >>> image_miou(torch.tensor([[[[5, 5]], [[5, 6]]]]), frames, background=None)
    tensor([0.6250], dtype=torch.float64)
    """
    return _overlap_scores(_matched_sum, pred, target, background, "image")


def _overlap_scores(
    sum_of: Callable[[Tensor, Contingency], Tensor], pred: Tensor, target: Tensor, background: int | None, per: Per
) -> Scores:
    table = contingency(*check_unit(pred, target, background, per), per)
    is_object = table.is_object(background)
    summed = sum_of(torch.where(is_object[table.pair_object], table.shared / table.union(), 0.0), table)
    num_objects = table.per_unit(is_object, table.object_unit)
    return scores_of_units(summed / num_objects.clamp_min(1.0), num_objects > 0, batch=len(pred), per=per)


def _best_sum(iou: Tensor, table: Contingency) -> Tensor:
    best = torch.zeros_like(table.object_area).scatter_reduce(0, table.pair_object, iou, "amax")
    return table.per_unit(best, table.object_unit)


def _matched_sum(iou: Tensor, table: Contingency) -> Tensor:
    assign = assignment("mIoU")
    # objects, slots and pairs are sorted by unit, so a unit is a slice of each
    pair_unit = table.object_unit[table.pair_object]
    objects, slots, pairs = (
        torch.bincount(unit, minlength=table.num_units) for unit in (table.object_unit, table.slot_unit, pair_unit)
    )
    row = table.pair_object - (objects.cumsum(0) - objects)[pair_unit]
    column = table.pair_slot - (slots.cumsum(0) - slots)[pair_unit]
    sums = []
    of_pairs = (one.cpu().split(pairs.tolist()) for one in (iou, row, column))
    for values, rows, columns, *size in zip(*of_pairs, objects.tolist(), slots.tolist(), strict=True):
        overlaps = torch.zeros(size, dtype=torch.float64).index_put_((rows, columns), values).numpy()
        sums.append(float(overlaps[assign(overlaps, maximize=True)].sum()))
    return torch.tensor(sums, dtype=torch.float64, device=iou.device)
