"""A video slot model that fits on one page.

    features --MLP--> tokens --slot attention--> slots --decoder--> reconstructed features
                                   ^    |
                                   +----+  a transformer predicts the slots of the next frame

It makes two maps of every clip. The encoder map tells which slot *attends* to a patch: it holds the dots of slot
attention before the softmax. The decoder map tells which slot *reconstructs* a patch: it holds the alpha logits.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn


class SlotOutput(NamedTuple):
    """The outputs of the model for a clip.

    Shape:
        slots: (B, T, S, C).
        enc_logits, dec_logits: (B, T, S, H, W), before the softmax over slots.
        reconstruction: (B, T, D, H, W).
        tokens: (B, T, C, H, W), the input of slot attention.
        attention: (B, T, S, H, W), softmax of the dots over *patches*, averaged over the iterations.
    """

    slots: Tensor
    enc_logits: Tensor
    dec_logits: Tensor
    reconstruction: Tensor
    tokens: Tensor
    attention: Tensor


class SlotModel(nn.Module):
    """Slots that follow the objects of a clip, learned by reconstructing its features.

    Shape:
        features: (B, T, D, H, W). Returns a `SlotOutput`.

    Args:
        num_slots: S.
        feature_dim: D.
        dim: C, the width of slots and tokens.
    """

    def __init__(self, num_slots: int, *, feature_dim: int = 24, dim: int = 48) -> None:
        super().__init__()
        self.encoder = TokenEncoder(feature_dim, dim)
        self.initial_slots = nn.Parameter(0.1 * torch.randn(num_slots, dim))
        self.attention = SlotAttention(dim)
        self.predictor = nn.TransformerEncoderLayer(
            dim, nhead=4, dim_feedforward=4 * dim, dropout=0.0, batch_first=True, norm_first=True
        )
        self.decoder = LowFrequencyDecoder(dim, feature_dim)

    def forward(self, features: Tensor, *, num_slots: int | None = None) -> SlotOutput:
        """Follow the slots, or the first `num_slots` of them, through the frames, then decode every frame."""
        tokens = self.encoder(features)  # (B, T, N, C)
        prior = repeat(self.initial_slots[:num_slots], "s c -> b s c", b=len(features))
        slots, enc_logits, attention = [], [], []
        for t, frame in enumerate(tokens.unbind(dim=1)):
            seen = self.see(prior, frame, first=t == 0)
            slots.append(seen.slots)
            enc_logits.append(seen.dots[-1])
            attention.append(torch.stack(seen.dots).softmax(dim=-1).mean(dim=0))
            prior = seen.predicted
        maps = torch.stack(enc_logits, dim=1), torch.stack(attention, dim=1)
        return self.decode(tokens, torch.stack(slots, dim=1), *maps, size=features.shape[-2:])

    def see(self, prior: Tensor, tokens: Tensor, *, first: bool) -> "Seen":
        """Correct slots (B, S, C) with the tokens (B, N, C) of a frame, and predict the slots of the next frame."""
        slots, dots = self.attention(tokens, prior, iterations=3 if first else 2)
        return Seen(slots, dots, self.predictor(slots))

    def decode(
        self, tokens: Tensor, slots: Tensor, enc_logits: Tensor, attention: Tensor, *, size: Sequence[int]
    ) -> SlotOutput:
        """Decode slots (B, T, S, C), and reshape the encoder maps (B, T, S, N) to a grid of that size."""
        height, width = size
        dec_logits, reconstruction = self.decoder(slots, height, width)

        def on_grid(maps: Tensor) -> Tensor:
            return rearrange(maps, "b t s (h w) -> b t s h w", h=height)

        tokens = rearrange(tokens, "b t (h w) c -> b t c h w", h=height)
        return SlotOutput(slots, on_grid(enc_logits), dec_logits, reconstruction, tokens, on_grid(attention))


class Seen(NamedTuple):
    """The outputs of the model for a frame.

    Shape:
        slots: (B, S, C).
        dots: (B, S, N) of every iteration, the encoder's logits.
        predicted: (B, S, C), the initial slots of the next frame.
    """

    slots: Tensor
    dots: list[Tensor]
    predicted: Tensor


class TokenEncoder(nn.Module):
    """Mixes the features and the position of every patch. Slots cannot know positions otherwise."""

    def __init__(self, feature_dim: int, dim: int, *, waves: int = 4) -> None:
        super().__init__()
        self.waves = waves
        self.mlp = nn.Sequential(
            nn.LayerNorm(feature_dim + waves**2),
            nn.Linear(feature_dim + waves**2, 2 * dim),
            nn.ReLU(),
            nn.Linear(2 * dim, dim),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Turn (B, T, D, H, W) into tokens (B, T, H·W, C)."""
        batch, frames, _, height, width = features.shape
        place = cosine_basis(self.waves, height, width).to(features)
        place = repeat(place, "p h w -> b t p h w", b=batch, t=frames)
        patches = rearrange(torch.cat([features, place], dim=2), "b t d h w -> b t (h w) d")
        tokens: Tensor = self.mlp(patches)
        return tokens


class SlotAttention(nn.Module):
    """Slot attention (Locatello et al., 2020), which also returns the dots of every iteration."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.norm_tokens = nn.LayerNorm(dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.to_query = nn.Linear(dim, dim, bias=False)
        self.to_key = nn.Linear(dim, dim, bias=False)
        self.to_value = nn.Linear(dim, dim, bias=False)
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, tokens: Tensor, slots: Tensor, *, iterations: int) -> tuple[Tensor, list[Tensor]]:
        """Refine slots (B, S, C) on tokens (B, N, C); also return the dots (B, S, N) of every iteration."""
        tokens = self.norm_tokens(tokens)
        keys, values = self.to_key(tokens), self.to_value(tokens)
        all_dots = []
        for _ in range(iterations):
            queries = self.to_query(self.norm_slots(slots))
            dots = self.scale * einsum(queries, keys, "b s c, b n c -> b s n")
            all_dots.append(dots)
            attention = dots.softmax(dim=1) + 1e-8  # over slots: they compete
            attention = attention / attention.sum(dim=2, keepdim=True)
            updates = einsum(attention, values, "b s n, b n c -> b s c")
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + self.mlp(slots)
        return slots, all_dots


class LowFrequencyDecoder(nn.Module):
    """Every slot paints one feature through a soft mask of low spatial frequency, so masks are blurry."""

    def __init__(self, dim: int, feature_dim: int, *, waves: int = 6) -> None:
        super().__init__()
        self.waves = waves
        self.to_mask = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, waves**2))
        self.to_feature = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, feature_dim))

    def forward(self, slots: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Decode slots (B, T, S, C) to alpha logits (B, T, S, H, W) and features (B, T, D, H, W)."""
        basis = cosine_basis(self.waves, height, width).to(slots)
        alpha = einsum(self.to_mask(slots), basis, "b t s k, k h w -> b t s h w")
        painted = einsum(alpha.softmax(dim=2), self.to_feature(slots), "b t s h w, b t s d -> b t d h w")
        return alpha, painted


def cosine_basis(waves: int, height: int, width: int) -> Tensor:
    """Return the waves² lowest two-dimensional cosines on a grid: (waves², height, width)."""

    def cosines(length: int) -> Tensor:
        place = (torch.arange(length) + 0.5) / length
        return (math.pi * torch.arange(waves).unsqueeze(1) * place).cos()

    return einsum(cosines(height), cosines(width), "i h, j w -> i j h w").flatten(0, 1)


def reconstruction_loss(output: SlotOutput, features: Tensor) -> Tensor:
    """Mean squared error of the reconstructed features."""
    return F.mse_loss(output.reconstruction, features)


def slot_contrast_loss(slots: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Contrast each slot's next state with every other slot of the batch (slot-slot contrast over time).

    ``-log softmax_j(cos(slot_i(t), slot_j(t+1)) / temperature)`` at j = i, over all slots j of all clips.

    Shape:
        slots: (B, T, S, C), T >= 2. Returns a scalar.
    """
    unit = rearrange(F.normalize(slots, dim=-1), "b t s c -> t (b s) c")
    similarity = einsum(unit[:-1], unit[1:], "t i c, t j c -> t i j") / temperature
    itself = repeat(torch.arange(unit.shape[1], device=slots.device), "i -> t i", t=len(similarity))
    return F.cross_entropy(similarity.flatten(0, 1), itself.flatten())
