"""A miniature of RandSF.Q, SmoothSA and xSSC: ``wrapper.m``, a decoder that returns a tuple, configured metrics.

It keeps these quirks. The first frame has 3 iterations, other frames have 1. The slot mask (True: the slot exists)
applies to the dots after the projections. Maps are probabilities (B, T, S, H, W). xSSC's decoder drops a time token
from its cross-attention, so the sum over slots is below one. In training it decodes a frame from an earlier one,
``fsti``.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn


class SlotAttention(nn.Module):
    def __init__(self, num_iter: int, embed_dim: int) -> None:
        super().__init__()
        self.num_iter = num_iter
        self.norm1q, self.norm1kv = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.proj_q, self.proj_k, self.proj_v = (nn.Linear(embed_dim, embed_dim, bias=False) for _ in range(3))
        self.rnn = nn.GRUCell(embed_dim, embed_dim)

    def forward(
        self, tokens: Tensor, query: Tensor, smask: Tensor | None = None, num_iter: int | None = None
    ) -> tuple[Tensor, Tensor]:
        kv = self.norm1kv(tokens)
        k, v = self.proj_k(kv), self.proj_v(kv)
        for _ in range(num_iter or self.num_iter):
            q = self.proj_q(self.norm1q(query))
            logit = torch.einsum("bqc,bkc->bqk", q * q.size(2) ** -0.5, k)
            if smask is not None:
                logit = logit.where(smask[:, :, None], -torch.inf)
            a0 = logit.softmax(1)
            update = a0 / (a0.sum(2, keepdim=True) + 1e-5) @ v
            query = self.rnn(update.flatten(0, 1), query.flatten(0, 1)).view_as(query)
        return query, a0


class BroadcastMLPDecoder(nn.Module):
    """The last channel of ``backbone`` is alpha. The batch axis contains the slots."""

    def __init__(self, dim: int, num_patches: int) -> None:
        super().__init__()
        self.posit_embed = nn.Parameter(torch.randn(num_patches, dim))
        self.backbone = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim + 1))

    def forward(self, clue: Tensor, slotz: Tensor, smask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mixture = self.backbone(repeat(slotz, "b n c -> (b n) 1 c") + self.posit_embed)
        mixture = rearrange(mixture, "(b n) m c -> b n m c", b=len(slotz))
        alpha = mixture[..., -1]
        if smask is not None:
            alpha = alpha.where(smask[:, :, None], -torch.inf)
        attent = alpha.softmax(1)
        return (mixture[..., :-1] * attent[..., None]).sum(1), attent


class ARTransformerDecoder(nn.Module):
    """Shuffled patches attend to the slots. The returned attention is unshuffled and averaged over heads."""

    def __init__(self, dim: int, num_patches: int) -> None:
        super().__init__()
        self.posit_embed = nn.Parameter(torch.randn(1, num_patches, dim))
        self.backbone = nn.MultiheadAttention(dim, 2, batch_first=True)

    def forward(self, clue: Tensor, slotz: Tensor, smask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        order = torch.rand(clue.shape[:2]).argsort(1)[..., None] if self.training else None
        query = clue + self.posit_embed
        query = query if order is None else query.take_along_dim(order, 1)
        recon, attent = self.backbone(query, slotz, slotz, key_padding_mask=None if smask is None else ~smask)
        if order is not None:
            back = order.argsort(1)
            recon, attent = recon.take_along_dim(back, 1), attent.take_along_dim(back, 1)
        return recon, attent.mT


class MarkovDecoder(nn.Module):
    """xSSC's decoder. A time token precedes the slots, and the attention drops it without renormalization."""

    def __init__(self, dim: int, num_patches: int) -> None:
        super().__init__()
        self.posit_embed = nn.Parameter(torch.randn(1, num_patches, dim))
        self.te = nn.Embedding(2, dim)
        self.backbone = nn.MultiheadAttention(dim, 2, batch_first=True)

    def forward(self, clue: Tensor, slotz: Tensor, smask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        b, t = clue.shape[:2]
        now = torch.arange(t).expand(b, -1)
        fsti = (now - torch.randint(0, 2, (b, t))).clamp_min(0) if self.training else now
        query = clue.take_along_dim(fsti[..., None, None], 1).flatten(0, 1) + self.posit_embed
        memory = torch.cat([self.te(now - fsti)[:, :, None], slotz], 2).flatten(0, 1)
        recon, attent = self.backbone(query, memory, memory)
        return recon.unflatten(0, (b, t)), attent[..., 1:].mT.unflatten(0, (b, t)), fsti


class RandSFQ(nn.Module):
    """RandSF.Q and SmoothSA use the first two decoders, xSSC the last one."""

    def __init__(self, decode: nn.Module, dim: int, num_slots: int) -> None:
        super().__init__()
        self.encode_project = nn.Linear(dim, dim)
        self.initializ = nn.Parameter(torch.randn(1, num_slots, dim))
        self.aggregat = SlotAttention(3, dim)
        self.transit = nn.Linear(dim, dim)
        self.decode = decode

    def forward(self, input: Tensor, smask: Tensor | None = None) -> tuple[Tensor, ...]:  # noqa: A002
        b, t, _, h, _ = input.shape
        clue = rearrange(input, "b t c h w -> b t (h w) c").detach()
        encode = self.encode_project(clue)
        query, slotz, attenta = self.initializ.expand(b, -1, -1), [], []
        for i in range(t):
            slots, attent = self.aggregat(encode[:, i], query, smask, num_iter=1 if i else None)
            slotz.append(slots)
            attenta.append(attent)
            query = self.transit(slots)
        slots, feature = torch.stack(slotz, 1), input
        if isinstance(self.decode, MarkovDecoder):
            recon, attentd, fsti = self.decode(clue, slots)
            feature = feature.take_along_dim(fsti[:, :, None, None, None], 1)
        else:
            every = None if smask is None else smask.repeat_interleave(t, 0)
            recon, attentd = (
                one.unflatten(0, (b, t)) for one in self.decode(clue.flatten(0, 1), slots.flatten(0, 1), every)
            )
        recon = rearrange(recon, "b t (h w) c -> b t c h w", h=h)
        enc, dec = (rearrange(one, "b t s (h w) -> b t s h w", h=h) for one in (torch.stack(attenta, 1), attentd))
        return feature, slots, enc, recon, dec


class ModelWrap(nn.Module):
    """The model that the training script calls. It selects the inputs and names the outputs."""

    def __init__(self, m: nn.Module, imap: Mapping[str, str], omap: list[str]) -> None:
        super().__init__()
        self.m, self.imap, self.omap = m, imap, omap

    def forward(self, **pack: Any) -> dict[str, Tensor]:
        output = self.m(**{name: getitem(pack, path) for name, path in self.imap.items()})
        return dict(zip(self.omap, output, strict=True))


def build(decoder: type[nn.Module], *, dim: int = 8, num_patches: int = 12, num_slots: int = 4) -> ModelWrap:
    m = RandSFQ(decoder(dim, num_patches), dim, num_slots)
    imap = {"input": "batch.video", "smask": "batch.smask"}
    return ModelWrap(m, imap, ["feature", "slotz", "attenta", "recon", "attentd"])


def getitem(tree: Any, path: str) -> Any:
    """Follow a path such as ``"output.attenta"``. A missing entry is None, as in the host."""
    for name in path.split("."):
        tree = tree.get(name)
    return tree


def build_from_config(config: Any) -> Any:
    """Build every dictionary that has a ``type``, after its values."""
    if isinstance(config, (list, tuple)):
        return [build_from_config(one) for one in config]
    if not isinstance(config, dict):
        return config
    built = {key: build_from_config(value) for key, value in config.items() if key != "type"}
    return config["type"](**built) if "type" in config else built


class _Metric(nn.Module):
    """Returns (loss (b,), valid (b,)). The host's own losses are means, so b is 1."""


# the host's package exports metrics and callbacks, but the base class only in a module
metric = SimpleNamespace(Metric=_Metric)


class MSELoss(_Metric):
    def forward(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:  # noqa: A002
        loss = F.mse_loss(input, target)[None]
        return loss, torch.ones(1, dtype=torch.bool)


class Callback:
    """The host calls it around epochs and after each forward pass, with all of its state."""

    def before_epoch(self, **pack: Any) -> None: ...
    def after_forward(self, **pack: Any) -> None: ...
    def after_epoch(self, **pack: Any) -> None: ...


class MetricWrap(nn.Module):
    def __init__(self, **metrics: dict[str, Any]) -> None:
        super().__init__()
        self.metrics = metrics

    def forward(self, **pack: Any) -> dict[str, tuple[Tensor, Tensor]]:
        losses = {}
        for name, one in self.metrics.items():
            given = {arg: getitem(pack, path) for arg, path in one["map"].items()}
            transform: Callable[..., dict[str, Any]] | None = one.get("transform")
            assert isinstance(one["metric"], _Metric)
            loss, valid = one["metric"](**(given if transform is None else transform(**given)))
            losses[name] = loss * one.get("weight", 1.0), valid
        return losses


def run_epoch(pack: dict[str, Any], batches: list[dict[str, Any]], *, isval: bool = False) -> list[dict[str, float]]:
    """Train or validate for an epoch under autocast and with a scaler, like the training script."""
    pack["model"].train(not isval)
    for one in pack["callbacks"]:
        one.before_epoch(**pack)
    said = []
    for batch in batches:
        pack["batch"] = batch
        with torch.inference_mode(isval), torch.autocast("cpu", torch.bfloat16):
            pack["output"] = pack["model"](**pack)
            for one in pack["callbacks"]:
                one.after_forward(**pack)
            losses = pack["loss_fn"](**pack)
            total = sum(loss[valid].mean() for loss, valid in losses.values())
        said.append({name: loss.mean().item() for name, (loss, _) in losses.items()})
        if isinstance(total, Tensor) and not isval:
            pack["optimiz"].zero_grad()
            pack["gscale"].scale(total).backward()
            pack["gscale"].step(pack["optimiz"])
            pack["gscale"].update()
            pack["step_count"] += 1
    for one in pack["callbacks"]:
        one.after_epoch(**pack)
    return said
