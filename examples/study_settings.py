"""The settings of the study: their training clips, how these are made, and whether they shaped the rule.

The families of test settings were fixed before they were run: other photographs, other shapes and motion, grainy
pictures, fewer and more slots. Development settings served to choose the cascade's dead zone, its warm-up and `every`.
"""

from collections.abc import Callable
from functools import partial
from math import pi
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from examples import real_data
from examples.clips import load_clips
from examples.data import TEST_SEED, TRAIN_SEED
from examples.evaluation import EvaluationSet
from examples.features import FrozenFeatures
from examples.moving_objects import SHAPES, moving_objects
from examples.photographs import load_photographs, split
from examples.pretrained import ImgFocus
from torch import Tensor

# training clips, and fresh clips, for the scores and the premise
NUM_SCORED = 160

Role = Literal["shaped", "test", "development"]
ROLES: tuple[Role, ...] = ("shaped", "test", "development")


class Clips(NamedTuple):
    """The clips of a setting: training features (B, T, D, H, W), and training clips and fresh clips to score.

    If a video gives several clips, the groups (B,) are the videos of the clips to score.
    """

    features: Tensor
    trained: EvaluationSet
    fresh: EvaluationSet
    trained_groups: Tensor | None = None
    fresh_groups: Tensor | None = None


class Places(NamedTuple):
    """Folders: the cache of drawn clips and pretrained features, and the user's real clips, if any."""

    cache: Path
    clips: Path | None


class Setting(NamedTuple):
    """A setting of the study.

    Attributes:
        title: title in the table.
        role: "shaped" led to the rule, "test" did not, "development" served to choose its parameters.
        num_clips: number of training clips; 0 for all.
        make: makes the clips, given the numbers of training clips and of fresh clips.
        slots: number of slots.
        seeds: default seeds of the runs.
    """

    title: str
    role: Role
    num_clips: int
    make: Callable[[int, int, Places], Clips]
    slots: int = 9
    seeds: tuple[int, ...] = (0, 1, 2)


def sprites(num_clips: int, num_fresh: int, _: Places, *, feature_noise: float = 0.0, **options: Any) -> Clips:
    """Make moving objects with hand-made features and feature noise."""
    clips, fresh = (
        moving_objects(number, seed=seed, **options)
        for number, seed in ((num_clips, TRAIN_SEED), (num_fresh, TEST_SEED))
    )
    featurize = FrozenFeatures().fit(clips.video)
    generator = torch.Generator().manual_seed(0)

    def features_of(video: Tensor) -> Tensor:
        features: Tensor = featurize(video)
        return features + feature_noise * torch.randn(features.shape, generator=generator)

    some = slice(NUM_SCORED)
    features = features_of(clips.video)
    trained = EvaluationSet(clips.video[some], features[some], clips.ids[some])
    return Clips(features, trained, EvaluationSet(fresh.video, features_of(fresh.video), fresh.ids))


def drawn_large(
    num_clips: int, num_fresh: int, places: Places, *, kind: str, pretrained: bool, swapped: bool = False
) -> Clips:
    """Make the clips of `real_data.py`, with pretrained or hand-made features.

    Args:
        num_clips: number of training clips.
        num_fresh: number of fresh clips; composites are cut from other photographs than in training.
        places: folders.
        kind: "sprites" or "composites".
        pretrained: whether to use pretrained features.
        swapped: whether to swap the photographs of training and test.
    """
    sources = real_data.sources(kind)
    if swapped:
        kept, others = split(load_photographs())[::-1]
        sources = real_data.Sources(
            real_data.photo_composites("others-train", TRAIN_SEED, kept),
            real_data.photo_composites("others-test", TEST_SEED, others),
        )
    store = real_data.Store(places.cache, ImgFocus())
    made = real_data.make_clips(sources, store, num_train=num_clips, num_scored=num_fresh, hand_made=not pretrained)
    return Clips(*made)


def real_clips(num_clips: int, num_fresh: int, places: Places) -> Clips:  # noqa: ARG001 (the folder decides)
    """Read the user's videos, every fifth of them fresh.

    Every `NAME_video.mp4` needs a `NAME_colormap.mp4`, in which every segment has one color. The segments are ground
    truth or the prediction of another model. The largest segment of a video is its background.
    """
    assert places.clips is not None  # without them, main leaves this setting out
    video, sources, *_ = load_clips(places.clips, match="*_video.mp4")
    names = list(dict.fromkeys(sources))
    groups = torch.tensor([names.index(one) for one in sources])
    maps, of_maps, *_ = load_clips(places.clips, match="*_colormap.mp4")
    if [one.replace("_colormap.", "_video.") for one in of_maps] != sources:
        raise ValueError(f"every video in {str(places.clips)!r} must have a color map of as many frames.")
    ids = torch.empty(video[:, :, 0].shape, dtype=torch.int64)
    for group in groups.unique():
        ids[groups == group] = segments(maps[groups == group])
    fresh = groups % 5 == min(len(names), 5) - 1
    featurize = FrozenFeatures().fit(video[~fresh])
    sets = (EvaluationSet(video[some], featurize(video[some]), ids[some]) for some in (~fresh, fresh))
    trained, held_out = sets
    return Clips(trained.features, trained, held_out, groups[~fresh], groups[fresh])


def segments(video: Tensor) -> Tensor:
    """Turn a color map (..., 3, H, W) in [0, 1] into ids (..., H, W). The largest segment has id 0.

    Video compression adds colors, which fill less than 1/200 of the pixels or are close to a more frequent color. Their
    pixels get the nearest of the other colors.

    >>> segments(torch.tensor([0.9, 0.1, 0.1, 0.12]).view(1, 1, 4).expand(3, 1, 4)).tolist()
    [[1, 0, 0, 0]]
    """
    colors = video.movedim(-3, -1)
    coarse = (15 * colors).round()
    found, number = coarse.flatten(0, -2).unique(dim=0, return_counts=True)
    palette = torch.empty(0, 3)
    for color in found[number.argsort(descending=True, stable=True)][: int((200 * number > number.sum()).sum())]:
        if not ((palette - color).norm(dim=1) < 3).any():
            palette = torch.cat([palette, color[None]])
    distance: Tensor = (15 * colors.unsqueeze(-2) - palette).norm(dim=-1)
    return distance.argmin(-1)


OTHER_OBJECTS = partial(sprites, shapes=SHAPES[3:], speed=0.1, turn=pi / 8)

HAND_PHOTOS, VIT_PHOTOS, VIT_SPRITES = (
    partial(drawn_large, kind=kind, pretrained=pretrained)
    for kind, pretrained in (("composites", False), ("composites", True), ("sprites", True))
)
OTHER_PHOTOS = partial(HAND_PHOTOS, swapped=True)

SETTINGS: dict[str, Setting] = {
    "sprites": Setting("sprites", "shaped", 1500, sprites),
    "sprites-few": Setting("sprites", "shaped", 40, sprites),
    "photos": Setting("photo composites", "shaped", 1500, HAND_PHOTOS),
    "photos-few": Setting("photo composites", "shaped", 40, HAND_PHOTOS),
    "vit-photos": Setting("photo composites, ViT", "shaped", 1500, VIT_PHOTOS),
    "vit-photos-few": Setting("photo composites, ViT", "shaped", 40, VIT_PHOTOS),
    "vit-sprites": Setting("sprites, ViT", "shaped", 700, VIT_SPRITES),
    "real": Setting("real clips", "shaped", 0, real_clips),
    "sprites-12": Setting("sprites", "shaped", 1500, sprites, slots=12),
    "sprites-6": Setting("sprites", "shaped", 1500, sprites, slots=6),
    "sprites-noisy": Setting("sprites, noisy features", "shaped", 1500, partial(sprites, feature_noise=0.5)),
    "vit-photos-160": Setting("photo composites, ViT", "shaped", 160, VIT_PHOTOS),
    "others": Setting("composites of other photographs", "test", 1500, OTHER_PHOTOS),
    "others-few": Setting("composites of other photographs", "test", 40, OTHER_PHOTOS),
    "shapes": Setting("other shapes and motion", "test", 1500, OTHER_OBJECTS),
    "shapes-few": Setting("other shapes and motion", "test", 40, OTHER_OBJECTS),
    "sprites-14": Setting("sprites", "test", 1500, sprites, slots=14),
    "sprites-5": Setting("sprites", "test", 1500, sprites, slots=5),
    "grainy": Setting("sprites, grainy pictures", "test", 1500, partial(sprites, noise=0.2)),
    "sprites-noisier": Setting(
        "sprites, noisier features", "development", 1500, partial(sprites, feature_noise=1.0), seeds=(5, 6)
    ),
    "sprites-160": Setting("sprites", "development", 160, sprites, seeds=(5, 6)),
    "photos-300": Setting("photo composites", "development", 300, HAND_PHOTOS, seeds=(5, 6)),
    "photos-500": Setting("photo composites", "development", 500, HAND_PHOTOS, seeds=(5, 6)),
}
# settings with additional runs at fixed levels and other thresholds
LEVELS = ("sprites", "photos", "photos-few", "vit-photos")
