"""J and F: how well slots or labels follow regions and contours of objects through a video."""

import math
from typing import Literal

import torch
from torch import Tensor

from ssync_loss._checks import check_choice, check_int, check_number
from ssync_loss.metrics._contingency import check_unit
from ssync_loss.metrics._contours import contours, share_near, within
from ssync_loss.metrics._scores import Scores, assignment, averaged

Matching = Literal["ids", "hungarian"]
Measure = Literal["J", "F", "J&F"]

# pixels of all masks of a block: 4 MB in boolean masks
_BLOCK = 2**22


@averaged(empty=0.0)
def j_and_f(
    pred: Tensor,
    target: Tensor,
    *,
    background: int | None,
    matching: Matching = "ids",
    skip_first: int = 0,
    skip_last: int = 0,
    tolerance: float = 0.008,
) -> Scores:
    """J&F, the score of video object segmentation: half region similarity J, half contour accuracy F.

    As code, with ``J`` and ``F`` (objects, slots) the means over frames of :func:`region_similarity` and
    :func:`contour_accuracy` between every object and every slot::

        J_and_F = (J + F) / 2
        objects, slots = scipy.optimize.linear_sum_assignment(J_and_F, maximize=True)    # "hungarian"
        slots = objects                                                                  # "ids"
        j_and_f = J_and_F[objects, slots].mean()

    An object keeps its slot for the whole video, so identity switches lower the score. Every object is scored in every
    frame. A frame with neither the object nor the slot counts 1, as in the published code. The objects are all ids of
    the video's ground truth, skipped frames included. If there are fewer slots than objects, the remaining objects are
    compared with an empty mask.

    The score serves two tasks:

    - **Label propagation** (semi-supervised). Predicted ids are object ids; any other id counts as background. The
      first frame is given, so leave it out: ``skip_first=1``. Published scores of DAVIS also leave out the last frame:
      ``skip_first=1, skip_last=1``.
    - **Slots** (unsupervised). ``matching="hungarian"`` finds a slot for each object, by J&F over all frames. It needs
      scipy: ``pip install "ssync-loss[metrics]"``. Do not use it for propagated labels: it hides confused ids.

    Pixels without annotation belong to no mask. A frame without any annotation is not scored. The published score of a
    data set is the mean over all of its objects, as :class:`MetricAverage` computes it.

    Shape: pred, target: (B, T, H, W). Returns (B,), float64: one value in [0, 1] per video, the mean over its objects;
        0.0 for a video without an object, or without an annotated frame to score.

    Labels are any integers. A pixel with a negative target id is not annotated. ``background`` is the id of the
    background, or None if every id is an object. The first ``skip_first`` and the last ``skip_last`` frames are left
    out. ``tolerance`` is the largest distance of matching contours, as a share of the frame's diagonal, rounded up to
    whole pixels: 8 for frames of 480 x 854. In J it only affects the matching of slots.

    Raises: ImportError if slots are to be matched and scipy is missing; TypeError if labels, ``background`` or the
        frames to skip are not integers, or ``tolerance`` is no number; ValueError if shapes differ, ``background`` is
        negative, ``matching`` is unknown, no frame is left, or ``tolerance`` is outside [0, 1].
    Source: F. Perazzi et al., A benchmark dataset and evaluation methodology for video object segmentation,
    CVPR 2016; several objects and J&F: J. Pont-Tuset et al., The 2017 DAVIS challenge on video object segmentation
    (arXiv:1704.00675); matching by J&F as in the public code of the unsupervised challenge of 2019
    (arXiv:1905.00737).

    >>> target = torch.tensor([[[[0, 1, 1, 0]], [[0, 0, 1, 1]]]])
    >>> pred = torch.tensor([[[[0, 1, 1, 0]], [[0, 1, 1, 0]]]])
    >>> j_and_f(pred, target, background=0)  # J (1 + 1/3) / 2, F (1 + 1) / 2
    tensor([0.8333], dtype=torch.float64)
    >>> j_and_f(pred, target, background=0, skip_first=1)  # (1/3 + 1) / 2
    tensor([0.6667], dtype=torch.float64)
    >>> slots = 7 - pred
    >>> j_and_f(slots, target, background=0).tolist()  # no slot has label 1, so the object is missed
    [0.0]
    >>> j_and_f(slots, target, background=0, matching="hungarian")  # slot 6 matches object 1
    tensor([0.8333], dtype=torch.float64)
    """
    return _track_scores("J&F", pred, target, background, matching, skip_first, skip_last, tolerance)


@averaged(empty=0.0)
def region_similarity(
    pred: Tensor,
    target: Tensor,
    *,
    background: int | None,
    matching: Matching = "ids",
    skip_first: int = 0,
    skip_last: int = 0,
    tolerance: float = 0.008,
) -> Scores:
    """Region similarity J: the IoU of each object with its slot, frame by frame.

    As code, for the masks of an object and a slot in one frame::

        J = (object & slot).sum() / (object | slot).sum()        # 1.0 where both are empty

    An object's value is the mean over frames; a video's value is the mean over objects. :func:`video_miou` instead
    counts the pixels of all frames together, and :func:`image_miou` matches the slots of each frame anew. Arguments,
    errors and results are those of :func:`j_and_f`, the mean of J and :func:`contour_accuracy`. Slots are matched as
    there, by J&F.

    Source: Perazzi et al., CVPR 2016, region similarity; Pont-Tuset et al., arXiv:1704.00675.

    >>> target = torch.tensor([[[[0, 1, 1, 0]], [[0, 0, 1, 1]]]])
    >>> pred = torch.tensor([[[[0, 1, 1, 0]], [[0, 1, 1, 0]]]])
    >>> region_similarity(pred, target, background=0)  # (1 + 1/3) / 2
    tensor([0.6667], dtype=torch.float64)
    """
    return _track_scores("J", pred, target, background, matching, skip_first, skip_last, tolerance)


@averaged(empty=0.0)
def contour_accuracy(
    pred: Tensor,
    target: Tensor,
    *,
    background: int | None,
    matching: Matching = "ids",
    skip_first: int = 0,
    skip_last: int = 0,
    tolerance: float = 0.008,
) -> Scores:
    """Contour accuracy F: the F-measure of the contours of each object and its slot, frame by frame.

    As code, for the masks of an object and a slot in one frame, with ``near`` the pixels at a distance of at most
    ``radius`` from a contour::

        radius = ceil(tolerance * sqrt(H**2 + W**2))
        contour = (mask != right) | (mask != below) | (mask != right_below)    # of neighbors inside the frame
        precision = (contour(slot) & near(contour(object))).sum() / contour(slot).sum()
        recall = (contour(object) & near(contour(slot))).sum() / contour(object).sum()
        F = 2 * precision * recall / (precision + recall)    # 1.0 where both are empty, 0.0 where one is

    Contour pixels lie above or to the left of a border between two pixels. The border of the frame is no contour: the
    last row is compared only to the right, the last column only downward, and their corner is never marked. So a mask
    that fills the frame has no contour, and a frame of one pixel counts 1. An object's value is the mean over frames; a
    video's value is the mean over objects. Arguments, errors and results are those of :func:`j_and_f`, the mean of
    :func:`region_similarity` and F.

    The paper defines F by a matching of contour pixels. The paper and the public code compute this faster form instead.

    Source: Perazzi et al., CVPR 2016, contour accuracy; Pont-Tuset et al., arXiv:1704.00675.

    >>> target = torch.tensor([[[[0, 1, 1, 0]], [[0, 0, 1, 1]]]])
    >>> pred = torch.tensor([[[[0, 1, 1, 0]], [[0, 1, 1, 0]]]])
    >>> contour_accuracy(pred, target, background=0).tolist()  # frame 2: pixels 0 and 2, each next to pixel 1
    [1.0]
    >>> contour_accuracy(pred, target, background=0, tolerance=0).tolist()  # frame 2: no pixel in common
    [0.5]
    """
    return _track_scores("F", pred, target, background, matching, skip_first, skip_last, tolerance)


def _track_scores(
    measure: Measure,
    pred: Tensor,
    target: Tensor,
    background: int | None,
    matching: Matching,
    skip_first: int,
    skip_last: int,
    tolerance: float,
) -> Scores:
    pred, target, annotated = check_unit(pred, target, background)
    check_choice("matching", matching, ("ids", "hungarian"))
    check_int("skip_first", skip_first, 0)
    check_int("skip_last", skip_last, 0)
    check_number("tolerance", tolerance, 0.0, 1.0)
    batch, frames, height, width = pred.shape
    if skip_first + skip_last > max(frames - 1, 0):
        raise ValueError(
            f"`skip_first` and `skip_last` must leave a frame of T={frames}; got {skip_first} and {skip_last}."
        )
    radius = math.ceil(tolerance * math.hypot(height, width))
    is_object = annotated if background is None else annotated & (target != background)
    frame = torch.arange(frames, device=pred.device).view(-1, 1, 1)
    to_score = annotated & (frame >= skip_first) & (frame < frames - skip_last)

    total, weight = torch.zeros(2, batch, dtype=torch.float64, device=pred.device)
    for i in range(batch):
        shown = to_score[i].flatten(1).any(1)
        objects = _distinct(target[i][is_object[i]])
        if not bool(shown.any()) or len(objects) == 0:
            continue
        labels = pred[i][shown], target[i][shown], annotated[i][shown]
        slots = objects if matching == "ids" else _distinct(labels[0][labels[2]])
        needs_contours = measure != "J" or matching == "hungarian"
        j, f = _tables(*labels, objects, slots, radius if needs_contours else None)
        both = (j + f) / 2
        value = {"J": j, "F": f, "J&F": both}[measure]
        if matching == "hungarian":
            value = value[assignment('`matching="hungarian"`')(both.cpu().numpy(), maximize=True)]
        else:
            value = value.diagonal()
        total[i], weight[i] = value.sum(), len(objects)
    return Scores(total, weight, "objects")


def _tables(
    pred: Tensor, target: Tensor, annotated: Tensor, objects: Tensor, slots: Tensor, radius: int | None
) -> Tensor:
    """Return J and F of every object with every slot of a video, as means over frames; F is 0 without a radius."""
    # every object needs a slot; missing slots are empty
    num_frames, num_objects, num_slots = len(pred), len(objects), max(len(slots), len(objects))
    total = torch.zeros(2, num_objects, num_slots, dtype=torch.float64, device=pred.device)
    block = max(1, _BLOCK // ((num_objects + num_slots) * pred[0].numel()))
    for start in range(0, num_frames, block):
        part = slice(start, start + block)
        of_object = _number(target[part], objects, annotated[part])
        of_slot = _number(pred[part], slots, annotated[part])
        total[0] += _overlaps(of_object, of_slot, num_objects, num_slots).sum(0)
        if radius is not None:
            object_contour, slot_contour = (
                contours(labels.unsqueeze(1) == torch.arange(count, device=labels.device).view(-1, 1, 1))
                for labels, count in ((of_object, num_objects), (of_slot, num_slots))
            )
            total[1] += _f_measure(object_contour, slot_contour, radius).sum(0)
    return total / num_frames


def _distinct(ids: Tensor) -> Tensor:
    # labels come in runs, and sorting runs is faster than sorting all pixels of a video
    return torch.as_tensor(ids.unique_consecutive().unique())


def _number(labels: Tensor, names: Tensor, keep: Tensor) -> Tensor:
    """Replace labels by their indices among ascending names, or by -1 if they have no name or are not kept."""
    place = torch.searchsorted(names, labels).clamp_max(len(names) - 1)
    return torch.where(keep & (names[place] == labels), place, -1)


def _overlaps(of_object: Tensor, of_slot: Tensor, num_objects: int, num_slots: int) -> Tensor:
    # one more row counts pixels without an object, one more column pixels without a slot
    shape = (len(of_object), num_objects + 1, num_slots + 1)
    frame = torch.arange(shape[0], device=of_object.device).view(-1, 1, 1)
    cell = (frame * shape[1] + of_object + 1) * shape[2] + of_slot + 1
    table = torch.bincount(cell.flatten(), minlength=math.prod(shape)).view(shape).to(torch.float64)
    shared = table[:, 1:, 1:]
    union = table[:, 1:].sum(2, keepdim=True) + table[:, :, 1:].sum(1, keepdim=True) - shared
    return torch.where(union > 0, shared / union.clamp_min(1.0), 1.0)


def _f_measure(object_contour: Tensor, slot_contour: Tensor, radius: int) -> Tensor:
    recall = share_near(object_contour, within(slot_contour, radius))
    precision = share_near(slot_contour, within(object_contour, radius)).mT
    of_object, of_slot = (one.flatten(2).any(2) for one in (object_contour, slot_contour))
    both_empty = ~(of_object.unsqueeze(2) | of_slot.unsqueeze(1))
    summed = precision + recall
    f = 2 * precision * recall / torch.where(summed > 0, summed, 1.0)
    return torch.where(both_empty, 1.0, f)
