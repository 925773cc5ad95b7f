"""The two maps of a model, in the form a criterion takes."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, SupportsIndex, TypeAlias, overload

from einops import rearrange
from torch import Tensor

from ssync_loss._checks import check_int, check_tensor
from ssync_loss.adapters.logit_tap import LogitTap
from ssync_loss.adapters.output_tap import OutputTap

if TYPE_CHECKING:
    from typing_extensions import Self

Source: TypeAlias = Tensor | LogitTap | OutputTap


class SlotMaps(tuple[Tensor, Tensor]):
    """The maps of one forward: ``criterion(*maps)``, or ``criterion(**maps)`` with the masks of the host.

    A tuple of the two maps. As a mapping it has the masks too, where there are any.

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

    # a named tuple by hand, which torch's compiler takes for one: typing's have no room for masks
    _fields = "enc_logits", "dec_logits"
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
        """Empty the taps, and put clips and frames on axes of their own; values are untouched.

        Args:
            enc: (B, T, S, N) or (B, T, S, H, W), with ``num_frames`` also (B*T, S, N), or the tap that has it.
            dec: (B, T, S, ...) or (B*T, S, ...), ending in N_d or H_d, W_d, or its tap. A still image is T=1.
            num_frames: T. Needed where the encoder's frames are flattened into the batch; elsewhere it is checked.

        Raises: TypeError if a map is neither a tensor nor a tap; RuntimeError if a tap has not collected one forward;
            ValueError if the shapes do not go together.

        >>> import torch
        >>> maps = SlotMaps.join(torch.zeros(2, 3, 4, 25), torch.zeros(6, 4, 10, 10))
        >>> [tuple(one.shape) for one in maps]
        [(2, 3, 4, 25), (2, 3, 4, 10, 10)]
        """
        if num_frames is not None:
            check_int("num_frames", num_frames, 1)
        enc_logits = enc.pop(num_frames=num_frames) if isinstance(enc, LogitTap) else _take("enc", enc)
        dec_logits = _take("dec", dec)
        if num_frames is not None and enc_logits.dim() == 3 and len(enc_logits) % num_frames == 0:
            enc_logits = rearrange(enc_logits, "(b t) s n -> b t s n", t=num_frames)
        shape = tuple(enc_logits.shape)
        if len(shape) not in (4, 5) or num_frames not in (None, shape[1]):
            time = "T" if num_frames is None else f"T={num_frames}"
            raise ValueError(
                f"`enc` must have shape (B, {time}, S, N) or (B, {time}, S, H, W), or (B*T, S, N) where "
                f"`num_frames` gives T; got {shape}."
            )
        B, T, S = shape[:3]
        if dec_logits.dim() in (3, 4) and dec_logits.shape[:2] == (B * T, S):
            dec_logits = rearrange(dec_logits, "(b t) s ... -> b t s ...", b=B)
        if dec_logits.dim() not in (4, 5) or dec_logits.shape[:3] != (B, T, S):
            raise ValueError(
                f"`dec` must have shape (B={B}, T={T}, S={S}, ...) or (B*T={B * T}, S={S}, ...), ending in "
                f"N or H, W, to go with `enc`; got {tuple(dec_logits.shape)}."
            )
        return cls(enc_logits, dec_logits)


def _take(name: str, source: Source) -> Tensor:
    if isinstance(source, (LogitTap, OutputTap)):
        return source.pop()
    check_tensor(name, source)
    return source
