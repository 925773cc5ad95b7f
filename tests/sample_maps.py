"""Two maps of a small scene in which both losses select patches."""

import torch
from torch import Tensor


def sample_maps(
    num_clips: int = 2,
    num_frames: int = 2,
    num_slots: int = 4,
    height: int = 5,
    width: int = 12,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return encoder and decoder logits (B, T, S, H, W) of moving vertical stripes, one per slot.

    The decoder map is shifted by one patch, so that the maps disagree. The noise is too weak to change a label.
    """
    generator = torch.Generator().manual_seed(seed)
    clip = torch.arange(num_clips)[:, None, None]
    frame = torch.arange(num_frames)[:, None]
    column = torch.arange(width)
    maps = []
    for shift in (0, 1):
        stripe = (clip + frame + column + shift) * num_slots // width % num_slots
        labels = stripe[:, :, None].expand(num_clips, num_frames, height, width)
        chosen = torch.nn.functional.one_hot(labels, num_slots).movedim(-1, 2)
        noise = torch.rand(num_clips, num_frames, num_slots, height, width, generator=generator)
        maps.append((2.0 * chosen + noise).to(dtype).requires_grad_(requires_grad))
    return maps[0], maps[1]


def leaf(maps: Tensor) -> Tensor:
    """Return a copy of a map as a leaf with a gradient."""
    return maps.detach().clone().requires_grad_()
