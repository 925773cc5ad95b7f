"""What keeps the processes of a training alike: errors are averaged, newborn rows are those of the first rank."""

import torch
import torch.distributed as dist
from torch import Tensor


def weighted_mean(values: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Average values (K,) over ranks, each with its weight; one all-reduce of K + 1 numbers."""
    if not _together():
        return values
    sums = torch.cat([values * weight, weight.to(values).view(1)])
    dist.all_reduce(sums, group=group)
    return sums[:-1] / sums[-1].clamp_min(1)


def from_first_rank(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the rows of the group's first rank."""
    if _together():
        rows = rows.contiguous()
        dist.broadcast(rows, group=group, group_src=0)
    return rows


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
