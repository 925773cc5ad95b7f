"""The state of a training run, and its way to disk and back without losing a bit."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from examples.dense_alignment import DenseAlignment, DenseSettings
from examples.slot_model import SlotModel
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """What a run depends on, apart from its seed.

    Attributes:
        data: where the training clips come from, in words.
        num_clips: how many there are.
        slots: number of slots.
        steps: optimizer steps, the shared part included.
        threshold: merge threshold of the loss; None turns merging off.
        start_fraction: share of the steps after which the loss is switched on.
        batch_size: clips per step.
        learning_rate: of Adam, after the warm-up.
        warmup_steps: steps of linear warm-up; after it the rate decays exponentially, to half at the end.
        contrast_weight: weight of the slot contrast.
        max_grad_norm: gradients are clipped to it.
    """

    data: str
    num_clips: int
    slots: int = 9
    steps: int = 1500
    threshold: float | None = 0.6
    start_fraction: float = 0.3
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup_steps: int = 37
    contrast_weight: float = 0.5
    max_grad_norm: float = 0.05

    @property
    def start_step(self) -> int:
        """The step at which the loss is switched on."""
        return round(self.start_fraction * self.steps)


@dataclass
class TrainingState:
    """A model in training: all that a resumed run needs to go on bit for bit.

    The order of the data is a function of seed and step, so it needs no place here.

    Attributes:
        alignment: dense alignment with its projections, in the run that trains with it.
        times: seconds that every step took.
        history: losses of every step.
    """

    settings: Settings
    seed: int
    model: SlotModel
    alignment: DenseAlignment | None
    optimizer: torch.optim.Adam
    scheduler: torch.optim.lr_scheduler.LambdaLR
    step: int = 0
    times: list[float] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def fresh(cls, settings: Settings, seed: int, *, dense: bool = False) -> "TrainingState":
        """Start from the weights that the seed gives: the model's are the same with dense alignment."""
        torch.manual_seed(seed)
        model = SlotModel(settings.slots)
        alignment = DenseAlignment(DenseSettings(settings.steps)) if dense else None
        optimizer, scheduler = make_optimizer(_parameters(model, alignment), settings)
        return cls(settings, seed, model, alignment, optimizer, scheduler)

    def parameters(self) -> list[nn.Parameter]:
        """List what is trained: the model, and the projections of dense alignment."""
        return _parameters(self.model, self.alignment)

    def save(self, path: Path) -> None:
        """Write the state; a crash half-way leaves the previous file whole."""
        content = {
            "settings": asdict(self.settings),
            "seed": self.seed,
            "model": self.model.state_dict(),
            "alignment": None if self.alignment is None else self.alignment.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "times": self.times,
            "history": self.history,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(content, partial)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path, settings: Settings, seed: int) -> "TrainingState":
        """Read a state written by `save`.

        Raises:
            ValueError: if it was made with another seed or other settings.
        """
        content: dict[str, Any] = torch.load(path, weights_only=True)
        wanted = {**asdict(settings), "seed": seed}
        found = {**content["settings"], "seed": content["seed"]}
        for name in wanted.keys() | found.keys():
            if wanted.get(name) != found.get(name):
                raise ValueError(
                    f"{path} was trained with `{name}` = {found.get(name)!r}; got {wanted.get(name)!r}. "
                    "Use the same settings, another --out, or start afresh without --resume."
                )
        state = cls.fresh(settings, seed, dense=content["alignment"] is not None)
        state.model.load_state_dict(content["model"])
        if state.alignment is not None:
            state.alignment.load_state_dict(content["alignment"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.scheduler.load_state_dict(content["scheduler"])
        torch.set_rng_state(content["rng"])
        state.step = content["step"]
        state.times = content["times"]
        state.history = content["history"]
        return state


def make_optimizer(
    parameters: list[nn.Parameter], settings: Settings
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
    """Make Adam, and its rate: a linear warm-up, then exponential decay, to half at the end."""
    optimizer = torch.optim.Adam(parameters, settings.learning_rate)

    def rate(step: int) -> float:
        warmup: float = min(1.0, (step + 1) / settings.warmup_steps)
        decay: float = 0.5 ** (step / settings.steps)
        return warmup * decay

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def _parameters(model: SlotModel, alignment: DenseAlignment | None) -> list[nn.Parameter]:
    return [*model.parameters(), *(alignment.parameters() if alignment is not None else [])]


def batch_of_step(step: int, *, num_clips: int, batch_size: int, seed: int) -> Tensor:
    """Choose the clips of a step: passes through a shuffled training set, a new order for every pass.

    It depends on seed and step only: every run of a seed sees the same clips, resumed or not. A set smaller
    than a batch is taken whole.
    """
    batch_size = min(batch_size, num_clips)
    epoch, place = divmod(step, num_clips // batch_size)
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(num_clips, generator=generator)[place * batch_size : (place + 1) * batch_size]
