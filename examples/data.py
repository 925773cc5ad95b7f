"""The clips of an example: for training, for the premise and for scoring."""

from pathlib import Path
from typing import NamedTuple

import torch
from examples.clips import load_clips, shown
from examples.evaluation import Asked, EvaluationSet
from examples.features import FrozenFeatures
from examples.moving_objects import SPEED, moving_objects
from torch import Tensor

TRAIN_SEED, PREMISE_SEED, TEST_SEED = 1, 2, 777
DESCRIPTION = f"moving objects, seed {TRAIN_SEED}"


class Data(NamedTuple):
    """Training features, clips for the premise, and clips to score.

    The premise is checked on training clips, where the loss acts, and on fresh clips of other videos, if there are any.
    """

    description: str
    features: Tensor
    trained: Asked
    fresh: Asked | None
    test: EvaluationSet


def make_data(*, num_train: int, num_premise: int, num_test: int) -> Data:
    """Make three sets of moving objects from three seeds."""
    features, featurize = training_clips(num_train)
    fresh = held_out(featurize, num_premise, seed=PREMISE_SEED)
    test = held_out(featurize, num_test, seed=TEST_SEED)
    return Data(DESCRIPTION, features, Asked(features[:num_premise]), Asked(fresh.features), test)


def training_clips(num_clips: int, *, speed: float = SPEED) -> tuple[Tensor, FrozenFeatures]:
    """Return the features (B, T, D, H, W) of the training clips, and the extractor fitted on them."""
    video = moving_objects(num_clips, seed=TRAIN_SEED, speed=speed).video
    featurize = FrozenFeatures().fit(video)
    return featurize(video), featurize


def held_out(
    featurize: FrozenFeatures, num_clips: int, *, seed: int, num_frames: int = 4, speed: float = SPEED
) -> EvaluationSet:
    """Make clips that no model is trained on."""
    clips = moving_objects(num_clips, seed=seed, num_frames=num_frames, speed=speed)
    return EvaluationSet(clips.video, featurize(clips.video), clips.ids)


def read_data(directory: Path, *, match: str, stride: int, num_premise: int, num_test: int) -> Data:
    """Read the user's clips, which have no ground truth.

    Every fifth video is held out from training. Of two to four videos, the last one is. A single video is not split.
    """
    video, sources, skipped = load_clips(directory, match=match, stride=stride)
    names = list(dict.fromkeys(sources))
    groups = torch.tensor([names.index(one) for one in sources])
    kept = groups % 5 == min(len(names), 5) - 1
    if len(names) == 1:
        kept = torch.zeros_like(kept)
    featurize = FrozenFeatures().fit(video[~kept])
    features, fresh = featurize(video[~kept]), None
    spread = _spread(num_test, len(features))
    looked_at = EvaluationSet(video[~kept][spread], features[spread], None)
    asked = _spread(num_premise, len(features))
    trained = Asked(features[asked], groups[~kept][asked])
    if kept.any():
        asked = _spread(num_premise, int(kept.sum()))
        fresh = Asked(featurize(video[kept][asked]), groups[kept][asked])
    where = shown(directory)
    print(*skipped.lines(), sep="\n", end="\n" if skipped else "")
    left_out = f"; {len(skipped)} skipped" if skipped else ""
    print(f"{len(video)} clips of {video.shape[1]} frames from {len(set(sources))} videos in {where}{left_out}")
    if kept.any():
        print(f"{int(kept.sum())} clips from {len(groups[kept].unique())} of them are kept fresh, for the premise")
    return Data(f"{where}, {match}, stride {stride}", features, trained, fresh, looked_at)


def _spread(number: int, of: int) -> Tensor:
    """Choose a number of evenly spaced clips, or all if there are fewer."""
    return torch.linspace(0, of - 1, min(number, of)).round().long()
