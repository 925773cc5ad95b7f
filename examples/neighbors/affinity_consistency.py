"""INO's affinity consistency (Pan et al., ACM MM 2022): do the tokens of an object stay similar over time?

    python examples/neighbors/affinity_consistency.py                  # one seed, under four minutes on one core
    python examples/neighbors/affinity_consistency.py --seeds 0 1 2    # mean ± sd over three
    python examples/neighbors/affinity_consistency.py --table examples/neighbors/results/affinity_consistency.json

The encoder's tokens are trained for reconstruction alone, and may forget how objects differ. One line more teaches the
tokens of consecutive frames the affinities that a moving average of the encoder finds. As published, the affinities of
tokens then propagate the true labels of the first frame through a clip, and J&F scores the result. The frozen input
features are the reference.

The published student sees masked frames, and its features are the logits of a prototype head. Here it sees a random
crop of every frame, and the features are the tokens: this encoder sees single patches, so it could not guess a masked
one. Without crops there is a shortcut. Tokens that only encode their position have high affinity to the same position
of all frames, like the teacher's tokens. On development clips such tokens propagated labels worse than without the
loss. A position in a crop is not a position in the frame.

What do the crops do alone? Another run has the same crops and the same teacher, but no affinities and no second frame:
the token of a patch is compared with the teacher's token of that patch.

The size of the crops and both weights were chosen on development clips with seed 0. The settings of the propagation
were chosen there with the frozen features.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # lets this file run as a script

from examples.checkpoint import Settings
from examples.data import DESCRIPTION, TEST_SEED, held_out, training_clips
from examples.evaluation import EvaluationSet, evaluate
from examples.neighbors.study import OWN, Column, Method, Options, Scores, Study, main, with_ssync
from examples.slot_model import SlotModel, SlotOutput

from ssync_loss import AffinityConsistencyLoss
from ssync_loss.ema import EmaTeacher
from ssync_loss.functional import propagate_labels
from ssync_loss.metrics import MetricAverage, contour_accuracy, j_and_f, region_similarity

AFFINITY, AGREEMENT = "+ affinity", "+ agreement"
NUM_FRAMES = 8

COLUMNS = (
    Column("J&F of tokens", "j_and_f", 3),
    Column("FG-ARI", "dec_fg_ari", 3),
)


class Affinity(Method):
    """Tokens of crops learn the affinities of a teacher that sees whole frames."""

    weight = 0.01
    # side of a crop in patches; a frame has 12
    side = 6

    def __init__(self, model: SlotModel, settings: Settings) -> None:
        super().__init__(model, settings)
        self.teacher = EmaTeacher(model.encoder, momentum=0.996, final_momentum=1.0, num_steps=settings.steps)
        self.affinity = AffinityConsistencyLoss()

    def loss(self, output: SlotOutput, features: Tensor, step: int) -> Tensor:  # noqa: ARG002 (of whole frames, all steps)
        """Compare student and teacher in crops at random places."""
        corners = torch.randint(features.shape[-1] - self.side + 1, (features.shape[1], 2)).tolist()
        student = tokens_of(self.model.encoder, crop(features, corners, self.side))
        teacher = crop(tokens_of(self.teacher, features), corners, self.side)
        return self.weight * self.compare(student, teacher)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare the affinities of tokens (B, T, C, side, side)."""
        term: Tensor = self.affinity(student, teacher)
        return term

    def after_step(self, optimizer: Optimizer, step: int) -> None:  # noqa: ARG002 (the same at all steps)
        """Move the teacher toward the student."""
        self.teacher.update(self.model.encoder)


class Agreement(Affinity):
    """The same crops and teacher, but a comparison patch by patch."""

    weight = 0.3

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare the directions of tokens (B, T, C, side, side)."""
        return 1 - F.cosine_similarity(student, teacher, dim=2).mean()


def tokens_of(encoder: nn.Module, features: Tensor) -> Tensor:
    """Put the tokens of an encoder on the grid of the features: (B, T, C, H, W)."""
    tokens: Tensor = encoder(features)
    return rearrange(tokens, "b t (h w) c -> b t c h w", h=features.shape[-2])


def crop(maps: Tensor, corners: Sequence[tuple[int, int]], side: int) -> Tensor:
    """Cut a square out of every frame of maps (B, T, D, H, W), given its upper left corner.

    >>> maps = torch.arange(8).view(1, 2, 1, 2, 2)
    >>> crop(maps, [(0, 0), (1, 0)], 1).flatten().tolist()
    [0, 6]
    """
    frames = zip(maps.unbind(dim=1), corners, strict=True)
    return torch.stack([frame[..., y : y + side, x : x + side] for frame, (y, x) in frames], dim=1)


def carry(features: Tensor, ids: Tensor) -> Scores:
    """Score labels that features propagate from the first frame to the others.

    Objects that are not in the first frame become background.

    Shape:
        features: (B, T, D, h, w). ids: (B, T, H, W), 0 for the background.

    >>> features = torch.eye(2)[torch.tensor([[0, 1, 1], [1, 1, 0]])].mT.view(1, 2, 2, 1, 3)
    >>> ids = torch.tensor([[[[0, 1, 1]], [[2, 1, 0]]]])
    >>> carry(features, ids)["j"]  # pixels 0 and 1 are taken for the object
    0.5
    """
    found = propagate_labels(features, ids[:, 0], num_context=NUM_FRAMES, radius=12, top_k=15, temperature=0.2)
    shown = F.one_hot(ids[:, 0].flatten(1), int(ids.max()) + 1).amax(dim=1)
    objects = ids * shown.gather(1, ids.flatten(1)).view_as(ids)
    scores = {}
    for name, metric in (("j_and_f", j_and_f), ("j", region_similarity), ("f", contour_accuracy)):
        mean = MetricAverage(metric, background=0, skip_first=1)
        mean.update(found, objects)
        scores[name] = mean.compute().item()
    return scores


@torch.no_grad()
def score(model: SlotModel, data: EvaluationSet, threshold: float | None) -> Scores:
    """Score the tokens by label propagation, and the masks."""
    assert data.ids is not None  # these clips have ground truth
    return evaluate(model, data, threshold) | carry(tokens_of(model.encoder, data.features), data.ids)


def build(options: Options) -> tuple[Study, Tensor]:
    """Make the clips and the study."""
    num_train, num_test = (48, 8) if options.quick else (1500, 100)
    features, featurize = training_clips(num_train)
    test = held_out(featurize, num_test, seed=TEST_SEED, num_frames=NUM_FRAMES)
    assert test.ids is not None
    frozen = {f"frozen_{name}": value for name, value in carry(test.features, test.ids).items()}
    settings = Settings(data=DESCRIPTION, num_clips=num_train, slots=options.slots, steps=options.steps)
    study = Study(
        title=f"J&F of labels that tokens propagate through {NUM_FRAMES} frames, trained on 4; frozen features reach "
        f"{frozen['frozen_j_and_f']:.3f}. FG-ARI of decoder masks.",
        methods={OWN: Method, AFFINITY: Affinity, AGREEMENT: Agreement},
        readings={"": lambda model: score(model, test, settings.threshold) | frozen},
        columns=COLUMNS,
        settings=settings,
        compared_with={with_ssync(AFFINITY): AFFINITY},
        alone=[AGREEMENT],
    )
    return study, features


if __name__ == "__main__":
    sys.exit(main("affinity_consistency", "Tokens with and without affinity consistency.", build, None, steps=1200))
