"""What the SSync modules take until they have the module base."""

from typing import Any

from torch import nn

from ssync_loss._module import DetachedWarning

__all__ = ["DetachedWarning", "settings_of", "shown_settings"]


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
