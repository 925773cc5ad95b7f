"""Bring a host's two maps to logits (B, T, S, H, W) on one grid: shapes, probabilities, resizing, masks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ssync_loss._autocast import at_least_float32, no_autocast
from ssync_loss._axes import Axes, arrange_maps, square
from ssync_loss._checks import (
    check_choice,
    check_floating,
    check_int,
    check_nonnegative,
    check_not_empty,
    check_same_device,
    check_shape,
    check_tensor,
)
from ssync_loss._forks import take_one_thread_if_forked
from ssync_loss._inputs import check_mask, widest
from ssync_loss.ssync.settings import TINY

Kind: TypeAlias = Literal["logits", "probs"]
KindArgument: TypeAlias = Kind | Sequence[Kind]
Size: TypeAlias = tuple[int, int]
Grid: TypeAlias = Size | tuple[Size, Size] | None

KINDS = ("logits", "probs")


@dataclass(frozen=True)
class Maps:
    """Both maps on the encoder's grid, and their masks.

    Logits are (B, T, S, H, W) of any floating type. ``valid`` (B, T, H, W) and ``slot_mask`` (B, S) are None where
    everything counts. ``clean`` is None unless the decoder's map was resized, which may skip cells. Then it is a scalar
    bool: False if a valid cell of a present slot held NaN or +inf.
    """

    enc: Tensor
    dec: Tensor
    valid: Tensor | None
    slot_mask: Tensor | None
    clean: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type of the computation: float64 if a map has it, else float32."""
        return widest(self.enc, self.dec)

    @property
    def counted(self) -> Tensor | None:
        """``valid``, and False in a clip without a present slot: (B, T, H, W) bool, or None."""
        if self.slot_mask is None:
            return self.valid
        has_slots = self.slot_mask.any(1)[:, None, None, None]
        B, T, _, H, W = self.enc.shape
        return has_slots.expand(B, T, H, W) if self.valid is None else self.valid & has_slots

    def is_clean(self) -> Tensor:
        """Return a scalar bool: whether no valid patch of a present slot holds NaN or +inf."""
        enc, dec = (is_clean(peak_of(one.detach(), self.slot_mask), self.valid) for one in (self.enc, self.dec))
        return enc & dec if self.clean is None else enc & dec & self.clean

    def spoil(self) -> Tensor:
        """Return a factor of maps and losses: 1, or NaN if the maps are not clean."""
        return torch.where(self.is_clean(), 1.0, float("nan")).to(self.dtype)


def check_kind(kind: object) -> tuple[Kind, Kind]:
    """Return the kinds of the encoder's and the decoder's map."""
    kinds = (kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kinds, Sequence) or len(kinds) != 2:
        raise ValueError(f"`kind` must be 'logits', 'probs' or a pair of them (encoder, decoder); got {kind!r}.")
    for one in kinds:
        check_choice("kind", one, KINDS)
    return kinds[0], kinds[1]


def check_grid(grid: object) -> tuple[Size | None, Size | None]:
    """Return the grids of the encoder's and the decoder's map; one that is None is inferred later."""
    if grid is None:
        return None, None
    if isinstance(grid, Sequence) and len(grid) == 2:
        if _is_size(grid):
            return (grid[0], grid[1]), None
        if _is_size(grid[0]) and _is_size(grid[1]):
            return tuple(grid[0]), tuple(grid[1])
    raise ValueError(
        f"`grid` must be (H, W) or ((H, W), (H_d, W_d)) for encoder and decoder, positive integers; got {grid!r}."
    )


def _is_size(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(one, int) and not isinstance(one, bool) and one >= 1 for one in value)
    )


def bind_maps(
    enc_logits: Tensor,
    dec_logits: Tensor,
    *,
    grid: Grid = None,
    axes: Axes = None,
    valid: Tensor | None = None,
    slot_mask: Tensor | None = None,
    num_frames: int | None = None,
) -> Maps:
    """Check shapes, dtypes and devices; view both maps as (B, T, S, H, W), each on its own grid."""
    enc_grid, dec_grid = check_grid(grid)
    if num_frames is not None:
        check_int("num_frames", num_frames, 1)
    if axes is not None:
        enc_logits, dec_logits = arrange_maps(enc_logits, dec_logits, axes, (enc_grid, dec_grid), num_frames)
    else:
        enc_logits, dec_logits = _image_beside(enc_logits, dec_logits), _image_beside(dec_logits, enc_logits)
        if grid is None:
            _refuse_images(enc_logits, dec_logits)
            enc_grid, dec_grid = _grid_beside(enc_logits, dec_logits), _grid_beside(dec_logits, enc_logits)
    enc = _on_grid("enc_logits", enc_logits, enc_grid)
    size = check_shape("enc_logits", enc, "B T S H W", **({} if num_frames is None else {"T": num_frames}))
    check_not_empty("enc_logits", size, "T S H W")
    # a flat decoder map takes the encoder's grid
    if dec_grid is None and isinstance(dec_logits, Tensor) and dec_logits.dim() == 4:
        dec_grid = enc_grid
    dec = _on_grid("dec_logits", dec_logits, dec_grid)
    dec_size = check_shape("dec_logits", dec, "B T S H_d W_d", B=size["B"], T=size["T"], S=size["S"])
    check_not_empty("dec_logits", dec_size, "H_d W_d")
    check_same_device("dec_logits", dec, enc_logits=enc)
    valid = check_valid(valid, size, enc_logits=enc)
    check_slot_mask(slot_mask, size, enc_logits=enc)
    return Maps(enc, dec, valid, slot_mask)


def _refuse_images(*maps: Tensor) -> None:
    """Refuse maps of four axes that may be images (B, S, H, W)."""
    if any(not isinstance(one, Tensor) or one.dim() != 4 for one in maps):
        return
    sizes = [(one.shape[2], one.shape[3]) for one in maps]
    like_images = all(height <= 2 * width and width <= 2 * height for height, width in sizes)
    if like_images and any(square(num_patches) for _, num_patches in sizes):
        enc, dec = (tuple(one.shape) for one in maps)
        raise ValueError(
            f"`axes` must tell whether maps of four axes are images: 'b s h w' reads {enc} as S={enc[1]} slots on a "
            f"grid of {enc[2]} x {enc[3]}, 'b t s (h w)' as T={enc[1]} frames of S={enc[2]} slots on N={enc[3]} "
            f"patches; got enc_logits of shape {enc} and dec_logits of shape {dec}."
        )


def _image_beside(image: Tensor, clip: Tensor) -> Tensor:
    """View an image (B, S, H, W) as a clip of one frame, if the other map is one."""
    if not (isinstance(image, Tensor) and isinstance(clip, Tensor)) or (image.dim(), clip.dim()) != (4, 5):
        return image
    B, T, S = clip.shape[:3]
    return image.unsqueeze(1) if T == 1 < S and image.shape[:2] == (B, S) else image


def _grid_beside(flat: Tensor, whole: Tensor) -> Size | None:
    """Return the grid of the other map if a flat one has as many patches: 18 x 32 patches could also be 24 x 24."""
    if not (isinstance(flat, Tensor) and isinstance(whole, Tensor)) or (flat.dim(), whole.dim()) != (4, 5):
        return None
    height, width = whole.shape[3:]
    return (height, width) if height * width == flat.shape[3] else None


def _on_grid(name: str, logits: Tensor, grid: Size | None) -> Tensor:
    check_tensor(name, logits)
    check_floating(name, logits)
    shape = tuple(logits.shape)
    if logits.dim() == 5:
        if grid is not None and shape[3:] != grid:
            raise ValueError(f"`{name}` must have H, W = {grid} as `grid` says; got {shape}.")
        return logits
    if logits.dim() != 4:
        hint = " An image's (B, S, N) takes axes='b s (h w)'." if logits.dim() == 3 else ""
        raise ValueError(f"`{name}` must have shape (B, T, S, H, W), or (B, T, S, N); got {shape}.{hint}")
    num_patches = shape[3]
    size = square(num_patches) if grid is None else grid
    if size is None:
        raise ValueError(
            f"`{name}` has N={num_patches} patches, which is no square: pass grid=(H, W); got {shape}. "
            "Of another layout, such as images (B, S, H, W), name the axes: axes='b s h w'."
        )
    height, width = size
    if height * width != num_patches:
        wanted = f"N = H*W = {height}*{width} = {height * width} patches as `grid` says"
        raise ValueError(f"`{name}` must have {wanted}; got {shape}.")
    return logits.reshape(*shape[:3], height, width)


def check_valid(valid: Tensor | None, size: dict[str, int], **beside: Tensor) -> Tensor | None:
    """Require ``valid`` of shape (B, T) or (B, T, H, W) and return it as (B, T, H, W); None is valid everywhere."""
    if valid is None:
        return None
    per_frame = isinstance(valid, Tensor) and valid.dim() == 2
    check_mask("valid", valid, "B T" if per_frame else "B T H W", size, **beside)
    if per_frame:
        valid = valid[:, :, None, None]
    return valid.expand(size["B"], size["T"], size["H"], size["W"])


def check_slot_mask(slot_mask: Tensor | None, size: dict[str, int], **beside: Tensor) -> None:
    """Require ``slot_mask`` of shape (B, S), or None."""
    if slot_mask is not None:
        check_mask("slot_mask", slot_mask, "B S", size, **beside)


def prepare_maps(
    enc_logits: Tensor,
    dec_logits: Tensor,
    *,
    kind: KindArgument = "logits",
    look: Callable[[Maps, KindArgument], None] | None = None,
    **given: Any,
) -> Maps:
    """Bind both maps by :func:`bind_maps`, and turn them into logits on one grid; ``look`` sees the bound maps."""
    bound = bind_maps(enc_logits, dec_logits, **given)
    maps = as_logits(bound, kind)
    if look is not None:
        look(bound, kind)
    return maps


def as_logits(maps: Maps, kind: KindArgument) -> Maps:
    """Bring maps of :func:`bind_maps` to logits on the encoder's grid; logits that are on it stay as they are.

    Probabilities of absent slots become 0; the others are normalized over slots and clamped to the smallest normal
    float32 before the logarithm. A negative one is an error if reading it waits for no device, else NaN. A decoder cell
    on another grid is valid if it overlaps a valid patch of the encoder.
    """
    enc_kind, dec_kind = check_kind(kind)
    enc, dec, slot_mask = maps.enc, maps.dec, maps.slot_mask
    if enc_kind == dec_kind == "logits" and dec.shape == enc.shape:
        return maps
    take_one_thread_if_forked(enc.device.type)
    counted, clean = maps.counted, None
    with no_autocast(enc):
        usable = _usable(counted, slot_mask)
        enc = _as_logits("enc_logits", enc, enc_kind, usable)
        if dec.shape == enc.shape:
            dec = _as_logits("dec_logits", dec, dec_kind, usable)
        else:
            dec_valid = None if counted is None else _overlapping(counted, dec.shape[3:])
            usable = _usable(dec_valid, slot_mask)
            dec = at_least_float32(_as_logits("dec_logits", dec, dec_kind, usable))
            clean = is_clean(peak_of(dec.detach(), slot_mask), dec_valid)
            dec = _resize(dec, enc.shape[3:], dec_valid, usable)
    return Maps(enc, dec, maps.valid, slot_mask, clean)


def _usable(valid: Tensor | None, slot_mask: Tensor | None) -> Tensor | None:
    cells = None if valid is None else valid.unsqueeze(2)
    return cells if cells is None or slot_mask is None else cells & slot_mask[:, None, :, None, None]


def _as_logits(name: str, maps: Tensor, kind: Kind, usable: Tensor | None) -> Tensor:
    if kind == "logits":
        return maps
    maps = at_least_float32(maps)
    if usable is not None:
        maps = torch.where(usable, maps, 0.0)
    check_nonnegative(name, maps)
    return log_of_probs(torch.where(maps < 0, float("nan"), maps))


def log_of_probs(probs: Tensor) -> Tensor:
    """Normalize probabilities (B, T, S, ...) over slots, and take their logarithm; that of 0 has no gradient."""
    probs = probs / probs.sum(2, keepdim=True).clamp_min(TINY)
    return probs.clamp_min(TINY).log()


def first_largest(scores: Tensor) -> Tensor:
    """Return the first slot with the largest score of every patch, (B, T, H, W) int64; the last slot for NaN.

    On a CPU ``argmax`` over a middle axis takes thirty times as long.
    """
    num_slots = scores.shape[2]
    ranks = torch.arange(num_slots, 0, -1, dtype=torch.int32, device=scores.device)[:, None, None]
    best = torch.where(scores == scores.amax(2, keepdim=True), ranks, 1).amax(2)
    return num_slots - best.long()


def only_present(logits: Tensor, slot_mask: Tensor | None) -> Tensor:
    """Put absent slots at -inf; return the logits themselves without a mask."""
    return logits if slot_mask is None else logits.masked_fill(~slot_mask[:, None, :, None, None], float("-inf"))


def peak_of(logits: Tensor, slot_mask: Tensor | None) -> Tensor:
    """Return the largest logit of the present slots; NaN if one of them is NaN."""
    return only_present(logits, slot_mask).amax(2)


def is_clean(peak: Tensor, valid: Tensor | None) -> Tensor:
    """Return a scalar bool: whether the peaks of all valid patches are below +inf and not NaN."""
    if valid is None and peak.numel() > 0:
        # a maximum, which is NaN if a peak is, takes a tenth of the time of a comparison per patch
        return peak.amax() < float("inf")
    below = peak < float("inf")
    return below.all() if valid is None else (below | ~valid).all()


def _overlapping(valid: Tensor, size: Sequence[int]) -> Tensor:
    """Tell which cells of another grid overlap a valid cell of this one: (B, T, H, W) -> (B, T, *size)."""
    shared = []
    for num_to, num_from in zip(size, valid.shape[2:], strict=True):
        # cell i of n covers [i/n, (i+1)/n]; in integers the ends are compared exactly
        to = torch.arange(num_to, device=valid.device)[:, None]
        start = torch.arange(num_from, device=valid.device)
        shared.append(((start * num_to < (to + 1) * num_from) & (to * num_from < (start + 1) * num_to)).float())
    return shared[0] @ valid.float() @ shared[1].T > 0


def _resize(logits: Tensor, size: Sequence[int], valid: Tensor | None, usable: Tensor | None) -> Tensor:
    # invalid cells get weight 0, and the other weights are normalized
    impossible = logits == float("-inf")
    if usable is not None:
        impossible = impossible & usable
        logits = torch.where(usable, logits, 0.0)
    # 0 * -inf is NaN: the mask of -inf is resized on its own, and any weight of it gives -inf
    resized = _interpolate(logits.masked_fill(impossible, 0.0), size)
    if valid is not None:
        weight = _interpolate(valid.unsqueeze(2).to(logits.dtype), size)
        resized = resized / torch.where(weight > 0, weight, 1.0)
    return resized.masked_fill(_interpolate(impossible.to(logits.dtype), size) > 0, float("-inf"))


def _interpolate(maps: Tensor, size: Sequence[int]) -> Tensor:
    frames = F.interpolate(maps.flatten(0, 1), size=tuple(size), mode="bilinear", align_corners=False)
    return frames.view(*maps.shape[:3], *size)
