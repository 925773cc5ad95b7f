"""What :func:`ssync_loss.adapters.doctor` returns, and its text."""

from dataclasses import dataclass
from typing import NamedTuple

from ssync_loss.adapters._doctor.suspects import Role
from ssync_loss.ssync.maps import Kind

SHOWN = 8


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
            parts += [_indent(one) for one in self.lines[:SHOWN]]
            parts += [f"and {len(self.lines) - SHOWN} more."] if len(self.lines) > SHOWN else []
        return "\n".join(parts)


def _indent(text: object) -> str:
    return "    " + str(text).replace("\n", "\n    ")
