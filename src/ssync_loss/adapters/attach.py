"""The two maps of a known model in one line, and a handle that gives them after every forward."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import isqrt
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from ssync_loss._autocast import at_least_float32, no_autocast
from ssync_loss._checks import check_choice, check_tensor
from ssync_loss._module import DetachedWarning
from ssync_loss.adapters.hosts import EXAMPLE, HOSTS, DecKind, Dots, Found, Host, Output, Seen, lacks
from ssync_loss.adapters.logit_tap import HeadSoftmax, LogitTap
from ssync_loss.adapters.output_tap import OutputTap
from ssync_loss.adapters.slot_maps import SlotMaps
from ssync_loss.ssync.maps import KINDS, Grid, Size, check_grid
from ssync_loss.ssync.settings import TINY

if TYPE_CHECKING:
    from typing_extensions import Self

DecoderArgument: TypeAlias = nn.Module | LogitTap | OutputTap | Callable[[], Tensor]
_Tapped: TypeAlias = Dots | Output | LogitTap | OutputTap | Callable[[], Tensor]


def attach(
    model: nn.Module,
    host: str | Host = "auto",
    *,
    grid: Grid = None,
    dec: DecoderArgument | None = None,
    dec_kind: DecKind | None = None,
    scale: float | None = None,
    heads: int | None = None,
    head_softmax: HeadSoftmax | None = None,
) -> "AttachedMaps":
    """Find the maps of a model of a known family, and tap them; the model stays as it is.

    ::

        maps = attach(model)                                  # once, before the model's first call
        loss = loss + criterion(**maps(), step=step)          # in the step, after the forward

    Known are ``"slotcontrast"`` (SlotContrast, VideoSAUR, SSync, SRL, SlotCurri), ``"genera1z"`` (RandSF.Q, SmoothSA,
    xSSC), ``"steve"``, ``"oclf"``, ``"spot"`` and ``"lucidrains"``; they are recognized by their attributes, also
    inside of DDP, ``torch.compile``, ``AveragedModel``, a LightningModule or whatever module holds one. Any other
    model needs an entry of its own, see :mod:`ssync_loss.adapters.hosts`.

    The encoder's map is the dots of slot attention, before the softmax, of the last iteration. Several heads are
    merged as `LogitTap` says, and then more slots merge: choose ``merge_threshold`` anew. The decoder's is its alpha
    logits, or the logarithm of its probabilities, whose softmax is the same.

    Args:
        model: the host, or a module that contains one.
        host: a family's name, an entry of your own, or ``"auto"``.
        grid: (H, W) of the patches, or ((H, W), (H_d, W_d)) for encoder and decoder, where N is not H * H.
        dec: a decoder of your own, in place of the host's: a module that gives its map, a tap, or a function that
            returns the map of the last forward. Slots come before patches.
        dec_kind: whether ``dec`` gives ``"logits"`` (as None does) or ``"probs"``, probabilities over slots.
        scale, heads, head_softmax: of the encoder, in place of what was found, as `LogitTap` has them.

    Raises: TypeError on an argument of another type; ValueError if no host is found or more than one, a setting is out
        of range, or a map cannot be right: patches in another order than the encoder's, or the encoder's own map as
        the decoder's.

    >>> import torch
    >>> from slot_attention import SlotAttention
    >>> model = nn.ModuleDict({"slots": SlotAttention(num_slots=3, dim=8), "alpha": nn.Linear(8, 16)})
    >>> maps = attach(model, dec=model["alpha"])
    >>> _ = model["alpha"](model["slots"](torch.randn(2, 16, 8)))
    >>> {name: tuple(one.shape) for name, one in dict(**maps()).items()}
    {'enc_logits': (2, 1, 3, 4, 4), 'dec_logits': (2, 1, 3, 4, 4)}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a module; got {type(model).__name__}.")
    check_grid(grid)
    path, module, entry = _find(model, _entries(host))
    found = entry.find(module)
    given = {"scale": scale, "heads": heads, "head_softmax": head_softmax}
    enc = replace(found.enc, **{name: one for name, one in given.items() if one is not None})
    if dec_kind is not None:
        check_choice("dec_kind", dec_kind, KINDS)
        if dec is None:
            raise ValueError(f"`dec_kind` must be None without `dec`; got {dec_kind!r}.")
    tapped: _Tapped
    if dec is None:
        if isinstance(found.dec, str):
            raise ValueError(f"{_title(entry, module)} has no decoder map to take: {found.dec}.")
        tapped = found.dec
    else:
        tapped = Output(dec, _itself, dec, dec_kind or "logits") if isinstance(dec, nn.Module) else dec
    _check_decoder(tapped, enc, found)
    kind = tapped.kind if isinstance(tapped, Output) else dec_kind or "logits"
    names = {id(one): name.replace("_orig_mod.", "") for name, one in model.named_modules()}
    return AttachedMaps(entry, module, replace(found, enc=enc), tapped, kind, grid, names, path)


class AttachedMaps:
    """The maps of a model's last forward, as ``criterion(**maps())`` takes them; made by :func:`attach`.

    A forward gives its maps once. Encoder and decoder must have run once each, in this order; a forward that nobody
    asks about is forgotten at the next. Copies of the model, deep or unpickled, are not tapped, and a copy of this
    gives nothing. It is a context manager, which takes the hooks off in the end.
    """

    def __init__(
        self,
        entry: Host,
        module: nn.Module,
        found: Found,
        dec: _Tapped,
        kind: DecKind,
        grid: Grid,
        names: dict[int, str],
        path: str,
    ) -> None:
        self._alive = True
        self._entry, self._module, self._found, self._kind, self._names = entry, module, found, kind, names
        self._title = _title(entry, module) + (f" at `{path}`" if path else "")
        self._grids = check_grid(grid)
        self._warn = DetachedWarning()
        self._compared: set[bool] = set()
        self._seen = "not called yet"
        # what has run since the encoder began; written without being read, so that a compiled model has no guard on it
        self._ran: list[str] = []
        self._caught: dict[str, list[Tensor]] = {}
        enc = found.enc
        self._enc = _tap(enc)
        self._dec_source = dec
        self._dec = _tap(dec) if isinstance(dec, (Dots, Output)) else dec
        self._own = dec if isinstance(dec, (LogitTap, OutputTap)) else None
        self._handles = [enc.covers.register_forward_pre_hook(self._on_encoder)]
        if isinstance(dec, (Dots, Output)):
            self._handles.append(dec.covers.register_forward_hook(self._on_decoder))
        for name in ("valid", "slot_mask", "grid"):
            seen: Seen | None = getattr(found, name)
            if seen is not None:
                hook = partial(self._on_seen, name)
                self._handles.append(seen.module.register_forward_hook(hook, with_kwargs=True))

    def __call__(self) -> SlotMaps:
        """Return the maps of the last forward, (B, T, S, H, W), or (B, T, S, N) where N shows no grid, and its masks.

        Raises: RuntimeError if there is no forward whose maps have not been given, or encoder and decoder are not of
            one forward; ValueError if the maps do not go together, or are one and the same.
        """
        self._check_forward()
        self._ran = ["given"]
        caught, self._caught = self._caught, {}
        enc = self._enc.pop()
        dec = self._pop_decoder()
        if self._found.pick_frames is not None:
            enc = self._found.pick_frames(enc, dec)
        enc, dec = SlotMaps.join(enc, dec)
        if self._kind == "probs":
            dec = _log(dec)
        present: Tensor | None = None
        if "slot_mask" in caught:
            # the host masks after the tap: (B, S) once, or frame by frame
            by_frame = torch.stack(caught["slot_mask"], 1)
            enc = enc.masked_fill(~by_frame.unsqueeze(-1), float("-inf"))
            present = by_frame.any(1)
        enc_grid, dec_grid = self._grids
        if enc_grid is None and "grid" in caught:
            height, width = caught["grid"][-1].shape[1:]
            enc_grid = (height, width)
        if dec_grid is None and dec.shape[3:] == enc.shape[3:]:
            dec_grid = enc_grid
        enc, dec = _on_grid("enc_logits", enc, enc_grid), _on_grid("dec_logits", dec, dec_grid)
        self._check_maps(enc, dec)
        return SlotMaps(enc, dec, valid=caught["valid"][-1] if "valid" in caught else None, slot_mask=present)

    def describe(self) -> str:
        """Say what is tapped, and what the last call gave: shapes, grids, masks, and who carries a gradient."""
        enc, lines = self._found.enc, [f"{self._title}, {self._entry.name}"]
        lines.append(f"encoder: {self._tell(enc)}")
        if enc.heads > 1:
            lines.append(
                f"    {enc.heads} heads are merged into one map: its softmax is the host's attention, but these are no "
                "dots. More slots merge: choose `merge_threshold` anew."
            )
        lines.append(f"decoder: {self._tell(self._dec_source)}")
        lines.append(f"last call: {self._seen}")
        return "\n".join(lines)

    def remove(self) -> None:
        """Take the hooks off the model; a second call does nothing. A tap that was given as ``dec`` stays."""
        self._alive = False
        if self._handles:
            self._enc.remove()
            if isinstance(self._dec_source, (Dots, Output)) and isinstance(self._dec, (LogitTap, OutputTap)):
                self._dec.remove()
        for handle in self._handles:
            handle.remove()
        self._handles, self._caught = [], {}

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._alive = False
        self._handles = []
        self._caught = {}

    def _on_encoder(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        if self._alive:
            self._ran = ["encoder"]
            self._caught = {}
            if self._own is not None:
                # a tap of the user's may have no host, and then keeps what nobody asked for
                self._own.reset()

    def _on_decoder(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        if self._alive:
            self._ran.append("decoder")

    def _on_seen(
        self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        tensor = getattr(self._found, name).pick(args, kwargs, output) if self._alive else None
        if tensor is not None:
            self._caught.setdefault(name, []).append(tensor)

    def _check_forward(self) -> None:
        if not self._alive:
            raise RuntimeError(
                "these maps are attached to no model: they were removed, or are a copy, or unpickled. attach() again."
            )
        ran, enc = self._ran, self._found.enc
        if not ran:
            raise RuntimeError(
                f"no forward of {self._title} has been seen. Call the model first, and attach before its first call "
                "if it is compiled. A copy (deepcopy, an average, a pickle) is not tapped: attach to the copy. "
                f"What must be called, and not its `.forward`, is {self._name(enc.covers)}."
            )
        if ran[0] == "given":
            raise RuntimeError("the maps of this forward were given already: keep what the first call returned.")
        if not isinstance(self._dec_source, (Dots, Output)):
            return
        decoder, times = self._name(self._dec_source.covers), len(ran) - 1
        if times == 0:
            raise RuntimeError(
                f"{decoder} has not run since {self._name(enc.covers)} began: encoder and decoder must be of one "
                "forward."
            )
        if times > 1:
            raise RuntimeError(
                f"{decoder} has run {times} times since {self._name(enc.covers)} began, so its last map is not of the "
                "encoder's forward. Take the maps right after the model's own forward."
            )

    def _pop_decoder(self) -> Tensor:
        if isinstance(self._dec, LogitTap):
            maps = self._dec.pop()
            # frames in the batch
            return maps.squeeze(1) if maps.shape[1] == 1 else maps
        maps = self._dec.pop() if isinstance(self._dec, OutputTap) else self._dec()
        check_tensor("dec", maps)
        return maps

    def _check_maps(self, enc: Tensor, dec: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        self._warn(self._module, enc_logits=(enc, "interior"), dec_logits=(dec, "boundary"))
        gives = ", ".join(
            f"{name} {tuple(one.shape)} {'with' if one.requires_grad else 'without'} gradient"
            for name, one in (("encoder", enc), ("decoder", dec))
        )
        self._seen = gives + ("" if enc.dim() == 5 else f"; N={enc.shape[3]} shows no grid, so give `grid`")
        # one look in training and one in evaluation, since it waits for the device
        if enc.shape == dec.shape and self._module.training not in self._compared:
            self._compared.add(self._module.training)
            if _same(enc.detach(), dec.detach()):
                raise ValueError(
                    "`dec` must be a map of the decoder; got the encoder's own: what it gives are the probabilities "
                    "of the encoder's logits, so neither has anything to learn."
                )

    def _tell(self, source: _Tapped) -> str:
        if isinstance(source, Dots):
            heads = "1 head" if source.heads == 1 else f"{source.heads} heads, {source.head_softmax} softmax"
            slots, patches = self._name(source.slots), self._name(source.patches)
            return f"dots of {slots} (slots) and {patches} (patches), scale {source.scale:.4g}, {heads}"
        if isinstance(source, Output):
            what = "logits" if self._kind == "logits" else "probabilities, renormalized and logged"
            return f"output of {self._name(source.module)}: {what}"
        return f"a {type(source).__name__} of your own: {self._kind}"

    def _name(self, module: nn.Module) -> str:
        return f"`{self._names.get(id(module)) or type(module).__name__}`"


def _entries(host: str | Host) -> tuple[Host, ...]:
    if isinstance(host, Host):
        return (host,)
    check_choice("host", host, ("auto", *(one.name for one in HOSTS)))
    return HOSTS if host == "auto" else tuple(one for one in HOSTS if one.name == host)


def _find(model: nn.Module, entries: tuple[Host, ...]) -> tuple[str, nn.Module, Host]:
    """Return the outermost module that has the marks of an entry, with its path."""
    matches: list[tuple[str, nn.Module, Host]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ValueError("`model` must not be an nn.DataParallel: its replicas are copies, and those have no taps.")
        if "_orig_mod" in module._modules or any(name.startswith(f"{path}." if path else "") for path, *_ in matches):
            continue
        entry = next((one for one in entries if not lacks(module, one)), None)
        if entry is not None:
            matches.append((name, module, entry))
    if not matches:
        raise ValueError(_unknown(model, entries))
    if len(matches) > 1:
        listed = ", ".join(f"`{path}` ({entry.name})" for path, _, entry in matches)
        raise ValueError(f"`model` must contain one host; got {listed}. Give attach() the one that is trained.")
    path, module, entry = matches[0]
    return path.replace("_orig_mod.", "").removesuffix("_orig_mod"), module, entry


def _unknown(model: nn.Module, entries: tuple[Host, ...]) -> str:
    looked = "\n".join(f"    {one.name}: {', '.join(one.marks)}" for one in entries)
    return (
        f"`model` must be or contain a known host; got {type(model).__name__}, and no module in it has the attributes "
        f"of one:\n{looked}\nTo attach to another, write where its maps are:\n\n{EXAMPLE}"
    )


def _title(entry: Host, module: nn.Module) -> str:
    return type(module).__name__


def _tap(source: Dots | Output) -> LogitTap | OutputTap:
    if isinstance(source, Output):
        return OutputTap(source.module, source.select, host=source.covers)
    return LogitTap(
        source.slots,
        source.patches,
        source.scale,
        heads=source.heads,
        head_softmax=source.head_softmax,
        frames_in_key=source.frames_in_key,
        host=source.covers,
    )


def _check_decoder(dec: _Tapped, enc: Dots, found: Found) -> None:
    """Refuse a decoder map that cannot be right."""
    if isinstance(dec, (Dots, Output)):
        modules = [dec.module] if isinstance(dec, Output) else [dec.slots, dec.patches]
    elif isinstance(dec, (LogitTap, OutputTap)):
        modules = [one for one in _modules_of(enc, found) if _hangs_on(dec, one)]
    elif callable(dec):
        modules = []
    else:
        raise TypeError(f"`dec` must be a module, a tap or a function without arguments; got {type(dec).__name__}.")
    if any(one is enc.slots or one is enc.patches for one in modules):
        raise ValueError("`dec` must be of the decoder; got a projection of the encoder's slot attention.")
    shuffled = {id(inner) for one in found.shuffled for inner in one.modules()}
    if any(id(one) in shuffled for one in modules):
        raise ValueError(
            "`dec` must have its patches in the encoder's order; got the decoder's cross-attention, which sees them "
            "shuffled in training. Leave `dec` out: the map that the host returns is put in order."
        )


def _modules_of(enc: Dots, found: Found) -> list[nn.Module]:
    return [enc.slots, enc.patches, *(inner for one in found.shuffled for inner in one.modules())]


def _hangs_on(tap: LogitTap | OutputTap, module: nn.Module) -> bool:
    return any(getattr(hook, "__self__", None) is tap for hook in module._forward_hooks.values())


def _itself(output: Tensor) -> Tensor:
    return output


def _log(probs: Tensor) -> Tensor:
    """Probabilities (B, T, S, ...) as logits; the gradient of a probability of 0 is 0."""
    with no_autocast(probs):
        probs = at_least_float32(probs)
        probs = probs / probs.sum(2, keepdim=True).clamp_min(TINY)
        return probs.clamp_min(TINY).log()


def _on_grid(name: str, maps: Tensor, size: Size | None) -> Tensor:
    if maps.dim() == 5:
        if size is not None and tuple(maps.shape[3:]) != size:
            raise ValueError(f"`grid` must be that of `{name}`, {tuple(maps.shape[3:])}; got {size}.")
        return maps
    num_patches = maps.shape[3]
    height, width = (isqrt(num_patches),) * 2 if size is None else size
    if height * width == num_patches:
        return maps.unflatten(3, (height, width))
    if size is None:
        return maps
    raise ValueError(f"`grid` must have the N={num_patches} patches of `{name}`; got {size}.")


def _same(enc: Tensor, dec: Tensor) -> bool:
    """Tell whether two maps have the same softmax, up to what half precision costs."""
    enc, dec = (at_least_float32(one).softmax(2) for one in (enc, dec))
    spread = (enc.amax(2) - enc.amin(2)).max()
    return bool(((enc - dec).abs().max() <= 0.02 * spread) & (spread > 1e-6))
