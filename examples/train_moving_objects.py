"""Train a small video slot model twice, with and without one line, and show the effect of the line.

    python examples/train_moving_objects.py                    # one seed, about two minutes on one core
    python examples/train_moving_objects.py --seeds 0 1 2      # mean ± sd over three
    python examples/train_moving_objects.py --clips my_videos  # your own mp4 files or folders of frames
    python examples/train_moving_objects.py --compare dense    # a third run with dense alignment; slow
    python examples/train_moving_objects.py --compare adaptive # a third run with adaptive SSync
    python examples/train_moving_objects.py --table runs/moving_objects/results.json

Both runs share the first 30 % of the steps: the same weights, optimizer state and order of the data. Then one run
continues with the model's own losses, reconstruction and slot contrast. The other run adds `SSyncLoss`.
`--compare adaptive` adds a third run with `AdaptiveSSyncLoss`, which branches off at the same step.
`--compare dense` adds a third run with dense alignment, which SSync replaces. It begins at the first step, like its
terms. It shares the initial weights and the order of the data.
Ctrl-C stops after the current step and keeps the finished steps; `--resume` continues from there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Event

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lets this file run as a script

from examples.arguments import Bounded, add_training_options, at_least, explained, within
from examples.checkpoint import Settings, TrainingState
from examples.data import Data, make_data, read_data
from examples.dense_alignment import DenseSettings
from examples.evaluation import ask_premise, evaluate, premise_summary
from examples.files import must_be_ours, must_be_writable
from examples.report import Report, Run, SeedReport, save_figure, table
from examples.training import stop_on_ctrl_c, terms_of, train

from ssync_loss import SSyncLoss
from ssync_loss.diagnostics import report as premise_report

STAGES = ("shared", "baseline", "ssync")
CHECKPOINT_BYTES = 2_000_000


def train_one_seed(
    seed: int, settings: Settings, data: Data, checkpoints: Path, *, compare: str | None, resume: bool, stop: Event
) -> SeedReport:
    """Train the shared part, check the premise, and train the branches and the run to compare.

    After a stop, the report holds the runs so far.
    """
    criterion = settings.criterion()
    report = SeedReport(seed)

    def run(stage: str, start: Path | None, criterion: SSyncLoss | None, until: int) -> TrainingState:
        checkpoint = checkpoint_path(checkpoints, seed, stage)
        if resume and checkpoint.exists():
            state = TrainingState.load(checkpoint, settings, seed)
        elif start is not None:
            state = TrainingState.load(start, settings, seed)
        else:
            state = TrainingState.fresh(settings, seed, dense=stage == "dense")
        if stage == "adaptive" and state.adaptive is None:
            state.adaptive = settings.adaptive()
        title = f"seed {seed}, {stage}"
        terms = terms_of(state, criterion)
        train(state, data.features, terms, until, title=title, save=lambda: state.save(checkpoint), stop=stop)
        if state.adaptive is not None:
            print(f"{title}: {state.adaptive.describe()}")
        return state

    # before its start step the criterion is exactly zero, so both runs share this part
    shared = run("shared", None, criterion, settings.start_step)
    if stop.is_set():
        report.runs["shared"] = Run.of(shared, evaluate(shared.model, data.test, settings.threshold))
        return report
    # the loss acts on training clips; fresh clips show whether the model has memorized these
    trained, fresh = (
        None if asked is None else ask_premise(shared.model, asked, settings.threshold)
        for asked in (data.trained, data.fresh)
    )
    assert trained is not None
    print(f"\n{premise_report(trained, fresh=fresh)}\n")
    report.premise = premise_summary(trained)
    report.fresh = None if fresh is None else premise_summary(fresh)

    branching = checkpoint_path(checkpoints, seed, "shared")
    stages: list[tuple[str, Path | None, SSyncLoss | None]]
    stages = [("baseline", branching, None), ("ssync", branching, criterion)]
    if compare is not None:
        # dense alignment begins at the first step
        stages.append((compare, branching if compare == "adaptive" else None, None))
    for stage, start, line in stages:
        state = run(stage, start, line, settings.steps)
        report.runs[stage] = Run.of(state, evaluate(state.model, data.test, settings.threshold))
        if stop.is_set():
            break
    return report


def checkpoint_path(checkpoints: Path, seed: int, stage: str) -> Path:
    """Return the checkpoint of a seed's stage."""
    return checkpoints / f"seed{seed}_{stage}.pt"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small video slot model with and without SSync, and show the difference.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_training_options(parser, steps=1500, slots=9)
    add(
        "--threshold", type=float, default=0.6, action=Bounded, rules=[within(0, 1)], help="merge threshold of the loss"
    )
    third = "a third run: with the adaptive loss, or with dense alignment (SRL), which takes several times as long"
    add("--compare", choices=["adaptive", "dense"], help=third)
    add("--clips", type=Path, help="your own videos or folders of frames instead of the moving objects")
    add("--match", default="*", help="with --clips: pattern for the names of videos and folders")
    every = "with --clips: take every n-th frame"
    add("--stride", type=int, default=1, action=Bounded, rules=[at_least(1)], help=every)
    add("--out", type=Path, help="output folder; runs/moving_objects or runs/clips if not given")
    add("--resume", action="store_true", help="continue the run in --out")
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = Path("runs/moving_objects" if options.clips is None else "runs/clips")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 130 when Ctrl-C cut it short."""
    options = parse(arguments)
    if options.table is not None:
        with explained():
            print(table(Report.load(options.table)))
        return 0
    with explained():
        num_checkpoints = len(stages_of(options.compare)) * len(options.seeds)
        look_into(options.out, resume=options.resume, num_checkpoints=num_checkpoints)
    torch.set_num_threads(options.threads)

    num_train, num_held_out, num_test, steps = 1500, 100, 200, options.steps
    if options.quick:
        num_train, num_held_out, num_test, steps = 48, 8, 8, min(steps, 40)
    if options.clips is None:
        data = make_data(num_train=num_train, num_premise=num_held_out, num_test=num_test)
    else:
        with explained():
            data = read_data(
                options.clips, match=options.match, stride=options.stride, num_premise=num_held_out, num_test=num_test
            )
    settings = Settings(
        data=data.description,
        num_clips=len(data.features),
        slots=options.slots,
        steps=steps,
        threshold=options.threshold,
    )

    again = "" if options.compare is None else f" --compare {options.compare}"
    return train_all(
        data,
        settings,
        options.seeds,
        compare=options.compare,
        out=options.out,
        resume=options.resume,
        again=f"{again} --out {options.out}",
    )


def train_all(
    data: Data, settings: Settings, seeds: Sequence[int], *, compare: str | None, out: Path, resume: bool, again: str
) -> int:
    """Train the runs of all seeds, then print the table and draw the picture.

    Args:
        data: clips for training, for the premise and for scoring.
        settings: settings of all runs.
        seeds: training seeds.
        compare: a third run, "adaptive" or "dense".
        out: output folder; see `look_into`.
        resume: whether to continue the run in the folder.
        again: the options that continue a stopped run, besides `--resume`.

    Returns:
        0, or 130 when Ctrl-C cut it short.
    """
    checkpoints, results = out / "checkpoints", out / "results.json"
    if resume:
        # check them now, as a run is read only after those before it are trained
        for path, seed in ((checkpoint_path(checkpoints, seed, s), seed) for seed in seeds for s in stages_of(compare)):
            if path.exists():
                with explained():
                    TrainingState.load(path, settings, seed)
    else:
        start_over(checkpoints, results)

    report = Report.here(settings, DenseSettings(settings.steps) if compare == "dense" else None)
    with stop_on_ctrl_c() as stop, explained(OSError):
        for seed in seeds:
            report.seeds.append(
                train_one_seed(seed, settings, data, checkpoints, compare=compare, resume=resume, stop=stop)
            )
            report.complete = seed == seeds[-1] and not stop.is_set()
            report.save(results)
            if stop.is_set():
                break
    print(f"\n{table(report)}\n")
    figure = out / "comparison.png"
    first = report.seeds[0]
    models = {
        stage: TrainingState.load(checkpoint_path(checkpoints, first.seed, stage), settings, first.seed).model
        for stage in first.runs
    }
    with explained(OSError):
        save_figure(report, data.test, models, figure)
    print(f"pictures {figure}\nnumbers  {results}")
    if stop.is_set():
        print(f"stopped; --resume{again} goes on from here")
        return 130
    return 0


def stages_of(compare: str | None) -> tuple[str, ...]:
    """Return the stages of a seed."""
    return STAGES if compare is None else (*STAGES, compare)


def look_into(out: Path, *, resume: bool, num_checkpoints: int) -> None:
    """Check that all files can be written, and that nothing would be lost.

    Raises:
        ValueError: if a file cannot be written, or another program wrote it.
        SystemExit: if there is an unfinished run, and `resume` is false.
    """
    results, checkpoints = out / "results.json", out / "checkpoints"
    for path in (results, out / "comparison.png", checkpoint_path(checkpoints, 0, STAGES[0])):
        must_be_writable(path, "--out", num_bytes=(num_checkpoints + 1) * CHECKPOINT_BYTES)
    earlier = must_be_ours(results, "--out", Report.load)
    if not (resume or (earlier and earlier.complete)) and any(checkpoints.glob("*.pt")):
        raise SystemExit(
            f"{out} holds an unfinished run: go on with --resume, take another --out, or delete that folder."
        )


def start_over(checkpoints: Path, results: Path) -> None:
    """Delete the results and checkpoints of an earlier run."""
    results.unlink(missing_ok=True)
    for checkpoint in checkpoints.glob("seed*_*.pt"):
        checkpoint.unlink()


if __name__ == "__main__":
    sys.exit(main())
