"""Small models with the attributes, call structure and quirks of published hosts.

``MINIATURES`` has one entry per kind of host. An entry builds the model and a batch, and runs a training forward pass
that returns the host's loss and its two maps: probabilities (B, T, S, N) without gradient, to compare with a tap's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from miniatures import genera1z, lucidrains, oclf, spot, steve
from miniatures.slotcontrast import models as slotcontrast

Maps = tuple[Tensor, Tensor]


class Miniature(NamedTuple):
    """A kind of host.

    Attributes:
        build: builds the model.
        batch: ``batch(B, T)``; an image model takes only T = 1.
        step: ``step(model, batch)`` runs the forward pass of the host's training (or validation, in ``eval()``), and
            returns the host's loss and its maps.
        is_video: whether the model takes clips.
        grids: (H, W) of the encoder map and of the decoder map.
        decoder_is_linked: whether `attach` finds the decoder map without the user's help.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Any]
    step: Callable[[nn.Module, Any], tuple[Tensor, Maps]]
    is_video: bool = True
    grids: tuple[tuple[int, int], tuple[int, int]] = ((4, 4), (4, 4))
    decoder_is_linked: bool = True


def _slotcontrast(input_type: str, decoder: str, **settings: Any) -> Miniature:
    config = {
        "input_type": input_type,
        "decoder": decoder,
        "losses": {"loss_featrec": {"name": "MSELoss"}},
        "loss_weights": {"loss_featrec": 1.0},
        **settings,
    }
    is_video = input_type == "video"

    def step(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Maps]:
        # the host's steps call forward, not the model
        outputs = model.forward(batch, cycle=model.cycle and not model.training)
        maps = outputs["processor"]["corrector"]["masks"], outputs["decoder"]["masks"]
        return model.compute_loss(outputs)[0], _clips(*maps, has_time=is_video)

    def batch(B: int, T: int) -> dict[str, Tensor]:
        return {input_type: torch.randn(B, T, 8, 4, 4) if is_video else torch.randn(B, 8, 4, 4)}

    return Miniature(lambda: slotcontrast.build(config), batch, step, is_video)


def _genera1z(decoder: type[nn.Module], *, masked: bool = False) -> Miniature:
    def batch(B: int, T: int) -> dict[str, Any]:
        smask = torch.ones(B, 4, dtype=torch.bool)
        smask[:, -1] = False
        return {"batch": {"video": torch.randn(B, T, 8, 3, 4), "smask": smask if masked else None}}

    def step(model: nn.Module, pack: dict[str, Any]) -> tuple[Tensor, Maps]:
        output = model(**pack)
        loss = (output["recon"] - output["feature"].detach()).square().mean()
        return loss, _clips(output["attenta"], output["attentd"])

    return Miniature(lambda: genera1z.build(decoder), batch, step, grids=((3, 4), (3, 4)))


def _steve() -> Miniature:
    def step(model: Any, video: Tensor) -> tuple[Tensor, Maps]:
        seen: list[Tensor] = []
        attention = model.steve_decoder.tf.blocks[-1].encoder_decoder_attn.attn_dropout
        encoder = model.steve_encoder.savi
        handles = [
            attention.register_forward_pre_hook(lambda _module, given: seen.append(given[0])),
            encoder.register_forward_hook(lambda _module, _given, made: seen.append(made[1])),
        ]
        loss, _ = model(video)
        for handle in handles:
            handle.remove()
        enc, dec = seen
        return loss, (enc.detach().mT, rearrange(dec.detach().mean(1), "(b t) n s -> b t s n", b=len(video)))

    return Miniature(steve.STEVE, lambda B, T: torch.randn(B, T, 3, 16, 16), step, grids=((8, 8), (4, 4)))


def _oclf(*, video: bool, masked: bool = False, **settings: Any) -> Miniature:
    def batch(B: int, T: int) -> dict[str, Any]:
        slot_mask = torch.zeros(B, 4, dtype=torch.bool)
        slot_mask[:, -1] = True
        features = torch.randn(B, T, 16, 8) if video else torch.randn(B, 16, 8)
        return {
            "features": features,
            "conditioning": torch.randn(B, 4, 8),
            **({"slot_mask": slot_mask} if masked else {}),
        }

    def step(model: Any, data: dict[str, Any]) -> tuple[Tensor, Maps]:
        outputs = model(data)
        loss = model.losses["mse"](inputs=outputs)
        enc = outputs["perceptual_grouping"].feature_attributions * settings.get("n_heads", 1)
        return loss, _clips(enc, outputs["object_decoder"].masks.view_as(enc), has_time=video)

    return Miniature(lambda: oclf.build(video=video, **settings), batch, step, video)


def _lucidrains(build: Callable[[], nn.Module]) -> Miniature:
    def step(model: Any, images: Tensor) -> tuple[Tensor, Maps]:
        loss, alpha = model(images)
        inner = getattr(model.slot_attn, "slot_attn", model.slot_attn)
        return loss, _clips(inner.attention, alpha, has_time=False)

    return Miniature(
        lambda: lucidrains.UsersModel(build()),
        lambda B, _: torch.randn(B, 8, 4, 4),
        step,
        is_video=False,
        decoder_is_linked=False,
    )


def _spot(num_heads: int) -> Miniature:
    def step(model: nn.Module, images: Tensor) -> tuple[Tensor, Maps]:
        loss, enc, dec, *_ = model(images)
        return loss, _clips(enc, dec, has_time=False)

    return Miniature(lambda: spot.SPOT(num_heads=num_heads), lambda B, _: torch.randn(B, 3, 4, 4), step, is_video=False)


def _clips(enc: Tensor, dec: Tensor, *, has_time: bool = True) -> Maps:
    """Turn maps (B, [T,] S, N) or (B, [T,] S, H, W) into (B, T, S, N) without gradient."""

    def clip(maps: Tensor) -> Tensor:
        maps = maps.detach() if has_time else maps.detach().unsqueeze(1)
        return maps if maps.dim() == 4 else maps.flatten(-2)

    return clip(enc), clip(dec)


MINIATURES: dict[str, Miniature] = {
    "slotcontrast mlp": _slotcontrast("video", "MLPDecoder"),
    "slotcontrast mixer": _slotcontrast("video", "SlotMixerDecoder"),
    "slotcontrast broadcast": _slotcontrast("video", "SpatialBroadcastDecoder"),
    "slotcontrast image mlp": _slotcontrast("image", "MLPDecoder"),
    "slotcontrast image mixer": _slotcontrast("image", "SlotMixerDecoder"),
    "slotcontrast image broadcast": _slotcontrast("image", "SpatialBroadcastDecoder"),
    "slotcontrast dynamics": _slotcontrast("video", "MLPDecoder", predicts=True),
    "slotcurri": _slotcontrast("video", "MLPDecoder", cycle=True),
    "slotcurri broadcast": _slotcontrast("video", "SpatialBroadcastDecoder", cycle=True),
    "randsfq": _genera1z(genera1z.ARTransformerDecoder),
    "smoothsa": _genera1z(genera1z.BroadcastMLPDecoder),
    "smoothsa masked": _genera1z(genera1z.BroadcastMLPDecoder, masked=True),
    "xssc": _genera1z(genera1z.MarkovDecoder),
    "steve": _steve(),
    "oclf image": _oclf(video=False),
    "oclf image heads": _oclf(video=False, n_heads=2),
    "oclf image autoregressive": _oclf(video=False, decoder=oclf.AUTOREGRESSIVE),
    "oclf video": _oclf(video=True),
    "oclf video autoregressive": _oclf(video=True, decoder=oclf.AUTOREGRESSIVE),
    "oclf video heads": _oclf(video=True, n_heads=2),
    "oclf video masked": _oclf(video=True, masked=True),
    "lucidrains": _lucidrains(lambda: lucidrains.SlotAttention(4, 8)),
    "lucidrains heads": _lucidrains(lambda: lucidrains.MultiHeadSlotAttention(4, 8)),
    "lucidrains adaptive": _lucidrains(lambda: lucidrains.AdaptiveSlotWrapper(lucidrains.MultiHeadSlotAttention(4, 8))),
    "spot": _spot(1),
    "spot heads": _spot(2),
}
