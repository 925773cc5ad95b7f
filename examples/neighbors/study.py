"""One small model trained in a few ways: what a method adds to it, what SSync adds, and what both do.

Every example of this folder is a `Study`: the model with its own losses, the model with a method, and both again with
SSync from 30 % of the training on. Runs with and without SSync share the steps before, to the bit.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from reprlib import repr as short
from statistics import median
from typing import Any, NamedTuple

import torch
from examples.arguments import add_training_options, explained
from examples.checkpoint import Settings, batch_of_step, make_optimizer
from examples.files import check_fields, must_be_ours, must_be_writable, read_json, write_text
from examples.machine import check_origin, machine_line, this_machine
from examples.markdown import markdown, mean_sd
from examples.slot_model import SlotModel, SlotOutput, reconstruction_loss, slot_contrast_loss
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from ssync_loss import SSyncLoss

OWN, SSYNC = "own losses", "SSync"


class Method:
    """What a run does beside the model's own losses: this one, nothing. Methods override what they need.

    Args:
        model: the one that is trained.
        settings: of the training.
    """

    def __init__(self, model: SlotModel, settings: Settings) -> None:
        self.model, self.settings = model, settings

    def parameters(self) -> list[nn.Parameter]:
        """List what is trained beside the model."""
        return []

    def forward(self, features: Tensor) -> SlotOutput:
        """Run the model on the features of a step."""
        output: SlotOutput = self.model(features)
        return output

    def loss(self, output: SlotOutput, features: Tensor, step: int) -> Tensor:  # noqa: ARG002 (for those who override)
        """Compute what is added to the loss of a step."""
        return features.new_zeros(())

    def after_step(self, optimizer: Optimizer, step: int) -> None:
        """Do what is to be done after the optimizer's step."""


class Column(NamedTuple):
    """A column of the table: its title, the score that it shows, and its digits."""

    title: str
    key: str
    digits: int


Scores = dict[str, float]


@dataclass(frozen=True)
class Study:
    """What is compared, and how it is read.

    Attributes:
        title: of the table, a sentence.
        methods: by name, what runs do beside the own losses; a run without, `OWN`, comes first.
        readings: by name, how a trained model is scored; the name is put behind that of the run, "" for nothing.
        columns: of the table. Milliseconds of a step are scores, too: "ms".
        settings: of the training.
        compared_with: by row of the table, the row that it is compared with where that is not the first.
        alone: names of the methods that are run without SSync only.
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
    """A run: a deep copy of it goes on as the run itself would."""

    settings: Settings
    seed: int
    model: SlotModel
    method: Method
    optimizer: torch.optim.Adam
    scheduler: torch.optim.lr_scheduler.LambdaLR
    rng: Tensor
    step: int = 0
    times: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, make: Callable[[SlotModel, Settings], Method], settings: Settings, seed: int) -> "Training":
        """Start from the weights that the seed gives: the model's are the same with every method."""
        torch.manual_seed(seed)
        model = SlotModel(settings.slots)
        method = make(model, settings)
        optimizer, scheduler = make_optimizer([*model.parameters(), *method.parameters()], settings)
        return cls(settings, seed, model, method, optimizer, scheduler, torch.get_rng_state())

    def train(self, features: Tensor, *, until: int, criterion: SSyncLoss | None, title: str) -> None:
        """Train up to a step."""
        settings, model, method = self.settings, self.model, self.method
        parameters = [*model.parameters(), *method.parameters()]
        torch.set_rng_state(self.rng)
        for step in tqdm(range(self.step, until), title, initial=self.step, total=until, dynamic_ncols=True):
            started = time.perf_counter()
            chosen = batch_of_step(step, num_clips=len(features), batch_size=settings.batch_size, seed=self.seed)
            batch = features[chosen]
            output = method.forward(batch)
            loss = reconstruction_loss(output, batch) + settings.contrast_weight * slot_contrast_loss(output.slots)
            loss = loss + method.loss(output, batch, step)
            if criterion is not None:
                loss = loss + criterion(output.enc_logits, output.dec_logits, step=step)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            self.optimizer.step()
            self.scheduler.step()
            method.after_step(self.optimizer, step)
            self.times.append(time.perf_counter() - started)
        self.step, self.rng = until, torch.get_rng_state()


def run_seed(study: Study, features: Tensor, seed: int) -> dict[str, Scores]:
    """Train and score every run of a seed: by name of run and reading, its scores."""
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
            # of the steps in which SSync is on, where it is
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
    """The scores by seed, run and score, and what makes them credible."""

    title: str
    columns: list[Column]
    settings: dict[str, Any]
    machine: dict[str, Any]
    seeds: dict[int, dict[str, Scores]]
    compared_with: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "StudyReport":
        """Read what `save` wrote.

        Raises:
            ValueError: if it is another file; it names the file and what was found.
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
    """Lay out the scores as Markdown: those of the first run, and what others gain on it, or on the run named."""
    columns, runs = report.columns, list(report.seeds.values())
    first, *others = runs[0]
    rows = [["", *(column.title for column in columns)]]
    rows.append([first, *(mean_sd([run[first][c.key] for run in runs], c.digits) for c in columns)])
    for name in others:
        other = report.compared_with.get(name, first)
        gains = (mean_sd([run[name][c.key] - run[other][c.key] for run in runs], c.digits, "+") for c in columns)
        rows.append([name if other == first else f"{name} (to {other})", *gains])
    settings, spread = report.settings, " (mean ± sd over seeds)" * (len(runs) > 1)
    return "\n".join(
        [
            f"{report.title} First row: scores{spread}; others: paired differences to it or to the run named.",
            f"{settings['data']}: {settings['num_clips']} clips, {settings['slots']} slots, {settings['steps']} steps, "
            f"SSync with merge threshold {settings['threshold']} from step {settings['start_step']}, "
            f"seed {', '.join(map(str, report.seeds))}.",
            machine_line(report.machine),
            "",
            *markdown(rows),
        ]
    )


class Options(NamedTuple):
    """What the command line says: see `main`."""

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
        name: of the study, for its results.
        description: for --help.
        build: makes the study and the features (B, T, D, H, W) that are trained on.
        arguments: the command line; None for the process's own.
        steps: of a run, if the command line does not say.
        slots: of the model, likewise.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_training_options(parser, steps=steps, slots=slots)
    parser.add_argument("--out", type=Path, default=Path("runs") / f"{name}.json", help="where the results go")
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
