"""The tube mask: the same random patches of every frame."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssync_loss._checks import check_int, check_number, check_type


def clip_mask(
    N: int, *, ratio: tuple[float, float] = (0.1, 0.5), prob: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """Draw the patches that a student does not see in an iteration: one set for all frames, crops and clips.

    With probability ``prob`` the set has ``floor(r N)`` random patches, with r uniform within ``ratio``. Otherwise the
    set is empty, and :func:`masked_token_loss` and :func:`affinity_consistency_loss` are 0. In a step::

        mask = clip_mask(H * W, generator=generator).view(H, W).expand(B, T, H, W)
        tokens = torch.where(mask.flatten(2).unsqueeze(3), mask_token, tokens)  # the student's, without positions yet

    Every call draws the same number of random numbers, so ranks that seed their generators with the step get the same
    mask. Compiled code takes no generator, so draw outside of it. Returns (N,), bool, on the generator's device, or on
    the CPU without a generator.

    Args:
        N: patches of a frame.
        ratio: the smallest and the largest share of masked patches, within [0, 1].
        prob: probability of masking, within [0, 1].
        generator: source of randomness; None for torch's global generator.

    Source: Pan et al., ACM MM 2022 (arXiv:2203.15312), mask of in-generative learning, as in the authors' code.
    Raises: TypeError if a number is of another type, ValueError if it is out of range.

    >>> clip_mask(10, ratio=(0.45, 0.45), prob=1.0).sum().item()  # floor(4.5)
    4
    >>> clip_mask(10, prob=0.0).sum().item()
    0
    """
    check_int("N", N, 0)
    check_number("prob", prob, 0.0, 1.0)
    check_type("generator", generator, torch.Generator, optional=True)
    if isinstance(ratio, str) or not isinstance(ratio, Sequence) or len(ratio) != 2:
        raise ValueError(f"`ratio` must be a pair (smallest, largest); got {ratio!r}.")
    low, high = ratio
    check_number("ratio", low, 0.0, 1.0)
    check_number("ratio", high, low, 1.0)
    device = torch.device("cpu") if generator is None else generator.device
    coin, share = torch.rand(2, generator=generator, dtype=torch.float64, device=device).unbind()
    num_masked = ((low + (high - low) * share) * N).floor() * (coin < prob)
    return torch.randperm(N, generator=generator, device=device) < num_masked
