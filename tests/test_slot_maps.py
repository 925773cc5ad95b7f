"""The pair of maps as a tuple and as a mapping, and conversions to (B, T, S, ...)."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from limits import MAPPING_IN_A_GRAPH
from ssync_loss import SSyncLoss
from ssync_loss.adapters import LogitTap, OutputTap, SlotMaps

B, T, S, N = 2, 3, 4, 6


def pair(**masks: Tensor) -> SlotMaps:
    return SlotMaps(torch.randn(B, T, S, 9), torch.randn(B, T, S, 9), **masks)


VALID, SLOT_MASK = torch.arange(B * T).reshape(B, T) > 0, torch.arange(B * S).reshape(B, S) > 0
MASKS = [{}, {"valid": VALID}, {"slot_mask": SLOT_MASK}, {"valid": VALID, "slot_mask": SLOT_MASK}]


@pytest.mark.parametrize("masks", MASKS)
class TestPair:
    def test_is_a_tuple_of_two(self, masks: dict[str, Tensor]) -> None:
        maps = pair(**masks)
        enc_logits, dec_logits = maps
        assert isinstance(maps, tuple)
        assert len(maps) == 2
        assert maps[0] is maps[-2] is maps.enc_logits is maps["enc_logits"] is enc_logits
        assert maps[1] is maps[:][1] is maps.dec_logits is maps["dec_logits"] is dec_logits
        assert maps == (enc_logits, dec_logits)
        assert SlotMaps._make(maps) == maps

    def test_unpacks_as_keywords(self, masks: dict[str, Tensor]) -> None:
        maps = pair(**masks)
        assert maps.keys() == ("enc_logits", "dec_logits", *masks)
        assert dict(**maps) == {"enc_logits": maps[0], "dec_logits": maps[1], **masks}
        for name in {"valid", "slot_mask"} - masks.keys():
            assert getattr(maps, name) is None
        for name in {"valid", "slot_mask", "keys", "T"} - masks.keys():
            with pytest.raises(KeyError, match=name):
                maps[name]

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda maps: pickle.loads(pickle.dumps(maps))])
    def test_copies_keep_all(self, masks: dict[str, Tensor], duplicate: Callable[[Any], Any]) -> None:
        maps, other = pair(**masks), pair(valid=~VALID)
        twin = duplicate(maps)
        assert other.slot_mask is None
        assert type(twin) is SlotMaps
        assert twin.keys() == maps.keys()
        for name, one in {"enc_logits": maps[0], "dec_logits": maps[1], **masks}.items():
            assert torch.equal(twin[name], one)

    def test_replace(self, masks: dict[str, Tensor]) -> None:
        maps = pair(**masks)
        changed = maps._replace(dec_logits=maps[0])
        assert dict(**changed) == {**maps, "dec_logits": maps[0]}
        assert maps._replace(valid=None).valid is None

    def test_torch_maps_its_trees_over_all(self, masks: dict[str, Tensor]) -> None:
        maps = pair(**masks)
        moved = tree_map(lambda one: one.to("meta"), {"maps": maps})["maps"]
        assert type(moved) is SlotMaps
        assert moved.keys() == maps.keys()
        assert all(one.is_meta for one in {**moved}.values())
        assert [keystr(path) for path, _ in tree_flatten_with_path(maps)[0]] == [f".{name}" for name in {**maps}]

    def test_feeds_a_criterion(self, masks: dict[str, Any]) -> None:
        maps, criterion = pair(**masks), SSyncLoss().eval()
        assert torch.equal(criterion(**maps, step=3), criterion(*maps, step=3, **masks))

    @MAPPING_IN_A_GRAPH
    @pytest.mark.compiles
    def test_traces(self, masks: dict[str, Tensor]) -> None:
        def function(enc_logits: Tensor, dec_logits: Tensor, **masks: Tensor) -> tuple[dict[str, Tensor], SlotMaps]:
            maps = SlotMaps(enc_logits + 1, dec_logits, **masks)
            return {name: 2 * one for name, one in {**maps}.items()}, maps

        maps = pair(**masks)
        torch._dynamo.reset()
        got = torch.compile(function, fullgraph=True, backend="aot_eager")(**maps)
        wanted = function(**maps)
        torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=0)
        assert got[1].keys() == maps.keys()
        torch.testing.assert_close(dict(**got[1]), dict(**wanted[1]), rtol=0, atol=0)


class TestJoin:
    @pytest.mark.parametrize("dec_shape", [(B, T, S, N), (B, T, S, 5, 5), (B * T, S, N), (B * T, S, 5, 5)])
    @pytest.mark.parametrize("enc_shape", [(B, T, S, N), (B, T, S, 2, 3)])
    def test_the_encoder_map_determines_the_decoder_axes(
        self, enc_shape: tuple[int, ...], dec_shape: tuple[int, ...]
    ) -> None:
        enc, dec = torch.randn(enc_shape), torch.randn(dec_shape)
        maps = SlotMaps.join(enc, dec)
        assert maps.enc_logits is enc
        wanted = dec.reshape(B, T, S, *dec_shape[3 if dec_shape[:3] == (B, T, S) else 2 :])
        assert torch.equal(maps.dec_logits, wanted)

    @pytest.mark.parametrize("rest", [(N,), (5, 5)])
    @pytest.mark.parametrize(("frames", "slots"), [(T, S), (1, S), (3, 3), (T, 1)])
    def test_splits_slots_from_the_batch(self, frames: int, slots: int, rest: tuple[int, ...]) -> None:
        enc, dec = torch.randn(B, frames, slots, N), torch.randn(B * frames * slots, *rest)
        maps = SlotMaps.join(enc, dec)
        assert torch.equal(maps.dec_logits, dec.reshape(B, frames, slots, *rest))
        assert maps.dec_logits._base is dec

    @pytest.mark.parametrize("lead", ["b t s", "(b t) s", "(b t s)"])
    @pytest.mark.parametrize("rest", ["n", "h w"])
    @pytest.mark.parametrize("frames", [1, T, S])
    def test_reorders_the_map_of_a_tap(self, lead: str, rest: str, frames: int) -> None:
        wanted = torch.randn(B, frames, S, *((N,) if rest == "n" else (2, 3)))
        decoder = nn.Identity()
        enc, dec = torch.randn(B, frames, S, N), OutputTap(decoder)
        decoder(rearrange(wanted, f"b t s {rest} -> {lead} {rest}"))
        assert torch.equal(SlotMaps.join(enc, dec).dec_logits, wanted)

    @pytest.mark.parametrize("lead", ["b s", "(b s)"])
    @pytest.mark.parametrize("frames", [T, S])
    def test_stacks_frames(self, lead: str, frames: int) -> None:
        wanted = torch.randn(B, frames, S, 2, 3)
        decoder = nn.Identity()
        enc, dec = torch.randn(B, frames, S, N), OutputTap(decoder)
        for frame in wanted.unbind(1):
            decoder(rearrange(frame, f"b s h w -> {lead} h w"))
        assert torch.equal(SlotMaps.join(enc, dec).dec_logits, wanted)

    @pytest.mark.parametrize(
        "axes", ["(b t) (h w) s", "b t s (h w)", "(b t s) h w", "(s t) h w b", "b (h w) s", "(b s) h w"]
    )
    def test_reads_axes_of_both(self, axes: str) -> None:
        wanted, encoder, decoder = torch.randn(B, T, S, 2, 3), nn.Identity(), nn.Identity()
        enc, dec = OutputTap(encoder, axes="(b t) s (h w)"), OutputTap(decoder, axes=axes)
        for _ in range(2):
            encoder(wanted.reshape(B * T, S, 6))
            for one in wanted.split(T if "t" in axes else 1, 1):
                decoder(rearrange(one, f"b t s h w -> {axes}" if "t" in axes else f"b 1 s h w -> {axes}"))
            maps = SlotMaps.join(enc, dec, num_frames=T)
            assert torch.equal(maps.enc_logits, wanted.flatten(3))
            assert torch.equal(maps.dec_logits.flatten(3), wanted.flatten(3))
            assert maps.dec_logits.dim() == (4 if "(h w)" in axes else 5)

    @pytest.mark.parametrize("num_frames", [None, T])
    def test_splits_the_dots_of_a_decoder(self, num_frames: int | None) -> None:
        to_q, to_k = nn.Identity(), nn.Identity()
        dec = LogitTap(to_q, to_k, 1.0)
        key, query = to_k(torch.randn(B * T, N, 8)), to_q(torch.randn(B * T, S, 8))
        maps = SlotMaps.join(torch.randn(B, T, S, N), dec, num_frames=num_frames)
        torch.testing.assert_close(maps.dec_logits, (query @ key.mT).reshape(B, T, S, N))

    def test_refuses_dots_of_another_length(self) -> None:
        to_q, to_k = nn.Identity(), nn.Identity()
        dec = LogitTap(to_q, to_k, 1.0)
        for _ in range(2):
            to_k(torch.randn(B, N, 8)), to_q(torch.randn(B, S, 8))
        with pytest.raises(ValueError, match=r"`dec` must have shape \(B=2, T=3, S=4.*got \(2, 2, 4, 6\)"):
            SlotMaps.join(torch.randn(B, T, S, N), dec)

    def test_refuses_maps_of_two_forwards(self) -> None:
        encoder, decoder = nn.Identity(), nn.Identity()
        for settings in ({"num_frames": 1}, {"host": None}):
            enc, dec = OutputTap(encoder, **settings), OutputTap(decoder, host=decoder)
            clip = torch.randn(B, T, S, N)
            for module in (encoder, decoder):
                module(clip)
            if settings == {"host": None}:
                enc.reset()
            encoder(clip)
            with pytest.raises(RuntimeError, match="`dec` must hold a map of the forward that `enc` holds; got an ear"):
                SlotMaps.join(enc, dec)
            with pytest.raises(RuntimeError, match="has not run since the last pop"):
                SlotMaps.join(enc, dec)
            for module in (encoder, decoder):
                module(clip)
            SlotMaps.join(enc, dec)
            encoder(clip)
            with pytest.raises(RuntimeError, match=r"`module` \(Identity\) has not run since the last pop"):
                SlotMaps.join(enc, dec)

    def test_the_error_suggests_that_slots_are_last(self) -> None:
        with pytest.raises(ValueError, match=r"to go with `enc`; got \(2, 3, 6, 4\)\. Are its last two axes the other"):
            SlotMaps.join(torch.zeros(B, T, S, N), torch.zeros(B, T, N, S))

    @pytest.mark.parametrize("lead", ["(b t) s", "(b t s) 1"])
    def test_asks_whether_calls_are_pieces_of_one_map(self, lead: str) -> None:
        """Of S columns, which are no slots."""
        decoder = nn.Identity()
        enc, dec = torch.randn(B, T, S, S), OutputTap(decoder)
        clip = rearrange(torch.randn(B, T, S, S), f"b t s n -> {lead} n")
        pieces = "If its calls are pieces of one map, and no frames, tap the module that puts them together."
        for rows, refused in ((len(clip) // 2, ValueError), (len(clip) * 2 // 3, RuntimeError)):
            for piece in clip.split(rows):
                decoder(piece)
            with pytest.raises(refused, match=f"[.] {pieces}$"):
                SlotMaps.join(enc, dec)

    def test_takes_flattened_tensors_apart(self) -> None:
        enc, dec = torch.randn(B * T, S, N), torch.randn(B * T, S, 5, 5)
        maps = SlotMaps.join(enc, dec, num_frames=T)
        assert torch.equal(maps.enc_logits, enc.reshape(B, T, S, N))
        assert torch.equal(maps.dec_logits, dec.reshape(B, T, S, 5, 5))

    @pytest.mark.parametrize(
        ("enc_shape", "num_frames", "message"),
        [
            ((B * T, S, N), None, r"`enc` must have shape \(B, T, S, N\) or .* got \(6, 4, 6\)"),
            ((B * T, S, N), 4, r"`enc` must have shape \(B, T=4, S, N\) or .* got \(6, 4, 6\)"),
            ((B, T, S, N), 2, r"`enc` must have shape \(B, T=2, S, N\) or .* got \(2, 3, 4, 6\)"),
            ((B, T), None, r"`enc` must have shape .* got \(2, 3\)"),
        ],
    )
    def test_refuses_other_encoders(self, enc_shape: tuple[int, ...], num_frames: int | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SlotMaps.join(torch.zeros(enc_shape), torch.zeros(B, T, S, N), num_frames=num_frames)

    @pytest.mark.parametrize(
        "dec_shape",
        [
            (B, T, S + 1, N),
            (B * T + 1, S, N),
            (B * T, S + 1, N),
            (B, S, N),
            (B, T, S),
            (B, T, S, 1, 2, 3),
            (B * T * S + 1, N),
        ],
    )
    def test_refuses_other_decoders(self, dec_shape: tuple[int, ...]) -> None:
        with pytest.raises(
            ValueError, match=r"`dec` must have shape \(B=2, T=3, S=4, .* or \(B\*T=6, S=4.* or \(B\*T\*S=24"
        ):
            SlotMaps.join(torch.zeros(B, T, S, N), torch.zeros(dec_shape))

    def test_refuses_other_types(self) -> None:
        wrong: Any = "masks"
        with pytest.raises(TypeError, match="`enc` must be a tensor; got str"):
            SlotMaps.join(wrong, torch.zeros(B, T, S, N))
        with pytest.raises(TypeError, match="`dec` must be a tensor; got str"):
            SlotMaps.join(torch.zeros(B, T, S, N), wrong)
        with pytest.raises(ValueError, match="`num_frames` must be at least 1; got 0"):
            SlotMaps.join(torch.zeros(B, T, S, N), torch.zeros(B, T, S, N), num_frames=0)
