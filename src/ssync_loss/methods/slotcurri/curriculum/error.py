"""The reconstruction error of each slot."""

import torch
from torch import Tensor

from ssync_loss._autocast import at_least_float32, no_autocast
from ssync_loss._inputs import check_floats, widest

# channels of a block
CHANNELS = 64


@torch.no_grad()
def slot_error(recon: Tensor, target: Tensor, masks: Tensor) -> Tensor:
    """Divide the mean squared error of a reconstruction among its slots.

    ``e_k = mean over patches of a_k * l`` with a the masks and ``l = mean over channels of (recon - target)^2``. As the
    masks of a patch sum to 1, the errors sum to the mean squared error. Without clips the errors are 0.

    Args:
        recon: (B, T, D, H, W), reconstructed features.
        target: (B, T, D, H, W), features of the backbone.
        masks: (B, T, S, H, W), of the decoder, after the softmax over slots.

    Returns: (S,) in float32, or float64 if an argument is, without gradient.
    Source: Moon, Seong & Heo, CVPR 2026 (arXiv:2603.22758), the reconstruction error of slots, delta^(k).
    Raises: TypeError on a wrong dtype, ValueError on wrong shapes.

    >>> recon, target = torch.zeros(1, 1, 1, 1, 2), torch.tensor([2.0, 1.0]).view(1, 1, 1, 1, 2)
    >>> masks = torch.tensor([[1.0, 0.5], [0.0, 0.5]]).view(1, 1, 2, 1, 2)
    >>> slot_error(recon, target, masks).tolist()  # (4 * 1 + 1 * 0.5) / 2 and (4 * 0 + 1 * 0.5) / 2
    [2.25, 0.25]
    """
    size = check_floats("recon", recon, "B T D H W", filled="T D H W")
    check_floats("target", target, "B T D H W", size, recon=recon)
    check_floats("masks", masks, "B T S H W", size, filled="S", recon=recon)
    dtype = widest(recon, target, masks)
    with no_autocast(recon):
        error = torch.zeros(*recon.shape[:2], *recon.shape[3:], dtype=dtype, device=recon.device)
        for one, other in zip(recon.split(CHANNELS, 2), target.split(CHANNELS, 2), strict=True):
            error += (at_least_float32(one) - at_least_float32(other)).square_().sum(2)
        # a matrix product holds no weighted map of every slot in memory
        shares = masks.to(dtype).flatten(3) @ error.flatten(2).unsqueeze(3)
        return shares.sum((0, 1, 3)) / max(recon.numel(), 1)
