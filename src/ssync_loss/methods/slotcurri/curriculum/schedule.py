"""The numbers of slots, and the steps at which they grow."""

from ssync_loss._checks import check_int, check_number


def slot_schedule(total: int, *, stages: int = 3, start: int = 2, sigma: float | None = None) -> list[int]:
    """List the slot budgets of the stages of a curriculum.

    Without ``sigma``, two stages are ``[start, total]`` and three ``[start, max(start, total // 2), total]``; stages
    that add nothing are dropped. With ``sigma``, stage m has ``start + m * sigma + 3 * m * (m - 1) / 2`` slots, as in
    the paper, and the last stage must have ``total``. Both rules give the published budgets for 7, 11 and 15 slots,
    with sigma 1, 3 and 5.

    Args:
        total: slots of the last stage, at least ``start``.
        stages: number of stages, 2 or 3; with ``sigma`` also more.
        start: slots of the first stage, at least 1.
        sigma: linear growth of the budgets.

    Source: Moon, Seong & Heo, CVPR 2026 (arXiv:2603.22758), the curriculum: K(m) and sigma, M stages.
    Raises: TypeError on a wrong type, ValueError if no such budgets exist.

    >>> slot_schedule(11), slot_schedule(11, sigma=3), slot_schedule(8), slot_schedule(4)
    ([2, 5, 11], [2, 5, 11], [2, 4, 8], [2, 4])
    """
    check_int("start", start, 1)
    check_int("total", total, start)
    check_int("stages", stages, 2)
    if sigma is None:
        if stages > 3:
            raise ValueError(f"`sigma` must be given for more than 3 stages; got None for stages={stages}.")
        middle = [] if stages == 2 else [max(start, total // 2)]
        return sorted({start, *middle, total})
    check_number("sigma", sigma, float("-inf"), open_low=True)
    budgets = [start + m * sigma + 3 * m * (m - 1) / 2 for m in range(stages)]
    if budgets[-1] != total:
        wanted = (total - start - 3 * (stages - 1) * (stages - 2) / 2) / (stages - 1)
        raise ValueError(f"`sigma` must be {wanted:g} to end at total={total} after {stages} stages; got {sigma}.")
    if any(not float(one).is_integer() for one in budgets) or budgets != sorted(set(budgets)):
        listed = ", ".join(f"{one:g}" for one in budgets)
        raise ValueError(f"`sigma` must give budgets that grow by whole slots; got {sigma}, which gives {listed}.")
    return [int(one) for one in budgets]


def milestones(max_steps: int) -> tuple[int, int]:
    """Return the steps after which slots are added, 10 % and 25 % of all: ``(max_steps // 10, max_steps // 4)``.

    The step of a milestone is the last with the smaller budget.

    Source: Moon, Seong & Heo, CVPR 2026 (arXiv:2603.22758), the curriculum.
    Raises: TypeError, ValueError if ``max_steps`` is no positive integer.

    >>> milestones(100_000)
    (10000, 25000)
    """
    check_int("max_steps", max_steps, 1)
    return max_steps // 10, max_steps // 4
