"""SlotCurri's structure-aware loss (Moon, Seong & Heo, CVPR 2026): do objects get sharper edges?

    pip install -e ".[examples]"
    python examples/neighbors/structure_aware.py                    # one seed, less than four minutes on one core
    python examples/neighbors/structure_aware.py --seeds 0 1 2      # mean ± sd over three
    python examples/neighbors/structure_aware.py --table examples/neighbors/results/structure_aware.json

A mean squared error averages, and edges blur. One line more compares the structure of cubes of features, which should
keep edges sharp in the reconstruction and in the masks.

The squared error grows with the square of the features, but the structure term does not. So the effect of the published
weight of 0.05 depends on the backbone. Here its gradient is a small part of the squared error's. So another run has the
weight at which both gradients are about equal. A run with the squared error twice shows how much more weight against
the slot contrast sharpens the reconstruction.
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # lets this file run as a script

from examples.checkpoint import Settings
from examples.data import DESCRIPTION, TEST_SEED, held_out, training_clips
from examples.evaluation import BATCH, EvaluationSet, evaluate
from examples.features import PATCH
from examples.neighbors.study import OWN, Column, Method, Options, Scores, Study, main
from examples.slot_model import SlotModel, SlotOutput, reconstruction_loss

from ssync_loss import StructureAwareLoss
from ssync_loss.metrics import MetricAverage, contour_accuracy, masks_to_labels

PUBLISHED, EQUAL = 0.05, 2.0
AGAIN = "+ squared error again"
# two pixels, half a patch, in frames of 48 x 48
TOLERANCE = 0.029

COLUMNS = (
    Column("edge contrast", "contrast", 3),
    Column("mask step at edges", "step_at_edges", 3),
    Column("FG-ARI", "dec_fg_ari", 3),
    Column("fragmentation", "dec_fragmentation", 2),
)


class StructureAware(Method):
    """The own losses, and the structure of the features."""

    def __init__(self, model: SlotModel, settings: Settings, *, weight: float) -> None:
        super().__init__(model, settings)
        self.weight, self.structure = weight, StructureAwareLoss(filters="torch")

    def loss(self, output: SlotOutput, features: Tensor, step: int) -> Tensor:  # noqa: ARG002 (the same at every step)
        """Compare cubes of features."""
        term: Tensor = self.weight * self.structure(output.reconstruction, features)
        return term


class MoreError(Method):
    """The own losses, with the squared error twice."""

    def loss(self, output: SlotOutput, features: Tensor, step: int) -> Tensor:  # noqa: ARG002 (the same at every step)
        """Compute the squared error once more."""
        return reconstruction_loss(output, features)


def sharpness(model: SlotModel, data: EvaluationSet) -> Scores:
    """Score the edges of reconstruction and masks.

    Errors are mean squared errors of the reconstruction, in patches with more than one surface and in the others.
    Contour F is the F-measure of the contours of objects and slots, matched one to one.
    """
    with torch.no_grad():
        outputs = [model(batch) for batch in torch.split(data.features, BATCH)]
    made = torch.cat([output.reconstruction for output in outputs])
    alpha = torch.cat([output.dec_logits for output in outputs])
    assert data.ids is not None  # these have ground truth
    ids, mixed = patch_ids(data.ids)
    error = reduce((made - data.features).square(), "b t d h w -> b t h w", "mean")
    at_edges, inside = mask_steps(alpha.softmax(dim=2), ids)
    contour = MetricAverage(contour_accuracy, background=0, matching="hungarian", tolerance=TOLERANCE)
    contour.update(masks_to_labels(alpha, (data.ids.shape[-2], data.ids.shape[-1])), data.ids)
    return {
        "contrast": edge_contrast(made, data.features, ids),
        "error_at_edges": error[mixed].mean().item(),
        "error_inside": error[~mixed].mean().item(),
        "step_at_edges": at_edges,
        "step_inside": inside,
        "contour_f": contour.compute().item(),
        "structure": StructureAwareLoss(filters="torch")(made, data.features).item(),
        "pull": pull(model, data.features[:BATCH]),
    }


def edge_contrast(made: Tensor, wanted: Tensor, ids: Tensor) -> float:
    """Measure the share of the features' steps across edges that a reconstruction makes.

    ``sum of <made_p - made_q, wanted_p - wanted_q> / sum of |wanted_p - wanted_q|^2`` over neighboring patches p, q of
    different surfaces. A copy has 1, a constant has 0, and noise adds nothing.

    Shape:
        made, wanted: (B, T, D, H, W). ids: (B, T, H, W).

    >>> wanted, made = torch.tensor([0.0, 0.0, 4.0, 4.0]), torch.tensor([0.0, 1.0, 3.0, 4.0])
    >>> ids = torch.tensor([0, 0, 1, 1])
    >>> edge_contrast(made.view(1, 1, 1, 1, 4), wanted.view(1, 1, 1, 1, 4), ids.view(1, 1, 1, 4))  # 2 of 4
    0.5
    """
    along, whole = 0.0, 0.0
    for axis in (-2, -1):
        step = wanted.diff(dim=axis) * ids.diff(dim=axis).ne(0).unsqueeze(2)
        along += (made.diff(dim=axis) * step).sum().item()
        whole += step.square().sum().item()
    return along / whole


def mask_steps(masks: Tensor, ids: Tensor) -> tuple[float, float]:
    """Measure how much neighboring masks differ across edges and inside surfaces.

    Returns the mean of ``1/2 sum over slots of |mask_p - mask_q|`` over neighboring patches p, q of different surfaces,
    and over those of the same surface. Perfect masks have 1 and 0, and constant masks have 0 and 0.

    Shape:
        masks: (B, T, S, H, W), a distribution over slots. ids: (B, T, H, W).

    >>> mask, ids = torch.tensor([1.0, 0.75, 0.25, 0.0]), torch.tensor([0, 0, 1, 1])
    >>> mask_steps(torch.stack([mask, 1 - mask]).view(1, 1, 2, 1, 4), ids.view(1, 1, 1, 4))
    (0.5, 0.25)
    """
    step = torch.cat([masks.diff(dim=axis).abs().sum(dim=2).flatten() / 2 for axis in (-2, -1)])
    across = torch.cat([ids.diff(dim=axis).ne(0).flatten() for axis in (-2, -1)])
    return step[across].mean().item(), step[~across].mean().item()


def pull(model: SlotModel, features: Tensor) -> float:
    """Divide the norm of the gradient of the structure-aware loss by that of the mean squared error."""
    output = model(features)
    losses = StructureAwareLoss(filters="torch")(output.reconstruction, features), reconstruction_loss(output, features)
    parameters = list(model.parameters())
    slopes = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    structure, error = (torch.cat([part.flatten() for part in slope]).norm() for slope in slopes)
    ratio: float = (structure / error).item()
    return ratio


def patch_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most frequent surface of each patch, and whether it has more than one: both (B, T, h, w)."""
    seen = rearrange(ids, "b t (h p) (w q) -> b t h w (p q)", p=PATCH, q=PATCH)
    return seen.mode(dim=-1).values, seen.amin(dim=-1) != seen.amax(dim=-1)


def painted(features: Tensor, ids: Tensor) -> Tensor:
    """Give every patch the mean feature of its surface in the frame, the best reconstruction with a slot per surface.

    Shape:
        features: (B, T, D, H, W). ids: (B, T, H, W). Returns (B, T, D, H, W).
    """
    masks = F.one_hot(ids).to(features)
    area = reduce(masks, "b t h w k -> b t k 1", "sum").clamp_min(1)
    mean = einsum(masks, features, "b t h w k, b t d h w -> b t k d") / area
    return einsum(masks, mean, "b t h w k, b t k d -> b t d h w")


def build(options: Options) -> tuple[Study, Tensor]:
    """Make the clips and the study."""
    num_train, num_test = (48, 8) if options.quick else (1500, 200)
    features, featurize = training_clips(num_train)
    test = held_out(featurize, num_test, seed=TEST_SEED)
    assert test.ids is not None
    ids, _ = patch_ids(test.ids)
    at_best = edge_contrast(painted(test.features, ids), test.features, ids)
    settings = Settings(data=DESCRIPTION, num_clips=num_train, steps=options.steps, slots=options.slots)
    weak, strong = (f"+ structure, weight {weight:g}" for weight in (PUBLISHED, EQUAL))
    study = Study(
        title="Edge contrast: share of the features' step between surfaces that the reconstruction makes (best "
        f"{at_best:.3f}). Mask step: part of a patch that changes slots to the next one.",
        methods={
            OWN: Method,
            AGAIN: MoreError,
            weak: partial(StructureAware, weight=PUBLISHED),
            strong: partial(StructureAware, weight=EQUAL),
        },
        readings={"": lambda model: evaluate(model, test, settings.threshold) | sharpness(model, test)},
        columns=COLUMNS,
        settings=settings,
        alone=[AGAIN, weak],
    )
    return study, features


if __name__ == "__main__":
    sys.exit(main("structure_aware", "Edges with and without the structure-aware loss.", build, None, steps=1000))
