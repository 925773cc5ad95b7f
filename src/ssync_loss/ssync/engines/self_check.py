"""Test whether a fast engine agrees with plain torch on a small case."""

from threading import Thread

import torch
from torch import Tensor

from ssync_loss.ssync.engines.contract import Engine
from ssync_loss.ssync.maps import Maps
from ssync_loss.ssync.settings import Settings

TOLERANCE = 1e-5
# 0.9 lies between two overlaps, so a wrong mean changes what is merged
CASES = (Settings(merge_threshold=0.3), Settings(0.9, 2, 2, 1, "cross_entropy", 0.1, 0.5, 2.0, 0.5))


def complaint_about(engine: Engine, torch_engine: Engine, device: str) -> str | None:
    """Return a difference between an engine and torch on a device, or None. An exception is a difference."""
    complaints: list[str | None] = []

    def ask() -> None:
        try:
            complaints.append(_compare(engine, torch_engine, device))
        except Exception as error:  # plain torch replaces an engine that fails
            complaints.append(f"{type(error).__name__}: {error}")

    # a new thread has no modes of the caller: fake tensors, autocast, no gradients, torch.func
    thread = Thread(target=ask)
    try:
        thread.start()
    except RuntimeError as error:
        return str(error)
    thread.join()
    return complaints[0] if complaints else "the check was ended"


def _compare(engine: Engine, torch_engine: Engine, device: str) -> str | None:
    for settings in CASES:
        for masked in (False, True):
            got, wanted = (_results(one, settings, masked, device) for one in (engine, torch_engine))
            for part, right in wanted.items():
                scale = float(right.abs().max())
                off = float((got[part] - right).abs().max())
                # NaN fails this comparison, but would pass `off > ...`
                if not off <= TOLERANCE * scale:
                    return f"{part} differs by {off}, and its largest value is {scale}, for {masked=} and {settings}."
    return None


def _results(engine: Engine, settings: Settings, masked: bool, device: str) -> dict[str, Tensor]:
    maps = _small_maps(masked, device)
    terms, loss = engine.terms(maps, settings), engine.loss(maps, settings)
    # the incoming gradients 1 and 2
    grads = torch.autograd.grad(loss, (maps.enc, maps.dec), retain_graph=True)
    twice = torch.autograd.grad(2 * loss, (maps.enc, maps.dec))
    values = [*terms[:5], loss, *grads, *twice, *terms.labels]
    names = [*terms._fields[:5], "loss", "grad_enc", "grad_dec", "2 grad_enc", "2 grad_dec", *terms.labels._fields]
    return {name: value.detach().double() for name, value in zip(names, values, strict=True)}


def _small_maps(masked: bool, device: str) -> Maps:
    """Return two clips of three blobs, of which two overlap; no comparison is close to a tie."""
    shape = (2, 2, 3, 5, 7)
    axes = [torch.arange(size, dtype=torch.float32, device=device) for size in shape]
    clip, frame, slot, row, column = torch.meshgrid(*axes, indexing="ij")
    center = torch.where(slot == 1, 0.7, 3.3 - 0.2 * slot) + 0.3 * frame
    near = -0.3 * (row - center) ** 2 - 0.2 * (column - 1.5 * center) ** 2
    enc = near + 0.4 * torch.cos(3 * row + 5 * column + slot) + 0.1 * torch.sin(7 * clip + 2 * slot + row)
    dec = 0.5 * enc + 0.2 * torch.sin(row * column + 2 * slot + clip)
    valid = slot_mask = None
    if masked:
        # scattered: a compiler may mistake the patches of one vector
        valid = ((row + 2 * column + frame) % 5 > 1)[:, :, 0]
        slot_mask = (slot + clip != 2)[:, 0, :, 0, 0]
    return Maps(enc.requires_grad_(), dec.requires_grad_(), valid, slot_mask, None)
