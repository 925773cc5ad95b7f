"""The curriculum as a module: it averages errors before each milestone, where it adds slots."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ssync_loss._checks import check_floating, check_group, check_int, check_shape, check_tensor, check_type, has_ranks
from ssync_loss._compilers import is_recomputing
from ssync_loss.methods.slotcurri.curriculum.allotment import allot_children
from ssync_loss.methods.slotcurri.curriculum.children import Neighbors, check_placement, spawn_children
from ssync_loss.methods.slotcurri.curriculum.error import slot_error
from ssync_loss.methods.slotcurri.curriculum.moments import hold_rows, inherit_moments, rows_of


class SlotCurriculum(nn.Module):
    """Train with few slots first, and add children of the slots with the largest errors at milestones.

    The model needs learned placeholders (a parameter with a row per slot) and modules for any number of slots. In a
    training loop::

        curriculum = SlotCurriculum(slot_schedule(7), milestones(max_steps))
        for step in range(max_steps):
            slots = curriculum.take(model.slots)                  # the rows in use, also in evaluation
            ...
            curriculum.observe(recon, target, masks, step)        # masks of the decoder, after the softmax
            loss.backward(); optimizer.step()
            curriculum.maybe_expand(model.slots, step, optimizer)

    Only ``take`` may be compiled. The new rows are written after the step of the milestone, the last step with the old
    number of slots. A resumed training makes up for a missed milestone. With a process group the errors are averaged
    over all ranks, and all ranks get the newborn rows of the first. All ranks must call ``observe`` and
    ``maybe_expand`` at the same steps, and must load the checkpoint, as buffers hold the state. A batch with NaN or
    infinite errors is left out; ``num_left_out`` counts these batches and is not saved. If no batch remains, slots take
    turns. If ``maybe_expand`` returns True, reset a teacher with ``teacher.model.load_state_dict(model.state_dict())``.

    Args:
        budgets: growing numbers of slots, one per stage, see :func:`slot_schedule`.
        milestones: the steps after which slots are added, in order, one fewer than ``budgets``, see
            :func:`milestones`. If stages begin at the same step, only the last counts. Surplus milestones are ignored.
        beta: jitter of children, see :func:`spawn_children`.
        neighbors: ``"active"`` (the paper) or ``"all"`` (the public code).
        min_radius: least distance of a child, in units of the mean length; published: 0.
        window: number of steps before a milestone whose errors are averaged; published: 1.

    Source: Moon, Seong & Heo, CVPR 2026 (arXiv:2603.22758), the curriculum.
    Raises: TypeError, ValueError on wrong settings.

    >>> curriculum = SlotCurriculum([2, 3], [1])
    >>> slots = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]]))
    >>> recon, target = torch.zeros(1, 1, 1, 1, 2), torch.tensor([0.0, 1.0]).view(1, 1, 1, 1, 2)
    >>> masks = torch.eye(2).view(1, 1, 2, 1, 2)  # slot 1 has all the error
    >>> for step in range(2):
    ...     curriculum.observe(recon, target, masks, step)
    ...     curriculum.maybe_expand(slots, step)
    False
    True
    >>> curriculum.take(slots).shape, round((slots[2] - slots[1]).norm().item(), 4)  # 0.2 * 5 * 4 / 3.5
    (torch.Size([3, 2]), 1.1429)
    """

    stage: Tensor
    num_observed: Tensor
    errors: Tensor
    num_left_out: Tensor

    def __init__(
        self,
        budgets: Sequence[int],
        milestones: Sequence[int],
        *,
        beta: float = 0.2,
        neighbors: Neighbors = "active",
        min_radius: float = 1e-3,
        window: int = 1,
    ) -> None:
        super().__init__()
        _check_growing("budgets", budgets, 1)
        if not budgets:
            raise ValueError(f"`budgets` must have at least one entry; got {list(budgets)}.")
        _check_growing("milestones", milestones, 0, strictly=False)
        if len(milestones) < len(budgets) - 1:
            raise ValueError(
                f"`milestones` must have {len(budgets) - 1} entries, one fewer than budgets={list(budgets)}; "
                f"got {list(milestones)}."
            )
        check_placement(beta=beta, neighbors=neighbors, min_radius=min_radius)
        check_int("window", window, 1)
        # a later stage at the same step replaces the earlier one
        stages = dict(zip(milestones, budgets[1:], strict=False))
        self.budgets, self.milestones, self.window = (budgets[0], *stages.values()), tuple(stages), window
        self.beta, self.min_radius = beta, min_radius
        self.neighbors: Neighbors = neighbors
        # buffers made in inference mode could never be written
        with torch.inference_mode(False):
            for name in ("stage", "num_observed"):
                self.register_buffer(name, torch.zeros((), dtype=torch.int64))
            self.register_buffer("errors", torch.zeros(self.budgets[-1]))
            self.register_buffer("num_left_out", torch.zeros((), dtype=torch.int64), persistent=False)
        # copies of the buffers on the host, so that no step waits for a device
        self._stage = self._num_observed = 0
        nn.Module.register_load_state_dict_post_hook(self, _read_buffers)

    def n_active(self, step: int | None = None) -> int:
        """Return the number of slots in use: now, or at a step of the schedule, counted from 0."""
        if step is None:
            return self.budgets[self._stage]
        check_int("step", step, 0)
        return self.budgets[sum(step > one for one in self.milestones)]

    def take(self, slots: Tensor) -> Tensor:
        """Return the slots in use, which come first, as a view: (..., K_max, D) -> (..., n_active, D)."""
        check_tensor("slots", slots)
        if slots.ndim < 2 or slots.shape[-2] < self.n_active():
            raise ValueError(f"`slots` must have shape (..., S >= {self.n_active()}, D); got {tuple(slots.shape)}.")
        return slots[..., : self.n_active(), :]

    def observe(
        self, recon: Tensor, target: Tensor, masks: Tensor, step: int, *, group: dist.ProcessGroup | None = None
    ) -> None:
        """Record the :func:`slot_error` of the slots in use if a milestone is near, else do nothing.

        Training steps count from 0; ``group=None`` is the default group. If an activation checkpoint repeats a call,
        the second call records nothing.

        Raises: TypeError on a wrong dtype; ValueError on wrong shapes, such as masks of another number of slots;
            RuntimeError if the buffers were overwritten instead of loaded.
        """
        check_int("step", step, 0)
        check_group("group", group)
        if is_recomputing() or not self._is_watching(step):
            return
        check_shape("masks", masks, "B T S H W", S=self.n_active())
        error = slot_error(recon, target, masks)
        known = error.float().isfinite().all()
        error = torch.where(known, error, 0.0)
        if has_ranks():
            # all patches of all ranks have the same weight
            weight = known * recon[:, :, 0].numel()
            sums = torch.cat([error * weight, weight.to(error).view(1)])
            dist.all_reduce(sums, group=group)
            error = sums[:-1] / sums[-1].clamp_min(1)
        self.errors[: len(error)] += error.to(self.errors)
        self.num_left_out += (~known).to(self.errors.device)
        self._num_observed += 1
        self.num_observed.fill_(self._num_observed)

    def maybe_expand(
        self,
        slots_param: nn.Parameter,
        step: int,
        optimizer: Optimizer | None = None,
        *,
        generator: torch.Generator | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> bool:
        """Write newborn rows into the placeholders if a milestone is reached, and return whether it is.

        Call this in every step, after ``optimizer.step()``. A call makes up for at most one missed stage.

        Args:
            slots_param: the placeholders (K_max, D) or (1, K_max, D), at least the last budget; written in place.
            step: as in :meth:`observe`.
            optimizer: if given, newborn rows inherit its moments, see :func:`inherit_moments`; published: None.
            generator: source of the jitter; None for torch's global generator.
            group: as in :meth:`observe`.

        Raises: TypeError if the placeholders are no floating-point parameter, or another argument has a wrong type;
            ValueError if the placeholders are too few or one expanded row, if the optimizer does not hold them, or if
            observed errors are negative; RuntimeError if a milestone is reached and nothing was observed.
        """
        self._check_placeholders(slots_param)
        check_int("step", step, 0)
        check_type("optimizer", optimizer, Optimizer, optional=True)
        check_type("generator", generator, torch.Generator, optional=True)
        check_group("group", group)
        if self._stage == len(self.milestones) or step < self.milestones[self._stage]:
            return False
        if self._num_observed == 0:
            raise RuntimeError(
                f"No errors were observed before the milestone {self.milestones[self._stage]} (step {step}): call "
                "`observe` in every step, before `maybe_expand`."
            )
        rows = rows_of(slots_param.detach())
        num_active, num_next = self.budgets[self._stage : self._stage + 2]
        errors = self.errors[:num_active].cpu()
        if (errors < 0).any():
            raise ValueError(f"`masks` must be at least 0, after the softmax; observed errors are {errors.tolist()}.")
        counts = allot_children(errors, num_next - num_active).to(rows.device)
        children = spawn_children(
            rows[:num_active],
            counts,
            beta=self.beta,
            generator=generator,
            neighbors=self.neighbors,
            min_radius=self.min_radius,
            unborn=rows[num_active:],
        )
        if optimizer is not None:
            parents = torch.arange(num_active, device=rows.device).repeat_interleave(counts)
            inherit_moments(optimizer, slots_param, parents, num_active)
        if has_ranks():
            children = children.contiguous()
            dist.broadcast(children, group=group, group_src=0)
        rows[num_active:num_next] = children
        self._stage, self._num_observed = self._stage + 1, 0
        self.stage.fill_(self._stage)
        self.num_observed.zero_()
        self.errors.zero_()
        return True

    def hold_unborn(self, slots_param: nn.Parameter, optimizer: Optimizer) -> None:
        """Keep the optimizer from changing placeholders that are not in use, from now on.

        Weight decay, such as AdamW's, shrinks these rows. Only ``neighbors="all"`` reads them; otherwise this call is
        not needed. Checkpoints do not save it: a resumed training calls it again. Arguments and errors are as in
        :meth:`maybe_expand`.
        """
        self._check_placeholders(slots_param)
        hold_rows(optimizer, slots_param, self.n_active)

    def extra_repr(self) -> str:
        """Show the settings, and the stage."""
        names = ("budgets", "milestones", "beta", "neighbors", "min_radius", "window")
        return ", ".join([*(f"{name}={getattr(self, name)!r}" for name in names), f"stage={self._stage}"])

    def _is_watching(self, step: int) -> bool:
        if self._stage == len(self.milestones):
            return False
        milestone = self.milestones[self._stage]
        if step < milestone or self._num_observed > 0:
            return milestone - self.window <= step < milestone
        # a missed milestone may mean that only the first rank loaded the checkpoint, and DDP copied its buffers
        known, written = (self._stage, self._num_observed), (int(self.stage), int(self.num_observed))
        if known != written:
            raise RuntimeError(
                f"`stage` and `num_observed` are {written} in the buffers and {known} by the calls on this rank. Every "
                "rank must load the checkpoint itself, with `load_state_dict`."
            )
        return True

    def _check_placeholders(self, slots_param: nn.Parameter) -> None:
        if not isinstance(slots_param, nn.Parameter):
            raise TypeError(f"`slots_param` must be a parameter; got {type(slots_param).__name__}.")
        check_floating("slots_param", slots_param)
        shape = tuple(slots_param.shape)
        if shape[:-2] not in ((), (1,)) or len(shape) < 2:
            raise ValueError(f"`slots_param` must have shape (S, D) or (1, S, D); got {shape}.")
        if shape[-2] < self.budgets[-1]:
            raise ValueError(
                f"`slots_param` must have at least {self.budgets[-1]} rows, the last of budgets={list(self.budgets)}; "
                f"got {shape[-2]}."
            )
        if any(size > 1 and stride == 0 for size, stride in zip(shape, slots_param.stride(), strict=True)):
            raise ValueError("`slots_param` must have memory of its own for every row; got an expanded tensor.")


def _read_buffers(curriculum: Any, incompatible_keys: Any) -> None:  # noqa: ARG001 (torch passes it)
    """Copy the loaded buffers to the host."""
    stage = int(curriculum.stage)
    check_int("stage", stage, 0, len(curriculum.milestones))
    curriculum._stage, curriculum._num_observed = stage, int(curriculum.num_observed)


def _check_growing(name: str, values: object, low: int, *, strictly: bool = True) -> None:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"`{name}` must be a sequence of integers; got {type(values).__name__}.")
    for one in values:
        check_int(name, one, low)
    if list(values) != sorted(set(values) if strictly else values):
        raise ValueError(f"`{name}` must grow; got {list(values)}.")
