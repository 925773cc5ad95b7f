"""Out-generative learning: crops of two frames predict the teacher's prototypes of global crops."""

from typing import Literal, TypeAlias, get_args

import torch
from einops import rearrange
from torch import Tensor

from ssync_loss._autocast import no_autocast
from ssync_loss._autograd import attached_zero
from ssync_loss._checks import check_flag
from ssync_loss._inputs import check_floats, widest
from ssync_loss._module import LossModule
from ssync_loss._settings import check_by, one_of
from ssync_loss._vectors import products
from ssync_loss.methods.ino.centered import CenteredCrossEntropy, check_criterion, targets

Balance: TypeAlias = Literal["flat", "per_term"]
BALANCES = get_args(Balance)

_check_settings = check_by(balance=one_of(*BALANCES), update_center=check_flag)


def out_generative_loss(
    s_glob: Tensor,
    s_loc: Tensor,
    t_glob: Tensor,
    ce: CenteredCrossEntropy,
    *,
    balance: Balance = "flat",
    update_center: bool = False,
) -> Tensor:
    """Teach the class tokens of a student's crops the teacher's class tokens of global crops, across time.

    Frames i and i + T/2 are a pair. Teacher views are the pair's 2g global crops. Student views are the same 2g crops
    (which may be masked) and the pair's 2l local crops: ``loss = mean over clips and pairs of the mean over teacher
    views i and student views v != i of -sum_k q_k log softmax(s_v / tau_s)_k`` with
    ``q = softmax((t_i - center) / tau_t)``. ``ce`` holds the temperatures and the center. A crop does not predict
    itself; crops of the same frame predict each other.

    With ``update_center`` in training mode, as published, the center moves after every pair, toward the mean of that
    pair's teacher views, and the next pair uses the moved center. Without a pair (T = 1) or without clips the loss is
    exactly 0, attached to the graph.

    Args:
        s_glob: (B, T, g, Kp), T even or 1, the student's logits of the class tokens of global crops.
        s_loc: (B, T, l, Kp), l may be 0, the student's logits of local crops. ``s_glob`` and ``s_loc`` get gradients.
        t_glob: (B, T, g, Kp), the teacher's logits of the global crops.
        ce: the center of class tokens, and the temperatures.
        balance: ``"flat"``, the authors' code, is one mean over all student views. ``"per_term"``, the two losses of
            the paper, averages the mean over global views and the mean over local views; without local crops only the
            first remains.
        update_center: whether the center moves with every pair.

    Returns: a scalar in float32, or float64 if one of the logits is.
    Source: Pan et al., ACM MM 2022 (arXiv:2203.15312), out-generative learning, L_out_g2g and L_out_l2g of Fig. 2.
    Raises: TypeError on a wrong dtype, or a criterion of another kind; ValueError on wrong shapes or settings, or an
        odd number of frames.

    >>> import torch
    >>> views, none = torch.tensor([0.0, 1.0]).expand(1, 2, 1, 2), torch.zeros(1, 2, 0, 2)
    >>> criterion = CenteredCrossEntropy(2, tau_s=1.0, tau_t=1.0)
    >>> # odds of e : 1 for the second prototype: -(0.7311 log 0.7311 + 0.2689 log 0.2689)
    >>> round(out_generative_loss(views, none, views, criterion).item(), 4)
    0.5822
    """
    check_criterion("ce", ce)
    _check_settings(balance=balance, update_center=update_center)
    size = check_floats("s_glob", s_glob, "B T g Kp", {"Kp": len(ce.center)}, filled="T g", center=ce.center)
    check_floats("s_loc", s_loc, "B T l Kp", size, center=ce.center)
    check_floats("t_glob", t_glob, "B T g Kp", size, center=ce.center)
    if size["T"] > 1 and size["T"] % 2:
        raise ValueError(f"`s_glob` must have an even T, for the pairs of frames (i, i + T / 2); got T={size['T']}.")
    if size["T"] == 1:
        return attached_zero(s_glob, s_loc, t_glob.detach())
    with no_autocast(s_glob):
        dtype = widest(s_glob, s_loc, t_glob)
        t = _pairs(t_glob.detach()).to(dtype)
        center = ce.center
        if update_center and ce.training:
            counted = torch.ones(t.shape[:3], dtype=torch.bool, device=t.device)
            center = ce.move_center(t, counted).unsqueeze(1)
        q = targets(t, center.to(dtype), ce.tau_t)
        # all teacher views times all student views, (B, T / 2, 2g, .)
        from_global, from_local = (
            products(q, (_pairs(one).to(dtype) / ce.tau_s).log_softmax(3)) for one in (s_glob, s_loc)
        )
        same = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
        global_sum, local_sum = -from_global.masked_fill(same, 0.0).sum(), -from_local.sum()
        num_targets = size["B"] * size["T"] * size["g"]
        num_global, num_local = num_targets * (2 * size["g"] - 1), num_targets * 2 * s_loc.shape[2]
        if balance == "flat" or num_local == 0:
            # the divisor may be 0: a rank without clips still moves the center together with other ranks
            return (global_sum + local_sum) / max(num_global + num_local, 1)
        return (global_sum / num_global + local_sum / num_local) / 2


def _pairs(views: Tensor) -> Tensor:
    """Put the views of frames i and i + T/2 together: (B, T, v, Kp) -> (B, T / 2, 2 v, Kp)."""
    return rearrange(views, "b (two p) v k -> b p (two v) k", two=2)


class OutGenerativeLoss(LossModule, check=_check_settings):
    """Module of :func:`out_generative_loss`, with the same shapes and errors: ``forward(s_glob, s_loc, t_glob)``.

    >>> views, none = torch.tensor([0.0, 1.0]).expand(1, 2, 1, 2), torch.zeros(1, 2, 0, 2)
    >>> criterion = OutGenerativeLoss(CenteredCrossEntropy(2, tau_s=1.0, tau_t=1.0))
    >>> round(criterion(views, none, views).item(), 4)
    0.5822
    """

    def __init__(self, ce: CenteredCrossEntropy, *, balance: Balance = "flat", update_center: bool = False) -> None:
        self.remember(locals())
        check_criterion("ce", ce)
        self.ce = ce

    def forward(self, s_glob: Tensor, s_loc: Tensor, t_glob: Tensor) -> Tensor:
        """Return the term; see :func:`out_generative_loss`."""
        return out_generative_loss(s_glob, s_loc, t_glob, self.ce, **self.settings)
