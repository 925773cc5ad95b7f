"""What is wrong with maps, or may go wrong without a word: sentences that say what to do."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ssync_loss._axes import square
from ssync_loss.adapters._doctor.pairs import Pair, settings_of
from ssync_loss.adapters._doctor.readings import Reading, axes_in
from ssync_loss.adapters._doctor.suspects import MAP, Suspect, probabilities_of
from ssync_loss.adapters._doctor.values import sums_over
from ssync_loss.adapters._doctor.walk import Found
from ssync_loss.adapters.output_tap import is_log_of_zero
from ssync_loss.ssync.modules import SSyncLoss

# a share of a map's mass that counts as none
_NEGLIGIBLE = 0.05


def notes_on(one: Suspect, readings: Sequence[Reading]) -> Iterator[str]:
    """Say what is worth knowing of a map and asks for nothing: the line takes care of it."""
    shape, values = tuple(one.tensor.shape), one.values
    if one.same_as is not None:
        yield f"the same map as {one.same_as}"
    if not one.sure and one.kind == "probs":
        yield "within [0, 1], but sums to nothing in particular: probabilities, or logits by chance"
    elif not one.sure and not one.tail:
        yield "only its shape speaks for a map: features may look the same"
    if values is not None and one.kind == "probs":
        if values.low == 0:
            yield 'holds exact zeros: a log() of your own gives NaN gradients there, kind="probs" does not'
        total = _slot_sums(one, readings)
        if total is not None and max(abs(end - 1) for end in total) > 0.01:
            low, high = (f"{end:.3g}" for end in total)
            between = low if low == high else f"from {low} to {high}"
            yield f'sums over slots are {between}, not 1: kind="probs" renormalizes them'
        if one.role == "encoder":
            yield "merging follows another rule with an encoder's probabilities than with its logits: see pseudo_labels"
    if values is not None and one.kind == "logits" and values.sums:
        yield "log-probabilities: merging follows another rule with them than with an encoder's logits"
    if any(reading.heads is not None for reading in readings):
        how = "mean" if one.kind == "probs" else "logsumexp, right for a softmax over heads and slots together"
        yield f"has an axis of heads, or of forwards that were joined; the line takes heads away ({how})"
    if any(reading.axes != "b t s (h w)" for reading in readings) and len(shape) == 4 and square(shape[3]):
        T, S, N = shape[1:]
        yield f"without `axes` it could pass for a clip (B, T, S, N) of T={T} frames, S={S} slots and N={N} patches"


def notes_on_grids(pairs: list[Pair]) -> Iterator[str]:
    """Say of a decoder map whether it is resized."""
    for enc, dec in dict.fromkeys(pair.grids for pair in pairs):
        if enc is not None and dec is not None and enc != dec:
            yield f"on a grid of its own, {dec[0]} x {dec[1]}: resized to the encoder's, {enc[0]} x {enc[1]}"


def _slot_sums(one: Suspect, readings: Sequence[Reading]) -> tuple[float, float] | None:
    for reading in readings:
        names = axes_in(reading.axes)
        if "s" in names:
            return sums_over(one.tensor, (names.index("s"),))
    return None


def problems_of(suspects: list[Suspect], found: list[Found], training: bool) -> Iterator[str]:
    """Say what is wrong with maps one by one."""
    attached = any(one.tensor.requires_grad for one in found)
    if suspects and training and not attached:
        yield "Nothing here carries a gradient: was this a forward under no_grad? Look at one of training."
    for one in suspects:
        if one.values is None:
            yield f"{one.path} has no values to read (meta or fake): only shapes and names speak."
            continue
        if training and attached and not one.tensor.requires_grad:
            yield f"{one.path} is detached: a loss of it trains nothing. Take it before the model's detach()."
        if is_log_of_zero(one.tensor):
            yield (
                f"{one.path} is the log() of a probability of 0, whose gradient is NaN: leave the log() out, and pass "
                'kind="probs" for it.'
            )
        if one.times > 1:
            yield f"{one.path} has {one.times} times the frames that went in: were several forwards joined?"
        if not one.values.finite:
            yield f"{one.path} holds NaN or +inf: the loss would be NaN."
        if one.misnamed:
            right = "probabilities" if one.kind == "probs" else "logits"
            yield f'{one.path} holds {right}, whatever its name says: pass kind="{one.kind}" for it.'
        if {reading.sums_over for reading in one.best} == {"h w"}:
            yield (
                f"{one.path} is normalized over patches, not over slots: slots no longer compete for a patch. Take the "
                "attention before that normalization."
            )


def problems_of_lists(found: list[Found]) -> Iterator[str]:
    """Say which lists are named as a map and hold tensors of one shape, perhaps frames."""
    lists: dict[tuple[str, tuple[int, ...]], int] = {}
    for one in found:
        path, bracket, index = one.path.rpartition("[")
        if bracket and index[:-1].isdigit() and one.tensor.dim() > 2 and one.names and MAP.search(one.names[-1]):
            of = path, tuple(one.tensor.shape)
            lists[of] = lists.get(of, 0) + 1
    for (path, shape), number in lists.items():
        if number > 1:
            yield (
                f"{path} is a list of {number} tensors {shape}: if they are frames, look at torch.stack({path}, 1), "
                "and if iterations, take the last."
            )


def problems_of_pairs(pairs: list[Pair], suspects: list[Suspect]) -> Iterator[str]:
    """Say what is missing or open between maps."""
    roles = {one.role for one in suspects}
    missing = sorted({"encoder", "decoder"} - roles if "unknown" not in roles or len(suspects) == 1 else ())
    if pairs:
        yield from _open_questions(pairs)
    elif not suspects:
        yield "No map is among the outputs: what a model keeps to itself has to be tapped (LogitTap, OutputTap)."
    elif len(suspects) == 1 or len(missing) == 1:
        paths = " and ".join(one.path for one in suspects)
        yield f"There is only {paths}: the map of the {' or the '.join(missing)} has to be tapped."
    else:
        shapes = ", ".join(f"{one.path} {tuple(one.tensor.shape)}" for one in suspects)
        yield f"No two maps go together, an encoder's and a decoder's of the same B, T and S: {shapes}."


def _open_questions(pairs: list[Pair]) -> Iterator[str]:
    together = {(id(pair.enc), id(pair.dec)) for pair in pairs}
    if any(pair[::-1] in together for pair in together):
        paths = dict.fromkeys(pair.enc.path for pair in pairs)
        yield f"Cannot tell encoder from decoder: {' and '.join(paths)} could be either. Only you know."
    elif len(together) > 1:
        yield "Cannot tell which maps are meant: several go together. Take those that the model itself learns from."
    axes: dict[str, dict[str, None]] = {}
    for pair in pairs:
        for one, reading in zip(pair[:2], pair[2:4], strict=True):
            axes.setdefault(one.path, {})[reading.axes] = None
    for path, patterns in axes.items():
        if len(patterns) > 1:
            quoted = " or ".join(f'"{one}"' for one in patterns)
            yield f"Cannot tell the axes of {path}: {quoted}. Pass video=, num_frames= or num_slots=."
    for one, reading, grid in zip(pairs[0][:2], pairs[0][2:4], pairs[0].grids, strict=True):
        if grid is None:
            yield f"{one.path} has N={reading.patches} patches, which is no square: pass grid=(H, W)."


def slot_mask_of(found: list[Found], pair: Pair) -> tuple[str | None, str | None]:
    """Return the code of a slot mask among the outputs that keeps what has mass in a map, or what is wrong with it."""
    B, S = pair.enc_reading.total // (pair.frames or 1), pair.enc_reading.slots
    for one in found:
        mask = one.tensor
        named = bool(one.names) and "slot" in one.names[-1]
        if mask.dtype != torch.bool or tuple(mask.shape) != (B, S) or (pair.frames == S and not named):
            continue
        if mask.is_meta or pair.enc.values is None or pair.dec.values is None or mask.all():
            continue
        mask = mask.detach().cpu()
        kept = _kept(mask, pair.enc, pair.enc_reading, B), _kept(mask, pair.dec, pair.dec_reading, B)
        # a decoder need not know of the mask
        if max(kept) >= 1 - _NEGLIGIBLE:
            return one.path, None
        share = f"{one.path} would keep the slots with {min(kept):.0%} of the mass"
        if min(kept) <= _NEGLIGIBLE:
            return None, f"{share}: `slot_mask` is True where a slot is present; pass ~{one.path}."
        return None, f"{share}: if it is no slot mask, or True where a slot is absent, do not pass it as it is."
    return None, None


def _kept(mask: Tensor, one: Suspect, reading: Reading, num_clips: int) -> float:
    """Return the share of a map's mass that lies in the slots of a mask (B, S)."""
    mass = probabilities_of(one, reading).nan_to_num().mean(2)
    clip = torch.arange(len(mass)) // (reading.total // num_clips)
    return float((mass * mask[clip]).sum() / mass.sum().clamp_min(1e-30))


def unlike(loss: SSyncLoss, pair: Pair) -> Iterator[str]:
    """Say which settings of a loss are not those that a pair needs."""
    squares = all(grid is not None and grid[0] == grid[1] for grid in pair.grids)
    wanted = {"kind": "logits", "axes": None, "grid": None, **settings_of(pair)}
    for name, value in wanted.items():
        given = getattr(loss, name)
        if isinstance(given, (tuple, list)) and given[0] == given[1] and not isinstance(given[0], int):
            given = given[0]
        # a loss finds the grid of squares itself, and may be told what it would take anyway
        if given != value and value is not None and not (name == "grid" and given is None and squares):
            yield f"`loss` has {name}={given!r}, and these maps need {name}={value!r}."
