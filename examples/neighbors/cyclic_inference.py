"""SlotCurri's cyclic inference (Moon, Seong & Heo, CVPR 2026): scan a clip forward, and then back.

    python examples/neighbors/cyclic_inference.py                   # one seed, about two minutes on one core
    python examples/neighbors/cyclic_inference.py --seeds 0 1 2     # mean ± sd over three
    python examples/neighbors/cyclic_inference.py --table examples/neighbors/results/cyclic_inference.json

At the first frame, slots have seen nothing. At the last frame, they have seen the whole clip. On the way back they see
the first frame again. Are its masks then as good as those of the last frame? Both frames are equally hard here, because
objects are half-way along their path in the middle of the clip. The scan needs no training, so every trained model is
read in three ways: forward, cyclic, and forward with as many steps as cyclic. In the third way, all additional steps
see the first frame. It separates the effect of the clip from the effect of a longer look.

As in the publication, clips are longer at evaluation than in training, here 8 frames instead of 4. They are scored
again with a noisy first frame. The noisy frame, its noise and the third way of reading were chosen on development clips
with seed 0.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # lets this file run as a script

from examples.checkpoint import Settings
from examples.data import DESCRIPTION, TEST_SEED, held_out, training_clips
from examples.evaluation import BATCH
from examples.features import FrozenFeatures
from examples.neighbors.study import OWN, Column, Method, Options, Scores, Study, main, with_ssync
from examples.slot_model import SlotModel, SlotOutput

from ssync_loss.functional import cyclic_scan
from ssync_loss.metrics import MetricAverage, image_fg_ari, image_mbo, masks_to_labels, video_fg_ari

NUM_FRAMES = 8
LAST = NUM_FRAMES - 1
# standard deviation of the first frame's noise; colors lie in [0, 1]
NOISE = 0.4
CYCLIC, LONGER = ", cyclic", ", longer first look"

COLUMNS = (
    Column("first frame", "fg_ari_0", 3),
    Column("last frame", f"fg_ari_{LAST}", 3),
    Column("noisy, second", "noisy_fg_ari_1", 3),
)

Scan = Callable[[SlotModel, Tensor], SlotOutput]


def forward(model: SlotModel, features: Tensor) -> SlotOutput:
    """Scan forward, as in training."""
    output: SlotOutput = model(features)
    return output


def cyclic(model: SlotModel, features: Tensor) -> SlotOutput:
    """Scan forward and back, then decode every frame."""

    def step(prior: Tensor, frame: Tensor, t: int | None) -> Mapping[str, Tensor]:
        seen = model.see(prior, frame, first=t == 0)
        return {
            "slots": seen.slots,
            "enc_logits": seen.dots[-1],
            "attention": torch.stack(seen.dots).softmax(dim=-1).mean(dim=0),
            "state_predicted": seen.predicted,
        }

    tokens = model.encoder(features)
    scanned = cyclic_scan(step, model.initial_slots.expand(len(features), -1, -1), tokens)
    del scanned["state_predicted"]
    return model.decode(tokens, **scanned, size=features.shape[-2:])


def longer_first_look(model: SlotModel, features: Tensor) -> SlotOutput:
    """Scan forward in 2 T - 1 steps, as many as a cyclic scan takes; T of them see the first frame."""
    more = features.shape[1] - 1
    output = forward(model, torch.cat([features[:, :1].expand(-1, more, -1, -1, -1), features], dim=1))
    return SlotOutput(*(values[:, more:] for values in output))


class Clips:
    """Clips to score, with the original and with a noisy first frame."""

    def __init__(self, featurize: FrozenFeatures, num_clips: int, *, seed: int) -> None:
        video, clean, ids = held_out(featurize, num_clips, seed=seed, num_frames=NUM_FRAMES)
        assert ids is not None  # these have ground truth
        first = video[:, 0]
        noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(seed))
        noisy = clean.clone()
        noisy[:, 0] = featurize((first + NOISE * noise).clamp(0, 1).unsqueeze(1))[:, 0]
        self.ids, self.features = ids, {"": clean, "noisy_": noisy}

    @torch.no_grad()
    def score(self, model: SlotModel, scan: Scan) -> Scores:
        """Score the masks of the decoder at the size of the video."""
        scores: Scores = {}
        for name, features in self.features.items():
            masks = torch.cat([scan(model, batch).dec_logits for batch in torch.split(features, BATCH)])
            labels = masks_to_labels(masks, (self.ids.shape[-2], self.ids.shape[-1]))
            scores |= {name + key: value for key, value in score(labels, self.ids).items()}
        return scores


def score(labels: Tensor, ids: Tensor) -> Scores:
    """Score slots (B, T, H, W) against objects, 0 for the background: frame by frame, over all, over the clip."""

    def average(metric: Callable[..., Tensor], frames: slice) -> float:
        mean = MetricAverage(metric, background=0)
        mean.update(labels[:, frames], ids[:, frames])
        return mean.compute().item()

    scores = {"fg_ari_clip": average(video_fg_ari, slice(None)), "identity": identity(labels, ids)}
    for name, metric in (("fg_ari", image_fg_ari), ("mbo", image_mbo)):
        values = [average(metric, slice(t, t + 1)) for t in range(ids.shape[1])]
        scores |= {f"{name}_{t}": value for t, value in enumerate(values)} | {f"{name}_mean": fmean(values)}
    return scores


def identity(labels: Tensor, ids: Tensor) -> float:
    """Return the share of objects whose largest slot is the same in the first and the last frame.

    >>> ids = torch.tensor([[[[0, 1, 1, 2, 2, 2]], [[0, 1, 1, 1, 2, 2]]]])
    >>> labels = torch.tensor([[[[0, 3, 3, 4, 4, 5]], [[0, 3, 3, 3, 5, 5]]]])
    >>> identity(labels, ids)  # object 1 stays with slot 3, object 2 goes from 4 to 5
    0.5
    """
    objects, slots = (F.one_hot(x[:, [0, -1]].flatten(2)).double() for x in (ids, labels))
    first, last = einsum(objects, slots, "b t n k, b t n s -> t b k s")[:, :, 1:]
    seen = (first.sum(dim=2) > 0) & (last.sum(dim=2) > 0)
    kept: float = (first.argmax(dim=2) == last.argmax(dim=2))[seen].double().mean().item()
    return kept


def build(options: Options) -> tuple[Study, Tensor]:
    """Make the clips and the study."""
    num_train, num_test = (48, 8) if options.quick else (1500, 200)
    features, featurize = training_clips(num_train)
    clips = Clips(featurize, num_test, seed=TEST_SEED)
    scans = {"": forward, CYCLIC: cyclic, LONGER: longer_first_look}
    study = Study(
        title=f"FG-ARI of frames on clips of {NUM_FRAMES} frames, trained on 4. Noisy: with a noisy first frame.",
        methods={OWN: Method},
        readings={name: partial(clips.score, scan=scan) for name, scan in scans.items()},
        columns=COLUMNS,
        settings=Settings(data=DESCRIPTION, num_clips=num_train, slots=options.slots, steps=options.steps),
        compared_with={with_ssync(OWN) + name: with_ssync(OWN) for name in (CYCLIC, LONGER)},
    )
    return study, features


if __name__ == "__main__":
    sys.exit(main("cyclic_inference", "Cyclic inference against a forward scan.", build, None))
