"""What modules of losses have in common: settings by name, a repr, and a word when nothing can be taught."""

import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ssync_loss._checks import check_tensor


def settings_of(module: nn.Module, owner: type[nn.Module]) -> dict[str, Any]:
    """Return the arguments of the owner's constructor; the module keeps each under its own name.

    The owner is named because a subclass may have a constructor of its own.
    """
    return {name: getattr(module, name) for name in owner.__init__.__kwdefaults__ or {}}


def shown_settings(module: nn.Module, owner: type[nn.Module]) -> str:
    """Return the settings that differ from the defaults, and the merge threshold always."""
    defaults = owner.__init__.__kwdefaults__ or {}
    shown = {
        name: value
        for name, value in settings_of(module, owner).items()
        if name == "merge_threshold" or value != defaults[name]
    }
    return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class DetachedWarning:
    """Warns, once, when a map that is to be taught carries no gradient.

    Only in training mode with gradients enabled; a compiled step is not interrupted.
    """

    def __init__(self) -> None:
        self.said = False

    def __call__(self, module: nn.Module, **taught: tuple[Tensor, str]) -> None:
        """Look at maps by name, each with the term that teaches it."""
        if torch.compiler.is_compiling() or self.said or not module.training or not torch.is_grad_enabled():
            return
        detached = []
        for name, (maps, term) in taught.items():
            check_tensor(name, maps)
            if not maps.requires_grad:
                detached.append(f"`{name}` (taught by the {term} term)")
        if detached:
            self.said = True
            warnings.warn(
                f"{' and '.join(detached)} {'carries' if len(detached) == 1 else 'carry'} no gradient, so SSync "
                "teaches nothing there. Does the model detach? If that is meant, switch the term off. (Said once.)",
                stacklevel=_callers_stacklevel(),
            )


def _callers_stacklevel() -> int:
    """Return the ``stacklevel`` that points at the user's line, below frames of this package and of torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("ssync_loss", "torch"):
        frame, level = frame.f_back, level + 1
    return level
