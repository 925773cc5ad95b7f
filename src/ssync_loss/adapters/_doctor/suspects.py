"""Tensors that may be maps: by their values, their names, and what else is there."""

import re
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from einops import rearrange
from torch import Tensor

from ssync_loss._checks import FLOATS
from ssync_loss.adapters._doctor.readings import Hints, Reading, readings_of
from ssync_loss.adapters._doctor.values import MAX_SAMPLE, Values, read_values
from ssync_loss.adapters._doctor.walk import Found
from ssync_loss.ssync.maps import Kind

Role: TypeAlias = Literal["encoder", "decoder", "unknown"]

MAX_TENSORS = 200
# names are hints: what a map may be called, what it may not, and the roles they speak for, first strong then weak
MAP = re.compile(r"attn|attent|mask|alpha|dots|logit|attribut|segment|prob|softmax")
_OTHER = re.compile(r"feat(?!ure_attrib)|slots?$|hidden|state|recon|video|image|rgb|pixel|target|loss|hard|slot_?mask")
_LOGITS, _PROBS = re.compile(r"logit|dots"), re.compile(r"prob|softmax")
_ENCODER = (r"(^|_)enc|corrector|processor|grouping|grouper|slot_att|aggregat", r"attn|attent|attribut|dots")
_DECODER = (r"(^|_)dec|alpha|attentd|attent2|recon|render", r"mask|segment")


@dataclass(eq=False)
class Suspect:
    """A tensor that may be a map, its readings, and how many times over it holds the frames that went in."""

    tensor: Tensor
    path: str
    names: tuple[str, ...]
    values: Values | None
    readings: list[Reading]
    role: Role
    times: int = 1
    same_as: str | None = None

    @property
    def tail(self) -> str:
        return self.names[-1] if self.names else ""

    @property
    def sure(self) -> bool:
        """Whether its values show a map, and not only its name or its shape."""
        return self.values is not None and bool(self.values.sums or self.values.groups)

    @property
    def kind(self) -> Kind:
        probs = self.values is not None and self.values.probs and (self.sure or not _LOGITS.search(self.tail))
        return "probs" if probs else "logits"

    @property
    def misnamed(self) -> bool:
        """Whether its name says logits where its values are probabilities, or the reverse."""
        return bool((_LOGITS if self.kind == "probs" else _PROBS).search(self.tail)) and self.values is not None

    @property
    def best(self) -> list[Reading]:
        least = min((one.cost for one in self.readings), default=0)
        return [one for one in self.readings if one.cost == least]


def suspects_in(found: list[Found], hints: Hints) -> tuple[list[Suspect], dict[str, str]]:
    """Return the tensors that may be maps, and why the others are none, by path."""
    reasons: dict[str, str] = {}
    floats: list[tuple[Found, Values | None]] = []
    for one in found:
        tensor = one.tensor
        if tensor.is_nested or tensor.layout is not torch.strided or tensor.dtype not in FLOATS:
            continue
        if len(floats) == MAX_TENSORS:
            reasons[one.path] = f"not looked at, after {MAX_TENSORS} others"
        elif 2 <= tensor.dim() <= 6 and tensor.numel() > 0:
            floats.append((one, read_values(tensor)))
    slots = {size for _, values in floats if values for size in values.groups}
    suspects = _read(floats, hints, frozenset(slots))
    slots |= {reading.slots for one in suspects if one.sure or MAP.search(one.tail) for reading in one.best}
    suspects = _read(floats, hints, frozenset(slots))
    return _keep(suspects, reasons), reasons


def _read(floats: list[tuple[Found, Values | None]], hints: Hints, slots: frozenset[int]) -> list[Suspect]:
    suspects = []
    for one, values in floats:
        shape, times = tuple(one.tensor.shape), 1
        readings = readings_of(shape, values, hints, slots)
        if not readings and hints.frames is not None:
            # taps without a host may have joined forwards, in time or in the batch
            num_frames = hints.frames * (hints.batch or 1)
            more = readings_of(shape, values, replace(hints, batch=None, frames=None), slots)
            counts = [each.total if hints.batch else each.frames or 1 for each in more]
            readings = [each for each, count in zip(more, counts, strict=True) if count % num_frames == 0]
            times = min((count // num_frames for count in counts if count % num_frames == 0), default=1)
        suspects.append(Suspect(*one, values, readings, role_of(one.names), times))
    return suspects


def _keep(suspects: list[Suspect], reasons: dict[str, str]) -> list[Suspect]:
    shown = {_sizes(reading) for one in suspects if one.sure for reading in one.best}
    kept, nameless = [], []
    for one in suspects:
        reason = _reason_against(one, shown)
        if reason is None:
            kept.append(one)
        else:
            reasons[one.path] = reason
            if one.readings and not one.tail and one.kind == "logits":
                nameless.append(one)
    if kept:
        return kept
    # nothing but shapes is left to go by: two tensors without a name that fit each other
    sizes = [{_sizes(reading) for reading in one.readings if reading.heads is None} for one in nameless]
    pairs = [(i, j) for i in range(len(sizes)) for j in range(i) if sizes[i] & sizes[j]]
    kept = [nameless[i] for i in sorted({i for pair in pairs for i in pair})]
    for one in kept:
        del reasons[one.path]
    return kept


def _reason_against(one: Suspect, shown: set[tuple[int, int, int]]) -> str | None:
    """Return why a tensor is no map beside maps of the sizes shown (frames in all, S, patches); None if it may be."""
    shape = tuple(one.tensor.shape)
    if one.values is not None and one.values.hard and not one.tensor.requires_grad:
        return "all 0 or 1: labels, not scores"
    fits_slots = {each[:2] for each in map(_sizes, one.readings)} & {each[:2] for each in shown}
    if len(shape) in (3, 4) and not (one.sure or fits_slots) and shape[-2] in {each[2] for each in shown}:
        return f"features? axis {len(shape) - 2} has the {shape[-2]} patches, {shape[-1]} values each"
    if not one.readings:
        return "no layout of a map fits its shape and values"
    named, fits = MAP.search(one.tail), any(_sizes(reading) in shown for reading in one.readings)
    if _OTHER.search(one.tail) and not (one.sure and named):
        return f"{'sums to one as a map does, but' if one.sure else 'no map, as'} its name says {one.tail!r}"
    return None if one.sure or named or fits else "no sign of a map"


def _sizes(reading: Reading) -> tuple[int, int, int]:
    return reading.total, reading.slots, reading.patches


def role_of(names: tuple[str, ...], *, strong: bool = False) -> Role:
    """Return the role that names speak for; the innermost name that speaks for one alone decides."""
    for enc, dec in list(zip(_ENCODER, _DECODER, strict=True))[: 1 if strong else 2]:
        for name in reversed(names):
            is_enc, is_dec = bool(re.search(enc, name)), bool(re.search(dec, name))
            if is_enc != is_dec:
                return "encoder" if is_enc else "decoder"
    return "unknown"


def probabilities_of(one: Suspect, reading: Reading) -> Tensor:
    """Return the first frames of a map as float32 probabilities (frames, S, patches), on the CPU, thinned out."""
    tensor, axes = one.tensor.detach(), reading.axes
    if axes.startswith(("b", "(b")):
        rows = max(1, MAX_SAMPLE * 16 // max(1, tensor[:1].numel()))
        # slots of a frame stay together
        tensor = tensor[: rows if "(b t s)" not in axes else -(-rows // reading.slots) * reading.slots]
    if reading.heads is not None:
        tensor = tensor.mean(reading.heads) if one.kind == "probs" else tensor.logsumexp(reading.heads)
        axes = axes.replace("heads ", "")
    axes = axes.replace("(h w)", "n").replace("(b t s)", "(f s)").replace("(b t)", "f")
    frames = "f" if "f" in axes else "(b t)" if "t" in axes else "b" if "b" in axes else "1"
    known = {"s": reading.slots} if "(f s)" in axes else {}
    maps = rearrange(tensor, f"{axes} -> {frames} s {'n' if 'n' in axes else '(h w)'}", **known)
    maps = maps[..., :: max(1, maps.numel() // (MAX_SAMPLE * 4))].to("cpu", torch.float32)
    return maps.softmax(1) if one.kind == "logits" else maps / maps.sum(1, keepdim=True).clamp_min(1e-30)
