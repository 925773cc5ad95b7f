"""The colors of slots, and of students."""

from functools import cache
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssync_loss._checks import check_int

Color: TypeAlias = tuple[int, int, int]

ENCODER_TAUGHT: Color = (58, 134, 255)
DECODER_TAUGHT: Color = (255, 146, 20)
BOTH_TAUGHT: Color = (214, 70, 196)
NOBODY_TAUGHT: Color = (150, 150, 150)
INVALID: Color = (24, 24, 24)
WHITE: Color = (255, 255, 255)

# index: 1 if the encoder is taught, plus 2 if the decoder is taught
BY_ROLE = (NOBODY_TAUGHT, ENCODER_TAUGHT, DECODER_TAUGHT, BOTH_TAUGHT)

ROLE_COLORS: dict[str, Color] = {
    "encoder taught (interior)": ENCODER_TAUGHT,
    "decoder taught (boundary)": DECODER_TAUGHT,
    "both": BOTH_TAUGHT,
    "nobody": NOBODY_TAUGHT,
    "invalid": INVALID,
}

NUM_COLORS = 256
# the colors of the first slots, chosen by eye
_FIRST_COLORS: tuple[Color, ...] = (
    (62, 136, 246),
    (242, 142, 43),
    (38, 166, 118),
    (226, 80, 92),
    (160, 92, 214),
    (243, 222, 92),
    (100, 210, 232),
    (240, 140, 200),
    (140, 98, 60),
    (160, 206, 84),
    (24, 92, 126),
    (186, 44, 140),
)


def palette(num_slots: int) -> Tensor:
    """Return distinct colors of slots.

    A color does not depend on the number of slots: ``palette(n)[:k] == palette(k)``. Returns (num_slots, 3) uint8: red,
    green, blue.

    Raises: TypeError, ValueError if the number is no integer within [1, 256].

    >>> palette(2).tolist()
    [[62, 136, 246], [242, 142, 43]]
    """
    check_int("num_slots", num_slots, 1, NUM_COLORS)
    return torch.tensor(_colors()[:num_slots], dtype=torch.uint8)


@cache
def _colors() -> tuple[Color, ...]:
    """Return all colors: the first are chosen by eye, every other color is furthest from the colors before it."""
    levels = np.arange(0, 256, 15)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    place = _oklab(candidates)
    chroma = np.hypot(place[:, 1], place[:, 2])
    # usable colors are not glaring, and not close to black, white or gray, which videos contain
    usable = (place[:, 0] > 0.42) & (place[:, 0] < 0.92) & (chroma > 0.05) & (chroma < 0.18)
    candidates, place = candidates[usable], place[usable]
    chosen = np.array(_FIRST_COLORS)
    distance = np.square(place[:, None] - _oklab(chosen)).sum(2).min(1)
    while len(chosen) < NUM_COLORS:
        furthest = distance.argmax()
        chosen = np.concatenate([chosen, candidates[furthest][None]])
        distance = np.minimum(distance, np.square(place - place[furthest]).sum(1))
    return tuple((int(red), int(green), int(blue)) for red, green, blue in chosen)


def _oklab(colors: NDArray[np.integer]) -> NDArray[np.float64]:
    """Convert colors to Oklab, where distance is close to the perceived difference.

    Source: Ottosson, A perceptual color space for image processing (2020).
    """
    encoded = colors / 255.0
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    cones = np.cbrt(linear @ _LINEAR_TO_CONES)
    return np.asarray(cones @ _CONES_TO_OKLAB, dtype=np.float64)


_LINEAR_TO_CONES = np.array(
    [
        [0.4122214708, 0.2119034982, 0.0883024619],
        [0.5363325363, 0.6806995451, 0.2817188376],
        [0.0514459929, 0.1073969566, 0.6299787005],
    ]
)
_CONES_TO_OKLAB = np.array(
    [
        [0.2104542553, 1.9779984951, 0.0259040371],
        [0.7936177850, -2.4285922050, 0.7827717662],
        [-0.0040720468, 0.4505937099, -0.8086757660],
    ]
)
