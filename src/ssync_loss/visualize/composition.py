"""One picture for a whole step of the loss."""

from typing import Any

import torch
from torch import Tensor

from ssync_loss._axes import Axes
from ssync_loss._checks import as_index, check_int, check_number, check_same_device, check_shape, check_type
from ssync_loss.ssync.doubts import warn_of_doubts
from ssync_loss.ssync.functions import labels_of
from ssync_loss.ssync.labels import hard_labels
from ssync_loss.ssync.maps import Grid, KindArgument, prepare_maps
from ssync_loss.ssync.settings import Settings
from ssync_loss.ssync.types import PseudoLabels
from ssync_loss.visualize.pictures import (
    as_bytes,
    as_gray,
    blended,
    check_video,
    enlarged,
    filmstrip,
    outline,
    overlay,
    roles,
)

PANEL_ROWS = ("input", "encoder", "decoder", "merged", "who is taught")


def panel(
    video: Tensor,
    enc_logits: Tensor,
    dec_logits: Tensor,
    *,
    labels: PseudoLabels | None = None,
    merge_threshold: float | None = 0.6,
    kind: KindArgument = "logits",
    grid: Grid = None,
    axes: Axes = None,
    valid: Tensor | None = None,
    slot_mask: Tensor | None = None,
    num_frames: int | None = None,
    alpha: float = 0.6,
    scale: int = 1,
    gap: int = 2,
) -> Tensor:
    """Draw a step of the loss as one picture per clip: a column per frame, a row for each of ``PANEL_ROWS``.

    - input: the video;
    - encoder: the encoder's hard labels before merging, over the gray video;
    - decoder: the decoder's hard labels before merging, over the gray video;
    - merged: the encoder's labels after merging, with white lines around patches where the decoder's merged labels
      differ;
    - who is taught: ``ROLE_COLORS``. The decoder learns on boundaries (``DECODER_TAUGHT``), the encoder in interiors
      (``ENCODER_TAUGHT``).

    A slot has the same color in all rows; a merged slot has the color of its representative. Invalid patches are dark.

    Shape: video: (B, T, 3, h, w). enc_logits, dec_logits: (B, T, S, H, W) or (B, T, S, N), or as ``axes`` says; H and W
        may differ from h and w. Returns (B, 3, height, width), uint8, with ``height = 5 * scale * h + 4 * gap`` and
        ``width = T * scale * w + (T - 1) * gap``.

    ``video`` and ``alpha`` are as in :func:`overlay`, ``gap`` as in :func:`filmstrip`. ``labels`` come from
    ``SSyncLoss.terms`` or ``pseudo_labels``; None computes them with ``merge_threshold``. Maps, ``kind``, ``grid``,
    ``axes``, ``valid``, ``slot_mask`` and ``num_frames`` are as in ``pseudo_labels``. ``scale`` enlarges frames by a
    whole number.

    Raises: TypeError, ValueError if ``labels`` are no PseudoLabels, or a dtype, shape, device or number does not fit.

    >>> maps = torch.zeros(2, 4, 3, 6, 6)
    >>> panel(torch.zeros(2, 4, 3, 24, 24), maps, maps, gap=0).shape  # five rows of four frames
    torch.Size([2, 3, 120, 96])
    """
    size = check_video(video)
    check_number("alpha", alpha, 0.0, 1.0)
    check_int("scale", scale, 1)
    check_int("gap", gap, 0)
    if merge_threshold is not None:
        check_number("merge_threshold", merge_threshold, 0.0, 1.0)
    masks: dict[str, Any] = {"valid": valid, "slot_mask": slot_mask, "num_frames": num_frames}
    with torch.no_grad():
        maps = prepare_maps(enc_logits, dec_logits, kind=kind, grid=grid, axes=axes, look=warn_of_doubts, **masks)
        B, T, _, H, W = maps.enc.shape
        check_shape("video", video, "B T C h w", B=B, T=T, C=3)
        check_same_device("video", video, enc_logits=enc_logits)
        if labels is None:
            labels = labels_of(maps, Settings(merge_threshold), "auto")
        check_type("labels", labels, PseudoLabels)
        for name in ("enc_labels", "dec_labels", "boundary", "interior"):
            check_shape(f"labels.{name}", getattr(labels, name), "B T H W", B=B, T=T, H=H, W=W)
            check_same_device(f"labels.{name}", getattr(labels, name), video=video)
        frames = as_bytes(enlarged(video, scale * size["h"], scale * size["w"]))
        gray = as_gray(frames)
        counted = maps.counted
        differs = as_index("labels.enc_labels", labels.enc_labels) != as_index("labels.dec_labels", labels.dec_labels)
        merged = overlay(gray, labels.enc_labels, alpha=alpha, valid=counted)
        rows = [
            frames,
            *(overlay(gray, one, alpha=alpha, valid=counted) for one in hard_labels(maps)),
            outline(merged, differs, width=scale),
            blended(gray, roles(labels, valid=counted), alpha),
        ]
        strips = torch.stack([filmstrip(row, gap=gap) for row in rows], dim=1)
        # transposed rows side by side are rows below each other
        return filmstrip(strips.mT, gap=gap).mT.contiguous()
