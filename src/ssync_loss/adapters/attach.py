"""Find the two maps of a known model, and tap them."""

from dataclasses import replace
from typing import Any, TypeAlias

from torch import nn

from ssync_loss._checks import check_choice, check_type
from ssync_loss.adapters.attached_maps import AttachedMaps, Source
from ssync_loss.adapters.hosts import EXAMPLE, HOSTS, Dots, Found, Host, Output, lacks
from ssync_loss.adapters.logit_tap import HeadSoftmax, LogitTap
from ssync_loss.adapters.output_tap import OutputTap
from ssync_loss.ssync.maps import KINDS, Grid, Kind, check_grid

DecoderArgument: TypeAlias = nn.Module | Source


def attach(
    model: nn.Module,
    host: str | Host = "auto",
    *,
    grid: Grid = None,
    dec: DecoderArgument | None = None,
    dec_kind: Kind | None = None,
    scale: float | None = None,
    heads: int | None = None,
    head_softmax: HeadSoftmax | None = None,
) -> AttachedMaps:
    """Find the maps of a model of a known family, and tap them; the model stays as it is.

    ::

        maps = attach(model)                                  # once, before the model's first call
        loss = loss + criterion(**maps(), step=step)          # in the step, after the forward

    Known are ``"slotcontrast"`` (SlotContrast, VideoSAUR, SSync, SRL, SlotCurri), ``"genera1z"`` (RandSF.Q, SmoothSA,
    xSSC), ``"steve"``, ``"oclf"``, ``"spot"`` and ``"lucidrains"``; they are recognized by their attributes, also
    inside of DDP, ``torch.compile``, ``AveragedModel``, a LightningModule or whatever module holds one. Any other
    model needs an entry of its own, see :mod:`ssync_loss.adapters.hosts`. A call of lucidrains' slot attention is one
    forward: put the frames of a clip into its batch, since of a loop only the last frame would be taken.

    The encoder's map is the dots of slot attention, before the softmax, of the last iteration. Several heads are
    merged as `LogitTap` says, and then more slots merge: choose ``merge_threshold`` anew. The decoder's is its alpha
    logits, or the logarithm of its probabilities, whose softmax is the same.

    Args:
        model: the host, or a module that contains one.
        host: a family's name, an entry of your own, or ``"auto"``.
        grid: (H, W) of the patches, or ((H, W), (H_d, W_d)) for encoder and decoder, where N is not H * H.
        dec: a decoder of your own, in place of the host's: a module that gives its map, a tap, what a tap takes
            (`Output` or `Dots` of :mod:`ssync_loss.adapters.hosts`), or a function that returns the map of the last
            forward. Slots come before patches, as `SlotMaps.join` reads them.
        dec_kind: whether ``dec`` gives ``"logits"`` (as None does) or ``"probs"``, probabilities over slots.
        scale: the factor of the encoder's dots, in place of what was found; likewise the next two.
        heads: number of heads of slot attention.
        head_softmax: ``"per_head"`` or ``"joint"``, as `LogitTap` has it.

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
    path, module, entry = _find(model, _entries(host))
    try:
        found = entry.find(module)
    except AttributeError as error:
        raise ValueError(
            f"`model` has the marks of {entry.name}, but not what its maps are made of: {error}."
        ) from error
    check_type("find", found, Found)
    given: dict[str, Any] = {"scale": scale, "heads": heads, "head_softmax": head_softmax}
    enc = replace(found.enc, **{name: one for name, one in given.items() if one is not None})
    if dec_kind is not None:
        check_choice("dec_kind", dec_kind, KINDS)
        if dec is None:
            raise ValueError(f"`dec_kind` must be None without `dec`; got {dec_kind!r}.")
    tapped: Source | str = found.dec
    if dec is not None:
        tapped = Output(dec) if isinstance(dec, nn.Module) else dec
    if isinstance(tapped, str):
        if dec is None:
            raise ValueError(f"`model`, a {type(module).__name__}, shows no map of the decoder: {tapped}.")
        raise TypeError("`dec` must be a module, a tap or a function without arguments; got str.")
    _check_decoder(tapped, enc, found)
    # what the host shows is not what the user gives
    found = replace(found, enc=enc, dec_probs=found.dec_probs if dec is None else None)
    kind = dec_kind or (tapped.kind if isinstance(tapped, Output) else "logits")
    names = {id(one): _plain(name) for name, one in model.named_modules()}
    title = f"{type(module).__name__} ({entry.name}{f', at `{path}`' if path else ''})"
    return AttachedMaps(title, module, found, tapped, kind, check_grid(grid), names)


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
    return _plain(path), module, entry


def _unknown(model: nn.Module, entries: tuple[Host, ...]) -> str:
    looked = "\n".join(f"    {one.name}: {', '.join(one.marks)}" for one in entries)
    near = [(lacks(module, one), name, one) for name, module in model.named_modules() for one in entries]
    missing, name, closest = min(near, key=lambda one: len(one[0]) / len(one[2].marks))
    hint = ""
    if len(missing) < len(closest.marks):
        hint = f"\nClosest is {closest.name}, but {f'`{name}`' if name else 'the model'} lacks {', '.join(missing)}."
    return (
        f"`model` must be or contain a known host; got {type(model).__name__}, and no module in it has the attributes "
        f"of one:\n{looked}{hint}\nTo attach to another, write where its maps are:\n\n{EXAMPLE}"
    )


def _plain(path: str) -> str:
    """Leave out what torch.compile puts into a path."""
    return ".".join(name for name in path.split(".") if name != "_orig_mod")


def _check_decoder(dec: Source, enc: Dots, found: Found) -> None:
    """Refuse a decoder map that cannot be right."""
    if not (isinstance(dec, (Dots, Output, LogitTap, OutputTap)) or callable(dec)):
        raise TypeError(f"`dec` must be a module, a tap or a function without arguments; got {type(dec).__name__}.")
    if any(_reads(dec, one) for one in (enc.slots, enc.patches)):
        raise ValueError("`dec` must be of the decoder; got a projection of the encoder's slot attention.")
    if any(_reads(dec, one) for block in found.shuffled for one in block.modules()):
        raise ValueError(
            "`dec` must have its patches in the encoder's order; got the decoder's cross-attention, which sees them "
            "shuffled in training. Leave `dec` out: the map that the host returns is put in order."
        )


def _reads(dec: Source, module: nn.Module) -> bool:
    if isinstance(dec, Output):
        return dec.module is module
    if isinstance(dec, Dots):
        return dec.slots is module or dec.patches is module
    return any(getattr(hook, "__self__", None) is dec for hook in module._forward_hooks.values())
