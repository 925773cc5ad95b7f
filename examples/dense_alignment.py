"""Dense alignment (SRL) on the slot model: what SSync is compared with, attached as its authors attach it.

    loss = loss + alignment(output, features, step=step)

It is one line, too, and brings more along: projections that are trained with the model, the tokens and the attention
of all iterations out of the model, and time quadratic in the patches of a clip.
"""

from dataclasses import dataclass

import torch
from examples.slot_model import SlotOutput
from torch import Tensor, nn

from ssync_loss import DenseDecoderAlignmentLoss, DenseEncoderAlignmentLoss, SlotRedundancyLoss


@dataclass(frozen=True)
class DenseSettings:
    """The published numbers (Seong, Moon & Heo, ICLR 2026, arXiv:2602.03390), the schedule as shares of a training.

    Attributes:
        steps: optimizer steps of the training.
        weight: of the decoder's and of the encoder's term.
        start_fraction: share of the steps after which both are switched on.
        redundancy_weight: of the slot redundancy.
        redundancy_fraction: share of the steps after which it is switched off.
        group_frames: frames of a window; all patches in it are compared with each other.
        top_k: neighbors of a patch, per frame of the window.
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
        """The step at which alignment is switched on."""
        return round(self.start_fraction * self.steps)

    @property
    def redundancy_end(self) -> int:
        """The step at which the slot redundancy is switched off."""
        return round(self.redundancy_fraction * self.steps)


class DenseAlignment(nn.Module):
    """The terms that the published system adds to a model's own losses, with its weights and schedule.

    First the slot redundancy, to idle what slots are not needed; then nothing; then

    - the decoder's term: patches that the *encoder's* map gives to one slot reconstruct alike. Reconstruction and
      target go through one projection, the target for comparison only: it gets no gradient.
    - the encoder's term: patches that the *decoder's* map gives to one slot, and those whose features are alike,
      have tokens alike, through a projection of their own.

    Labels are hard, so that neither map gets a gradient of its own: it reaches them through the features.

    Args:
        settings: weights and schedule.
        feature_dim: D, of features and reconstruction.
        dim: C, of the tokens and of both projections.
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
        """Compute what is added to the loss of a step; exactly 0 where nothing is."""
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
