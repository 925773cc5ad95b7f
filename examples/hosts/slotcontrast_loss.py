"""A YAML loss for SlotContrast, VideoSAUR, SSync, SRL and SlotCurri. Their ``train.py`` does not change.

::

    RUN=slotcontrast.train python examples/hosts/slotcontrast_loss.py configs/slotcontrast/ytvis.yaml

adds the loss to the losses of that module's package, then runs the module. A configuration can then say

.. code-block:: yaml

    model:
      losses:
        loss_ssync: {name: SSync, merge_threshold: 0.6, start_step: 30000}
      loss_weights:
        loss_ssync: 1.0

next to its other losses. The settings are those of `SSyncLoss`. The loss takes the arguments that the host gives every
loss, and returns a scalar. It adds nothing to the checkpoint, so old checkpoints load. The host's outputs are
probabilities, so the loss reads the dots from the model, as published.
"""

import os
import runpy
from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor

from ssync_loss import SSyncLoss
from ssync_loss.adapters import attach


def register(package: str) -> None:
    """Add ``SSync`` to the losses of a package, and attach it to the models that the package builds."""
    losses, models = (import_module(f"{package}.{name}") for name in ("losses", "models"))
    build = models.build

    class SSync(losses.Loss):  # type: ignore[misc, name-defined]
        def __init__(
            self,
            pred_key: str,
            target_key: str,
            video_inputs: bool = False,
            patch_inputs: bool = True,
            target_transform: Any = None,
            **settings: Any,
        ) -> None:
            super().__init__(pred_key, target_key, video_inputs, patch_inputs, target_transform=target_transform)
            self.criterion = SSyncLoss(**settings)

        def get_target(self, *_: Any) -> None: ...

        def get_prediction(self, *_: Any) -> None: ...

        def forward(self, *_: Any, **__: Any) -> Tensor:
            return self.criterion(**self.maps(), step=self.step())

    def build_attached(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        for loss in model.loss_fns.values():
            if isinstance(loss, SSync):
                loss.maps, loss.step = attach(model), partial(getattr, model, "global_step")
        return model

    losses.SSync, models.build = SSync, build_attached  # type: ignore[attr-defined]


if __name__ == "__main__":
    # Lightning starts processes for other GPUs, and these inherit the environment
    module = os.environ.get("RUN", "slotcontrast.train")
    register(module.rpartition(".")[0])
    runpy.run_module(module, run_name="__main__")
