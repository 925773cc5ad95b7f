"""The optimizer's state of newborn rows, and its updates of unborn rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ssync_loss._checks import as_index, check_type


@torch.no_grad()
def inherit_moments(optimizer: Optimizer, slots_param: nn.Parameter, parents: Tensor, first: int) -> None:
    """Give newborn rows of a parameter the optimizer's moments of their parents.

    Adam's moments of an unborn row are 0, but their bias correction has ended. The first steps of a newborn row would
    be several times too long and undo its jitter. All state in the shape of the parameter is inherited.

    Args:
        optimizer: holds the parameter.
        slots_param: the placeholders, (K_max, D) or (1, K_max, D).
        parents: row of the parent of each newborn row, (n_new,), integers.
        first: the first newborn row.

    Raises: TypeError if ``optimizer`` is no optimizer; ValueError if it does not hold the parameter.

    >>> slots = nn.Parameter(torch.tensor([[1.0], [2.0], [0.0]]))
    >>> optimizer = torch.optim.Adam([slots])
    >>> (slots[:2] * torch.tensor([[2.0], [3.0]])).sum().backward()
    >>> optimizer.step()
    >>> inherit_moments(optimizer, slots, torch.tensor([1]), first=2)
    >>> optimizer.state[slots]["exp_avg"].flatten().tolist()  # 0.1 * gradient
    [0.20000000298023224, 0.30000001192092896, 0.30000001192092896]
    """
    parents = as_index("parents", parents)
    for rows in _row_states(optimizer, slots_param):
        rows[first : first + len(parents)] = rows[parents.to(rows.device)]


def hold_rows(optimizer: Optimizer, slots_param: nn.Parameter, first: Callable[[], int]) -> None:
    """Keep an optimizer from changing the rows of a parameter from ``first()`` on.

    Weight decay shrinks rows even without a gradient. Hooks of every step restore them, and set their moments to 0.

    Args:
        optimizer: holds the parameter.
        slots_param: the placeholders.
        first: returns the first row to hold, at every step.

    Raises: TypeError if ``optimizer`` is no optimizer; ValueError if it does not hold the parameter.

    >>> slots = nn.Parameter(torch.ones(3, 1))
    >>> optimizer = torch.optim.AdamW([slots], lr=0.1, weight_decay=1.0)
    >>> hold_rows(optimizer, slots, lambda: 2)
    >>> slots[:2].sum().backward()
    >>> optimizer.step()
    >>> slots.flatten().tolist()[1:]  # 1 - 0.1 * 1 - 0.1, and unchanged
    [0.800000011920929, 1.0]
    """
    _row_states(optimizer, slots_param)
    before: list[Tensor] = []

    @torch.no_grad()
    def remember(*_: Any) -> None:
        before[:] = [rows_of(slots_param)[first() :].clone()]

    @torch.no_grad()
    def restore(*_: Any) -> None:
        rows_of(slots_param)[first() :] = before.pop()
        for rows in _row_states(optimizer, slots_param):
            rows[first() :] = 0

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(restore)


def rows_of(slots: Tensor) -> Tensor:
    """View placeholders (K_max, D) or (1, K_max, D) as rows."""
    return slots.view(slots.shape[-2:])


def _row_states(optimizer: Optimizer, slots_param: nn.Parameter) -> list[Tensor]:
    """Return the optimizer's state of every row."""
    check_type("optimizer", optimizer, Optimizer)
    if not any(one is slots_param for group in optimizer.param_groups for one in group["params"]):
        raise ValueError(f"`optimizer` must hold `slots_param`, {tuple(slots_param.shape)}; got another optimizer.")
    # `optimizer.state[slots_param]` would create a state
    known = optimizer.state.get(slots_param, {}).values()
    return [rows_of(one) for one in known if isinstance(one, Tensor) and one.shape == slots_param.shape]
