"""The doctor finds planted maps and writes a line that computes their loss; every trap is named."""

import re
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from einops import rearrange
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from refusals import refuses
from ssync_loss import SSyncLoss
from ssync_loss.adapters import SlotMaps, doctor
from ssync_loss.adapters._doctor.diagnosis import Candidate, Diagnosis, Line
from ssync_loss.adapters._doctor.readings import Hints
from ssync_loss.adapters._doctor.suspects import probabilities_of, suspects_in
from ssync_loss.adapters._doctor.walk import Found

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
    assert says(found, "the map of the decoder has to be tapped")
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


@pytest.mark.parametrize("num_heads", [B, 4])
@pytest.mark.parametrize("frames", [(B, T), (B,)])
def test_oclf_averages_heads_after_a_softmax_over_heads_and_slots(frames: tuple[int, ...], num_heads: int) -> None:
    joint = scores(*frames, S * num_heads, N).softmax(-2)
    enc = joint.unflatten(-2, (S, num_heads)).mean(-2)
    dec = scores(*frames, S, N).softmax(-2)
    outputs = {
        "perceptual_grouping": Grouping(scores(*frames, S, D), enc),
        "object_decoder": Reconstruction(scores(*frames, N, D), dec),
    }
    found = doctor(outputs, video=(*frames, 3, 64, 64))
    one = candidate(found, 'outputs["perceptual_grouping"].feature_attributions')
    assert (one.role, one.sums_over) == ("encoder", "s")
    assert f'sums over slots are {1 / num_heads}, not 1: kind="probs" renormalizes them' in one.notes
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


Part = namedtuple("Part", "attn rest")


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
IMAGES = ["b s h w", "b h w s", "b s (h w)", "b (h w) s", "b t s h w", "b t s (h w)", "(b t s) h w"]
ENC_NAMES = ["encoder.attn", "processor.corrector.masks", "output.attenta", "perceptual_grouping.feature_attributions"]
DEC_NAMES = ["decoder.masks", "alpha", "output.attentd", "object_decoder.masks"]


def plant(tree: dict[str, Any], name: str, value: Tensor) -> None:
    *above, last = name.split(".")
    for step in above:
        tree = tree.setdefault(step, {})
    tree[last] = value


class Case:
    """Outputs, hints, and for both roles the pattern and the map (B, T, S, H, W)."""

    def __init__(self, outputs: dict[str, Any], hints: dict[str, Any], planted: dict[str, tuple[str, Tensor]]) -> None:
        self.outputs, self.hints, self.planted = outputs, hints, planted

    def __repr__(self) -> str:
        maps = [(role, axes, tuple(one.shape), one.dtype) for role, (axes, one) in self.planted.items()]
        return f"{maps} of {self.hints}"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_frames = draw(st.sampled_from([1, 2, 3]))
    sizes = draw(st.integers(1, 3)), num_frames, draw(st.integers(2, 9))
    torch.manual_seed(draw(st.integers(0, 1000)))
    enc_grid = draw(st.sampled_from(GRIDS))
    scale = draw(st.sampled_from([1, 2]))
    # 8 slots on a grid of 8 x 8 lie either way, and are taken to lie as the other map does
    assume(sizes[2] not in (*enc_grid, scale * enc_grid[0], scale * enc_grid[1]))
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
        plant(
            outputs, draw(st.sampled_from(names)), rearrange(maps, f"b {'t' if 't' in axes else '1'} s h w -> {axes}")
        )
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
    found = doctor(case.outputs, **case.hints)
    if all("(b t s)" in axes for axes, _ in case.planted.values()):
        # `axes` cannot say S then
        assert found.lines == ()
        return
    assert found.line is not None, str(found)
    check_planted(found, case)


@given(cases())
def test_without_hints_the_right_line_is_among_those_that_cannot_be_told_apart(case: Case) -> None:
    patterns = [axes for axes, _ in case.planted.values()]
    squares = all(one.shape[3] == one.shape[4] for _, one in case.planted.values())
    found = doctor(case.outputs)
    if all("(b t" in axes for axes in patterns) or (not squares and all("(h w)" in axes for axes in patterns)):
        # nothing shows T, or H and W
        assert found.line is None or "..." in str(found.line) or found.problems
    else:
        check_planted(found, case)


# --- traps ---


def pair(**more: Tensor) -> dict[str, Tensor]:
    return {"attn": scores(B, T, S, N).softmax(2), "alpha": scores(B, T, S, N).softmax(2), **more}


def notes_of(found: Diagnosis) -> str:
    return "\n".join(note for one in found.candidates for note in one.notes)


def test_healthy_maps_have_no_problems() -> None:
    assert doctor(pair()).problems == ()
    assert doctor({"enc_logits": scores(B, T, S, N), "dec_logits": scores(B, T, S, N)}).problems == ()


def test_images_that_could_be_read_as_a_clip() -> None:
    maps = {"attn": scores(2, 7, 16, 16).softmax(1), "alpha": scores(2, 7, 16, 16).softmax(1)}
    found = doctor(maps, num_frames=1)
    assert "without `axes` it could pass for a clip (B, T, S, N) of T=7 frames, S=16 slots and N=16" in notes_of(found)
    assert found.line is not None
    assert found.line.criterion == 'SSyncLoss(kind="probs", axes="b s h w")'
    # of logits nothing shows it
    maps = {name: one.log() + torch.randn(2, 1, 16, 16) for name, one in maps.items()}
    found = doctor(maps)
    assert set(candidate(found, 'outputs["attn"]').axes) >= {"b s h w", "b t s (h w)"}
    assert found.line is None
    assert says(found, 'Cannot tell the axes of outputs["attn"]')
    # maps of one shape lie alike
    assert not any("axes=(" in one.criterion for one in found.lines)
    found = doctor(maps, num_slots=7, num_frames=1)
    assert found.line is not None
    torch.testing.assert_close(loss_of(found.line, maps), expect(*(one.unsqueeze(1) for one in maps.values())))


@pytest.mark.parametrize(
    "other",
    [
        lambda one: one,
        lambda one: one.view(B, T, S, H, W),
        lambda one: one.clone(),
        lambda one: one.detach(),
        lambda one: one.transpose(2, 3).contiguous(),
        lambda one: one.to(torch.bfloat16).view(B * T, S, H, W),
        lambda one: one.log(),
    ],
)
def test_a_decoder_map_that_is_the_encoders(other: Callable[[Tensor], Tensor]) -> None:
    one = scores(B, T, S, N).softmax(2)
    found = doctor({"encoder": {"attn": one}, "decoder": {"masks": other(one)}})
    assert says(found, "is the same map as outputs["), str(found)
    assert found.lines == ()


def test_one_tensor_without_names_is_given_twice() -> None:
    one = scores(B, T, S, N).softmax(2)
    found = doctor((one, one))
    assert found.problems[0] == "outputs[1] and outputs[0] are one tensor: they cannot be both maps."
    assert says(found, "There is only outputs[0]: the map of the decoder or the encoder has to be tapped")
    assert found.lines == ()
    flat = torch.full((B, T, S, N), 1 / S, requires_grad=True)
    assert says(doctor((flat, flat.view(B, T, S, H, W))), "outputs[1] and outputs[0] are one tensor")


def test_one_map_under_two_names_is_no_problem() -> None:
    maps = pair()
    found = doctor({"processor": {"masks": maps["attn"], "again": {"masks": maps["attn"]}}, "alpha": maps["alpha"]})
    assert found.problems == ()
    assert found.line is not None
    assert 'the same map as outputs["processor"]["masks"]' in notes_of(found)


def test_two_maps_that_say_nothing_are_not_taken_for_one() -> None:
    maps = {"attn": torch.full((B, T, S, N), 1 / S), "alpha": torch.full((B, T, S, N), 1 / S)}
    assert doctor(maps).line is not None
    close = 1e-3 * torch.randn(2, B, T, S, N)
    found = doctor({"attn": close[0].softmax(2), "alpha": close[1].softmax(2)})
    assert found.line is not None


def test_a_slot_mask_is_passed_or_found_inverted() -> None:
    present = torch.arange(S) < torch.tensor([[3], [5]])
    logits = scores(2, B, T, S, N).masked_fill(~present[:, None, :, None], float("-inf"))
    enc, dec = logits.softmax(3)
    right = {"attn": enc, "alpha": dec, "smask": present}
    found = doctor(right)
    assert found.line is not None
    assert found.line.call == 'criterion(outputs["attn"], outputs["alpha"], slot_mask=outputs["smask"])'
    whole = [one.unflatten(3, (H, W)) for one in (enc, dec)]
    expected = SSyncLoss(kind="probs")(*whole, slot_mask=present)
    torch.testing.assert_close(loss_of(found.line, right), expected)
    assert found.problems == ()

    found = doctor({**right, "smask": ~present})
    assert says(found, "`slot_mask` is True where a slot is present; pass ~outputs")
    assert says(found, "would keep the slots with 0% of the mass")
    assert found.line is not None
    assert "slot_mask" not in found.line.call
    with pytest.warns(UserWarning, match="`slot_mask` leaves no clip two slots, and the loss is 0"):
        assert SSyncLoss(kind="probs")(*whole, slot_mask=torch.zeros_like(present)) == 0
    assert says(doctor({**right, "smask": torch.zeros_like(present)}), "would keep the slots with 0% of the mass")
    assert says(doctor({**right, "smask": present.roll(1, 1)}), "if it is no slot mask")
    unaware = {**right, "alpha": scores(B, T, S, N).softmax(2)}
    assert "slot_mask=" in str(doctor(unaware).line)
    assert says(doctor({**unaware, "smask": ~present}), "pass ~outputs")
    # (B, T) and (B, S) look the same: a name has to say which
    square = {"attn": scores(2, S, S, N).softmax(2), "alpha": scores(2, S, S, N).softmax(2)}
    assert doctor({**square, "padded": ~present}).problems == ()
    assert says(doctor({**square, "slot_mask": ~present}), "would keep")


def test_probabilities_as_logits_and_the_reverse() -> None:
    probs, logits = scores(B, T, S, N).softmax(2), scores(B, T, S, N)
    found = doctor({"enc_logits": probs, "dec_logits": logits})
    assert says(found, 'outputs["enc_logits"] holds probabilities, whatever its name says: pass kind="probs" for it.')
    assert found.line is not None
    assert found.line.criterion.startswith('SSyncLoss(kind=("probs", "logits")')
    found = doctor({"enc_probs": logits, "dec_softmax": 3 * logits.detach()})
    assert says(found, 'outputs["enc_probs"] holds logits')
    assert says(found, 'outputs["dec_softmax"] holds logits')

    found = doctor(pair(), loss=SSyncLoss())
    assert says(found, "`loss` has kind='logits', and these maps need kind='probs'.")
    logits_twice = {"attn": scores(B, T, S, N), "alpha": scores(B, T, S, N)}
    assert says(doctor(logits_twice, loss=SSyncLoss(kind="probs")), "these maps need kind='logits'.")
    assert doctor(logits_twice, loss=SSyncLoss()).problems == ()
    assert doctor(logits_twice, loss=SSyncLoss(kind=("logits", "logits"), grid=((8, 8), (8, 8)))).problems == ()
    last = {name: one.transpose(2, 3) for name, one in pair().items()}
    assert says(doctor(last, loss=SSyncLoss(kind="probs")), "these maps need axes='b t (h w) s'.")


def test_logits_that_happen_to_lie_within_zero_and_one() -> None:
    low = torch.rand(B, T, S, N, requires_grad=True)
    assert candidate(doctor(pair(dec_logits=low)), 'outputs["dec_logits"]').kind == "logits"
    found = doctor({"attn": scores(B, T, S, N).softmax(2), "alpha": low})
    assert "probabilities, or logits by chance" in notes_of(found)


def test_forgotten_heads() -> None:
    logits, dec = scores(B, T, 4, S, N), scores(B, T, S, H, W)
    joint = logits.transpose(2, 3).flatten(2, 3).softmax(2).unflatten(2, (S, 4)).transpose(2, 3)
    for attention, enc, kind in (
        (logits.softmax(3), logits.softmax(3).mean(2), "probs"),
        (joint, joint.mean(2), "probs"),
        (logits, logits.logsumexp(2), "logits"),
    ):
        outputs = {"attn": attention, "alpha": dec}
        found = doctor(outputs)
        one = candidate(found, 'outputs["attn"]')
        assert one.axes == ("b t heads s (h w)",)
        assert any("has an axis of heads" in note for note in one.notes)
        expected = expect(enc.unflatten(3, (H, W)), dec, kind=(kind, "logits"))
        torch.testing.assert_close(loss_of(found.line, outputs), expected)
    assert candidate(doctor({"attn": joint, "alpha": dec}), 'outputs["attn"]').sums_over == "heads s"
    image = {"attn": logits[:, 0].softmax(2), "alpha": dec[:, 0].softmax(1)}
    assert candidate(doctor(image, num_frames=1), 'outputs["attn"]').axes == ("b heads s (h w)",)


def test_detached_maps() -> None:
    maps = pair()
    found = doctor({**maps, "attn": maps["attn"].detach()})
    assert says(found, 'outputs["attn"] is detached: a loss of it trains nothing.')
    assert not says(found, 'outputs["alpha"] is detached')
    gone = {name: one.detach() for name, one in maps.items()}
    assert says(doctor(gone), "Nothing here carries a gradient")
    with torch.no_grad():
        assert doctor(gone).problems == ()
    assert not candidate(doctor(gone), 'outputs["attn"]').requires_grad


def test_exact_zeros_and_numbers_that_are_none() -> None:
    maps = pair()
    sparse = torch.where(maps["alpha"] < 0.05, 0.0, maps["alpha"])
    sparse = sparse / sparse.sum(2, keepdim=True)
    assert "holds exact zeros: a log() of your own gives NaN gradients there" in notes_of(
        doctor({**maps, "alpha": sparse})
    )
    assert "exact zeros" not in notes_of(doctor(maps))
    for wrong in (float("nan"), float("inf")):
        broken = maps["alpha"].detach().clone()
        broken[1, 2, 3, 4] = wrong
        found = doctor({**maps, "alpha": broken})
        assert says(found, 'outputs["alpha"] holds NaN or +inf')
        assert found.line is not None
    absent = scores(B, T, S, N).index_fill(2, torch.tensor([1]), float("-inf"))
    assert doctor({"enc_logits": absent, "dec_logits": scores(B, T, S, N)}).problems == ()


@pytest.mark.parametrize("axes", ["b t s h w", "b t s (h w)", "(b t) s h w", "b t (h w) s"])
def test_attention_normalized_over_tokens(axes: str) -> None:
    attention = rearrange(scores(B, T, S, N).softmax(3), f"b t s (h w) -> {axes}", h=H)
    found = doctor({"attn": attention, "alpha": scores(B, T, S, N).softmax(2)})
    one = candidate(found, 'outputs["attn"]')
    assert (one.axes, one.sums_over) == ((axes,), "h w")
    assert says(found, 'outputs["attn"] is normalized over patches, not over slots')


def test_grids_that_differ_and_are_not_square() -> None:
    outputs = {"attn": scores(B, T, S, 24).softmax(2), "alpha": scores(B, T, S, 8, 12).softmax(2)}
    found = doctor(outputs)
    assert found.line is not None
    assert found.line.criterion == 'SSyncLoss(kind="probs", grid=(4, 6))'
    assert "on a grid of its own, 8 x 12: resized to the encoder's, 4 x 6" in notes_of(found)
    flat = {name: one.flatten(3) for name, one in outputs.items()}
    found = doctor(flat)
    assert says(found, 'outputs["attn"] has N=24 patches, which is no square: pass grid=(H, W)')
    assert found.line is not None
    assert "grid=(..., ...)" in found.line.criterion
    for hint in (
        {"grid": ((4, 6), (8, 12))},
        {"grid": (4, 6)},
        {"video": (B, T, 3, 64, 96)},
        {"video": (B, T, 64, 96, 3)},
    ):
        found = doctor(flat, **hint)
        assert found.line is not None
        assert found.line.criterion == 'SSyncLoss(kind="probs", grid=((4, 6), (8, 12)))'
        assert found.problems == ()
        expected = expect(outputs["attn"].unflatten(3, (4, 6)), outputs["alpha"], kind="probs")
        torch.testing.assert_close(loss_of(found.line, flat), expected)


def test_features_and_slots_are_no_maps() -> None:
    found = doctor({"enc_logits": scores(B, T, N, D), "dec_logits": scores(B, T, S, N).softmax(2)})
    assert dict(found.left_out) == {'outputs["enc_logits"]': "features? axis 2 has the 64 patches, 32 values each"}
    assert says(found, 'There is only outputs["dec_logits"]: the map of the encoder has to be tapped')
    found = doctor(pair(attention_slots=scores(B, T, S, D)))
    assert len(found.candidates) == 2
    assert dict(found.left_out) == {'outputs["attention_slots"]': "no map, as its name says 'attention_slots'"}
    # nothing but shapes: said to be open
    found = doctor((scores(B, T, N, 25), scores(B, T, N, 25)))
    assert "only its shape speaks for a map: features may look the same" in notes_of(found)


def test_labels_and_attention_between_patches_are_no_maps() -> None:
    hard = torch.nn.functional.one_hot(torch.randint(S, (B, T, N)), S).float().transpose(2, 3)
    among = scores(B, 4, 100, 100).softmax(3)
    found = doctor(pair(decoder_masks_hard=hard, backbone_attention=among, labels=torch.randint(S, (B, T, N))))
    assert len(found.candidates) == 2
    assert dict(found.left_out)['outputs["decoder_masks_hard"]'] == "all 0 or 1: labels, not scores"
    assert 'outputs["backbone_attention"]' in dict(found.left_out)


def test_two_forwards_joined() -> None:
    # in time, as taps join them, or in the batch
    joined = {"attn": scores(B, 2 * T, S, N).softmax(2), "alpha": scores(2 * B * T, S, N).softmax(1)}
    found = doctor(joined, video=(B, T, 3, 64, 64))
    for name in joined:
        assert says(found, f'outputs["{name}"] has 2 times the frames that went in: were several forwards joined?')
    assert says(doctor(joined, num_frames=T), 'outputs["attn"] has 2 times the frames that went in')
    # without a hint it is a longer clip
    assert doctor(joined).problems == ()
    # two images cannot be told from two heads
    images = {"attn": scores(B, 2, S, N).softmax(2), "alpha": scores(B, 2, S, N).softmax(2)}
    assert "has an axis of heads, or of forwards that were joined" in notes_of(doctor(images, video=(B, 3, 64, 64)))


def test_maps_that_do_not_go_together() -> None:
    found = doctor({"attn": scores(B, T, S, N).softmax(2), "alpha": scores(B, T, S + 1, N).softmax(2)})
    assert found.lines == ()
    assert says(found, "No two maps go together, an encoder's and a decoder's of the same B, T and S")
    found = doctor({"attn": scores(B, T, S, N).softmax(2), "other": scores(B, T, S + 1, N).softmax(2)})
    assert says(found, "No two maps go together")


@pytest.mark.parametrize("frames", [T - 1, 2 * T - 1])
def test_frames_that_were_not_decoded_are_not_taken_for_heads(frames: int) -> None:
    found = doctor({"attn": scores(B, frames, S, N).softmax(2), "dec_masks": scores(B, T, S, N).softmax(2)})
    assert says(found, "No two maps go together")
    assert found.lines == ()


def test_frames_in_front() -> None:
    outputs = {"attn": scores(T, B, S, N).softmax(2), "dec_masks": scores(B * T, S, H, W).softmax(1)}
    found = doctor(outputs, video=(B, T, 3, 8 * H, 8 * W))
    assert found.line is not None
    expected = SSyncLoss(kind="probs")(
        outputs["attn"].transpose(0, 1).unflatten(3, (H, W)), outputs["dec_masks"].unflatten(0, (B, T))
    )
    torch.testing.assert_close(loss_of(found.line, outputs), expected)


@pytest.mark.parametrize("hint", [{}, {"video": (B, T, 3, 8 * H, 8 * W)}])
def test_a_list_of_frames(hint: dict[str, Any]) -> None:
    frames = [scores(B, S, N).softmax(1) for _ in range(T)]
    found = doctor({"attn": frames, "alpha": scores(B, T, S, N).softmax(2)}, **hint)
    assert says(found, f'outputs["attn"] is a list of {T} tensors {B, S, N}: if they are frames, look at torch.stack')
    assert not says(doctor(frames), "is a list of")


def test_a_log_of_zero() -> None:
    probs = scores(B, T, S, N).softmax(2)
    probs = torch.where(probs < 0.02, 0.0, probs)
    found = doctor({"attn": probs.log(), "alpha": scores(B, T, S, N)})
    assert says(found, 'outputs["attn"] is the log() of a probability of 0, whose gradient is NaN')
    assert doctor({"attn": probs.clamp_min(1e-9).log(), "alpha": scores(B, T, S, N)}).problems == ()


def test_maps_are_looked_at_before_what_only_looks_like_one() -> None:
    crowd = {f"x{index}": scores(B, T, S, N) for index in range(20)}
    found = doctor({**crowd, **pair()})
    assert found.line == doctor(pair()).line


def test_slots_in_the_batch_of_both_maps_are_not_taken_for_other_slots() -> None:
    # B*T*S = 1*2*2, which is no map of four slots
    outputs = {"encoder": {"attn": scores(4, 4, 4)}, "alpha": scores(2, 2, 16).softmax(1).flatten(0, 1)}
    assert doctor(outputs).lines == ()


def test_nearly_uniform_maps_sum_to_a_constant_over_one_axis_more_exactly() -> None:
    logits = 1e-3 * scores(B, 8, 8, S * 4)
    found = doctor({"attn": logits.softmax(3).unflatten(3, (S, 4)).mean(4)}, num_frames=1)
    assert [one.axes for one in found.candidates] == [("b h w s",)]


def test_weak_names_shared_by_all_say_nothing_and_strong_ones_do() -> None:
    maps = {"attn_1": scores(B, T, S, N).softmax(2), "attn_2": scores(B, T, S, N).softmax(2)}
    assert says(doctor(maps), "Cannot tell encoder from decoder")
    assert len(doctor(maps).lines) == 2
    found = doctor({"encoder": maps})
    assert found.lines == ()
    assert says(found, "the map of the decoder has to be tapped")


def test_several_candidates_for_a_role() -> None:
    found = doctor(pair(recon_masks=scores(B, T, S, N).softmax(2), decoder_masks=scores(B, T, S, N).softmax(2)))
    assert len(found.lines) == 3
    assert says(found, "Cannot tell which maps are meant")
    assert "Write one of these:" in str(found)
    # a map that its values show comes before one that only its name does
    maps = pair(decoder_masks=torch.rand(B, T, S, N, requires_grad=True))
    assert doctor(maps).line == doctor(pair()).line
    assert len(doctor(maps).candidates) == 3


def test_a_clip_axis_that_was_squeezed_away() -> None:
    outputs = {"attn": scores(N, S).softmax(1), "alpha": scores(1, S, H, W).softmax(1)}
    found = doctor(outputs)
    assert candidate(found, 'outputs["attn"]').axes == ("(h w) s",)
    expected = expect(outputs["attn"].t().view(1, 1, S, H, W), outputs["alpha"].unsqueeze(1), kind="probs")
    torch.testing.assert_close(loss_of(found.line, outputs), expected)


# --- a tool that harms nothing ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_outputs_stay_as_they_are(dtype: torch.dtype) -> None:
    maps = {name: one.to(dtype) for name, one in pair().items()}
    before = {name: (one.detach().clone(), one._version, one.grad_fn) for name, one in maps.items()}
    found = doctor(maps)
    assert [(one.kind, one.sums_over) for one in found.candidates] == [("probs", "s")] * 2
    for name, (values, version, grad_fn) in before.items():
        assert torch.equal(maps[name], values)
        assert (maps[name]._version, maps[name].grad_fn) == (version, grad_fn)
    loss_of(found.line, maps).backward()


def test_tensors_of_other_kinds_are_passed_over() -> None:
    odd = {
        "mask": torch.eye(4).to_sparse(),
        "attn_nested": torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)], layout=torch.jagged),
        "attn_complex": torch.zeros(B, T, S, N, dtype=torch.complex64),
        "attn_empty": torch.zeros(B, 0, S, N),
        "attn_scalar": torch.zeros(()),
        "attn_ints": torch.zeros(B, T, S, N, dtype=torch.int64),
    }
    assert len(doctor({**pair(), **odd}).candidates) == 2
    assert len(doctor(odd).lines) == 0


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_without_values_names_and_shapes_speak(where: str) -> None:
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        maps = {"attn": torch.zeros(B, T, S, N), "alpha": torch.zeros(B, T, S, N)}
        found = doctor(maps)
    assert [one.role for one in found.candidates] == ["encoder", "decoder"]
    assert says(found, 'outputs["attn"] has no values to read')


def test_large_outputs_take_little_time_and_no_copy() -> None:
    wide = torch.randn(1, 1, 15, 64, 64).softmax(2)
    large: dict[str, Any] = {
        # of 400 GB, if it were one
        "attn": wide.expand(2000, 3200, 15, 64, 64),
        "masks": torch.randn(1, 1, 15, 64, 64).softmax(2).expand(2000, 3200, 15, 64, 64),
        "alpha": torch.rand(2, 8, 15, 256, 256),
        **{f"attn{i}": torch.rand(B, T, S, 16) for i in range(300)},
        "many": [torch.zeros(3, 4) for _ in range(50_000)],
    }
    start = time.perf_counter()
    found = doctor(large)
    assert time.perf_counter() - start < 20
    assert candidate(found, 'outputs["attn"]').sums_over == "s"
    (one, *_), _ = suspects_in([Found(large["attn"], "attn", ("attn",))], Hints())
    assert probabilities_of(one, one.best[0]).numel() < 2**21
    assert sum(reason.startswith("not looked at") for _, reason in found.left_out) > 250


def test_hints_are_checked() -> None:
    maps = pair()
    refuses(
        ValueError,
        "`video` must have shape (B, T, ., H, W), or (B, ., H, W) for images; got (2, 3)",
        doctor,
        maps,
        video=(2, 3),
    )
    refuses(
        ValueError, "`num_frames` must be that of `video`, 3; got 4", doctor, maps, video=(2, 3, 3, 8, 8), num_frames=4
    )
    refuses(
        ValueError, "`video` must have shape (B, T, ., H, W), or (B, ., H, W) for images; got 3", doctor, maps, video=3
    )
    refuses(ValueError, "`num_slots` must be at least 1; got 0", doctor, maps, num_slots=0)
    refuses(TypeError, "`num_frames` must be an integer; got str", doctor, maps, num_frames="3")
    refuses(ValueError, "`grid` must be (H, W)", doctor, maps, grid=(0, 3))
    refuses(TypeError, "`loss` must be SSyncLoss; got str", doctor, maps, loss="ssync")


def test_the_text() -> None:
    enc, dec = scores(B, T, N, S).softmax(3), scores(B, T, S, N).softmax(2).detach()
    text = str(doctor({"attn": enc, "masks": dec, "feature": scores(B, T, N, D)}, name="out"))
    assert (
        re.sub(r" {8}.*\n", "", text)
        == """\
Maps:
    encoder: out["attn"] (2, 3, 64, 7), axes "b t (h w) s", probs, sums over s are constant, gradient
    decoder: out["masks"] (2, 3, 7, 64), axes "b t s (h w)", probs, sums over s are constant, no gradient
Not maps:
    out["feature"]: features? axis 2 has the 64 patches, 32 values each
Problems:
    - out["masks"] is detached: a loss of it trains nothing. Take it before the model's detach().
Write:
    criterion = SSyncLoss(kind="probs", axes=("b t (h w) s", "b t s (h w)"), grid=(8, 8))
    loss = loss + criterion(out["attn"], out["masks"])"""
    )


def test_the_text_is_short_however_much_there_is() -> None:
    text = str(doctor({f"attn{i}": torch.rand(B, T, S, 16) for i in range(300)}))
    assert text.count("\n") < 120
    assert "    and 268 more." in text.splitlines()
