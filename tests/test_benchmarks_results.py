"""Files of results: what they must hold, what is refused, and how a run goes on."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import environment
from benchmarks.results import SCHEMA, Results, Row, RowId, Spread, check_schema

from benchmark_results import ENVIRONMENT, Machine, fresh, go_on, measured, options

COMMITTED = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json"))
KEY = RowId.of("linear_vs_quadratic", "H*W", "dense", "time", {"B": 1, "T": 4, "S": 3, "H": 2, "W": 2})
ROW = Row(KEY, "measured", values={"step": Spread(2.0, 1.0, 3.0, 5), "ratio": 4.0})


def written(path: Path, *rows: Row) -> dict[str, Any]:
    results = fresh(options(), path)
    results.add(rows)
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_there_is_a_committed_result() -> None:
    assert [path.stem for path in COMMITTED][:1] == ["cpu"]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_have_the_schema(path: Path) -> None:
    results = Results.load(path)
    assert len(results.rows) > 100
    assert json.loads(results.text()) == json.loads(path.read_text())
    # what is slow is in it as what it is: not measured, and said so
    assert {"measured", "time"} <= {row.status for row in results.rows.values()}


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 1)
    assert Spread(2.0, 1.5, 2.5, 9).noise == 0.5
    assert Spread(2.0, 1.5, 2.5, 9).scaled(2.0) == Spread(4.0, 3.0, 5.0, 9)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    stopped = Row(RowId.of("kernels", "merge", "SSync torch", "counts", {"B": 4}), "failed", "no idea")
    content = written(path, ROW, stopped)
    assert content["schema"] == SCHEMA
    assert Results.load(path).rows == {ROW.id: ROW, stopped.id: stopped}
    assert [one.name for one in path.parent.iterdir()] == ["results.json"]


def test_every_row_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results = fresh(options(), path)
    for size in (1, 2, 3):
        results.add([Row(RowId.of("gate", "x", "dense", "gate", {"B": size}), "measured")])
        assert len(Results.load(path).rows) == size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema="benchmarks 0"), "must have the schema .* found 'benchmarks 0'"),
        (lambda c: c.pop("schema"), "found 'no schema'. It is left as it is"),
        (lambda c: c["environment"].pop("commit"), r"`environment` must have other fields; missing are \['commit'\]"),
        (lambda c: c["environment"].update(dirty="no"), "`dirty` has the wrong type; found 'no'"),
        (lambda c: c["settings"].update(mood=1), r"`settings` must have other fields; .* unknown are \['mood'\]"),
        (lambda c: c["settings"].update(threads=True), "`threads` has the wrong type; found True"),
        (lambda c: c.update(rows={}), "`rows` must be a list; found dict"),
        (lambda c: c["rows"].append(c["rows"][0]), r"`rows\[1\]` must be about something else"),
        (lambda c: c["rows"][0].update(suite="speed"), r"`rows\[0\]`: `suite` must be one of .*; found 'speed'"),
        (lambda c: c["rows"][0].update(measure="mood"), "`measure` must be one of .*; found 'mood'"),
        (lambda c: c["rows"][0].update(status="fine"), "`status` must be one of measured, .*; found 'fine'"),
        (lambda c: c["rows"][0].update(status="time"), "the status 'time' must have a note and no values"),
        (lambda c: c["rows"][0]["shape"].update(T=0), "`shape.T` must be a positive integer; found 0"),
        (lambda c: c["rows"][0]["values"].pop("step"), "`values` must hold 'step'; found ratio"),
        (lambda c: c["rows"][0]["values"].update(step="fast"), "`values.step` must be a finite number .* found 'fast'"),
        (lambda c: c["rows"][0]["values"]["step"].update(q1=9.0), "`values.step` must have its median between"),
        (lambda c: c["rows"][0]["values"]["step"].pop("samples"), r"missing are \['samples'\]"),
    ],
)
def test_what_is_not_of_the_schema_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    content = written(tmp_path / "good.json", ROW)
    check_schema(copy.deepcopy(content), "good")
    change(content)
    with pytest.raises(ValueError, match=f"some file.*{message}"):
        check_schema(content, "some file")


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("environment", "cpu", "Slide rule"),
        ("environment", "sources", "ba9876543210"),
        ("environment", "torch", "2.11"),
        ("settings", "threads", 2),
        ("settings", "quick", True),
    ],
)
def test_a_run_does_not_go_on_elsewhere(part: str, name: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    written(path, ROW)
    before = path.read_bytes()
    now: dict[str, Any] = {"environment": ENVIRONMENT, "settings": options().settings()}
    now[part] = now[part] | {name: value}
    with pytest.raises(ValueError, match=f"measured with `{name}` = .*, and now it is .*--out, or --restart"):
        Results.resume(path, **now)
    assert path.read_bytes() == before
    assert not Results.resume(path, **now, restart=True).rows
    # until there is a new row
    assert path.read_bytes() == before


def test_what_failed_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    written(path, ROW, Row(RowId.of("gate", "x", "dense", "gate", {"B": 1}), "failed", "once"))
    assert list(Results.resume(path, ENVIRONMENT, options().settings()).rows) == [ROW.id]


@pytest.mark.parametrize("stop_at", [2, 9, 40, 75, 140])
def test_an_interrupted_run_goes_on_where_it_stopped(
    stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, chosen = tmp_path / "results.json", options(quick=True)
    uninterrupted, stopped, again = Machine(), Machine(), Machine()
    whole = measured(monkeypatch, uninterrupted, quick=True)
    stopped.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        go_on(monkeypatch, chosen, stopped, Results.resume(path, ENVIRONMENT, chosen.settings()))
    kept = Results.load(path).rows if path.exists() else {}
    assert len(kept) >= (stop_at - 1) // 2
    results = go_on(monkeypatch, chosen, again, Results.resume(path, ENVIRONMENT, chosen.settings()))
    assert results.rows == whole.rows
    assert Results.load(path).rows == whole.rows
    # nothing is measured twice
    assert stop_at - 1 + len(again.asked) == len(uninterrupted.asked)


def test_the_digest_tells_code_apart_and_leaves_reports_out(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "timing.py").write_text("a = 1")
    (folder / "report.py").write_text("b = 1")
    first = environment.sources_digest(tmp_path)
    (folder / "report.py").write_text("b = 2")
    assert environment.sources_digest(tmp_path) == first
    for name in ("timing.py", "engine.c"):
        before = environment.sources_digest(tmp_path)
        (folder / name).write_text("a = 2")
        assert environment.sources_digest(tmp_path) != before


def test_the_environment_is_one_that_the_schema_takes() -> None:
    described = environment.describe("cpu")
    content = {"schema": SCHEMA, "environment": described, "settings": options().settings(), "rows": []}
    check_schema(json.loads(json.dumps(content)), "here")
    assert described["cpu"]
    assert described["memory_gb"] > 0
