"""A miniature of the object-centric learning framework (OCLF), which DINOSAUR, AdaSlot and CTRL-O build on.

It keeps these quirks. Parts find their inputs by paths in one tree of outputs. The encoder map is the mean over heads
of a joint softmax, so it sums to 1 / heads. The slot mask is True where a slot is **masked**. An image model returns
(B, S, N). An autoregressive decoder without ``use_decoder_masks`` returns the encoder map as its own. ``routed`` wraps
a class of any package, and ``<argument>_path`` is the path of an argument of its ``forward``.
"""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class PerceptualGroupingOutput:
    objects: Tensor
    is_empty: Tensor | None
    feature_attributions: Tensor


@dataclass
class PatchReconstructionOutput:
    reconstruction: Tensor
    masks: Tensor
    target: Tensor


class SlotAttention(nn.Module):
    def __init__(self, dim: int, n_heads: int, iters: int = 3) -> None:
        super().__init__()
        self.dim, self.n_heads, self.iters = dim, n_heads, iters
        self.scale = (dim // n_heads) ** -0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(dim, dim)
        self.norm_input, self.norm_slots = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, inputs: Tensor, slots: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inputs = self.norm_input(inputs)
        k, v = (one(inputs).unflatten(-1, (self.n_heads, -1)) for one in (self.to_k, self.to_v))
        for _ in range(self.iters):
            q = self.to_q(self.norm_slots(slots)).unflatten(-1, (self.n_heads, -1))
            dots = torch.einsum("bihd,bjhd->bihj", q, k) * self.scale
            if masks is not None:
                dots = dots.masked_fill(masks[:, :, None, None], -torch.inf)
            attn = dots.flatten(1, 2).softmax(1).view_as(dots)
            weights = attn + 1e-8
            updates = torch.einsum("bjhd,bihj->bihd", v, weights / weights.sum(-1, keepdim=True))
            slots = self.gru(updates.flatten(2).flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return slots, attn.mean(2)


class SlotAttentionGrouping(nn.Module):
    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.slot_attention = SlotAttention(dim, n_heads)

    def forward(
        self, feature: Tensor, conditioning: Tensor, slot_mask: Tensor | None = None
    ) -> PerceptualGroupingOutput:
        slots, attn = self.slot_attention(feature, conditioning, slot_mask)
        return PerceptualGroupingOutput(slots, slot_mask, attn)


class Recurrent(nn.Module):
    """A part that runs frame by frame. The slots of a frame are the conditioning of the next frame."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: dict[str, Any]) -> PerceptualGroupingOutput:
        given, frames = inputs["input"], []
        conditioning = given["conditioning"]
        for frame in given["features"].unbind(1):
            now = {**given, "features": frame, "conditioning": conditioning}
            frames.append(self.module(inputs={**inputs, "input": now}))
            conditioning = frames[-1].objects
        stacked: dict[str, Any] = {}
        for one in fields(frames[0]):
            values = [getattr(frame, one.name) for frame in frames]
            stacked[one.name] = None if values[0] is None else torch.stack(values, 1)
        return PerceptualGroupingOutput(**stacked)


class PatchDecoder(nn.Module):
    def __init__(self, dim: int, num_patches: int) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim + 1))
        self.pos_embed = nn.Parameter(torch.randn(1, num_patches, dim))

    def forward(self, object_features: Tensor, target: Tensor) -> PatchReconstructionOutput:
        output = self.decoder(object_features.unsqueeze(-2) + self.pos_embed)
        alpha = output[..., -1:].softmax(-3)
        return PatchReconstructionOutput((output[..., :-1] * alpha).sum(-3), alpha.squeeze(-1), target)


class AutoregressivePatchDecoder(nn.Module):
    """Its masks keep the frames in the batch axis."""

    def __init__(self, dim: int, num_patches: int, *, use_decoder_masks: bool) -> None:
        super().__init__()
        self.use_decoder_masks = use_decoder_masks
        self.decoder = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.pos_embed = nn.Parameter(torch.randn(num_patches, dim))

    def forward(self, object_features: Tensor, masks: Tensor, target: Tensor) -> PatchReconstructionOutput:
        slots, seen = object_features.flatten(0, -3), (target.roll(1, -2) + self.pos_embed).flatten(0, -3)
        decoded, attention = self.decoder(seen, slots, slots)
        if self.use_decoder_masks:
            masks = attention.mT
        return PatchReconstructionOutput(decoded.view_as(target), masks, target)


class ReconstructionLoss(nn.Module):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002
        return F.mse_loss(input, target.detach())


def get_tree_element(tree: Any, path: str) -> Any:
    """Follow a path such as ``"object_decoder.masks"`` through mappings and attributes."""
    for name in path.split("."):
        if isinstance(tree, Mapping) and name in tree:
            tree = tree[name]
        elif hasattr(tree, name):
            tree = getattr(tree, name)
        else:
            raise ValueError(f"Trying to access path {path}, but there is no {name} in {type(tree)}")
    return tree


class Routed:
    """First base of a routed class. It removes ``<argument>_path``, and finds these arguments in ``inputs``."""

    def __init__(self, **given: Any) -> None:
        paths = {key: given.pop(key) for key in list(given) if key.endswith("_path")}
        super().__init__(**given)
        self.input_mapping = {key.removesuffix("_path"): path for key, path in paths.items()}

    def forward(self, *, inputs: Any) -> Any:
        run: Any = super()
        parameters = inspect.signature(run.forward).parameters
        found = {}
        for name, path in self.input_mapping.items():
            try:
                found[name] = get_tree_element(inputs, path)
            except ValueError:
                if parameters[name].default is inspect.Parameter.empty:
                    raise
        return run.forward(**found)


def instantiate(config: Mapping[str, Any]) -> Any:
    """Build ``_target_`` and the targets in its arguments. The prefix ``routed.`` makes a class routed."""
    module, _, name = config["_target_"].removeprefix("routed.").rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    if config["_target_"].startswith("routed."):
        cls = type(f"Routed{name}", (Routed, cls), {})
    rest = {key: value for key, value in config.items() if key != "_target_"}
    return cls(
        **{
            key: instantiate(value) if isinstance(value, Mapping) and "_target_" in value else value
            for key, value in rest.items()
        }
    )


class Combined(nn.ModuleDict):
    """Parts in order. Each part finds its inputs in the outputs of earlier parts."""

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        for name, module in self.items():
            inputs[name] = module(inputs=inputs)
        return inputs


class CombinedModel(nn.Module):
    """The host's class is a LightningModule, so it has a ``trainer`` with a ``global_step``."""

    def __init__(self, models: dict[str, Any], losses: dict[str, Any], trainer: Any = None) -> None:
        super().__init__()
        self.models = Combined({name: instantiate(one) for name, one in models.items()})
        self.losses = nn.ModuleDict({name: instantiate(one) for name, one in losses.items()})
        self.trainer = trainer

    def forward(self, input_data: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = self.models(inputs={"input": input_data, "model": self})
        return made

    def training_step(self, batch: dict[str, Any], batch_idx: int = 0) -> Tensor:
        outputs = self(batch)
        outs = [loss(inputs=outputs) for loss in self.losses.values()]
        return torch.stack([out[0] if isinstance(out, tuple) else out for out in outs]).sum()


RECONSTRUCTION = {
    "_target_": "routed.miniatures.oclf.ReconstructionLoss",
    "input_path": "object_decoder.reconstruction",
    "target_path": "object_decoder.target",
}


def build(
    *,
    video: bool,
    n_heads: int = 1,
    decoder: Mapping[str, Any] | None = None,
    losses: Mapping[str, Any] | None = None,
    dim: int = 8,
    num_patches: int = 16,
    trainer: Any = None,
) -> CombinedModel:
    """Build a model from a configuration. ``decoder`` updates the decoder's part."""
    grouping: dict[str, Any] = {
        "_target_": "routed.miniatures.oclf.SlotAttentionGrouping",
        "dim": dim,
        "n_heads": n_heads,
        "feature_path": "input.features",
        "conditioning_path": "input.conditioning",
        "slot_mask_path": "input.slot_mask",
    }
    if video:
        grouping = {"_target_": "miniatures.oclf.Recurrent", "module": grouping}
    decoding = {
        "_target_": "routed.miniatures.oclf.PatchDecoder",
        "dim": dim,
        "num_patches": num_patches,
        "object_features_path": "perceptual_grouping.objects",
        "target_path": "input.features",
    }
    models = {"perceptual_grouping": grouping, "object_decoder": {**decoding, **(decoder or {})}}
    return CombinedModel(models, {"mse": RECONSTRUCTION, **(losses or {})}, trainer)


AUTOREGRESSIVE = {
    "_target_": "routed.miniatures.oclf.AutoregressivePatchDecoder",
    "masks_path": "perceptual_grouping.feature_attributions",
    "use_decoder_masks": True,
}
