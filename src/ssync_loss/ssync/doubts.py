"""Warnings of likely mistakes: probabilities as logits, an inverted slot mask, two maps in one memory."""

import warnings
from typing import Any

from torch import Tensor

from ssync_loss._autocast import at_least_float32
from ssync_loss._checks import read_numbers
from ssync_loss._compilers import is_traced
from ssync_loss._forks import is_forked
from ssync_loss._module import _callers_stacklevel
from ssync_loss.ssync.maps import Kind, KindArgument, Maps, bind_maps, check_kind

# tolerance for a sum of probabilities, which may come from halves
ABOUT = 0.01
# how far probabilities differ between patches at least
SPREAD = 0.05
# the least share of a map that present slots have
NEGLIGIBLE = 1e-3


def warn_of_doubts(
    enc_logits: Tensor, dec_logits: Tensor, kind: KindArgument, *, wait: bool, note: str = "", **given: Any
) -> None:
    """Warn of likely mistakes in the arguments of `bind_maps`, except in compiled code."""
    # in a forked process operators of torch may wait forever
    if is_traced() or is_forked():
        return
    doubt = doubts(bind_maps(enc_logits, dec_logits, **given), kind, wait=wait)
    if doubt:
        warnings.warn(doubt + note, stacklevel=_callers_stacklevel())


def doubts(maps: Maps, kind: KindArgument, *, wait: bool) -> str:
    """Describe likely mistakes in maps, each on its own grid; "" if there are none.

    Numbers on a device are read only with ``wait``. Fake and traced tensors have none.
    """
    if maps.enc.shape[2] == 1:
        return ""
    said, kinds = [], list(check_kind(kind))
    read = [_read(one, wait) for one in (maps.enc, maps.dec)]
    for turn, (name, one) in enumerate(zip(("enc_logits", "dec_logits"), read, strict=True)):
        if one is not None and kinds[turn] == "logits" and _is_probabilities(one):
            said.append(f"`{name}` looks like probabilities, and was said to be logits.")
            kinds[turn] = "probs"
    if said:
        said.append(f"Is kind={kinds[0] if kinds[0] == kinds[1] else tuple(kinds)!r} meant?")
    if _is_one(maps, read):
        said.append("`dec_logits` is `enc_logits`, in the same memory: each would teach itself.")
    mask = None if maps.slot_mask is None else _read(maps.slot_mask, wait)
    if mask is not None:
        meant = "it is True where a slot is present. Is it inverted?"
        if int(mask.sum(1).max()) < 2:
            said.append(f"`slot_mask` leaves no clip two slots, and the loss is 0: {meant}")
        elif any(_is_outside(one, one_kind, mask) for one, one_kind in zip(read, kinds, strict=True)):
            said.append(f"`slot_mask` leaves slots that nothing belongs to: {meant}")
    return " ".join(said)


def _read(tensor: Tensor, wait: bool) -> Tensor | None:
    return read_numbers(tensor.detach().cpu() if wait else tensor)


def _is_one(maps: Maps, read: list[Tensor | None]) -> bool:
    """Tell whether two maps that learn are views of one tensor."""
    if any(one is None for one in read) or not (maps.enc.requires_grad and maps.dec.requires_grad):
        return False
    enc, dec = ((one.untyped_storage().data_ptr(), one.storage_offset(), one.shape) for one in (maps.enc, maps.dec))
    return enc == dec


def _is_probabilities(maps: Tensor) -> bool:
    """Tell whether all patches (B, T, S, H, W) have the same sum over slots, which is below 1 for a mean over heads."""
    low, high = (bound.item() for bound in maps.aminmax())
    if not 0 <= low < high <= 1 + ABOUT:
        return False
    total = at_least_float32(maps).sum(2)
    # invalid patches may be 0
    total = total[total > 0]
    if not bool(total.max() - total.min() <= ABOUT * total.max()):
        return False
    # logits of a fresh layer are nearly the same everywhere, and so is their sum
    return abs(total.max().item() - 1) <= ABOUT or bool((maps.amax((3, 4)) - maps.amin((3, 4))).max() > SPREAD)


def _is_outside(maps: Tensor | None, kind: Kind, mask: Tensor) -> bool:
    """Tell whether the present slots of a mask (B, S) have almost no share of a map, in clips with absent slots.

    Absent slots that are the same on all patches are padding, which may hold anything.
    """
    some = ~mask.all(1)
    if maps is None or not some.any():
        return False
    maps, mask = at_least_float32(maps[some]), mask[some]
    varies = maps.amax((1, 3, 4)) > maps.amin((1, 3, 4))
    if not (varies & ~mask).any():
        return False
    shares = (maps.softmax(2) if kind == "logits" else maps).nan_to_num().sum((1, 3, 4))
    return bool((shares * mask).sum() < NEGLIGIBLE * shares.sum())
