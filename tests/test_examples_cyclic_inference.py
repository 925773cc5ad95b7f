"""The example of cyclic inference: its scans and its scores."""

import pytest
import torch
from examples.data import held_out
from examples.features import FrozenFeatures
from examples.moving_objects import moving_objects
from examples.neighbors import cyclic_inference as example
from examples.slot_model import SlotModel, SlotOutput
from torch import Tensor


@pytest.fixture
def model() -> SlotModel:
    torch.manual_seed(0)
    return SlotModel(3, feature_dim=5, dim=8).requires_grad_(False)


def features(frames: int, clips: int = 2) -> Tensor:
    return torch.randn(clips, frames, 5, 4, 6, generator=torch.Generator().manual_seed(1))


def looks(
    scan: example.Scan, model: SlotModel, clip: Tensor, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, bool]]:
    """Scan a clip, and return the frame of every step and whether it was treated as the first."""
    tokens, see, seen = model.encoder(clip), model.see, []

    def spy(prior: Tensor, frame: Tensor, *, first: bool) -> object:
        distance = (tokens - frame.unsqueeze(1)).abs().flatten(2).amax(2).amax(0)
        assert distance.min() < 1e-6
        seen.append((int(distance.argmin()), first))
        return see(prior, frame, first=first)

    with monkeypatch.context() as patch:
        patch.setattr(model, "see", spy)
        scan(model, clip)
    return seen


def assert_frame_equal(output: SlotOutput, t: int, expected: SlotOutput, expected_t: int) -> None:
    for values, wanted in zip(output, expected, strict=True):
        torch.testing.assert_close(values[:, t], wanted[:, expected_t], rtol=0, atol=0)


class TestCyclic:
    def test_it_scans_forward_and_back(self, model: SlotModel, monkeypatch: pytest.MonkeyPatch) -> None:
        first = (0, True)
        rest = [(1, False), (2, False), (3, False), (2, False), (1, False), (0, False)]
        assert looks(example.cyclic, model, features(4), monkeypatch) == [first, *rest]

    def test_it_returns_the_backward_pass(self, model: SlotModel) -> None:
        clip = features(3)
        tokens = model.encoder(clip)
        prior = model.initial_slots.expand(2, -1, -1)
        for t in (0, 1, 2, 1):
            seen = model.see(prior, tokens[:, t], first=t == 0)
            prior = seen.predicted
        seen = model.see(prior, tokens[:, 0], first=False)
        output = example.cyclic(model, clip)
        alpha, painted = model.decoder(seen.slots.unsqueeze(1), 4, 6)
        torch.testing.assert_close(output.slots[:, 0], seen.slots)
        torch.testing.assert_close(output.enc_logits[:, 0].flatten(2), seen.dots[-1])
        attention = (seen.dots[0].softmax(-1) + seen.dots[1].softmax(-1)) / 2
        torch.testing.assert_close(output.attention[:, 0].flatten(2), attention)
        torch.testing.assert_close(output.dec_logits[:, :1], alpha)
        torch.testing.assert_close(output.reconstruction[:, :1], painted)

    def test_only_the_last_frame_equals_the_forward_scan(self, model: SlotModel) -> None:
        clip = features(4)
        there, back = example.forward(model, clip), example.cyclic(model, clip)
        assert_frame_equal(back, -1, there, -1)
        assert (there.dec_logits - back.dec_logits).abs().flatten(2).amax(2)[:, :-1].min() > 1e-6

    def test_a_single_frame_equals_the_forward_scan(self, model: SlotModel) -> None:
        clip = features(1)
        assert_frame_equal(example.cyclic(model, clip), 0, example.forward(model, clip), 0)


class TestLongerFirstLook:
    def test_it_has_as_many_steps_as_the_cyclic_scan(self, model: SlotModel, monkeypatch: pytest.MonkeyPatch) -> None:
        rest = [(0, False), (0, False), (0, False), (1, False), (2, False), (3, False)]
        assert looks(example.longer_first_look, model, features(4), monkeypatch) == [(0, True), *rest]

    def test_it_returns_only_the_clip(self, model: SlotModel) -> None:
        clip = features(3)
        output = example.longer_first_look(model, clip)
        again = example.forward(model, clip[:, [0, 0, 0, 1, 2]])
        for t in range(3):
            assert_frame_equal(output, t, again, t + 2)
        assert output.dec_logits.shape[:2] == clip.shape[:2]


class TestScores:
    def test_identity_counts_objects_in_the_first_and_last_frame(self) -> None:
        # object 1 keeps its slot, 2 changes it, 3 disappears, and 4 keeps the slot of its larger part
        ids = torch.tensor([[[[0, 1, 2, 3, 4, 4, 4]], [[0, 0, 0, 0, 0, 0, 0]], [[0, 1, 2, 0, 4, 4, 4]]]])
        labels = torch.tensor([[[[0, 1, 2, 3, 4, 4, 0]], [[5, 5, 5, 5, 5, 5, 5]], [[0, 1, 1, 0, 2, 4, 4]]]])
        assert example.identity(labels, ids) == pytest.approx(2 / 3)

    def test_frames_are_scored_alone_and_together(self) -> None:
        # the same two objects, first segmented correctly, then wrongly
        ids = torch.tensor([[[[0, 1, 1, 2, 2]], [[0, 1, 1, 2, 2]]]])
        labels = torch.tensor([[[[0, 1, 1, 2, 2]], [[0, 1, 2, 1, 2]]]])
        scores = example.score(labels, ids)
        assert (scores["fg_ari_0"], scores["mbo_0"]) == (1, 1)
        # every cell of the table has one pixel: 0 common pairs, 2 · 2 / 6 expected, (2 + 2) / 2 at most
        assert scores["fg_ari_1"] == pytest.approx((0 - 2 / 3) / (2 - 2 / 3))
        assert scores["mbo_1"] == pytest.approx(1 / 3)
        assert scores["fg_ari_mean"] == pytest.approx((1 - 0.5) / 2)
        assert scores["mbo_mean"] == pytest.approx((1 + 1 / 3) / 2)
        # every object has 3 + 1 pixels: 2 · 3 common pairs, 12 · 12 / 28 expected, 12 at most
        assert scores["fg_ari_clip"] == pytest.approx((6 - 144 / 28) / (12 - 144 / 28))

    def test_only_the_first_frame_gets_noise(self) -> None:
        featurize = FrozenFeatures().fit(moving_objects(4, seed=0).video)
        clips = example.Clips(featurize, 3, seed=5)
        expected = held_out(featurize, 3, seed=5, num_frames=8)
        assert expected.ids is not None
        clean, noisy = clips.features[""], clips.features["noisy_"]
        assert torch.equal(clips.ids, expected.ids)
        assert torch.equal(clean, expected.features)
        assert torch.equal(clean[:, 1:], noisy[:, 1:])
        assert (clean - noisy)[:, 0].abs().flatten(1).amax(1).min() > 0.5
