"""Make the hard labels of metrics from masks."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ssync_loss._autocast import at_least_float32
from ssync_loss._checks import check_bool, check_choice, check_flag, check_int, check_shape
from ssync_loss._inputs import check_floats
from ssync_loss.metrics._contingency import check_data, check_target

# pixels of all resized masks of a block: 64 MB in float32
_BLOCK = 2**24


def masks_to_labels(masks: Tensor, size: tuple[int, int], *, kind: Literal["logits", "probs"] = "logits") -> Tensor:
    """Resize soft slot masks to the size of the ground truth and give each pixel to its largest mask.

    As code::

        probs = masks.softmax(2)                          # unless they are probabilities
        labels = interpolate(probs, size, mode="bilinear", align_corners=False).argmax(2)

    Probabilities are resized, not logits, and before the argmax: both choices change every metric. A tie goes to the
    lowest slot. Frames are resized in blocks, which bounds the memory.

    Shape: masks: (B, T, S, h, w). Returns the labels (B, T, *size), int64, in [0, S).

    ``masks`` are decoder masks or attention; probabilities with ``kind="probs"``. Logits of -inf mark absent slots; a
    patch without a present slot is uniform. ``size`` is height and width of the ground truth.

    Raises: TypeError if masks are not floating point or ``size`` holds no integers; ValueError if the rank differs, an
        axis is empty, ``size`` is no pair of positive numbers, ``kind`` is unknown, or masks hold NaN, +inf or negative
        probabilities.

    >>> masks = torch.tensor([0.9, 0.2, 0.1, 0.8]).view(1, 1, 2, 1, 2)  # slot 0 fades to the right
    >>> masks_to_labels(masks, (1, 4), kind="probs").tolist()  # .9 .725 .375 .2 against .1 .275 .625 .8
    [[[[0, 0, 1, 1]]]]
    """
    sizes = check_floats("masks", masks, "B T S h w", filled="S h w")
    check_data("masks", masks)
    check_choice("kind", kind, ("logits", "probs"))
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ValueError(f"`size` must be a pair (height, width); got {size!r}.")
    for length in size:
        check_int("size", length, 1)

    frames = masks.detach().flatten(0, 1)
    labels = torch.empty(len(frames), *size, dtype=torch.int64, device=masks.device)
    block = max(1, _BLOCK // (sizes["S"] * size[0] * size[1]))
    for start in range(0, len(frames), block):
        part = slice(start, start + block)
        probs = _probabilities(frames[part], kind)
        resized = F.interpolate(probs, size=tuple(size), mode="bilinear", align_corners=False)
        labels[part] = resized.argmax(1)
    return labels.view(sizes["B"], sizes["T"], *size)


def objects_to_labels(masks: Tensor, *, ignore_overlaps: bool = False) -> Tensor:
    """Turn one mask per object into object ids, with 0 for the pixels that no object claims.

    As code::

        labels = 1 + masks.argmax(2)         # 0 if no object claims the pixel, -1 if several do

    Score the result with ``background=0``. This gives the published FG-ARI and mBO if no mask is the background
    (YouTube-VIS, COCO). If the first mask is the background (MOVi), leave it out:
    ``objects_to_labels(masks[:, :, 1:])``.

    Shape: masks: (B, T, K, H, W), bool. Returns (B, T, H, W), int64, in [-1, K]: 1 + k for the k-th mask.

    An object may be absent from frames. ``ignore_overlaps`` drops pixels that several objects claim, from truth and
    prediction; without it they are an error.

    Raises: TypeError if masks or ``ignore_overlaps`` are not bool; ValueError if the rank differs, or objects overlap
        and ``ignore_overlaps`` is False.

    >>> masks = torch.tensor([[True, True, False, False], [False, True, True, False]]).view(1, 1, 2, 1, 4)
    >>> objects_to_labels(masks, ignore_overlaps=True).tolist()
    [[[[1, -1, 2, 0]]]]
    """
    sizes = check_shape("masks", masks, "B T K H W")
    check_bool("masks", masks)
    check_flag("ignore_overlaps", ignore_overlaps)
    check_data("masks", masks)
    claims = masks.sum(2)
    overlapping = claims > 1
    if not ignore_overlaps and bool(overlapping.any()):
        raise ValueError(
            f"`masks` must not overlap unless ignore_overlaps=True; got {int(overlapping.sum())} pixels "
            "that several objects claim."
        )
    ids = torch.arange(1, sizes["K"] + 1, device=masks.device).view(-1, 1, 1)
    return torch.where(overlapping, -1, (masks * ids).sum(2))


def has_objects(target: Tensor, *, background: int | None) -> Tensor:
    """Mark the videos that show an object; the others have nothing to score.

    As code::

        has_objects = ((target >= 0) & (target != background)).flatten(1).any(1)

    Shape: target: (B, T, H, W), object ids; a negative id is a pixel without annotation. Returns (B,), bool.

    ``background`` is the id of the background, or None if every id is an object.

    Raises: TypeError if ids or ``background`` are not integers; ValueError if the rank differs or ``background`` is
        negative.

    >>> target = torch.tensor([[[[0, 0, -1]]], [[[0, 4, -1]]]])
    >>> has_objects(target, background=0).tolist()
    [False, True]
    """
    ids, shown = check_target(target, background)
    if background is not None:
        shown = shown & (ids != background)
    return shown.flatten(1).any(1)


def _probabilities(masks: Tensor, kind: Literal["logits", "probs"]) -> Tensor:
    probs = masks = at_least_float32(masks)
    if kind == "logits":
        # a patch without a present slot is uniform, so that its neighbors decide
        deserted = (masks == -torch.inf).all(1, keepdim=True)
        probs = torch.where(deserted, 0.0, masks).softmax(1)
    elif bool((masks < 0).any()):
        raise ValueError(f"`masks` must be at least 0 with kind='probs'; got {masks.min().item()}.")
    if not bool(probs.isfinite().all()):
        raise ValueError("`masks` must hold neither NaN nor +inf; got some.")
    return probs
