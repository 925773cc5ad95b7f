"""The example of affinity consistency: its crops, its teacher and its scores."""

import pytest
import torch
from examples.checkpoint import Settings
from examples.neighbors import affinity_consistency as example
from examples.slot_model import SlotModel
from torch import Tensor

from ssync_loss.functional import affinity_consistency_loss

SETTINGS = Settings(data="noise", num_clips=2, slots=3, steps=10)


@pytest.fixture
def model() -> SlotModel:
    torch.manual_seed(0)
    return SlotModel(3)


@pytest.fixture
def features() -> Tensor:
    return torch.randn(2, 4, 24, 12, 12, generator=torch.Generator().manual_seed(1))


class TestAffinity:
    def test_it_uses_the_library_and_trains_only_the_encoder(self, model: SlotModel, features: Tensor) -> None:
        method = example.Affinity(model, SETTINGS)
        student, teacher = (torch.randn(2, 4, 5, 3, 3) for _ in range(2))
        torch.testing.assert_close(method.compare(student, teacher), affinity_consistency_loss(student, teacher))
        output = model(features)
        method.loss(output, features, 0).backward()
        touched = {name.split(".")[0] for name, one in model.named_parameters() if one.grad is not None}
        assert touched == {"encoder"}
        assert all(one.grad is None for one in method.teacher.parameters())

    def test_the_teacher_follows_the_encoder(self, model: SlotModel) -> None:
        method = example.Affinity(model, SETTINGS)
        before = method.teacher.model.get_parameter("mlp.1.weight").clone()
        with torch.no_grad():
            model.encoder.get_parameter("mlp.1.weight").add_(1.0)
        method.after_step(torch.optim.SGD(model.parameters()), 0)
        moved = method.teacher.model.get_parameter("mlp.1.weight") - before
        assert 0 < moved.mean() < 0.01

    def test_the_teacher_is_constant_at_the_end_of_training(self, model: SlotModel) -> None:
        method = example.Affinity(model, SETTINGS)
        assert method.teacher.current_momentum() == 0.996
        for step in range(SETTINGS.steps):
            method.after_step(torch.optim.SGD(model.parameters()), step)
        assert method.teacher.current_momentum() == 1

    def test_agreement_is_zero_for_tokens_in_the_same_direction(self, model: SlotModel) -> None:
        method = example.Agreement(model, SETTINGS)
        tokens = torch.randn(2, 4, 5, 3, 3)
        assert method.compare(3 * tokens, tokens).abs() < 1e-6
        assert method.compare(-tokens, tokens) > 1.99


class TestCarry:
    def test_perfect_features_score_one(self) -> None:
        ids = torch.zeros(1, example.NUM_FRAMES, 4, 4, dtype=torch.int64)
        for t in range(example.NUM_FRAMES):
            ids[0, t, :, t % 2 : t % 2 + 2] = 1
        features = torch.nn.functional.one_hot(ids, 2).movedim(-1, 2).float() + 0.01
        assert example.carry(features, ids) == {"j_and_f": 1.0, "j": 1.0, "f": 1.0}


class TestCrops:
    def test_the_student_sees_crops_and_the_teacher_whole_frames(
        self, model: SlotModel, features: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        corners = [(0, 2), (6, 0), (3, 5), (1, 1)]
        monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor(corners))
        method = example.Affinity(model, SETTINGS)
        with torch.no_grad():
            model.encoder.get_parameter("mlp.1.weight").mul_(2)  # the teacher keeps the earlier weights
        student, teacher = [], []
        for t, (y, x) in enumerate(corners):
            here = (..., slice(y, y + 6), slice(x, x + 6))
            student.append(model.encoder(features[:, t : t + 1][here]))
            whole = method.teacher(features[:, t : t + 1])
            teacher.append(whole.view(2, 1, 12, 12, 48).movedim(-1, 2)[here].flatten(3).mT)
        expected = 0.01 * affinity_consistency_loss(torch.cat(student, 1), torch.cat(teacher, 1))
        torch.testing.assert_close(method.loss(model(features), features, 0), expected)

    def test_frames_have_independent_crops_at_all_places(
        self, model: SlotModel, features: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn, randint = [], torch.randint

        def spy(high: int, size: tuple[int, int]) -> Tensor:
            drawn.append(randint(high, size))
            return drawn[-1]

        monkeypatch.setattr(torch, "randint", spy)
        method, output = example.Affinity(model, SETTINGS), model(features)
        for step in range(40):
            method.loss(output, features, step)
        places = torch.stack(drawn)
        assert places.shape == (40, 4, 2)
        assert places.unique().tolist() == [0, 1, 2, 3, 4, 5, 6]
        assert (places[:, 0] != places[:, 1]).any(1).sum() > 30


def test_scores_count_objects_of_the_first_frame_in_later_frames() -> None:
    torch.manual_seed(0)
    ids = torch.zeros(1, 3, 12, 12, dtype=torch.int64)
    ids[:, :, 2:6, 2:6], ids[:, 1:, 8:11, 8:11] = 1, 2
    features = torch.randn(1, 3, 5, 12, 12)
    scores = example.carry(features, ids)
    assert scores == example.carry(features, torch.where(ids == 2, 0, ids))
    assert scores["j_and_f"] == pytest.approx((scores["j"] + scores["f"]) / 2)
    assert scores["f"] != scores["j"]
