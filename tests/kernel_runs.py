"""Steps through the kernels and through the torch path, put side by side."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ssync_loss import PseudoLabels, SSyncLoss
from ssync_loss.ssync.engines import triton as kernels
from ssync_loss.ssync.engines.triton import Terms
from ssync_loss.testing import SSyncCase, assert_close_gradient, assert_close_loss, assert_same_labels, gradient_scale

# kernels run in the interpreter where there is no GPU, see conftest.py; the torch path runs on the CPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SETTINGS: dict[str, Any] = {
    "merge_threshold": 0.6,
    "min_different": 1,
    "min_same": 1,
    "max_different": 0,
    "criterion": "mse",
    "label_smoothing": 0.0,
    "temperature": 1.0,
    "boundary_weight": 1.0,
    "interior_weight": 1.0,
}
LABEL_SETTINGS = ("merge_threshold", "min_different", "min_same", "max_different")


@pytest.fixture(scope="module", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Prepare Triton's language once for every module of device functions, and not at every call: half of the time."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime import interpreter

    prepared = set()

    def call(self: Any, *arguments: Any) -> Any:
        if self.fn.__module__ not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn.__module__)
        return self.rewrite()(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


class Run(NamedTuple):
    """What one step gives."""

    terms: Terms
    grad_enc: Tensor
    grad_dec: Tensor


def on_device(case: SSyncCase) -> SSyncCase:
    """Return a case where the kernels run; what is there already keeps its strides."""
    return SSyncCase._make(None if part is None else part.to(DEVICE) for part in case)


def whole_valid(case: SSyncCase) -> Tensor | None:
    """Return the valid patches as the kernels want them, (B, T, H, W); those of frames as a view."""
    if case.valid is None or case.valid.dim() == 4:
        return case.valid
    B, T, _, H, W = case.enc_logits.shape
    return case.valid[:, :, None, None].expand(B, T, H, W)


def through_kernels(case: SSyncCase, *, clean: Tensor | None = None, **settings: Any) -> Run:
    """Take one step through the kernels, forward and backward."""
    case = on_device(case)
    enc, dec = (one.detach().requires_grad_() for one in case[:2])
    terms = kernels.step(
        enc,
        dec,
        valid=whole_valid(case),
        slot_mask=case.slot_mask,
        clean=clean,
        with_labels=True,
        **SETTINGS | settings,
    )
    grads = torch.autograd.grad(terms.total, (enc, dec))
    assert terms.labels is not None
    labels = PseudoLabels._make(one.cpu() for one in terms.labels)
    return Run(Terms._make((*(one.cpu() for one in terms[:5]), labels)), *(one.cpu() for one in grads))


def through_torch(case: SSyncCase, **settings: Any) -> Run:
    """Take the same step through the torch path."""
    case = SSyncCase._make(None if part is None else part.cpu() for part in case)
    enc, dec = (one.detach().clone().requires_grad_() for one in case[:2])
    criterion = SSyncLoss(**SETTINGS | settings, backend="torch")
    terms = criterion.terms(enc, dec, valid=case.valid, slot_mask=case.slot_mask)
    return Run(Terms(*terms), *torch.autograd.grad(terms.total, (enc, dec)))


def assert_same_run(actual: Run, expected: Run, case: SSyncCase, **settings: Any) -> None:
    """Require labels to be identical, losses and gradients to differ by rounding."""
    settings = SETTINGS | settings
    assert actual.terms.labels is not None
    assert expected.terms.labels is not None
    assert_same_labels(actual.terms.labels, expected.terms.labels)
    for one, other in zip(actual.terms[:3], expected.terms[:3], strict=True):
        assert_close_loss(one, other)
    for one, other in zip(actual.terms[3:5], expected.terms[3:5], strict=True):
        assert one.dtype == torch.int64
        assert one == other
    labels = expected.terms.labels
    slot_mask = None if case.slot_mask is None else case.slot_mask.cpu()
    for grad, other, region, weight in (
        (actual.grad_enc, expected.grad_enc, labels.interior, settings["interior_weight"]),
        (actual.grad_dec, expected.grad_dec, labels.boundary, settings["boundary_weight"]),
    ):
        assert grad.dtype == other.dtype
        scale = weight * gradient_scale(
            region,
            case.enc_logits.shape[2],
            criterion=settings["criterion"],
            temperature=settings["temperature"],
            slot_mask=slot_mask,
        )
        if grad.dtype == torch.float32:
            assert_close_gradient(grad, other, scale=scale)
        else:
            # both round the same number but for its last bits
            torch.testing.assert_close(grad, other, rtol=2 * torch.finfo(grad.dtype).eps, atol=1e-7)
