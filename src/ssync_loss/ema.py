"""A teacher that is the student's recent past: an exponential moving average of its parameters."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ssync_loss._checks import check_int, check_number


class EmaTeacher(nn.Module):
    """Hold a copy of a model whose parameters follow those of the model.

    ``teacher = momentum * teacher + (1 - momentum) * student``, at every :meth:`update`, after the optimizer's step.
    The copy stays in evaluation mode, computes without gradient, and none of its parameters asks for one::

        teacher = EmaTeacher(model)
        targets = teacher(views)  # what the copy returns, without gradient
        ...
        optimizer.step()
        teacher.update(model)

    The momentum is constant, or rises from ``momentum`` to ``final_momentum`` along half a cosine in ``num_steps``
    updates, whose number is in the ``state_dict``. There is no collective: under DDP every rank keeps its own, outside
    of the wrapper. Wrapped and compiled students are looked into. The copy may be compiled, :meth:`update` not.

    Args:
        model: the student; a deep copy is taken.
        momentum: share of the past. Published: 0.999, constant (SMTC); from 0.996 to 1 (INO).
        final_momentum: where it ends, or None for a constant.
        num_steps: when it ends there, with ``final_momentum`` only.
        copy_buffers: whether buffers, such as the statistics of a batch norm, become those of the student.
        skip: pieces of names; parameters and buffers whose name contains one stay as they were.

    Source: Tarvainen & Valpola, NeurIPS 2017; settings of Qian et al., ICCV 2023 (arXiv:2308.09951), and of Pan et al.,
        ACM MM 2022 (arXiv:2203.15312); the cosine of Grill et al., NeurIPS 2020.
    Raises: TypeError if the model is no module, or has parameters in a half, whose last digit is more than what is
        added; ValueError on wrong settings, or when the student's parameters are not those of the teacher.

    >>> student = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(student.weight)
    >>> teacher = EmaTeacher(student, momentum=0.9)
    >>> _ = nn.init.ones_(student.weight)
    >>> teacher.update(student), teacher.update(student)
    (None, None)
    >>> round(teacher(torch.ones(1)).item(), 4)  # 1 - 0.9^2
    0.19
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        momentum: float = 0.999,
        final_momentum: float | None = None,
        num_steps: int | None = None,
        copy_buffers: bool = False,
        skip: Sequence[str] = (),
    ) -> None:
        super().__init__()
        check_number("momentum", momentum, 0.0, 1.0)
        if (final_momentum is None) != (num_steps is None):
            raise ValueError(
                "`final_momentum` and `num_steps` must be given together; "
                f"got final_momentum={final_momentum}, num_steps={num_steps}."
            )
        if final_momentum is not None:
            check_number("final_momentum", final_momentum, 0.0, 1.0)
            check_int("num_steps", num_steps, 1)
        if isinstance(skip, str):
            raise TypeError(f"`skip` must be a sequence of names; got the string {skip!r}.")
        self.momentum, self.final_momentum, self.num_steps = momentum, final_momentum, num_steps
        self.copy_buffers, self.skip = copy_buffers, tuple(skip)
        self.num_updates = 0
        self.model = deepcopy(_bare(model)).requires_grad_(False).eval()
        _check_widths(self.model)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the copy makes of the arguments, without gradient."""
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Draw the copy to the student, once for every step of the optimizer."""
        model = _bare(model)
        _check_widths(self.model)
        parameters = self._pairs(self.model.named_parameters(), model.named_parameters())
        buffers = self._pairs(self.model.named_buffers(), model.named_buffers())
        if parameters:
            # a student on another device, or in a half, is brought over
            teachers, students = zip(*((one, other.to(one)) for one, other in parameters), strict=True)
            get_ema_multi_avg_fn(self.current_momentum())(list(teachers), list(students), None)
        if self.copy_buffers:
            for teacher, student in buffers:
                teacher.copy_(student)
        self.num_updates += 1

    def _pairs(
        self, teacher: Iterable[tuple[str, Tensor]], student: Iterable[tuple[str, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Pair tensors by name, all but those that are skipped."""
        ours, theirs = dict(teacher), dict(student)
        wanted, given = ({name: tuple(one.shape) for name, one in some.items()} for some in (ours, theirs))
        for name in wanted | given:
            if wanted.get(name) != given.get(name):
                raise ValueError(
                    f"`model` must have the tensors of the teacher, for {name} shape {wanted.get(name)}; "
                    f"got {given.get(name)}."
                )
        return [(one, theirs[name]) for name, one in ours.items() if not any(piece in name for piece in self.skip)]

    def current_momentum(self) -> float:
        """Return the momentum of the next update."""
        if self.final_momentum is None or self.num_steps is None:
            return self.momentum
        progress = min(self.num_updates / self.num_steps, 1.0)
        return self.final_momentum + (self.momentum - self.final_momentum) * (1 + cos(pi * progress)) / 2

    def train(self, mode: bool = True) -> "EmaTeacher":  # noqa: ARG002 (torch's name)
        """Stay in evaluation mode, whatever is asked for."""
        return super().train(False)

    def get_extra_state(self) -> dict[str, int]:
        """Return what the ``state_dict`` holds beside tensors."""
        return {"num_updates": self.num_updates}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Take up what :meth:`get_extra_state` returned."""
        self.num_updates = state["num_updates"]

    def extra_repr(self) -> str:
        """Show the settings."""
        names = ("momentum", "final_momentum", "num_steps", "copy_buffers", "skip")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _bare(model: object) -> nn.Module:
    """Take a module out of what data parallelism and compilation wrap around it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a module; got {type(model).__name__}.")
    wrapped = isinstance(model, (DistributedDataParallel, DataParallel))
    inner = model.module if wrapped else getattr(model, "_orig_mod", None)
    return model if inner is None else _bare(inner)


def _check_widths(model: nn.Module) -> None:
    for name, one in model.named_parameters():
        if one.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"`model` must have parameters of 32 or 64 bits to be averaged; got {one.dtype} in {name}. "
                "Keep them in float32 and compute under autocast."
            )
