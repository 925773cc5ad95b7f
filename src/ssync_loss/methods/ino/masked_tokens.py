"""Masked tokens: at masked positions a student predicts its teacher's prototypes."""

import torch
from torch import Tensor

from ssync_loss._autocast import no_autocast
from ssync_loss._autograd import savable
from ssync_loss._checks import check_flag, check_same_device
from ssync_loss._inputs import widest
from ssync_loss._module import LossModule
from ssync_loss._settings import check_by
from ssync_loss.methods.ino._tokens import as_list, check_kept, check_tokens
from ssync_loss.methods.ino.centered import CenteredCrossEntropy, check_criterion, cross_entropies


def masked_token_loss(
    s_pat: Tensor, t_pat: Tensor, mask: Tensor, ce_patch: CenteredCrossEntropy, *, update_center: bool = False
) -> Tensor:
    """Teach a student the teacher's distribution over prototypes at patches that the student does not see.

    ``loss = mean over frames of the mean over masked rows of -sum_k q_k log softmax(s_pat / tau_s)_k`` with
    ``q = softmax((t_pat - center) / tau_t)``; ``ce_patch`` holds the temperatures and the center. The rows of a frame
    are the masked positions of all clips. A frame without masked positions is left out. If no frame or no clip is left,
    the loss is exactly 0, attached to the graph.

    ``ce_patch.update_center(rows, mask=mask)`` moves the center. With ``update_center`` in training mode, as published,
    the center instead moves after every frame, toward the mean of that frame's masked teacher rows, and the next frame
    uses the moved center. To save time, pass only the masked positions as lists, with a mask of ones.

    Args:
        s_pat: (B, T, Kp, H, W), or a list of tokens (B, T, N, Kp), the student's logits of masked frames; the only
            argument that gets a gradient.
        t_pat: the same shape, the teacher's logits of whole frames, at the same positions.
        mask: (B, T, H, W) or (B, T, N), bool, positions that the student did not see, such as :func:`clip_mask`.
        ce_patch: the center of patches, and the temperatures.
        update_center: whether the center moves with every frame.

    Returns: a scalar in float32, or float64 if one of the logits is.
    Source: Pan et al., ACM MM 2022 (arXiv:2203.15312), in-generative learning, L_in_mim of Fig. 2.
    Raises: TypeError on a wrong dtype, or a criterion of another kind; ValueError on wrong shapes.

    >>> import torch
    >>> logits = torch.tensor([[0.0, 1.0], [5.0, 5.0]]).view(1, 1, 2, 2)
    >>> mask = torch.tensor([True, False]).view(1, 1, 2)
    >>> criterion = CenteredCrossEntropy(2, tau_s=1.0, tau_t=1.0)
    >>> # odds of e : 1 for the second prototype: -(0.7311 log 0.7311 + 0.2689 log 0.2689)
    >>> round(masked_token_loss(logits, logits, mask, criterion).item(), 4)
    0.5822
    """
    check_criterion("ce_patch", ce_patch)
    check_flag("update_center", update_center)
    size = check_tokens("s_pat", s_pat, "Kp", Kp=ce_patch.center.shape[0])
    check_tokens("t_pat", t_pat, "Kp", **size)
    check_kept("mask", mask, size, s_pat=s_pat)
    check_same_device("t_pat", t_pat, s_pat=s_pat)
    check_same_device("s_pat", s_pat, center=ce_patch.center)
    with no_autocast(s_pat):
        dtype = widest(s_pat, t_pat)
        masked = savable(mask).flatten(2)
        # positions that are not masked may hold anything
        s, t = (torch.where(masked.unsqueeze(3), as_list(one).to(dtype), 0.0) for one in (s_pat, t_pat.detach()))
        counts = masked.sum((0, 2))
        center = ce_patch.center
        if update_center and ce_patch.training:
            center = ce_patch.move_center(t, masked).unsqueeze(1)
        rows = cross_entropies(s, t, center.to(dtype), ce_patch.tau_s, ce_patch.tau_t)
        frames = (rows * masked).sum((0, 2)) / counts.clamp_min(1)
        return frames.sum() / (counts > 0).sum().clamp_min(1)


class MaskedTokenLoss(LossModule, check=check_by(update_center=check_flag)):
    """Module of :func:`masked_token_loss`, with the same shapes and errors: ``forward(s_pat, t_pat, mask)``.

    >>> logits = torch.tensor([[0.0, 1.0], [5.0, 5.0]]).view(1, 1, 2, 2)
    >>> mask = torch.tensor([True, False]).view(1, 1, 2)
    >>> criterion = MaskedTokenLoss(CenteredCrossEntropy(2, tau_s=1.0, tau_t=1.0))
    >>> round(criterion(logits, logits, mask).item(), 4)
    0.5822
    """

    def __init__(self, ce_patch: CenteredCrossEntropy, *, update_center: bool = False) -> None:
        self.remember(locals())
        check_criterion("ce_patch", ce_patch)
        self.ce_patch = ce_patch

    def forward(self, s_pat: Tensor, t_pat: Tensor, mask: Tensor) -> Tensor:
        """Return the term; see :func:`masked_token_loss`."""
        return masked_token_loss(s_pat, t_pat, mask, self.ce_patch, **self.settings)
