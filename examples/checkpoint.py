"""The state of a training run, which a checkpoint restores to the bit."""

import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from examples.dense_alignment import DenseAlignment, DenseSettings
from examples.files import written_whole
from examples.slot_model import SlotModel, SlotOutput
from torch import Tensor, nn

from ssync_loss import AdaptiveSSyncLoss, SSyncLoss

PARTS = ("settings", "model", "optimizer", "scheduler")


@dataclass(frozen=True)
class Settings:
    """The settings of a run. Together with the seed they determine it.

    Attributes:
        data: description of the training clips.
        num_clips: number of training clips.
        slots: number of slots.
        steps: optimizer steps, the shared part included.
        threshold: merge threshold of the loss; None turns merging off.
        start_fraction: share of the steps after which the loss starts.
        batch_size: clips per step.
        learning_rate: learning rate of Adam after the warm-up.
        warmup_steps: steps of linear warm-up; the rate also decays exponentially, to half at the end.
        contrast_weight: weight of the slot contrast.
        max_grad_norm: largest norm of the gradient, which is clipped.
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
        """The first step with the loss."""
        return round(self.start_fraction * self.steps)

    def criterion(self) -> SSyncLoss:
        """Make the loss of a run."""
        return SSyncLoss(merge_threshold=self.threshold, start_step=self.start_step)

    def adaptive(self) -> AdaptiveSSyncLoss:
        """Make the adaptive loss. Its warm-up takes at most a quarter of its steps."""
        return AdaptiveSSyncLoss(self.criterion(), warmup=min(50, (self.steps - self.start_step) // 4))


@dataclass
class TrainingState:
    """A model in training: all that a resumed run needs to continue bit for bit.

    The order of the data is a function of seed and step, so the state does not hold it.

    Attributes:
        alignment: dense alignment and its projections, if the run has it.
        adaptive: the adaptive loss and its state, if the run has it.
        times: seconds of every step.
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
    adaptive: AdaptiveSSyncLoss | None = None

    @classmethod
    def fresh(cls, settings: Settings, seed: int, *, dense: bool = False) -> "TrainingState":
        """Start from the seed's weights. The model's weights are the same with dense alignment."""
        torch.manual_seed(seed)
        model = SlotModel(settings.slots)
        alignment = DenseAlignment(DenseSettings(settings.steps)) if dense else None
        optimizer, scheduler = make_optimizer(_parameters(model, alignment), settings)
        return cls(settings, seed, model, alignment, optimizer, scheduler)

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the model and of dense alignment."""
        return _parameters(self.model, self.alignment)

    def forward(self, features: Tensor) -> SlotOutput:
        """Run the model on the features of a step."""
        output: SlotOutput = self.model(features)
        return output

    def after_step(self) -> None:
        """Do nothing after the optimizer's step."""

    def content(self) -> dict[str, Any]:
        """Return the content of a checkpoint."""
        return {
            "settings": asdict(self.settings),
            "seed": self.seed,
            "model": self.model.state_dict(),
            "alignment": None if self.alignment is None else self.alignment.state_dict(),
            "adaptive": None if self.adaptive is None else self.adaptive.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "times": self.times,
            "history": self.history,
        }

    def save(self, path: Path) -> None:
        """Write the state atomically."""
        with written_whole(path) as partial:
            torch.save(self.content(), partial)

    @classmethod
    def load(cls, path: Path, settings: Settings, seed: int) -> "TrainingState":
        """Read a state written by `save`. Reading never executes code in the file.

        Raises:
            ValueError: if seed or settings differ, or the file is not a checkpoint.
        """
        content = _read(path)
        wanted = {**asdict(settings), "seed": seed}
        found = {**content["settings"], "seed": content["seed"]}
        differing = [
            f"with `{name}` = {found.get(name)!r}; got {wanted.get(name)!r}"
            for name in {**wanted, **found}
            if wanted.get(name) != found.get(name)
        ]
        if differing:
            raise ValueError(
                f"{path} was trained {', '.join(differing)}. "
                "Use the same settings, another --out, or start afresh without --resume."
            )
        state = cls.fresh(settings, seed, dense=content.get("alignment") is not None)
        try:
            state._take(content)
        except Exception as error:
            raise ValueError(_refusal(path)) from error
        return state

    def _take(self, content: dict[str, Any]) -> None:
        """Restore a checkpoint. Any error means that it does not belong to this run."""
        # a step with zero gradients moves no weight, but makes the optimizer create its state
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        optimizer, scheduler = self.optimizer.state_dict(), self.scheduler.state_dict()
        step, times, history = (content[name] for name in ("step", "times", "history"))
        moments, groups = (content["optimizer"][name] for name in ("state", "param_groups"))
        # versions of torch differ in their settings
        groups = [_known(*pair) for pair in zip(groups, optimizer["param_groups"], strict=True)]
        rates = _known(content["scheduler"], scheduler)
        fits = [
            type(step) is int and 0 <= step <= self.settings.steps and step == content["scheduler"]["last_epoch"],
            _fits(times, [0.0] * len(times)),
            _fits(history, [dict.fromkeys(history[0], 0.0)] * len(history) if history else []),
            _fits(groups, optimizer["param_groups"]),
            _fits(rates, scheduler),
            *(_fits(one, optimizer["state"][index]) for index, one in moments.items()),
        ]
        if not all(fits):
            raise ValueError("parts that this run does not have")
        self.model.load_state_dict(content["model"])
        if self.alignment is not None:
            self.alignment.load_state_dict(content["alignment"])
        if content.get("adaptive") is not None:
            self.adaptive = self.settings.adaptive()
            self.adaptive.load_state_dict(content["adaptive"])
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.scheduler.load_state_dict(rates)
        torch.set_rng_state(content["rng"])
        self.step, self.times, self.history = step, times, history


def _read(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            # torch warns about some files that are refused below
            warnings.simplefilter("ignore")
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not all(isinstance(content[part], dict) for part in PARTS):
            raise TypeError("no parts")
        if not all(
            isinstance(one, str | int | float | None) for one in (content["seed"], *content["settings"].values())
        ):
            raise TypeError("no settings")
    except Exception as error:
        raise ValueError(_refusal(path)) from error
    return content


def _known(found: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Replace our values by those found, except for the parameters."""
    return {name: ours[name] if name == "params" else found.get(name, ours[name]) for name in ours}


def _refusal(path: Path) -> str:
    return f"{path} is no checkpoint of this example, or a damaged one. Delete it, or take another --out."


def _fits(found: Any, like: Any) -> bool:
    """Return whether two values differ in nothing but numbers."""
    if isinstance(like, Tensor):
        return isinstance(found, Tensor) and (found.shape, found.dtype) == (like.shape, like.dtype)
    if type(found) is not type(like):
        return False
    if isinstance(like, dict):
        return found.keys() == like.keys() and all(_fits(found[key], like[key]) for key in like)
    if isinstance(like, list | tuple):
        return len(found) == len(like) and all(map(_fits, found, like))
    return True


def make_optimizer(
    parameters: list[nn.Parameter], settings: Settings
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
    """Make Adam and its schedule: a linear warm-up, and exponential decay to half at the end."""
    optimizer = torch.optim.Adam(parameters, settings.learning_rate)

    def rate(step: int) -> float:
        warmup: float = min(1.0, (step + 1) / settings.warmup_steps)
        decay: float = 0.5 ** (step / settings.steps)
        return warmup * decay

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def _parameters(model: SlotModel, alignment: DenseAlignment | None) -> list[nn.Parameter]:
    return [*model.parameters(), *(alignment.parameters() if alignment is not None else [])]


def batch_of_step(step: int, *, num_clips: int, batch_size: int, seed: int) -> Tensor:
    """Choose the clips of a step. Every epoch has a new order.

    The choice depends on seed and step only, so every run of a seed sees the same clips, resumed or not. A set smaller
    than a batch is taken whole.
    """
    batch_size = min(batch_size, num_clips)
    epoch, place = divmod(step, num_clips // batch_size)
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(num_clips, generator=generator)[place * batch_size : (place + 1) * batch_size]
