"""The example's slot model at the published sizes, for the time that a training step on frozen features takes.

Slots of 64 numbers, three iterations on the first frame and two on the others, a one-block predictor, and a decoder of
three hidden layers of 1024 that is run for every slot on every patch.
"""

import torch
from einops import rearrange
from examples.slot_model import SlotModel
from torch import Tensor, nn

# features of DINOv2 ViT-S/14 at 336 pixels and of ViT-B/14 at 518
PUBLISHED = {
    "MOVi-C": {"B": 64, "T": 4, "S": 11, "H": 24, "W": 24, "D": 384},
    "YouTube-VIS": {"B": 64, "T": 4, "S": 7, "H": 37, "W": 37, "D": 768},
}
WIDTH = 64


def published_model(num_slots: int, num_patches: int, feature_dim: int) -> SlotModel:
    """Build it: the example's model with the widths of the published encoder, and their decoder."""
    model = SlotModel(num_slots, feature_dim=feature_dim, dim=WIDTH)
    wide = feature_dim + model.encoder.waves**2
    model.encoder.mlp = nn.Sequential(
        nn.LayerNorm(wide), nn.Linear(wide, 2 * feature_dim), nn.ReLU(), nn.Linear(2 * feature_dim, WIDTH)
    )
    decoder: nn.Module = PatchDecoder(num_patches, feature_dim)
    model.decoder = decoder  # type: ignore[assignment]
    return model


class PatchDecoder(nn.Module):
    """Every slot on every patch: features, and an alpha logit that is a view into the same output."""

    def __init__(self, num_patches: int, feature_dim: int, hidden: int = 1024) -> None:
        super().__init__()
        self.place = nn.Parameter(0.02 * torch.randn(num_patches, WIDTH))
        layers: list[nn.Module] = [nn.Linear(WIDTH, hidden), nn.ReLU(inplace=True)]
        for _ in range(2):
            layers += [nn.Linear(hidden, hidden), nn.ReLU(inplace=True)]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, feature_dim + 1))

    def forward(self, slots: Tensor, height: int, _: int) -> tuple[Tensor, Tensor]:
        """Decode slots (B, T, S, C) to alpha logits (B, T, S, H, W) and features (B, T, D, H, W)."""
        decoded = self.mlp(slots.unsqueeze(3) + self.place)
        alpha = decoded[..., -1]
        painted = torch.einsum("btsn,btsnd->btdn", alpha.softmax(2), decoded[..., :-1])
        alpha, painted = (rearrange(one, "b t c (h w) -> b t c h w", h=height) for one in (alpha, painted))
        return alpha, painted
