"""Base of all modules of losses: settings by name, a repr, and a warning of detached maps."""

import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ssync_loss._checks import check_tensor
from ssync_loss._settings import check_by

if TYPE_CHECKING:
    from typing import ParamSpec, Protocol

    P = ParamSpec("P")

    class _HasForward(Protocol[P]):
        def forward(self, *args: P.args, **kwargs: P.kwargs) -> Tensor: ...


class LossModule(nn.Module):
    """A loss that keeps its settings, the keyword arguments of its constructor, as attributes.

    A subclass passes its settings to ``super().__init__``, or calls ``self.remember(locals())``. It names the check of
    its settings: ``class A(LossModule, check=...)``.

    >>> from ssync_loss import TemporalSlotContrastLoss
    >>> criterion = TemporalSlotContrastLoss(temperature=0.2)
    >>> criterion
    TemporalSlotContrastLoss(temperature=0.2)
    >>> criterion.temperature = 0.5
    >>> criterion.settings
    {'temperature': 0.5, 'kind': 'adjacent', 'negatives': 'batch'}
    """

    check_settings: Callable[..., None] = staticmethod(check_by())

    _defaults: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, *, check: Callable[..., None] | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if check is not None:
            cls.check_settings = staticmethod(check)
        # a host's subclass may have another constructor; its settings are those of the parent
        if cls.__module__.partition(".")[0] == "ssync_loss":
            cls._defaults = cls.__init__.__kwdefaults__ or {}

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.check_settings(**settings)
        for name, value in settings.items():
            setattr(self, name, value)

    def remember(self, arguments: dict[str, Any]) -> None:
        """Call ``__init__`` with the settings among ``arguments``, the ``locals()`` of a constructor."""
        LossModule.__init__(self, **{name: arguments[name] for name in self._defaults})

    @property
    def settings(self) -> dict[str, Any]:
        """The current settings by name."""
        return {name: getattr(self, name) for name in type(self)._defaults}

    def extra_repr(self) -> str:
        """Show the settings that differ from the defaults, and always the merge threshold."""
        return ", ".join(
            f"{name}={value!r}"
            for name, value in self.settings.items()
            if name == "merge_threshold" or value != self._defaults[name]
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load a pickle; version 0.1.0 kept settings of some losses in a dictionary, and lacked later settings."""
        super().__setstate__({**state, **state.get("settings", {})})  # type: ignore[no-untyped-call]
        self.__dict__.pop("settings", None)
        for name, value in self._defaults.items():
            if not hasattr(self, name):
                setattr(self, name, value)

    # nn.Module types calls as Any, and attributes as tensors or modules
    if TYPE_CHECKING:

        def __call__(self: "_HasForward[P]", *args: P.args, **kwargs: P.kwargs) -> Tensor:
            """Run ``forward``."""

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...


class DetachedWarning:
    """Warns once of a student without a gradient, in training mode with gradients enabled.

    In compiled code it does nothing.
    """

    def __init__(self) -> None:
        self.said = False

    def __call__(self, module: nn.Module, **taught: tuple[Tensor, str]) -> None:
        """Check students by name, each with the term that teaches it."""
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
                "teaches nothing there. Does the model detach the map, or use a checkpoint with use_reentrant=True? If "
                "this is intended, switch the term off. (Said once.)",
                stacklevel=_callers_stacklevel(),
            )


def _callers_stacklevel() -> int:
    """Return the ``stacklevel`` of the caller outside this package and torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("ssync_loss", "torch"):
        frame, level = frame.f_back, level + 1
    return level
