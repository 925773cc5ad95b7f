"""Centered cross-entropy: a student learns its teacher's distribution over prototypes."""

import torch
import torch.distributed as dist
from torch import Tensor

from ssync_loss._autocast import at_least_float32, no_autocast
from ssync_loss._checks import (
    check_bool,
    check_flag,
    check_floating,
    check_group,
    check_int,
    check_same_device,
    check_tensor,
    has_ranks,
)
from ssync_loss._compilers import is_recomputing
from ssync_loss._inputs import check_rows, widest
from ssync_loss._module import LossModule
from ssync_loss._settings import POSITIVE, SHARE, check_by


def targets(t: Tensor, center: Tensor, tau_t: float) -> Tensor:
    """Return the target distributions (..., Kp) of teacher logits, without gradient."""
    with torch.no_grad():
        return ((t - center) / tau_t).softmax(-1)


def cross_entropies(s: Tensor, t: Tensor, center: Tensor, tau_s: float, tau_t: float) -> Tensor:
    """Return the cross-entropy of every row (...) of student logits (..., Kp)."""
    return -(targets(t, center, tau_t) * (s / tau_s).log_softmax(-1)).sum(-1)


def trajectory(center: Tensor, sums: Tensor, counts: Tensor, momentum: float) -> Tensor:
    """Return the center (Kp,) before and after each of n moves, ``c <- momentum * c + (1 - momentum) * mean``.

    Each mean is over a group of rows, with sums (n, Kp) and counts (n,). A group without rows does not move the center.
    """
    moves = (counts > 0).cumsum(0)
    # number of moves before each center
    behind = torch.nn.functional.pad(moves, (1, 0))
    since = (behind.unsqueeze(1) - moves).to(sums)
    weights = ((1 - momentum) * momentum**since).tril(-1)
    means = sums / counts.clamp_min(1).unsqueeze(1)
    return (momentum ** behind.to(sums)).unsqueeze(1) * center + weights @ means


_check_settings = check_by(tau_s=POSITIVE, tau_t=POSITIVE, m_c=SHARE, all_reduce=check_flag)


class CenteredCrossEntropy(LossModule, check=_check_settings):
    """Cross-entropy of a student with its teacher's sharpened and centered distribution.

    ``q = softmax((t - center) / tau_t)`` and ``loss = mean over rows of -sum_k q_k log softmax(s / tau_s)_k``. In a
    step, call ``criterion(s, t)`` and then ``criterion.update_center(t)``, which moves
    ``center <- m_c * center + (1 - m_c) * mean over rows of t``. If the loss is in an activation checkpoint, move the
    center after the backward. ``forward`` never moves the center (the authors' code does). The center is a buffer in
    float32, or float64 after float64 logits. Use two modules for class and patch tokens, so that each has a separate
    center. With ``all_reduce``, as published, a move is one all-reduce of Kp + 1 numbers; all ranks must call it. Only
    this call cannot be compiled.

    ``forward(s, t)`` takes logits (..., Kp) of the same rows and returns a scalar in float32, or float64 if an argument
    has it. Without rows the loss is exactly 0, attached to the graph. Rows with NaN or infinity make the loss NaN, but
    do not move the center. ``num_left_out`` counts these rows; it is not saved.

    Args:
        Kp: number of prototypes.
        tau_s: temperature of the student, above 0.
        tau_t: temperature of the teacher, above 0; smaller for sharper targets.
        m_c: momentum of the center, within [0, 1].
        all_reduce: whether moves use the rows of all ranks, if a process group is initialized.
        group: process group; None is the default one.

    Source: Caron et al., ICCV 2021 (arXiv:2104.14294); the settings of Pan et al., ACM MM 2022 (arXiv:2203.15312).
    Raises: TypeError on a wrong dtype, ValueError on wrong shapes or settings.

    >>> criterion = CenteredCrossEntropy(2, tau_s=1.0, tau_t=1.0)
    >>> logits = torch.tensor([[0.0, 1.0]])  # e : 1 for the second: -(0.7311 log 0.7311 + 0.2689 log 0.2689)
    >>> round(criterion(logits, logits).item(), 4)
    0.5822
    >>> criterion.update_center(logits)
    >>> criterion.center
    tensor([0.0000, 0.1000])
    """

    center: Tensor
    num_left_out: Tensor

    def __init__(
        self,
        Kp: int,
        *,
        tau_s: float = 0.1,
        tau_t: float = 0.04,
        m_c: float = 0.9,
        all_reduce: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.remember(locals())
        check_int("Kp", Kp, 1)
        # buffers made in inference mode could never be written
        with torch.inference_mode(False):
            self.register_buffer("center", torch.zeros(Kp))
            self.register_buffer("num_left_out", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        """Return the mean cross-entropy of the rows; the center does not move."""
        check_tensor("s", s)
        check_rows("t", t, "Kp", len(self.center), center=self.center)
        check_same_device("s", s, t=t)
        check_floating("s", s)
        if s.shape != t.shape:
            raise ValueError(f"`s` must have the shape of `t`, {tuple(t.shape)}; got {tuple(s.shape)}.")
        with no_autocast(s):
            dtype = widest(s, t)
            rows = cross_entropies(s.to(dtype), t.to(dtype), self.center.to(dtype), self.tau_s, self.tau_t)
            return rows.sum() / max(rows.numel(), 1)

    @torch.no_grad()
    def update_center(self, t: Tensor, *, mask: Tensor | None = None) -> None:
        """Move the center once, toward the mean of teacher logits (..., Kp), or of the rows in a mask (...), bool.

        Without rows the center does not move.
        """
        check_rows("t", t, "Kp", len(self.center), center=self.center)
        with no_autocast(t):
            rows = at_least_float32(t)
            if mask is None:
                mask = torch.ones(t.shape[:-1], dtype=torch.bool, device=t.device)
            check_tensor("mask", mask)
            check_bool("mask", mask)
            check_same_device("mask", mask, t=t)
            if mask.shape != t.shape[:-1]:
                wanted = tuple(t.shape[:-1])
                raise ValueError(f"`mask` must have the shape of the rows, {wanted}; got {tuple(mask.shape)}.")
            self.move_center(rows.reshape(1, 1, -1, len(self.center)), mask.reshape(1, 1, -1))

    @torch.no_grad()
    def move_center(self, rows: Tensor, counted: Tensor) -> Tensor:
        """Move the center once for each of n groups of rows, in order, and return the center before each move, (n, Kp).

        The rows are teacher logits, (B, n, R, Kp). Only finite rows that are ``counted``, (B, n, R), bool, move it.
        """
        check_group("group", self.group)
        if is_recomputing():
            raise RuntimeError(
                "`center` would move twice, as a checkpoint computes this forward again. Call `update_center` outside "
                "of the checkpoint."
            )
        low, high = rows.aminmax(dim=-1)
        used = counted & low.isfinite() & high.isfinite()
        self.num_left_out.add_((counted & ~used).sum())
        sums, counts = torch.where(used.unsqueeze(-1), rows, 0.0).sum((0, 2)), used.sum((0, 2))
        if self.all_reduce and has_ranks():
            both = torch.cat([sums, counts.unsqueeze(1).to(sums)], 1)
            dist.all_reduce(both, group=self.group)
            sums, counts = both[:, :-1], both[:, -1]
        # a sum of finite rows may overflow
        fits = sums.isfinite().all(1)
        sums, counts = torch.where(fits.unsqueeze(1), sums, 0.0), counts * fits
        dtype = torch.promote_types(self.center.dtype, sums.dtype)
        if self.center.dtype != dtype:
            # the module was cast to half precision, or these are the first float64 logits
            self.center = self.center.to(dtype)
        centers = trajectory(self.center, sums.to(dtype), counts, self.m_c)
        self.center.copy_(centers[-1])
        return centers[:-1]

    def extra_repr(self) -> str:
        """Show the number of prototypes, and the settings that differ from the defaults."""
        return ", ".join([str(len(self.center)), *filter(None, [super().extra_repr()])])


def check_criterion(name: str, criterion: object) -> None:
    """Require a criterion with a center."""
    if not isinstance(criterion, CenteredCrossEntropy):
        raise TypeError(f"`{name}` must be a CenteredCrossEntropy; got {type(criterion).__name__}.")
