"""The clips of `real_features.py`, drawn at 224 x 224, with features of a pretrained network or hand-made ones.

Clips and features are computed and cached in pieces of ten clips. A smaller set is the beginning of a larger one.
Pictures and ids are cached at 64 x 64, the size at which masks are scored.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from examples import composites, moving_objects
from examples.data import TEST_SEED, TRAIN_SEED
from examples.evaluation import EvaluationSet
from examples.features import FrozenFeatures, HalfWhitening
from examples.photographs import Photograph, load_photographs, split
from examples.pieces import Pieces
from examples.pretrained import Backbone, ImgFocus
from torch import Tensor
from tqdm import tqdm

KINDS = ("sprites", "composites")
SIZE, SMALL = 224, 64
# clips per piece
PIECE = 10
# the principal axes are fitted on this many pieces of the training clips, for any number of clips
FIT = 4
DIM = 24


class Source(NamedTuple):
    """A source of clips.

    Attributes:
        name: readable name of the set.
        made_from: all that the clips depend on, except the seed of a piece.
        seed: seed of the set.
        draw: turns a piece's seed and B into video (B, T, 3, 224, 224) and ids (B, T, 224, 224).
    """

    name: str
    made_from: dict[str, Any]
    seed: int
    draw: Callable[[int, int], tuple[Tensor, Tensor]]

    def key(self) -> dict[str, Any]:
        """Return all that the pieces depend on."""
        return {**self.made_from, "seed": self.seed, "size": SIZE, "small": SMALL, "clips in a piece": PIECE}

    def piece(self, number: int) -> tuple[Tensor, Tensor]:
        """Draw a piece."""
        return self.draw(1_000_000 * self.seed + number, PIECE)


def sprites(name: str, seed: int) -> Source:
    """Draw the moving objects of the main example."""

    def draw(seed: int, number: int) -> tuple[Tensor, Tensor]:
        clips = moving_objects.moving_objects(number, seed=seed, size=SIZE)
        return clips.video, clips.ids

    return Source(name, {"clips": "moving objects", "version": moving_objects.VERSION}, seed, draw)


def photo_composites(name: str, seed: int, photographs: Sequence[Photograph]) -> Source:
    """Draw objects cut from photographs that move over another photograph."""

    def draw(seed: int, number: int) -> tuple[Tensor, Tensor]:
        clips = composites.composites(number, seed=seed, photographs=photographs, size=SIZE)
        return clips.video, clips.ids

    digests = [one.digest for one in photographs]
    return Source(name, {"clips": "composites", "version": composites.VERSION, "photographs": digests}, seed, draw)


class Sources(NamedTuple):
    """Clips to train on, and others to score on."""

    train: Source
    test: Source


def sources(kind: str, *, fold: int = 0) -> Sources:
    """Return the sources of a kind. Composites to score are cut from other photographs than those for training.

    Args:
        kind: one of `KINDS`.
        fold: which third of the photographs is held out for the test.

    Raises:
        ValueError: if there is no such kind.
        ImportError: if photographs are missing.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}; got {kind!r}.")
    if kind == "sprites":
        return Sources(sprites("sprites-train", TRAIN_SEED), sprites("sprites-test", TEST_SEED))
    photographs = split(load_photographs(), fold)
    return Sources(
        photo_composites("composites-train", TRAIN_SEED, photographs.train),
        photo_composites("composites-test", TEST_SEED, photographs.test),
    )


class Store:
    """Draws clips, computes features, and caches both.

    Args:
        cache: folder of the cache.
        backbone: network that computes tokens.
    """

    def __init__(self, cache: Path, backbone: Backbone) -> None:
        self.cache, self.backbone = cache, backbone

    def clips(self, source: Source, number: int) -> tuple[Tensor, Tensor]:
        """Return the first clips of a source: video (B, T, 3, 64, 64), uint8, and ids (B, T, 64, 64), uint8."""
        kept = self._clips(source)

        def make(place: int) -> dict[str, Tensor]:
            return _small(*source.piece(place))

        pieces = [kept.get(place, partial(make, place)) for place in _pieces(number, f"{source.name}: clips")]
        video, ids = (torch.cat([piece[name] for piece in pieces])[:number] for name in ("video", "ids"))
        return video, ids

    def features(self, source: Source, number: int, *, fitted_on: Source) -> Tensor:
        """Return the pretrained features (B, T, D, 16, 16) of the first clips of a source.

        They are half-whitened on the principal axes of the first 40 training clips, and cached in half precision.
        """
        project = self._fit(fitted_on)
        made_from = {
            **self.backbone.made_from,
            "clips": source.key(),
            "fitted on": [fitted_on.key(), FIT],
            "dim": DIM,
        }
        kept = Pieces(self.cache, f"{source.name}-features", made_from)

        def make(place: int) -> dict[str, Tensor]:
            tokens = self._tokens(source, place, keep=source == fitted_on and place < FIT)
            return {"features": project(tokens).half()}

        pieces = [kept.get(place, partial(make, place)) for place in _pieces(number, f"{source.name}: features")]
        return torch.cat([piece["features"] for piece in pieces])[:number].float()

    def _fit(self, source: Source) -> HalfWhitening:
        made_from = {**self.backbone.made_from, "clips": source.key(), "pieces": FIT, "dim": DIM}
        kept = Pieces(self.cache, f"{source.name}-axes", made_from)
        project = HalfWhitening(self.backbone.dim, DIM)

        def make() -> dict[str, Tensor]:
            tokens = (self._tokens(source, place, keep=True) for place in _pieces(FIT * PIECE, f"{source.name}: axes"))
            return project.fit(tokens).state_dict()

        project.load_state_dict(kept.get(0, make))
        return project

    def _tokens(self, source: Source, place: int, *, keep: bool) -> Tensor:
        """Compute the tokens of a piece, and cache its clips, too."""

        def make() -> dict[str, Tensor]:
            video, ids = source.piece(place)
            self._clips(source).get(place, lambda: _small(video, ids))
            return {"tokens": self.backbone(video).half()}

        if not keep:
            return make()["tokens"].float()
        made_from = {**self.backbone.made_from, "clips": source.key()}
        return Pieces(self.cache, f"{source.name}-tokens", made_from).get(place, make)["tokens"].float()

    def _clips(self, source: Source) -> Pieces:
        return Pieces(self.cache, f"{source.name}-clips", source.key())


class RealClips(NamedTuple):
    """Training features (B, T, D, 16, 16), and clips to score: the first training clips, and fresh clips."""

    features: Tensor
    trained: EvaluationSet
    fresh: EvaluationSet


def real_clips(
    kind: str,
    *,
    num_train: int,
    num_scored: int,
    cache: Path,
    hand_made: bool = False,
    fold: int = 0,
    threads: int = 1,
) -> RealClips:
    """Make the clips of a kind and their features, or read them from the cache.

    Args:
        kind: one of `KINDS`.
        num_train: number of training clips.
        num_scored: number of training clips to score (at most all), and of fresh clips.
        cache: folder of the cache.
        hand_made: random filters on the small pictures instead of the pretrained network.
        fold: which third of the photographs is held out for the fresh clips.
        threads: CPU threads of the network.

    Raises:
        ValueError: if there is no such kind, or the files of a package have changed.
        ImportError: if a package is missing.
    """
    store = Store(cache, ImgFocus(threads))
    return make_clips(sources(kind, fold=fold), store, num_train=num_train, num_scored=num_scored, hand_made=hand_made)


def make_clips(sources: Sources, store: Store, *, num_train: int, num_scored: int, hand_made: bool) -> RealClips:
    """Make clips of two sources; see `real_clips`."""
    train, test = sources
    if hand_made:
        videos = [store.clips(source, number)[0] / 255 for source, number in ((train, num_train), (test, num_scored))]
        featurize = FrozenFeatures(DIM).fit(videos[0])
        features, fresh = map(featurize, videos)
    else:
        features = store.features(train, num_train, fitted_on=train)
        fresh = store.features(test, num_scored, fitted_on=train)

    def scored(source: Source, features: Tensor) -> EvaluationSet:
        video, ids = store.clips(source, len(features))
        return EvaluationSet(video / 255, features, ids.long())

    return RealClips(features, scored(train, features[:num_scored]), scored(test, fresh))


def _small(video: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Shrink pictures and ids for the cache."""
    size = (SMALL, SMALL)
    pictures = F.interpolate(video.flatten(0, 1), size, mode="bilinear", antialias=True).unflatten(0, video.shape[:2])
    labels = F.interpolate(ids.float(), size, mode="nearest-exact")
    return {"video": (255 * pictures).round().clamp(0, 255).byte(), "ids": labels.byte()}


def _pieces(number: int, title: str) -> Iterator[int]:
    """Iterate over the pieces that hold this number of clips, with a progress bar."""
    with tqdm(total=number, desc=title, unit="clip", dynamic_ncols=True) as bar:
        for place in range(-(-number // PIECE)):
            yield place
            bar.update(min(PIECE, number - place * PIECE))
