"""The module base, under the name that the SSync modules import."""

from ssync_loss._module import DetachedWarning, settings_of, shown_settings

__all__ = ["DetachedWarning", "settings_of", "shown_settings"]
