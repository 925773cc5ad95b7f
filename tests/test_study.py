"""The study: its rows, its runs, and its tables."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples import study, training
from examples.data import TEST_SEED
from examples.evaluation import EvaluationSet
from examples.moving_objects import moving_objects
from examples.study_report import SCORES, Row, Rows, pairs, save_figure, short, table
from examples.study_settings import LEVELS, SETTINGS, Clips, Places, Setting, sprites
from PIL import Image

from ssync_loss import AdaptiveSSyncLoss, SSyncLoss

PLACES = Places(Path("nowhere"), None)


def tiny(num_clips: int, num_fresh: int, _: Places) -> Clips:
    torch.manual_seed(0)
    features = torch.randn(num_clips + num_fresh, 2, 24, 4, 4)
    video, ids = torch.rand(len(features), 2, 3, 16, 16), torch.randint(0, 4, (len(features), 2, 16, 16))
    parts = slice(num_clips), slice(num_clips, None)
    trained, fresh = (EvaluationSet(video[some], features[some], ids[some]) for some in parts)
    return Clips(trained.features, trained, fresh)


TINY = {
    "one": Setting("noise", "shaped", 8, tiny, slots=3, seeds=(0, 1)),
    "two": Setting("more noise", "test", 6, tiny, slots=4, seeds=(0,)),
    "three": Setting("other noise", "development", 6, tiny, slots=4, seeds=(5,)),
}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "SETTINGS", TINY)
    monkeypatch.setattr(study, "LEVELS", ("two",))
    monkeypatch.setattr(study, "NUM_SCORED", 4)
    # drawing takes longer than the runs
    monkeypatch.setattr(study, "save_figure", lambda *_: None)


def run(out: Path, *arguments: str) -> int:
    return study.main(["--steps", "10", "--out", str(out), *arguments])


def without_time(rows: list[Row]) -> list[Row]:
    return [{name: row[name] for name in row if name not in ("step_ms", "seconds", "machine")} for row in rows]


class TestTheCommand:
    def test_the_plan_orders_groups_and_seeds(self, settings: None) -> None:
        jobs = list(study.plan(list(TINY), None, None))
        assert [(job.name, job.seed) for job in jobs] == [
            *[("one", 0), ("two", 0), ("three", 5), ("one", 1)],
            ("three", 5),
            ("two", 0),
        ]
        assert [job.runs for job in jobs[3:]] == [list(study.MAIN), list(study.KNOBS), list(study.FIXED)]
        (job,) = study.plan(["one"], [7], ["ssync"])
        assert job == study.Job("one", 7, ["ssync"])

    def test_a_stopped_study_resumes_to_the_same_rows(
        self, settings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        usual = ["--seeds", "0", "--runs", "ssync", "adaptive", "baseline"]
        assert run(whole, "--only", "one", "two", *usual) == 0
        rows = Rows(whole / "rows.jsonl").load()
        assert len(rows) == 2 * (1 + len(study.MAIN))
        assert len({row["shared"] for row in rows}) == 2

        def interrupt(*_: Any, title: str, **__: Any) -> None:
            if title == "one, seed 0, adaptive":
                raise KeyboardInterrupt
            training.train(*_, title=title, **__)

        with monkeypatch.context() as patch:
            patch.setattr(study, "train", interrupt)
            assert run(parts, "--only", "one", *usual) == 130
        capsys.readouterr()
        assert [row["run"] for row in Rows(parts / "rows.jsonl").load()] == ["shared", "baseline", "ssync"]
        with (parts / "rows.jsonl").open("a") as file:
            file.write('{"setting":"one","title":"noi')
        assert run(parts, "--only", "test", *usual) == 0
        assert run(parts, "--only", "one", "two", *usual) == 0
        assert "noise, 8 clips, 3 slots * " in capsys.readouterr().out
        found = {
            (row["setting"], row["seed"], row["run"]): row for row in without_time(Rows(parts / "rows.jsonl").load())
        }
        assert all(found[row["setting"], row["seed"], row["run"]] == row for row in without_time(rows))
        before = (parts / "rows.jsonl").read_bytes()
        monkeypatch.setattr(study, "train", lambda *_, **__: pytest.fail("all rows exist"))
        assert run(parts, "--only", "one", "two", *usual) == 0
        assert (parts / "rows.jsonl").read_bytes() == before
        assert (parts / "table.md").read_text().startswith("Paired changes")

    def test_runs_from_different_beginnings_are_not_paired(self, settings: None, tmp_path: Path) -> None:
        assert run(tmp_path, "--only", "one", "--seeds", "0", "--runs", "baseline") == 0
        rows = Rows(tmp_path / "rows.jsonl")
        former = [{**row, "shared": "of another machine"} for row in rows.load()]
        rows.path.write_text("".join(f"{json.dumps(row)}\n" for row in former))
        assert run(tmp_path, "--only", "one", "--seeds", "0", "--runs", "baseline", "ssync") == 0
        found = rows.load()
        assert [row["run"] for row in found] == ["shared", "baseline", "shared", "baseline", "ssync"]
        assert [pair.row["run"] for pair in pairs(found)] == ["ssync"]

    def test_a_foreign_file_is_refused(self, settings: None, tmp_path: Path) -> None:
        for text in ("a diary\n", "[1]\n", '{"setting":"one"}\n', '{"setting": 1}\n'):
            (tmp_path / "rows.jsonl").write_text(text)
            with pytest.raises(SystemExit, match="error: --out must not lead to a file of something else"):
                run(tmp_path)
            assert (tmp_path / "rows.jsonl").read_text() == text


FORMS = {
    "ssync": (0.6, 1.0, 1.0),
    "unmerged": (None, 1.0, 1.0),
    "interior": (None, 0.0, 1.0),
    "threshold 0.75": (0.75, 1.0, 1.0),
    "threshold 0.9": (0.9, 1.0, 1.0),
}


@pytest.mark.parametrize("name", [*study.FORMS])
def test_forms_have_their_settings(name: str, settings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def terms_of(state: Any, criterion: SSyncLoss | None) -> Any:
        made.append(state.adaptive or criterion)
        return training.terms_of(state, criterion)

    monkeypatch.setattr(study, "terms_of", terms_of)
    assert run(tmp_path, "--only", "two", "--runs", name) == 0
    _, form = made
    (row,) = (row for row in Rows(tmp_path / "rows.jsonl").load() if row["run"] == name)
    if name == "baseline":
        assert form is None
    elif name in FORMS:
        assert isinstance(form, SSyncLoss)
        assert (form.merge_threshold, form.boundary_weight, form.interior_weight) == FORMS[name]
        assert form.start_step == 3
    elif name == "threshold suggested":
        assert form.merge_threshold == row["threshold"]
    else:
        assert isinstance(form, AdaptiveSSyncLoss)
        assert form.criterion.merge_threshold == 0.6
        assert row["asked"]["questions"] == (2 if name == "every 5" else 7)
        assert [step for step, *_ in row["course"]] == [3]


def test_test_settings_did_not_shape_the_rule() -> None:
    by_role = {
        role: [one for one in SETTINGS.values() if one.role == role] for role in ("shaped", "test", "development")
    }
    made = {role: {(str(one.make), one.num_clips, one.slots) for one in some} for role, some in by_role.items()}
    assert not made["test"] & (made["shaped"] | made["development"])
    assert len({one.title for one in by_role["test"]} - {one.title for one in by_role["shaped"]}) == 3
    assert {0, 1, 2}.isdisjoint(seed for one in by_role["development"] for seed in one.seeds)
    assert set(LEVELS) <= SETTINGS.keys()


@pytest.mark.parametrize("name", ["sprites-noisy", "shapes", "grainy"])
def test_variants_of_sprites(name: str) -> None:
    usual, other = (SETTINGS[one].make(3, 2, PLACES) for one in ("sprites", name))
    assert other.features.shape == usual.features.shape == (3, 4, 24, 12, 12)
    assert other.fresh.features.shape == (2, 4, 24, 12, 12)
    assert torch.equal(other.features, other.trained.features)
    assert not torch.equal(other.features, usual.features)
    assert usual.fresh.ids is not None
    assert torch.equal(usual.fresh.ids, moving_objects(2, seed=TEST_SEED).ids)
    for one, same in ((usual.trained, other.trained), (usual.fresh, other.fresh)):
        assert torch.equal(one.video, same.video) == (name == "sprites-noisy")
        assert one.ids is not None
        assert same.ids is not None
        assert torch.equal(one.ids, same.ids) == (name != "shapes")
    noise = (sprites(3, 2, PLACES, feature_noise=0.5).features - usual.features).std().item()
    assert noise == pytest.approx(0.5, rel=0.02)


def made_up(setting: str, role: str, margins: tuple[float, float], **effects: float) -> list[Row]:
    """Return the rows of a setting in which the run on own losses scores 0.5."""
    row = {"setting": setting, "title": setting, "role": role, "clips": 5, "slots": 3, "steps": 10, "seed": 0}
    row |= {"shared": setting, "machine": {"cpu": "CPU", "torch": "2", "commit": "abc"}}

    def scores(effect: float) -> dict[str, Any]:
        return {"trained": dict.fromkeys(SCORES, 0.5 + effect), "fresh": dict.fromkeys(SCORES, 0.5 + effect / 2)}

    asked = dict(zip(("margin", "merged_margin"), margins, strict=True))
    premise = {"trained": asked, "fresh": asked}
    runs = [{"run": "shared", "scores": scores(0), "premise": premise}, {"run": "baseline", "scores": scores(0)}]
    runs += [{"run": name, "scores": scores(effect)} for name, effect in effects.items()]
    return [row | one for one in runs]


class TestTheTable:
    def test_it_counts_and_lists_the_signs_of_margins(self) -> None:
        rows = [
            *made_up("a", "test", (0.5, 0.25), ssync=0.1, adaptive=0.1),
            *made_up("b", "test", (0.5, -0.25), ssync=-0.1, adaptive=0.0),
            *made_up("c", "shaped", (-0.5, 0.25), ssync=-0.1, adaptive=0.0),
            *made_up("d", "development", (0.5, 0.25), ssync=0.0, adaptive=0.0),
        ]
        text = table(rows)
        (signs,) = re.findall(r"^\| trained clips, trained clips +\|(.*)\|$", text, flags=re.MULTILINE)
        plain, merged = (
            ["1 of 2", "1 of 1", "-", "2 of 3"],
            ["2 of 2", "0 of 1", "-", "2 of 3"],
        )
        assert [cell.strip() for cell in signs.split("|")] == [*plain, *merged]
        assert "- margin, scored on trained clips: b, 5 clips, 3 slots, seed 0: +0.500, effect -0.100" in text
        assert "- merged margin, scored on fresh clips: c, 5 clips, 3 slots *, seed 0: +0.250, effect -0.050" in text
        assert "- merged margin, scored on trained clips: b" not in text
        marks = re.findall(r"^\| ([a-d]), 5 clips, 3 slots ?(.) +\| 0     \| [+-]0", text, flags=re.MULTILINE)
        assert marks == [("a", " "), ("b", " "), ("c", "*"), ("d", "d")]

    def test_it_shows_harms_of_the_cascade(self) -> None:
        rows = [
            *made_up("a", "test", (0.5, 0.25), ssync=0.2, adaptive=-0.1),
            *made_up("b", "test", (0.5, 0.25), ssync=-0.04, adaptive=-0.3),
        ]
        row = re.search(r"^\| test, trained +\|(.*)\|$", table(rows), flags=re.MULTILINE)
        assert row is not None
        assert [cell.strip() for cell in row[1].split("|")] == [
            *["2", "1", "-0.040, -0.300", "1", "+0.200, -0.100"],
            *["2", "0", "-0.040, -0.300"],
        ]
        assert "| merged margin above 0, fresh   | 2 " in table(rows)
        for margins, zone in (((0.1, -0.1), "margin above 0, merged below"), ((-0.1, -0.2), "both margins below 0")):
            assert f"| {zone}, fresh" in table(made_up("a", "test", margins, ssync=0.2, adaptive=0.1))

    def test_other_forms_have_a_separate_table(self) -> None:
        assert "Other forms" not in table(made_up("a", "test", (0.5, 0.25), ssync=0.2))
        text = table(made_up("a", "test", (0.5, 0.25), ssync=0.2, interior=0.04))
        assert re.search(r"^\| interior +\| \+0.040 +\| \+0.020 +\|$", text, flags=re.MULTILINE)

    def test_it_is_empty_without_pairs(self) -> None:
        assert table([]).startswith("Nothing to compare yet")
        assert table(made_up("a", "test", (0.5, 0.25))).startswith("Nothing to compare yet")

    def test_the_picture_has_a_point_per_run(self, tmp_path: Path) -> None:
        rows = made_up("a", "test", (0.5, 0.25), ssync=0.2, adaptive=0.1, interior=0.3)
        save_figure(rows, tmp_path / "a.png")
        picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
        red, green, blue = picture.reshape(-1, 3).T
        # every run has a point in four panels and the legend
        assert 5 * 30 < ((red > 180) & (green < 90) & (blue < 90)).sum() < 5 * 300
        assert 5 * 30 < ((red < 90) & (blue > 140)).sum() < 5 * 300


class TestRows:
    def test_the_first_row_of_a_run_counts(self, tmp_path: Path) -> None:
        first, second = (made_up("a", "test", (0.5, 0.25), ssync=effect)[-1] for effect in (0.1, 0.2))
        rows = Rows(tmp_path / "rows.jsonl")
        for row in (first, second):
            rows.add(row)
        assert rows.load() == [first]

    def test_a_broken_row_is_skipped(self, tmp_path: Path) -> None:
        one, two = made_up("a", "test", (0.5, 0.25))
        rows = Rows(tmp_path / "rows.jsonl")
        rows.add(one)
        whole = rows.path.read_bytes()
        for length in (1, 30, len(whole) - 1):
            rows.path.write_bytes(whole + whole[:length])
            rows.add(two)
            assert rows.load() == [one, two]


FOLDER = Path(study.__file__).parent


def test_the_readme_has_the_tables_of_the_committed_rows() -> None:
    shown = re.search(
        r"<!-- study: .*?-->\n(.*?)<!-- end of study -->", (FOLDER / "README.md").read_text(), flags=re.DOTALL
    )
    assert shown is not None
    rows = Rows(FOLDER / "study" / "rows.jsonl").load()
    assert shown[1].strip() == short(rows)
    assert (FOLDER / "study" / "table.md").read_text().strip() == table(rows)
    assert not any("dirty" in row["machine"]["commit"] for row in rows)
