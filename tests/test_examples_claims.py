"""What is said of the committed results: the tables of the neighbors' README, and its claims, seed by seed."""

import re
from math import inf
from pathlib import Path
from statistics import fmean, stdev

import pytest
from examples.neighbors import affinity_consistency, cyclic_inference, slot_curriculum, structure_aware
from examples.neighbors.study import OWN, StudyReport, table, with_ssync

FOLDER = Path(slot_curriculum.__file__).parent
REPORTS = {path.stem: StudyReport.load(path) for path in (FOLDER / "results").glob("*.json")}
CURRICULUM, EDGES, CYCLE = "slot_curriculum", "structure_aware", "cyclic_inference"
IDENTITY, TOKENS = "temporal_correspondence", "affinity_consistency"

SSYNC = with_ssync(OWN)
LONGER = slot_curriculum.LONGER
AGAIN, WEAK, STRONG = "+ squared error again", "+ structure, weight 0.05", "+ structure, weight 2"
SMTC, AFFINITY, AGREEMENT = "+ SMTC", affinity_consistency.AFFINITY, affinity_consistency.AGREEMENT
MASKS = "dec_fg_ari frame_fg_ari dec_ari dec_mbo"
CLIP = "fg_ari_mean fg_ari_clip mbo_mean identity"
NOISY = "noisy_fg_ari_0 noisy_fg_ari_1 noisy_identity"
BOTH = [(run, run + cyclic_inference.CYCLIC, run + cyclic_inference.LONGER) for run in (OWN, SSYNC)]

# a study, a run, another one, scores, and bounds of the difference on every seed. "a:b" is a less the other's b
ON_EVERY_SEED = [
    # pieces are taken from the background, and more objects are found without the curriculum
    *((CURRICULUM, with_ssync(run), run, "fragmentation_background", -inf, 0) for run in (OWN, LONGER)),
    (CURRICULUM, SSYNC, OWN, "dec_recall", 0, inf),
    # edges are sharper; SSync keeps them, and loses some of its objects
    *((EDGES, STRONG, other, "contrast step_at_edges", 0, inf) for other in (OWN, AGAIN)),
    *((EDGES, STRONG, other, "error_at_edges structure", -inf, 0) for other in (OWN, AGAIN)),
    *((EDGES, run, OWN, "contour_f", 0, inf) for run in (STRONG, AGAIN)),
    (EDGES, STRONG, OWN, "dec_ari", 0.2, inf),
    (EDGES, with_ssync(STRONG), STRONG, "contrast dec_fg_ari", 0, inf),
    (EDGES, with_ssync(STRONG), SSYNC, "contrast", 0.03, inf),
    (EDGES, with_ssync(STRONG), SSYNC, "step_at_edges", 0, inf),
    (EDGES, with_ssync(STRONG), SSYNC, "dec_fg_ari", -inf, 0),
    # objects keep their slots and masks follow them; the background pays
    (IDENTITY, SMTC, OWN, "kept_last dec_fg_ari frame_fg_ari dec_mbo", 0, inf),
    (IDENTITY, SMTC, OWN, "dec_ari", -inf, 0),
    *((IDENTITY, with_ssync(run), run, MASKS, 0, inf) for run in (OWN, SMTC)),
    # SSync adds to the masks; tokens stay behind the frozen features, to which they come nearer than half-way
    *((TOKENS, with_ssync(run), run, "dec_fg_ari", 0, inf) for run in (OWN, AFFINITY)),
    (TOKENS, AFFINITY, OWN, "j_and_f:frozen_j_and_f", -inf, 0),
    # forward, the first frame is the worst
    *(
        (CYCLE, run, run, f"{s}_0:{s}_{t}", -inf, 0)
        for run in (OWN, SSYNC)
        for s in ("fg_ari", "mbo")
        for t in range(1, 8)
    ),
    *((CYCLE, run, run, "fg_ari_7:fg_ari_0", 0.035, 0.115) for run in (OWN, SSYNC)),
    # cyclically it is as good as the last, which stays; clips and identities gain
    *((CYCLE, back, run, "fg_ari_7 mbo_7", -1e-12, 1e-12) for run, back, _ in BOTH),
    *((CYCLE, back, run, "fg_ari_0", 0.04, inf) for run, back, _ in BOTH),
    *((CYCLE, back, run, "mbo_0", 0.03, inf) for run, back, _ in BOTH),
    *((CYCLE, back, back, "fg_ari_0:fg_ari_7 mbo_0:mbo_7", -0.01, inf) for _, back, _ in BOTH),
    *((CYCLE, back, run, CLIP, 0, inf) for run, back, _ in BOTH),
    # a longer first look does as much for clean clips
    *((CYCLE, longer, back, "fg_ari_0 mbo_0", 0, inf) for _, back, longer in BOTH),
    *((CYCLE, longer, run, CLIP, 0, inf) for run, _, longer in BOTH),
    *((CYCLE, longer, back, CLIP, -0.03, 0.03) for _, back, longer in BOTH),
    # but not for those with a noisy first frame: the way back meets the second one before the noise
    *((CYCLE, back, run, NOISY, 0, inf) for run, back, _ in BOTH),
    *((CYCLE, back, longer, NOISY, 0, inf) for _, back, longer in BOTH),
    *((CYCLE, longer, run, "noisy_fg_ari_1", -inf, 0.01) for run, _, longer in BOTH),
    *((CYCLE, back, back, "noisy_fg_ari_1:fg_ari_1", -0.01, 0.01) for _, back, _ in BOTH),
    *((CYCLE, back, back, "noisy_fg_ari_0:fg_ari_0", -inf, -0.05) for _, back, _ in BOTH),
]
# and those where the mean difference is no larger than the spread of the differences
WITHIN_SPREAD = [
    *(
        (CURRICULUM, run, OWN, column.key)
        for run in (slot_curriculum.PUBLISHED, LONGER)
        for column in slot_curriculum.COLUMNS
    ),
    (EDGES, WEAK, OWN, "contrast error_at_edges step_at_edges step_inside contour_f"),
    (EDGES, STRONG, OWN, "dec_fg_ari"),
    (EDGES, SSYNC, OWN, "contrast"),
    (IDENTITY, with_ssync(SMTC), SMTC, "kept_last"),
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


def test_on_some_seeds() -> None:
    for study, run, other, key in (
        (CURRICULUM, with_ssync(LONGER), LONGER, "dec_recall"),
        (IDENTITY, SMTC, OWN, "kept_next"),
    ):
        assert sum(gain > 0 for gain in gains(study, run, other, key)) == 2
    assert sum(gain < 0 for run, _, longer in BOTH for gain in gains(CYCLE, longer, run, "noisy_identity")) == 5
    assert sum(gains(IDENTITY, "+ slot contrast", OWN, "kept_last")) < 0


def test_edges_are_not_had_by_counting_the_error_twice_and_contours_are() -> None:
    contrast, contours = ([gains(EDGES, run, OWN, key) for run in (STRONG, AGAIN)] for key in ("contrast", "contour_f"))
    assert fmean(contrast[0]) > 3 * fmean(contrast[1])
    assert abs(fmean(contours[0]) - fmean(contours[1])) < stdev(contours[0])
    assert abs(fmean(gains(EDGES, with_ssync(STRONG), SSYNC, "dec_ari"))) < 0.01


def test_pulls_are_a_fortieth_and_about_equal() -> None:
    pull = fmean(runs[OWN]["pull"] for runs in REPORTS[EDGES].seeds.values())
    assert 1 / 45 < structure_aware.PUBLISHED * pull < 1 / 35
    assert 0.8 < structure_aware.EQUAL * pull < 1.2


def test_the_first_frame_gains_more_with_ssync() -> None:
    (own, own_back, _), (ssync, ssync_back, _) = BOTH
    for key in ("fg_ari_0", "noisy_fg_ari_1"):
        with_it, without = gains(CYCLE, ssync_back, ssync, key), gains(CYCLE, own_back, own, key)
        assert all(more > less for more, less in zip(with_it, without, strict=True))


def test_affinity_gives_most_of_what_was_lost_back_and_so_does_a_plainer_comparison() -> None:
    lost = gains(TOKENS, OWN, OWN, "frozen_j_and_f:j_and_f")
    won = gains(TOKENS, AFFINITY, OWN, "j_and_f")
    assert all(gain > 0.5 * loss for gain, loss in zip(won, lost, strict=True))
    assert fmean(gains(TOKENS, AGREEMENT, AFFINITY, "j_and_f")) > -0.01
    for run in (OWN, AFFINITY):
        assert abs(fmean(gains(TOKENS, with_ssync(run), run, "j_and_f"))) < 0.015
    assert len({run["frozen_j_and_f"] for runs in REPORTS[TOKENS].seeds.values() for run in runs.values()}) == 1


def test_tables_in_the_readme_are_those_that_the_scripts_print() -> None:
    shown = re.findall(
        r"<!-- table: python (\S+) --table (\S+) -->\n(.*?)<!-- end of table -->",
        (FOLDER / "README.md").read_text(),
        flags=re.DOTALL,
    )
    assert {Path(script).stem for script, _, _ in shown} == {path.stem for path in FOLDER.glob("*.py")} - {"study"}
    for script, results, text in shown:
        assert Path(script).stem == Path(results).stem
        assert text.strip() == table(REPORTS[Path(results).stem]).strip(), script


@pytest.mark.parametrize(
    ("study", "steps", "slots"),
    [(CURRICULUM, 1500, 6), (EDGES, 1000, 9), (CYCLE, 1500, 9), (IDENTITY, 1000, 9), (TOKENS, 1200, 9)],
)
def test_committed_results_are_of_three_seeds_and_of_the_settings_of_the_scripts(
    study: str, steps: int, slots: int
) -> None:
    report = REPORTS[study]
    assert list(report.seeds) == [0, 1, 2]
    found = [report.settings[name] for name in ("num_clips", "steps", "slots", "start_step")]
    assert found == [1500, steps, slots, round(0.3 * steps)]
