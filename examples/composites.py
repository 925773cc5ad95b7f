"""Clips of objects cut from photographs that move over another photograph, with their ground-truth ids.

The background is a drifting crop of one photograph. Three to five ellipses, boxes, triangles and blobs are cut from
other photographs, move and occlude one another. The ids are exact, because the shapes are drawn.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from examples.photographs import Photograph
from torch import Tensor

MIN_OBJECTS, MAX_OBJECTS = 3, 5
# raise it when the same seed gives different clips
VERSION = 1
# largest velocity along each axis, in images per frame
SPEED = 0.05


class Composites(NamedTuple):
    """Clips and their ground truth.

    Shape:
        video: (B, T, 3, H, W), float32 in [0, 1].
        ids: (B, T, H, W), int64; 0 is the background, k the k-th object drawn. Later ones cover earlier ones.
        photographs: (B, 1 + MAX_OBJECTS), int64: the photograph that each surface is cut from, the background first;
            -1 marks an absent object.
        num_objects: (B,), between MIN_OBJECTS and MAX_OBJECTS.
    """

    video: Tensor
    ids: Tensor
    photographs: Tensor
    num_objects: Tensor


def composites(
    num_clips: int,
    *,
    seed: int,
    photographs: Sequence[Photograph],
    num_frames: int = 4,
    size: int = 224,
    speed: float = SPEED,
) -> Composites:
    """Make clips of 3-5 objects over a background. A seed determines the clips; a smaller number gives the first ones.

    Objects have half-size 0.14-0.26 of the image and aspect 0.6-1. Shapes are turned at random; the pictures in them
    stay upright. Each surface of a clip is cut from a different photograph.

    Args:
        num_clips: B.
        seed: seed of all random choices.
        photographs: photographs to cut from, at least 1 + MAX_OBJECTS.
        num_frames: T.
        size: H = W, in pixels.
        speed: largest velocity along each axis, in images per frame.

    Raises:
        ValueError: if there are too few photographs.
    """
    surfaces = 1 + MAX_OBJECTS
    if len(photographs) < surfaces:
        raise ValueError(f"`photographs` must be at least {surfaces}; got {len(photographs)}.")
    generator = torch.Generator().manual_seed(seed)
    video = torch.empty(num_clips, num_frames, 3, size, size)
    ids = torch.zeros(num_clips, num_frames, size, size, dtype=torch.int64)
    sources = torch.full((num_clips, surfaces), -1)
    num_objects = torch.empty(num_clips, dtype=torch.int64)
    for clip in range(num_clips):
        count = int(torch.randint(MIN_OBJECTS, MAX_OBJECTS + 1, (), generator=generator))
        chosen = torch.randperm(len(photographs), generator=generator)[: 1 + count]
        num_objects[clip], sources[clip, : 1 + count] = count, chosen
        draw = _Draw(generator, num_frames, size, speed)
        pictures = [photographs[int(one)].picture for one in chosen]
        video[clip] = draw.background(pictures[0])
        for k, picture in enumerate(pictures[1:], start=1):
            covered, colors = draw.object(picture)
            ids[clip][covered] = k
            video[clip] = torch.where(covered.unsqueeze(1), colors, video[clip])
    return Composites(video, ids, sources, num_objects)


class _Draw:
    """Draws the surfaces of a clip. Positions and lengths are shares of the image."""

    def __init__(self, generator: torch.Generator, num_frames: int, size: int, speed: float) -> None:
        self.generator, self.size, self.speed = generator, size, speed
        pixel = (torch.arange(size) + 0.5) / size
        self.time = torch.arange(num_frames) - (num_frames - 1) / 2
        y, x = torch.meshgrid(pixel, pixel, indexing="ij")
        self.pixels = torch.stack([x, y], dim=-1)

    def background(self, picture: Tensor) -> Tensor:
        """Draw a drifting crop of a photograph: (T, 3, H, W)."""
        # the crop is centered in the middle of the clip, so it must reach as far as it drifts
        reach = 0.5 + self.speed * float(self.time.abs().max())
        crop = self._cut(picture, self._uniform(0.7, 1.0), reach)
        return self._colors(crop, (self.pixels - self._path(0.5, 0.5)) / reach)

    def object(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a shape: its mask (T, H, W) and its colors (T, 3, H, W)."""
        kind = int(torch.randint(0, 4, (), generator=self.generator))
        width = self._uniform(0.14, 0.26)
        height = width * self._uniform(0.6, 1.0)
        angle = self._uniform(0, 2 * math.pi)
        place = self.pixels - self._path(0.15, 0.85)  # (T, H, W, 2), relative to the object
        x, y = place.unbind(dim=-1)
        u = (math.cos(angle) * x + math.sin(angle) * y) / width
        v = (math.cos(angle) * y - math.sin(angle) * x) / height
        reach = math.hypot(width, height)
        crop = self._cut(picture, self._uniform(0.4, 0.9), reach)
        return self._inside(kind, u, v), self._colors(crop, place / reach)

    def _uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def _path(self, low: float, high: float) -> Tensor:
        """Draw a path from its middle and a velocity: (T, 1, 1, 2)."""
        center = torch.tensor([self._uniform(low, high) for _ in range(2)])
        velocity = torch.tensor([self._uniform(-self.speed, self.speed) for _ in range(2)])
        return (center + velocity * self.time.unsqueeze(1)).view(-1, 1, 1, 2)

    def _cut(self, picture: Tensor, share: float, reach: float) -> Tensor:
        """Cut a square, a share of the photograph's shorter side, and resize it for its reach: (3, P, P)."""
        side = round(share * min(picture.shape[1:]))
        top, left = (round(self._uniform(0, length - side)) for length in picture.shape[1:])
        crop = picture[:, top : top + side, left : left + side].float() / 255
        pixels = math.ceil(2 * reach * self.size)
        return F.interpolate(crop.unsqueeze(0), size=(pixels, pixels), mode="bilinear", antialias=True)[0]

    def _colors(self, crop: Tensor, place: Tensor) -> Tensor:
        """Sample a crop, which fills [-1, 1], at places (T, H, W, 2): (T, 3, H, W)."""
        # all frames form one picture, so that the crop is not copied
        rows = rearrange(place, "t h w xy -> 1 (t h) w xy")
        colors = F.grid_sample(crop.unsqueeze(0), rows, padding_mode="border", align_corners=False)
        return rearrange(colors, "1 c (t h) w -> t c h w", t=len(place)).clamp(0, 1)

    def _inside(self, kind: int, u: Tensor, v: Tensor) -> Tensor:
        """Return which points lie in an ellipse (0), box (1), triangle (2) or blob (3) that fills |u|, |v| <= 1."""
        box = (u.abs() <= 1) & (v.abs() <= 1)
        if kind == 1:
            return box
        if kind == 2:
            return box & (2 * u.abs() <= 1 - v)
        radius = (u * u + v * v).sqrt()
        edge = torch.ones_like(radius)
        if kind == 3:
            theta = torch.atan2(v, u)
            for lobes in (2, 3, 5):
                depth, phase = self._uniform(0.03, 0.12), self._uniform(0, 2 * math.pi)
                edge -= depth * (1 + (lobes * theta + phase).cos())
        return radius <= edge
