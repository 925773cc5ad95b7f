"""A teacher whose parameters are an exponential moving average of the student's."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ssync_loss._checks import check_flag, check_int, check_number, read_numbers

# types that can hold an average; half precision cannot, and integers and bools are copied
AVERAGED = (torch.float32, torch.float64, torch.complex64, torch.complex128)


class EmaTeacher(nn.Module):
    """Hold a copy of a model, whose parameters are a moving average of the model's parameters.

    ``teacher = momentum * teacher + (1 - momentum) * student`` at every :meth:`update`, after the optimizer's step. The
    copy stays in evaluation mode and computes without gradient::

        teacher = EmaTeacher(model)
        targets = teacher(views)  # the output of the copy, without gradient
        ...
        optimizer.step()
        teacher.update(model)

    Integers and bools are copied from the student. Where the student is NaN or infinite, the teacher does not change;
    ``num_left_out`` counts the tensors with such numbers and is not saved.

    The momentum is constant, or rises from ``momentum`` to ``final_momentum`` along half a cosine in ``num_steps``
    updates. The ``state_dict`` holds the number of updates. Under DDP every rank keeps a teacher, outside of the
    wrapper, and no collective is called. Wrapped and compiled students are unwrapped. The copy may be compiled, but not
    :meth:`update`. Shard a student (FSDP2) only after making its teacher. Every update then gathers the student, one
    parameter at a time, on all ranks, unless ``fully_shard(teacher.model)`` has sharded the teacher, too.

    Args:
        model: the student; it is deep-copied.
        momentum: weight of the teacher. Published: 0.999, constant (SMTC); from 0.996 to 1 (INO).
        final_momentum: the last momentum, or None for a constant momentum.
        num_steps: number of updates to ``final_momentum``.
        copy_buffers: whether to copy buffers, such as the statistics of a batch norm, from the student.
        skip: parts of names; parameters and buffers whose name contains such a part do not change.

    Source: Tarvainen & Valpola, NeurIPS 2017; settings of Qian et al., ICCV 2023 (arXiv:2308.09951), and of Pan et al.,
        ACM MM 2022 (arXiv:2203.15312); the cosine of Grill et al., NeurIPS 2020.
    Raises: TypeError if the model is no module or cannot be copied, or if it has half-precision parameters that are not
        skipped (they are too coarse for an average); ValueError on wrong settings, or if the names or shapes of the
        student's tensors differ from the teacher's.

    >>> student = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(student.weight)
    >>> teacher = EmaTeacher(student, momentum=0.9)
    >>> _ = nn.init.ones_(student.weight)
    >>> teacher.update(student), teacher.update(student)
    (None, None)
    >>> round(teacher(torch.ones(1)).item(), 4)  # 1 - 0.9^2
    0.19
    """

    num_left_out: Tensor

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
        check_flag("copy_buffers", copy_buffers)
        if isinstance(skip, str):
            raise TypeError(f"`skip` must be a sequence of names; got the string {skip!r}.")
        if not isinstance(skip, Sequence) or not all(isinstance(one, str) for one in skip):
            raise TypeError(f"`skip` must be a sequence of names; got {skip!r}.")
        self.momentum, self.final_momentum, self.num_steps = momentum, final_momentum, num_steps
        self.copy_buffers, self.skip = copy_buffers, tuple(skip)
        self.num_updates = 0
        self.model = _copied(_bare(model))
        self._check_widths()
        with torch.inference_mode(False):
            self.register_buffer("num_left_out", torch.zeros((), dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the copy, without gradient."""
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the copy toward the student, once for every step of the optimizer."""
        model = _bare(model)
        self._check_widths()
        parameters = self._pairs(self.model.named_parameters(), model.named_parameters())
        buffers = self._pairs(self.model.named_buffers(), model.named_buffers()) if self.copy_buffers else []
        weight = 1 - self.current_momentum()
        for pairs, share in ((parameters, weight), (buffers, 1.0)):
            for teacher, student in pairs:
                left_out = _move(*_on_this_rank(teacher, student), share)
                if left_out is not None:
                    # the count moves to the device, so that nothing waits
                    self.num_left_out = self.num_left_out.to(left_out.device).add_(left_out)
        self.num_updates += 1

    def _pairs(
        self, teacher: Iterable[tuple[str, Tensor]], student: Iterable[tuple[str, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Pair tensors by name, without skipped tensors."""
        ours, theirs = dict(teacher), dict(student)
        wanted, given = ({name: tuple(one.shape) for name, one in some.items()} for some in (ours, theirs))
        for name in wanted | given:
            if wanted.get(name) != given.get(name):
                raise ValueError(
                    f"`model` must have the tensors of the teacher, for {name} shape {wanted.get(name)}; "
                    f"got {given.get(name)}."
                )
        return [(one, theirs[name]) for name, one in ours.items() if not self._is_skipped(name)]

    def current_momentum(self) -> float:
        """Return the momentum of the next update."""
        if self.final_momentum is None or self.num_steps is None:
            return self.momentum
        progress = min(self.num_updates / self.num_steps, 1.0)
        return self.final_momentum + (self.momentum - self.final_momentum) * (1 + cos(pi * progress)) / 2

    def train(self, mode: bool = True) -> "EmaTeacher":  # noqa: ARG002 (torch's name)
        """Stay in evaluation mode."""
        return super().train(False)

    def get_extra_state(self) -> dict[str, int]:
        """Return the entries of the ``state_dict`` that are no tensors."""
        return {"num_updates": self.num_updates}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Load the result of :meth:`get_extra_state`."""
        self.num_updates = state["num_updates"]

    def extra_repr(self) -> str:
        """Show the settings."""
        names = ("momentum", "final_momentum", "num_steps", "copy_buffers", "skip")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _is_skipped(self, name: str) -> bool:
        return any(piece in name for piece in self.skip)

    def _check_widths(self) -> None:
        for name, one in self.model.named_parameters():
            is_short = one.is_floating_point() or one.is_complex()
            if is_short and one.dtype not in AVERAGED and not self._is_skipped(name):
                raise TypeError(
                    f"`model` must have parameters of 32 or 64 bits to be averaged; got {one.dtype} in {name}. "
                    "Keep them in float32 and compute under autocast."
                )


def _bare(model: object) -> nn.Module:
    """Unwrap a module from data parallelism and compilation."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a module; got {type(model).__name__}.")
    wrapped = isinstance(model, (DistributedDataParallel, DataParallel))
    inner = model.module if wrapped else getattr(model, "_orig_mod", None)
    return model if inner is None else _bare(inner)


def _copied(model: nn.Module) -> nn.Module:
    """Copy a module; tensors that it computes and keeps, such as a normalized weight, lose their graph."""
    copies: dict[int, Any] = {}
    # in inference mode the copy could never be updated
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            for one in (*vars(module).values(), *module.buffers(recurse=False)):
                if isinstance(one, Tensor):
                    copies[id(one)] = one.detach().clone()
        try:
            return deepcopy(model, copies).requires_grad_(False).eval()
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"`model` must be a module that can be copied, before it is sharded; {type(model).__name__} cannot: "
                f"{error}"
            ) from error


def _on_this_rank(teacher: Any, student: Any) -> tuple[Tensor, Tensor]:
    """Return the parts of teacher and student that this rank averages: shards, if the teacher is sharded."""
    if not hasattr(student, "full_tensor"):
        return teacher, student
    if not hasattr(teacher, "full_tensor"):
        return teacher, student.full_tensor()
    return teacher.to_local(), student.redistribute(placements=teacher.placements).to_local()


def _move(teacher: Tensor, student: Tensor, share: float) -> Tensor | None:
    """Move the teacher's tensor toward the student's by a share, where the student's is finite.

    Returns a scalar tensor: whether a number was not finite. Returns None if all numbers are known to be finite.
    """
    student = student.to(teacher)
    if teacher.dtype not in (*AVERAGED, torch.float16, torch.bfloat16):
        teacher.copy_(student)
        return None
    # a sum takes one pass and no memory
    finite = student.sum(dtype=torch.promote_types(student.dtype, torch.float32)).isfinite()
    # if reading the answer waits for no device, no mask is needed
    if read_numbers(finite):
        teacher.lerp_(student, share) if share < 1.0 else teacher.copy_(student)
        return None
    if share == 1.0:
        torch.where(student.isfinite(), student, teacher, out=teacher)
    else:
        teacher.add_((student - teacher).nan_to_num_(0.0, 0.0, 0.0), alpha=share)
    return ~finite
