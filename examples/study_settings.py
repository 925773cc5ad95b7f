"""The settings of the study: what is trained on, whether it shaped the rule, and how its clips are made.

The families of test settings are named here before they were run: other photographs, other shapes and motion, grainy
pictures, fewer and more slots. Development settings are those on which the cascade's dead zone, its listening and
`every` were looked at.
"""

from collections.abc import Callable
from functools import partial
from math import pi
from typing import Any, Literal, NamedTuple

import torch
from examples.data import TEST_SEED, TRAIN_SEED
from examples.evaluation import EvaluationSet
from examples.features import FrozenFeatures
from examples.moving_objects import SHAPES, moving_objects
from torch import Tensor

# clips that are scored, and that the premise is asked of: trained on, and fresh
NUM_SCORED = 160

Role = Literal["shaped", "test", "development"]
ROLES: tuple[Role, ...] = ("shaped", "test", "development")


class Clips(NamedTuple):
    """The clips of a setting: the features (B, T, D, H, W) trained on, and what is scored of them and of fresh ones.

    Where clips were cut from fewer videos, there are the videos (B,) of both.
    """

    features: Tensor
    trained: EvaluationSet
    fresh: EvaluationSet
    trained_groups: Tensor | None = None
    fresh_groups: Tensor | None = None


class Setting(NamedTuple):
    """A setting of the study.

    Attributes:
        title: in the table.
        role: "shaped" the rule (a row of it led to the rule), "test" did not, "development" chose its knobs.
        num_clips: that are trained on.
        make: makes the clips, so many to train on and so many fresh ones.
        slots: of the model.
        seeds: of the trainings where the command line names none.
    """

    title: str
    role: Role
    num_clips: int
    make: Callable[[int, int], Clips]
    slots: int = 9
    seeds: tuple[int, ...] = (0, 1, 2)


def sprites(num_clips: int, num_fresh: int, *, feature_noise: float = 0.0, **options: Any) -> Clips:
    """Make moving objects with hand-made features, which may be noisy."""
    clips, fresh = (
        moving_objects(number, seed=seed, **options)
        for number, seed in ((num_clips, TRAIN_SEED), (num_fresh, TEST_SEED))
    )
    featurize = FrozenFeatures().fit(clips.video)
    generator = torch.Generator().manual_seed(0)

    def features_of(video: Tensor) -> Tensor:
        features: Tensor = featurize(video)
        return features + feature_noise * torch.randn(features.shape, generator=generator)

    return put_together(features_of(clips.video), clips.video, clips.ids, features_of(fresh.video), fresh)


def put_together(features: Tensor, video: Tensor, ids: Tensor, fresh_features: Tensor, fresh: Any) -> Clips:
    """Choose the first clips of those that are trained on to be scored, too."""
    some = slice(NUM_SCORED)
    trained = EvaluationSet(video[some], features[some], ids[some])
    return Clips(features, trained, EvaluationSet(fresh.video, fresh_features, fresh.ids))


OTHER_OBJECTS = partial(sprites, shapes=SHAPES[3:], speed=0.1, turn=pi / 8)

SETTINGS: dict[str, Setting] = {
    "sprites": Setting("sprites", "shaped", 1500, sprites),
    "sprites-few": Setting("sprites", "shaped", 40, sprites),
    "sprites-6": Setting("sprites", "shaped", 1500, sprites, slots=6),
    "sprites-12": Setting("sprites", "shaped", 1500, sprites, slots=12),
    "sprites-noisy": Setting("sprites, noisy features", "shaped", 1500, partial(sprites, feature_noise=0.5)),
    "shapes": Setting("other shapes and motion", "test", 1500, OTHER_OBJECTS),
    "shapes-few": Setting("other shapes and motion", "test", 40, OTHER_OBJECTS),
    "grainy": Setting("sprites, grainy pictures", "test", 1500, partial(sprites, noise=0.2)),
    "sprites-5": Setting("sprites", "test", 1500, sprites, slots=5),
    "sprites-14": Setting("sprites", "test", 1500, sprites, slots=14),
    "sprites-noisier": Setting(
        "sprites, noisier features", "development", 1500, partial(sprites, feature_noise=1.0), seeds=(5, 6)
    ),
    "sprites-160": Setting("sprites", "development", 160, sprites, seeds=(5, 6)),
}
# those in which levels held fixed and other thresholds are trained, too
LEVELS = ("sprites", "sprites-few")
