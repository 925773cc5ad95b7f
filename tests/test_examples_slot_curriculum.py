"""The example of the curriculum: new slots, and the fragmentation scores."""

from math import isnan

import pytest
import torch
from examples.checkpoint import Settings
from examples.evaluation import EvaluationSet
from examples.neighbors import slot_curriculum as example
from examples.neighbors.study import Training
from examples.slot_model import SlotModel

FEATURES = torch.randn(8, 2, 24, 4, 4, generator=torch.Generator().manual_seed(0))


def test_slots_are_added_at_milestones_and_trained_afterwards() -> None:
    # 10 % and 25 % of 20 steps are the steps 2 and 5
    settings = Settings(data="noise", num_clips=8, slots=6, steps=20, batch_size=4)
    run = Training.start(example.Curriculum, settings, 0)
    assert isinstance(run.method, example.Curriculum)
    seen, before = [], run.model.initial_slots.detach().clone()
    for step in range(8):
        num_slots = run.method.curriculum.n_active()
        run.train(FEATURES, until=step + 1, criterion=None, title="")
        after = run.model.initial_slots.detach().clone()
        changed = (after != before).any(1)
        seen.append(num_slots)
        # active rows are trained, a milestone writes the new rows, and no other row changes
        written = run.method.curriculum.n_active()
        assert changed.tolist() == [True] * written + [False] * (6 - written)
        before = after
    assert seen == [2, 2, 2, 3, 3, 3, 6, 6]


def test_the_model_uses_the_active_slots_and_the_curriculum_adds_no_loss() -> None:
    model = SlotModel(6)
    method = example.Curriculum(model, Settings(data="noise", num_clips=8, slots=6, steps=20))
    output = method.forward(FEATURES)
    assert output.dec_logits.shape == (8, 2, 2, 4, 4)
    torch.testing.assert_close(output.dec_logits, model(FEATURES, num_slots=2).dec_logits)
    assert method.loss(output, FEATURES, 0) == 0


def test_fragmentation_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # slots 0 and 1 share the background, slots 2 and 3 share object 1, and no slot has object 2
    ids = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 2]]).view(1, 1, 3, 4)
    slots = torch.tensor([[0, 0, 2, 2], [1, 1, 3, 3], [1, 1, 1, 1]]).view(1, 1, 3, 4)
    logits = 9.0 * torch.nn.functional.one_hot(slots, 4).movedim(-1, 2)
    monkeypatch.setattr(example, "maps_of", lambda *_: (logits, logits))
    data = EvaluationSet(torch.zeros(1, 1, 3, 3, 4), torch.zeros(1, 1, 24, 3, 4), ids)
    assert example.pieces(SlotModel(4), data) == {"fragmentation_found": 2.0, "fragmentation_background": 2.0}
    # a slot with all patches lies mostly in the background
    monkeypatch.setattr(example, "maps_of", lambda *_: (torch.ones(1, 1, 1, 3, 4),) * 2)
    assert isnan(example.pieces(SlotModel(1), data)["fragmentation_found"])
