"""SlotCurri's curriculum (Moon, Seong & Heo, CVPR 2026): few slots first, then clones of those that do worst.

    python examples/neighbors/slot_curriculum.py                    # one seed, about three minutes on one core
    python examples/neighbors/slot_curriculum.py --seeds 0 1 2      # mean ± sd over three
    python examples/neighbors/slot_curriculum.py --table examples/neighbors/results/slot_curriculum.json

All slots from the start cut objects into pieces, since every slot lowers the reconstruction error. The curriculum
starts with two and adds more where the error is, at 10 % and 25 % of the training. Is there less fragmentation?
"""

import sys
from pathlib import Path

from torch import Tensor
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # lets this file be started as a script

from examples.checkpoint import Settings
from examples.data import DESCRIPTION, TEST_SEED, held_out, training_clips
from examples.evaluation import evaluate
from examples.neighbors.study import OWN, Column, Method, Options, Study, main
from examples.slot_model import SlotModel, SlotOutput

from ssync_loss.curriculum import SlotCurriculum, milestones, slot_schedule

COLUMNS = (
    Column("FG-ARI", "dec_fg_ari", 3),
    Column("ARI", "dec_ari", 3),
    Column("mBO", "dec_mbo", 3),
    Column("object recall", "dec_recall", 3),
    Column("fragmentation", "dec_fragmentation", 2),
    Column("slots in use", "dec_slots", 1),
)


class Curriculum(Method):
    """Two slots, four, nine: two calls a step, and only the slots in use take part."""

    def __init__(self, model: SlotModel, settings: Settings) -> None:
        super().__init__(model, settings)
        self.curriculum = SlotCurriculum(slot_schedule(settings.slots), milestones(settings.steps))

    def forward(self, features: Tensor) -> SlotOutput:
        """Run the model with the slots in use."""
        output: SlotOutput = self.model(features, num_slots=self.curriculum.n_active())
        return output

    def loss(self, output: SlotOutput, features: Tensor, step: int) -> Tensor:
        """Take down the errors of the slots; nothing is added to the loss."""
        masks = output.dec_logits.detach().softmax(dim=2)
        self.curriculum.observe(output.reconstruction, features, masks, step)
        return super().loss(output, features, step)

    def after_step(self, optimizer: Optimizer, step: int) -> None:
        """Add slots at a milestone."""
        self.curriculum.maybe_expand(self.model.initial_slots, step, optimizer)


def build(options: Options) -> tuple[Study, Tensor]:
    """Make the clips, and say what is compared."""
    num_train, num_test = (48, 8) if options.quick else (1500, 200)
    features, featurize = training_clips(num_train)
    test = held_out(featurize, num_test, seed=TEST_SEED)
    settings = Settings(data=DESCRIPTION, num_clips=num_train, steps=options.steps)
    study = Study(
        title="Masks of the decoder on fresh clips, with the curriculum and with all slots from the start.",
        methods={OWN: Method, "+ curriculum": Curriculum},
        readings={"": lambda model: evaluate(model, test, settings.threshold)},
        columns=COLUMNS,
        settings=settings,
    )
    return study, features


if __name__ == "__main__":
    sys.exit(main("slot_curriculum", "Slots in a curriculum against all at once.", build, None))
