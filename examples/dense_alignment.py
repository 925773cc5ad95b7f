"""Dense alignment (SRL) on the slot model, which SSync is compared with, attached as its authors attach it.

    loss = loss + alignment(output, features, step=step)

It is also one line, but it needs more: projections that are trained with the model, the model's tokens and the
attention of all its iterations, and time quadratic in the patches of a clip.
"""

from dataclasses import dataclass

import torch
from examples.slot_model import SlotOutput
from torch import Tensor, nn

from ssync_loss import DenseDecoderAlignmentLoss, DenseEncoderAlignmentLoss, SlotRedundancyLoss


@dataclass(frozen=True)
class DenseSettings:
    """The published settings (Seong, Moon & Heo, ICLR 2026, arXiv:2602.03390). The schedule is in shares of the steps.

    Attributes:
        steps: optimizer steps of the training.
        weight: weight of the decoder term and of the encoder term.
        start_fraction: share of the steps after which both terms start.
        redundancy_weight: weight of the slot redundancy loss.
        redundancy_fraction: share of the steps after which the slot redundancy loss ends.
        group_frames: frames per window; the terms compare all patches of a window.
        top_k: nearest neighbors of a patch in each frame of the window.
    """

    steps: int
    weight: float = 0.1
    start_fraction: float = 0.2
    redundancy_weight: float = 0.1
    redundancy_fraction: float = 0.1
    group_frames: int = 4
    top_k: int = 8

    @property
    def start_step(self) -> int:
        """The first step with alignment."""
        return round(self.start_fraction * self.steps)

    @property
    def redundancy_end(self) -> int:
        """The first step without the slot redundancy loss."""
        return round(self.redundancy_fraction * self.steps)


class DenseAlignment(nn.Module):
    """The terms that the published system adds to a model's own losses, with its weights and schedule.

    Training begins with the slot redundancy loss, which idles surplus slots. After a pause, two terms start:

    - The decoder term makes the reconstructions of two patches similar if the *encoder* map gives both to one slot.
      Reconstruction and target share a projection. The target gets no gradient.
    - The encoder term makes the tokens of two patches similar if the *decoder* map gives both to one slot, or if their
      features are similar. It has its own projection.

    Labels are hard, so gradients reach the maps only through the features.

    Args:
        settings: weights and schedule.
        feature_dim: D of features and reconstruction.
        dim: C of the tokens and of both projections.
    """

    def __init__(self, settings: DenseSettings, *, feature_dim: int = 24, dim: int = 48) -> None:
        super().__init__()
        self.settings = settings
        self.project_features = nn.Linear(feature_dim, dim, bias=False)
        self.project_tokens = nn.Linear(dim, dim, bias=False)
        self.decoder_term = DenseDecoderAlignmentLoss(group_frames=settings.group_frames)
        self.encoder_term = DenseEncoderAlignmentLoss(group_frames=settings.group_frames, top_k=settings.top_k)
        self.redundancy = SlotRedundancyLoss()

    def forward(self, output: SlotOutput, features: Tensor, *, step: int) -> Tensor:
        """Return the term to add to the loss of a step. It is exactly 0 while no term is active."""
        settings = self.settings
        loss = features.new_zeros(())
        if step < settings.redundancy_end:
            loss = loss + settings.redundancy_weight * self.redundancy(output.attention, output.slots)
        if step >= settings.start_step:
            with torch.no_grad():
                anchors = _project(features, self.project_features)
            reconstruction = _project(output.reconstruction, self.project_features)
            tokens = _project(output.tokens, self.project_tokens)
            decoder = self.decoder_term(reconstruction, anchors, output.enc_logits.argmax(dim=2))
            encoder = self.encoder_term(tokens, features, output.dec_logits.argmax(dim=2))
            loss = loss + settings.weight * (decoder + encoder)
        return loss


def _project(maps: Tensor, layer: nn.Linear) -> Tensor:
    """Apply a layer to every patch of (B, T, D, H, W)."""
    projected: Tensor = layer(maps.movedim(2, -1)).movedim(-1, 2)
    return projected
