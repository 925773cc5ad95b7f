"""Small clips from a seed: what the hypothesis strategies are made of.

Every generator makes one clip from one integer, and the seed 0 always makes the plainest clip there is, so
that a failing batch shrinks to the one clip that matters among plain ones. Logits are multiples of a power
of two: their sums are exact, hence no comparison with a mean hangs on rounding.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Choice = TypeVar("Choice")

# few values, so that overlaps equal each other and a threshold all the time
OVERLAPS = (0.0, 0.25, 0.5, 0.6, 0.75, 1.0)

# logits are integers times this
UNIT = 1 / 8


def graph_clip(seed: int, slots: int, *, distinct_areas: bool) -> tuple[Floats, Ints]:
    """Return a symmetric overlap (S, S) and areas (S,)."""
    rng = np.random.default_rng(seed)
    overlap = np.zeros((slots, slots))
    area = np.zeros(slots, dtype=np.int64)
    if seed:
        # a loose tree with long paths, a random graph, or groups that are cliques
        _pick(rng, (_path_links, _tree_links, _random_links, _clique_links))(rng, overlap)
        overlap = np.maximum(overlap, overlap.T)
        np.fill_diagonal(overlap, rng.choice([0.0, 0.5, 1.0], size=slots, p=[0.1, 0.1, 0.8]))
        # three values among many slots: the largest area of a group is often shared
        area = rng.choice([0, 5, 9], size=slots)
    if distinct_areas:
        area = rng.permutation(slots)
    return overlap, area


def _path_links(rng: np.random.Generator, overlap: Floats) -> None:
    order = rng.permutation(len(overlap))
    values = rng.choice(OVERLAPS, size=len(order) - 1, p=[0.02, 0.02, 0.06, 0.1, 0.2, 0.6])
    overlap[order[:-1], order[1:]] = values


def _tree_links(rng: np.random.Generator, overlap: Floats) -> None:
    order = rng.permutation(len(overlap))
    for child in range(1, len(order)):
        overlap[order[child], order[rng.integers(child)]] = rng.choice(OVERLAPS)


def _random_links(rng: np.random.Generator, overlap: Floats) -> None:
    density = rng.choice([0.1, 0.3, 1.0])
    values = rng.choice(OVERLAPS, size=overlap.shape)
    overlap[:] = np.where(rng.random(overlap.shape) < density, values, 0.0)


def _clique_links(rng: np.random.Generator, overlap: Floats) -> None:
    group = rng.integers(0, 3, size=len(overlap))
    overlap[:] = np.where(group[:, None] == group, rng.choice(OVERLAPS[3:]), rng.choice(OVERLAPS[:3]))


def label_clip(seed: int, shape: Sequence[int], slots: int) -> Ints:
    """Return labels (T, H, W) within [0, slots)."""
    rng = np.random.default_rng(seed)
    if not seed:
        return np.zeros(shape, dtype=np.int64)
    make = _pick(rng, (_moving_boxes, _moving_boxes, _dots, _checkers, _noise_labels, _frame_labels))
    return make(rng, shape) % slots


def _moving_boxes(rng: np.random.Generator, shape: Sequence[int]) -> Ints:
    frames, height, width = shape
    labels = np.full(shape, rng.integers(8))
    for _ in range(rng.integers(1, 4)):
        top, left = rng.integers(height), rng.integers(width)
        bottom, right = rng.integers(top, height) + 1, rng.integers(left, width) + 1
        name, drift = rng.integers(8), rng.integers(-1, 2)
        for t in range(frames):
            labels[t, top:bottom, max(left + drift * t, 0) : max(right + drift * t, 0)] = name
    return labels


def _dots(rng: np.random.Generator, shape: Sequence[int]) -> Ints:
    labels = np.full(shape, rng.integers(8))
    for _ in range(rng.integers(0, 3)):
        labels[tuple(rng.integers(shape))] = rng.integers(8)
    return labels


def _checkers(rng: np.random.Generator, shape: Sequence[int]) -> Ints:
    return np.asarray((np.indices(shape) * rng.integers(0, 2, size=(3, 1, 1, 1))).sum(axis=0) % 2)


def _noise_labels(rng: np.random.Generator, shape: Sequence[int]) -> Ints:
    return rng.integers(0, rng.integers(1, 8, endpoint=True), size=shape)


def _frame_labels(rng: np.random.Generator, shape: Sequence[int]) -> Ints:
    return np.broadcast_to(rng.integers(0, 8, size=(shape[0], 1, 1)), shape)


def map_pair_clip(seed: int, shape: Sequence[int], slots: int, *, ties: bool, minus_inf: bool) -> tuple[Floats, Floats]:
    """Return an encoder and a decoder map (T, S, H, W).

    Without ``ties`` no two slots have the same logit anywhere, except -inf. With ``minus_inf`` some
    patches, some slots and some single logits are -inf.
    """
    rng = np.random.default_rng(seed)
    if seed:
        enc = _logits(rng, shape, slots)
        _make_redundant(rng, enc)
        relation = rng.integers(4)
        if relation == 0:
            dec = enc.copy()
        elif relation == 1:
            # a place to the right: the maps agree but at the edges
            dec = np.roll(enc, 1, axis=3)
        else:
            dec = _logits(rng, shape, slots)
    else:
        enc = np.zeros((shape[0], slots, *shape[1:]), dtype=np.int64)
        dec = enc.copy()
    maps = (_to_floats(rng, enc, ties=ties), _to_floats(rng, dec, ties=ties))
    if minus_inf and seed:
        for logits in maps:
            _punch(rng, logits, whole_patches=ties)
    return maps


def _logits(rng: np.random.Generator, shape: Sequence[int], slots: int) -> Ints:
    style = _pick(rng, (_object_logits, _object_logits, _coarse_logits, _fine_logits, _constant_logits))
    return style(rng, shape, slots)


def _object_logits(rng: np.random.Generator, shape: Sequence[int], slots: int) -> Ints:
    owner = label_clip(int(rng.integers(1, 2**32)), shape, slots)
    won = owner[:, None] == np.arange(slots)[:, None, None]
    return np.asarray(np.where(won, 24, -24) + rng.integers(-6, 7, size=won.shape))


def _coarse_logits(rng: np.random.Generator, shape: Sequence[int], slots: int) -> Ints:
    return 4 * rng.integers(-1, 2, size=(shape[0], slots, *shape[1:]))


def _fine_logits(rng: np.random.Generator, shape: Sequence[int], slots: int) -> Ints:
    return rng.integers(-64, 65, size=(shape[0], slots, *shape[1:]))


def _constant_logits(rng: np.random.Generator, shape: Sequence[int], slots: int) -> Ints:
    logits = np.zeros((shape[0], slots, *shape[1:]), dtype=np.int64)
    # every slot constant over the clip: nothing exceeds a mean, nothing is active
    return logits + rng.integers(-3, 4, size=(slots, 1, 1))


def _make_redundant(rng: np.random.Generator, logits: Ints) -> None:
    """Let some slots repeat others, exactly or but for a few patches, so that there is something to merge."""
    slots = logits.shape[1]
    for _ in range(rng.choice([0, 0, 1, slots - 1])):
        source, copy = rng.integers(slots), rng.integers(slots)
        same = rng.random(logits[:, 0].shape) < rng.choice([0.7, 1.0])
        logits[:, copy] = np.where(same, logits[:, source], logits[:, copy])


def _to_floats(rng: np.random.Generator, logits: Ints, *, ties: bool) -> Floats:
    if ties:
        return np.asarray(logits * UNIT, dtype=np.float64)
    # a different remainder for every slot
    slots = logits.shape[1]
    parts = 1 << (slots - 1).bit_length()
    numerators = logits * parts + rng.permutation(slots)[:, None, None]
    return np.asarray(numerators * (UNIT / parts), dtype=np.float64)


def _punch(rng: np.random.Generator, logits: Floats, *, whole_patches: bool) -> None:
    """Set single logits, a slot throughout and, if wanted, whole patches to -inf; else never a whole one."""
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


def region_clip(seed: int, shape: Sequence[int]) -> Bools:
    """Return a set of patches (T, H, W): none for the seed 0, often empty, full, or a single patch."""
    rng = np.random.default_rng(seed)
    region = np.zeros(shape, dtype=np.bool_)
    style = rng.integers(4) if seed else 0
    if style == 1:
        region[tuple(rng.integers(shape))] = True
    elif style > 1:
        region = rng.random(shape) < rng.choice([0.2, 0.5, 1.0])
    return region


def valid_clip(seed: int, shape: Sequence[int], *, empty: bool) -> Bools:
    """Return valid patches, (T, H, W) or (T,): all for the seed 0, else a box, frames, patches or none."""
    rng = np.random.default_rng(seed)
    valid = np.ones(shape, dtype=np.bool_)
    style = rng.integers(5) if seed else 0
    if style == 1:
        lows = [rng.integers(size) for size in shape]
        highs = [rng.integers(low, size) + 1 for low, size in zip(lows, shape, strict=True)]
        valid[:] = False
        valid[tuple(slice(low, high) for low, high in zip(lows, highs, strict=True))] = True
    elif style == 2:
        valid[rng.random(shape[0]) < 0.5] = False
    elif style == 3:
        valid = rng.random(shape) < rng.choice([0.3, 0.8])
    elif style == 4:
        valid[:] = False
    if not empty and not valid.any():
        valid[tuple(rng.integers(shape))] = True
    return valid


def present_slots(seed: int, slots: int, *, empty: bool) -> Bools:
    """Return present slots (S,): all for the seed 0, else some, one or none."""
    rng = np.random.default_rng(seed)
    present = np.ones(slots, dtype=np.bool_)
    style = rng.integers(6) if seed else 0
    if style == 1:
        present[:] = False
    elif style == 2:
        present = np.arange(slots) == rng.integers(slots)
    elif style > 2:
        present = rng.random(slots) < 0.6
    if not empty and not present.any():
        present[rng.integers(slots)] = True
    return present


def _pick(rng: np.random.Generator, choices: Sequence[Choice]) -> Choice:
    return choices[int(rng.integers(len(choices)))]
