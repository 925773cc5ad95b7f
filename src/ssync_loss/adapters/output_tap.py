"""A decoder's alpha logits, or any other output, from one forward hook."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ssync_loss._axes import arrange, parse
from ssync_loss._checks import check_int
from ssync_loss._compilers import is_traced
from ssync_loss.adapters._tap import Tap, count

_VIEWS = "Transpose", "Permute", "Select", "Slice", "Squeeze", "Unsqueeze", "View", "UnsafeView"


class OutputTap(Tap):
    """Take a tensor out of what a module of the host gives, such as the alpha logits of a decoder.

    Without ``axes``, a module that runs once on all frames gives the tensor as it is, and one that runs frame by frame
    those of its calls stacked on dim 1; `SlotMaps.join` brings both to (B, T, S, ...). With ``axes``, `pop` gives
    (B, T, S, N) or (B, T, S, H, W); without ``t`` in it, calls are frames. The rest is as `LogitTap` says.

    Args:
        module: the module with the output.
        select: takes the module's output and returns the tensor, by default all of it. Alpha logits in the
            last channel: ``lambda out: out[..., -1]``. If the host writes to the output later, let it return a clone.
        axes: which axis of the tensor is which, in einops' notation over b, t, s, h, w: ``"(b t) s (h w)"``, say, or
            ``"(b t s) h w"``. Without, slots come before patches: select attention (B, N, S) by ``lambda out: out.mT``.
        host: the module whose call starts the tap afresh and ends it; contains ``module``, or is it.
        num_frames: in place of ``host``, T of what is popped: the tap keeps no more. Without ``axes`` it counts calls,
            so it is 1 if one holds all frames.

    Raises: TypeError on an argument of another type, or a ``select`` that cannot be called; ValueError on a setting
        out of range, or a host that does not contain the module.

    >>> import torch
    >>> mlp = nn.Identity()
    >>> tap = OutputTap(mlp, lambda out: out[..., -1])
    >>> _ = mlp(torch.tensor([[[1.0, 2.0, 5.0], [3.0, 4.0, 6.0]]]))
    >>> tap.pop().tolist()
    [[5.0, 6.0]]
    >>> tap = OutputTap(mlp, axes="(b t) (h w) s")
    >>> _ = mlp(torch.zeros(6, 25, 4))
    >>> tap.pop(num_frames=3).shape
    torch.Size([2, 3, 4, 25])
    """

    # a copy keeps no other
    _axes: str | None = None

    def __init__(
        self,
        module: nn.Module,
        select: Callable[[Any], Tensor] | None = None,
        *,
        axes: str | None = None,
        host: nn.Module | None = None,
        num_frames: int | None = None,
    ) -> None:
        if select is not None and not callable(select):
            raise TypeError(f"`select` must be callable; got {type(select).__name__}.")
        # a call with a time axis is a clip
        self._whole = axes is not None and any("t" in group for group in parse(axes))
        super().__init__(host, num_frames, module=(module, self._on_output))
        self._select, self._axes = select, axes

    @property
    def _by_frame(self) -> bool:
        """Whether it holds frames, whose slots may stand in the batch."""
        return self._axes is None and len(self._calls) > 1

    def pop(self, *, num_frames: int | None = None, num_slots: int | None = None) -> Tensor:
        """Return what was selected in the last forward, attached, and empty the tap.

        ``num_frames``, T, and ``num_slots``, S, are for ``axes``: sizes that an output does not show, and checks.

        Raises: RuntimeError if nothing was collected, or the calls do not make one clip; ValueError if an output is
            not as ``axes`` say, or has NaN for its gradient.
        """
        for name, size in (("num_frames", num_frames), ("num_slots", num_slots)):
            if size is not None:
                check_int(name, size, 1)
                if self._axes is None:
                    raise ValueError(f"`{name}` must be None without `axes`; got {size}.")
        frames = [call.get() for call in self._take("module")]
        if not is_traced() and any(map(is_log_of_zero, frames)):
            raise ValueError(
                f"`select` on {self._places['module']} must give logits or probabilities; got the log() of a "
                "probability of 0, whose gradient is NaN. Leave the log() out, and give the loss kind='probs'."
            )
        if self._whole and len(frames) > 1:
            raise RuntimeError(
                f"{self._places['module']} gave {len(frames)} clips, one is wanted ({count(frames)}): "
                f"{self._leftovers()}."
            )
        if self._axes is not None and self._whole:
            return arrange(
                "module", frames[0], self._axes, num_frames=num_frames or self._num_frames, num_slots=num_slots
            )
        self._check_frames("module", len(frames))
        if self._axes is None:
            return frames[0] if len(frames) == 1 else self._stack("module", frames)
        clip = self._stack("module", [arrange("module", one, self._axes, num_slots=num_slots) for one in frames])
        if num_frames not in (None, len(frames)):
            raise RuntimeError(f"{self._places['module']} gave {len(frames)} frames where `num_frames`={num_frames}.")
        return clip.squeeze(2)

    def _on_output(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if self._listens():
            selected = output if self._select is None else self._select(output)
            limit = 1 if self._whole and not self._hosted else self._num_frames
            self._hold(f"`select` on {self._places['module']}", selected, limit)


def is_log_of_zero(selected: Tensor) -> bool:
    """Say whether a tensor is a logarithm, or a view of one, and -inf somewhere; another's values are not read."""
    made_by = selected.grad_fn
    while made_by is not None and made_by.name().startswith(_VIEWS):
        made_by = made_by.next_functions[0][0]
    return made_by is not None and made_by.name() == "LogBackward0" and bool(selected.isneginf().any())
