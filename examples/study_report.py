"""The rows of the study, their tables and their picture."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from math import isfinite, nan
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from examples.files import check_fields, written_whole
from examples.markdown import markdown, mean_sd, number
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Row = dict[str, Any]

SCORES = tuple(f"{side}_{name}" for side in ("dec", "enc") for name in ("fg_ari", "ari", "mbo", "slots"))
SETS = ("trained", "fresh")
EFFECT = "dec_fg_ari"
# smallest change that counts as an effect; seeds alone change the score by less
SMALL = 0.01
NUMBER = (int, float)
FIELDS = {
    **dict.fromkeys(("setting", "title", "role", "run", "shared"), str),
    **dict.fromkeys(("clips", "slots", "steps", "seed"), int),
    **dict.fromkeys(("scores", "machine"), dict),
}
MARGINS = {"margin": "margin", "merged_margin": "merged margin"}
ZONES = ("merged margin above 0", "margin above 0, merged below", "both margins below 0")
LEVELS = ("listening", "interior", "unmerged", "full")
ORDER = ("test", "shaped", "development")
# beginning of every row
BEGIN = '{"setting":'
MARKS = {"shaped": " *", "test": "", "development": " d"}
COLORS = {"ssync": "tab:red", "adaptive": "tab:blue"}
NAMES = {"ssync": "SSync", "adaptive": "cascade"}


class Rows:
    """A file with a row per line. Several processes may append to it.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, row: Row) -> None:
        """Append a row with one write. A failed write leaves a broken line, which `load` skips."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        with self.path.open("ab+", buffering=0) as file:
            # a broken line must not join the new row
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                line = b"\n" + line
            if file.write(line) != len(line):
                raise OSError(28, f"{self.path} has no room for a row")

    def load(self) -> list[Row]:
        """Read the rows. Broken lines are skipped. If a run has two rows, the first is taken.

        Raises:
            ValueError: if a whole line is not a row.
        """
        rows: dict[tuple[Any, ...], Row] = {}
        if not self.path.exists():
            return []
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path} is no file of rows: {error}.") from error
        for place, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                if not BEGIN.startswith(line[: len(BEGIN)]):
                    raise ValueError(f"{self.path} is no file of rows; line {place} is none.") from None
                continue
            where = f"{self.path}, line {place}"
            check_fields(row, FIELDS, where, more=True)
            check_fields(row["scores"], dict.fromkeys(SETS, dict), f"{where}: `scores`")
            for scores in row["scores"].values():
                check_fields(scores, dict.fromkeys(SCORES, NUMBER), f"{where}: `scores`", optional=SCORES)
            rows.setdefault((*beginning(row), row["run"]), row)
        return list(rows.values())


def beginning(row: Row) -> tuple[Any, ...]:
    """Return the key that all runs with the same beginning share."""
    return tuple(row[name] for name in ("setting", "clips", "steps", "seed", "shared"))


class Pair(NamedTuple):
    """A run, compared with the run on own losses from the same beginning.

    Attributes:
        row: row of the run.
        shared: row of the beginning, with the premise.
        gains: gains over the run on own losses, by set of clips and score.
    """

    row: Row
    shared: Row
    gains: dict[str, dict[str, float]]

    def margin(self, name: str, which: str = "trained") -> float:
        """Return "margin" or "merged_margin" just before the loss starts, on training or fresh clips."""
        return float(self.shared["premise"][which][name])

    def gain(self, which: str, score: str = EFFECT) -> float:
        """Return the gain of a score. It is NaN without ground truth."""
        return self.gains[which].get(score, nan)


def pairs(rows: Sequence[Row]) -> list[Pair]:
    """Pair every run with the run on own losses from the same beginning."""
    known = {(*beginning(row), row["run"]): row for row in rows}
    found = []
    for (*place, run), row in sorted(known.items(), key=lambda item: ORDER.index(item[1]["role"])):
        own, shared = (known.get((*place, name)) for name in ("baseline", "shared"))
        if run in ("baseline", "shared") or own is None or shared is None:
            continue
        gains = {
            which: {name: value - own["scores"][which][name] for name, value in row["scores"][which].items()}
            for which in SETS
        }
        found.append(Pair(row, shared, gains))
    return found


def label(row: Row) -> str:
    """Format a setting: its title, clips, slots and mark."""
    mark: str = MARKS[row["role"]]
    return f"{row['title']}, {row['clips']} clips, {row['slots']} slots{mark}"


def table(rows: Sequence[Row]) -> str:
    """Format the results as Markdown: the summary, forms and thresholds, and all runs."""
    everything = pairs(rows)
    parts = [summary(rows)]
    if any(pair.row["run"] not in NAMES for pair in everything):
        parts.append("Other forms and thresholds, paired change of decoder FG-ARI:")
        parts.append("\n".join(markdown(forms_table(everything))))
    if everything:
        parts.append("All runs, paired changes on clips trained on / fresh ones; slots in use as they are:")
        parts.append("\n".join(markdown(runs_table(everything))))
    return "\n\n".join(parts)


def summary(rows: Sequence[Row]) -> str:
    """Format the results by setting, how often the margins predict them, and the gains and harms of the cascade."""
    everything = pairs(rows)
    if not everything:
        return "Nothing to compare yet: no run has one with own losses and the same beginning."
    parts = [markdown(settings_table(everything)), signs(everything), outcome(everything)]
    return "\n\n".join([caption(rows), *map("\n".join, parts)])


def short(rows: Sequence[Row]) -> str:
    """Format the README's table: gains and harms in the test settings and by the margins."""
    return "\n".join([origin(rows), "", *outcome(pairs(rows), ("test", *ZONES))])


def caption(rows: Sequence[Row]) -> str:
    """Describe the measurements."""
    return (
        "Paired changes against the run with own losses from the same first 30 % of the steps, mean ± sd over seeds. "
        "Margins are of clips that are trained on, when the loss is about to start. FG-ARI is of the decoder's masks, "
        "per clip, on clips trained on and on fresh ones. * shaped the rule of the cascade; d was used for its knobs; "
        "the others had no part in either, and were named before they were run.\n"
        f"{origin(rows)}"
    )


def origin(rows: Sequence[Row]) -> str:
    """Describe the number of rows and their origin."""
    machines = {name: sorted({str(row["machine"].get(name)) for row in rows}) for name in ("cpu", "torch", "commit")}
    steps = ", ".join(sorted({str(row["steps"]) for row in rows}))
    return (
        f"{len(rows)} rows of {steps} steps; {', '.join(machines['cpu'])}; torch {', '.join(machines['torch'])}; "
        f"commits {', '.join(machines['commit'])}."
    )


def settings_table(everything: Sequence[Pair]) -> list[list[str]]:
    """Tabulate plain SSync and the cascade, a row per setting."""
    head = ["setting", "seeds", "margin", "merged margin"]
    head += [f"{NAMES[run]}, {which}" for run in NAMES for which in SETS]
    head += [f"{NAMES[run]}, ARI fresh" for run in NAMES]
    rows = [head]
    for name in dict.fromkeys(label(pair.row) for pair in everything):
        some = {
            run: [pair for pair in everything if (label(pair.row), pair.row["run"]) == (name, run)] for run in NAMES
        }
        asked = max(some.values(), key=len)
        if not asked:
            continue
        seeds = ", ".join(map(str, sorted(pair.row["seed"] for pair in asked)))
        cells = [mean_sd([pair.margin(which) for pair in asked], 3, "+") for which in MARGINS]
        effects = [changes(some[run], which, EFFECT) for run in NAMES for which in SETS]
        effects += [changes(some[run], "fresh", "dec_ari") for run in NAMES]
        rows.append([name, seeds, *cells, *effects])
    return rows


def changes(some: Sequence[Pair], which: str, score: str) -> str:
    """Format the mean change of a score."""
    return mean_sd([pair.gain(which, score) for pair in some], 3, "+") if some else "-"


def signs(everything: Sequence[Pair]) -> list[str]:
    """Count how often each margin has the sign of plain SSync's effect, and list the exceptions."""
    plain = [pair for pair in everything if pair.row["run"] == "ssync"]
    head = ["asked on, scored on", *(f"{margin}: {role}" for margin in MARGINS.values() for role in (*ORDER, "all"))]
    rows, wrong = [head], []
    for asked in SETS:
        for scored in SETS:
            cells = []
            for margin, title in MARGINS.items():
                for role in (*ORDER, "all"):
                    some = [pair for pair in plain if role in ("all", pair.row["role"])]
                    told = [pair for pair in some if abs(pair.gain(scored)) > SMALL]
                    failed = [pair for pair in told if pair.margin(margin, asked) * pair.gain(scored) <= 0]
                    cells.append(f"{len(told) - len(failed)} of {len(told)}" if told else "-")
                    if role == "all" and asked == "trained":
                        wrong += [
                            f"- {title}, scored on {scored} clips: {label(pair.row)}, seed {pair.row['seed']}: "
                            f"{pair.margin(margin):+.3f}, effect {pair.gain(scored):+.3f}"
                            for pair in failed
                        ]
            rows.append([f"{asked} clips, {scored} clips", *cells])
    return [
        f"How often a margin had the sign of plain SSync's effect, of the runs where that is more than {SMALL} FG-ARI:",
        "",
        *markdown(rows),
        "",
        "Where, asked on clips trained on, it had not:" if wrong else "Asked on clips trained on, it always had.",
        *wrong,
    ]


def outcome(everything: Sequence[Pair], groups: Sequence[str] = (*ORDER, "all", *ZONES)) -> list[str]:
    """Tabulate the gains and harms of plain SSync and of the cascade."""
    plain, adaptive = (
        {beginning(pair.row): pair for pair in everything if pair.row["run"] == run} for run in ("ssync", "adaptive")
    )
    both = [(plain[key], adaptive[key]) for key in plain if key in adaptive]
    head = ["settings, clips", "runs", "SSync harms", "harmed: SSync, cascade", "SSync helps", "helped: SSync, cascade"]
    head += ["cascade harms", "cascade helps", "worst: SSync, cascade"]
    rows = [head]
    for group in groups:
        for which in SETS:
            some = [
                (one.gain(which), two.gain(which))
                for one, two in both
                if group in ("all", one.row["role"], zone(one)) and isfinite(one.gain(which))
            ]
            if not some:
                continue
            harmed = [one for one in some if one[0] < -SMALL]
            helped = [one for one in some if one[0] > SMALL]
            cells = [len(some), len(harmed), _both(harmed, fmean), len(helped), _both(helped, fmean)]
            cells += [sum(two < -SMALL for _, two in some), sum(two > SMALL for _, two in some), _both(some, min)]
            rows.append([f"{group}, {which}", *map(str, cells)])
    return [f"Gains and harms of more than {SMALL} FG-ARI, and their means:", "", *markdown(rows)]


def zone(pair: Pair) -> str:
    """Return the zone of a run, which the signs of both margins on training clips determine."""
    return ZONES[0 if pair.margin("merged_margin") > 0 else 1 if pair.margin("margin") > 0 else 2]


def _both(some: Sequence[tuple[float, float]], take: Callable[[Iterable[float]], float]) -> str:
    """Format a number of plain SSync and a number of the cascade, if there are any."""
    return ", ".join(number(take(one), 3, "+") for one in zip(*some, strict=True)) if some else "-"


def forms_table(everything: Sequence[Pair]) -> list[list[str]]:
    """Tabulate all forms and thresholds, in the settings where they were run."""
    names = list(dict.fromkeys(label(pair.row) for pair in everything if pair.row["run"] not in NAMES))
    some = [pair for pair in everything if label(pair.row) in names]
    runs = [*NAMES, *sorted({pair.row["run"] for pair in some} - NAMES.keys())]
    rows = [["run", *(f"{name}: {which}" for name in names for which in SETS)]]
    for run in runs:
        chosen = [pair for pair in some if pair.row["run"] == run]
        cells = [
            changes([pair for pair in chosen if label(pair.row) == name], which, EFFECT)
            for name in names
            for which in SETS
        ]
        rows.append([NAMES.get(run, run), *cells])
    return rows


def runs_table(everything: Sequence[Pair]) -> list[list[str]]:
    """Tabulate every run."""
    titles = {
        "dec_fg_ari": "FG-ARI",
        "dec_ari": "ARI",
        "dec_mbo": "mBO",
        "enc_fg_ari": "encoder FG-ARI",
        "enc_ari": "encoder ARI",
        "enc_mbo": "encoder mBO",
    }
    head = ["setting", "seed", "run", "margin", "merged margin", *titles.values(), "slots", "encoder slots", "levels"]
    rows = [head]
    for pair in everything:
        row = pair.row
        threshold = f" ({row['threshold']:.2f})" if "threshold" in row else ""
        run = f"{NAMES.get(row['run'], row['run'])}{threshold}"
        cells = [number(pair.margin(which), 3, "+") for which in MARGINS]
        cells += [" / ".join(number(pair.gain(which, score), 3, "+") for which in SETS) for score in titles]
        for score in ("dec_slots", "enc_slots"):
            cells.append(" / ".join(number(row["scores"][which].get(score, nan), 1) for which in SETS))
        asked = row.get("asked", {})
        levels = ", ".join(f"{name} {asked[name]:.2f}" for name in LEVELS if asked.get(name, 0) > 0)
        rows.append([label(row), str(row["seed"]), run, *cells, levels])
    return rows


def save_figure(rows: Sequence[Row], path: Path) -> None:
    """Plot margin against effect with a point per run, plain SSync and the cascade in two colors."""
    everything = [pair for pair in pairs(rows) if pair.row["run"] in NAMES]
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row", squeeze=False)
    for line, which in zip(axes, SETS, strict=True):
        for axis, (margin, title) in zip(line, MARGINS.items(), strict=True):
            for pair in everything:
                color = COLORS[pair.row["run"]]
                hollow = pair.row["role"] != "test"
                axis.scatter(
                    pair.margin(margin),
                    pair.gain(which),
                    s=34,
                    marker="o" if pair.row["role"] != "development" else "^",
                    facecolors="none" if hollow else color,
                    edgecolors=color,
                )
            axis.axhline(0, color="gray", linewidth=0.8)
            axis.axvline(0, color="gray", linewidth=0.8)
            axis.set_xlabel(f"{title} at switch-on, clips trained on")
        line[0].set_ylabel(f"change of decoder FG-ARI, {which} clips")
    entries = [Line2D([], [], marker="o", linestyle="", color=COLORS[run], label=NAMES[run]) for run in NAMES]
    looks = {"test setting": ("o", "gray"), "shaped the rule": ("o", "none"), "development": ("^", "none")}
    for name, (marker, face) in looks.items():
        entries.append(
            Line2D([], [], marker=marker, linestyle="", markeredgecolor="gray", markerfacecolor=face, label=name)
        )
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), frameon=False)
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
