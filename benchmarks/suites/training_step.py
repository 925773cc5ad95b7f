"""The share of a training step that the loss takes: of the example, and of a model of the published size."""

import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from examples.checkpoint import Settings
from examples.slot_model import SlotModel, reconstruction_loss, slot_contrast_loss
from torch import Tensor, nn

from benchmarks.contenders import TWO_THREADS, name_of, ssync_criterion
from benchmarks.counted import peak_memory
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

Criterion = Callable[[Tensor, Tensor], Tensor]


# a model, and a forward that gives both maps and the model's own loss
Parts = tuple[nn.Module, Callable[[], tuple[Tensor, Tensor, Tensor]]]


def plan(options: Options) -> list[Job]:
    """Plan a row for everyone in the example, and for the first, whose share of a long step is of interest."""
    names = [name_of(one) for one in options.backends]
    pairs = [(EXAMPLE, one) for one in names]
    pairs += [(case, names[0]) for case in (["MOVi-C"] if options.quick else PUBLISHED)]
    if options.device == "cpu":
        pairs.insert(1, (EXAMPLE, names[0] + TWO_THREADS))
    jobs = []
    for case, name in pairs:
        shape = EXAMPLE_SHAPE if case == EXAMPLE else {axis: PUBLISHED[case][axis] for axis in "BTSHW"}
        if options.quick and case != EXAMPLE:
            # an eighth of one clip: more would be most of the rehearsal
            shape = shape | {"B": 1, "T": 2, "H": shape["H"] // 2, "W": shape["W"] // 2}
        key = Key(SUITE, case, name, tuple(shape.items()), "float16" if options.device == "cuda" else "float32")
        jobs.append(Job(share, [key], "share", threads=2 if name.endswith(TWO_THREADS) else None, alone=True))
    return jobs


def share(keys: Sequence[Key], options: Options) -> list[Values]:
    """Time a step without the loss, with it, and the loss alone on the maps of such a step, in turn."""
    (key,) = keys
    criterion, device = ssync_criterion(key.contender), options.device
    batch = affordable(key, options)
    parts = _parts(key.case, key.sizes | {"B": batch}, device)
    with _precision(device):
        enc, dec, _ = parts[1]()
    # detached, they keep their strides
    maps = [one.detach().requires_grad_() for one in (enc, dec)]
    one = torch.ones((), device=device)

    def alone() -> None:
        with _precision(device):
            loss = criterion(*maps)
        torch.autograd.grad(loss, maps, grad_outputs=one)

    works = {"without": step_of(parts, None, device), "with": step_of(parts, criterion, device), "alone": alone}
    rounds = interleave({name: Work(call) for name, call in works.items()}, clock_of(device), options.budget)
    pairs = zip(rounds["with"], rounds["without"], strict=True)
    return [
        {
            **{name: Spread.of(seconds) for name, seconds in rounds.items()},
            "share": over(rounds["alone"], rounds["with"]),
            # how much longer a step with the loss took, as a share of it, round by round
            "difference": Spread.of([(longer - shorter) / longer for longer, shorter in pairs]),
            "batch": batch,
        }
    ]


def affordable(key: Key, options: Options) -> int:
    """Return the clips of a step that time and memory allow: what one takes bounds what more take, clip for clip."""
    batch = key.sizes["B"]
    if key.case == EXAMPLE or batch == 1:
        return batch
    seconds, num_bytes = one_clip(key, options.device)
    clips = min(options.time_cap / seconds, options.memory_cap / num_bytes)
    while batch > 1 and batch > clips:
        batch //= 2
    return batch


def one_clip(key: Key, device: str) -> tuple[float, int]:
    """Return the seconds and the bytes of a step on one clip; optimizer state and weights count, too."""
    take = step_of(_parts(key.case, key.sizes | {"B": 1}, device), None, device)
    num_bytes = peak_memory(take, device)["allocated"]
    return timeit.timeit(take, timer=clock_of(device).read, number=1), num_bytes


def _parts(case: str, shape: dict[str, int], device: str) -> Parts:
    torch.manual_seed(0)
    clips, frames, slots, height, width = (shape[axis] for axis in "BTSHW")
    dim = EXAMPLE_FEATURES if case == EXAMPLE else PUBLISHED[case]["D"]
    model = SlotModel(slots, feature_dim=dim) if case == EXAMPLE else published_model(slots, height * width, dim)
    model, features = model.to(device), torch.randn(clips, frames, dim, height, width).to(device)

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        output = model(features)
        loss = reconstruction_loss(output, features) + SETTINGS.contrast_weight * slot_contrast_loss(output.slots)
        return output.enc_logits, output.dec_logits, loss

    return model, forward


def step_of(parts: Parts, criterion: Criterion | None, device: str) -> Callable[[], None]:
    """Return a whole training step: forward, backward, clipping, Adam."""
    model, forward = parts
    optimizer = torch.optim.Adam(model.parameters(), SETTINGS.learning_rate)
    # half precision on a GPU, as published
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")

    def step() -> None:
        with _precision(device):
            enc, dec, loss = forward()
            if criterion is not None:
                loss = loss + criterion(enc, dec)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()

    return step


@contextmanager
def _precision(device: str) -> Iterator[None]:
    with torch.autocast(device, dtype=torch.float16, enabled=device == "cuda"):
        yield
