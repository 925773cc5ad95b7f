"""The frame of the examples of neighboring methods: its runs, its table, its command."""

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from examples.checkpoint import Settings
from examples.neighbors import slot_curriculum
from examples.neighbors.study import OWN, Column, Method, Study, StudyReport, Training, main, run_seed, table
from examples.slot_model import SlotModel
from torch import Tensor

from ssync_loss import SSyncLoss

SETTINGS = Settings(data="noise", num_clips=8, slots=5, steps=10, batch_size=4)
FEATURES = torch.randn(8, 2, 24, 4, 4, generator=torch.Generator().manual_seed(0))


class Noisy(Method):
    """Draws a random number in every step."""

    def loss(self, output: object, features: Tensor, step: int) -> Tensor:
        return self.model.initial_slots.sum() * torch.rand(())


def weights(run: Training) -> Tensor:
    return torch.cat([one.detach().flatten() for one in run.model.parameters()])


def train(run: Training, until: int, criterion: SSyncLoss | None = None) -> Training:
    run.train(FEATURES, until=until, criterion=criterion, title="")
    return run


@pytest.mark.parametrize("make", [Method, Noisy, slot_curriculum.Curriculum])
def test_a_copy_goes_on_as_the_run_itself(make: type[Method]) -> None:
    whole = train(Training.start(make, SETTINGS, 0), 10)
    part = train(Training.start(make, SETTINGS, 0), 4)
    torch.rand(3)
    other = train(copy.deepcopy(part), 10)
    assert torch.equal(weights(train(part, 10)), weights(whole))
    assert torch.equal(weights(other), weights(whole))
    assert len(whole.times) == len(other.times) == 10


def test_runs_of_a_seed_start_alike_and_those_of_another_do_not() -> None:
    plain, curriculum, other = (
        Training.start(make, SETTINGS, seed)
        for make, seed in ((Method, 0), (slot_curriculum.Curriculum, 0), (Method, 1))
    )
    assert torch.equal(weights(plain), weights(curriculum))
    assert not torch.equal(weights(plain), weights(other))


def test_ssync_changes_nothing_before_its_start_and_much_after_it() -> None:
    criterion = SSyncLoss(start_step=SETTINGS.start_step)
    runs = [Training.start(Method, SETTINGS, 0) for _ in range(2)]
    for until, same in ((SETTINGS.start_step, True), (10, False)):
        with_line, without = train(runs[0], until, criterion), train(runs[1], until)
        assert torch.equal(weights(with_line), weights(without)) == same


def test_every_method_is_run_without_and_with_ssync_and_read_in_every_way() -> None:
    study = Study(
        title="Norms.",
        methods={OWN: Method, "+ noise": Noisy, "+ more noise": Noisy},
        readings={"": norm, ", twice": lambda model: {"norm": 2 * norm(model)["norm"]}},
        columns=[Column("norm", "norm", 2)],
        settings=SETTINGS,
        alone=["+ more noise"],
    )
    scores = run_seed(study, FEATURES, 0)
    rows = ["own losses", "+ SSync", "+ noise", "+ noise + SSync", "+ more noise"]
    assert list(scores) == [row + end for row in rows for end in ("", ", twice")]
    assert all(scores[f"{row}, twice"]["norm"] == 2 * scores[row]["norm"] for row in rows)
    assert len({scores[row]["norm"] for row in rows}) == 4  # both kinds of noise are one
    assert all(run["ms"] > 0 for run in scores.values())


def norm(model: SlotModel) -> dict[str, float]:
    return {"norm": sum(one.norm().item() for one in model.parameters())}


def report(*seeds: tuple[float, float, float], compared_with: dict[str, str] | None = None) -> StudyReport:
    names = ("own losses", "+ x", "+ x + SSync")
    runs = {
        seed: {name: {"score": value, "ms": 10.0} for name, value in zip(names, values, strict=True)}
        for seed, values in enumerate(seeds)
    }
    machine = {"cpu": "CPU", "threads": 2, "torch": "2.13", "commit": "abc", "date": "today"}
    settings = {"data": "d", "num_clips": 1, "slots": 2, "steps": 3, "threshold": 0.6, "start_step": 1}
    return StudyReport("What.", [Column("score", "score", 2)], settings, machine, runs, compared_with or {})


class TestTable:
    def test_it_has_means_spreads_and_paired_differences(self) -> None:
        lines = table(report((0.25, 0.5, 0.75), (0.75, 1.0, 1.5))).splitlines()
        cells = dict(re.findall(r"^\| ([^|]+?) +\| ([^|]+?) +\|", "\n".join(lines), flags=re.MULTILINE))
        assert cells["own losses"] == "0.50 ± 0.35"
        assert cells["+ x: difference"] == "+0.25 ± 0.00"
        assert cells["+ x: seed 1"] == "+0.25"
        assert cells["+ x + SSync: difference"] == "+0.62 ± 0.18"
        assert lines[0] == "What. Mean ± sd over seeds; differences are to own losses and paired."
        assert lines[2] == "CPU, 2 threads, torch 2.13, commit abc, today."

    def test_one_seed_has_no_spread(self) -> None:
        text = table(report((0.25, 0.5, 0.75)))
        assert "±" not in text
        assert "seed 0:" not in text

    def test_a_row_may_be_compared_with_another(self) -> None:
        text = table(report((0.25, 0.5, 0.75), compared_with={"+ x + SSync": "+ x"}))
        assert re.search(r"\+ x \+ SSync: difference to \+ x +\| \+0\.25 ", text)

    def test_it_survives_the_way_to_disk(self, tmp_path: Path) -> None:
        before = report((0.25, 0.5, 0.75))
        before.save(tmp_path / "folder" / "report.json")
        assert StudyReport.load(tmp_path / "folder" / "report.json") == before


@pytest.fixture
def kept_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("kept_threads")
class TestCommand:
    def run(self, *arguments: str) -> int:
        return main("slot_curriculum", "what", slot_curriculum.build, arguments)

    def test_it_writes_what_it_prints(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out.json"
        assert self.run("--quick", "--steps", "10", "--slots", "6", "--seeds", "3", "--out", str(out)) == 0
        printed = capsys.readouterr().out
        assert self.run("--table", str(out)) == 0
        assert capsys.readouterr().out.strip() in printed
        content = json.loads(out.read_text())
        assert list(content["seeds"]) == ["3"]
        assert (content["settings"]["steps"], content["settings"]["slots"]) == (10, 6)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--steps", "9"], "--steps must be at least 10; got 9"),
            (["--slots", "0"], "--slots must be at least 1; got 0"),
            (["--threads", "0"], "--threads must be at least 1; got 0"),
            (["--seeds", "x"], "invalid int value: 'x'"),
        ],
    )
    def test_wrong_options_are_said(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            self.run(*arguments)
        assert message in capsys.readouterr().err


FOLDER = Path(slot_curriculum.__file__).parent
README = (FOLDER / "README.md").read_text()


def rows(text: str) -> list[str]:
    """Return the first cells of a table."""
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]


@pytest.mark.usefixtures("kept_threads")
@pytest.mark.parametrize(
    "name", ["affinity_consistency", "cyclic_inference", "structure_aware", "temporal_correspondence"]
)
def test_a_rehearsal_has_the_runs_and_the_table_of_the_results(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example, out = import_module(f"examples.neighbors.{name}"), tmp_path / "out.json"
    assert main(name, "", example.build, ["--quick", "--steps", "10", "--seeds", "0", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rehearsal, committed = StudyReport.load(out), StudyReport.load(FOLDER / "results" / f"{name}.json")
    assert list(rehearsal.seeds[0]) == list(committed.seeds[0])
    assert rows(printed) == rows(table(replace(committed, seeds={0: committed.seeds[0]})))
    (head,) = (line for line in printed.splitlines() if line.startswith("|  "))
    assert [cell.strip() for cell in head.split("|")[2:-1]] == [column.title for column in example.COLUMNS]
    assert rehearsal.settings["contrast_weight"] == committed.settings["contrast_weight"]


def test_tables_in_the_readme_are_those_that_the_scripts_print() -> None:
    shown = re.findall(r"<!-- table: python (\S+) --table (\S+) -->\n(.*?)<!-- end of table -->", README, re.DOTALL)
    assert {Path(script).stem for script, _, _ in shown} == {path.stem for path in FOLDER.glob("*.py")} - {"study"}
    root = FOLDER.parents[1]
    for script, results, text in shown:
        assert Path(script).stem == Path(results).stem
        assert text.strip() == table(StudyReport.load(root / results)).strip(), script


def test_committed_results_are_of_three_seeds_and_of_the_settings_of_the_scripts() -> None:
    for path in (FOLDER / "results").glob("*.json"):
        report = StudyReport.load(path)
        assert list(report.seeds) == [0, 1, 2]
        assert report.settings["num_clips"] == 1500
        assert report.settings["start_step"] == round(0.3 * report.settings["steps"])
