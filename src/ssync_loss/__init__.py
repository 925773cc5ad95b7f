"""Losses for video object-centric learning: SSync as one line.

>>> from ssync_loss import SSyncLoss
>>> criterion = SSyncLoss(merge_threshold=0.6)  # loss = loss + criterion(enc_logits, dec_logits)

Besides the losses there are:

- :mod:`ssync_loss.functional`: all functions: labels, regions, overlap, merging, losses.
- :mod:`ssync_loss.adapters`: ``attach`` and ``doctor`` find the maps of a model; taps record them.
- :mod:`ssync_loss.diagnostics`: a test of the premise, and statistics of labels, without ground truth.
- :mod:`ssync_loss.monitor`: numbers and pictures of a training run, for TensorBoard, Lightning, W&B or a folder.
- :mod:`ssync_loss.metrics`: FG-ARI, ARI, mBO, mIoU, J&F, object recall, fragmentation, unused slots.
- :mod:`ssync_loss.visualize`: overlays, panels, and the student of every patch.
- :mod:`ssync_loss.distributed`: the mean over all ranks.
- :mod:`ssync_loss.curriculum`, :mod:`ssync_loss.attention`, :mod:`ssync_loss.ema`: parts of neighboring methods.
- :mod:`ssync_loss.testing`: the slow reference and hypothesis strategies, for your own tests.
- :mod:`ssync_loss.env`: ``python -m ssync_loss.env`` describes the machine for a bug report.

This example computes values for a log, both terms from the same labels, a score, and a picture:

>>> import torch
>>> from ssync_loss import BoundaryRefinementLoss, InteriorDenoisingLoss
>>> from ssync_loss.diagnostics import summary
>>> from ssync_loss.metrics import MetricAverage, masks_to_labels, video_fg_ari
>>> from ssync_loss.visualize import panel
>>> enc_logits, dec_logits = torch.randn(2, 2, 4, 7, 16, 16).requires_grad_()
>>> terms = criterion.terms(enc_logits, dec_logits)  # tensors: nothing waits for a device
>>> logs = {"boundary": terms.boundary, "interior": terms.interior, **summary(terms.labels)._asdict()}
>>> boundary = BoundaryRefinementLoss()(enc_logits, dec_logits, labels=terms.labels)
>>> interior = InteriorDenoisingLoss()(enc_logits, dec_logits, labels=terms.labels)
>>> torch.allclose(boundary + interior, terms.total)
True
>>> average = MetricAverage(video_fg_ari, background=0)
>>> average.update(masks_to_labels(dec_logits, (64, 64)), torch.randint(0, 3, (2, 4, 64, 64)))
>>> panel(torch.rand(2, 4, 3, 64, 64), enc_logits, dec_logits, labels=terms.labels).dtype
torch.uint8
"""

from ssync_loss import _moved, losses
from ssync_loss.losses import *  # noqa: F403 (their names are in `losses.__all__`)
from ssync_loss.ssync.types import PseudoLabels

__version__ = "0.2.0"

_moved.install()

__all__ = ["PseudoLabels", "__version__"]
__all__ += losses.__all__
