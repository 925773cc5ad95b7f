"""Which of the tensors that a model returned are the two maps, how they lie, and what is wrong with them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssync_loss._checks import check_type
from ssync_loss.adapters._doctor.diagnosis import Candidate, Diagnosis
from ssync_loss.adapters._doctor.pairs import Pair, line_of, pairs_of, same_map, same_memory
from ssync_loss.adapters._doctor.readings import Hints
from ssync_loss.adapters._doctor.suspects import Suspect, role_of, suspects_in
from ssync_loss.adapters._doctor.traps import (
    notes_on,
    notes_on_grids,
    problems_of,
    problems_of_lists,
    problems_of_pairs,
    slot_mask_of,
    unlike,
)
from ssync_loss.adapters._doctor.walk import tensors_in
from ssync_loss.ssync.maps import Grid, check_grid
from ssync_loss.ssync.modules import SSyncLoss

MAX_SUSPECTS = 16


def doctor(
    outputs: object,
    *,
    video: Tensor | Sequence[int] | None = None,
    num_frames: int | None = None,
    num_slots: int | None = None,
    grid: Grid = None,
    loss: SSyncLoss | None = None,
    name: str = "outputs",
) -> Diagnosis:
    """Say which tensors of a model's outputs may be its maps, what is wrong with them, and the line to write.

    For finding out once, not for training: it reads values on the host. It reads a bounded number of them (16 million
    of a tensor for its least and largest number, samples for the rest), computes no gradients and changes nothing.

    Shapes and values decide; names such as ``attn``, ``masks`` or ``decoder`` are hints. What sums to one over an axis
    has its slots there. Logits show no such thing: their layout follows from the other map, from what is given here,
    or is said to be open; frames are taken to come before slots, and tensors of one shape to lie alike. Which map is
    the encoder's only names can tell. Lists of frames are not put together, nor labels or one-hot maps used.

    Args:
        outputs: tensors in mappings, sequences, named tuples, dataclasses or attributes of objects, to any sensible
            depth; also ``dict(enc_logits=..., dec_logits=...)``, to look at a call before it is made.
        video: what went in, or its shape: (B, T, ., H, W), or (B, ., H, W) for images. Gives B, T and the ratio H:W.
        num_frames: T.
        num_slots: S.
        grid: (H, W), or ((H, W), (H_d, W_d)), as for :class:`SSyncLoss`.
        loss: the loss to be called; its ``kind``, ``axes`` and ``grid`` are compared with what is needed.
        name: of the outputs, in the code.

    Raises: TypeError, ValueError if a hint is of a wrong type or size.

    >>> attention = torch.randn(2, 3, 16, 5).softmax(-1)  # slots last
    >>> found = doctor({"encoder": {"attn": attention}, "decoder": {"masks": torch.rand(6, 5, 8, 8).softmax(1)}})
    >>> print(found.line)
    criterion = SSyncLoss(kind="probs", axes=("b t (h w) s", "(b t) s h w"), grid=(4, 4))
    loss = loss + criterion(outputs["encoder"]["attn"], outputs["decoder"]["masks"])
    >>> found.problems
    ('Nothing here carries a gradient: was this a forward under no_grad? Look at one of training.',)
    """
    hints = _hints(video, num_frames, num_slots, grid)
    check_type("name", name, str)
    check_type("loss", loss, SSyncLoss, optional=True)
    training = torch.is_grad_enabled()
    with torch.no_grad():
        found = [one for one in tensors_in(outputs, name) if not isinstance(one.tensor, nn.Parameter)]
        suspects, reasons = suspects_in(found, hints)
        for one in sorted(suspects, key=lambda one: (not one.sure, one.role == "unknown"))[MAX_SUSPECTS:]:
            reasons[one.path] = f"not looked at, after {MAX_SUSPECTS} others"
            suspects.remove(one)
        maps, problems = _distinct(suspects)
        if len(maps) > 1 and len({one.role for one in maps}) == 1:
            # a weak name shared by all says nothing
            for one in maps:
                one.role = role_of(one.names, strong=True)
        pairs = pairs_of(maps, hints)
        slot_mask, wrong = slot_mask_of(found, pairs[0]) if pairs else (None, None)
        problems += [*problems_of(suspects, found, training), *problems_of_lists(found)]
        problems += problems_of_pairs(pairs, maps)
        problems += [*([wrong] if wrong else []), *(unlike(loss, pairs[0]) if loss is not None and pairs else [])]
        candidates = tuple(_candidate(one, pairs) for one in suspects)
    lines = tuple(dict.fromkeys(line_of(one, slot_mask) for one in pairs))
    return Diagnosis(candidates, lines, tuple(problems), tuple(reasons.items()))


def _distinct(suspects: list[Suspect]) -> tuple[list[Suspect], list[str]]:
    """Return one of each map, its logits before its probabilities, and what is wrong with there being several."""
    kept: list[Suspect] = []
    problems = []
    for one in sorted(suspects, key=lambda one: (one.kind == "probs", not one.tensor.requires_grad)):
        twin = next((other for other in kept if same_map(other, one)), None)
        if twin is None:
            kept.append(one)
        elif {twin.role, one.role} == {"encoder", "decoder"}:
            problems.append(f"{one.path} is the same map as {twin.path}: a decoder's has to be its own.")
        elif twin.role == one.role == "unknown" and same_memory(twin.tensor, one.tensor):
            problems.append(f"{one.path} and {twin.path} are one tensor: they cannot be both maps.")
        else:
            one.same_as = twin.path
    return [one for one in suspects if one in kept], problems


def _candidate(one: Suspect, pairs: list[Pair]) -> Candidate:
    as_enc = [pair.enc_reading for pair in pairs if pair.enc is one]
    as_dec = [pair.dec_reading for pair in pairs if pair.dec is one]
    readings = as_enc + as_dec or one.best
    role = one.role
    if role == "unknown" and bool(as_enc) != bool(as_dec):
        role = "encoder" if as_enc else "decoder"
    sums = {reading.sums_over for reading in readings}
    notes = [*notes_on(one, readings), *notes_on_grids([pair for pair in pairs if pair.dec is one])]
    return Candidate(
        one.path,
        tuple(one.tensor.shape),
        tuple(dict.fromkeys(reading.axes for reading in readings)),
        one.kind,
        sums.pop() if len(sums) == 1 else None,
        one.tensor.requires_grad,
        role,
        tuple(notes),
    )


def _hints(video: Tensor | Sequence[int] | None, num_frames: int | None, num_slots: int | None, grid: Grid) -> Hints:
    grids = tuple(one for one in check_grid(grid) if one is not None)
    if video is None:
        return Hints(None, num_frames, num_slots, grids)
    given: object = video.shape if isinstance(video, Tensor) else video
    shape = tuple(given) if isinstance(given, Sequence) else ()
    if len(shape) not in (4, 5) or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"`video` must have shape (B, T, ., H, W), or (B, ., H, W) for images; got {shape or given}.")
    frames = shape[1] if len(shape) == 5 else 1
    if num_frames not in (None, frames):
        raise ValueError(f"`num_frames` must be that of `video`, {frames}; got {num_frames}.")
    # channels last are few
    size = (shape[-3], shape[-2]) if shape[-1] <= 4 else (shape[-2], shape[-1])
    return Hints(shape[0], frames, num_slots, grids, size)
