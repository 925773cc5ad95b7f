"""Runs of the kernels without the modules."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ssync_loss import PseudoLabels
from ssync_loss.ssync.engines import ENGINES
from ssync_loss.ssync.engines.triton import TritonEngine
from ssync_loss.ssync.maps import Maps
from ssync_loss.ssync.settings import Settings
from ssync_loss.testing import DistillationCase, SSyncCase

# without a GPU, kernels run in the interpreter, see conftest.py; the torch path runs on the CPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = TritonEngine()


@pytest.fixture(scope="module", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Patch Triton's language once per module of device functions, not at every call, which halves the time."""
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


class Run:
    """The terms and gradients of one step of an engine, moved to the CPU."""

    def __init__(self, backend: str, case: SSyncCase, *, clean: Tensor | None = None, **settings: Any) -> None:
        device = DEVICE if backend == "triton" else "cpu"
        enc, dec, valid, slot_mask = (None if part is None else part.detach().to(device) for part in case)
        assert enc is not None
        assert dec is not None
        maps = Maps(enc.requires_grad_(), dec.requires_grad_(), valid, slot_mask, clean)
        terms = ENGINES[backend].terms(maps, Settings(**settings))
        self.labels = PseudoLabels._make(one.cpu() for one in terms.labels)
        self.values = [one.detach().cpu() for one in terms[:5]]
        self.loss = self.values[0]
        self.grads = [one.cpu() for one in torch.autograd.grad(terms.total, (enc, dec))]


def labels_of(case: SSyncCase, **settings: Any) -> PseudoLabels:
    """Compute the labels of a case with the kernels."""
    enc, dec, valid, slot_mask = (None if part is None else part.to(DEVICE) for part in case)
    assert enc is not None
    assert dec is not None
    labels = KERNELS.pseudo_labels(Maps(enc, dec, valid, slot_mask, None), Settings(**settings))
    return PseudoLabels._make(one.cpu() for one in labels)


def distilled(case: DistillationCase, *, reduction: Any = "mean", **settings: Any) -> Tensor:
    """Distill labels into one map with the kernels."""
    logits, target, region, slot_mask = (None if part is None else part.to(DEVICE) for part in case)
    assert logits is not None
    assert target is not None
    assert region is not None
    return KERNELS.distill(logits, target, region, slot_mask, Settings(**settings), reduction).cpu()
