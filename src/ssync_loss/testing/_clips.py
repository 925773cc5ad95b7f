"""Small clips from a seed, for the hypothesis strategies.

Seed 0 makes the plainest clip, so that a failing batch shrinks to one failing clip among plain ones. Logits are
multiples of a power of two: their sums are exact, and no comparison with a mean depends on rounding.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# with few values, overlaps often equal each other and the threshold
OVERLAPS = (0.0, 0.25, 0.5, 0.6, 0.75, 1.0)

# logits are integer multiples of this number
UNIT = 1 / 8


def graph_clip(seed: int, slots: int, *, distinct_areas: bool) -> tuple[Floats, Ints]:
    """Return a symmetric overlap (S, S) of a random graph, of cliques or of a tree, and areas (S,)."""
    rng = np.random.default_rng(seed)
    overlap = np.zeros((slots, slots))
    area = np.zeros(slots, dtype=np.int64)
    if seed:
        style = rng.integers(4)
        if style == 0:
            linked = rng.random(overlap.shape) < rng.choice([0.1, 0.3, 1.0])
            overlap[linked] = rng.choice(OVERLAPS, size=linked.sum())
        elif style == 1:
            group = rng.integers(0, 3, size=slots)
            overlap[:] = np.where(group[:, None] == group, rng.choice(OVERLAPS[3:]), rng.choice(OVERLAPS[:3]))
        else:
            # every slot is linked to an earlier slot; with `is_path` to the previous slot, which makes one long path
            order, is_path = rng.permutation(slots), rng.random() < 0.5
            for child in range(1, slots):
                parent = child - 1 if is_path else rng.integers(child)
                overlap[order[child], order[parent]] = 1.0 if is_path and rng.random() < 0.5 else rng.choice(OVERLAPS)
        overlap = np.maximum(overlap, overlap.T)
        np.fill_diagonal(overlap, rng.choice([0.0, 0.5, 1.0], size=slots, p=[0.1, 0.1, 0.8]))
        # with three values for many slots, largest areas often tie
        area = rng.choice([0, 5, 9], size=slots)
    if distinct_areas:
        area = rng.permutation(slots)
    return overlap, area


def label_clip(seed: int, shape: Sequence[int], slots: int) -> Ints:
    """Return labels (T, H, W) within [0, slots): one label per frame, noise, checkers, dots or moving boxes."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, dtype=np.int64)
    style = rng.integers(6) if seed else None
    if style == 0:
        labels += rng.integers(0, 8, size=(shape[0], 1, 1))
    elif style == 1:
        labels += rng.integers(0, rng.integers(1, 8, endpoint=True), size=shape)
    elif style == 2:
        labels += (np.indices(shape) * rng.integers(0, 2, size=(3, 1, 1, 1))).sum(axis=0) % 2
    elif style == 3:
        labels += rng.integers(8)
        for _ in range(rng.integers(0, 3)):
            labels[tuple(rng.integers(shape))] = rng.integers(8)
    elif style is not None:
        labels += rng.integers(8)
        for _ in range(rng.integers(1, 4)):
            _add_moving_box(rng, labels)
    return labels % slots


def _add_moving_box(rng: np.random.Generator, labels: Ints) -> None:
    frames, height, width = labels.shape
    top, left = rng.integers(height), rng.integers(width)
    bottom, right = rng.integers(top, height) + 1, rng.integers(left, width) + 1
    name, drift = rng.integers(8), rng.integers(-1, 2)
    for t in range(frames):
        labels[t, top:bottom, max(left + drift * t, 0) : max(right + drift * t, 0)] = name


def map_pair_clip(seed: int, shape: Sequence[int], slots: int, *, ties: bool, minus_inf: bool) -> tuple[Floats, Floats]:
    """Return an encoder and a decoder map (T, S, H, W), as :func:`ssync_loss.testing.map_pairs` describes them."""
    rng = np.random.default_rng(seed)
    enc = dec = np.zeros((shape[0], slots, *shape[1:]), dtype=np.int64)
    if seed:
        enc = _logits(rng, shape, slots)
        _make_redundant(rng, enc)
        relation = rng.integers(4)
        # one patch to the right, or equal maps
        dec = _logits(rng, shape, slots) if relation > 1 else np.roll(enc, relation, axis=3)
    maps = (_to_floats(rng, enc, ties=ties), _to_floats(rng, dec, ties=ties))
    if minus_inf and seed:
        for logits in maps:
            _punch(rng, logits, whole_patches=ties)
    return maps


def _logits(rng: np.random.Generator, shape: Sequence[int], slots: int) -> Ints:
    """Draw objects, few values, many values, or slots that are constant over the clip and thus never active."""
    full = (shape[0], slots, *shape[1:])
    style = rng.integers(5)
    if style == 0:
        return 4 * rng.integers(-1, 2, size=full)
    if style == 1:
        return rng.integers(-64, 65, size=full)
    if style == 2:
        return np.zeros(full, dtype=np.int64) + rng.integers(-3, 4, size=(slots, 1, 1))
    won = label_clip(int(rng.integers(1, 2**32)), shape, slots)[:, None] == np.arange(slots)[:, None, None]
    return np.asarray(np.where(won, 24, -24) + rng.integers(-6, 7, size=full))


def _make_redundant(rng: np.random.Generator, logits: Ints) -> None:
    slots = logits.shape[1]
    for _ in range(rng.choice([0, 0, 1, slots - 1])):
        source, copy = rng.integers(slots), rng.integers(slots)
        same = rng.random(logits[:, 0].shape) < rng.choice([0.7, 1.0])
        logits[:, copy] = np.where(same, logits[:, source], logits[:, copy])


def _to_floats(rng: np.random.Generator, logits: Ints, *, ties: bool) -> Floats:
    slots, parts = logits.shape[1], 1
    if not ties:
        # every slot has another remainder, so the logits of a patch differ
        parts = 1 << (slots - 1).bit_length()
        logits = logits * parts + rng.permutation(slots)[:, None, None]
    return np.asarray(logits * (UNIT / parts), dtype=np.float64)


def _punch(rng: np.random.Generator, logits: Floats, *, whole_patches: bool) -> None:
    """Set single logits and a whole slot to -inf; set whole patches to -inf only if ``whole_patches``."""
    before = logits.copy()
    logits[rng.random(logits.shape) < rng.choice([0.0, 0.1, 0.5])] = -np.inf
    if rng.random() < 0.3:
        logits[:, rng.integers(logits.shape[1])] = -np.inf
    if whole_patches:
        lost = rng.random((len(logits), 1, *logits.shape[2:])) < rng.choice([0.0, 0.2])
        logits[np.broadcast_to(lost, logits.shape)] = -np.inf
    else:
        lost = np.isneginf(logits).all(axis=1, keepdims=True)
        logits[:] = np.where(lost, before, logits)


def mask_clip(seed: int, shape: Sequence[int], *, plain: bool, empty: bool = True) -> Bools:
    """Return a mask: ``plain`` for seed 0, else none, all, one, a box, some of the first axis, or some cells."""
    rng = np.random.default_rng(seed)
    style = rng.integers(6) if seed else int(plain)
    mask = np.full(shape, style == 1)
    one = tuple(rng.integers(shape))
    if style == 2:
        mask[one] = True
    elif style == 3:
        mask[tuple(slice(low, rng.integers(low, size) + 1) for low, size in zip(one, shape, strict=True))] = True
    elif style == 4:
        mask[rng.random(shape[0]) < 0.5] = True
    elif style == 5:
        mask = rng.random(shape) < rng.choice([0.2, 0.5, 0.8])
    if not empty and not mask.any():
        mask[one] = True
    return mask
