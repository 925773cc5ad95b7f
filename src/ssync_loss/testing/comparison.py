"""Compare labels, losses and gradients with those of the reference."""

import torch
from torch import Tensor

from ssync_loss.ssync.types import PseudoLabels

LOSS_RTOL = 5e-6
LOSS_ATOL = 1e-8
GRADIENT_TOL = 3e-6


def assert_same_labels(actual: PseudoLabels, expected: PseudoLabels, *, clips: Tensor | None = None) -> None:
    """Require labels, regions and representatives to be identical, dtypes included.

    With ``clips``, (B,) bool, only those clips are compared (see :func:`decidable_clips`).

    Raises: AssertionError names the first field that differs, and where.

    >>> import torch
    >>> zeros, none = torch.zeros(1, 1, 1, 2, dtype=torch.int64), torch.zeros(1, 1, 1, 2, dtype=torch.bool)
    >>> labels = PseudoLabels(zeros, zeros, none, none, torch.zeros(1, 3, dtype=torch.int64))
    >>> assert_same_labels(labels, labels)
    >>> assert_same_labels(labels._replace(dec_labels=zeros + 1), labels)
    Traceback (most recent call last):
    AssertionError: dec_labels differ in 2 places, first at (0, 0, 0, 0): got 1, expected 0.
    """
    for field, got, wanted in zip(PseudoLabels._fields, actual, expected, strict=True):
        kinds = [f"{one.dtype} {tuple(one.shape)}" for one in (got, wanted)]
        if kinds[0] != kinds[1]:
            raise AssertionError(f"{field}: got {kinds[0]}, expected {kinds[1]}.")
        different = got != wanted
        if clips is not None:
            different &= clips.view(-1, *(1 for _ in got.shape[1:]))
        if places := different.nonzero().tolist():
            first = tuple(places[0])
            raise AssertionError(
                f"{field} differ in {len(places)} places, first at {first}: "
                f"got {got[first].item()}, expected {wanted[first].item()}."
            )


def assert_close_loss(actual: Tensor, expected: Tensor, *, rtol: float = LOSS_RTOL, atol: float = LOSS_ATOL) -> None:
    """Require losses of one shape to agree: ``|actual - expected| <= atol + rtol * |expected|``, NaN where expected.

    Raises: AssertionError when a value, the shape or the dtype differs.

    >>> assert_close_loss(torch.tensor(0.5), torch.tensor(0.5000001))
    >>> assert_close_loss(torch.tensor(0.5), torch.tensor(0.50001))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: Scalars are not close!
    ...
    """
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


def gradient_scale(
    region: Tensor,
    num_slots: int,
    *,
    criterion: str = "mse",
    temperature: float = 1.0,
    slot_mask: Tensor | None = None,
) -> float:
    """Return an upper bound, up to rounding, of the entries of the gradient of a mean loss.

    The bound is ``2 / (temperature * Σ_b M_b * S_b)`` for "mse" and ``1 / (temperature * Σ_b M_b)`` for
    "cross_entropy", with M_b selected patches and S_b present slots in clip b. It is infinite if nothing is selected.
    Compare errors of a gradient with this number, not with each entry: an entry near 0 may consist of rounding errors.

    Shape: region: (B, T, H, W), bool, slot_mask: (B, S), bool.

    Raises: nothing of its own; arguments are not checked.

    >>> gradient_scale(torch.ones(1, 1, 2, 2, dtype=torch.bool), 5)
    0.1
    """
    selected = region.flatten(1).sum(dim=1)
    slots = torch.full_like(selected, num_slots) if slot_mask is None else slot_mask.sum(dim=1)
    is_mse = criterion == "mse"
    averaged = (selected * (slots if is_mse else slots > 0)).sum().item()
    return (2.0 if is_mse else 1.0) / (temperature * averaged) if averaged else float("inf")


def assert_close_gradient(
    actual: Tensor | None, expected: Tensor | None, *, scale: float, tol: float = GRADIENT_TOL
) -> None:
    """Require gradients of one shape to agree: ``|actual - expected| <= tol * scale`` everywhere, and NaN nowhere.

    A gradient of None fails. ``scale`` comes from :func:`gradient_scale`. If nothing is selected, it is infinite, and
    both gradients must be exactly 0.

    Raises: AssertionError when a value or the shape differs, or a gradient is missing.

    >>> assert_close_gradient(torch.tensor([0.1]), torch.tensor([0.1000001]), scale=0.1)
    >>> assert_close_gradient(None, torch.tensor([0.1]), scale=0.1)
    Traceback (most recent call last):
    AssertionError: a gradient is missing: actual None, expected tensor([0.1000]).
    """
    if actual is None or expected is None:
        raise AssertionError(f"a gradient is missing: actual {actual}, expected {expected}.")
    atol = 0.0 if scale == float("inf") else tol * scale
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0.0, atol=atol)
