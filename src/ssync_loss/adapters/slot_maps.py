"""The two maps of a model, in the form a criterion takes."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, SupportsIndex, TypeAlias, overload

import torch
from einops import rearrange
from torch import Tensor
from torch.utils._pytree import GetAttrKey, register_pytree_node

from ssync_loss._checks import check_int, check_tensor
from ssync_loss.adapters._tap import PIECES, Tap
from ssync_loss.adapters.logit_tap import LogitTap
from ssync_loss.adapters.output_tap import OutputTap

if TYPE_CHECKING:
    from typing_extensions import Self

Source: TypeAlias = Tensor | LogitTap | OutputTap


class _Field(str):
    """The name of a map. Of a named tuple whose names are plain strings, torch's trees would keep no masks."""

    __slots__ = ()


class SlotMaps(tuple[Tensor, Tensor]):
    """The maps of one forward: ``criterion(*maps)``, or ``criterion(**maps)`` with the masks of the host.

    A tuple of the two maps. As a mapping, and in torch's trees, it has the masks too, where there are any.

    Args:
        enc_logits: (B, T, S, N) or (B, T, S, H, W), of slot attention.
        dec_logits: likewise, of the decoder, perhaps on another grid.
        valid: (B, T) or (B, T, H, W), where the maps count.
        slot_mask: (B, S), which slots there are.

    >>> import torch
    >>> maps = SlotMaps(torch.zeros(2, 3, 4, 25), torch.zeros(2, 3, 4, 25), valid=torch.ones(2, 3, dtype=torch.bool))
    >>> len(maps), list(dict(**maps))
    (2, ['enc_logits', 'dec_logits', 'valid'])
    """

    # torch's compiler takes this for a named tuple; one of `typing` has no room for masks
    _fields = _Field("enc_logits"), _Field("dec_logits")
    _field_defaults: ClassVar[dict[str, Any]] = {}
    valid: Tensor | None
    slot_mask: Tensor | None

    def __new__(
        cls, enc_logits: Tensor, dec_logits: Tensor, *, valid: Tensor | None = None, slot_mask: Tensor | None = None
    ) -> "Self":
        """Put two maps together, and masks by name."""
        maps = tuple.__new__(cls, (enc_logits, dec_logits))
        maps.valid, maps.slot_mask = valid, slot_mask
        return maps

    def __getnewargs__(self) -> tuple[Tensor, ...]:
        return tuple(self)

    @classmethod
    def _make(cls, maps: Iterable[Tensor]) -> "Self":
        return cls(*maps)

    def _asdict(self) -> dict[str, Tensor]:
        return {**self}

    @property
    def enc_logits(self) -> Tensor:
        """The encoder's map."""
        return self[0]

    @property
    def dec_logits(self) -> Tensor:
        """The decoder's map."""
        return self[1]

    def keys(self) -> tuple[str, ...]:
        """Return the names of what is there."""
        masks = tuple(name for name in ("valid", "slot_mask") if getattr(self, name) is not None)
        return "enc_logits", "dec_logits", *masks

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> Tensor: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Tensor, ...]: ...
    def __getitem__(self, key: SupportsIndex | slice | str) -> Tensor | tuple[Tensor, ...]:
        if not isinstance(key, str):
            return super().__getitem__(key)
        if key not in self.keys():
            raise KeyError(key)
        found: Tensor = getattr(self, key)
        return found

    def _replace(self, **changes: Any) -> "Self":
        return type(self)(**{**self, **changes})

    @classmethod
    def join(cls, enc: Source, dec: Source, *, num_frames: int | None = None) -> "Self":
        """Empty the taps, and put clips, frames and slots on axes of their own; values are untouched.

        Args:
            enc: (B, T, S, N) or (B, T, S, H, W), with ``num_frames`` also (B*T, S, N), or the tap that has it.
            dec: likewise on its own grid, or with frames, or frames and slots, in the batch: (B*T, S, ...) or
                (B*T*S, ...). A still image is T=1.
            num_frames: T. Needed where the encoder's frames are flattened into the batch; elsewhere it is checked.

        Raises: TypeError if a map is neither a tensor nor a tap; RuntimeError if a tap has not collected one forward,
            or the decoder's has an earlier one; ValueError if the shapes do not go together.

        >>> import torch
        >>> maps = SlotMaps.join(torch.zeros(2, 3, 4, 25), torch.zeros(6, 4, 10, 10))
        >>> [tuple(one.shape) for one in maps]
        [(2, 3, 4, 25), (2, 3, 4, 10, 10)]
        """
        if num_frames is not None:
            check_int("num_frames", num_frames, 1)
        for name, source in (("enc", enc), ("dec", dec)):
            if not isinstance(source, Tap):
                check_tensor(name, source)
        _check_order(enc, dec)
        by_frame = isinstance(dec, OutputTap) and dec._by_frame
        enc_logits = _take(enc, num_frames)
        if num_frames is not None and enc_logits.dim() == 3 and len(enc_logits) % num_frames == 0:
            enc_logits = rearrange(enc_logits, "(b t) s n -> b t s n", t=num_frames)
        shape = tuple(enc_logits.shape)
        if len(shape) not in (4, 5) or num_frames not in (None, shape[1]):
            time = "T" if num_frames is None else f"T={num_frames}"
            raise ValueError(
                f"`enc` must have shape (B, {time}, S, N) or (B, {time}, S, H, W), or (B*T, S, N) where "
                f"`num_frames` gives T; got {shape}."
            )
        dec_logits = _take(dec, *shape[1:3])
        return cls(enc_logits, ordered(dec_logits, enc_logits, by_frame=by_frame))


# what `tree_map`, vmap, export and DDP go through
register_pytree_node(
    SlotMaps,
    lambda maps: ([*{**maps}.values()], maps.keys()),
    lambda values, names: SlotMaps(**dict(zip(names, values, strict=True))),
    flatten_with_keys_fn=lambda maps: ([(GetAttrKey(name), one) for name, one in {**maps}.items()], maps.keys()),
)


def _check_order(enc: Source, dec: Source) -> None:
    """Refuse a decoder's map that is older than the encoder's; allow slots that attend again after the decoder."""
    if not (isinstance(enc, Tap) and isinstance(dec, Tap)):
        return
    if dec._before(enc):
        enc.reset()
        dec.reset()
        raise RuntimeError(
            "`dec` must hold a map of the forward that `enc` holds; got an earlier one. Did the encoder run again "
            "without the decoder? Pop or reset() both taps after each forward."
        )
    enc._overlook_what_ran_after(dec)


def ordered(dec: Tensor, enc: Tensor, *, by_frame: bool) -> Tensor:
    """Put clips, frames and slots in the order of the encoder's map: whatever it leads with, it ends in N or H, W."""
    (B, T, S), N = enc.shape[:3], enc.shape[3:].numel()
    if by_frame and dec.shape[:2] == (B * S, T) and dec.dim() in (3, 4):
        return rearrange(dec, "(b s) t ... -> b t s ...", s=S)
    if (rest := _rest(dec.shape, B, T, S, N)) is not None:
        return dec.reshape(B, T, S, *rest)
    hint = ""
    if dec.dim() in (3, 4) and dec.shape[-1] == S and _rest(dec.mT.shape, B, T, S, N) is not None:
        hint = " Are its last two axes the other way round? Swap a tap's projections, or say so by `axes`."
    elif dec.dim() > 2 and dec.shape[:2].numel() in (B * T, B * T * S):
        hint = PIECES
    elif dec.numel() > B * T * S * N and dec.numel() % (B * T * S * N) == 0:
        times = dec.numel() // (B * S * N)
        hint = (
            f" If it holds {times} frames, and the encoder one in each call, the tap has kept the last: give it the "
            "`host` (an entry its `covers`) that is called once a clip."
        )
    raise ValueError(
        f"`dec` must have shape (B={B}, T={T}, S={S}, ...) or (B*T={B * T}, S={S}, ...) or (B*T*S={B * T * S}, ...), "
        f"ending in N or H, W, to go with `enc`; got {tuple(dec.shape)}.{hint}"
    )


def _rest(shape: torch.Size, B: int, T: int, S: int, N: int) -> torch.Size | None:
    """Return the axes of a map after clips, frames and slots; None if they do not lead it."""
    for lead in ((B, T, S), (B * T, 1, S), (B * T, S), (B * T * S,)):
        rest = shape[len(lead) :]
        # a rest (S, N) is no grid: the decoder has S frames, and the encoder's map fewer
        if shape[: len(lead)] == lead and len(rest) in (1, 2) and rest != (S, N):
            return rest
    return None


def _take(source: Source, num_frames: int | None, num_slots: int | None = None) -> Tensor:
    if isinstance(source, LogitTap):
        # a decoder's frames are taken apart later, by the encoder's T
        return source.pop(num_frames=None if num_slots else num_frames)
    if isinstance(source, OutputTap):
        return source.pop(num_frames=num_frames, num_slots=num_slots) if source._axes else source.pop()
    return source
