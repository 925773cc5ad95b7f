"""A metric and a callback for RandSF.Q, SmoothSA, xSSC and related hosts, whose configurations are Python.

A configuration gets these lines::

    from object_centric_bench import learn

    SSyncMetric, SSyncMaps = for_host(learn)
    loss_fn["ssync"] = ssync_term(SSyncMetric, start_step=15000)  # xSSC has loss_fn_t and loss_fn_v
    callback_t.insert(1, dict(type=SSyncMaps))
    callback_v.insert(1, dict(type=SSyncMaps))

The callback writes the maps of every forward pass into ``output``. The encoder map holds dots, not probabilities. xSSC
also has ``valid``, the frames that are decoded from their own slots. A metric returns (loss (b,), valid (b,)), b = 1.
"""

from typing import Any

import torch
from torch import Tensor

from ssync_loss import SSyncLoss
from ssync_loss.adapters import attach


def for_host(learn: Any) -> tuple[type, type]:
    """Return a metric and a callback that subclass the host's."""

    class SSyncMetric(learn.metric.Metric):  # type: ignore[misc]
        def __init__(self, **settings: Any) -> None:
            super().__init__()
            self.criterion = SSyncLoss(**settings)

        def forward(
            self, enc_logits: Tensor, dec_logits: Tensor, step: int, valid: Tensor | None, slot_mask: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            loss = self.criterion(enc_logits, dec_logits, step=step, valid=valid, slot_mask=slot_mask)[None]
            return loss, torch.ones_like(loss, dtype=torch.bool)

    class SSyncMaps(learn.Callback):  # type: ignore[misc]
        def before_epoch(self, **pack: Any) -> None:
            self.maps = attach(pack["model"])

        def after_forward(self, **pack: Any) -> None:
            pack["output"].update(**self.maps())

        def after_epoch(self, **_: Any) -> None:
            self.maps.remove()

    return SSyncMetric, SSyncMaps


def ssync_term(metric: type, *, weight: float = 1.0, **settings: Any) -> dict[str, Any]:
    """Return the entry of ``loss_fn``. Its maps are None where the host has none, such as a slot mask."""
    names = ("enc_logits", "dec_logits", "valid", "slot_mask")
    paths = {name: f"output.{name}" for name in names}
    return {"metric": {"type": metric, **settings}, "map": {**paths, "step": "step_count"}, "weight": weight}
