"""Where slot models of others keep their two maps: one table, an entry a family.

A host is recognized by its attributes, and none is imported. To add one, write an entry like those in `HOSTS` and hand
it over, ``attach(model, host=entry)``. `EXAMPLE` is the text of an entry.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import isfunction, unwrap
from typing import Any

import torch
from torch import Tensor, nn

from ssync_loss.adapters.logit_tap import HeadSoftmax
from ssync_loss.ssync.maps import Kind

__all__ = ["EXAMPLE", "HOSTS", "Dots", "Found", "Host", "Output", "Seen", "reach"]


@dataclass(frozen=True)
class Dots:
    """A map that is queries times keys: what `LogitTap` takes.

    Attributes:
        slots: the projection of slots; in a decoder often the one that the host calls key.
        patches: the projection of patches.
        scale: the factor of their product.
        covers: the module whose forward makes the maps of one whole clip.
        heads, head_softmax, frames_in_key: as `LogitTap` has them.

    Raises: nothing; fields are not checked.

    >>> Dots(nn.Linear(4, 4), nn.Linear(4, 4), scale=0.5, covers=nn.Identity()).heads
    1
    """

    slots: nn.Module
    patches: nn.Module
    scale: float
    covers: nn.Module
    heads: int = 1
    head_softmax: HeadSoftmax = "per_head"
    frames_in_key: bool = False


@dataclass(frozen=True)
class Output:
    """A map that a module gives, of the decoder: what `OutputTap` takes.

    Attributes:
        module: the module with the output.
        select: takes the map out of it, in an order that `SlotMaps.join` reads; None where it is all of it.
        kind: whether these are ``"logits"`` or ``"probs"``, probabilities over slots.
        covers: the module whose forward makes the maps of one whole clip, if it is not this one.

    Raises: nothing; fields are not checked.

    >>> Output(nn.Linear(4, 16)).kind
    'logits'
    """

    module: nn.Module
    select: Callable[[Any], Tensor] | None = None
    kind: Kind = "logits"
    covers: nn.Module | None = None


@dataclass(frozen=True)
class Seen:
    """A mask, a grid or probabilities that a module takes or gives.

    Attributes:
        module: the module; a call is a clip, or a frame.
        pick: takes its arguments, its keyword arguments and its output, and returns the tensor, or None without one.

    Raises: nothing; fields are not checked.

    >>> Seen(nn.ReLU(), pick=lambda args, kwargs, output: output > 0).pick((), {}, torch.tensor([0.0, 1.0])).tolist()
    [False, True]
    """

    module: nn.Module
    pick: Callable[[tuple[Any, ...], dict[str, Any], Any], Tensor | None]


@dataclass(frozen=True)
class Found:
    """The maps of one model.

    Attributes:
        enc: the encoder's map.
        dec: the decoder's, or the reason why there is none that could be right.
        valid: (B, T) bool, frames whose two maps belong together.
        slot_mask: (B, S) bool, slots that are present, in each frame or once.
        shuffled: modules whose patches do not stand in the order of the encoder's.
        grid: any tensor whose last two axes are those of the patches.
        pick_frames: takes both maps as they were tapped, and returns the encoder's frames that were decoded.
        decodes_again: whether a forward decodes a second time, slots that are not the encoder's.
        enc_probs, dec_probs: what the host itself makes of its maps, probabilities (B, T, S, ...) or frame by frame;
            the maps are compared with it once in training and once in evaluation.

    Raises: nothing; fields are not checked.

    >>> Found(Dots(nn.Linear(4, 4), nn.Linear(4, 4), 0.5, nn.Identity()), dec="it decodes no slots").dec
    'it decodes no slots'
    """

    enc: Dots
    dec: Dots | Output | str
    valid: Seen | None = None
    slot_mask: Seen | None = None
    shuffled: tuple[nn.Module, ...] = ()
    grid: Seen | None = None
    pick_frames: Callable[[Tensor, Tensor], Tensor] | None = None
    decodes_again: bool = False
    enc_probs: Seen | None = None
    dec_probs: Seen | None = None


@dataclass(frozen=True)
class Host:
    """An entry of the table: how to recognize a family of models, and where its maps are.

    Attributes:
        name: the family's name.
        marks: paths of attributes that every member has. Wrappers that keep a module as ``module`` or ``_orig_mod``
            are looked through.
        find: takes a model with these marks and says where its maps are.
        uses: names in the code of its ``forward``, where the marks fit other models, too.

    Raises: nothing; fields are not checked.

    >>> entry = next(host for host in HOSTS if host.name == "steve")
    >>> entry.marks
    ('steve_encoder.savi.project_q', 'steve_decoder.tf.blocks')
    """

    name: str
    marks: tuple[str, ...]
    find: Callable[[Any], Found]
    uses: tuple[str, ...] = ()


def reach(module: Any, path: str) -> Any:
    """Follow a path of attributes through wrappers that keep a module as ``module`` or ``_orig_mod``.

    Raises: AttributeError where it ends.

    >>> reach(nn.Sequential(nn.ModuleDict({"module": nn.Linear(2, 3)})), "0.out_features")
    3
    """
    for name in path.split("."):
        while not hasattr(module, name):
            module = uncompiled(module.module)
        module = uncompiled(getattr(module, name))
    return module


def uncompiled(module: Any) -> Any:
    """Return the module that ``torch.compile`` wrapped, or the module itself."""
    return module._modules.get("_orig_mod", module) if isinstance(module, nn.Module) else module


def inner(module: Any) -> Any:
    """Return what wrappers keep as ``module``, or the module itself."""
    while isinstance(getattr(module, "module", None), nn.Module):
        module = uncompiled(module.module)
    return uncompiled(module)


def lacks(module: nn.Module, host: Host) -> list[str]:
    """Return the marks of a host that a module does not have, or only inside of a wrapper of its own."""
    missing = []
    for path in host.marks:
        try:
            getattr(module, path.partition(".")[0])
            reach(module, path)
        except AttributeError:
            missing.append(path)
    forwards = [unwrap(vars(one)["forward"]) for one in type(module).__mro__ if "forward" in vars(one)]
    used = {name for one in forwards if isfunction(one) for name in one.__code__.co_names}
    return missing + [f"{name} in its forward" for name in host.uses if name not in used]


def _shown(module: nn.Module, *path: str | int, slots_last: bool = False) -> Seen:
    """Find probabilities in what a module gives, if they are there."""

    def pick(_args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> Tensor | None:
        try:
            for key in path:
                output = output[key]
        except (KeyError, IndexError, TypeError):
            return None
        if isinstance(output, list):
            # of every iteration
            output = output[-1]
        if not isinstance(output, Tensor):
            return None
        return output.mT if slots_last else output

    return Seen(module, pick)


# SlotContrast, VideoSAUR, SSync, SRL, SlotCurri. Their steps call `self.forward`, which no hook sees, so what covers
# a clip are the parts: `processor` and `decoder` are called.


def _slotcontrast(model: Any) -> Found:
    processor, decoder = reach(model, "processor"), reach(model, "decoder")
    corrector = reach(processor, "corrector")
    enc = Dots(corrector.to_q, corrector.to_k, corrector.scale, processor)
    # a predictor's slots are decoded, too
    predicts = getattr(model, "dynamics_predictor", None) is not None
    return Found(
        enc,
        _alpha(decoder),
        pick_frames=_last_pass,
        decodes_again=predicts,
        enc_probs=_shown(processor, "corrector", "masks"),
        dec_probs=_shown(decoder, "masks"),
    )


def _alpha(decoder: Any) -> Dots | Output | str:
    within = inner(decoder)
    if hasattr(within, "to_q") and hasattr(within, "to_k"):
        # a slot mixer: patches ask, slots answer
        return Dots(within.to_k, within.to_q, within.scale, decoder)
    if hasattr(within, "mlp"):
        return Output(within.mlp, lambda out: out[..., -1])
    if hasattr(within, "output_transform"):
        return Output(within.output_transform, lambda out: out[:, -1])
    return (
        f"the decoder, a {type(within).__name__}, has neither `to_q` and `to_k` (a slot mixer), nor `mlp`, nor "
        "`output_transform` (spatial broadcast)"
    )


def _last_pass(enc: Tensor, dec: Tensor) -> Tensor:
    """SlotCurri validates on the way back: of 2T - 1 frames the last T were decoded, in reverse."""
    B, seen, S = enc.shape[:3]
    decoded = (seen + 1) // 2
    if seen == 2 * decoded - 1 > 1 and len(dec) in (B * decoded, B * decoded * S):
        return enc[:, -decoded:].flip(1)
    return enc


# RandSF.Q, SmoothSA, xSSC and others of the same author


def _genera1z(model: Any) -> Found:
    attention, decode = reach(model, "aggregat"), reach(model, "decode")
    if hasattr(attention, "vq"):
        raise ValueError(
            "`aggregat` must attend with all of its slots; got one with a codebook `vq`, as MetaSlot has: it masks "
            "duplicate slots after the dots, and may change its keys from one iteration to the next."
        )
    scale = attention.proj_q.out_features**-0.5
    layers = getattr(getattr(decode, "backbone", None), "layers", ())
    return Found(
        Dots(attention.proj_q, attention.proj_k, scale, model),
        Output(decode, lambda out: out[1], "probs"),
        valid=Seen(decode, _same_frame),
        slot_mask=Seen(attention, _smask),
        shuffled=tuple(layers),
        grid=Seen(model, _feature_grid),
        enc_probs=_shown(attention, 1),
    )


def _same_frame(_args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> Tensor | None:
    """Frames that were decoded from their own slots; xSSC decodes others from an earlier frame's."""
    source = output[2] if len(output) > 2 else None
    # others of the family give something else in this place
    if not isinstance(source, Tensor) or source.is_floating_point() or source.dim() != 2:
        return None
    maps: Tensor = output[1]
    if maps.shape[:2] != source.shape and len(maps) != source.numel():
        return None
    return source == torch.arange(source.shape[1], device=source.device)


def _feature_grid(_args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> Tensor | None:
    feature = output[0] if isinstance(output, (tuple, list)) else None
    if not isinstance(feature, Tensor) or feature.dim() not in (4, 5):
        return None
    # (B, [T,] C, H, W), of which only the shape is kept
    grid: Tensor = feature.new_empty(0, *feature.shape[-2:])
    return grid


def _smask(args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> Tensor | None:
    return kwargs.get("smask", args[2] if len(args) > 2 else None)


def _steve(model: Any) -> Found:
    savi, decoder = reach(model, "steve_encoder.savi"), reach(model, "steve_decoder.tf")
    cross = decoder.blocks[-1].encoder_decoder_attn
    return Found(
        Dots(savi.project_q, savi.project_k, savi.slot_size**-0.5, savi, frames_in_key=True),
        Dots(cross.proj_k, cross.proj_q, (cross.d_model // cross.num_heads) ** -0.5, decoder, heads=cross.num_heads),
        enc_probs=_shown(savi, 1, slots_last=True),
    )


def _oclf(model: Any) -> Found:
    grouping, decoder = reach(model, "perceptual_grouping"), reach(model, "object_decoder")
    attention = reach(grouping, "slot_attention")
    dec: Output | str = Output(decoder, _masks, "probs")
    if not getattr(inner(decoder), "use_decoder_masks", True):
        dec = "with use_decoder_masks=False the masks that the decoder gives are the encoder's map"
    heads = attention.n_heads
    return Found(
        Dots(attention.to_q, attention.to_k, attention.scale, grouping, heads=heads, head_softmax="joint"),
        dec,
        slot_mask=Seen(inner(grouping), _not_empty),
        enc_probs=_shown(attention, 1),
    )


def _masks(output: Any) -> Tensor:
    if not hasattr(output, "masks"):
        raise TypeError(f"`object_decoder` gives a {type(output).__name__} without masks: attach() with `dec`.")
    # amodal masks compete over no slots, their visible parts do
    taken: Tensor = getattr(output, "masks_vis", output.masks)
    return taken


def _not_empty(_args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> Tensor | None:
    is_empty = getattr(output, "is_empty", None)
    return None if is_empty is None else ~is_empty.bool()


def _spot(model: Any) -> Found:
    encoder = reach(model, "slot_attn")
    attention = reach(encoder, "slot_attention")
    heads = attention.num_heads
    scale = (attention.slot_size // heads) ** -0.5
    return Found(
        Dots(attention.project_q, attention.project_k, scale, encoder, heads=heads, head_softmax="joint"),
        Output(model, lambda out: out[2], "probs"),
        shuffled=tuple(getattr(reach(model, "dec"), "blocks", ())),
        enc_probs=_shown(encoder, 1, slots_last=True),
    )


def _lucidrains(model: Any) -> Found:
    split = getattr(model, "split_heads", None)
    heads = 1 if split is None else split.axes_lengths["h"]
    return Found(
        Dots(model.to_q, model.to_k, model.scale, model, heads=heads),
        "the decoder is your own: give its alpha logits, `dec=` a module, a tap or a function that returns them",
    )


def _metaslot(_model: Any) -> Found:
    raise ValueError(
        "`model` must keep its slots in order; got what looks like a MetaSlotAttention, which merges and "
        "reorders them after the attention, so that slot s of the encoder's map is not slot s of the decoder's."
    )


HOSTS: tuple[Host, ...] = (
    Host("slotcontrast", ("processor.corrector.to_q", "processor.corrector.to_k", "decoder"), _slotcontrast),
    Host("genera1z", ("aggregat.proj_q", "aggregat.proj_k", "decode"), _genera1z),
    Host("steve", ("steve_encoder.savi.project_q", "steve_decoder.tf.blocks"), _steve),
    Host("oclf", ("perceptual_grouping.slot_attention.to_q", "object_decoder"), _oclf),
    Host("spot", ("slot_attn.slot_attention.project_q", "forward_decoder", "dec"), _spot),
    Host("metaslot", ("slot_attention.to_q", "vq"), _metaslot, uses=("vq", "tril", "argsort")),
    Host("lucidrains", ("to_q", "to_k", "scale", "slots_mu"), _lucidrains),
)

EXAMPLE = """\
from ssync_loss.adapters.hosts import Dots, Found, Host, Output

def find(model):
    attention, decoder = model.slot_attention, model.decoder
    return Found(
        # projections of slots and of patches, the scale, and the module whose call is one whole clip
        enc=Dots(attention.to_q, attention.to_k, attention.scale, covers=model.encoder),
        # the module with the alpha logits, and how to take them out; kind="probs" for probabilities
        dec=Output(decoder.mlp, lambda out: out[..., -1]),
    )

maps = attach(model, host=Host("mine", ("slot_attention.to_q", "decoder.mlp"), find))"""
