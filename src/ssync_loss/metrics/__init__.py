"""Metrics on hard slot labels, each with its definition in its name.

The usual definitions of a metric differ by 30 points and more on the same prediction. In this example two slots swap
their objects between two frames; the rest is correct:

>>> import torch
>>> target = torch.tensor([[[[0, 0, 1, 1, 2, 2]], [[0, 0, 1, 1, 2, 2]]]])
>>> pred = torch.tensor([[[[0, 0, 1, 1, 2, 2]], [[0, 0, 2, 2, 1, 1]]]])
>>> for metric in (video_fg_ari, image_fg_ari, video_mbo, image_mbo):
...     average = MetricAverage(metric, background=0)
...     average.update(pred, target)
...     print(average)
video_fg_ari(background=0) = -0.1667 over 1 videos
image_fg_ari(background=0) = 1.0000 over 2 frames
video_mbo(background=0) = 0.3333 over 1 videos
image_mbo(background=0) = 1.0000 over 2 frames

So print the definition with the number, as :class:`MetricAverage` does. Four choices make a definition:

==============  ==========================================  ==================================================
choice          here                                        effect
==============  ==========================================  ==================================================
unit            ``video_`` pools the pixels of a clip,      a video score punishes identity switches, a mean
                ``image_`` scores frames, then the mean;    over frames does not;
                ``j_and_f`` scores frames, but an object    J&F does
                keeps its slot
background      ``background=`` is always given: an id,     ``ari`` rewards a clean background, ``fg_ari``
                or None if there is no such id              ignores it
annotation      a negative target id drops the pixel        COCO drops pixels that two objects claim
                from truth and prediction
matching        ``mbo``: the best slot for each object,     a slot that covers two objects serves both in
                ``miou``: a slot for one object only;       mBO, one in mIoU; propagated labels are names of
                ``j_and_f``: ``matching=``                  objects, and need no matching
==============  ==========================================  ==================================================

**Labels.** ``pred`` and ``target`` are (B, T, H, W) integers. These are names, so any integer is allowed, but a
negative target id means "not annotated". A still image has T=1. ``masks_to_labels`` makes ``pred`` from soft masks,
``objects_to_labels`` makes ``target`` from one mask per object. Compare unmerged decoder masks: merged labels are
training targets. Every function returns (B,) float64.

**Video object segmentation.** ``j_and_f`` is DAVIS's J&F, the mean of ``region_similarity`` J (overlap) and
``contour_accuracy`` F (outline). It scores labels that are propagated from the first frame, with ``skip_first=1``, or
slots, with ``matching="hungarian"``.

**Background.** MOVi and DAVIS have an id for the background: ``background=0``. YouTube-VIS and COCO annotate only
objects. Their "ARI with background" *is* FG-ARI, and removing the first mask as background deletes an object. Use
``background=None`` if ids from 0 are objects and other pixels are -1. For overlaps use ``objects_to_labels`` and
``background=0``. Published mBO counts pixels outside all objects against the slots that cover them, but pixels of -1
are left out. A void id such as 255 is an object until it is mapped to -1.

**Nothing to score.** No function returns NaN. A video without an object has an FG-ARI of 1.0 (the denominator is 0)
and overlaps, J&F, recall and fragmentation of 0.0. Leave such videos out: ``has_objects`` finds them, and
:class:`MetricAverage` gives them weight 0. Some published code counts a frame without objects as 1.0, which raises a
mean over frames. J&F counts an object as 1.0 in frames where it is correctly absent.

**Precision.** Counts and scores are float64: 30 frames of 518 x 518 have up to 6e13 pairs of pixels. ``ari`` equals
scikit-learn's. These functions read data on the host, so use them in evaluation, not in a training step.
"""

from ssync_loss.metrics.accumulator import MetricAverage
from ssync_loss.metrics.ari import ari, fg_ari, image_ari, image_fg_ari, video_ari, video_fg_ari
from ssync_loss.metrics.jf import contour_accuracy, j_and_f, region_similarity
from ssync_loss.metrics.labels import has_objects, masks_to_labels, objects_to_labels
from ssync_loss.metrics.overlap import image_mbo, image_miou, mean_best_overlap, mean_iou, video_mbo, video_miou
from ssync_loss.metrics.slots import fragmentation, object_recall, unused_slots

__all__ = [
    "MetricAverage",
    "ari",
    "contour_accuracy",
    "fg_ari",
    "fragmentation",
    "has_objects",
    "image_ari",
    "image_fg_ari",
    "image_mbo",
    "image_miou",
    "j_and_f",
    "masks_to_labels",
    "mean_best_overlap",
    "mean_iou",
    "object_recall",
    "objects_to_labels",
    "region_similarity",
    "unused_slots",
    "video_ari",
    "video_fg_ari",
    "video_mbo",
    "video_miou",
]
