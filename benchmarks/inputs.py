"""What is measured on: maps of drifting blobs with redundant slots, and features that follow them."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

FEATURE_DIM = 64


class DenseInputs(NamedTuple):
    """What dense alignment takes.

    Shape:
        decoder_features, encoder_features, anchors: (B, T, D, H, W). enc_labels, dec_labels: (B, T, H, W).
    """

    decoder_features: Tensor
    encoder_features: Tensor
    anchors: Tensor
    enc_labels: Tensor
    dec_labels: Tensor


def moving_blobs(
    shape: Mapping[str, int], *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return an encoder and a decoder map (B, T, S, H, W): drifting blobs, every third slot redundant.

    The decoder's map is the less noisy one. Both are leaves that collect gradients, drawn where they live.
    """
    clips, frames, slots, height, width = (shape[axis] for axis in "BTSHW")
    generator = torch.Generator(device).manual_seed(seed)
    center = torch.rand(clips, 1, slots, 1, 1, 2, generator=generator, device=device)
    # a slot and the one after it sit on the same blob
    center[:, :, 1::3] = center[:, :, 0::3][:, :, : len(range(1, slots, 3))]
    # a blob crosses a fifth of the image, however many frames that takes
    drift = 0.2 * torch.linspace(0, 1, frames, device=device).view(1, frames, 1, 1, 1)
    down = center[..., 0] + drift - torch.linspace(0, 1, height, device=device).view(height, 1)
    across = center[..., 1] - torch.linspace(0, 1, width, device=device)
    near = (down.square_() + across.square_()).mul_(-20)
    maps = []
    for noise in (0.5, 0.2):
        one = torch.randn(near.shape, generator=generator, device=device).mul_(noise).add_(near)
        maps.append(one.to(dtype).requires_grad_())
    return maps[0], maps[1]


def dense_inputs(
    shape: Mapping[str, int],
    *,
    dim: int = FEATURE_DIM,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> DenseInputs:
    """Return features that follow the same blobs, and the labels of their maps."""
    enc, dec = (one.detach() for one in moving_blobs(shape, device=device, seed=seed))
    generator = torch.Generator(device).manual_seed(seed + 1)
    directions = torch.randn(shape["S"], dim, generator=generator, device=device)
    clean = torch.einsum("btshw,sd->btdhw", dec.softmax(2), directions)
    features = [
        torch.randn(clean.shape, generator=generator, device=device).mul_(noise).add_(clean).to(dtype)
        for noise in (0.3, 0.3, 0.2)
    ]
    labels = [one.argmax(2) for one in (enc, dec)]
    return DenseInputs(features[0].requires_grad_(), features[1].requires_grad_(), features[2], labels[0], labels[1])
