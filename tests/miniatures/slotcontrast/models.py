"""A miniature of the SlotContrast family's models (SlotContrast, VideoSAUR, SSync, SRL, SlotCurri).

It keeps these quirks. A video model wraps its processor and decoder, an image model does not. The first frame has 3
iterations, other frames have 2. The steps call ``self.forward(batch)``, so hooks on the model never fire. Maps are
probabilities. SlotCurri's validation scans forward and back (2T - 1 frames, of which T are decoded), and the number of
its slots grows. With a ``dynamics_predictor`` the decoder runs again in the same forward pass, on predicted slots.
"""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from miniatures.slotcontrast import losses


class FixedLearnedInit(nn.Module):
    """Returns the first ``n_slots`` of the learned slots. SlotCurri raises this number in training."""

    def __init__(self, max_slots: int, dim: int) -> None:
        super().__init__()
        self.n_slots = max_slots
        self.slots = nn.Parameter(torch.randn(1, max_slots, dim))

    def forward(self, batch_size: int) -> Tensor:
        return self.slots[:, : self.n_slots].expand(batch_size, -1, -1)


class FrameEncoder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.output_transform = nn.Linear(dim, dim)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens = rearrange(images, "b c h w -> b (h w) c")
        return {"features": self.output_transform(tokens), "backbone_features": tokens}


class SlotAttention(nn.Module):
    def __init__(self, dim: int, n_iters: int) -> None:
        super().__init__()
        self.to_k, self.to_v, self.to_q = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(dim, dim)
        self.norm_features, self.norm_slots = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.n_iters, self.scale = n_iters, dim**-0.5

    def step(self, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        dots = torch.einsum("bsd,bfd->bsf", self.to_q(self.norm_slots(slots)), keys) * self.scale
        attention = dots.softmax(1)
        updates = attention / (attention.sum(-1, keepdim=True) + 1e-8) @ values
        return self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).unflatten(0, slots.shape[:2]), attention

    def forward(self, slots: Tensor, features: Tensor, n_iters: int | None = None) -> dict[str, Tensor]:
        features = self.norm_features(features)
        keys, values = self.to_k(features), self.to_v(features)
        for _ in range(n_iters or self.n_iters):
            slots, masks = self.step(slots, keys, values)
        return {"slots": slots, "masks": masks}


class LatentProcessor(nn.Module):
    def __init__(self, corrector: nn.Module, predictor: nn.Module | None, first: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.corrector, self.predictor = corrector, predictor
        self.first_step_corrector_args = first or {}

    def forward(self, state: Tensor, inputs: Tensor, time_step: int | None = None) -> dict[str, Any]:
        out = self.corrector(state, inputs, **(self.first_step_corrector_args if time_step == 0 else {}))
        state = out["slots"]
        predicted = state if self.predictor is None else self.predictor(state)
        return {"state": state, "state_predicted": predicted, "corrector": out}


class ScanOverTime(nn.Module):
    """Runs frame by frame. SlotCurri's ``cycle`` then runs back to the first frame, and returns this second pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, initial_state: Tensor, inputs: Tensor, cycle: bool = False) -> dict[str, Any]:
        state, outputs, last = initial_state, [], inputs.shape[1] - 1
        for t in range(last + 1):
            outputs.append(self.module(state, inputs[:, t], t))
            state = outputs[-1]["state_predicted"]
        if cycle:
            for t in reversed(range(last)):
                outputs.append(self.module(state, inputs[:, t]))
                state = outputs[-1]["state_predicted"]
            outputs = outputs[last:][::-1]
        return merge_dict_trees(outputs)


def merge_dict_trees(trees: list[dict[str, Any]]) -> dict[str, Any]:
    def merge(values: list[Any]) -> Any:
        return torch.stack(values, 1) if isinstance(values[0], Tensor) else merge_dict_trees(values)

    return {key: merge([tree[key] for tree in trees]) for key in trees[0]}


class MapOverTime(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        outputs = self.module(clips.flatten(0, 1))
        return {key: value.unflatten(0, clips.shape[:2]) for key, value in outputs.items()}


class MLPDecoder(nn.Module):
    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.outp_dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim + 1))
        self.pos_emb = nn.Parameter(torch.randn(1, 1, grid[0] * grid[1], dim))

    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        recons, alpha = self.mlp(slots[:, :, None] + self.pos_emb).split((self.outp_dim, 1), -1)
        masks = alpha.softmax(1)
        return {"reconstruction": (recons * masks).sum(1), "masks": masks.squeeze(-1)}


class SlotMixerDecoder(nn.Module):
    """Patches are queries and slots are keys: ``to_q`` projects patches, ``to_k`` slots."""

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.allocator, self.renderer = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.to_q, self.to_k = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.scale = dim**-0.5
        self.pos_emb = nn.Parameter(torch.randn(1, grid[0] * grid[1], dim))

    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        patches = self.allocator(self.pos_emb.expand(len(slots), -1, -1))
        dots = torch.einsum("bpd,bsd->bps", self.to_q(patches), self.to_k(slots)) * self.scale
        attention = dots.softmax(-1)
        return {"reconstruction": self.renderer(attention @ slots), "masks": attention.mT}


class SpatialBroadcastDecoder(nn.Module):
    """The batch axis contains the slots, and the masks have a grid."""

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.outp_dim, self.initial_size = dim, grid
        self.pos_embed = nn.Parameter(torch.randn(1, dim, *grid))
        self.backbone = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU())
        self.output_transform = nn.Conv2d(dim, dim + 1, 1)

    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        h, w = self.initial_size
        spread = repeat(slots, "b s d -> (b s) d h w", h=h, w=w) + self.pos_embed
        outputs = self.output_transform(self.backbone(spread)).unflatten(0, slots.shape[:2])
        recons, alpha = outputs.split((self.outp_dim, 1), 2)
        masks = alpha.softmax(1)
        return {"reconstruction": (recons * masks).sum(1), "masks": masks.squeeze(2)}


DECODERS = {one.__name__: one for one in (MLPDecoder, SlotMixerDecoder, SpatialBroadcastDecoder)}


class ObjectCentricModel(nn.Module):
    """The host's class is a LightningModule, so ``global_step`` counts optimizer steps."""

    global_step = 0

    def __init__(
        self,
        initializer: nn.Module,
        encoder: nn.Module,
        processor: nn.Module,
        decoder: nn.Module,
        loss_fns: dict[str, nn.Module],
        loss_weights: Mapping[str, float],
        *,
        input_type: str,
        cycle: bool = False,
        dynamics_predictor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.initializer, self.encoder, self.processor, self.decoder = initializer, encoder, processor, decoder
        assert loss_weights.keys() == loss_fns.keys(), f"{loss_weights.keys()} != {loss_fns.keys()}"
        self.loss_fns, self.loss_weights = nn.ModuleDict(loss_fns), loss_weights
        self.input_key, self.cycle = input_type, cycle
        self.dynamics_predictor = dynamics_predictor

    def forward(self, inputs: dict[str, Tensor], cycle: bool = False) -> dict[str, Any]:
        encoded = self.encoder(inputs[self.input_key])
        initial = self.initializer(len(encoded["features"]))
        processed = self.processor(initial, encoded["features"], **({"cycle": True} if cycle else {}))
        outputs = {"encoder": encoded, "processor": processed, "decoder": self.decoder(processed["state"])}
        if self.dynamics_predictor is not None:
            predicted = self.decoder(self.dynamics_predictor(processed["state"])[:, :-1])
            outputs["decoder"] |= {f"predicted_{key}": value for key, value in predicted.items()}
        outputs["targets"] = {name: loss.get_target(inputs, outputs) for name, loss in self._losses()}
        return outputs

    def compute_loss(self, outputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        each = {name: loss(loss.get_prediction(outputs), outputs["targets"][name]) for name, loss in self._losses()}
        return torch.stack([one * self.loss_weights[name] for name, one in each.items()]).sum(), each

    def _losses(self) -> list[tuple[str, Any]]:
        return list(self.loss_fns.items())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        return self.compute_loss(self.forward(batch))[0]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        return self.compute_loss(self.forward(batch, self.cycle))[0]


def build(config: Mapping[str, Any]) -> ObjectCentricModel:
    """Build the model of a configuration."""
    dim, grid = config.get("dim", 8), config.get("grid", (4, 4))
    is_video = config["input_type"] == "video"
    encoder: nn.Module = FrameEncoder(dim)
    decoder: nn.Module = DECODERS[config["decoder"]](dim, grid)
    if is_video:
        encoder, decoder = MapOverTime(encoder), MapOverTime(decoder)
        corrector = SlotAttention(dim, n_iters=2)
        processor: nn.Module = ScanOverTime(LatentProcessor(corrector, nn.Linear(dim, dim), first={"n_iters": 3}))
    else:
        processor = LatentProcessor(SlotAttention(dim, n_iters=3), None)
    defaults = {
        "pred_key": "decoder.reconstruction",
        "target_key": "encoder.backbone_features",
        "video_inputs": is_video,
        "patch_inputs": config["decoder"] != "SpatialBroadcastDecoder",
    }
    fns = {name: losses.build({**defaults, **one}) for name, one in config["losses"].items()}
    initializer = FixedLearnedInit(config.get("n_slots", 4), dim)
    settings: dict[str, Any] = {"input_type": config["input_type"], "cycle": config.get("cycle", False)}
    if config.get("predicts"):
        settings["dynamics_predictor"] = nn.Linear(dim, dim)
    return ObjectCentricModel(initializer, encoder, processor, decoder, fns, config["loss_weights"], **settings)
