"""The neighbors' README has the tables of the committed results, and its claims hold for every seed."""

import re
from math import inf
from pathlib import Path
from statistics import fmean, stdev

import pytest
from examples.neighbors import affinity_consistency, cyclic_inference, slot_curriculum
from examples.neighbors.study import OWN, StudyReport, in_short, table, with_ssync

FOLDER = Path(slot_curriculum.__file__).parent
REPORTS = {path.stem: StudyReport.load(path) for path in (FOLDER / "results").glob("*.json")}
CURRICULUM, EDGES, CYCLE = "slot_curriculum", "structure_aware", "cyclic_inference"
IDENTITY, TOKENS = "temporal_correspondence", "affinity_consistency"
AGAIN, WEAK, STRONG = "+ squared error again", "+ structure, weight 0.05", "+ structure, weight 2"
SMTC, AFFINITY, AGREEMENT = "+ SMTC", affinity_consistency.AFFINITY, affinity_consistency.AGREEMENT
BOTH = [(run, run + cyclic_inference.CYCLIC, run + cyclic_inference.LONGER) for run in (OWN, with_ssync(OWN))]

# study, run, other run, scores, and bounds of the difference on every seed; "a:b" compares a with the other's b
ON_EVERY_SEED = [
    *((EDGES, STRONG, other, "contrast step_at_edges", 0, inf) for other in (OWN, AGAIN)),
    # cyclic: the first frame scores like the last, which is unchanged; a longer look helps, too, but not with noise
    *((CYCLE, back, back, "fg_ari_0:fg_ari_7 mbo_0:mbo_7", -0.01, inf) for _, back, _ in BOTH),
    *((CYCLE, back, run, "fg_ari_7 mbo_7", -1e-12, 1e-12) for run, back, _ in BOTH),
    *((CYCLE, longer, back, "fg_ari_0 mbo_0", 0, inf) for _, back, longer in BOTH),
    *((CYCLE, back, longer, "noisy_fg_ari_0 noisy_fg_ari_1 noisy_identity", 0, inf) for _, back, longer in BOTH),
    (IDENTITY, SMTC, OWN, "kept_last", 0, inf),
    (TOKENS, AFFINITY, OWN, "j_and_f", 0, inf),
    (TOKENS, AFFINITY, OWN, "j_and_f:frozen_j_and_f", -inf, 0),
    (TOKENS, AGREEMENT, AFFINITY, "j_and_f", 0, inf),
]
# comparisons whose mean difference is at most the spread of the differences
WITHIN_SPREAD = [
    *(
        (CURRICULUM, run, OWN, " ".join(column.key for column in slot_curriculum.COLUMNS))
        for run in (slot_curriculum.PUBLISHED, slot_curriculum.LONGER)
    ),
    (EDGES, WEAK, OWN, "contrast error_at_edges step_at_edges step_inside contour_f"),
    (IDENTITY, with_ssync(SMTC), with_ssync(OWN), "kept_last"),
]


def gains(study: str, run: str, other: str, key: str) -> list[float]:
    """Return the differences of a score, seed by seed."""
    ours, _, theirs = key.partition(":")
    return [runs[run][ours] - runs[other][theirs or ours] for runs in REPORTS[study].seeds.values()]


@pytest.mark.parametrize(("study", "run", "other", "keys", "low", "high"), ON_EVERY_SEED)
def test_on_every_seed(study: str, run: str, other: str, keys: str, low: float, high: float) -> None:
    for key in keys.split():
        assert all(low < gain < high for gain in gains(study, run, other, key)), key


@pytest.mark.parametrize(("study", "run", "other", "keys"), WITHIN_SPREAD)
def test_within_the_spread(study: str, run: str, other: str, keys: str) -> None:
    for key in keys.split():
        values = gains(study, run, other, key)
        assert abs(fmean(values)) <= stdev(values), key


def test_the_readme_has_the_printed_tables() -> None:
    shown = re.findall(r"<!-- table: results/(\w+)\.json -->\n(.*\n\n(?:\|.*\n)+)", (FOLDER / "README.md").read_text())
    assert {name for name, _ in shown} == {path.stem for path in FOLDER.glob("*.py")} - {"study", "steps"}
    for name, text in shown:
        report = REPORTS[name]
        assert text.strip() == in_short(report), name
        assert table(report).startswith(f"{in_short(report)}\n\n")


@pytest.mark.parametrize(
    ("study", "steps", "slots"),
    [(CURRICULUM, 1500, 6), (EDGES, 1000, 9), (CYCLE, 1500, 9), (IDENTITY, 1000, 9), (TOKENS, 1200, 9)],
)
def test_committed_results_have_three_seeds_and_the_settings_of_the_scripts(study: str, steps: int, slots: int) -> None:
    report = REPORTS[study]
    assert list(report.seeds) == [0, 1, 2]
    found = [report.settings[name] for name in ("num_clips", "steps", "slots", "start_step")]
    assert found == [1500, steps, slots, round(0.3 * steps)]
