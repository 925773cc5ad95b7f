"""SMTC's correspondence over time (Qian, Ding, Liu & Lin, ICCV 2023): do slots keep to their objects?

    pip install -e ".[examples]"
    python examples/neighbors/temporal_correspondence.py                    # one seed, under four minutes on one core
    python examples/neighbors/temporal_correspondence.py --seeds 0 1 2      # mean ± sd over three
    python examples/neighbors/temporal_correspondence.py --table examples/neighbors/results/temporal_correspondence.json

Similar patches of two frames should belong to the same slot (semantic consistency). Matching slots of two frames should
be similar (instance consistency). No two slots should cover the same patches (mask diversity). The teacher is the
model's moving average.

To make identity hard, objects move three times as fast as in the other examples, and the own loss is the reconstruction
alone. The slot contrast over time, elsewhere one of the own losses, has a separate run with its usual weight. Student
and teacher see the same frozen features, without the published changes of color. The speed, and the numbers that
differ from the published ones (`WEIGHT`, `MOMENTUM`, `AREA` and `POOL`), were chosen with seed 0 on other clips than
those of the table.
"""

import sys
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # lets this file run as a script

from examples.checkpoint import Settings
from examples.data import DESCRIPTION, TEST_SEED, held_out, training_clips
from examples.evaluation import EvaluationSet, evaluate, maps_of
from examples.neighbors.study import OWN, Column, Method, Options, Scores, Study, main, with_ssync
from examples.slot_model import SlotModel, SlotOutput, slot_contrast_loss

from ssync_loss import InstanceConsistencyLoss, MaskDiversityLoss, SemanticConsistencyLoss
from ssync_loss.ema import EmaTeacher
from ssync_loss.functional import valid_instances
from ssync_loss.metrics import MetricAverage, image_fg_ari, masks_to_labels

# weight of all three terms; with the published 1 (and no reconstruction loss), masks do not form here
WEIGHT = 0.1
# after a thousand steps the published 0.999 would still contain the initial weights
MOMENTUM = 0.99
# the share of a frame that a slot must win to count; the published 0.2 is for semantics, and larger than most objects
AREA = 0.05
# correspondences are between squares of 2x2 patches, in a quarter of the time
POOL = 2
# the largest velocity along an axis, in images per frame
SPEED = 0.15
CONTRAST, SMTC = "+ slot contrast", "+ SMTC"

COLUMNS = (
    Column("same slot", "kept_last", 3),
    Column("FG-ARI", "dec_fg_ari", 3),
    Column("ARI", "dec_ari", 3),
)


class SlotContrast(Method):
    """The slot contrast over time, for comparison: each slot is contrasted with all other slots of the batch."""

    def loss(self, output: SlotOutput, features: Tensor, step: int) -> Tensor:  # noqa: ARG002 (the same at every step)
        """Compute the contrast."""
        return 0.5 * slot_contrast_loss(output.slots)


class Correspondence(Method):
    """SMTC's three terms on the encoder's maps and the slots; the slots are instances of a single semantic."""

    def __init__(self, model: SlotModel, settings: Settings) -> None:
        super().__init__(model, settings)
        dim = model.initial_slots.shape[1]
        self.project = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.teacher = EmaTeacher(model, momentum=MOMENTUM)
        self.teacher_project = EmaTeacher(self.project, momentum=MOMENTUM)
        self.semantic = SemanticConsistencyLoss(pool=POOL)
        self.instance = InstanceConsistencyLoss()
        self.diversity = MaskDiversityLoss()

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the projection."""
        return list(self.project.parameters())

    def loss(self, output: SlotOutput, features: Tensor, step: int) -> Tensor:  # noqa: ARG002 (the same at every step)
        """Compute the weighted sum of the three terms."""
        taught = self.teacher(features)
        semantic = self.semantic(output.enc_logits, taught.enc_logits, features)
        diversity = self.diversity(output.enc_logits)
        instance = self.instance(
            embeddings(output, self.project), embeddings(taught, self.teacher_project), counted(output), counted(taught)
        )
        term: Tensor = WEIGHT * (semantic + diversity + instance)
        return term

    def after_step(self, optimizer: Optimizer, step: int) -> None:  # noqa: ARG002 (the same at every step)
        """Move the teacher toward the model."""
        self.teacher.update(self.model)
        self.teacher_project.update(self.project)


def embeddings(output: SlotOutput, project: nn.Module) -> Tensor:
    """Project the slots to vectors of length 1: (B, T, 1, S, C)."""
    projected: Tensor = project(output.slots)
    return F.normalize(projected, dim=-1).unsqueeze(2)


def counted(output: SlotOutput) -> Tensor:
    """Select the slots that cover enough patches: (B, T, 1, S)."""
    # every slot is its own semantic, so only the area decides
    slots = output.slots
    return valid_instances(output.enc_logits, slots, slots.unsqueeze(3), area_thr=AREA).mT


def kept(masks: Tensor, ids: Tensor) -> tuple[float, float]:
    """Measure how often an object's best slot, by IoU in one frame, is its best slot in another.

    The result is a share of the objects in both frames, averaged over clips. It is 1 if a single slot has all patches,
    so read it together with scores of the masks.

    Shape:
        masks, ids: (B, T, H, W), integers from 0; id 0 is the background.

    Returns:
        The share from each frame to the next, and the share from the first frame to the last.

    >>> import torch
    >>> ids = torch.tensor([[[[1, 1, 2, 2]], [[1, 1, 2, 2]], [[1, 1, 2, 2]]]])
    >>> masks = torch.tensor([[[[3, 3, 0, 0]], [[3, 3, 5, 5]], [[3, 3, 5, 5]]]])  # object 2 goes from slot 0 to 5
    >>> kept(masks, ids)
    (0.75, 0.5)
    """
    covered = F.one_hot(masks).flatten(2, 3).float()
    shown = F.one_hot(ids).flatten(2, 3).float()[..., 1:]
    common = shown.mT @ covered  # (B, T, objects, slots), counts
    union = shown.sum(2).unsqueeze(3) + covered.sum(2).unsqueeze(2) - common
    best = (common / union.clamp_min(1)).argmax(3)
    seen = shown.any(2)

    def share(before: Tensor, after: Tensor, both: Tensor) -> float:
        same = ((before == after) & both).flatten(1).sum(1) / both.flatten(1).sum(1)
        # a clip may have no object in both frames
        return same.nanmean().item()

    following = share(best[:, :-1], best[:, 1:], seen[:, :-1] & seen[:, 1:])
    return following, share(best[:, 0], best[:, -1], seen[:, 0] & seen[:, -1])


def identity(model: SlotModel, data: EvaluationSet) -> Scores:
    """Score the identity of slots by `kept`, and the FG-ARI of frames, which swaps do not lower."""
    assert data.ids is not None  # these have ground truth
    _, dec = maps_of(model, data.features)
    masks = masks_to_labels(dec, (data.ids.shape[-2], data.ids.shape[-1]))
    frames = MetricAverage(image_fg_ari, background=0)
    frames.update(masks, data.ids)
    following, last = kept(masks, data.ids)
    return {"kept_next": following, "kept_last": last, "frame_fg_ari": frames.compute().item()}


def score(model: SlotModel, data: EvaluationSet, threshold: float | None) -> Scores:
    """Score the masks as every example does, and the identity of the slots."""
    scores = evaluate(model, data, threshold) | identity(model, data)
    return scores | {"lost_over_time": scores["frame_fg_ari"] - scores["dec_fg_ari"]}


def build(options: Options) -> tuple[Study, Tensor]:
    """Make the clips and the study."""
    num_train, num_test = (48, 8) if options.quick else (1500, 200)
    features, featurize = training_clips(num_train, speed=SPEED)
    test = held_out(featurize, num_test, seed=TEST_SEED, speed=SPEED)
    settings = Settings(
        data=f"{DESCRIPTION}, up to {SPEED} of the image per frame",
        num_clips=num_train,
        slots=options.slots,
        steps=options.steps,
        contrast_weight=0.0,
    )
    study = Study(
        title="Same slot: how often an object's best slot in the first frame is its best in the last.",
        methods={OWN: Method, CONTRAST: SlotContrast, SMTC: Correspondence},
        readings={"": lambda model: score(model, test, settings.threshold)},
        columns=COLUMNS,
        settings=settings,
        compared_with={with_ssync(SMTC): SMTC},
        alone=[CONTRAST],
    )
    return study, features


if __name__ == "__main__":
    sys.exit(main("temporal_correspondence", "Slots that keep to their objects over time.", build, None, steps=1000))
