"""The share of a training step that the loss takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from examples.checkpoint import Settings
from examples.slot_model import SlotModel, reconstruction_loss, slot_contrast_loss
from torch import Tensor, nn

from benchmarks.contenders import CONTENDERS, TWO_THREADS, Contender, ssync_contender, ssync_criterion
from benchmarks.memory import peak_memory
from benchmarks.results import Row, RowId, Spread, values_to_json
from benchmarks.session import Options, Session, Task
from benchmarks.slot_video_model import PUBLISHED, SlotVideoModel, Workload, own_loss
from benchmarks.timing import Samples, Work, clock_of, interleave

SUITE = "training_step"
MODULE = "benchmarks.suites.training_step"
EXAMPLE = "the example"
# of the example: twelve by twelve patches with 24 features
EXAMPLE_SHAPE = {"T": 4, "S": 9, "H": 12, "W": 12}
EXAMPLE_FEATURES = 24


class Parts(NamedTuple):
    """A model's step, taken apart.

    Attributes:
        model: what is trained.
        maps_and_loss: a forward: both maps, and the model's own loss.
        learning_rate: of Adam.
    """

    model: nn.Module
    maps_and_loss: Callable[[], tuple[Tensor, Tensor, Tensor]]
    learning_rate: float


def plan(options: Options) -> list[Task]:
    """Plan a row for every contender in the example, and for the first, whose share of a long step is of interest."""
    first, *_ = everyone = [one.name for one, _ in contenders_of(options)]
    if options.device == "cpu":
        everyone.insert(1, first + TWO_THREADS)
    published = ["MOVi-C"] if options.quick else PUBLISHED
    return [_task(EXAMPLE, name, options) for name in everyone] + [_task(case, first, options) for case in published]


def contenders_of(options: Options) -> list[tuple[Contender, str]]:
    """Return who takes part, and in which dtype."""
    return [(ssync_contender(backend), _dtype(options)) for backend in options.backends]


def _task(case: str, name: str, options: Options) -> Task:
    shape = _published_shape(case)
    if options.quick and case != EXAMPLE:
        # an eighth of one clip: more would be most of the rehearsal
        shape |= {"B": 1, "T": 2, "H": shape["H"] // 2, "W": shape["W"] // 2}
    key = RowId.of(SUITE, case, name, "share", shape, _dtype(options))
    contender = name.removesuffix(TWO_THREADS)

    def run(session: Session) -> None:
        stopped = session.stopped_at_gate(contender)
        if stopped is not None:
            session.add(session.row(key, stopped))
            return
        batch = largest = key.sizes["B"]
        if case != EXAMPLE and batch > 1:
            tried = session.call(f"{MODULE}:try_step", plain=True, case=case, shape=shape, device=options.device)
            if tried.status != "measured":
                session.add(session.row(key, tried))
                return
            # what one clip takes bounds what more take, clip for clip
            affordable = min(options.time_cap / tried.value["seconds"], options.memory_cap / tried.value["bytes"])
            while batch > 1 and batch > affordable:
                batch //= 2
        outcome = session.call(
            f"{MODULE}:measure",
            plain=True,
            alone=True,
            threads=2 if name.endswith(TWO_THREADS) else None,
            case=case,
            contender=contender,
            shape=shape | {"B": batch},
            device=options.device,
            budget=options.budget,
        )
        row = session.row(key, outcome)
        fewer = f"{batch} of {largest} clips: memory and time of this machine" if batch < largest else ""
        session.add(Row(key, row.status, row.note or fewer, row.values))

    return Task([key], run)


def _dtype(options: Options) -> str:
    return "float16" if options.device == "cuda" else "float32"


def _published_shape(case: str) -> dict[str, int]:
    if case == EXAMPLE:
        return {"B": Settings(data="", num_clips=0).batch_size, **EXAMPLE_SHAPE}
    one = PUBLISHED[case]
    return {"B": one.batch, "T": one.frames, "S": one.slots, "H": one.height, "W": one.width}


def try_step(case: str, shape: dict[str, int], device: str) -> dict[str, float]:
    """Take a step on one clip: what it costs."""
    parts = _parts(case, shape | {"B": 1}, device)
    take = _step(parts, None, device)
    clock = clock_of(device)

    def once() -> list[float]:
        marks = take(clock.mark)
        clock.wait()
        return [clock.seconds(marks[0], marks[1])]

    # optimizer state and weights count, too
    return {"bytes": peak_memory(once, device)["allocated"], "seconds": once()[0]}


def measure(case: str, contender: str, shape: dict[str, int], device: str, budget: float) -> dict[str, Any]:
    """Time a step without the loss, with it, and the loss alone on the maps of such a step, in turn."""
    criterion = ssync_criterion(CONTENDERS[contender])
    parts = _parts(case, shape, device)
    with _precision(device):
        enc, dec, _ = parts.maps_and_loss()
    # detached, they keep their strides
    maps = [one.detach().requires_grad_() for one in (enc, dec)]
    one = torch.ones((), device=device)

    def alone(mark: Callable[[], Any]) -> list[Any]:
        before = mark()
        with _precision(device):
            loss = criterion(*maps)
        torch.autograd.grad(loss, maps, grad_outputs=one)
        return [before, mark()]

    works: dict[str, Work] = {
        "without": _step(parts, None, device),
        "with": _step(parts, criterion, device),
        "alone": alone,
    }
    samples = interleave(works, clock_of(device), budget=budget)
    with_loss, without = samples["with"], samples["without"]
    return values_to_json(
        {
            **{name: sample.whole() for name, sample in samples.items()},
            "share": samples["alone"].over(with_loss),
            "difference": _difference(with_loss, without),
            "batch": shape["B"],
        }
    )


def _difference(with_loss: Samples, without: Samples) -> Spread:
    """Summarize how much longer a step with the loss took, as a share of it, round by round."""
    pairs = zip(with_loss.per_round(), without.per_round(), strict=True)
    return Spread.of([(longer - shorter) / longer for longer, shorter in pairs])


def _parts(case: str, shape: dict[str, int], device: str) -> Parts:
    torch.manual_seed(0)
    if case == EXAMPLE:
        return _example(shape, device)
    clips, frames, slots, height, width = (shape[axis] for axis in "BTSHW")
    workload = Workload(clips, frames, slots, height, width, PUBLISHED[case].feature_dim)
    model = SlotVideoModel(workload).to(device)
    features = torch.randn(clips, frames, height * width, workload.feature_dim).to(device)

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        output = model(features)
        return output.enc_logits, output.dec_logits, own_loss(output, features)

    return Parts(model, forward, 8e-4)


def _example(shape: dict[str, int], device: str) -> Parts:
    settings = Settings(data="", num_clips=0)
    model = SlotModel(shape["S"], feature_dim=EXAMPLE_FEATURES).to(device)
    clips, frames, height, width = (shape[axis] for axis in "BTHW")
    features = torch.randn(clips, frames, EXAMPLE_FEATURES, height, width).to(device)

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        output = model(features)
        loss = reconstruction_loss(output, features) + settings.contrast_weight * slot_contrast_loss(output.slots)
        return output.enc_logits, output.dec_logits, loss

    return Parts(model, forward, settings.learning_rate)


def _step(parts: Parts, criterion: Callable[[Tensor, Tensor], Tensor] | None, device: str) -> Work:
    """Return a whole training step: forward, backward, clipping, Adam."""
    optimizer = torch.optim.Adam(parts.model.parameters(), parts.learning_rate)
    # half precision on a GPU, as published
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")

    def step(mark: Callable[[], Any]) -> list[Any]:
        before = mark()
        with _precision(device):
            enc, dec, loss = parts.maps_and_loss()
            if criterion is not None:
                loss = loss + criterion(enc, dec)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parts.model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
        return [before, mark()]

    return step


@contextmanager
def _precision(device: str) -> Iterator[None]:
    with torch.autocast(device, dtype=torch.float16, enabled=device == "cuda"):
        yield
