"""The example of the structure-aware loss: its term and its scores."""

import math

import pytest
import torch
from examples.checkpoint import Settings
from examples.data import held_out
from examples.features import FrozenFeatures
from examples.moving_objects import moving_objects
from examples.neighbors import structure_aware as example
from examples.neighbors.study import Method
from examples.slot_model import SlotModel, reconstruction_loss
from torch import Tensor

from ssync_loss.functional import structure_aware_loss


@pytest.fixture
def model() -> SlotModel:
    torch.manual_seed(0)
    return SlotModel(3, feature_dim=5, dim=8)


@pytest.fixture
def features() -> Tensor:
    return torch.randn(2, 4, 5, 6, 6, generator=torch.Generator().manual_seed(1))


class TestStructureAware:
    def method(self, model: SlotModel, weight: float) -> Method:
        return example.StructureAware(model, Settings(data="x", num_clips=2), weight=weight)

    def test_it_compares_the_reconstruction_with_the_features(self, model: SlotModel, features: Tensor) -> None:
        output = model(features)
        loss = self.method(model, 2.0).loss(output, features, 0)
        expected = 2 * structure_aware_loss(output.reconstruction, features, filters="torch")
        torch.testing.assert_close(loss, expected)
        assert 0.5 < loss.item() < 4
        loss.backward()
        assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in model.parameters())

    def test_pull_is_a_ratio_of_gradient_norms(self, model: SlotModel, features: Tensor) -> None:
        def norm(loss: Tensor) -> float:
            model.zero_grad()
            loss.backward()
            squares = [p.grad.square().sum().item() for p in model.parameters() if p.grad is not None]
            return math.sqrt(sum(squares))

        structure = norm(structure_aware_loss(model(features).reconstruction, features, filters="torch"))
        error = norm(reconstruction_loss(model(features), features))
        assert example.pull(model, features) == pytest.approx(structure / error, rel=1e-4)


def test_the_control_doubles_the_squared_error(model: SlotModel, features: Tensor) -> None:
    output = model(features)
    loss = example.MoreError(model, Settings(data="x", num_clips=2)).loss(output, features, 0)
    assert torch.equal(loss, reconstruction_loss(output, features))


class TestEdges:
    ids = torch.tensor([[0, 0, 1], [0, 0, 1]]).view(1, 1, 2, 3)

    def test_contrast_of_a_copy_is_1_and_of_a_constant_0(self) -> None:
        wanted = torch.randn(1, 1, 4, 2, 3, generator=torch.Generator().manual_seed(0))
        assert example.edge_contrast(wanted, wanted, self.ids) == pytest.approx(1)
        assert example.edge_contrast(wanted / 4 + 3, wanted, self.ids) == pytest.approx(0.25)
        assert example.edge_contrast(torch.ones_like(wanted), wanted, self.ids) == 0

    def test_contrast_uses_only_edges_in_both_directions(self) -> None:
        # the features step by 1 to the right and by 2 down; ids change at one step right and two steps down
        wanted = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).view(1, 1, 1, 2, 2)
        ids = torch.tensor([[0, 1], [2, 2]]).view(1, 1, 2, 2)
        made = torch.tensor([[0.0, 3.0], [2.0, 3.0]]).view(1, 1, 1, 2, 2)
        # the steps made are 3 for 1, 2 for 2 and 0 for 2: (3 + 4 + 0) / (1 + 4 + 4)
        assert example.edge_contrast(made, wanted, ids) == pytest.approx(7 / 9)

    def test_masks_as_sharp_as_the_objects(self) -> None:
        masks = torch.nn.functional.one_hot(self.ids).movedim(-1, 2).float()
        assert example.mask_steps(masks, self.ids) == (1, 0)
        assert example.mask_steps(torch.full_like(masks, 0.5), self.ids) == (0, 0)

    def test_fragments_are_steps_inside(self) -> None:
        # the left surface is split from top to bottom, which changes two of five inner steps
        masks = torch.nn.functional.one_hot(torch.tensor([[0, 2, 1], [0, 2, 1]]).view(1, 1, 2, 3)).movedim(-1, 2)
        assert example.mask_steps(masks.float(), self.ids) == pytest.approx((1, 2 / 5))

    def test_a_patch_has_its_most_frequent_surface(self) -> None:
        ids = torch.zeros(1, 1, 4, 12, dtype=torch.int64)
        ids[..., :3], ids[..., 7] = 2, 1
        patches, mixed = example.patch_ids(ids)
        assert patches.tolist() == [[[[2, 0, 0]]]]
        assert mixed.tolist() == [[[[True, True, False]]]]

    def test_painted_patches_have_the_mean_of_their_surface(self) -> None:
        features = torch.tensor([[1.0, 3.0, 8.0], [2.0, 6.0, 7.0]]).view(1, 2, 1, 1, 3)
        ids = torch.tensor([[0, 0, 1], [0, 2, 2]]).view(1, 2, 1, 3)
        assert example.painted(features, ids).flatten().tolist() == [2, 2, 8, 2, 6.5, 6.5]

    def test_ground_truth_masks_are_sharper_than_an_untrained_model(self) -> None:
        clips = moving_objects(8, seed=0)
        featurize = FrozenFeatures().fit(clips.video)
        data = held_out(featurize, 8, seed=5)
        assert data.ids is not None
        torch.manual_seed(0)
        model = SlotModel(3)
        scores = example.sharpness(model, data)
        assert {column.key for column in example.COLUMNS if not column.key.startswith("dec_")} <= scores.keys()
        ids, mixed = example.patch_ids(data.ids)
        best = example.painted(data.features, ids)
        assert example.edge_contrast(best, data.features, ids) > scores["contrast"] + 0.2
        error = (model(data.features).reconstruction - data.features).square().mean(2)
        assert scores["error_at_edges"] == pytest.approx(error[mixed].mean().item(), rel=1e-4)
        assert scores["error_inside"] == pytest.approx(error[~mixed].mean().item(), rel=1e-4)
