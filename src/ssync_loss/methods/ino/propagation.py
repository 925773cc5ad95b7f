"""Label propagation: features propagate the masks of the first frame through a video."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ssync_loss._autocast import no_autocast
from ssync_loss._checks import as_index, check_flag, check_int, check_not_empty
from ssync_loss._inputs import check_floats, check_labels, widest
from ssync_loss._rows import slices
from ssync_loss._settings import COUNT, OPTIONAL_COUNT, POSITIVE, check_by
from ssync_loss._vectors import directions

# affinities, or pixels of masks, of a block: 64 MB in float32
BLOCK_ELEMENTS = 1 << 24

_check_settings = check_by(
    num_context=partial(check_int, low=0),
    radius=partial(check_int, low=0),
    top_k=COUNT,
    temperature=POSITIVE,
    chunk_size=OPTIONAL_COUNT,
)


def propagate_labels(
    features: Tensor,
    labels: Tensor,
    *,
    num_context: int = 10,
    radius: int = 40,
    top_k: int = 5,
    temperature: float = 0.1,
    size: tuple[int, int] | None = None,
    normalize: bool = True,
    chunk_size: int | None = None,
) -> Tensor:
    """Propagate the labels of the first frame through a video, to evaluate self-supervised features.

    Labels are resized to the grid of the features (nearest), and :func:`propagate_masks` propagates them as soft masks.
    The masks of a frame are resized to ``size`` (bilinear) and, if ``normalize``, become ``(x - min) / (max - min)``. A
    pixel gets the label of its largest mask, or the lowest label on ties. A constant mask is not normalized (the
    published code: NaN). If resizing drops a label from the first frame, no pixel gets that label later. The first
    frame of the result has the given labels. This reads data on the host and is not compiled.

    Args:
        features: (B, T, D, H, W), of patches; in a ViT an intermediate layer may be best (published: the student's
            block 7 of 12, after the final norm).
        labels: (B, h, w), of the first frame, at least 0; 0 has no special meaning.
        num_context: as in :func:`propagate_masks`, like the next three.
        radius: half the side of the window.
        top_k: number of places that give a patch its label.
        temperature: temperature of the affinities.
        size: height and width of the result; None takes the size of the labels. The published size is the frames' size.
        normalize: whether to stretch every mask to [0, 1] over its frame. Published for DAVIS, not for YouTube-VOS.
        chunk_size: as in :func:`propagate_masks`.

    Returns: (B, T, *size), int64.
    Source: see :func:`propagate_masks`.
    Raises: TypeError on a wrong dtype; ValueError on wrong shapes or settings, negative labels, or features with NaN or
        infinity.

    >>> features = torch.eye(3)[torch.tensor([[0, 1, 2], [2, 0, 1]])].mT.view(1, 2, 3, 1, 3)  # a step to the right
    >>> labels = torch.tensor([7, 7, 4]).view(1, 1, 3)
    >>> propagate_labels(features, labels, top_k=1).tolist()
    [[[[7, 7, 4]], [[4, 7, 7]]]]
    """
    sizes = check_floats("features", features, "B T D H W", filled="T D H W")
    check_not_empty("labels", check_labels("labels", labels, "B h w", sizes, features=features), "h w")
    labels = as_index("labels", labels)
    if bool((labels < 0).any()):
        raise ValueError(
            f"`labels` must be at least 0; got {int(labels.min())}. Label pixels without annotation as background."
        )
    check_flag("normalize", normalize)
    if size is None:
        size = (labels.shape[1], labels.shape[2])
    if isinstance(size, str) or not isinstance(size, Sequence) or len(size) != 2:
        raise ValueError(f"`size` must be a pair (height, width); got {size!r}.")
    for length in size:
        check_int("size", length, 1)

    result = torch.empty(sizes["B"], sizes["T"], *size, dtype=torch.int64, device=labels.device)
    if sizes["B"] == 0:
        return result
    names, numbers = labels.unique(return_inverse=True)
    on_grid = _nearest(numbers, (sizes["H"], sizes["W"]))
    known = on_grid.unsqueeze(1) == torch.arange(len(names), device=labels.device).view(-1, 1, 1)
    masks = propagate_masks(
        features,
        known.to(widest(features)),
        num_context=num_context,
        radius=radius,
        top_k=top_k,
        temperature=temperature,
        chunk_size=chunk_size,
    )
    absent = ~known.any(3).any(2)
    block = max(1, BLOCK_ELEMENTS // (sizes["B"] * len(names) * size[0] * size[1]))
    for frames in slices(sizes["T"], block):
        some = masks[:, frames]
        pixels = F.interpolate(some.flatten(0, 1), size=tuple(size), mode="bilinear", align_corners=False)
        if normalize:
            low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
            pixels = torch.where(high > low, (pixels - low) / (high - low), pixels)
        competing = pixels.view(*some.shape[:3], *size).masked_fill(absent[:, None, :, None, None], -1.0)
        result[:, frames] = names[competing.argmax(2)]
    result[:, 0] = _nearest(labels, size)
    return result


@torch.no_grad()
def propagate_masks(
    features: Tensor,
    masks: Tensor,
    *,
    num_context: int = 10,
    radius: int = 40,
    top_k: int = 5,
    temperature: float = 0.1,
    chunk_size: int | None = None,
) -> Tensor:
    """Propagate soft masks of the first frame through a video: a patch gets the masks of the most similar patches.

    The context of a frame is the first frame, and up to ``num_context`` frames right before it. With x the features at
    length 1, a patch p is compared with all places u of the context at most ``radius`` rows and columns away. Let
    ``w_u = exp(x_p x_u / temperature)`` for the ``top_k`` largest over the whole context and all ties with the last of
    them, else 0. Then ``mask_p = sum_u w_u mask_u / sum_u w_u``, and later frames use these masks.

    Memory holds the features of the context, and the scores of ``chunk_size`` patches of a clip with all
    (num_context + 1) H W places. This reads data on the host once per frame, and is not compiled.

    Args:
        features: (B, T, D, H, W), of patches, of any length; a zero vector has cosine 0 with all others.
        masks: (B, K, H, W), of the first frame. If they sum to 1, so do those of later frames.
        num_context: frames of the context besides the first. Published: 10 for DAVIS, 20 for YouTube-VOS.
        radius: half the side of the window in patches. Published: 40 and 50, for patches of 8 pixels.
        top_k: number of places that give a patch its masks.
        temperature: temperature of the affinities, above 0.
        chunk_size: patches of a clip at a time; None lets the scores fill 64 MB.

    Returns: (B, T, K, H, W), the first frame as given, in float32, or float64 if an argument has it, without gradient.
    Source: Caron et al., ICCV 2021 (arXiv:2104.14294), the evaluation on DAVIS-2017 after Jabri et al., NeurIPS 2020
    (arXiv:2006.14613); settings of Pan et al., ACM MM 2022 (arXiv:2203.15312).
    Raises: TypeError on a wrong dtype; ValueError on wrong shapes or settings, or features with NaN or infinity.

    >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 1, 2, 1, 2).repeat(1, 2, 1, 1, 1)
    >>> masks = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    >>> # the left patch is like itself: e / (e + 1)
    >>> propagate_masks(features, masks, top_k=2, temperature=1.0)[0, 1, 0]
    tensor([[0.7311, 0.2689]])
    """
    size = check_floats("features", features, "B T D H W", filled="T D H W")
    given = check_floats("masks", masks, "B K H W", size, filled="K", features=features)
    _check_finite("masks", masks)
    _check_settings(num_context=num_context, radius=radius, top_k=top_k, temperature=temperature, chunk_size=chunk_size)
    dtype = widest(features, masks)
    clips, frames, channels, height, width = features.shape
    num_places = height * width
    # the first frame stays; each new frame replaces the oldest of the others
    num_slots = min(1 + num_context, max(frames - 1, 1))
    if chunk_size is None:
        chunk_size = max(1, BLOCK_ELEMENTS // max(clips * num_slots * num_places, 1))
    result = torch.empty(clips, frames, given["K"], height, width, dtype=dtype, device=features.device)
    result[:, 0] = masks
    context = torch.empty(clips, num_slots, num_places, channels, dtype=dtype, device=features.device)
    carried = torch.empty(clips, num_slots, num_places, given["K"], dtype=dtype, device=features.device)
    with no_autocast(features):
        for now in range(frames):
            units, _ = directions(features[:, now].to(dtype).flatten(2).mT)
            _check_finite("features", units)
            if now > 0:
                filled = min(now, num_slots)
                found = []
                for here in slices(num_places, chunk_size):
                    outside = _outside(here, height, width, radius, features.device)
                    known = context[:, :filled], carried[:, :filled]
                    found.append(_looked_up(units[:, here], outside, *known, top_k, temperature))
                result[:, now] = torch.cat(found, 1).mT.unflatten(2, (height, width))
            slot = now if now < num_slots else 1 + (now - 1) % max(num_slots - 1, 1)
            if slot < num_slots:
                context[:, slot] = units
                carried[:, slot] = result[:, now].flatten(2).mT
    return result


def _looked_up(
    queries: Tensor, outside: Tensor | None, context: Tensor, carried: Tensor, top_k: int, temperature: float
) -> Tensor:
    """Return the masks (B, n, K) of patches (B, n, D), from a context (B, c, N, D) with masks (B, c, N, K)."""
    scores = queries @ context.flatten(1, 2).mT
    if outside is not None:
        scores.unflatten(2, context.shape[1:3]).masked_fill_(outside.unsqueeze(1), float("-inf"))
    largest = scores.topk(min(top_k, scores.shape[2]), dim=2).values
    # in a window with fewer places the last score is -inf, and all places count
    scores.masked_fill_(scores < largest[..., -1:], float("-inf"))
    weights = scores.sub_(largest[..., :1]).div_(temperature).exp_()
    return weights @ carried.flatten(1, 2) / weights.sum(2, keepdim=True)


def _outside(here: slice, height: int, width: int, radius: int, device: torch.device) -> Tensor | None:
    """Mark the places outside the windows of some places: (n, N), or None if no place is outside."""
    if radius >= max(height, width) - 1:
        return None
    places = torch.arange(height * width, device=device)
    rows, columns = places // width, places % width
    return ((rows[here, None] - rows).abs() > radius) | ((columns[here, None] - columns).abs() > radius)


def _check_finite(name: str, values: Tensor) -> None:
    """Require finite numbers."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"`{name}` must hold neither NaN nor infinity; got some.")


def _nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize labels (B, h, w) to (B, *size): every cell gets the label at its center."""
    rows, columns = (
        ((torch.arange(new, device=labels.device) * 2 + 1) * old) // (2 * new)
        for old, new in zip(labels.shape[1:], size, strict=True)
    )
    return labels[:, rows[:, None], columns]
