"""Which two maps, and which of their readings, go together; and the code that takes them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from ssync_loss.adapters._doctor.diagnosis import Line
from ssync_loss.adapters._doctor.readings import Hints, Reading, grid_of
from ssync_loss.adapters._doctor.suspects import Suspect, probabilities_of
from ssync_loss.ssync.maps import Size

# what the losses read without being told
_PLAIN = ("b t s h w", "b t s (h w)")
# largest difference of two maps that are one, as a share of the difference between slots
_SAME = 0.02


class Pair(NamedTuple):
    """An encoder's and a decoder's map, how they are read, and their grids where known."""

    enc: Suspect
    dec: Suspect
    enc_reading: Reading
    dec_reading: Reading
    frames: int | None
    grids: tuple[Size | None, Size | None]
    cost: float


def pairs_of(suspects: list[Suspect], hints: Hints) -> list[Pair]:
    """Return the pairs that least speaks against, of maps that are not the same one."""
    encoders = [one for one in suspects if one.role == "encoder"]
    decoders = [one for one in suspects if one.role == "decoder"]
    others = [one for one in suspects if one.role == "unknown"]
    pairs = [
        pair
        for enc in encoders or others
        for dec in decoders or others
        if enc is not dec
        for pair in _readings_together(enc, dec, hints)
    ]
    least = min((one.cost for one in pairs), default=0.0)
    return [one for one in pairs if one.cost == least]


def _readings_together(enc: Suspect, dec: Suspect, hints: Hints) -> Iterator[Pair]:
    unsure = (not enc.sure) + (not dec.sure)
    for one in enc.readings:
        for two in dec.readings:
            frames = one.frames or two.frames
            fits = (one.total, one.slots) == (two.total, two.slots) and two.frames in (None, frames)
            # frames that lie in the batch are more than one
            fits = fits and not (frames == 1 and "(b t)" in one.axes + two.axes)
            # where both have heads, they have as many
            heads = [each.tensor.shape[of.heads] for each, of in ((enc, one), (dec, two)) if of.heads is not None]
            fits = fits and len(set(heads)) <= 1
            # one of them must show S
            fits = fits and not ("s)" in one.axes and "s)" in two.axes)
            if fits and (frames is None or one.total % frames == 0):
                grids = grid_of(one, two, hints), grid_of(two, one, hints)
                # tensors of one shape rarely lie differently
                mixed = enc.tensor.shape == dec.tensor.shape and one.axes != two.axes
                cost = one.cost + two.cost + unsure / 2 + mixed / 4
                yield Pair(enc, dec, one, two, frames, grids, cost)


def same_map(one: Suspect, two: Suspect) -> bool:
    """Tell whether two tensors are one, or hold one map: as a copy, in another layout, as logits of probabilities."""
    if one.values is None or two.values is None:
        return one.tensor is two.tensor
    if same_memory(one.tensor, two.tensor):
        return True
    for reading in one.best:
        for other in two.best:
            sizes = (reading.total, reading.slots, reading.patches)
            if sizes == (other.total, other.slots, other.patches):
                maps = [probabilities_of(one, reading), probabilities_of(two, other)]
                frames, patches = (min(each.shape[axis] for each in maps) for axis in (0, 2))
                if maps[0].shape[2] == maps[1].shape[2]:
                    first, second = (each[:frames, :, :patches] for each in maps)
                    apart = (first.amax(1) - first.amin(1)).amax()
                    if apart > 0 and (first - second).abs().amax() <= _SAME * apart:
                        return True
    return False


def same_memory(one: Tensor, two: Tensor) -> bool:
    """Tell whether two tensors are one, or, where they have memory of their own, views of the same numbers."""
    if one is two:
        return True
    try:
        pointers = one.data_ptr(), two.data_ptr()
    except RuntimeError:
        return False
    return pointers[0] == pointers[1] != 0 and one.numel() == two.numel()


def settings_of(pair: Pair) -> dict[str, Any]:
    """Return the arguments of a loss that takes a pair, but for defaults."""
    settings: dict[str, Any] = {}
    kinds = pair.enc.kind, pair.dec.kind
    if kinds != ("logits", "logits"):
        settings["kind"] = _one_if_equal(kinds)
    axes = tuple(one.axes.replace("heads ", "") for one in (pair.enc_reading, pair.dec_reading))
    if not all(one in _PLAIN for one in axes):
        settings["axes"] = _one_if_equal(axes)
    flat = tuple(one.size is None for one in (pair.enc_reading, pair.dec_reading))
    enc, dec = pair.grids
    if any(flat):
        # the encoder's grid speaks for a flat decoder map, too
        same = enc == dec and pair.enc_reading.patches == pair.dec_reading.patches
        settings["grid"] = enc if same or not flat[1] else (enc, dec)
    return settings


def _one_if_equal(pair: tuple[Any, ...]) -> Any:
    return pair[0] if pair[0] == pair[1] else pair


def line_of(pair: Pair, slot_mask: str | None) -> Line:
    """Return the code of a pair; ``...`` stands where a number is not known."""
    settings = ", ".join(f"{name}={_code(value)}" for name, value in settings_of(pair).items())
    call = [_taken(pair.enc, pair.enc_reading), _taken(pair.dec, pair.dec_reading)]
    if "(b t" in pair.enc_reading.axes and "(b t" in pair.dec_reading.axes:
        call.append(f"num_frames={_code(pair.frames)}")
    if slot_mask is not None:
        call.append(f"slot_mask={slot_mask}")
    return Line(f"SSyncLoss({settings})", f"criterion({', '.join(call)})")


def _code(value: object) -> str:
    return repr(value).replace("None", "...").replace("'", '"')


def _taken(one: Suspect, reading: Reading) -> str:
    if reading.heads is None:
        return one.path
    return f"{one.path}.{'mean' if one.kind == 'probs' else 'logsumexp'}({reading.heads})"
