"""When does SSync help, when does it harm, and can this be predicted? Settings, seeds and forms of the loss.

    python examples/study.py                                   # everything; takes hours and may be stopped
    python examples/study.py --only sprites --seeds 0          # one setting, one seed: some minutes on one core
    python examples/study.py --table examples/study            # the table of finished runs

In every setting and for every seed, the model trains with its own losses for 30 % of the steps. The premise is checked
on training clips and on fresh clips. Then the run continues with its own losses, with SSync, and with adaptive SSync.
In a few settings it also continues with fixed forms of SSync and with other thresholds. Every finished run is added to
`rows.jsonl`, so the same command continues where it stopped. Commands with different settings may run in parallel.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lets this file run as a script

from examples.arguments import Bounded, add_threads, at_least, at_most, explained
from examples.checkpoint import Settings, TrainingState
from examples.evaluation import Asked, EvaluationSet, ask_premise, evaluate, maps_of, premise_summary
from examples.files import must_be_ours, must_be_writable, write_text
from examples.machine import this_machine
from examples.merge_threshold import suggest_merge_threshold
from examples.pieces import default_cache
from examples.slot_model import SlotModel, SlotOutput
from examples.study_report import SCORES, Rows, save_figure, summary, table
from examples.study_settings import LEVELS, NUM_SCORED, ROLES, SETTINGS, Clips, Places, real_clips
from examples.training import Terms, terms_of, train

from ssync_loss import AdaptiveSSyncLoss, SSyncLoss

THRESHOLD = 0.6
# steps between two records of the adaptive loss's margins
COURSE = 10


class Form(NamedTuple):
    """The loss that a run adds to the own losses: plain or adaptive SSync.

    Attributes:
        threshold: merge threshold; None merges nothing, and "suggested" is computed from the maps at the start.
        boundary: weight of the boundary term.
        asks: settings of the adaptive loss; None for plain SSync.
    """

    threshold: float | str | None = THRESHOLD
    boundary: float = 1.0
    asks: dict[str, Any] | None = None


MAIN: dict[str, Form | None] = {"baseline": None, "ssync": Form(), "adaptive": Form(asks={})}
FIXED: dict[str, Form | None] = {
    "unmerged": Form(None),
    "interior": Form(None, boundary=0.0),
    "threshold 0.75": Form(0.75),
    "threshold 0.9": Form(0.9),
    "threshold suggested": Form("suggested"),
}
KNOBS: dict[str, Form | None] = {
    # the moving average covers as many steps as usual
    "every 5": Form(asks={"every": 5, "warmup": 10, "momentum": 0.9}),
    "dead zone 0.01": Form(asks={"dead_zone": 0.01}),
    "warmup 150": Form(asks={"warmup": 150}),
}
FORMS = MAIN | FIXED | KNOBS


class Job(NamedTuple):
    """The runs of one setting and seed, which share their beginning."""

    name: str
    seed: int
    runs: list[str]


def plan(names: Sequence[str], seeds: Sequence[int] | None, runs: Sequence[str] | None) -> Iterator[Job]:
    """Order the jobs: the first seed of all settings first, fixed forms last."""

    def seeds_of(name: str) -> Sequence[int]:
        return SETTINGS[name].seeds if seeds is None else seeds

    for group in (MAIN, KNOBS, FIXED):
        for place in range(max((len(seeds_of(name)) for name in names), default=0)):
            for name in names:
                chosen = [run for run in group if run in runs] if runs is not None else _usual(name, group)
                if chosen and place < len(seeds_of(name)):
                    yield Job(name, seeds_of(name)[place], chosen)


def _usual(name: str, group: dict[str, Form | None]) -> list[str]:
    """Return the default runs of a setting."""
    wanted = group is MAIN or (group is KNOBS and SETTINGS[name].role == "development")
    return list(group) if wanted or (group is FIXED and name in LEVELS) else []


class Kept(NamedTuple):
    """The settings and clips that the runs of a job share, and the checkpoint of their beginning."""

    job: Job
    settings: Settings
    clips: Clips
    path: Path


class Study:
    """Trains and scores runs, and saves every finished run.

    Args:
        out: folder of the rows and of the shared beginnings.
        places: folders of clips.
        steps: steps of a run.
        quick: whether to use few clips.
    """

    def __init__(self, out: Path, places: Places, *, steps: int, quick: bool) -> None:
        self.rows, self.checkpoints = Rows(out / "rows.jsonl"), out / "checkpoints"
        self.places = places
        self.steps, self.quick = steps, quick
        # read once, as later commits do not change the running code
        self.machine = this_machine()
        self.clips = lru_cache(maxsize=2)(self._clips)

    def _clips(self, name: str) -> Clips:
        return SETTINGS[name].make(self._number(name), 8 if self.quick else NUM_SCORED, self.places)

    def _number(self, name: str) -> int:
        num_clips = SETTINGS[name].num_clips
        return min(48, num_clips) if self.quick else num_clips

    def work(self, job: Job) -> None:
        """Train the missing runs of a job."""
        if not self._missing(job, ["shared", *job.runs]):
            return
        setting = SETTINGS[job.name]
        clips = self.clips(job.name)
        settings = Settings(setting.title, len(clips.features), setting.slots, self.steps, THRESHOLD)
        path = self.checkpoints / f"{job.name}_seed{job.seed}.pt"
        kept = Kept(job, settings, clips, path)
        digest = self._begin(kept)
        for run in self._missing(job, job.runs, digest):
            self._run(kept, run, digest)

    def _missing(self, job: Job, runs: list[str], digest: str | None = None) -> list[str]:
        """Return the runs without a row, or without a row from this beginning."""
        same = {"setting": job.name, "steps": self.steps, "seed": job.seed}
        same |= {"clips": self._number(job.name)} if self._number(job.name) else {}
        same |= {} if digest is None else {"shared": digest}
        done = {row["run"] for row in self.rows.load() if same.items() <= row.items()}
        return [run for run in runs if run not in done]

    def _begin(self, kept: "Kept") -> str:
        """Train the beginning and check the premise unless this is done. Return the hash of the weights."""
        job, settings, clips, path = kept
        if path.exists():
            state = TrainingState.load(path, settings, job.seed)
        else:
            state = TrainingState.fresh(settings, job.seed)
        if state.step < settings.start_step:
            title = f"{job.name}, seed {job.seed}, shared"
            train(state, clips.features, terms_of(state, None), settings.start_step, title=title)
            state.save(path)
        digest = digest_of(state.model)
        if not self._missing(job, ["shared"], digest):
            return digest
        premise = {
            which: premise_summary(ask_premise(state.model, asked, THRESHOLD))
            for which, asked in (
                ("trained", Asked(clips.trained.features, clips.trained_groups)),
                ("fresh", Asked(clips.fresh.features, clips.fresh_groups)),
            )
        }
        self._keep(kept, "shared", digest, state, {"premise": premise})
        return digest

    def _run(self, kept: "Kept", run: str, digest: str) -> None:
        """Continue from the beginning with a form of the loss."""
        job, settings, clips, path = kept
        state = TrainingState.load(path, settings, job.seed)
        form, criterion, course = FORMS[run], None, list[list[float]]()
        more: dict[str, Any] = {}
        if form is not None:
            threshold = form.threshold
            if isinstance(threshold, str):
                threshold = more["threshold"] = suggested(state.model, clips.trained)
            criterion = SSyncLoss(
                merge_threshold=threshold, boundary_weight=form.boundary, start_step=settings.start_step
            )
            if form.asks is not None:
                usual = settings.adaptive()
                state.adaptive = AdaptiveSSyncLoss(criterion, **{"warmup": usual.warmup} | form.asks)
                criterion = None
        terms = terms_of(state, criterion)
        if state.adaptive is not None:
            terms = followed(terms, state.adaptive, course)
        train(state, clips.features, terms, settings.steps, title=f"{job.name}, seed {job.seed}, {run}")
        if state.adaptive is not None:
            more |= {"asked": state.adaptive.describe(), "course": course}
        self._keep(kept, run, digest, state, more)

    def _keep(self, kept: "Kept", run: str, digest: str, state: TrainingState, more: dict[str, Any]) -> None:
        """Score a run, and write its row."""
        job, settings, clips, _ = kept
        scores = {}
        for which, data in (("trained", clips.trained), ("fresh", clips.fresh)):
            found = evaluate(state.model, data, THRESHOLD)
            scores[which] = {name: round(found[name], 5) for name in SCORES if name in found}
        setting = SETTINGS[job.name]
        times = state.times[settings.start_step if run != "shared" else 0 :]
        row = {
            "setting": job.name,
            "title": setting.title,
            "role": setting.role,
            "clips": settings.num_clips,
            "slots": settings.slots,
            "steps": settings.steps,
            "seed": job.seed,
            "run": run,
            "shared": digest,
            "scores": scores,
            **more,
            "step_ms": round(1000 * median(times), 2),
            "seconds": round(sum(times), 1),
            "machine": self.machine | {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")},
        }
        self.rows.add(row)


def followed(terms: Terms, adaptive: AdaptiveSSyncLoss, course: list[list[float]]) -> Terms:
    """Record the margins of the adaptive loss, plain and merged, every few steps."""

    def with_course(output: SlotOutput, features: Tensor, step: int) -> dict[str, Tensor]:
        added = terms(output, features, step)
        if (step - adaptive.criterion.start_step) % COURSE == 0:
            told = adaptive.describe()
            course.append([step, round(told["margin"], 4), round(told["merged_margin"], 4)])
        return added

    return with_course


def suggested(model: SlotModel, data: EvaluationSet) -> float:
    """Suggest a merge threshold from the maps of training clips."""
    enc_logits, _ = maps_of(model, data.features)
    return suggest_merge_threshold(enc_logits, data.features)


def digest_of(model: SlotModel) -> str:
    """Return a hash of the weights, which identifies a shared beginning."""
    content = hashlib.sha256()
    for values in model.state_dict().values():
        content.update(values.numpy().tobytes())
    return content.hexdigest()[:12]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="When does SSync help, when does it harm, and can this be predicted?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/study"), help="folder for rows, table and picture")
    add("--clips", type=Path, help="NAME_video.mp4 and NAME_colormap.mp4 of real clips, left out if not given")
    add("--cache", type=Path, default=default_cache(), help="folder for clips and pretrained features")
    add("--only", nargs="+", choices=[*SETTINGS, *ROLES], metavar="NAME", help="settings, or roles of settings")
    add("--runs", nargs="+", choices=list(FORMS), metavar="RUN", help="runs of a setting; the usual ones if not given")
    seeds = [at_least(0), at_most(2**32 - 1)]
    add("--seeds", type=int, nargs="+", action=Bounded, rules=seeds, help="training seeds; the usual ones if not given")
    add("--steps", type=int, default=1500, action=Bounded, rules=[at_least(10)], help="optimizer steps of a run")
    add("--quick", action="store_true", help="a rehearsal with few clips; its numbers mean nothing")
    add_threads(parser, at_least(1), help="CPU threads; operators this small gain nothing from a second thread")
    add("--table", type=Path, metavar="FOLDER", help="only print the table of finished runs, and redraw the picture")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 130 when Ctrl-C cut it short."""
    options = parse(arguments)
    if options.table is not None:
        with explained():
            return report(options.table)
    with explained():
        must_be_writable(options.out / "study.png", "--out")
        must_be_ours(options.out / "rows.jsonl", "--out", lambda path: Rows(path).load())
    torch.set_num_threads(options.threads)
    chosen = [name for name, one in SETTINGS.items() if not options.only or {name, one.role} & set(options.only)]
    if options.clips is None:
        chosen = [name for name in chosen if SETTINGS[name].make is not real_clips]
    study = Study(options.out, Places(options.cache, options.clips), steps=options.steps, quick=options.quick)
    stopped = False
    with explained():
        try:
            for job in plan(chosen, options.seeds, options.runs):
                study.work(job)
        except KeyboardInterrupt:
            stopped = True
        report(options.out)
    if stopped:
        print("stopped; the same command goes on from here")
    return 130 if stopped else 0


def report(out: Path) -> int:
    """Print a summary of the finished runs, and write the tables and the picture."""
    rows = Rows(out / "rows.jsonl").load()
    print(f"\n{summary(rows)}\n")
    write_text(out / "table.md", f"{table(rows)}\n")
    save_figure(rows, out / "study.png")
    print(f"rows    {out / 'rows.jsonl'}\nall of them {out / 'table.md'}\npicture {out / 'study.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
