"""A handle on a tapped model, which gives the two maps after every forward."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ssync_loss._autocast import at_least_float32, no_autocast
from ssync_loss._axes import square
from ssync_loss._checks import check_tensor
from ssync_loss._compilers import is_recomputing, is_traced
from ssync_loss._module import DetachedWarning, _callers_stacklevel
from ssync_loss.adapters._tap import Hooked, Tap
from ssync_loss.adapters.hosts import Dots, Found, Output, Seen
from ssync_loss.adapters.logit_tap import LogitTap
from ssync_loss.adapters.output_tap import OutputTap
from ssync_loss.adapters.slot_maps import SlotMaps, ordered
from ssync_loss.ssync.maps import Kind, Size, log_of_probs
from ssync_loss.ssync.settings import TINY

# of a `Found`, what the host makes of its maps
_OWN = "enc_probs", "dec_probs"

Source: TypeAlias = Dots | Output | LogitTap | OutputTap | Callable[[], Tensor]


class AttachedMaps(Hooked):
    """The maps of a model's last forward, as ``criterion(**maps())`` takes them; made by ``attach``.

    A forward gives its maps once. Encoder and decoder must have run once each, in this order; a forward that nobody
    asks about is forgotten at the next. Copies of the model, deep or unpickled, are not tapped, and a copy of this
    gives nothing. As a context manager it takes the hooks off at the end. Inside of a compiled function torch 2.6 takes
    no ``**maps()``; newer ones do.

    >>> from slot_attention import SlotAttention
    >>> from ssync_loss.adapters import attach
    >>> model = nn.ModuleDict({"slots": SlotAttention(num_slots=3, dim=4), "alpha": nn.Linear(4, 16)})
    >>> with attach(model, dec=model["alpha"]) as maps:
    ...     _ = model["alpha"](model["slots"](torch.randn(2, 16, 4)))
    ...     dec_logits = maps().dec_logits
    ...     print(maps.describe())
    SlotAttention (lucidrains, at `slots`)
    encoder: dots of `slots.to_q` (slots) and `slots.to_k` (patches), scale 0.5, 1 head
    decoder: output of `alpha`: logits
    last call: encoder (2, 1, 3, 4, 4) with gradient, decoder (2, 1, 3, 4, 4) with gradient
    """

    def __init__(
        self,
        title: str,
        module: nn.Module,
        found: Found,
        dec: Source,
        kind: Kind,
        grids: tuple[Size | None, Size | None],
        names: dict[int, str],
    ) -> None:
        self._alive = True
        self._title, self._module, self._found = title, module, found
        self._kind, self._grids, self._names = kind, grids, names
        self._warn = DetachedWarning()
        self._compared: set[bool] = set()
        self._seen = "not called yet"
        self._mask: Tensor | None = None
        # forwards that learned since the last call; the weights' versions then; whether the call before saw several
        self._begun, self._weights, self._repeats = 0, [-1], False
        self._learns = True
        # what has run since the encoder began; hooks do not read it, so that a compiled model has no guard on it
        self._ran: list[str] = []
        self._caught: dict[str, list[Tensor]] = {}
        # frame by frame, None where all slots are present
        self._masks: list[Tensor | None] = []
        # the decoder's first map, if it runs twice, and whether its frames were stacked
        self._first: tuple[Tensor, bool] | None = None
        enc = found.enc
        self._dec_source = dec
        self._enc = _tap(enc)
        try:
            self._dec = _tap(dec) if isinstance(dec, (Dots, Output)) else dec
        except (TypeError, ValueError):
            self._enc.remove()
            raise
        self._handles = [enc.covers.register_forward_pre_hook(self._on_encoder)]
        if isinstance(dec, (Dots, Output)):
            self._handles.append(_covered(dec).register_forward_hook(self._on_decoder))
        within = {one for one in enc.covers.modules() if one is not enc.covers}
        # what may run frame by frame while a clip is encoded
        self._by_frame: set[str] = set()
        for name in ("valid", "slot_mask", "grid", *_OWN):
            seen: Seen | None = getattr(found, name)
            if seen is not None:
                if seen.module in within:
                    self._by_frame.add(name)
                hook = partial(self._on_seen, name)
                self._handles.append(seen.module.register_forward_hook(hook, with_kwargs=True))

    def __call__(self) -> SlotMaps:
        """Return the maps of the last forward, (B, T, S, H, W), or (B, T, S, N) where N shows no grid, and its masks.

        Raises: RuntimeError if there is no forward whose maps have not been given, or encoder and decoder are not of
            one forward; ValueError if the maps do not go together, or are one and the same. It warns, once in training
            and once in evaluation, of a map that is not what the host shows of it.
        """
        self._check_forward()
        self._ran = ["given"]
        caught, self._caught = self._caught, {}
        masks, self._masks = self._masks, []
        held = [*self._enc._calls, *getattr(self._dec, "_calls", ())]
        halves = any(call.tensor.element_size() < 4 for call in held)
        enc = self._enc.pop()
        (dec, stacked), self._first = self._first or self._pop_decoder(), None
        if self._found.pick_frames is not None:
            enc = self._found.pick_frames(enc, dec)
        given = ordered(dec, enc, by_frame=stacked)
        with no_autocast(given):
            dec = log_of_probs(at_least_float32(given)) if self._kind == "probs" else given
        present: Tensor | None = None
        some = next((one for one in masks if one is not None), None)
        if some is not None:
            # the host masks after the tap: (B, S) once, or frame by frame
            by_frame = torch.stack([torch.ones_like(some) if one is None else one for one in masks], 1)
            enc = enc.masked_fill(~by_frame.unsqueeze(-1), float("-inf"))
            present = by_frame.any(1)
        enc_grid, dec_grid = self._grids
        for shown in (*caught.get("grid", [])[-1:], dec):
            # 18 x 32 is a square number, too
            if enc_grid is None and enc.dim() == 4 and shown.dim() != 4 and shown.shape[-2:].numel() == enc.shape[3]:
                enc_grid = (shown.shape[-2], shown.shape[-1])
        if dec_grid is None and dec.shape[3:] == enc.shape[3:]:
            dec_grid = enc_grid
        enc, dec = _on_grid("enc_logits", enc, enc_grid), _on_grid("dec_logits", dec, dec_grid)
        maps = SlotMaps(enc, dec, valid=caught["valid"][-1] if "valid" in caught else None, slot_mask=present)
        if not is_traced():
            self._say_if_last_of_many()
            self._look_at(maps, given, [caught.get(name, []) for name in _OWN], halves)
        return maps

    def describe(self) -> str:
        """Say what is tapped, and what the last call gave: shapes, grids, masks, and who carries a gradient."""
        self._check_alive()
        enc, lines = self._found.enc, [self._title]
        lines.append(f"encoder: {self._tell(enc)}")
        if enc.heads > 1:
            lines.append(
                f"    {enc.heads} heads are merged into one map: its softmax is the host's attention, but these are no "
                "dots, so slots merge by another rule, and more do. Choose `merge_threshold` anew."
            )
        lines.append(f"decoder: {self._tell(self._dec_source)}")
        lines.append(f"last call: {self._seen}")
        if self._mask is not None:
            kept = self._mask.sum(1)
            lines.append(f"slot mask: keeps {int(kept.min())} to {int(kept.max())} of {self._mask.shape[1]} slots")
        return "\n".join(lines)

    def remove(self) -> None:
        """Take the hooks off the model; a second call does nothing. A tap that was given as ``dec`` stays."""
        self._alive = False
        if self._handles:
            self._enc.remove()
            if isinstance(self._dec, Tap) and self._dec is not self._dec_source:
                self._dec.remove()
        for handle in self._handles:
            handle.remove()
        self._handles, self._caught, self._masks, self._first = [], {}, [], None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._alive = False
        self._handles, self._caught, self._masks = [], {}, []

    def _on_encoder(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        if self._alive and not is_recomputing():
            self._ran = ["encoder"]
            self._caught, self._masks, self._first = {}, [], None
            if not is_traced():
                self._learns = torch.is_grad_enabled()
                if self._learns:
                    self._count()
            if isinstance(self._dec_source, Tap):
                # a tap of the user's may have no host, and then keeps what nobody asked for
                self._dec_source.reset()

    def _count(self) -> None:
        """Count the forwards that learn since the last call, or since the weights were last written to."""
        learned = [one for one in self._found.enc.slots.parameters() if one.requires_grad and not one.is_inference()]
        weights = [one._version for one in learned]
        self._begun = self._begun + 1 if weights == self._weights else min(1, len(learned))
        self._weights = weights

    def _on_decoder(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        if self._alive and not is_recomputing():
            self._ran.append("decoder")
            if self._found.decodes_again and self._first is None:
                self._first = self._pop_decoder()

    def _on_seen(
        self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not self._alive or is_recomputing():
            return
        if name in _OWN and (is_traced() or self._module.training in self._compared):
            return
        known = name in self._caught or (name == "slot_mask" and bool(self._masks))
        if not is_traced() and not (self._enc._listening if name in self._by_frame else not known):
            # of no forward, or of a second decoding
            return
        tensor = getattr(self._found, name).pick(args, kwargs, output)
        if name == "slot_mask":
            self._masks.append(tensor)
        elif tensor is not None:
            self._caught.setdefault(name, []).append(tensor)

    def _check_alive(self) -> None:
        if not self._alive:
            raise RuntimeError("these maps hang on no model: they were removed, or are a copy. attach() again.")

    def _check_forward(self) -> None:
        self._check_alive()
        ran, enc = self._ran, self._found.enc
        if ran[:1] == ["given"] and not self._enc._missed:
            raise RuntimeError("the maps of this forward were given already: keep what the first call returned.")
        if ran[:1] != ["encoder"]:
            raise RuntimeError(
                f"no forward of {self._title} has been seen. Call the model first, and attach before its first call "
                "if it is compiled. A copy (deepcopy, an average, a pickle) is not tapped: attach to the copy. "
                f"What must be called, and not its `.forward`, is {self._name(enc.covers)}.{self._instead()}"
            )
        if not isinstance(self._dec_source, (Dots, Output)):
            return
        decoder, times = self._name(_covered(self._dec_source)), len(ran) - 1
        if times == 1 or self._found.decodes_again:
            # slots may attend again outside of the clip, such as to a reconstruction
            self._enc._missed = False
        if times == 0:
            raise RuntimeError(
                f"{decoder} has not run since {self._name(enc.covers)} began: encoder and decoder must be of one "
                "forward."
            )
        if times > 1 and not self._found.decodes_again:
            raise RuntimeError(
                f"{decoder} has run {times} times since {self._name(enc.covers)} began, so its last map is not of the "
                "encoder's forward. Take the maps right after the model's own forward. If it runs frame by frame, "
                "write an entry whose `covers` is the module that decodes the whole clip. If it runs in pieces, tap "
                'what puts them together: `dec=Output(model.decoder, lambda out: out["masks"], "probs")`, or the like.'
            )

    def _instead(self) -> str:
        """Name a module that was called in place of what covers a clip."""
        called = [mark.place for mark in self._enc._marks if mark.called]
        if not called:
            return ""
        one = self._name(self._found.enc.covers.get_submodule(called[0]))
        return f" Or, if {one} sees whole clips, write an entry whose `covers` is that: it was called."

    def _pop_decoder(self) -> tuple[Tensor, bool]:
        stacked = isinstance(self._dec, OutputTap) and self._dec._by_frame
        maps = self._dec.pop() if isinstance(self._dec, (LogitTap, OutputTap)) else self._dec()
        check_tensor("dec", maps)
        return maps, stacked

    def _say_if_last_of_many(self) -> None:
        times, self._begun, self._weights = self._begun, 0, [-1]
        # once it may be steps before the loss begins; twice in a row it is a loop over frames
        if times > 1 and self._repeats:
            warnings.warn(
                f"{self._name(self._found.enc.covers)} has run {times} times since the last step, and these maps are "
                "of the last run alone. If the runs are frames of a clip, put the frames into the batch, or write an "
                "entry whose `covers` is the module that sees whole clips.",
                stacklevel=_callers_stacklevel(),
            )
        self._repeats = times > 1

    def _look_at(self, maps: SlotMaps, given: Tensor, own: list[list[Tensor]], halves: bool) -> None:
        enc, dec = maps
        if not self._learns and torch.is_grad_enabled() and self._module.training and not self._warn.said:
            self._warn.said = True
            warnings.warn(
                f"{self._name(self._found.enc.covers)} last ran without gradient, so SSync teaches nothing by these "
                "maps. If that was a teacher's forward, take the maps before it; if it is a checkpoint with "
                "use_reentrant=True, set that to False. (Said once.)",
                stacklevel=_callers_stacklevel(),
            )
        self._warn(self._module, enc_logits=(enc, "interior"), dec_logits=(dec, "boundary"))
        gradient = [f"with{'' if one.requires_grad else 'out'} gradient" for one in maps]
        self._seen = f"encoder {tuple(enc.shape)} {gradient[0]}, decoder {tuple(dec.shape)} {gradient[1]}"
        self._seen += "".join(f", {name}" for name in maps.keys()[2:])
        self._mask = maps.slot_mask
        if enc.dim() == 4:
            self._seen += f"; N={enc.shape[3]} shows no grid: give `grid`"
        # one look in training and one in evaluation, since it waits for the device; fake tensors have nothing to see
        real = type(enc) is type(dec) is Tensor and not enc.is_meta
        if real and self._module.training not in self._compared:
            problem = _problem(enc.detach(), dec.detach(), given.detach(), self._kind)
            if problem is not None:
                raise ValueError(problem)
            self._compared.add(self._module.training)
            self._compare(maps, own, halves)

    def _compare(self, maps: SlotMaps, own: list[list[Tensor]], halves: bool) -> None:
        """Warn of a map that is not what the host makes of it; a host may show something else, so this is no error."""
        for (name, one), shown, side in zip(maps._asdict().items(), own, _OWN, strict=False):
            apart = _distance(one.detach(), shown, halves)
            if apart > 0:
                warnings.warn(
                    f"`{name}` should have the probabilities that {self._name(getattr(self._found, side).module)} "
                    f"gives, but its softmax over slots differs by up to {apart:.2g}. Does the host scale or normalize "
                    "otherwise, or run in pieces? Give attach() the `scale` or `heads` that it has, or an entry that "
                    "says where its map is. (Said once in training and once in evaluation.)",
                    stacklevel=_callers_stacklevel(),
                )

    def _tell(self, source: Source) -> str:
        if isinstance(source, Dots):
            heads = "1 head" if source.heads == 1 else f"{source.heads} heads, {source.head_softmax} softmax"
            slots, patches = self._name(source.slots), self._name(source.patches)
            return f"dots of {slots} (slots) and {patches} (patches), scale {source.scale:.4g}, {heads}"
        if isinstance(source, Output):
            what = "logits" if self._kind == "logits" else "probabilities, renormalized and logged"
            return f"output of {self._name(source.module)}: {what}"
        return f"your own {type(source).__name__}: {self._kind}"

    def _name(self, module: nn.Module) -> str:
        return f"`{self._names.get(id(module)) or type(module).__name__}`"


def _distance(maps: Tensor, shown: list[Tensor], halves: bool) -> float:
    """Return how far a map is from the host's own probabilities; 0 if that is rounding, or there are none like it."""
    # the first call is the clip, or each is a frame
    probs = next((one for one in (*shown[:1], *_stacked(shown)) if one.numel() == maps.numel()), None)
    if probs is None:
        return 0.0
    probs = at_least_float32(probs.detach()).reshape(maps.shape)
    probs = probs / probs.sum(2, keepdim=True).clamp_min(TINY)
    spread = (probs.amax(2) - probs.amin(2)).amax()
    apart = (at_least_float32(maps).softmax(2) - probs).abs().amax()
    # tolerances for rounding, a share for large dots and a least one for small ones
    share, least = (0.25, 0.004) if halves else (0.05, 1e-4)
    return float(apart) if apart > share * spread + least else 0.0


def _stacked(frames: list[Tensor]) -> list[Tensor]:
    return [torch.stack(frames, 1)] if frames and all(one.shape == frames[0].shape for one in frames) else []


def _covered(source: Dots | Output) -> nn.Module:
    """Return the module whose call is one clip."""
    if isinstance(source, Dots):
        return source.covers
    return source.module if source.covers is None else source.covers


def _tap(source: Dots | Output) -> LogitTap | OutputTap:
    covers = _covered(source)
    for name in ("slots", "patches", "module"):
        one = getattr(source, name, covers)
        if isinstance(covers, nn.Module) and isinstance(one, nn.Module) and one not in set(covers.modules()):
            raise ValueError(f"`covers` must contain `{name}`; this {type(covers).__name__} does not.")
    if isinstance(source, Output):
        return OutputTap(source.module, source.select, host=_covered(source))
    return LogitTap(
        source.slots,
        source.patches,
        source.scale,
        heads=source.heads,
        head_softmax=source.head_softmax,
        frames_in_key=source.frames_in_key,
        host=source.covers,
    )


def _on_grid(name: str, maps: Tensor, size: Size | None) -> Tensor:
    if maps.dim() == 5:
        if size is not None and tuple(maps.shape[3:]) != size:
            raise ValueError(f"`grid` must be that of `{name}`, {tuple(maps.shape[3:])}; got {size}.")
        return maps
    num_patches = maps.shape[3]
    size = size or square(num_patches)
    if size is None:
        return maps
    if size[0] * size[1] == num_patches:
        return maps.reshape(*maps.shape[:3], *size)
    raise ValueError(f"`grid` must have the N={num_patches} patches of `{name}`; got {size}.")


def _problem(enc: Tensor, dec: Tensor, given: Tensor, kind: Kind) -> str | None:
    """Say what is wrong with a decoder map that is not what it was said to be."""
    sums = given.float().sum(2)
    if kind == "probs" and (given < 0).any():
        return "`dec_kind` must be 'logits' for this `dec`; got 'probs', but the map has negative values."
    if kind == "logits" and given.shape[2] > 1 and (given >= 0).all() and ((sums - 1).abs() < 1e-2).all():
        return "`dec_kind` must be 'probs' for this `dec`; got 'logits', but the map sums to 1 over slots."
    if enc.shape != dec.shape:
        return None
    enc, dec = (at_least_float32(one).softmax(2) for one in (enc, dec))
    spread = (enc.amax(2) - enc.amin(2)).max()
    # the tolerance is for half precision
    if (enc - dec).abs().max() <= 0.02 * spread and spread > 1e-6:
        return (
            "`dec` must be a map of the decoder; got the encoder's own: both have the same probabilities, so neither "
            "has anything to learn."
        )
    return None
