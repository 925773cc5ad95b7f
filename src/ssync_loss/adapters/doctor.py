"""Which of the tensors that a model returned are the two maps, how they lie, and what is wrong with them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssync_loss._checks import check_type
from ssync_loss.adapters._readings import Hints, Reading, grid_of
from ssync_loss.adapters._suspects import Role, Suspect, probabilities_of, suspects_in
from ssync_loss.adapters._values import sums_over
from ssync_loss.adapters._walk import Found, tensors_in
from ssync_loss.ssync.maps import Grid, Kind, check_grid
from ssync_loss.ssync.modules import SSyncLoss

MAX_SUSPECTS = 16
MAX_LINES = 6
# layouts that the losses read without being told
_PLAIN = ("b t s h w", "b t s (h w)")


@dataclass(frozen=True)
class Candidate:
    """A tensor that may be a map.

    Attributes:
        path: code that reaches it, such as ``outputs["decoder"]["masks"]``.
        shape: its shape.
        axes: the einops patterns that fit it; several where neither values nor other tensors decide. An axis "heads"
            has to go first, as the line shows.
        kind: "logits" or "probs".
        sums_over: what sums to a constant: "s", "heads s", or "h w", which is attention normalized over patches. None
            for logits, and where nothing does.
        requires_grad: whether it carries a gradient.
        role: "encoder" or "decoder" where its names or the other map tell, or "unknown".
        notes: sentences about it that ask for nothing.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    kind: Kind
    sums_over: str | None
    requires_grad: bool
    role: Role
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        axes = " or ".join(f'"{one}"' for one in self.axes)
        sums = f", sums over {self.sums_over} are constant" if self.sums_over else ""
        grad = "gradient" if self.requires_grad else "no gradient"
        head = f"{self.role}: {self.path} {self.shape}, axes {axes}, {self.kind}{sums}, {grad}"
        return "\n".join([head, *(f"    {note}" for note in self.notes)])


class Line(NamedTuple):
    """Two lines of code: ``criterion`` builds the loss, and ``call`` computes it of the outputs."""

    criterion: str
    call: str

    def __str__(self) -> str:
        return f"criterion = {self.criterion}\nloss = loss + {self.call}"


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`doctor` says; ``str()`` puts it in words.

    Attributes:
        candidates: tensors that may be maps.
        lines: what to write. Several where the outputs cannot tell which; none where a map is missing.
        problems: sentences, each with what to do.
        left_out: path and reason of the other floating-point tensors.
    """

    candidates: tuple[Candidate, ...]
    lines: tuple[Line, ...]
    problems: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def line(self) -> Line | None:
        """The line to write where there is only one."""
        return self.lines[0] if len(self.lines) == 1 else None

    def __str__(self) -> str:
        parts = ["Maps:" if self.candidates else "No maps."]
        parts += [_indent(one) for one in self.candidates]
        if self.left_out:
            parts += ["Not maps:", *(_indent(f"{path}: {reason}") for path, reason in self.left_out)]
        if self.problems:
            parts += ["Problems:", *(_indent(f"- {one}") for one in self.problems)]
        if self.lines:
            parts.append("Write:" if self.line else "Write one of these:")
            parts += [_indent(one) for one in self.lines]
        return "\n".join(parts)


def _indent(text: object) -> str:
    return "    " + str(text).replace("\n", "\n    ")


class _Pair(NamedTuple):
    """Readings of an encoder's and a decoder's map that go together."""

    enc: Suspect
    dec: Suspect
    enc_reading: Reading
    dec_reading: Reading
    frames: int | None
    cost: float


def doctor(
    outputs: object,
    *,
    video: Tensor | Sequence[int] | None = None,
    num_frames: int | None = None,
    num_slots: int | None = None,
    grid: Grid = None,
    criterion: SSyncLoss | None = None,
    name: str = "outputs",
) -> Diagnosis:
    """Say which tensors of a model's outputs may be its maps, what is wrong with them, and the line to write.

    For finding out once, not for training: it reads values on the host. It reads a bounded number of them (16 million
    of a tensor for its least and largest number, samples for the rest), computes no gradients and changes nothing.

    Shapes and values decide; names such as ``attn``, ``masks`` or ``decoder`` are hints. What sums to one over an axis
    has its slots there. Logits show no such thing: their layout follows from the other map, from what is given here,
    or is said to be open. Which map is the encoder's only names can tell.

    Args:
        outputs: tensors in mappings, sequences, named tuples, dataclasses or attributes of objects, to any sensible
            depth; also ``dict(enc_logits=..., dec_logits=...)``, to look at a call before it is made.
        video: what went in, or its shape: (B, T, ., H, W), or (B, ., H, W) for images. Gives B, T and the ratio H:W.
        num_frames: T.
        num_slots: S.
        grid: (H, W), or ((H, W), (H_d, W_d)), as for :class:`SSyncLoss`.
        criterion: the loss to be called; its ``kind``, ``axes`` and ``grid`` are compared with what is needed.
        name: of the outputs, in the code.

    Raises: TypeError, ValueError if a hint is none.

    >>> attention = torch.randn(2, 3, 16, 5).softmax(-1)  # slots last
    >>> found = doctor({"encoder": {"attn": attention}, "decoder": {"masks": torch.rand(6, 5, 8, 8).softmax(1)}})
    >>> print(found.line)
    criterion = SSyncLoss(kind="probs", axes=("b t (h w) s", "(b t) s h w"), grid=(4, 4))
    loss = loss + criterion(outputs["encoder"]["attn"], outputs["decoder"]["masks"])
    >>> found.problems
    ('Nothing here carries a gradient: was this a forward under no_grad? Look at one of training.',)
    """
    hints = _hints(video, num_frames, num_slots, grid)
    check_type("name", name, str)
    check_type("criterion", criterion, SSyncLoss, optional=True)
    with torch.no_grad():
        found = [one for one in tensors_in(outputs, name) if not isinstance(one.tensor, nn.Parameter)]
        suspects, reasons = suspects_in(found, hints)
        for one in suspects[MAX_SUSPECTS:]:
            reasons[one.path] = f"not looked at, after {MAX_SUSPECTS} others"
        return _Examination(found, suspects[:MAX_SUSPECTS], reasons, hints, criterion).diagnose()


def _hints(video: Tensor | Sequence[int] | None, num_frames: int | None, num_slots: int | None, grid: Grid) -> Hints:
    grids = tuple(one for one in check_grid(grid) if one is not None)
    if video is None:
        return Hints(None, num_frames, num_slots, grids)
    shape = tuple(video.shape) if isinstance(video, Tensor) else tuple(video)
    if len(shape) not in (4, 5) or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"`video` must have shape (B, T, ., H, W), or (B, ., H, W) for images; got {shape}.")
    frames = shape[1] if len(shape) == 5 else 1
    if num_frames not in (None, frames):
        raise ValueError(f"`num_frames` must be that of `video`, {frames}; got {num_frames}.")
    return Hints(shape[0], frames, num_slots, grids, (shape[-2], shape[-1]))
