"""Mask diversity: no two slots of a frame cover the same patches."""

import torch
from torch import Tensor

from ssync_loss._autocast import at_least_float32, no_autocast
from ssync_loss._autograd import attached_zero
from ssync_loss._inputs import check_floats
from ssync_loss._module import LossModule
from ssync_loss._vectors import products

# added to every patch, so that an empty mask has a direction
EPSILON = 1e-8


def mask_diversity_loss(logits: Tensor) -> Tensor:
    """Keep the masks of a frame apart.

    ``loss = mean over frames and ordered pairs s != r of cos(M_s + 1e-8, M_r + 1e-8)`` over the patches, with
    M = softmax over S of the logits. The loss is 0 if masks are hard and disjoint, and 1 if they are uniform. If one
    slot has all patches, the loss is 1, too, as empty masks are uniform; losses of consistency over time allow this
    collapse. With a single slot or no clips the loss is exactly 0, attached to the graph.

    Shape: logits: (B, T, S, H, W), before the softmax. Returns a scalar in float32, or float64 if the logits are.

    Source: the public code of Qian et al., ICCV 2023 (arXiv:2308.09951), where it is an option with weight 1.
    Raises: TypeError on a wrong dtype, ValueError on wrong shapes.

    >>> logits = torch.tensor([[50.0, 0.0], [0.0, 0.0]]).view(1, 1, 2, 1, 2)
    >>> round(mask_diversity_loss(logits).item(), 4)  # masks (1, 1/2) and (0, 1/2): 1 / sqrt(5)
    0.4472
    """
    size = check_floats("logits", logits, "B T S H W", filled="T S H W")
    num_slots = size["S"]
    if num_slots == 1 or size["B"] == 0:
        return attached_zero(logits)
    with no_autocast(logits):
        masks = at_least_float32(logits).softmax(2).flatten(3) + EPSILON
        units = masks / torch.linalg.vector_norm(masks, dim=3, keepdim=True)
        itself = torch.eye(num_slots, dtype=torch.bool, device=units.device)
        num_cosines = size["B"] * size["T"] * num_slots * (num_slots - 1)
        # scaling makes a second tensor: a compiler refuses one tensor as both arguments
        return products(units / num_cosines, units).masked_fill(itself, 0.0).sum()


class MaskDiversityLoss(LossModule):
    """Module of :func:`mask_diversity_loss`, with the same shapes and errors: ``forward(logits)``.

    >>> logits = torch.tensor([[50.0, 0.0], [0.0, 0.0]]).view(1, 1, 2, 1, 2)
    >>> round(MaskDiversityLoss()(logits).item(), 4)
    0.4472
    """

    def __init__(self) -> None:
        # this class has no settings, unlike the base class
        super().__init__()

    def forward(self, logits: Tensor) -> Tensor:
        """Return the term; see :func:`mask_diversity_loss`."""
        return mask_diversity_loss(logits)
