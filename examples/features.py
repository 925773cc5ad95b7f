"""Frozen patch features, a small stand-in for a pretrained vision transformer.

A video becomes a grid of tokens. A token averages the colors and the responses of fixed random filters over a patch,
and is projected onto the principal axes of the training clips. No gradient trains it.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

PATCH = 4
# clips per block, which limits the memory of the filter responses
BLOCK = 16


class HalfWhitening(nn.Module):
    """Projects tokens onto the first D principal axes of the training clips.

    Every channel is standardized. Axis i has variance l_i and is divided by l_i^(1/4). One scale for all axes gives the
    tokens mean square 1.

    Shape:
        tokens: (B, T, C, H, W). Returns (B, T, D, H, W).

    Args:
        raw_dim: C.
        dim: D.
    """

    mean: Tensor
    std: Tensor
    axes: Tensor

    def __init__(self, raw_dim: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(raw_dim))
        self.register_buffer("std", torch.ones(raw_dim))
        self.register_buffer("axes", torch.eye(raw_dim)[:, :dim].contiguous())

    @torch.no_grad()
    def fit(self, blocks: Iterable[Tensor]) -> "HalfWhitening":
        """Estimate mean, standard deviation and principal axes from blocks of tokens."""
        # sums over blocks in float64
        dim = len(self.mean)
        count, total, moments = 0, torch.zeros(dim).double(), torch.zeros(dim, dim).double()
        for block in blocks:
            tokens = rearrange(block, "b t c h w -> (b t h w) c").double()
            count += len(tokens)
            total += tokens.sum(0)
            moments += tokens.T @ tokens
        mean = total / count
        covariance = moments / count - torch.outer(mean, mean)
        std = covariance.diagonal().clamp_min(1e-12).sqrt()
        variance, axes = torch.linalg.eigh(covariance / torch.outer(std, std))
        kept = slice(-self.axes.shape[1], None)
        variance, axes = variance[kept].flip(0).clamp_min(1e-6), axes[:, kept].flip(1)
        # half-whitened axis i has variance sqrt(l_i)
        self.axes.copy_(axes / variance**0.25 / variance.sqrt().mean().sqrt())
        self.mean.copy_(mean)
        self.std.copy_(std)
        return self

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens."""
        return (((tokens.movedim(2, -1) - self.mean) / self.std) @ self.axes).movedim(-1, 2)


class FrozenFeatures(nn.Module):
    """Random-filter features of dimension D on a grid of 4x4 patches.

    A pixel has RGB and the magnitudes of `num_filters` random 5x5 filters, of which half are blind to constant color.
    A patch has the mean over its pixels and the mean over its 3x3 neighborhood of patches, half-whitened.

    Shape:
        video: (B, T, 3, H, W), H and W multiples of 4. Returns (B, T, D, H/4, W/4).

    Args:
        dim: D.
        num_filters: number of random filters.
        seed: seed of the filters.
    """

    filters: Tensor

    def __init__(self, dim: int = 24, *, num_filters: int = 32, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        filters = torch.randn(num_filters, 3, 5, 5, generator=generator) / 75**0.5
        filters[::2] -= filters[::2].mean(dim=(2, 3), keepdim=True)
        self.register_buffer("filters", filters)
        self.project = HalfWhitening(2 * (3 + num_filters), dim)

    @torch.no_grad()
    def fit(self, video: Tensor) -> "FrozenFeatures":
        """Estimate mean, standard deviation and principal axes from the training clips."""
        self.project.fit(map(self._raw, self._blocks(video)))
        return self

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        """Compute the tokens of a video."""
        return torch.cat([self.project(self._raw(block)) for block in self._blocks(video)])

    def _blocks(self, video: Tensor) -> tuple[Tensor, ...]:
        if video.ndim != 5 or video.shape[2] != 3:
            raise ValueError(f"`video` must have shape (B, T, 3, H, W); got {tuple(video.shape)}.")
        if video.shape[-2] % PATCH or video.shape[-1] % PATCH:
            raise ValueError(f"`video` must have H and W that are multiples of {PATCH}; got {tuple(video.shape[-2:])}.")
        return torch.split(video, BLOCK)

    def _raw(self, video: Tensor) -> Tensor:
        frames = rearrange(video, "b t c h w -> (b t) c h w")
        responses = F.conv2d(F.pad(frames, (2, 2, 2, 2), mode="replicate"), self.filters).abs()
        patches = F.avg_pool2d(torch.cat([frames, responses], dim=1), PATCH)
        smooth = F.avg_pool2d(F.pad(patches, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return rearrange(torch.cat([patches, smooth], dim=1), "(b t) c h w -> b t c h w", b=len(video))
