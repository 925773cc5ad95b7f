"""The doctor finds planted maps and writes a line that computes their loss; every trap is named."""

import re
import time
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refuses
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ssync_loss import SSyncLoss
from ssync_loss.adapters import SlotMaps, doctor
from ssync_loss.adapters._diagnosis import Candidate, Diagnosis, Line

B, T, S, H, W, D = 2, 3, 7, 8, 8, 32
N = H * W


def scores(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def loss_of(line: Line | None, outputs: object) -> Tensor:
    """What the line computes, as if it stood in a training loop."""
    assert line is not None
    criterion = eval(line.criterion, {"SSyncLoss": SSyncLoss})
    loss: Tensor = eval(line.call, {"criterion": criterion, "outputs": outputs})
    return loss


def expect(enc: Tensor, dec: Tensor, **given: Any) -> Tensor:
    """The loss of maps (B, T, S, H, W)."""
    assert enc.dim() == dec.dim() == 5
    return SSyncLoss(**given)(enc, dec)


def candidate(found: Diagnosis, path: str) -> Candidate:
    (one,) = (each for each in found.candidates if each.path == path)
    return one


def says(found: Diagnosis, text: str) -> bool:
    return any(text in one for one in found.problems)


# --- outputs as hosts give them ---


def test_slotcontrast() -> None:
    enc, dec = scores(B, T, S, N).softmax(2), scores(B, T, S, N).softmax(2)
    outputs = {
        "batch_size": B,
        "encoder": {"features": scores(B, T, N, D), "backbone_features": scores(B, T, N, 48)},
        "processor": {
            "state": scores(B, T, S, D),
            "corrector": {"slots": scores(B, T, S, D), "masks": enc},
            "predictor": {"output": scores(B, T, S, D)},
        },
        "decoder": {"reconstruction": scores(B, T, N, 48), "masks": dec},
        "targets": torch.randn(B, T, N, 48),
    }
    found = doctor(outputs)
    assert str(found.line) == (
        'criterion = SSyncLoss(kind="probs", grid=(8, 8))\n'
        'loss = loss + criterion(outputs["processor"]["corrector"]["masks"], outputs["decoder"]["masks"])'
    )
    roles = {one.path: (one.role, one.axes, one.kind, one.sums_over, one.requires_grad) for one in found.candidates}
    assert roles == {
        'outputs["processor"]["corrector"]["masks"]': ("encoder", ("b t s (h w)",), "probs", "s", True),
        'outputs["decoder"]["masks"]': ("decoder", ("b t s (h w)",), "probs", "s", True),
    }
    assert found.problems == ()
    assert dict(found.left_out)['outputs["encoder"]["features"]'].startswith("features? axis 2 has the 64 patches")
    whole = [one.unflatten(3, (H, W)) for one in (enc, dec)]
    torch.testing.assert_close(loss_of(found.line, outputs), expect(*whole, kind="probs"))


@pytest.mark.parametrize("names", [("attent", "attent2"), ("attenta", "attentd")])
def test_genera1z_whose_decoder_drops_a_token(names: tuple[str, str]) -> None:
    enc = scores(B, T, S, H, W).softmax(2)
    dec = scores(B, T, S + 1, H, W).softmax(2)[:, :, 1:]
    outputs = {"output": {"feature": scores(B, T, D, H, W), "slotz": scores(B, T, S, D), names[0]: enc, names[1]: dec}}
    found = doctor(outputs)
    assert found.line is not None
    assert found.line.call == f'criterion(outputs["output"]["{names[0]}"], outputs["output"]["{names[1]}"])'
    decoder = candidate(found, f'outputs["output"]["{names[1]}"]')
    assert decoder.sums_over is None
    assert any("sums over slots are from 0." in one and "renormalizes" in one for one in decoder.notes)
    torch.testing.assert_close(loss_of(found.line, outputs), expect(enc, dec, kind="probs"))


def test_steve_gives_an_encoder_alone_and_blended_frames() -> None:
    found = doctor({"attns": scores(B, T, N, S).softmax(3), "slots": scores(B, T, S, D)})
    (one,) = found.candidates
    assert (one.role, one.axes, found.lines) == ("encoder", ("b t (h w) s",), ())
    assert says(found, "the decoder's has to be tapped")
    # what forward returns instead: attention multiplied with the video
    blended = doctor((torch.rand(B, T, 3, 32, 32), torch.rand(()), torch.rand(B, T, S, 3, 32, 32)))
    assert (blended.candidates, blended.lines) == ((), ())
    assert says(blended, "No map is among the outputs")


@dataclass
class Grouping:
    objects: Tensor
    feature_attributions: Tensor


@dataclass(frozen=True)
class Reconstruction:
    reconstruction: Tensor
    masks: Tensor
    nothing: None = None
    parts: list[Tensor] = field(default_factory=list)


@pytest.mark.parametrize("frames", [(B, T), (B,)])
def test_oclf_averages_heads_after_a_softmax_over_heads_and_slots(frames: tuple[int, ...]) -> None:
    joint = scores(*frames, S * 4, N).softmax(-2)
    enc = joint.unflatten(-2, (S, 4)).mean(-2)
    dec = scores(*frames, S, N).softmax(-2)
    outputs = {
        "perceptual_grouping": Grouping(scores(*frames, S, D), enc),
        "object_decoder": Reconstruction(scores(*frames, N, D), dec),
    }
    found = doctor(outputs, video=(*frames, 3, 64, 64))
    one = candidate(found, 'outputs["perceptual_grouping"].feature_attributions')
    assert (one.role, one.sums_over) == ("encoder", "s")
    assert 'sums over slots are 0.25, not 1: kind="probs" renormalizes them' in one.notes
    whole = [each.view(B, -1, S, H, W) for each in (enc, dec)]
    torch.testing.assert_close(loss_of(found.line, outputs), expect(*whole, kind="probs"))


def test_spot_names_nothing_and_returns_its_logits() -> None:
    logits = scores(B, N, S)
    enc, dec = logits.softmax(2).transpose(1, 2).reshape(B, S, H, W), scores(B, S, H, W).softmax(1)
    outputs = (torch.rand(()), enc, dec, scores(B, S, D), scores(B, N, 48), logits)
    found = doctor(outputs, num_frames=1)
    assert {one.path: one.role for one in found.candidates} == dict.fromkeys(
        ("outputs[1]", "outputs[2]", "outputs[5]"), "unknown"
    )
    assert "the same map as outputs[5]" in candidate(found, "outputs[1]").notes
    assert says(found, "Cannot tell encoder from decoder: outputs[2] and outputs[5] could be either.")
    assert (found.line, len(found.lines)) == (None, 2)
    (right,) = (one for one in found.lines if one.call == "criterion(outputs[5], outputs[2])")
    whole = rearrange(logits, "b (h w) s -> b 1 s h w", h=H)
    torch.testing.assert_close(loss_of(right, outputs), expect(whole, dec.unsqueeze(1), kind=("logits", "probs")))


def test_solv_is_normalized_over_a_half_of_the_tokens() -> None:
    attention = scores(B, S, N // 2).softmax(1)
    outputs = {"attn": attention / attention.sum(2, keepdim=True), "mask": scores(B, S, N).softmax(1)}
    found = doctor(outputs, num_frames=1)
    assert candidate(found, 'outputs["attn"]').sums_over == "h w"
    assert says(found, 'outputs["attn"] is normalized over patches, not over slots')
    assert says(found, 'outputs["attn"] has N=32 patches, which is no square: pass grid=(H, W)')


class Output(dict[str, Any]):
    """Like a Hugging Face ModelOutput: a mapping with attributes."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.__dict__.update(given)


Part = namedtuple("Part", "attn rest")  # noqa: PYI024


def test_containers_of_all_kinds_and_circles() -> None:
    enc, dec = scores(B, T, S, N).softmax(2), scores(B, T, S, N).softmax(2)
    for outputs, enc_path, dec_path in (
        (Output(attn=enc, alpha=dec), '["attn"]', '["alpha"]'),
        (SimpleNamespace(attn=enc, alpha=[dec]), ".attn", ".alpha[0]"),
        ({"a": Part(enc, (1, "x", None)), 3: {"alpha": dec}}, '["a"].attn', '[3]["alpha"]'),
        (SlotMaps(enc, dec), ".enc_logits", ".dec_logits"),
    ):
        found = doctor(outputs)
        assert [one.path for one in found.candidates] == [f"outputs{enc_path}", f"outputs{dec_path}"]
        loss_of(found.line, outputs)
    circle: dict[str, Any] = {"attn": enc, "alpha": dec}
    circle["self"] = [circle]
    assert len(doctor(circle).candidates) == 2
    deep: Any = enc
    for _ in range(1000):
        deep = [deep]
    assert doctor(deep).candidates == ()


def test_nothing_is_called_consumed_or_computed() -> None:
    class Lazy:
        @property
        def attn(self) -> Tensor:
            raise AssertionError

    generator = (scores(B, T, S, N) for _ in range(2))
    layer = nn.Linear(N, N)
    assert doctor([Lazy(), generator, layer, layer.weight, "text", len, torch]).candidates == ()
    assert len(list(generator)) == 2


# --- layouts ---

GRIDS = [(4, 4), (4, 6), (6, 5), (8, 8), (6, 9)]
LAYOUTS = [
    "b t s h w",
    "b t h w s",
    "b s t h w",
    "b t s (h w)",
    "b t (h w) s",
    "(b t) s h w",
    "(b t) h w s",
    "(b t) s (h w)",
    "(b t) (h w) s",
    "(b t s) h w",
    "(b t s) (h w)",
    "b t s 1 h w",
    "(b t) s (h w) 1",
]
IMAGES = ["b s h w", "b h w s", "b s (h w)", "b (h w) s", "b t s h w", "b t s (h w)"]
ENC_NAMES = ["encoder.attn", "processor.corrector.masks", "output.attenta", "perceptual_grouping.feature_attributions"]
DEC_NAMES = ["decoder.masks", "alpha", "output.attentd", "object_decoder.masks"]


def plant(tree: dict[str, Any], name: str, value: Tensor) -> None:
    *above, last = name.split(".")
    for step in above:
        tree = tree.setdefault(step, {})
    tree[last] = value


@dataclass(repr=False)
class Case:
    """Outputs, hints, and for both roles the pattern and the map (B, T, S, H, W)."""

    outputs: dict[str, Any]
    hints: dict[str, Any]
    planted: dict[str, tuple[str, Tensor]]

    def __repr__(self) -> str:
        maps = [(role, axes, one.shape, one.dtype) for role, (axes, one) in self.planted.items()]
        return f"{maps} of {self.hints}"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_frames = draw(st.sampled_from([1, 2, 3]))
    sizes = draw(st.integers(1, 3)), num_frames, draw(st.integers(2, 9))
    torch.manual_seed(draw(st.integers(0, 1000)))
    enc_grid = draw(st.sampled_from(GRIDS))
    scale = draw(st.sampled_from([1, 2]))
    layouts = st.sampled_from(IMAGES if num_frames == 1 else LAYOUTS)
    outputs: dict[str, Any] = {"loss": torch.zeros(()), "frames": 3}
    planted = {}
    for role, names, grid in (
        ("encoder", ENC_NAMES, enc_grid),
        ("decoder", DEC_NAMES, (scale * enc_grid[0], scale * enc_grid[1])),
    ):
        axes = draw(layouts)
        # raw logits are taken to have frames before slots
        kinds = ["probs", "log-probs", *(["logits"] if axes != "b s t h w" else [])]
        kind = draw(st.sampled_from(kinds))
        maps = scores(*sizes, *grid) * draw(st.sampled_from([0.1, 1.0, 5.0]))
        maps = maps.softmax(2) if kind == "probs" else maps.log_softmax(2) if kind == "log-probs" else maps
        if draw(st.booleans()):
            maps = maps.to(draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float64])))
        plant(outputs, draw(st.sampled_from(names)), rearrange(maps, f"b {'t' if 't' in axes else '1'} s h w -> {axes}"))
        planted[role] = axes, maps
    batch, _, slots = sizes
    outputs["slots"] = scores(batch, num_frames, slots, 11)
    outputs["features"] = scores(batch, num_frames, enc_grid[0] * enc_grid[1], 13)
    video = (batch, num_frames, 3, 8 * enc_grid[0], 8 * enc_grid[1])
    return Case(outputs, {"video": video, "num_slots": slots}, planted)


def check_planted(found: Diagnosis, case: Case) -> None:
    both = [one for one in found.candidates if one.role != "unknown"]
    assert {one.role for one in both} == {"encoder", "decoder"}
    for one in both:
        assert case.planted[one.role][0] in one.axes, str(found)
    maps = [one for _, one in case.planted.values()]
    kinds = ["probs" if (one.detach() >= 0).all() else "logits" for one in maps]
    expected = expect(*maps, kind=kinds)
    losses = [loss_of(one, case.outputs) for one in found.lines if "..." not in str(one)]
    assert any(torch.allclose(loss, expected, rtol=1e-5, atol=1e-7) for loss in losses), str(found)


@given(cases())
def test_with_hints_planted_maps_are_found_and_the_line_computes_their_loss(case: Case) -> None:
    if all("(b t s)" in axes for axes, _ in case.planted.values()):
        return
    found = doctor(case.outputs, **case.hints)
    assert found.line is not None, str(found)
    check_planted(found, case)


@given(cases())
@settings(max_examples=80)
def test_without_hints_the_right_line_is_among_those_that_cannot_be_told_apart(case: Case) -> None:
    patterns = [axes for axes, _ in case.planted.values()]
    squares = all(one.shape[3] == one.shape[4] for _, one in case.planted.values())
    found = doctor(case.outputs)
    if all("(b t" in axes for axes in patterns) or (not squares and all("(h w)" in axes for axes in patterns)):
        # nothing shows T, or H and W
        assert found.line is None or "..." in str(found.line) or found.problems
    else:
        check_planted(found, case)
