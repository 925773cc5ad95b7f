"""Evaluation of a trained model: the scores of its masks, and whether the premise of the loss holds."""

from collections.abc import Callable
from math import isnan
from typing import Any, NamedTuple

import torch
from examples.slot_model import SlotModel
from torch import Tensor

from ssync_loss.diagnostics import Premise, agreement, premise, slots_in_use, summary
from ssync_loss.functional import pseudo_labels
from ssync_loss.metrics import (
    MetricAverage,
    fragmentation,
    masks_to_labels,
    object_recall,
    video_ari,
    video_fg_ari,
    video_mbo,
)

BATCH = 50


class EvaluationSet(NamedTuple):
    """Clips to score.

    Shape:
        video: (B, T, 3, H, W). features: (B, T, D, H/4, W/4).
        ids: (B, T, H, W), or None without ground truth.
    """

    video: Tensor
    features: Tensor
    ids: Tensor | None


class Asked(NamedTuple):
    """Clips to check the premise on.

    Shape:
        features: (B, T, D, h, w).
        groups: (B,), the video of every clip, or None if every clip is a video.
    """

    features: Tensor
    groups: Tensor | None = None


@torch.no_grad()
def maps_of(model: SlotModel, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the encoder and decoder logits (B, T, S, h, w) of all clips."""
    outputs = [model(batch) for batch in torch.split(features, BATCH)]
    return torch.cat([o.enc_logits for o in outputs]), torch.cat([o.dec_logits for o in outputs])


def evaluate(model: SlotModel, data: EvaluationSet, threshold: float | None) -> dict[str, float]:
    """Score the unmerged masks per clip at the size of the video, and average over clips.

    Ground truth allows FG-ARI, ARI, mBO (of objects, without the background), recall and fragmentation. The other
    scores are the slots in use (they win a pixel of the clip), the agreement of both maps, the shares of boundary and
    interior, and the merges.
    """
    enc, dec = maps_of(model, data.features)
    height, width = data.video.shape[-2:]
    enc_masks, dec_masks = (masks_to_labels(logits, (height, width)) for logits in (enc, dec))
    labels = pseudo_labels(enc, dec, merge_threshold=threshold)
    taught = summary(labels)
    per_clip = {
        "dec_slots": slots_in_use(dec_masks),
        "enc_slots": slots_in_use(enc_masks),
        "agreement": agreement(enc.argmax(dim=2), dec.argmax(dim=2)),
        "boundary_share": taught.boundary_share,
        "interior_share": taught.interior_share,
        "merges": taught.merges,
    }
    scores = {name: values.double().mean().item() for name, values in per_clip.items()}
    ids = data.ids
    if ids is None:
        return scores

    def average(metric: Callable[..., Tensor], predicted: Tensor, **options: Any) -> float:
        mean = MetricAverage(metric, **options)
        mean.update(predicted, ids)
        return mean.compute().item()

    return scores | {
        "dec_fg_ari": average(video_fg_ari, dec_masks, background=0),
        "dec_ari": average(video_ari, dec_masks),
        "dec_mbo": average(video_mbo, dec_masks, background=0),
        "dec_recall": average(object_recall, dec_masks, background=0),
        "dec_fragmentation": average(fragmentation, dec_masks, background=0),
        "enc_fg_ari": average(video_fg_ari, enc_masks, background=0),
        "enc_ari": average(video_ari, enc_masks),
        "enc_mbo": average(video_mbo, enc_masks, background=0),
    }


def ask_premise(model: SlotModel, asked: Asked, threshold: float | None) -> Premise:
    """Check whether SSync's premise holds for the model, without ground truth."""
    enc, dec = maps_of(model, asked.features)
    return premise(enc, dec, asked.features, merge_threshold=threshold, groups=asked.groups)


def premise_summary(verdict: Premise) -> dict[str, Any]:
    """Reduce a verdict to means over clips, with the standard errors of both margins over videos."""
    summary: dict[str, Any] = {}
    for name, values in verdict._asdict().items():
        if name not in {"holds", "measured", "groups"}:
            mean = verdict.over_clips(values)
            summary[name] = mean.value
            if name.endswith("margin"):
                summary[f"{name}_standard_error"] = 0.0 if isnan(mean.error) else mean.error
    mean = verdict.over_clips(verdict.margin)
    return {
        **summary,
        "num_clips": mean.num_clips,
        "num_videos": mean.num_videos,
        "holds": bool(verdict.holds),
        "verdict": verdict.verdict(),
    }
