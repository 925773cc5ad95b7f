"""Invalid inputs of the commands: checkpoints, files of results, numbers, output paths."""

import copy
import json
import os
import pickle
import random
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from benchmarks import plan as benchmark_plan
from benchmarks import report as benchmark_report
from benchmarks import run as benchmarks
from benchmarks.results import Key, Results, Row, Spread
from examples import arguments, report, train_moving_objects
from examples.checkpoint import Settings, TrainingState, batch_of_step
from examples.neighbors import slot_curriculum, study
from examples.neighbors.study import StudyReport
from examples.report import Report
from examples.slot_model import SlotModel
from examples.training import terms_of, train
from torch import Tensor, nn

from benchmark_results import Machine, origin

ROOT = Path(__file__).parents[1]
QUICK = ["--quick", "--steps", "10", "--slots", "3"]
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "example": train_moving_objects.main,
    "neighbor": partial(study.main, "slot_curriculum", "", slot_curriculum.build),
    "benchmark": benchmarks.main,
    "report": benchmark_report.main,
}


def refusal(name: str, *given: object) -> str:
    """Return the error with which a command ends, after checking that it is one line."""
    with pytest.raises(SystemExit) as ended:
        COMMANDS[name](list(map(str, given)))
    said = str(ended.value.code)
    assert said.startswith("error: ")
    assert "\n" not in said
    return said


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep commands from starting their work."""
    for place, function in ((train_moving_objects, "train"), (study, "run_seed"), (benchmark_plan, "work")):
        monkeypatch.setattr(place, function, lambda *_, **__: pytest.fail("it has begun"))


OF_EXAMPLES = {
    "--slots 0": "--slots must be at least 1; got 0",
    "--slots 145": "--slots must be at most 144, the patches of a frame; got 145",
    "--steps 9": "--steps must be at least 10; got 9",
    "--steps 1000001": "--steps must be at most 1000000; got 1000001",
    "--threads 0": "--threads must be at least 1; got 0",
    "--threads -1": "--threads must be at least 1; got -1",
    "--threads 1000": "--threads must be at most 2, the CPUs of this machine; got 1000",
    "--seeds x": "argument --seeds: invalid int value: 'x'",
    "--seeds 0.5": "argument --seeds: invalid int value: '0.5'",
    "--seeds": "argument --seeds: expected at least one argument",
    "--seeds 0 -1": "--seeds must be at least 0; got -1",
    "--seeds 4294967296": "--seeds must be at most 4294967295; got 4294967296",
    "--seeds 1 0 1": "--seeds must differ from each other; got 1 0 1",
}
OPTIONS = {
    "example": OF_EXAMPLES
    | {
        "--threshold 1.5": "--threshold must be within [0, 1]; got 1.5",
        "--threshold nan": "--threshold must be within [0, 1]; got nan",
        "--stride 0": "--stride must be at least 1; got 0",
    },
    "neighbor": OF_EXAMPLES,
    "benchmark": {
        "--suite speed": "argument --suite: invalid choice: 'speed' (choose from",
        "--time-cap 0": "--time-cap must be above 0; got 0.0",
        "--time-cap nan": "--time-cap must be above 0; got nan",
        "--memory-cap inf": "--memory-cap must be at most 1000000; got inf",
        "--threads -1": "--threads must be above 0; got -1",
        "--threads 1000": "--threads must be at most 2, the CPUs of this machine; got 1000",
        "--device cuda": "--device cuda needs a GPU that torch can see; torch",
    },
}


class TestOptions:
    @pytest.mark.parametrize(("name", "given"), [(name, given) for name, wrong in OPTIONS.items() for given in wrong])
    def test_out_of_bounds_are_refused(
        self, name: str, given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(arguments, "num_cpus", lambda: 2)
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(SystemExit, match="2"):
            COMMANDS[name](given.split())
        assert OPTIONS[name][given] in capsys.readouterr().err

    def test_bounds_can_be_reached(self) -> None:
        given = "--slots 144 --steps 10 --seeds 4294967295 0 --threads 1 --threshold 0 --stride 1"
        assert train_moving_objects.parse(given.split(" ")).seeds == [2**32 - 1, 0]
        batch_of_step(10**6, num_clips=1, batch_size=1, seed=2**32 - 1)


OURS = {
    "example": ROOT / "examples" / "results_dense.json",
    "neighbor": ROOT / "examples" / "neighbors" / "results" / "slot_curriculum.json",
    "benchmark": ROOT / "benchmarks" / "results" / "cpu.json",
}
FOREIGN = "must have other fields; missing are|must have the schema"
OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (Path.mkdir, "cannot be read: it is no file"),
    "a pipe": (os.mkfifo, "cannot be read: it is no file"),
    "empty": (Path.touch, "is no JSON file of results: Expecting value"),
    "cut": (lambda path: path.write_text('{"settings": {"data": '), "is no JSON file of results: Expecting value"),
    "bytes": (lambda path: path.write_bytes(b"\x93NUMPY"), "is no JSON file of results: .* can't decode byte"),
    "a tower": (lambda path: path.write_text("[" * 100_000), "is no JSON file of results: maximum recursion depth"),
    "a list": (lambda path: path.write_text("[1, 2]"), "must be an object; found list|must have the schema"),
    "foreign": (lambda path: path.write_text('{"a": 1}'), FOREIGN),
    **{name: (partial(shutil.copy, path), FOREIGN) for name, path in OURS.items()},
}


def read(name: str, path: Path) -> object:
    """Read a file of results like its command, and format its tables."""
    if name == "example":
        return report.table(Report.load(path))
    if name == "neighbor":
        return study.table(StudyReport.load(path))
    return benchmark_report.body({"x": Results.load(path)})


class TestResults:
    @pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in OURS for kind in OTHERS if kind != name])
    def test_a_foreign_file_is_refused_and_not_replaced(
        self, name: str, kind: str, tmp_path: Path, untrained: None
    ) -> None:
        make, reason = OTHERS[kind]
        path = tmp_path / "results.json"
        make(path)
        before = path.read_bytes() if path.is_file() else b""
        for said in (
            refusal("report", "--results", tmp_path) if name == "benchmark" else refusal(name, "--table", path),
            refusal(name, "--quick", "--out", tmp_path if name == "example" else path),
        ):
            assert re.search(f"results.json.* ({reason}|cannot be written: it is there, and no file)", said)
        assert (path.read_bytes() if path.is_file() else b"") == before

    @pytest.mark.parametrize("name", OURS)
    def test_a_corrupted_file_gives_a_table_or_a_named_error(self, name: str, tmp_path: Path) -> None:
        whole = json.loads(OURS[name].read_text())
        if name == "benchmark":
            whole["rows"] = whole["rows"][::40]
        for one in whole["seeds"] if name == "example" else ():
            one["runs"] = {key: run | {"history": []} for key, run in one["runs"].items()}
        drawn = random.Random(0)
        places = list(_places(whole))
        refused = 0
        for number in range(200):
            content = copy.deepcopy(whole)
            *above, last = drawn.choice(places)
            parent = reduce(getitem, above, content)
            if number % 3:
                parent[last] = drawn.choice([None, True, -1, 10**400, float("nan"), "x", "", [], {}, [[1]], {"a": 1}])
            else:
                del parent[last]
            (tmp_path / "x.json").write_text(json.dumps(content))
            try:
                read(name, tmp_path / "x.json")
            except ValueError as error:
                if "x.json" not in str(error):
                    raise
                refused += 1
        assert 50 < refused < 200


def _places(content: Any, *place: Any) -> Iterator[tuple[Any, ...]]:
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield (*place, key)
        yield from _places(content[key], *place, key)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("example", "neighbor"):
        assert "nowhere.json cannot be read: No such file" in refusal(name, "--table", tmp_path / "nowhere.json")
    for where in (tmp_path / "nowhere", tmp_path):
        (tmp_path / "._cpu.json").touch()
        assert f"must be a folder with a JSON file of results; found none in {where}" in refusal(
            "report", "--results", where
        )
    assert "No such file" in refusal("report", "--readme", tmp_path / "README.md")


PLACES: dict[str, Callable[[Path], Path]] = {
    "File exists|Not a directory": lambda folder: folder / "file" / "x",
    "No such file": lambda _: Path("/proc/nowhere/x"),
    "File exists|it is there": lambda _: Path("/dev/full"),
    "File name too long": lambda folder: folder / ("x" * 300),
    "File too large": lambda folder: folder / "x",
    "MB are needed, and 0.1 are free": lambda folder: folder / "x",
    "Permission denied": lambda folder: folder / "closed" / "x",
}


@pytest.mark.parametrize("name", OURS)
class TestOut:
    @pytest.mark.parametrize("reason", PLACES)
    def test_an_unwritable_path_is_refused_before_the_work(
        self, reason: str, name: str, tmp_path: Path, untrained: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "closed").mkdir(mode=0o500)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if reason == "Permission denied" and os.geteuid() == 0:
            pytest.skip("root may do everything")
        if "free" in reason:
            monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
        if "large" in reason:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
        try:
            said = refusal(name, "--quick", "--out", PLACES[reason](tmp_path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert re.search(f"--out must be a place to write to; .* cannot be written: .*({reason})", said)
        assert not list(tmp_path.rglob("*.partial"))

    def test_a_disk_that_fills_up_ends_in_one_line(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(study, "run_seed", lambda *_: {})
        monkeypatch.setattr(benchmark_plan, "work", Machine().work)
        monkeypatch.setattr(os, "replace", _full)
        more = ["--suite", "kernels"] if name == "benchmark" else QUICK
        assert "No space left on device" in refusal(name, "--quick", *more, "--out", tmp_path / "x")
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


WRITERS: dict[str, Callable[[Path], object]] = {
    "example": Report({}, {}).save,
    "neighbor": StudyReport("", [], {}, {}, {}).save,
    "checkpoint": lambda path: TrainingState.fresh(Settings("noise", 8, slots=3), 0).save(path),
    "benchmark": lambda path: Results({}, path=path).add([]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_an_interrupted_write_keeps_the_old_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "results.partial", tmp_path / "link"
    path.write_text("before")
    link.symlink_to(path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            WRITERS[name](link)
    assert path.read_text() == "before"
    WRITERS[name](link)
    assert path.read_bytes() != b"before"
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, path]


def test_a_finished_run_is_kept_until_the_new_clips_are_read(tmp_path: Path) -> None:
    results, checkpoint = tmp_path / "results.json", tmp_path / "checkpoints" / "seed0_ssync.pt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    shutil.copy(OURS["example"], results)
    (tmp_path / "empty").mkdir()
    assert "`clips` must hold videos" in refusal("example", *QUICK, "--clips", tmp_path / "empty", "--out", tmp_path)
    assert results.read_bytes() == OURS["example"].read_bytes()
    assert checkpoint.exists()


def test_an_interrupted_study_keeps_its_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_seed(given: study.Study, _: Tensor, seed: int) -> dict[str, dict[str, float]]:
        if seed == 7:
            raise KeyboardInterrupt
        return {name: {column.key: 0.5 for column in given.columns} for name in given.methods}

    monkeypatch.setattr(study, "run_seed", run_seed)
    out = tmp_path / "out.json"
    assert COMMANDS["neighbor"]([*QUICK, "--seeds", "7", "3", "--out", str(out)]) == 130
    assert "nothing was written" in capsys.readouterr().out
    assert COMMANDS["neighbor"]([*QUICK, "--seeds", "3", "7", "--out", str(out)]) == 130
    assert f"{out} has seed 3" in capsys.readouterr().out
    assert list(StudyReport.load(out).seeds) == [3]


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _like_a_script(path: Path) -> None:
    """Add a file that only TorchScript archives have."""
    with ZipFile(path, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].split('/')[0]}/constants.pkl", b"")


SETTINGS = Settings("noise", 8, slots=3, steps=10)
NO_CHECKPOINT: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "text": lambda path: path.write_text("no checkpoint"),
    "folder": _folder,
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "module": lambda path: torch.save(nn.Linear(2, 2), path),
    "trap": lambda path: torch.save({"settings": Trap(path.with_name("trace"))}, path),
    "old trap": lambda path: torch.save(Trap(path.with_name("trace")), path, _use_new_zipfile_serialization=False),
    "pickled trap": lambda path: path.write_bytes(pickle.dumps(Trap(path.with_name("trace")))),
    "script": _like_a_script,
}
CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no settings": lambda c: c.pop("settings"),
    "settings of another type": lambda c: c["settings"].update(slots=torch.zeros(3)),
    "no model": lambda c: c.update(model={}),
    "another model": lambda c: c.update(model=SlotModel(4).state_dict()),
    "no optimizer": lambda c: c.pop("optimizer"),
    "moments of another size": lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    "another rate": lambda c: c["optimizer"]["param_groups"][0].update(lr="fast"),
    "fewer groups": lambda c: c["optimizer"].update(param_groups=[]),
    "a method of the scheduler": lambda c: c["scheduler"].update(_get_lr_called_within_step=[], step=3),
    "too many steps": lambda c: c.update(step=11),
    "no step": lambda c: c.update(step=True),
    "another history": lambda c: c.update(history=[3]),
    "other times": lambda c: c.update(times=["x"]),
    "no random state": lambda c: c.update(rng=torch.zeros(3)),
}


class TestCheckpoints:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        state, path = TrainingState.fresh(SETTINGS, 0), tmp_path / "seed0_ssync.pt"
        train(state, torch.randn(8, 2, 24, 4, 4), terms_of(state, None), 1, title="", save=lambda: state.save(path))
        return path

    @pytest.mark.parametrize("kind", [*NO_CHECKPOINT, *CHANGES])
    def test_other_files_are_refused_and_not_executed(self, kind: str, path: Path) -> None:
        TrainingState.load(path, SETTINGS, 0)
        if kind in CHANGES:
            content = torch.load(path, weights_only=True)
            CHANGES[kind](content)
            torch.save(content, path)
        else:
            NO_CHECKPOINT[kind](path)
        with pytest.raises(ValueError, match=r"seed0_ssync\.pt is no checkpoint of this example, or a damaged one"):
            TrainingState.load(path, SETTINGS, 0)
        assert not path.with_name("trace").exists()

    def test_all_differing_settings_are_named(self, path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"trained with `slots` = 3; got 4, with `steps` = 10; got 20, with `seed` ="
        ):
            TrainingState.load(path, Settings("noise", 8, slots=4, steps=20), 1)

    def test_checkpoints_of_another_version_of_torch_load(self, path: Path) -> None:
        content = torch.load(path, weights_only=True)
        content["optimizer"]["param_groups"][0]["new"] = content["scheduler"]["new"] = 3
        del content["optimizer"]["param_groups"][0]["fused"], content["scheduler"]["_get_lr_called_within_step"]
        torch.save(content, path)
        assert TrainingState.load(path, SETTINGS, 0).step == 1

    def test_the_command_checks_all_checkpoints_first(self, tmp_path: Path, untrained: None) -> None:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "seed1_ssync.pt").touch()
        said = refusal("example", *QUICK, "--seeds", "0", "1", "--resume", "--out", tmp_path)
        assert "seed1_ssync.pt is no checkpoint of this example, or a damaged one. Delete it, or take another" in said


KEY = Key("linear_vs_quadratic", "H*W", "dense", (("B", 1), ("T", 4), ("S", 3), ("H", 2), ("W", 2)))
ROW = Row(KEY, values={"step": Spread(2.0, 1.0, 3.0, 5), "ratio": 4.0})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with one row."""
    Results(origin(), path=tmp_path / "results.json").add([ROW])
    return tmp_path / "results.json"


class TestBenchmarkResults:
    def test_committed_results_have_the_schema_and_come_back_as_they_were(self) -> None:
        results = Results.load(OURS["benchmark"])
        assert results.text() == OURS["benchmark"].read_text()
        # a step that would take too long is a row without a number
        assert {"measured", "time"} <= {row.status for row in results.rows.values()}

    def test_a_row_is_written_at_once_and_tried_again_after_a_failure(self, file: Path) -> None:
        failed = Row(KEY._replace(contender="SSync cpu"), "failed", "no idea")
        Results.load(file).add([failed])
        assert Results.load(file).rows == {KEY: ROW, failed.key: failed}
        assert Results.resume(file, origin()).rows == {KEY: ROW}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c.update(schema="benchmarks 0"), "must have the schema .* found 'benchmarks 0'"),
            (lambda c: c["origin"].pop("commit"), r"`origin` must have other fields; missing are \['commit'\]"),
            (lambda c: c["rows"].append(c["rows"][0]), r"`rows\[1\]` must have another subject"),
            (lambda c: c["rows"][0].update(suite="speed"), r"`rows\[0\]`: `suite` must be one of .*; found 'speed'"),
            (lambda c: c["rows"][0].update(status="time"), "the status 'time' must have a note"),
            (lambda c: c["rows"][0]["shape"].update(T=0), "`shape.T` must be a positive integer; found 0"),
            (lambda c: c["rows"][0]["values"].update(step=[2, 3, 4, 1]), "`values.step` must have its median between"),
            (lambda c: c["rows"][0]["values"]["step"].pop(), "`values.step` must be a finite number, or .median"),
        ],
    )
    def test_what_is_not_of_the_schema_is_refused(self, change: Any, message: str, file: Path) -> None:
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"results.json.*{message}"):
            Results.load(file)

    @pytest.mark.parametrize(("name", "value"), [("sources", "ba98"), ("quick", True)])
    def test_a_run_does_not_continue_elsewhere(self, name: str, value: Any, file: Path) -> None:
        before, now = file.read_bytes(), origin(**{name: value})
        with pytest.raises(ValueError, match=f"measured with `{name}` = .*, and now it is .*--out, or --restart"):
            Results.resume(file, now)
        assert not Results.resume(file, now, restart=True).rows
        # until there is a new row
        assert file.read_bytes() == before
