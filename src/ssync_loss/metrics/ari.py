"""Adjusted Rand index of slots against objects: over all pixels, or over the foreground alone."""

import torch
from torch import Tensor

from ssync_loss.metrics._contingency import Per, check_unit, contingency
from ssync_loss.metrics._scores import Scores, averaged, scores_of_units


@averaged(empty=1.0)
def ari(pred: Tensor, target: Tensor, *, per: Per = "video") -> Scores:
    """Adjusted Rand index over all annotated pixels; a background id counts as one more object.

    With ``N`` the pixels shared by each object and slot, ``A`` and ``B`` the areas of objects and slots,
    and ``n`` the number of pixels::

        r, a, b = sum(N * (N - 1)), sum(A * (A - 1)), sum(B * (B - 1))
        expected = a * b / (n * (n - 1))
        ari = (r - expected) / ((a + b) / 2 - expected)      # 1.0 if the denominator is 0

    This is ``sklearn.metrics.adjusted_rand_score``. It is 1 for equal partitions, about 0 for unrelated ones, and may
    be negative.

    Shape: pred, target: (B, T, H, W). Returns (B,), float64: one value per video, 1.0 for a video without an annotated
        pixel.

    Labels are any integers, used as names. A pixel with a negative target id is not annotated, and is left out.
    ``per="video"`` pools the pixels of all frames, so that identity switches lower the score. "image" scores each frame
    by itself and returns the mean over the frames with an annotated pixel.

    Raises: TypeError if labels are not integers; ValueError if shapes differ or ``per`` is unknown.
    Source: L. Hubert and P. Arabie, Comparing partitions, 1985.

    >>> target = torch.tensor([[[[1, 1, 2, 2]]]])
    >>> pred = torch.tensor([[[[0, 0, 1, 2]]]])
    >>> ari(pred, target)  # (2 - 2/3) / (3 - 2/3) = 4/7
    tensor([0.5714], dtype=torch.float64)
    """
    return _ari_scores(pred, target, None, per)


@averaged(empty=1.0)
def video_ari(pred: Tensor, target: Tensor) -> Scores:
    """Score a video as one set of pixels, background included: :func:`ari` with ``per="video"``.

    Shapes and errors are those of :func:`ari`.

    >>> frames = torch.tensor([[[[1, 2]], [[1, 2]]]])
    >>> video_ari(torch.tensor([[[[5, 6]], [[6, 5]]]]), frames)  # (0 - 4/3) / (4 - 4/3)
    tensor([-0.5000], dtype=torch.float64)
    """
    return _ari_scores(pred, target, None, "video")


@averaged(empty=1.0)
def image_ari(pred: Tensor, target: Tensor) -> Scores:
    """Score each frame, background included, and take the mean: :func:`ari` with ``per="image"``.

    Shapes and errors are those of :func:`ari`.

    >>> frames = torch.tensor([[[[1, 2]], [[1, 2]]]])
    >>> image_ari(torch.tensor([[[[5, 6]], [[6, 5]]]]), frames)  # each frame is right
    tensor([1.], dtype=torch.float64)
    """
    return _ari_scores(pred, target, None, "image")


@averaged(empty=1.0)
def fg_ari(pred: Tensor, target: Tensor, *, background: int | None, per: Per = "video") -> Scores:
    """Adjusted Rand index over the pixels of objects: :func:`ari` without the pixels of the background.

    Truth and prediction lose the pixels of the background, so it does not matter how slots divide the background::

        fg_ari(pred, target, background=0) == ari(pred, torch.where(target == 0, -1, target))

    ``background=None`` removes no id. Use it if the ground truth names only objects (YouTube-VIS, COCO: ids from 0, and
    -1 elsewhere), where removing id 0 would delete the first object. If an id is the background (MOVi, DAVIS: 0), None
    is wrong and silently gives :func:`ari`.

    Shape: pred, target: (B, T, H, W). Returns (B,), float64: one value per video, 1.0 for a video without an object, as
        the denominator is 0.

    Labels and ``per`` are those of :func:`ari`; with ``per="image"`` the mean is over the frames that show an object.

    Raises: TypeError, ValueError as :func:`ari`, and if ``background`` is neither None nor an integer of at least 0.
    Source: T. Kipf et al., Conditional object-centric learning from video (SAVi), 2022.

    >>> target = torch.tensor([[[[0, 0, 0, 1, 1, 2, 2]]]])
    >>> pred = torch.tensor([[[[0, 1, 3, 0, 0, 1, 2]]]])
    >>> fg_ari(pred, target, background=0)  # the four pixels of the example of `ari`
    tensor([0.5714], dtype=torch.float64)
    """
    return _ari_scores(pred, target, background, per)


@averaged(empty=1.0)
def video_fg_ari(pred: Tensor, target: Tensor, *, background: int | None) -> Scores:
    """Score a video as one set of object pixels: the usual FG-ARI of videos.

    This is :func:`fg_ari` with ``per="video"``. Shapes and errors are those of :func:`fg_ari`.

    >>> frames = torch.tensor([[[[0, 1, 2]], [[0, 1, 2]]]])
    >>> video_fg_ari(torch.tensor([[[[4, 5, 6]], [[4, 6, 5]]]]), frames, background=0)
    tensor([-0.5000], dtype=torch.float64)
    """
    return _ari_scores(pred, target, background, "video")


@averaged(empty=1.0)
def image_fg_ari(pred: Tensor, target: Tensor, *, background: int | None) -> Scores:
    """Score the object pixels of each frame and take the mean: :func:`fg_ari` with ``per="image"``.

    Shapes and errors are those of :func:`fg_ari`.

    >>> frames = torch.tensor([[[[0, 1, 2]], [[0, 1, 2]]]])
    >>> image_fg_ari(torch.tensor([[[[4, 5, 6]], [[4, 6, 5]]]]), frames, background=0)
    tensor([1.], dtype=torch.float64)
    """
    return _ari_scores(pred, target, background, "image")


def _ari_scores(pred: Tensor, target: Tensor, background: int | None, per: Per) -> Scores:
    pred, target, keep = check_unit(pred, target, background, per)
    if background is not None:
        keep = keep & (target != background)
    table = contingency(pred, target, keep, per)
    # in float64: pairs of pixels exceed float32 (2^24), and the products below exceed int64
    num_pixels = table.per_unit(table.object_area, table.object_unit)
    both = table.per_unit(_pairs(table.shared), table.object_unit[table.pair_object])
    same_object = table.per_unit(_pairs(table.object_area), table.object_unit)
    same_slot = table.per_unit(_pairs(table.slot_area), table.slot_unit)
    # dividing first keeps the degenerate denominator exactly 0
    expected = same_object * (same_slot / _pairs(num_pixels).clamp_min(1.0))
    gap = (same_object + same_slot) / 2 - expected
    degenerate = gap == 0
    index = torch.where(degenerate, 1.0, (both - expected) / torch.where(degenerate, 1.0, gap))
    return scores_of_units(index, num_pixels > 0, batch=len(pred), per=per)


def _pairs(count: Tensor) -> Tensor:
    return count * (count - 1)
