"""A video slot model of the size that is trained on frozen features, for the time that a training step takes.

features --MLP--> tokens --slot attention, frame by frame--> slots --MLP decoder--> features and alpha logits

The sizes are those of the published configurations: slots of 64 numbers, three iterations on the first frame and
two on the others, a one-block predictor, and a decoder of three hidden layers of 1024 that is run for every slot
on every patch. It is here for its cost: no attempt is made to train it well.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Workload(NamedTuple):
    """What a step is taken on.

    Attributes:
        batch: published number of clips of a step.
        frames: of a clip.
        slots: of the model.
        height: of the grid of patches.
        width: of it.
        feature_dim: of the backbone.
    """

    batch: int
    frames: int
    slots: int
    height: int
    width: int
    feature_dim: int


# features of DINOv2 ViT-S/14 at 336 pixels and of ViT-B/14 at 518
PUBLISHED = {
    "MOVi-C": Workload(64, 4, 11, 24, 24, 384),
    "YouTube-VIS": Workload(64, 4, 7, 37, 37, 768),
}


class SlotVideoOutput(NamedTuple):
    """What a clip gives.

    Shape:
        slots: (B, T, S, C). enc_logits, dec_logits: (B, T, S, H, W). reconstruction: (B, T, N, D).
    """

    slots: Tensor
    enc_logits: Tensor
    dec_logits: Tensor
    reconstruction: Tensor


class SlotVideoModel(nn.Module):
    """Slot attention over the frames of a clip, and an MLP decoder.

    Shape:
        features: (B, T, N, D), N = H * W. Returns a `SlotVideoOutput`.
    """

    def __init__(self, workload: Workload, *, dim: int = 64, hidden: int = 1024) -> None:
        super().__init__()
        self.grid = (workload.height, workload.width)
        num_features = workload.feature_dim
        self.encoder = nn.Sequential(
            nn.LayerNorm(num_features),
            nn.Linear(num_features, 2 * num_features),
            nn.ReLU(),
            nn.Linear(2 * num_features, dim),
        )
        self.initial_slots = nn.Parameter(torch.randn(workload.slots, dim))
        self.norm_tokens, self.norm_slots = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_query, self.to_key, self.to_value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
        self.predictor = nn.TransformerEncoderLayer(dim, 4, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.place = nn.Parameter(0.02 * torch.randn(workload.height * workload.width, dim))
        self.decoder = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_features + 1),
        )

    def forward(self, features: Tensor) -> SlotVideoOutput:
        """Follow the slots through the frames, then decode every frame."""
        tokens = self.norm_tokens(self.encoder(features))
        keys, values = self.to_key(tokens), self.to_value(tokens)
        prior = self.initial_slots.expand(len(features), -1, -1)
        all_slots, all_dots = [], []
        for t in range(features.shape[1]):
            slots, dots = self.attend(keys[:, t], values[:, t], prior, iterations=3 if t == 0 else 2)
            all_slots.append(slots)
            all_dots.append(dots)
            prior = self.predictor(slots)
        slots = torch.stack(all_slots, 1)
        decoded = self.decoder(slots.unsqueeze(3) + self.place)
        # a view into the decoder's output, as these models have it
        alpha = decoded[..., -1]
        reconstruction = torch.einsum("btsn,btsnd->btnd", alpha.softmax(2), decoded[..., :-1])
        enc_logits = torch.stack(all_dots, 1).unflatten(3, self.grid)
        return SlotVideoOutput(slots, enc_logits, alpha.unflatten(3, self.grid), reconstruction)

    def attend(self, keys: Tensor, values: Tensor, slots: Tensor, *, iterations: int) -> tuple[Tensor, Tensor]:
        """Refine slots (B, S, C) on tokens (B, N, C); also return the last dots (B, S, N)."""
        dots = keys
        for _ in range(iterations):
            dots = self.to_query(self.norm_slots(slots)) @ keys.mT / keys.shape[-1] ** 0.5
            attention = dots.softmax(1) + 1e-8
            updates = (attention / attention.sum(2, keepdim=True)) @ values
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + self.mlp(slots)
        return slots, dots


def own_loss(output: SlotVideoOutput, features: Tensor) -> Tensor:
    """What such a model trains with before anything is added: reconstruction, and contrast of slots over time."""
    unit = F.normalize(output.slots, dim=-1).transpose(0, 1).flatten(1, 2)
    similarity = unit[1:] @ unit[:-1].mT / 0.1
    itself = torch.arange(similarity.shape[1], device=similarity.device).expand(len(similarity), -1)
    contrast = F.cross_entropy(similarity.flatten(0, 1), itself.flatten())
    return F.mse_loss(output.reconstruction, features) + 0.5 * contrast
