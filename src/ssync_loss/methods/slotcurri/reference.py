"""SlotCurri in loops, see :mod:`ssync_loss.methods._slow`: one cube, one patch, one slot at a time.

Source: Moon, Seong & Heo, CVPR 2026 (arXiv:2603.22758).
"""

import math
from fractions import Fraction
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ssync_loss.methods._slow import unit, widened


def reference_structure_aware_loss(
    pred: Tensor,
    target: Tensor,
    *,
    window: int = 3,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
    eps: float = 1e-6,
    normalize: str = "joint",
) -> Tensor:
    """Compare every cube of every channel: its mean, its variance, and the covariance of both."""
    values = []
    for clip, clip_target in zip(pred.double(), target.detach().double(), strict=True):
        everything = torch.cat([clip.detach(), clip_target])
        for c in range(pred.shape[2]):
            seen = everything if normalize == "joint" else everything[:, c]
            low, high = seen.min(), seen.max()
            x, y = ((one[:, c] - low) / (high - low + eps) for one in (clip, clip_target))
            # an axis that is shorter than the window is compared cell by cell
            edges = [window if size >= window else 1 for size in x.shape]
            for place in product(*(range(size - edge + 1) for size, edge in zip(x.shape, edges, strict=True))):
                cube = tuple(slice(first, first + edge) for first, edge in zip(place, edges, strict=True))
                values.append(1 - _similarity(x[cube], y[cube], window, sigma, k1**2, k2**2))
    return widened(torch.stack(values).mean() if values else pred.double().sum(), pred, target)


def _similarity(x: Tensor, y: Tensor, window: int, sigma: float, c1: float, c2: float) -> Tensor:
    """Return the index of one cube, from deviations from its means."""
    weights = torch.ones(x.shape, dtype=torch.float64)
    for cell in product(*map(range, x.shape)):
        for place, size in zip(cell, x.shape, strict=True):
            if size == window:
                weights[cell] *= math.exp(-(((place - window // 2) / sigma) ** 2) / 2)
    weights /= weights.sum()
    mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
    variance_x, variance_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
    covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
    means = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return means * (2 * covariance + c2) / (variance_x + variance_y + c2)


def reference_slot_error(recon: Tensor, target: Tensor, masks: Tensor) -> Tensor:
    """Divide the squared error of every patch among the slots."""
    num_clips, num_frames, num_channels, height, width = recon.shape
    errors = torch.zeros(masks.shape[2], dtype=torch.float64)
    recon_, target_, masks_ = (one.detach().double() for one in (recon, target, masks))
    places = list(product(range(num_clips), range(num_frames), range(height), range(width)))
    for b, t, h, w in places:
        difference = recon_[b, t, :, h, w] - target_[b, t, :, h, w]
        for s in range(len(errors)):
            errors[s] += masks_[b, t, s, h, w] * (difference @ difference) / num_channels
    return widened(errors / max(len(places), 1), recon, target, masks)


def reference_allot_children(errors: list[float], n_new: int) -> list[int]:
    """Divide new slots in exact fractions: whole shares first, then one each to the largest remainders.

    >>> reference_allot_children([5.0, 3.0, 0.0, 2.0], 4)
    [2, 1, 0, 1]
    """
    if any(not math.isfinite(one) or one < 0 for one in errors) or not any(errors):
        return [n_new // len(errors) + (i < n_new % len(errors)) for i in range(len(errors))]
    exact = [Fraction(one) for one in errors]
    shares = [one * n_new / sum(exact) for one in exact]
    counts = [math.floor(one) for one in shares]
    # sorting keeps the order of equals
    by_remainder = sorted(range(len(errors)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: n_new - sum(counts)]:
        counts[i] += 1
    return counts


def reference_place_children(
    slots_active: Tensor,
    counts: list[int],
    directions: Tensor,
    *,
    beta: float = 0.2,
    neighbors: str = "active",
    min_radius: float = 1e-3,
    unborn: Tensor | None = None,
) -> Tensor:
    """Place one child after the other near its parent, along the given directions (n_new, D).

    >>> slots, up = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 1.0]])
    >>> reference_place_children(slots, [1, 0], up, beta=0.7).tolist()
    [[3.0, 3.0]]
    """
    num_active = len(slots_active)
    rows = [one.double() for one in slots_active]
    if neighbors == "all" and unborn is not None:
        rows += [one.double() for one in unborn]
    # the most similar rows are found once, before any child is written
    nearest = [
        max((j for j in range(len(rows)) if j != i), key=lambda j: float(unit(rows[i]) @ unit(rows[j])), default=i)
        for i in range(num_active)
    ]
    children: list[Tensor] = []
    for i in range(num_active):
        mean = sum(float(one.norm()) for one in rows) / len(rows) + 1e-8
        length = float(rows[i].norm())
        distance = float((rows[i] - rows[nearest[i]]).norm()) if len(rows) > 1 else length
        radius = max(beta * distance * length / mean, min_radius * mean)
        for _ in range(counts[i]):
            children.append(rows[i] + radius * directions[len(children)].double())
        if neighbors == "all":
            rows[num_active : num_active + len(children)] = children
    return torch.stack(children).to(slots_active.dtype) if children else slots_active[:0]


def reference_cyclic_scan(step: Any, init_state: Any, inputs: Tensor) -> dict[str, Tensor]:
    """Step through the frames, then back from the state that the last frame predicts; return the way back.

    >>> def step(state, frame, t):
    ...     return {"state_predicted": state + frame}
    >>> reference_cyclic_scan(step, torch.zeros(1), torch.tensor([[1.0, 10.0]]))["state_predicted"].tolist()
    [[12.0, 11.0]]
    """
    num_frames = inputs.shape[1]
    output = {"state_predicted": init_state}
    for t in range(num_frames):
        output = step(output["state_predicted"], inputs[:, t], t)
    way_back = [output]
    for t in range(num_frames - 2, -1, -1):
        way_back.insert(0, step(way_back[0]["state_predicted"], inputs[:, t], None))
    return {name: torch.stack([one[name] for one in way_back], 1) for name in output}
