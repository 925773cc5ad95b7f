"""One small model trained in a few ways: with a method, with SSync, and with both.

Every example of this folder is a `Study`: the model with its own losses, the model with a method, and both again with
SSync from 30 % of the training on. Runs with and without SSync share the steps before, to the bit.
"""

import argparse
import copy
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from reprlib import repr as short
from statistics import median
from typing import Any, NamedTuple

import torch
from examples.arguments import add_training_options, explained
from examples.checkpoint import Settings, make_optimizer
from examples.files import check_fields, must_be_ours, must_be_writable, read_json, write_text
from examples.machine import check_origin, machine_line, this_machine
from examples.markdown import markdown, mean_sd
from examples.slot_model import SlotModel, SlotOutput
from examples.training import train
from torch import Tensor, nn
from torch.optim import Optimizer

from ssync_loss import SSyncLoss

OWN, SSYNC = "own losses", "SSync"


class Method:
    """The additions of a run to the model's own losses, here none. Methods override some of them.

    Args:
        model: the model to train.
        settings: of the training.
    """

    def __init__(self, model: SlotModel, settings: Settings) -> None:
        self.model, self.settings = model, settings

    def parameters(self) -> list[nn.Parameter]:
        """List parameters besides the model's."""
        return []

    def forward(self, features: Tensor) -> SlotOutput:
        """Run the model on the features of a step."""
        output: SlotOutput = self.model(features)
        return output

    def loss(self, output: SlotOutput, features: Tensor, step: int) -> Tensor:  # noqa: ARG002 (subclasses use them)
        """Compute the term to add to the loss of a step."""
        return features.new_zeros(())

    def after_step(self, optimizer: Optimizer, step: int) -> None:
        """Do nothing after the optimizer's step."""


class Column(NamedTuple):
    """A column of the table: its title, the score that it shows, and its digits."""

    title: str
    key: str
    digits: int


Scores = dict[str, float]


@dataclass(frozen=True)
class Study:
    """The runs of a comparison, and their scores.

    Attributes:
        title: sentences above the table.
        methods: by name; a run with the own losses alone, `OWN`, comes first.
        readings: by name, functions that score a trained model; the name follows that of the run.
        columns: of the table. Milliseconds of a step are a score, too: "ms".
        settings: of the training.
        compared_with: by run, the run that it is compared with if that is not the first.
        alone: names of the methods that run only without SSync.
    """

    title: str
    methods: Mapping[str, Callable[[SlotModel, Settings], Method]]
    readings: Mapping[str, Callable[[SlotModel], Scores]]
    columns: Sequence[Column]
    settings: Settings
    compared_with: Mapping[str, str] = field(default_factory=dict)
    alone: Collection[str] = ()


@dataclass
class Training:
    """A run. A deep copy continues exactly as the run would."""

    settings: Settings
    seed: int
    model: SlotModel
    method: Method
    optimizer: torch.optim.Adam
    scheduler: torch.optim.lr_scheduler.LambdaLR
    rng: Tensor
    step: int = 0
    times: list[float] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def start(cls, make: Callable[[SlotModel, Settings], Method], settings: Settings, seed: int) -> "Training":
        """Start from the seed's weights. The model's weights are the same with every method."""
        torch.manual_seed(seed)
        model = SlotModel(settings.slots)
        method = make(model, settings)
        optimizer, scheduler = make_optimizer([*model.parameters(), *method.parameters()], settings)
        return cls(settings, seed, model, method, optimizer, scheduler, torch.get_rng_state())

    def train(self, features: Tensor, *, until: int, criterion: SSyncLoss | None, title: str) -> None:
        """Train up to a step."""

        def terms(output: SlotOutput, batch: Tensor, step: int) -> dict[str, Tensor]:
            added = {"method": self.method.loss(output, batch, step)}
            if criterion is not None:
                added["ssync"] = criterion(output.enc_logits, output.dec_logits, step=step)
            return added

        torch.set_rng_state(self.rng)
        train(self, features, terms, until, title=title)
        self.rng = torch.get_rng_state()

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the model and of the method."""
        return [*self.model.parameters(), *self.method.parameters()]

    def forward(self, features: Tensor) -> SlotOutput:
        """Run the model as the method does."""
        return self.method.forward(features)

    def after_step(self) -> None:
        """Do what the method does after the optimizer's step."""
        self.method.after_step(self.optimizer, self.step)


def run_seed(study: Study, features: Tensor, seed: int) -> dict[str, Scores]:
    """Train every run of a seed, and return its scores by the names of run and reading."""
    settings, scores = study.settings, {}
    criterion = SSyncLoss(merge_threshold=settings.threshold, start_step=settings.start_step)
    for name, make in study.methods.items():
        plain = Training.start(make, settings, seed)
        plain.train(features, until=settings.start_step, criterion=None, title=f"seed {seed}, {name}, shared")
        runs: list[tuple[Training, SSyncLoss | None]] = [(plain, None)]
        if name not in study.alone:
            runs.append((copy.deepcopy(plain), criterion))
        for run, line in runs:
            title = with_ssync(name) if line is not None else name
            run.train(features, until=settings.steps, criterion=line, title=f"seed {seed}, {title}")
            # over the steps since the start of SSync
            ms = 1000 * median(run.times[settings.start_step :])
            for reading, measure in study.readings.items():
                scores[title + reading] = measure(run.model) | {"ms": ms}
    return scores


def with_ssync(name: str) -> str:
    """Name the run with SSync on top.

    >>> with_ssync(OWN), with_ssync("+ curriculum")
    ('+ SSync', '+ curriculum + SSync')
    """
    return f"+ {SSYNC}" if name == OWN else f"{name} + {SSYNC}"


@dataclass
class StudyReport:
    """The scores by seed, run and name, with settings and machine."""

    title: str
    columns: list[Column]
    settings: dict[str, Any]
    machine: dict[str, Any]
    seeds: dict[int, dict[str, Scores]]
    compared_with: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write a JSON file."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "StudyReport":
        """Read a file of `save`.

        Raises:
            ValueError: if it is another file; the message names it and what it holds.
        """
        content = read_json(path)
        parts = dict.fromkeys(("settings", "machine", "seeds", "compared_with"), dict) | {"title": str, "columns": list}
        check_fields(content, parts, f"{path}, a file of results,", optional=["compared_with"])
        check_origin(content["settings"], content["machine"], f"{path}")
        for column in content["columns"]:
            if not (isinstance(column, list) and list(map(type, column)) == [str, str, int] and 0 <= column[2] < 10):
                raise ValueError(f"{path}: `columns` must be titles, keys and digits; found {short(column)}.")
        content["columns"] = [Column(*column) for column in content["columns"]]
        first = next(iter(content["seeds"].values()), None)
        names = dict.fromkeys(first if isinstance(first, dict) else (), dict)
        if not names or not all(map(str.isdecimal, content["seeds"])):
            raise ValueError(f"{path}: `seeds` must be numbers, and hold runs; found {short(content['seeds'])}.")
        for seed, runs in content["seeds"].items():
            check_fields(runs, names, f"{path}: `seeds.{seed}`")
            for name, scores in runs.items():
                keys = {column.key: (int, float) for column in content["columns"]}
                check_fields(scores, keys, f"{path}: `{name}` of seed {seed}", more=True)
        content["seeds"] = {int(seed): runs for seed, runs in content["seeds"].items()}
        others = content.setdefault("compared_with", {})
        check_fields(others, dict.fromkeys(others, str), f"{path}: `compared_with`")
        check_fields(names, dict.fromkeys(others.values(), type), f"{path}: the runs of a seed", more=True)
        return cls(**content)


def table(report: StudyReport) -> str:
    """Format the table that a run prints: the README's table, and its origin."""
    settings, spread = report.settings, " (mean ± sd)" * (len(report.seeds) > 1)
    return "\n".join(
        [
            in_short(report),
            "",
            "Below the first row: paired differences to it or to the run named.",
            f"{settings['data']}: {settings['num_clips']} clips, {settings['slots']} slots, {settings['steps']} steps, "
            f"SSync with merge threshold {settings['threshold']} from step {settings['start_step']}, "
            f"seed {', '.join(map(str, report.seeds))}{spread}.",
            machine_line(report.machine),
        ]
    )


def in_short(report: StudyReport) -> str:
    """Format the scores of the first run, and the gains of others over it or over another run, as Markdown."""
    columns, runs = report.columns, list(report.seeds.values())
    first, *others = runs[0]
    rows = [["", *(column.title for column in columns)]]
    rows.append([first, *(mean_sd([run[first][c.key] for run in runs], c.digits) for c in columns)])
    for name in others:
        other = report.compared_with.get(name, first)
        gains = (mean_sd([run[name][c.key] - run[other][c.key] for run in runs], c.digits, "+") for c in columns)
        rows.append([name if other == first else f"{name} (to {other})", *gains])
    return "\n".join([report.title, "", *markdown(rows)])


class Options(NamedTuple):
    """Options of the command line: see `main`."""

    steps: int
    slots: int
    quick: bool


def main(
    name: str,
    description: str,
    build: Callable[[Options], tuple[Study, Tensor]],
    arguments: Sequence[str] | None,
    *,
    steps: int = 1500,
    slots: int = 9,
) -> int:
    """Run a study from the command line, write its results and print its table.

    Args:
        name: name of the study and of its results.
        description: text for --help.
        build: makes the study and the training features (B, T, D, H, W).
        arguments: the command line; None for the process's own.
        steps: default number of steps.
        slots: default number of slots.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_training_options(parser, steps=steps, slots=slots)
    parser.add_argument("--out", type=Path, default=Path("runs") / f"{name}.json", help="file for the results")
    options = parser.parse_args(arguments)
    if options.table is not None:
        with explained():
            print(table(StudyReport.load(options.table)))
        return 0
    with explained():
        must_be_writable(options.out, "--out")
        must_be_ours(options.out, "--out", StudyReport.load)
    torch.set_num_threads(options.threads)
    steps = min(options.steps, 40) if options.quick else options.steps
    study, features = build(Options(steps, options.slots, options.quick))
    settings = asdict(study.settings) | {"start_step": study.settings.start_step}
    report = StudyReport(study.title, list(study.columns), settings, this_machine(), {}, dict(study.compared_with))
    try:
        for seed in options.seeds:
            report.seeds[seed] = run_seed(study, features, seed)
            with explained():
                report.save(options.out)
    except KeyboardInterrupt:
        finished = ", ".join(map(str, report.seeds))
        print(f"\nstopped; {options.out} has seed {finished}" if finished else "\nstopped; nothing was written")
        return 130
    print(f"\n{table(report)}\n\nnumbers  {options.out}")
    return 0
