"""Places of the children of a slot."""

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ssync_loss._autocast import at_least_float32, no_autocast
from ssync_loss._checks import as_index, check_type
from ssync_loss._inputs import check_floats, check_labels
from ssync_loss._settings import NOT_NEGATIVE, check_by, one_of
from ssync_loss._vectors import directions

Neighbors: TypeAlias = Literal["active", "all"]
NEIGHBORS = get_args(Neighbors)

# added to the mean length of slots
EPSILON = 1e-8

check_placement = check_by(beta=NOT_NEGATIVE, neighbors=one_of(*NEIGHBORS), min_radius=NOT_NEGATIVE)


@torch.no_grad()
def spawn_children(
    slots_active: Tensor,
    counts: Tensor,
    *,
    beta: float = 0.2,
    generator: torch.Generator | None = None,
    neighbors: Neighbors = "active",
    min_radius: float = 1e-3,
    unborn: Tensor | None = None,
) -> Tensor:
    """Place children of slots near their parents.

    ``child = s_i + r_i * v`` with v uniform on the unit sphere, one per child, and
    ``r_i = max(beta * |s_i - s_j| * |s_i| / m, min_radius * m)``. Slot j is most similar to slot i (cosine), and m is
    the mean length of the slots plus 1e-8. A single slot uses ``|s_i|`` as the distance.

    The public code has ``neighbors="all"`` and ``min_radius=0``. With ``"all"`` the children of a parent replace unborn
    slots before the next parent has children. With a radius of 0 the children of two equal slots equal their parents.
    The counts are read on the host.

    Args:
        slots_active: (K, D), the present slots.
        counts: (K,), number of children of each slot, integers of at least 0, see :func:`allot_children`.
        beta: jitter, at least 0.
        generator: source of the directions; None for torch's global generator.
        neighbors: candidates for j: present slots, as in the paper (``"active"``), or also unborn slots, which are
            usually nearer (``"all"``).
        min_radius: least radius, in units of the mean length, at least 0.
        unborn: (U, D), placeholders that are not in use yet, in order; needed with ``neighbors="all"``.

    Returns: (n_new, D) in the slots' dtype, the children of slot 0, then those of slot 1, ...
    Source: Moon, Seong & Heo, CVPR 2026 (arXiv:2603.22758), the initialization of new slots.
    Raises: TypeError on a wrong dtype; ValueError on wrong shapes, counts or settings, or fewer unborn slots than
        children.

    >>> slots = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> child = spawn_children(slots, torch.tensor([0, 1]))  # 5 apart: 0.2 * 5 * 4 / 3.5 = 1.1429
    >>> round((child - slots[1]).norm().item(), 4)
    1.1429
    """
    check_placement(beta=beta, neighbors=neighbors, min_radius=min_radius)
    check_type("generator", generator, torch.Generator, optional=True)
    size = check_floats("slots_active", slots_active, "K D", filled="K D")
    check_labels("counts", counts, "K", size, slots_active=slots_active)
    counts = as_index("counts", counts)
    if counts.min() < 0:
        raise ValueError(f"`counts` must be at least 0; got {counts.tolist()}.")
    if unborn is not None:
        check_floats("unborn", unborn, "U D", {"D": size["D"]}, slots_active=slots_active)
        if counts.sum() > len(unborn):
            raise ValueError(f"`unborn` must have a row per child, {int(counts.sum())}; got {len(unborn)}.")
    elif neighbors == "all":
        raise ValueError("`unborn` must be given with neighbors='all'; got None.")
    num_new, width = int(counts.sum()), slots_active.shape[1]
    like = at_least_float32(slots_active)
    # a generator draws only on its device
    device = like.device if generator is None else generator.device
    ways = torch.randn(num_new, width, generator=generator, dtype=like.dtype, device=device).to(like.device)
    ways, _ = directions(ways)
    return place_children(
        slots_active, counts, ways, beta=beta, neighbors=neighbors, min_radius=min_radius, unborn=unborn
    )


@torch.no_grad()
def place_children(
    slots_active: Tensor,
    counts: Tensor,
    directions: Tensor,
    *,
    beta: float,
    neighbors: Neighbors,
    min_radius: float,
    unborn: Tensor | None,
) -> Tensor:
    """Place one child along each direction (n_new, D); :func:`spawn_children` draws random directions.

    >>> slots, counts = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([1, 0])
    >>> up = torch.tensor([[0.0, 1.0]])
    >>> place_children(slots, counts, up, beta=0.7, neighbors="active", min_radius=0.0, unborn=None).tolist()
    [[3.0, 3.0]]
    """
    num_parents, first = len(slots_active), 0
    rows = at_least_float32(slots_active)
    if neighbors == "all" and unborn is not None:
        rows = torch.cat([rows, at_least_float32(unborn)])
    children = torch.empty_like(directions, dtype=rows.dtype)
    with no_autocast(rows):
        nearest = _most_similar(rows)
        for parent, count in enumerate(counts.tolist()):
            some = slice(first, first + count)
            children[some] = rows[parent] + _radii(rows, nearest, beta, min_radius)[parent] * directions[some]
            if neighbors == "all":
                # the radius of the next parent depends on these rows
                rows[num_parents:][some] = children[some]
            first += count
    return children.to(slots_active.dtype)


def _most_similar(rows: Tensor) -> Tensor:
    """Return for each row the index of the most similar other row; a single row gets its own index."""
    units, _ = directions(rows)
    return (units @ units.mT).fill_diagonal_(float("-inf")).argmax(1)


def _radii(rows: Tensor, nearest: Tensor, beta: float, min_radius: float) -> Tensor:
    """Return for each row the distance of its children."""
    length = _length(rows)
    distance = _length(rows - rows[nearest]) if len(rows) > 1 else length
    # a sum of lengths may overflow
    mean = (length / len(rows)).sum() + EPSILON
    return torch.maximum(beta * distance * (length / mean), min_radius * mean)


def _length(rows: Tensor) -> Tensor:
    """Return the lengths (K,) of rows (K, D), whose squares may overflow or underflow."""
    units, _ = directions(rows)
    return (rows * units).sum(1)
