"""The results of the example as a file, a table and a figure."""

import json
from dataclasses import asdict, dataclass, field
from math import isnan, nan
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from examples.checkpoint import Settings, TrainingState
from examples.dense_alignment import DenseSettings
from examples.evaluation import EvaluationSet, maps_of
from examples.files import Fields, check_fields, read_json, write_text, written_whole
from examples.machine import check_origin, machine_line, this_machine
from examples.markdown import markdown, mean_sd, number
from examples.slot_model import SlotModel
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ssync_loss.visualize import PANEL_ROWS, ROLE_COLORS, filmstrip, overlay, panel

RUN_NAMES = {
    "shared": "shared part only",
    "baseline": "own losses",
    "ssync": "+ SSync",
    "adaptive": "+ SSync, adaptive",
    "dense": "+ dense alignment (SRL)",
}
# title, score, digits
COLUMNS = (
    ("FG-ARI", "dec_fg_ari", 3),
    ("ARI", "dec_ari", 3),
    ("mBO", "dec_mbo", 3),
    ("encoder FG-ARI", "enc_fg_ari", 3),
    ("slots in use", "dec_slots", 1),
    ("object recall", "dec_recall", 3),
    ("fragmentation", "dec_fragmentation", 2),
)
COLUMNS_WITHOUT_TRUTH = (
    ("agreement of the maps", "agreement", 3),
    ("slots in use", "dec_slots", 1),
    ("encoder slots in use", "enc_slots", 1),
    ("slots merged", "merges", 1),
    ("boundary share", "boundary_share", 3),
    ("interior share", "interior_share", 3),
)
# shown if there is a dense run
TIME_COLUMN = ("ms per step", "step_ms", 1)
HISTORY_WINDOW = 50
FIGURE_CLIPS, SCALE = 3, 2
VERDICTS = {"holds": "holds", "fails": "does not hold", "cannot tell": "cannot tell"}
# required fields of a file of results
NUMBER = (int, float)
DENSE = dict.fromkeys(("weight", "start_step", "group_frames", "top_k", "redundancy_weight", "redundancy_end"), NUMBER)
PREMISE: Fields = {"holds": bool, **dict.fromkeys(("margin", "margin_standard_error", "num_clips"), NUMBER)}
MERGED_PREMISE: Fields = {
    "verdict": str,
    **dict.fromkeys(("merged_margin", "merged_margin_standard_error", "num_videos"), NUMBER),
}
RUN: Fields = {"step": int, "seconds": NUMBER, "scores": dict, "history": list, "step_ms": (*NUMBER, type(None))}


@dataclass
class Run:
    """One trained model: its steps, its scores, and its losses as means over windows of steps.

    Attributes:
        step: finished steps.
        seconds: their time without evaluations.
        scores: see `evaluate`.
        history: losses.
        step_ms: median milliseconds of the steps after the shared part; None if there are none.
    """

    step: int
    seconds: float
    scores: dict[str, float]
    history: list[dict[str, float]]
    step_ms: float | None = None

    @classmethod
    def of(cls, state: TrainingState, scores: dict[str, float]) -> "Run":
        """Summarize a training state."""
        windows = [
            state.history[start : start + HISTORY_WINDOW] for start in range(0, len(state.history), HISTORY_WINDOW)
        ]
        history = [
            {"step": min((i + 1) * HISTORY_WINDOW, state.step)}
            | {name: round(fmean(losses[name] for losses in window), 5) for name in window[0]}
            for i, window in enumerate(windows)
        ]
        times = state.times[state.settings.start_step :]
        step_ms = round(1000 * median(times), 2) if times else None
        return cls(state.step, round(sum(state.times), 1), scores, history, step_ms)

    def value(self, key: str) -> float:
        """Return a score, or the time for `step_ms`, which is NaN if it was not measured."""
        if key != TIME_COLUMN[1]:
            return self.scores[key]
        return nan if self.step_ms is None else self.step_ms


@dataclass
class SeedReport:
    """The runs of one seed, and the premise just before the loss starts.

    ``premise`` is measured on training clips, ``fresh`` on fresh clips. Older files have only ``premise``, without a
    merged margin. They measured it on fresh clips, or on training clips if these were the user's.
    """

    seed: int
    premise: dict[str, Any] | None = None
    runs: dict[str, Run] = field(default_factory=dict)
    fresh: dict[str, Any] | None = None


@dataclass
class Report:
    """The results and their origin: settings, machine, versions, commit and date."""

    settings: dict[str, Any]
    machine: dict[str, Any]
    complete: bool = False
    seeds: list[SeedReport] = field(default_factory=list)

    @classmethod
    def here(cls, settings: Settings, dense: DenseSettings | None = None) -> "Report":
        """Start a report on this machine."""
        content: dict[str, Any] = asdict(settings) | {"start_step": settings.start_step}
        if dense is not None:
            steps = {"start_step": dense.start_step, "redundancy_end": dense.redundancy_end}
            content["dense"] = asdict(dense) | steps
        return cls(content, this_machine())

    def save(self, path: Path) -> None:
        """Write a JSON file."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Read a file of `save`.

        Raises:
            ValueError: if it is another file; the message names the file and the problem.
        """
        content = read_json(path)
        whole = {"settings": dict, "machine": dict, "complete": bool, "seeds": list}
        check_fields(content, whole, f"{path}, a file of results,")
        check_origin(content["settings"], content["machine"], f"{path}")
        if "dense" in content["settings"]:
            check_fields(content["settings"]["dense"], DENSE, f"{path}: `settings.dense`", more=True)
        seeds = []
        for place, seed in enumerate(content["seeds"]):
            where = f"{path}: `seeds[{place}]`"
            parts: Fields = {"seed": int, "premise": (dict, type(None)), "runs": dict, "fresh": (dict, type(None))}
            check_fields(seed, parts, where, optional=["fresh"])
            for name in ("premise", "fresh"):
                found = seed.get(name)
                if found is not None:
                    merged = MERGED_PREMISE if name == "fresh" or "merged_margin" in found else {}
                    check_fields(found, {**PREMISE, **merged}, f"{where}: `{name}`", more=True)
            check_fields(seed["runs"], dict.fromkeys(RUN_NAMES, dict), f"{where}: `runs`", optional=RUN_NAMES)
            for name, run in seed["runs"].items():
                check_fields(run, RUN, f"{where}: `runs.{name}`", optional=["step_ms"])
            seeds.append(SeedReport(**seed | {"runs": {name: Run(**run) for name, run in seed["runs"].items()}}))
        report = cls(content["settings"], content["machine"], content["complete"], seeds)
        scores = {key: NUMBER for _, key, _ in report.columns()}
        for seed, name, run in report.all_runs():
            check_fields(run.scores, scores, f"{path}: `scores` of {name}, seed {seed}", more=True)
        return report

    def all_runs(self) -> list[tuple[int, str, Run]]:
        """List all runs with their seeds and names."""
        return [(seed.seed, name, run) for seed in self.seeds for name, run in seed.runs.items()]

    def columns(self) -> tuple[tuple[str, str, int], ...]:
        """Choose the columns of scores, depending on whether there was ground truth."""
        runs = self.all_runs()
        return COLUMNS if runs and "dec_fg_ari" in runs[0][2].scores else COLUMNS_WITHOUT_TRUTH


def table(report: Report) -> str:
    """Format the table that a run prints: the README's table, then the gains of every seed."""
    _, by_seed = _rows(report)
    dense = report.settings.get("dense")
    lines = [] if len(by_seed) == 1 else [*markdown(by_seed), ""]
    lines += [] if dense is None else [_dense_line(dense, report.settings["steps"])]
    return "\n".join([in_short(report), "", *lines, *_premise_lines(report), *_time_lines(report)]).rstrip()


def in_short(report: Report) -> str:
    """Format the scores as a Markdown table: the runs, and their gains over the own losses."""
    rows, _ = _rows(report)
    return "\n".join([*_caption(report), "", *markdown(rows)])


def _rows(report: Report) -> tuple[list[list[str]], list[list[str]]]:
    """Return the rows of means and the rows of single seeds, both with their head."""
    columns = report.columns()
    names = [name for name in RUN_NAMES if any(name in seed.runs for seed in report.seeds)]
    if "dense" in names:
        columns = (*columns, TIME_COLUMN)

    head = ["", *(title for title, _, _ in columns)]
    rows, by_seed = [head], [head]
    for name in names:
        runs = [seed.runs[name] for seed in report.seeds if name in seed.runs]
        steps = sorted({run.step for run in runs})
        unfinished = "" if steps == [_last_step(report, name)] else f" (step {', '.join(map(str, steps))})"
        cells = [mean_sd([run.value(key) for run in runs], digits) for _, key, digits in columns]
        rows.append([RUN_NAMES[name] + unfinished, *cells])
    compared = [name for name in ("ssync", "adaptive", "dense") if name in names]
    for name in compared:
        paired = [seed for seed in report.seeds if {"baseline", name} <= seed.runs.keys()]
        if not paired:
            continue
        title = f"{RUN_NAMES[name]}: difference" if len(compared) > 1 else "difference"
        gains = {key: [_gain(seed, name, key) for seed in paired] for _, key, _ in columns}
        rows.append([title, *(mean_sd(gains[key], digits, sign="+") for _, key, digits in columns)])
        if len(paired) > 1:
            for i, seed in enumerate(paired):
                cells = [number(gains[key][i], digits, sign="+") for _, key, digits in columns]
                by_seed.append([f"{title}, seed {seed.seed}", *cells])
    return rows, by_seed


def _last_step(report: Report, name: str) -> int:
    last: int = report.settings["start_step" if name == "shared" else "steps"]
    return last


def _gain(seed: SeedReport, name: str, key: str) -> float:
    return seed.runs[name].value(key) - seed.runs["baseline"].value(key)


def _caption(report: Report) -> list[str]:
    settings = report.settings
    seeds = ", ".join(str(seed.seed) for seed in report.seeds)
    what = (
        "Masks of the decoder on fresh clips, unmerged, per clip at full size. FG-ARI, mBO, recall and fragmentation "
        "are of objects, ARI of all pixels. A slot is in use if it wins a pixel. Recall is the share of objects with a "
        "slot of IoU above 1/2. Fragmentation counts the slots that lie mostly inside an object."
        if report.columns() is COLUMNS
        else "No ground truth: what can be said without it, on clips that were trained on."
    )
    spread = " Mean ± sd over seeds; differences are paired." if len(report.seeds) > 1 else ""
    return [
        f"{what}{spread}",
        f"{settings['data']}: {settings['num_clips']} clips, {settings['slots']} slots, "
        f"{settings['steps']} steps, SSync with merge threshold {settings['threshold']} from step "
        f"{settings['start_step']}, seed {seeds}.",
        machine_line(report.machine),
    ]


def _dense_line(dense: dict[str, Any], steps: int) -> str:
    return (
        f"Dense alignment (SRL) with weights {dense['weight']} and {dense['weight']} from step {dense['start_step']} "
        f"of {steps}, windows of {dense['group_frames']} frames, {dense['top_k']} neighbors a frame; slot redundancy "
        f"with weight {dense['redundancy_weight']} before step {dense['redundancy_end']}."
    )


def _premise_lines(report: Report) -> list[str]:
    def margin(premise: dict[str, Any], name: str) -> str:
        return f"{name.replace('_', ' ')} {premise[name]:+.3f} ± {premise[f'{name}_standard_error']:.3f}"

    def line(seed: int, premise: dict[str, Any], whose: str) -> str:
        verdict = premise.get("verdict", "holds" if premise["holds"] else "fails")
        verb = VERDICTS.get(verdict, verdict)
        margins = [margin(premise, name) for name in ("margin", "merged_margin") if name in premise]
        clips = f"{premise['num_clips']} {whose}clips"
        videos = premise.get("num_videos", premise["num_clips"])
        of = "" if videos == premise["num_clips"] else f" of {videos} videos"
        return (
            f"Premise at step {report.settings['start_step']}, seed {seed}: {verb}, "
            f"{', '.join(margins)} (standard error over {clips}{of})."
        )

    lines = []
    for seed in report.seeds:
        if seed.premise is not None:
            lines.append(line(seed.seed, seed.premise, "training " if "merged_margin" in seed.premise else ""))
        if seed.fresh is not None:
            lines.append(line(seed.seed, seed.fresh, "fresh "))
    return lines


def _time_lines(report: Report) -> list[str]:
    """Compare a step's time with that of the own losses, for the seeds in which dense alignment was timed."""

    def line(seed: int, own: float, ssync: float, dense: float) -> str:
        return (
            f"Median step from step {report.settings['start_step']} on, seed {seed}: with SSync {ssync / own:.2f} "
            f"times and with dense alignment {dense / own:.2f} times as long as with own losses."
        )

    timed = [
        (seed.seed, [seed.runs[name].value("step_ms") for name in ("baseline", "ssync", "dense")])
        for seed in report.seeds
        if {"baseline", "ssync", "dense"} <= seed.runs.keys()
    ]
    return [line(seed, *times) for seed, times in timed if not any(map(isnan, times))]


def save_figure(report: Report, data: EvaluationSet, models: dict[str, SlotModel], path: Path) -> None:
    """Draw all runs on the same clips: both maps, the merged labels and the regions."""
    chosen = torch.linspace(0, len(data.video) - 1, min(FIGURE_CLIPS, len(data.video))).round().long()
    video = data.video[chosen]
    threshold = report.settings["threshold"]
    blocks = {
        RUN_NAMES[name]: panel(video, *maps_of(model, data.features[chosen]), merge_threshold=threshold, scale=SCALE)
        for name, model in models.items()
    }
    rows = {name: list(PANEL_ROWS) for name in blocks}
    if data.ids is not None:
        truth = overlay(video.mean(dim=2, keepdim=True).expand_as(video), data.ids[chosen], alpha=0.6)
        enlarged = truth.repeat_interleave(SCALE, dim=-1).repeat_interleave(SCALE, dim=-2)
        blocks = {"ground truth": filmstrip(enlarged, gap=2)} | blocks
        rows["ground truth"] = ["ground truth"]

    heights = [block.shape[-2] for block in blocks.values()]
    width = sum(picture.shape[-1] for picture in next(iter(blocks.values())))
    inch = 110
    figure = Figure(figsize=(width / inch + 1.6, sum(heights) / inch + 1.2), layout="constrained")
    axes = figure.subplots(len(blocks), len(chosen), squeeze=False, height_ratios=heights)
    for row, (name, block) in zip(axes, blocks.items(), strict=True):
        for axis, picture in zip(row, block, strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        band = block.shape[-2] / len(rows[name])
        row[0].set_yticks([(i + 0.5) * band for i in range(len(rows[name]))], rows[name], fontsize="x-large")
        row[0].tick_params(length=0)
        if len(rows[name]) > 1:
            row[0].set_ylabel(name, fontsize="xx-large", fontweight="bold")
    patches = [
        Patch(color=(red / 255, green / 255, blue / 255), label=role)
        for role, (red, green, blue) in ROLE_COLORS.items()
        if role != "invalid"
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), title="who is taught", frameon=False)
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=100, format="png")
