"""Warnings of likely mistakes: probabilities as logits, an inverted slot mask, two maps in one memory."""

import warnings
from typing import Any

import torch
from torch import Tensor

from ssync_loss._autocast import at_least_float32
from ssync_loss._checks import memory_of, read_numbers
from ssync_loss._compilers import is_capturing, is_traced
from ssync_loss._forks import is_forked
from ssync_loss._module import _callers_stacklevel
from ssync_loss.ssync.maps import Kind, KindArgument, Maps, check_kind

# tolerance for a sum of probabilities, which may have been float16
ABOUT = 0.01
# least difference between a slot's probabilities on two patches
SPREAD = 0.05
# least share of a map that present slots have
NEGLIGIBLE = 1e-3


def warn_of_doubts(maps: Maps, kind: KindArgument) -> None:
    """Warn of likely mistakes in maps of `bind_maps`, except in compiled code. This waits for a device."""
    if not _cannot_look() and memory_of(maps.enc) is not None:
        _warn(doubts(maps if maps.enc.is_cpu else in_cpu_memory(maps, wait=True), kind))


class FirstLook:
    """Warns once of likely mistakes in the maps of a first call, and waits for no device.

    Maps on a CUDA device are copied without waiting, and the first call that finds the copy done reads it. Maps on
    other devices, in compiled code and in a CUDA graph are not looked at.
    """

    def __init__(self) -> None:
        self.looked = False
        self._copy: tuple[Maps, torch.cuda.Event] | None = None

    def __call__(self, maps: Maps, kind: KindArgument) -> None:
        """Look at maps of `bind_maps`."""
        if _cannot_look() or (self.looked and self._copy is None) or is_capturing():
            return
        # read once: another thread may set it to None
        if (copied := self._copy) is not None:
            first, done = copied
            if done.query():
                self._copy = None
                _warn(doubts(first, kind), " (Said once.)")
            return
        self.looked = True
        memory = memory_of(maps.enc)
        if memory == "cuda":
            copies, done = in_cpu_memory(maps, wait=False), torch.cuda.Event()
            done.record(torch.cuda.current_stream(maps.enc.device))
            self._copy = copies, done
        elif memory == "cpu":
            _warn(doubts(maps, kind), " (Said once.)")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the copy behind: an event cannot be pickled."""
        return {"looked": self.looked, "_copy": None}


def _cannot_look() -> bool:
    # torch's operators may wait forever in a forked process
    return is_traced() or bool(is_forked())


def _warn(doubt: str, note: str = "") -> None:
    if doubt:
        warnings.warn(doubt + note, stacklevel=_callers_stacklevel())


def in_cpu_memory(maps: Maps, *, wait: bool) -> Maps:
    """Copy maps to the CPU; two maps in one memory stay so. Without ``wait`` the copies are filled later."""

    def copied(one: Tensor) -> Tensor:
        return one.detach().contiguous().to("cpu", non_blocking=not wait).requires_grad_(one.requires_grad)

    enc = copied(maps.enc)
    dec = enc if _is_one(maps) else copied(maps.dec)
    return Maps(enc, dec, None, None if maps.slot_mask is None else copied(maps.slot_mask))


def doubts(maps: Maps, kind: KindArgument) -> str:
    """Describe likely mistakes in maps in CPU memory, each on its own grid; "" if there are none."""
    if maps.enc.shape[2] == 1:
        return ""
    read = [read_numbers(one) for one in (maps.enc, maps.dec)]
    said, kinds = [], list(check_kind(kind))
    for turn, (name, one) in enumerate(zip(("enc_logits", "dec_logits"), read, strict=True)):
        if one is not None and kinds[turn] == "logits" and _is_probabilities(one):
            said.append(f"`{name}` looks like probabilities, and was said to be logits.")
            kinds[turn] = "probs"
    if said:
        said.append(f"Is kind={kinds[0] if kinds[0] == kinds[1] else tuple(kinds)!r} meant?")
    if _is_one(maps):
        said.append("`dec_logits` is `enc_logits`, in the same memory: each would teach itself.")
    mask = None if maps.slot_mask is None else read_numbers(maps.slot_mask)
    if mask is not None:
        meant = "it is True where a slot is present. Is it inverted?"
        if int(mask.sum(1).max()) < 2:
            said.append(f"`slot_mask` leaves no clip two slots, and the loss is 0: {meant}")
        elif any(_is_outside(one, one_kind, mask) for one, one_kind in zip(read, kinds, strict=True)):
            said.append(f"`slot_mask` leaves slots that nothing belongs to: {meant}")
    return " ".join(said)


def _is_one(maps: Maps) -> bool:
    """Tell whether two maps that learn are views of one tensor."""
    both = (maps.enc, maps.dec)
    if any(memory_of(one) is None or one.numel() == 0 or not one.requires_grad for one in both):
        return False
    enc, dec = ((one.untyped_storage().data_ptr(), one.storage_offset(), one.shape) for one in both)
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
