"""A decoder's alpha logits, or any other output, from one forward hook."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ssync_loss.adapters._tap import Held, Tap


class OutputTap(Tap):
    """Take a tensor out of what a module of the host gives, such as the alpha logits of a decoder.

    A module that runs once on all frames gives the tensor as it is; one that runs frame by frame gives those
    of its calls stacked on dim 1. `SlotMaps.join` brings both to (B, T, S, ...). The rest is as `LogitTap` says.

    Args:
        module: the module with the output.
        select: takes the module's output and returns the tensor, slots before patches. Alpha logits in the
            last channel: ``lambda out: out[..., -1]``; attention (B, N, S): ``lambda out: out.mT``. If the
            host writes to the output later, let it return a clone.
        host: the module whose forward starts the tap afresh; contains ``module``.

    Raises: TypeError on an argument of another type, or a ``select`` that cannot be called; ValueError on a host that
        does not contain the module.

    >>> import torch
    >>> mlp = nn.Identity()
    >>> tap = OutputTap(mlp, lambda out: out[..., -1])
    >>> _ = mlp(torch.tensor([[[1.0, 2.0, 5.0], [3.0, 4.0, 6.0]]]))
    >>> tap.pop().tolist()
    [[5.0, 6.0]]
    """

    def __init__(self, module: nn.Module, select: Callable[[Any], Tensor], *, host: nn.Module | None = None) -> None:
        if not callable(select):
            raise TypeError(f"`select` must be callable; got {type(select).__name__}.")
        super().__init__(host, module=module)
        self._select = select
        self._handles.append(module.register_forward_hook(self._on_output))

    def reset(self) -> None:
        """Forget what was collected, and with it the graph."""
        self._outputs: list[Held] = []

    def pop(self) -> Tensor:
        """Return what was selected in the last forward, attached, and empty the tap; RuntimeError without one."""
        outputs = self._outputs
        self.reset()
        self._require("module", outputs)
        frames = [output.get() for output in outputs]
        return frames[0] if len(frames) == 1 else self._stack("module", frames)

    def _on_output(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if self._attached:
            self._outputs.append(Held.now(f"`select` on {self._places['module']}", self._select(output)))
