"""The example of correspondence over time: its terms, its teacher and its scores."""

import copy

import pytest
import torch
import torch.nn.functional as F
from examples.checkpoint import Settings
from examples.data import held_out
from examples.features import FrozenFeatures
from examples.moving_objects import moving_objects
from examples.neighbors import temporal_correspondence as example
from examples.neighbors.study import Training
from examples.slot_model import SlotModel, slot_contrast_loss
from torch import Tensor

from ssync_loss.functional import (
    instance_consistency_loss,
    mask_diversity_loss,
    semantic_consistency_loss,
)
from ssync_loss.metrics import masks_to_labels, video_fg_ari

SETTINGS = Settings(data="noise", num_clips=8, slots=7, steps=10, batch_size=4, contrast_weight=0.0)
FEATURES = torch.randn(8, 3, 24, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def method() -> example.Correspondence:
    torch.manual_seed(0)
    return example.Correspondence(SlotModel(7), SETTINGS)


class TestCorrespondence:
    def test_the_loss_is_the_sum_of_three_terms(self, method: example.Correspondence) -> None:
        with torch.no_grad():
            # the student differs from its teacher, and its masks are sharp enough for valid slots
            method.model.attention.to_query.weight.mul_(30)
            next(method.project.parameters()).mul_(2)
        ours, taught = method.model(FEATURES), method.teacher.model(FEATURES)
        assert not torch.equal(ours.enc_logits, taught.enc_logits)
        embedded = F.normalize(method.project(ours.slots), dim=3).unsqueeze(2)
        teacher_embedded = F.normalize(method.teacher_project.model(taught.slots), dim=3).unsqueeze(2)
        # a slot is valid if its probability exceeds 1/2 on more than 1/20 of a frame
        shares = ((output.enc_logits.softmax(2) > 0.5).double().mean((3, 4)) for output in (ours, taught))
        valid, teacher_valid = (share.unsqueeze(2) > 0.05 for share in shares)
        assert valid.any()
        expected = (
            semantic_consistency_loss(ours.enc_logits, taught.enc_logits, FEATURES, pool=2)
            + mask_diversity_loss(ours.enc_logits)
            + instance_consistency_loss(embedded, teacher_embedded, valid, teacher_valid)
        )
        torch.testing.assert_close(method.loss(ours, FEATURES, 0), 0.1 * expected)

    def test_only_the_student_without_its_decoder_gets_gradients(self, method: example.Correspondence) -> None:
        with torch.no_grad():
            method.model.attention.to_query.weight.mul_(30)
        method.loss(method.model(FEATURES), FEATURES, 0).backward()
        for name, parameter in [*method.model.named_parameters(), *method.project.named_parameters()]:
            if name.startswith("decoder"):
                assert parameter.grad is None, name
            else:
                assert parameter.grad is not None, name
                assert parameter.grad.abs().sum() > 0, name
        for teacher in (method.teacher, method.teacher_project):
            assert all(parameter.grad is None for parameter in teacher.parameters())

    def test_the_teacher_is_a_moving_average(self) -> None:
        run = Training.start(example.Correspondence, SETTINGS, 0)
        assert isinstance(run.method, example.Correspondence)
        pairs = ((run.method.teacher.model, run.model), (run.method.teacher_project.model, run.method.project))
        before = [copy.deepcopy(teacher.state_dict()) for teacher, _ in pairs]
        for first, (_, student) in zip(before, pairs, strict=True):
            assert all(torch.equal(first[name], value) for name, value in student.state_dict().items())
        with torch.no_grad():
            run.model.attention.to_query.weight.mul_(30)  # otherwise no slot is valid
        run.train(FEATURES, until=1, criterion=None, title="")
        for first, (teacher, student) in zip(before, pairs, strict=True):
            now = student.state_dict()
            assert any(not torch.equal(now[name], first[name]) for name in now)
            for name, value in teacher.state_dict().items():
                torch.testing.assert_close(value, 0.99 * first[name] + 0.01 * now[name])


def test_the_contrast_has_its_usual_weight() -> None:
    output = SlotModel(4)(FEATURES)
    usual = Settings(data="noise", num_clips=8).contrast_weight
    term = example.SlotContrast(SlotModel(4), SETTINGS).loss(output, FEATURES, 0)
    torch.testing.assert_close(term, usual * slot_contrast_loss(output.slots))


def clip(*frames: list[int]) -> Tensor:
    return torch.tensor(frames).view(1, len(frames), 1, -1)


class TestKept:
    def test_swapped_slots_score_zero(self) -> None:
        ids, masks = clip([1, 1, 2, 2], [1, 1, 2, 2]), clip([0, 0, 1, 1], [1, 1, 0, 0])
        assert example.kept(ids - 1, ids) == (1, 1)
        assert example.kept(masks, ids) == (0, 0)
        # the FG-ARI of the clip falls, too
        assert video_fg_ari(masks, ids, background=0) < video_fg_ari(ids, ids, background=0) == 1

    def test_a_slot_that_comes_back_counts_in_the_last_frame(self) -> None:
        ids, masks = clip([1, 1], [1, 1], [1, 1]), clip([4, 4], [2, 2], [4, 4])
        assert example.kept(masks, ids) == (0, 1)

    def test_objects_must_be_seen_in_both_frames(self) -> None:
        # object 1 is visible in two consecutive frames, object 2 only in the first frame
        ids, masks = clip([1, 1, 2, 2], [1, 1, 0, 0], [0, 0, 0, 0]), clip([0, 0, 1, 1], [0, 0, 2, 2], [3, 3, 3, 3])
        following, last = example.kept(masks, ids)
        assert following == 1
        assert last != last  # no object is visible in both the first and the last frame

    def test_the_best_slot_has_the_largest_iou(self) -> None:
        # slot 0 covers two thirds of the object and its surroundings; slot 1 covers only a third of the object
        ids = clip([1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0])
        masks = clip([0, 0, 1, 0, 0, 0, 0], [2, 2, 1, 2, 2, 2, 2])
        assert example.kept(masks, ids) == (1, 1)

    def test_every_clip_counts_the_same(self) -> None:
        many, few = clip([1, 2, 3], [1, 2, 3]), clip([1, 1, 1], [1, 1, 1])
        ids, masks = torch.cat([many, few]), torch.cat([many, clip([0, 0, 0], [5, 5, 5])])
        assert example.kept(masks, ids) == (0.5, 0.5)

    def test_a_clip_without_recurring_objects_does_not_count(self) -> None:
        ids = torch.cat([clip([0, 0], [1, 1]), clip([1, 1], [1, 1])])
        masks = torch.cat([clip([0, 0], [1, 1]), clip([3, 3], [3, 3])])
        assert example.kept(masks, ids) == (1, 1)


def test_scores_use_the_masks_of_the_decoder() -> None:
    featurize = FrozenFeatures().fit(moving_objects(8, seed=0).video)
    data = held_out(featurize, 8, seed=5, speed=example.SPEED)
    assert data.ids is not None
    torch.manual_seed(0)
    model = SlotModel(3)
    scores = example.score(model, data, 0.6)
    assert {column.key for column in example.COLUMNS} <= scores.keys()
    with torch.no_grad():
        masks = masks_to_labels(model(data.features).dec_logits, (48, 48))
    assert (scores["kept_next"], scores["kept_last"]) == example.kept(masks, data.ids)
    assert scores["lost_over_time"] == scores["frame_fg_ari"] - scores["dec_fg_ari"]


def test_fast_clips_equal_slow_clips_with_skipped_frames() -> None:
    slow, fast = moving_objects(30, seed=4, num_frames=10), moving_objects(30, seed=4, speed=0.15)
    assert torch.equal(slow.colors, fast.colors)
    # rounding moves some edges
    assert (slow.ids[:, ::3] == fast.ids).double().mean() > 0.9999
    assert (slow.ids[:, :4] == fast.ids).double().mean() < 0.95
