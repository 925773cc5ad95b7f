"""The share of a training step that the loss takes, in the example and in a model of the published size."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from examples.checkpoint import Settings
from examples.slot_model import SlotModel, TokenEncoder, reconstruction_loss, slot_contrast_loss
from torch import Tensor, nn

from benchmarks.contenders import TWO_THREADS, name_of, ssync_criterion
from benchmarks.plan import Job, Options
from benchmarks.results import Key, Row, Spread
from benchmarks.timing import Work, clock_of, interleave, over

SUITE = "training_step"
EXAMPLE = "the example"
SETTINGS = Settings(data="", num_clips=0)
EXAMPLE_SHAPE = {"B": SETTINGS.batch_size, "T": 4, "S": 9, "H": 12, "W": 12}
EXAMPLE_FEATURES = 24
# features of DINOv2 ViT-S/14 at 336 pixels and of ViT-B/14 at 518
PUBLISHED = {
    "MOVi-C": {"B": 64, "T": 4, "S": 11, "H": 24, "W": 24, "D": 384},
    "YouTube-VIS": {"B": 64, "T": 4, "S": 7, "H": 37, "W": 37, "D": 768},
}
# clips of a step of ten seconds on a CPU
CLIPS_ON_CPU = {"MOVi-C": 2, "YouTube-VIS": 1}


class PatchDecoder(nn.Module):
    """The published decoder: an MLP runs for every slot on every patch. Its last output is the alpha logit."""

    def __init__(self, num_patches: int, dim: int, feature_dim: int, hidden: int = 1024) -> None:
        super().__init__()
        self.place = nn.Parameter(0.02 * torch.randn(num_patches, dim))
        pairs = pairwise([dim, hidden, hidden, hidden])
        layers = [layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU(inplace=True))]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, feature_dim + 1))

    def forward(self, slots: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Decode slots (B, T, S, C) to alpha logits (B, T, S, H, W) and features (B, T, D, H, W)."""
        decoded = self.mlp(slots.unsqueeze(3) + self.place).unflatten(3, (height, width))
        alpha = decoded[..., -1]
        return alpha, torch.einsum("btshw,btshwd->btdhw", alpha.softmax(2), decoded[..., :-1])


def published_model(num_slots: int, num_patches: int, feature_dim: int, dim: int = 64) -> SlotModel:
    """Build the example's model with the published encoder's widths and the published decoder."""
    model = SlotModel(num_slots, feature_dim=feature_dim, dim=dim)
    # the MLP is as wide as the features, its tokens are as wide as the slots
    model.encoder = TokenEncoder(feature_dim, feature_dim)
    model.encoder.mlp[-1] = nn.Linear(2 * feature_dim, dim)
    model.decoder = PatchDecoder(num_patches, dim, feature_dim)  # type: ignore[assignment]
    return model


def plan(options: Options) -> list[Job]:
    """Plan a row for each backend in the example, and for the first in the published models."""
    names = [name_of(one) for one in options.backends]
    rows = [(EXAMPLE, one, EXAMPLE_SHAPE) for one in names]
    if options.device == "cpu":
        rows.insert(1, (EXAMPLE, names[0] + TWO_THREADS, EXAMPLE_SHAPE))
    for case in ["MOVi-C"] if options.quick else PUBLISHED:
        shape = {axis: PUBLISHED[case][axis] for axis in "BTSHW"}
        if options.device == "cpu":
            shape["B"] = CLIPS_ON_CPU[case]
        if options.quick:
            # an eighth of a clip, or it would be most of the rehearsal
            shape |= {"B": 1, "T": 2, "H": shape["H"] // 2, "W": shape["W"] // 2}
        rows.append((case, names[0], shape))
    dtype = "float16" if options.device == "cuda" else "float32"
    keys = [Key(SUITE, case, name, tuple(shape.items()), dtype) for case, name, shape in rows]
    return [Job([key], share, threads=2 if key.contender.endswith(TWO_THREADS) else None) for key in keys]


def share(keys: Sequence[Key], options: Options) -> list[Row]:
    """Time a step without the loss, a step with it, and the loss alone on the maps of such a step, in turn."""
    (key,) = keys
    criterion, device = ssync_criterion(key.contender), options.device
    forward, step = training(key, device)
    # a detached map keeps its strides
    maps = [one.detach().requires_grad_() for one in forward()[:2]]
    incoming = torch.ones((), device=device)

    def alone() -> None:
        with _precision(device):
            loss = criterion(*maps)
        torch.autograd.grad(loss, maps, grad_outputs=incoming)

    works = {"without": Work(step), "with": Work(lambda: step(criterion)), "alone": Work(alone)}
    rounds = interleave(works, clock_of(device), options.budget)
    values = {name: Spread.of(seconds) for name, seconds in rounds.items()}
    values |= {f"{name}_over_with": over(rounds[name], rounds["with"]) for name in ("alone", "without")}
    return [Row(key, values=values)]


def training(key: Key, device: str) -> tuple[Callable[[], tuple[Tensor, Tensor, Tensor]], Callable[..., None]]:
    """Return a model's forward (both maps and its own loss), and its training step, with a loss or without."""
    torch.manual_seed(0)
    clips, frames, slots, height, width = (key.sizes[axis] for axis in "BTSHW")
    dim = EXAMPLE_FEATURES if key.case == EXAMPLE else PUBLISHED[key.case]["D"]
    model = SlotModel(slots, feature_dim=dim) if key.case == EXAMPLE else published_model(slots, height * width, dim)
    model, features = model.to(device), torch.randn(clips, frames, dim, height, width).to(device)
    optimizer = torch.optim.Adam(model.parameters(), SETTINGS.learning_rate)
    # the published trainings use half precision on a GPU
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
