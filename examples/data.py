"""The clips of an example: what is trained on, what the premise is asked of, what is scored."""

from pathlib import Path
from typing import NamedTuple

import torch
from examples.clips import load_clips, shown
from examples.evaluation import EvaluationSet
from examples.features import FrozenFeatures
from examples.moving_objects import SPEED, moving_objects
from torch import Tensor

TRAIN_SEED, PREMISE_SEED, TEST_SEED = 1, 2, 777
DESCRIPTION = f"moving objects, seed {TRAIN_SEED}"


class Data(NamedTuple):
    """Training features, and the clips that the premise and the scores are taken from."""

    description: str
    features: Tensor
    premise: EvaluationSet
    test: EvaluationSet


def make_data(*, num_train: int, num_premise: int, num_test: int) -> Data:
    """Make the moving objects: three sets from three seeds."""
    features, featurize = training_clips(num_train)
    return Data(
        DESCRIPTION,
        features,
        held_out(featurize, num_premise, seed=PREMISE_SEED),
        held_out(featurize, num_test, seed=TEST_SEED),
    )


def training_clips(num_clips: int, *, speed: float = SPEED) -> tuple[Tensor, FrozenFeatures]:
    """Make the features (B, T, D, H, W) of the training clips, and what makes them."""
    video = moving_objects(num_clips, seed=TRAIN_SEED, speed=speed).video
    featurize = FrozenFeatures().fit(video)
    return featurize(video), featurize


def held_out(
    featurize: FrozenFeatures, num_clips: int, *, seed: int, num_frames: int = 4, speed: float = SPEED
) -> EvaluationSet:
    """Make clips that nothing is trained on."""
    clips = moving_objects(num_clips, seed=seed, num_frames=num_frames, speed=speed)
    return EvaluationSet(clips.video, featurize(clips.video), clips.ids)


def read_data(directory: Path, *, match: str, stride: int, num_test: int) -> Data:
    """Read the user's clips; without ground truth they are trained on and looked at."""
    video, sources, skipped = load_clips(directory, match=match, stride=stride)
    features = FrozenFeatures().fit(video)(video)
    spread = torch.linspace(0, len(video) - 1, min(num_test, len(video))).round().long()
    looked_at = EvaluationSet(video[spread], features[spread], None)
    where = shown(directory)
    print(*skipped.lines(), sep="\n", end="\n" if skipped else "")
    left_out = f"; {len(skipped)} skipped" if skipped else ""
    print(f"{len(video)} clips of {video.shape[1]} frames from {len(set(sources))} videos in {where}{left_out}")
    return Data(f"{where}, {match}, stride {stride}", features, looked_at, looked_at)
