"""SlotCurri's curriculum (Moon, Seong & Heo, CVPR 2026): few slots first, then children of the worst ones.

    python examples/neighbors/slot_curriculum.py                    # one seed, about four minutes on one core
    python examples/neighbors/slot_curriculum.py --seeds 0 1 2      # mean ± sd over three
    python examples/neighbors/slot_curriculum.py --table examples/neighbors/results/slot_curriculum.json

Every slot lowers the reconstruction error, so a model with all slots from the start uses all of them and cuts objects
into pieces. The curriculum starts with two slots and adds children of those with the largest error, as published after
10 % and 25 % of the training. Is there less fragmentation?

Here six slots share three to five things, so a second slot for one thing is missing at another. With nine slots
(`--slots 9`), the default of the other examples, every thing has several. The published shares train two slots for 150
of the 1500 steps, and the learning rate rises in a quarter of these. So the curriculum also runs with longer stages,
which end after 15 % and 30 %. SSync starts at 30 %, too.
"""

import sys
from functools import partial
from math import nan
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # lets this file run as a script

from examples.checkpoint import Settings
from examples.data import DESCRIPTION, TEST_SEED, held_out, training_clips
from examples.evaluation import EvaluationSet, evaluate, maps_of
from examples.neighbors.study import OWN, Column, Method, Options, Scores, Study, main, with_ssync
from examples.slot_model import SlotModel, SlotOutput

from ssync_loss.curriculum import SlotCurriculum, slot_schedule
from ssync_loss.metrics import MetricAverage, fragmentation, masks_to_labels

PUBLISHED, LONGER = "+ curriculum", "+ curriculum, longer stages"
COLUMNS = (
    Column("fragmentation", "dec_fragmentation", 2),
    Column("of the background", "fragmentation_background", 2),
    Column("FG-ARI", "dec_fg_ari", 3),
    Column("ARI", "dec_ari", 3),
)


class Curriculum(Method):
    """Two slots, then more, then all, with two calls per step."""

    def __init__(self, model: SlotModel, settings: Settings, *, shares: tuple[float, float] = (0.10, 0.25)) -> None:
        super().__init__(model, settings)
        budgets = slot_schedule(settings.slots)
        ends = [int(share * settings.steps) for share in shares]
        # five slots or fewer have fewer stages
        self.curriculum = SlotCurriculum(budgets, ends[: len(budgets) - 1])

    def forward(self, features: Tensor) -> SlotOutput:
        """Run the model with the slots in use."""
        output: SlotOutput = self.model(features, num_slots=self.curriculum.n_active())
        return output

    def loss(self, output: SlotOutput, features: Tensor, step: int) -> Tensor:
        """Record the errors of the slots; nothing is added to the loss."""
        masks = output.dec_logits.detach().softmax(dim=2)
        self.curriculum.observe(output.reconstruction, features, masks, step)
        return super().loss(output, features, step)

    def after_step(self, optimizer: Optimizer, step: int) -> None:
        """Add slots at a milestone."""
        self.curriculum.maybe_expand(self.model.initial_slots, step, optimizer)


def pieces(model: SlotModel, data: EvaluationSet) -> Scores:
    """Count the slots mostly inside an object, over objects that have one, and the slots mostly in the background."""
    assert data.ids is not None  # these have ground truth
    with torch.no_grad():
        labels = masks_to_labels(maps_of(model, data.features)[1], (data.ids.shape[-2], data.ids.shape[-1]))
    objects = MetricAverage(fragmentation, background=0, over="found")
    objects.update(labels, data.ids)
    background = MetricAverage(fragmentation, background=0)
    # swap the roles of objects and background
    background.update(labels, (data.ids == 0).long())
    # with few slots or after few steps, no object may have a slot
    found = objects.compute().item() if objects.state[1] > 0 else nan
    return {"fragmentation_found": found, "fragmentation_background": background.compute().item()}


def build(options: Options) -> tuple[Study, Tensor]:
    """Make the clips and the study."""
    num_train, num_test = (48, 8) if options.quick else (1500, 200)
    features, featurize = training_clips(num_train)
    test = held_out(featurize, num_test, seed=TEST_SEED)
    settings = Settings(data=DESCRIPTION, num_clips=num_train, slots=options.slots, steps=options.steps)
    study = Study(
        title="Fragmentation: slots that lie mostly inside an object, or inside the background.",
        methods={OWN: Method, PUBLISHED: Curriculum, LONGER: partial(Curriculum, shares=(0.15, 0.30))},
        readings={"": lambda model: evaluate(model, test, settings.threshold) | pieces(model, test)},
        columns=COLUMNS,
        settings=settings,
        compared_with={with_ssync(LONGER): LONGER},
        alone=[PUBLISHED],
    )
    return study, features


if __name__ == "__main__":
    sys.exit(main("slot_curriculum", "Slots in a curriculum against all at once.", build, None, slots=6))
