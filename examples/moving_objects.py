"""Clips of moving textured objects with their ground-truth ids, made from a seed.

Two to four shapes move over a background and occlude one another. Every surface has its own base color and stripes.
Neither color alone nor texture alone is noise-free, yet the objects are distinguishable.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_OBJECTS = 4
# raise it when the same seed gives different clips
VERSION = 1
SHAPES = ("ellipse", "box", "triangle", "ring", "cross", "crescent")
# largest velocity of an object along each axis, in images per frame
SPEED = 0.05
# clips per block: the pictures of all shapes at once would not fit the cache
BLOCK = 50


class MovingObjects(NamedTuple):
    """Clips and their ground truth.

    Shape:
        video: (B, T, 3, H, W), float32 in [0, 1].
        ids: (B, T, H, W), int64; 0 is the background, k the k-th object drawn. Later ones cover earlier ones.
        colors: (B, 1 + MAX_OBJECTS, 3), the base color of each surface, the background first.
        num_objects: (B,), between 2 and MAX_OBJECTS.
    """

    video: Tensor
    ids: Tensor
    colors: Tensor
    num_objects: Tensor


def moving_objects(
    num_clips: int,
    *,
    seed: int,
    num_frames: int = 4,
    size: int = 48,
    speed: float = SPEED,
    color_distance: float = 0.5,
    contrast: float = 0.2,
    noise: float = 0.05,
    shapes: Sequence[str] = SHAPES[:3],
    turn: float = 0.0,
) -> MovingObjects:
    """Make clips of 2-4 moving objects; the same seed gives the same clips.

    Objects are ellipses, rectangles and triangles of half-size 0.20-0.32 of the image and aspect 0.6-1,
    turned at random, moving by at most `speed` per frame along each axis. Surface k of a clip shows
    ``color_k + contrast * sin(stripes_k) + noise * normal``; the stripes travel with their object.

    Args:
        num_clips: B.
        seed: seed of all random choices.
        num_frames: T.
        size: H = W, in pixels.
        speed: largest velocity along each axis, in images per frame.
        color_distance: the smallest distance in RGB between the base colors of one clip.
        contrast: amplitude of the stripes.
        noise: standard deviation of the pixel noise.
        shapes: names from `SHAPES` to draw from.
        turn: angle by which objects turn between two frames; every other object turns left.

    >>> clips = moving_objects(3, seed=0)
    >>> clips.video.shape, clips.ids.shape
    (torch.Size([3, 4, 3, 48, 48]), torch.Size([3, 4, 48, 48]))
    """
    generator = torch.Generator().manual_seed(seed)
    scenes = _draw_scenes(num_clips, speed, color_distance, shapes, generator)
    video = torch.empty(num_clips, num_frames, 3, size, size)
    ids = torch.empty(num_clips, num_frames, size, size, dtype=torch.int64)
    for block in torch.split(torch.arange(num_clips), BLOCK):
        some = _Scenes(*(values[block] for values in scenes))
        ids[block], texture = _render(some, num_frames, size, turn)
        rows = torch.arange(len(block)).view(-1, 1, 1, 1)
        colors = some.colors[rows, ids[block]].movedim(-1, 2)
        picture = colors + contrast * texture.unsqueeze(2)  # (B, T, 3, H, W)
        picture += noise * torch.randn(picture.shape, generator=generator)
        video[block] = picture.clamp_(0, 1)
    return MovingObjects(video, ids, scenes.colors, scenes.num_objects)


class _Scenes(NamedTuple):
    """All random choices of the clips except the noise. Lengths are shares of the image."""

    colors: Tensor  # (B, surfaces, 3)
    num_objects: Tensor  # (B,)
    kind: Tensor  # (B, objects): index into SHAPES
    center: Tensor  # (B, objects, 2): x, y in the middle of the clip
    velocity: Tensor  # (B, objects, 2): per frame
    half_width: Tensor  # (B, objects)
    half_height: Tensor  # (B, objects)
    angle: Tensor  # (B, objects)
    stripe_angle: Tensor  # (B, surfaces)
    stripe_frequency: Tensor  # (B, surfaces): stripes per image
    stripe_phase: Tensor  # (B, surfaces)


def _draw_scenes(
    num_clips: int, speed: float, color_distance: float, shapes: Sequence[str], generator: torch.Generator
) -> _Scenes:
    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(num_clips, *shape, generator=generator)

    objects, surfaces = MAX_OBJECTS, 1 + MAX_OBJECTS
    colors = _distinct_colors(num_clips, surfaces, color_distance, generator)
    num_objects = torch.randint(2, objects + 1, (num_clips,), generator=generator)
    kinds = torch.tensor([SHAPES.index(shape) for shape in shapes])
    kind = kinds[torch.randint(0, len(kinds), (num_clips, objects), generator=generator)]
    center = uniform(objects, 2, low=0.2, high=0.8)
    velocity = uniform(objects, 2, low=-speed, high=speed)
    half_width = uniform(objects, low=0.20, high=0.32)
    half_height = half_width * uniform(objects, low=0.6, high=1.0)
    return _Scenes(
        colors=colors,
        num_objects=num_objects,
        kind=kind,
        center=center,
        velocity=velocity,
        half_width=half_width,
        half_height=half_height,
        angle=uniform(objects, high=2 * math.pi),
        stripe_angle=uniform(surfaces, high=math.pi),
        stripe_frequency=uniform(surfaces, low=3.0, high=8.0),
        stripe_phase=uniform(surfaces, high=2 * math.pi),
    )


def _render(scenes: _Scenes, num_frames: int, size: int, turn: float) -> tuple[Tensor, Tensor]:
    """Return the surface visible at every pixel, and the wave of its stripes: both (B, T, H, W)."""
    pixel = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    time = torch.arange(num_frames) - (num_frames - 1) / 2

    def spread(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1, 1)  # one value per clip, for (B, T, H, W)

    def stripes(surface: int, u: Tensor, v: Tensor) -> Tensor:
        direction = spread(scenes.stripe_angle[:, surface])
        along = u * direction.cos() + v * direction.sin()
        wave = 2 * math.pi * spread(scenes.stripe_frequency[:, surface]) * along
        return (wave + spread(scenes.stripe_phase[:, surface])).sin()

    owner = torch.zeros(len(scenes.kind), num_frames, size, size, dtype=torch.int64)
    texture = stripes(0, x, y).expand(owner.shape)
    for k in range(MAX_OBJECTS):
        # the place of every pixel relative to the object, which moves and turns
        path = scenes.center[:, k, None] + scenes.velocity[:, k, None] * time.view(1, -1, 1)  # (B, T, 2)
        dx, dy = x - path[..., 0, None, None], y - path[..., 1, None, None]
        angle = spread(scenes.angle[:, k]) + turn * (-1) ** k * time.view(1, -1, 1, 1)
        cos, sin = angle.cos(), angle.sin()
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        width, height = spread(scenes.half_width[:, k]), spread(scenes.half_height[:, k])
        inside = _inside(spread(scenes.kind[:, k]), u / width, v / height)
        covered = inside & (spread(scenes.num_objects) > k)
        owner = torch.where(covered, k + 1, owner)
        texture = torch.where(covered, stripes(k + 1, u, v), texture)
    return owner, texture


def _inside(kind: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return which points lie in a shape of `SHAPES`, given by its index, that fills |u|, |v| <= 1."""
    box = (u.abs() <= 1) & (v.abs() <= 1)
    radius = u * u + v * v
    ellipse = radius <= 1
    triangle = box & (2 * u.abs() <= 1 - v)
    ring = ellipse & (radius >= 0.3)
    cross = box & (torch.minimum(u.abs(), v.abs()) <= 0.35)
    crescent = ellipse & ((u - 0.6) ** 2 + v * v >= 0.6)
    inside = ellipse
    for number, shape in enumerate((ellipse, box, triangle, ring, cross, crescent)):
        inside = torch.where(kind == number, shape, inside)
    return inside


def _distinct_colors(num_clips: int, surfaces: int, distance: float, generator: torch.Generator) -> Tensor:
    """Draw colors (B, surfaces, 3) in [0, 1]. Redraw a clip's colors until they are far enough apart."""
    colors = torch.empty(num_clips, surfaces, 3)
    wanted = torch.arange(num_clips)
    diagonal = torch.eye(surfaces, dtype=torch.bool)
    while len(wanted):
        drawn = torch.rand(len(wanted), surfaces, 3, generator=generator)
        # an explicit difference, as the matrix form of cdist rounds differently from machine to machine
        gap = (drawn.unsqueeze(1) - drawn.unsqueeze(2)).norm(dim=-1).masked_fill(diagonal, math.inf)
        good = gap.flatten(1).amin(1) >= distance
        colors[wanted[good]] = drawn[good]
        wanted = wanted[~good]
    return colors
