"""The share of a training step that the loss takes: of the example, and of a model of the published size."""

from collections.abc import Callable, Sequence

import torch
from examples.checkpoint import Settings
from examples.slot_model import SlotModel, reconstruction_loss, slot_contrast_loss
from torch import Tensor, nn

from benchmarks.contenders import TWO_THREADS, name_of, ssync_criterion
from benchmarks.plan import Job, Options
from benchmarks.results import Key, Spread, Values
from benchmarks.slot_video_model import PUBLISHED, published_model
from benchmarks.timing import Work, clock_of, interleave, over

SUITE = "training_step"
EXAMPLE = "the example"
# of the example: twelve by twelve patches with 24 features
SETTINGS = Settings(data="", num_clips=0)
EXAMPLE_SHAPE = {"B": SETTINGS.batch_size, "T": 4, "S": 9, "H": 12, "W": 12}
EXAMPLE_FEATURES = 24
# of the published batch, as many clips as a CPU takes in a step of ten seconds
CLIPS_ON_CPU = {"MOVi-C": 2, "YouTube-VIS": 1}


def plan(options: Options) -> list[Job]:
    """Plan a row for everyone in the example, and for the first, whose share of a long step is of interest."""
    names = [name_of(one) for one in options.backends]
    rows = [(EXAMPLE, one, EXAMPLE_SHAPE) for one in names]
    if options.device == "cpu":
        rows.insert(1, (EXAMPLE, names[0] + TWO_THREADS, EXAMPLE_SHAPE))
    for case in ["MOVi-C"] if options.quick else PUBLISHED:
        shape = {axis: PUBLISHED[case][axis] for axis in "BTSHW"}
        if options.device == "cpu":
            shape["B"] = CLIPS_ON_CPU[case]
        if options.quick:
            # an eighth of one clip: more would be most of the rehearsal
            shape |= {"B": 1, "T": 2, "H": shape["H"] // 2, "W": shape["W"] // 2}
        rows.append((case, names[0], shape))
    jobs = []
    for case, name, shape in rows:
        key = Key(SUITE, case, name, tuple(shape.items()), "float16" if options.device == "cuda" else "float32")
        jobs.append(Job(share, [key], "share", threads=2 if name.endswith(TWO_THREADS) else None, alone=True))
    return jobs


def share(keys: Sequence[Key], options: Options) -> list[Values]:
    """Time a step without the loss, with it, and the loss alone on the maps of such a step, in turn."""
    (key,) = keys
    criterion, device = ssync_criterion(key.contender), options.device
    forward, step = training(key, device)
    # detached, they keep their strides
    maps = [one.detach().requires_grad_() for one in forward()[:2]]
    incoming = torch.ones((), device=device)

    def alone() -> None:
        with _precision(device):
            loss = criterion(*maps)
        torch.autograd.grad(loss, maps, grad_outputs=incoming)

    works = {"without": Work(step), "with": Work(lambda: step(criterion)), "alone": Work(alone)}
    rounds = interleave(works, clock_of(device), options.budget)
    pairs = zip(rounds["with"], rounds["without"], strict=True)
    return [
        {
            **{name: Spread.of(seconds) for name, seconds in rounds.items()},
            "share": over(rounds["alone"], rounds["with"]),
            # how much longer a step with the loss took, as a share of it, round by round
            "difference": Spread.of([(longer - shorter) / longer for longer, shorter in pairs]),
        }
    ]


def training(key: Key, device: str) -> tuple[Callable[[], tuple[Tensor, Tensor, Tensor]], Callable[..., None]]:
    """Return a model's forward, which gives both maps and its own loss, and a whole training step, given a loss."""
    torch.manual_seed(0)
    clips, frames, slots, height, width = (key.sizes[axis] for axis in "BTSHW")
    dim = EXAMPLE_FEATURES if key.case == EXAMPLE else PUBLISHED[key.case]["D"]
    model = SlotModel(slots, feature_dim=dim) if key.case == EXAMPLE else published_model(slots, height * width, dim)
    model, features = model.to(device), torch.randn(clips, frames, dim, height, width).to(device)
    optimizer = torch.optim.Adam(model.parameters(), SETTINGS.learning_rate)
    # half precision on a GPU, as published
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        with _precision(device):
            output = model(features)
            loss = reconstruction_loss(output, features) + SETTINGS.contrast_weight * slot_contrast_loss(output.slots)
        return output.enc_logits, output.dec_logits, loss

    def step(criterion: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        enc, dec, loss = forward()
        if criterion is not None:
            with _precision(device):
                loss = loss + criterion(enc, dec)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()

    return forward, step


def _precision(device: str) -> torch.autocast:
    return torch.autocast(device, dtype=torch.float16, enabled=device == "cuda")
