"""The framework of the examples of neighboring methods: its runs, its table, its command."""

import copy
import re
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from examples.checkpoint import Settings
from examples.neighbors import slot_curriculum, temporal_correspondence
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


@pytest.mark.parametrize("make", [Method, Noisy, slot_curriculum.Curriculum, temporal_correspondence.Correspondence])
def test_a_copy_continues_like_the_run(make: type[Method]) -> None:
    whole = train(Training.start(make, SETTINGS, 0), 10)
    part = train(Training.start(make, SETTINGS, 0), 4)
    torch.rand(3)
    other = train(copy.deepcopy(part), 10)
    assert torch.equal(weights(train(part, 10)), weights(whole))
    assert torch.equal(weights(other), weights(whole))
    assert len(whole.times) == len(other.times) == 10


def test_runs_of_a_seed_have_the_same_initial_weights() -> None:
    plain, curriculum, other = (
        Training.start(make, SETTINGS, seed)
        for make, seed in ((Method, 0), (slot_curriculum.Curriculum, 0), (Method, 1))
    )
    assert torch.equal(weights(plain), weights(curriculum))
    assert not torch.equal(weights(plain), weights(other))


def test_ssync_changes_the_weights_only_after_its_start() -> None:
    criterion = SSyncLoss(start_step=SETTINGS.start_step)
    runs = [Training.start(Method, SETTINGS, 0) for _ in range(2)]
    for until, same in ((SETTINGS.start_step, True), (10, False)):
        with_line, without = train(runs[0], until, criterion), train(runs[1], until)
        assert torch.equal(weights(with_line), weights(without)) == same


def test_every_method_has_all_runs_and_readings() -> None:
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
    assert len({scores[row]["norm"] for row in rows}) == 4  # both noisy methods are equal
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
    def test_it_has_means_spreads_and_differences(self) -> None:
        lines = table(report((0.25, 0.5, 0.75), (0.75, 1.0, 1.5))).splitlines()
        cells = dict(re.findall(r"^\| ([^|]+?) +\| ([^|]+?) +\|", "\n".join(lines), flags=re.MULTILINE))
        assert cells["own losses"] == "0.50 ± 0.35"
        assert cells["+ x"] == "+0.25 ± 0.00"
        assert cells["+ x + SSync"] == "+0.62 ± 0.18"
        assert lines[0] == "What."
        assert lines[-3:-1] == [
            "Below the first row: paired differences to it or to the run named.",
            "d: 1 clips, 2 slots, 3 steps, SSync with merge threshold 0.6 from step 1, seed 0, 1 (mean ± sd).",
        ]
        assert lines[-1] == "CPU, 2 threads, torch 2.13, commit abc, today."

    def test_one_seed_has_no_spread(self) -> None:
        assert "±" not in table(report((0.25, 0.5, 0.75)))

    def test_a_row_may_be_compared_with_another(self) -> None:
        text = table(report((0.25, 0.5, 0.75), compared_with={"+ x + SSync": "+ x"}))
        assert re.search(r"\+ x \+ SSync \(to \+ x\) +\| \+0\.25 ", text)


# the runs of every example, and the runs that they are compared with
ROWS = {
    "slot_curriculum": "+ SSync; + curriculum; + curriculum, longer stages; + curriculum, longer stages + SSync to + "
    "curriculum, longer stages",
    "structure_aware": "+ SSync; + squared error again; + structure, weight 0.05; + structure, weight 2; "
    "+ structure, weight 2 + SSync",
    "cyclic_inference": "own losses, cyclic; own losses, longer first look; + SSync; + SSync, cyclic to + SSync; "
    "+ SSync, longer first look to + SSync",
    "temporal_correspondence": "+ SSync; + slot contrast; + SMTC; + SMTC + SSync to + SMTC",
    "affinity_consistency": "+ SSync; + affinity; + affinity + SSync to + affinity; + agreement",
}


@pytest.mark.parametrize("name", ROWS)
def test_a_quick_run_has_every_run_and_prints_its_table(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = import_module(f"examples.neighbors.{name}")
    out = tmp_path / "out.json"
    command = partial(main, name, "what", example.build)
    assert command(["--quick", "--steps", "10", "--slots", "6", "--seeds", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert command(["--table", str(out)]) == 0
    shown = capsys.readouterr().out.strip()
    assert shown in printed
    head, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line[:2] == "| ")
    assert head == ["", *(column.title for column in example.COLUMNS)]
    runs, others = zip(*(row.partition(" to ")[::2] for row in ROWS[name].split("; ")), strict=True)
    named = [run + (other and f" (to {other})") for run, other in zip(runs, others, strict=True)]
    assert [row[0] for row in rows] == [OWN, *named]
    report = StudyReport.load(out)
    assert {seed: list(runs) for seed, runs in report.seeds.items()} == {3: [OWN, *runs]}
    assert (report.settings["steps"], report.settings["slots"]) == (10, 6)
    assert report.settings["contrast_weight"] == (0 if name == "temporal_correspondence" else 0.5)
