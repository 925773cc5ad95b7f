"""Whether ``backend="auto"`` may trust a fast engine: it has to agree with plain torch on a small case, once."""

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ssync_loss.ssync.engines.torch import TorchEngine
from ssync_loss.ssync.maps import Maps
from ssync_loss.ssync.settings import Settings

RTOL = 1e-5
CASES = (Settings(merge_threshold=0.3), Settings(0.3, 2, 2, 1, "cross_entropy", 0.1, 0.5, 2.0, 0.5))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_trusted(name: str, device: str) -> bool:
    """Tell whether an engine agrees with torch on a device: values, labels and gradients.

    Asked once a process and device; a compiler asks while it traces, and takes the answer as a constant. While a CUDA
    graph is captured nothing is run: an answer from before holds, and without one it is no.
    """
    if (name, device) not in _answers:
        if device.startswith("cuda") and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False
        _answers[name, device] = _ask(name, device)
    return _answers[name, device]


_answers: dict[tuple[str, str], bool] = {}


def _ask(name: str, device: str) -> bool:
    try:
        # of fake tensors, say, there is nothing to compare
        with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
            with torch.autocast(torch.device(device).type, enabled=False):
                complaint = _compare(name, device)
    except Exception as error:  # noqa: BLE001 (whatever it is, torch can compute instead)
        complaint = f"{type(error).__name__}: {error}"
    if complaint is not None:
        warnings.warn(
            f"Engine {name!r} does not agree with plain torch here, so backend='auto' takes torch on {device}. "
            f"Please report this, with the output of `python -m torch.utils.collect_env`: {complaint} (Said once.)",
            stacklevel=2,
        )
    return complaint is None


def _compare(name: str, device: str) -> str | None:
    """Return how an engine differs from torch, or None."""
    for settings in CASES:
        for masked in (False, True):
            results = [_results(engine, settings, masked, device) for engine in (name, "torch")]
            for part in results[1]:
                got, wanted = results[0][part], results[1][part]
                scale = float(wanted.double().abs().max())
                if not torch.allclose(got.double(), wanted.double(), rtol=RTOL, atol=RTOL * scale):
                    return f"{part} of {settings}, {masked=}: {got.flatten()[:8].tolist()} is not {wanted.flatten()[:8].tolist()}"
    return None


def _results(name: str, settings: Settings, masked: bool, device: str) -> dict[str, Tensor]:
    from ssync_loss.ssync.engines import ENGINES

    maps = _small_maps(masked, device)
    terms = ENGINES[name].terms(maps, settings)
    loss = ENGINES[name].loss(maps, settings)
    # a gradient that came in and is not 1, too
    grads = torch.autograd.grad(2.0 * loss, (maps.enc, maps.dec))
    labels: dict[str, Any] = terms.labels._asdict()
    values = {"total": terms.total, "boundary": terms.boundary, "interior": terms.interior, "loss": loss}
    return {"gradient of the encoder": grads[0], "gradient of the decoder": grads[1], **values, **labels}


def _small_maps(masked: bool, device: str) -> Maps:
    """Two clips of three blobs, two of which share a place; no comparison is close."""
    shape = (2, 2, 3, 5, 7)
    clip, frame, slot, row, column = (
        torch.arange(size, dtype=torch.float32, device=device).view([-1 if axis == own else 1 for own in range(5)])
        for axis, size in enumerate(shape)
    )
    center = torch.where(slot == 1, 1.2, 5.1 - slot) + 0.3 * frame
    enc = -0.3 * (row - center) ** 2 - 0.2 * (column - 1.5 * center) ** 2 + 0.37 * torch.cos(3 * row + 5 * column + slot)
    enc = enc + 0.1 * torch.sin(7 * clip + 2 * slot + row)
    dec = 0.5 * enc + 0.2 * torch.sin(row * column + 2 * slot + clip)
    valid = slot_mask = None
    if masked:
        valid = (row + column + frame < 9).squeeze(2).expand(shape[0], shape[1], *shape[3:])
        slot_mask = torch.tensor([[True, True, True], [True, False, True]], device=device)
    return Maps(enc.expand(shape).clone().requires_grad_(), dec.expand(shape).clone().requires_grad_(), valid, slot_mask, None)


_ = lru_cache, TorchEngine
