"""Centered cross-entropy: a student predicts its teacher's distribution over prototypes."""

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
)
from ssync_loss._inputs import widest
from ssync_loss._module import LossModule
from ssync_loss._settings import POSITIVE, SHARE, check_by
from ssync_loss.methods.ino._centers import cross_entropies, sums_of_finite, trajectory


class CenteredCrossEntropy(LossModule):
    """Cross-entropy of a student with its teacher's sharpened distribution, whose mean is kept from collapsing.

    ``q = softmax((t - center) / tau_t)`` and ``loss = mean over rows of -sum_k q_k log softmax(s / tau_s)_k``. A step
    asks for the loss, and only then for the move ``center <- m_c * center + (1 - m_c) * mean over rows of t``::

        loss = criterion(s, t)
        criterion.update_center(t)

    ``forward`` reads the center and never moves it: evaluation, and several losses of one batch, leave it as it is
    (the authors' code moves it in every call). It is a buffer, so that it is in the checkpoint, and is kept in
    float32, or float64 once logits are. Class and patch tokens have a center each: two of these modules. Rows with
    NaN or infinity do not move it, although they make the loss NaN: ``num_left_out`` counts them, and is not saved.

    With ``all_reduce``, as published, the mean is that of the rows of all ranks, however many each has: one all-reduce
    of Kp + 1 numbers a move, which all ranks must make. Without an initialized process group there is none. It has no
    place in a compiled graph; everything else compiles whole.

    ``forward(s, t)``; no rows give exactly 0, attached to the graph.

    Shape:
        s, t: (..., Kp), logits of the same rows. Returns a scalar in float32, or float64 if one of both is.

    Args:
        Kp: number of prototypes.
        tau_s: temperature of the student, above 0.
        tau_t: temperature of the teacher, above 0; smaller, so that targets are sharper.
        m_c: momentum of the center, within [0, 1].
        all_reduce: whether moves take the rows of all ranks.
        group: process group; None is the default one.

    Source: Caron et al., ICCV 2021 (arXiv:2104.14294), centering and sharpening; the settings of Pan et al., ACM MM
    2022 (arXiv:2203.15312).

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on wrong shapes or settings.

    >>> criterion = CenteredCrossEntropy(2, tau_s=1.0, tau_t=1.0)
    >>> logits = torch.tensor([[0.0, 1.0]])  # e : 1 for the second: -(0.7311 log 0.7311 + 0.2689 log 0.2689)
    >>> round(criterion(logits, logits).item(), 4)
    0.5822
    >>> criterion.update_center(logits)
    >>> criterion.center
    tensor([0.0000, 0.1000])
    """

    check_settings = staticmethod(check_by(tau_s=POSITIVE, tau_t=POSITIVE, m_c=SHARE, all_reduce=check_flag))
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
        super().__init__(tau_s=tau_s, tau_t=tau_t, m_c=m_c, all_reduce=all_reduce, group=group)
        check_int("Kp", Kp, 1)
        self.register_buffer("center", torch.zeros(Kp))
        self.register_buffer("num_left_out", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        """Return the mean cross-entropy of the rows; the center stays where it is."""
        check_tensor("s", s)
        self._check("t", t)
        check_same_device("s", s, t=t)
        check_floating("s", s)
        if s.shape != t.shape:
            raise ValueError(f"`s` must have the shape of `t`, {tuple(t.shape)}; got {tuple(s.shape)}.")
        with no_autocast(s):
            dtype = widest(s, t)
            rows = cross_entropies(s.to(dtype), t.to(dtype), self.center.to(dtype), self.tau_s, self.tau_t)
            # no mean: of no rows that is NaN
            return rows.sum() / max(rows.numel(), 1)

    @torch.no_grad()
    def update_center(self, t: Tensor, *, mask: Tensor | None = None) -> None:
        """Move the center once, towards the mean of rows of teacher logits; no rows move nothing.

        Args:
            t: logits (..., Kp).
            mask: the rows that count, (...), bool; None for all.
        """
        self._check("t", t)
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
        """Move the center once for each of n groups of rows, in order, and return where it was before each move.

        Args:
            rows: the teacher's logits, (B, n, R, Kp).
            counted: the rows that count, (B, n, R), bool; none, on all ranks together, move nothing.

        Returns:
            The centers before the moves, (n, Kp).
        """
        check_group("group", self.group)
        sums, counts, left_out = sums_of_finite(rows, counted)
        self.num_left_out += left_out
        if self.all_reduce and dist.is_available() and dist.is_initialized():
            both = torch.cat([sums, counts.unsqueeze(1).to(sums)], 1)
            dist.all_reduce(both, group=self.group)
            sums, counts = both[:, :-1], both[:, -1]
        # finite rows may still overflow together
        fits = sums.isfinite().all(1)
        sums, counts = torch.where(fits.unsqueeze(1), sums, 0.0), counts * fits
        dtype = torch.promote_types(self.center.dtype, sums.dtype)
        if self.center.dtype != dtype:
            # of a module that was cast down, or before logits as wide as these
            self.center = self.center.to(dtype)
        centers = trajectory(self.center, sums.to(dtype), counts, self.m_c)
        self.center.copy_(centers[-1])
        return centers[:-1]

    def extra_repr(self) -> str:
        """Show the number of prototypes, and the settings that differ from the defaults."""
        return ", ".join([str(len(self.center)), *filter(None, [super().extra_repr()])])

    def _check(self, name: str, rows: Tensor) -> None:
        """Check logits (..., Kp)."""
        check_tensor(name, rows)
        if rows.ndim < 1 or rows.shape[-1] != len(self.center):
            raise ValueError(f"`{name}` must have shape (..., Kp={len(self.center)}); got {tuple(rows.shape)}.")
        check_floating(name, rows)
        check_same_device(name, rows, center=self.center)


def check_criterion(name: str, criterion: object) -> None:
    """Require a criterion with a center."""
    if not isinstance(criterion, CenteredCrossEntropy):
        raise TypeError(f"`{name}` must be a CenteredCrossEntropy; got {type(criterion).__name__}.")
