"""What is made of measurements: files that outlive an interruption, bars, tables, and the commands."""

import doctest
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks import child, in_a_run, report, run
from benchmarks import results as results_module
from benchmarks.add_ons import ADD_ONS
from benchmarks.bars import Bar, bars, slope_of, steps
from benchmarks.contenders import TWO_THREADS, base_of
from benchmarks.plan import Options
from benchmarks.results import SUITES, Key, Results, Row, Spread
from benchmarks.suites import growth, kernels, training_step
from benchmarks.tables import every_row, section, weak_spots
from matplotlib.image import imread

from benchmark_results import MACHINE, Machine, fresh, go_on, measured, options, spread
from ssync_loss.ssync.engines.triton._limits import MIN_VERSION, VERSION

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "benchmarks" / "results" / "cpu.json"
KEY = Key("linear_vs_quadratic", "H*W", "dense", (("B", 1), ("T", 4), ("S", 3), ("H", 2), ("W", 2)))
ROW = Row(KEY, values={"step": Spread(2.0, 1.0, 3.0, 5), "ratio": 4.0})
ON_GPU = options(device="cuda", backends=("triton", "torch"))


@pytest.fixture(scope="module")
def made() -> Results:
    """What a machine gives on which SSync is exactly linear and dense alignment exactly quadratic."""
    with pytest.MonkeyPatch.context() as patch:
        return measured(patch)


@pytest.mark.parametrize("module", [results_module, growth], ids=lambda module: module.__name__)
def test_examples_in_docstrings_hold(module: Any) -> None:
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0


class TestFile:
    def test_committed_results_have_the_schema_and_come_back_as_they_were(self) -> None:
        results = Results.load(COMMITTED)
        assert results.text() == COMMITTED.read_text()
        # what is slow is in it as what it is: not measured, and said so
        assert {"measured", "time"} <= {row.status for row in results.rows.values()}

    def test_what_is_measured_one_after_the_other_is_one_row_and_written_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "results.json"
        results = fresh(options(), path)
        for values in ({"allocated": 5}, {"step": spread(2.0)}):
            results.add([Row(KEY, values=values)])
            assert values.items() <= Results.load(path).rows[KEY].values.items()
        results.add([Row(KEY, "failed", "no idea")])
        assert Results.load(path).rows == {KEY: Row(KEY, "failed", "no idea", {"allocated": 5, "step": spread(2.0)})}
        assert [one.name for one in path.parent.iterdir()] == ["results.json"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c.update(schema="benchmarks 0"), "must have the schema .* found 'benchmarks 0'"),
            (lambda c: c.pop("schema"), "found 'no schema'. It is left as it is"),
            (lambda c: c["machine"].pop("commit"), r"`machine` must have other fields; missing are \['commit'\]"),
            (lambda c: c["machine"].update(threads=True), "`threads` has the wrong type; found True"),
            (lambda c: c["rows"].append(c["rows"][0]), r"`rows\[1\]` must be about something else"),
            (lambda c: c["rows"][0].update(suite="speed"), r"`rows\[0\]`: `suite` must be one of .*; found 'speed'"),
            (lambda c: c["rows"][0].update(status="fine"), "`status` must be one of measured, .*; found 'fine'"),
            (lambda c: c["rows"][0].update(status="time"), "the status 'time' must have a note"),
            (lambda c: c["rows"][0]["shape"].update(T=0), "`shape.T` must be a positive integer; found 0"),
            (lambda c: c["rows"][0]["values"].update(step="fast"), "`values.step` must be a finite .* found 'fast'"),
            (lambda c: c["rows"][0]["values"].update(step=[2, 3, 4, 1]), "`values.step` must have its median between"),
            (lambda c: c["rows"][0]["values"]["step"].pop(), "`values.step` must be a finite number, or .median"),
        ],
    )
    def test_what_is_not_of_the_schema_is_refused(self, change: Any, message: str, tmp_path: Path) -> None:
        path = tmp_path / "results.json"
        fresh(options(), path).add([ROW])
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"results.json.*{message}"):
            Results.load(path)

    @pytest.mark.parametrize(("part", "name", "value"), [("machine", "sources", "ba98"), ("settings", "quick", True)])
    def test_a_run_does_not_go_on_elsewhere(self, part: str, name: str, value: Any, tmp_path: Path) -> None:
        path = tmp_path / "results.json"
        fresh(options(), path).add([ROW])
        before = path.read_bytes()
        now: dict[str, Any] = {"machine": dict(MACHINE), "settings": options().settings()}
        now[part][name] = value
        with pytest.raises(ValueError, match=f"measured with `{name}` = .*, and now it is .*--out, or --restart"):
            Results.resume(path, **now)
        assert not Results.resume(path, **now, restart=True).rows
        # until there is a new row
        assert path.read_bytes() == before

    def test_what_failed_is_tried_again(self, tmp_path: Path) -> None:
        path = tmp_path / "results.json"
        fresh(options(), path).add([ROW, Row(KEY._replace(case="T"), "failed", "once")])
        assert list(Results.resume(path, MACHINE, options().settings()).rows) == [KEY]

    def test_the_digest_tells_code_apart_and_leaves_reports_out(self, tmp_path: Path) -> None:
        folder = tmp_path / "benchmarks"
        folder.mkdir()
        seen = []
        for name, text in (("timing.py", "a = 1"), ("report.py", "b = 1"), ("timing.py", "a = 2"), ("engine.c", "")):
            (folder / name).write_text(text)
            seen.append(run.sources_digest(tmp_path))
        assert seen[0] == seen[1]
        assert len(set(seen)) == 3

    def test_the_machine_is_one_that_the_schema_takes(self, tmp_path: Path) -> None:
        Results(run.machine("cpu", 2), options().settings(), path=tmp_path / "x").add([])
        assert Results.load(tmp_path / "x").machine["threads"] == 2


class TestRun:
    @pytest.mark.parametrize("chosen", [options(), options(quick=True), ON_GPU])
    def test_every_contender_passes_the_gate_before_a_suite_has_it(self, chosen: Options) -> None:
        jobs = run.plan(chosen)
        gated = [key for job in jobs for key in job.rows if key.suite == "gate"]
        rest = [key for job in jobs[len(gated) :] for key in job.rows]
        assert {key.suite for key in rest} == set(SUITES[1:])
        assert {(base_of(key.contender), key.dtype) for key in rest if key.contender != "torch"} == {
            (key.contender, key.dtype) for key in gated
        }
        # a row and a value are measured once
        assert len({(key, job.value) for job in jobs for key in job.rows}) == sum(len(job.rows) for job in jobs)

    def test_more_than_one_thread_is_never_a_fork(self) -> None:
        for job in run.plan(options()):
            if job.threads == 2 or any(key.contender.endswith(TWO_THREADS) for key in job.rows):
                assert job.alone

    def test_a_rehearsal_is_a_part_of_everything(self) -> None:
        quick, whole = (
            {(key.suite, key.case) for job in run.plan(options(quick=one)) for key in job.rows} for one in (True, False)
        )
        assert quick < whole | {("gate", "")}
        assert {suite for suite, _ in quick} == {suite for suite, _ in whole}

    def test_sizes_go_from_256_to_a_million_patches_in_one_clip(self) -> None:
        for case, axes in (("H*W", "HW"), ("T", "T"), ("B", "B")):
            shapes = growth.shapes(growth.LINEAR, case, options())
            changing = {axis for axis in "BTSHW" if len({shape[axis] for shape in shapes}) > 1}
            assert changing == set(axes)
            sizes = [growth.size_of(KEY._replace(shape=tuple(shape.items()))) for shape in shapes]
            assert (sizes[0], sizes[-1]) == (256 if case == "H*W" else 1024, 1_048_576)

    def test_what_would_take_too_much_is_not_run_and_says_so(
        self, made: Results, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        large = measured(monkeypatch, suites=("linear_vs_quadratic",), time_cap=1e9, memory_cap=5_000_000_000)
        # 10 ns and 16 bytes a pair
        for results, status, said in (
            (made, "time", "a step should take 10.7 s after 2.68 s at 16,384 patches; the cap is 10 s"),
            (large, "memory", "a step should take 17.2 GB after 4.29 GB at 16,384 patches; the cap is 5 GB"),
        ):
            rows = results.select("linear_vs_quadratic", case="H*W", contender="dense")
            by_size = {growth.size_of(row.key): row for row in rows}
            assert "step" in by_size[16_384].values
            assert (by_size[32_768].status, by_size[32_768].note) == (status, said)
            assert by_size[1_048_576].status == status

    @pytest.mark.parametrize(
        ("machine", "name", "status", "note"),
        [
            (Machine(wrong="SSync cpu"), "SSync cpu", "wrong", "the loss is another"),
            (Machine(wrong="sinkhorn"), "sinkhorn", "wrong", "the loss is another"),
            (Machine(too_large="dense"), "dense", "memory", "as at 256 patches: ran out"),
            (Machine(losses={"dense chunked": 1.001}), "dense chunked", "wrong", "the loss is 1.001, and 1 by dense"),
        ],
    )
    def test_who_is_stopped_has_no_number(
        self, machine: Machine, name: str, status: str, note: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        results = measured(monkeypatch, machine, quick=True)
        rows = [row for row in results.rows.values() if base_of(row.key.contender) == name and row.key.suite != "gate"]
        assert {row.status for row in rows} == {status}
        assert note in {row.note for row in rows}
        assert not any("step" in row.values for row in rows)
        assert {row.status for row in results.select("add_ons", contender="clip_mask")} == {"measured"}
        if status == "wrong":
            assert any(f"{name} is wrong: the loss is" in one for one in weak_spots(results))

    @pytest.mark.parametrize("stop_at", [2, 40, 75, 140])
    def test_an_interrupted_run_goes_on_where_it_stopped(
        self, stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, chosen = tmp_path / "results.json", options(quick=True)
        uninterrupted, stopped, again = Machine(), Machine(), Machine()
        whole = measured(monkeypatch, uninterrupted, quick=True)
        stopped.stop_at = stop_at
        with pytest.raises(KeyboardInterrupt):
            go_on(monkeypatch, chosen, stopped, Results.resume(path, MACHINE, chosen.settings()))
        assert len(Results.load(path).rows) >= stop_at // 2
        results = go_on(monkeypatch, chosen, again, Results.resume(path, MACHINE, chosen.settings()))
        assert results.rows == whole.rows == Results.load(path).rows
        # nothing is measured twice
        assert stop_at - 1 + len(again.asked) == len(uninterrupted.asked)


class TestReport:
    def test_slopes_are_those_of_the_machine(self, made: Results) -> None:
        powers = {"SSync cpu": "111", "SSync torch": "111", "dense": "221", "dense in windows of 2": "21"}
        for contender, said in powers.items():
            for sweep, power in zip(("H*W", "T", "B"), said, strict=False):
                for value in ("step", "allocated"):
                    slope = slope_of(made, sweep, contender, value)
                    assert slope is not None
                    assert slope.enough
                    assert slope.exponent == pytest.approx(int(power), abs=1e-3)

    def test_all_bars_are_met_where_all_is_well_but_what_is_not(self, made: Results) -> None:
        found = bars(made)
        # a microsecond a patch is 164 times less than 10 ns a pair at 16,384 patches
        claim = "SSync cpu: faster than full dense alignment at 16,384 patches"
        assert [bar for bar in found if bar.verdict != "met"] == [Bar(claim, "≥ 1,000x", "164x", "**missed**")]
        assert len(found) == 24
        assert {bar.verdict for bar in bars(fresh(options()))} == {"not measured"}

    def test_each_number_is_held_to_its_own_limit(self, made: Results) -> None:
        def verdicts(rows: dict[Key, Row]) -> dict[str, tuple[str, str, str]]:
            return {bar[0]: bar[1:] for bar in bars(Results(made.machine, made.settings, made.rows | rows))}

        (small,), (large,) = steps(made, "SSync cpu", 4), steps(made, "SSync cpu", 64)
        (threaded,), (first,) = steps(made, "SSync cpu, 2 threads", 64), made.select("kernels", case=kernels.FIRST_USE)
        (share,) = made.select("training_step", case=training_step.EXAMPLE, contender="SSync cpu, 2 threads")
        for row, value, worse, part, limit in (
            (small, "over_exp", spread(3.6), "4 clips", "≤ 3.5"),
            (large, "over_exp", spread(3.3), "64 clips", "≤ 3.2"),
            (threaded, "speedup", spread(1.6), "two threads", "≥ 1.70x"),
            (large, "maps_waiting", 0.2, "wait for the backward", "≤ 0.10"),
            (first, "step", spread(3.1), "first use", "≤ 3.0 s"),
            (share, "share", spread(0.011), "2 threads: share", "< 1.00%"),
        ):
            found, before = verdicts({row.key: replace(row, values={**row.values, value: worse})}), verdicts({})
            ((claim, (bound, _, verdict)),) = found.items() - before.items()
            assert part in claim
            assert (bound, verdict, before[claim][2]) == (limit, "**missed**", "met")

    def test_a_gpu_is_held_against_its_own(self) -> None:
        results = fresh(ON_GPU)
        results.machine |= {"device": "cuda", "gpu": "H", "cuda": "13"}
        shape = {"B": 64, "T": 4, "S": 11, "H": 24, "W": 24}
        key = Key("kernels", "step, mse", "SSync triton", tuple(shape.items()), "float16")
        replay = key._replace(contender="SSync triton, graph replay")
        large = replay._replace(shape=tuple((shape | {"B": 6000}).items()))
        results.add([Row(key, values={"launches": 10}), Row(replay, values={"step": spread(50e-6), "over_floor": 9.0})])
        results.add([Row(large, values={"step": spread(1e-3), "over_floor": spread(1.4)})])
        found = [(bar.measured, bar.verdict) for bar in bars(results)[-3:]]
        assert found == [("10", "**missed**"), ("50", "met"), ("1.40", "met")]

    def test_says_what_was_measured(self, made: Results, monkeypatch: pytest.MonkeyPatch) -> None:
        text = section(made, "abacus", "results/abacus.png")
        for part in (
            "## Results: abacus\n\nAbacus, 1 thread, torch Abacus, commit abcdef0123,",
            "`M_MMAP_MAX=0 ",
            "SSync cpu compiled, SSync torch compiled, 33 other rows.",
            "| SSync cpu: slope of time in H·W",
            "![Time and memory of a step, and their slopes](results/abacus.png)",
            "| 4,096         | 4.1, 0.41 ",
            "| 1.00 (1)      | 1.00 (1)        |",
            "takes 0.20% of the example's",
            "### Weak spots",
        ):
            assert part in text
        for one in ADD_ONS:
            assert f"\n| {one.name} " in text
        # a microsecond for each of 4,608 patches, and 0.1 for one of a frame
        assert re.search(r"\| slot_error +\| 0\.0576 \(0\.0125x\) +\| 0\.00461 \(0\.01x\) ", text)
        assert "rehearsal" not in text
        some = section(measured(monkeypatch, quick=True, suites=("kernels",)), "x", "x.png")
        assert "**A rehearsal (`--quick`)" in some
        assert "### Steps" in some
        assert "### Linear against" not in some

    def test_the_command_writes_between_the_markers_draws_and_prints(
        self, made: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (start, end), readme, folder = report.MARKERS, tmp_path / "README.md", tmp_path / "results"
        readme.write_text(f"before\n{start}\ntyped by hand\n{end}\nafter\n")
        Results(made.machine, made.settings, path=folder / "abacus.json").add(made.rows.values())
        arguments = ["--results", str(folder), "--readme", str(readme)]
        assert report.main(arguments) == 0
        text = readme.read_text()
        assert text.startswith(f"before\n{start}\n**There is no GPU result yet.**")
        assert text.endswith(f"{end}\nafter\n")
        assert "typed by hand" not in text
        picture = imread(folder / "abacus.png")
        assert min(picture.shape[:2]) > 500
        assert picture.std() > 0.05
        assert report.main([*arguments, "--rows", "kernels"]) == 0
        assert every_row(made, "kernels") in capsys.readouterr().out

    def test_a_page_without_markers_is_refused(self) -> None:
        for text in ("", report.MARKERS[0], "".join(report.MARKERS) + report.MARKERS[0]):
            with pytest.raises(ValueError, match=r"page must have one line '<!-- results"):
                report.between(text, "x", "page")

    def test_a_gpu_result_takes_the_sentence_away(self, made: Results) -> None:
        gpu = Results({**MACHINE, "device": "cuda", "gpu": "H", "cuda": "13"}, made.settings)
        assert "There is no" not in report.body({"cpu": made, "h": gpu})

    def test_the_committed_page_is_what_the_commands_make(self) -> None:
        page = ROOT / "benchmarks" / "README.md"
        text = page.read_text()
        assert text == report.between(text, report.body(report.load_all(COMMITTED.parent)), "page")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (page.parent / target).exists(), target

    @pytest.mark.kernels
    @pytest.mark.skipif(VERSION < MIN_VERSION, reason="needs Triton {}.{} or above".format(*MIN_VERSION))
    def test_what_the_page_counts_is_what_is_counted(self) -> None:
        text = (ROOT / "benchmarks" / "README.md").read_text()
        assert text == report.between(text, in_a_run.lines(), "page", in_a_run.MARKERS)

    def test_collectives_are_seen(self) -> None:
        assert in_a_run.collectives(3) == {
            "SSyncLoss": [],
            "global_mean": [("allreduce", 2 * 8)],
            "AdaptiveSSyncLoss": [("allreduce", 3 * 8)],
        }


class TestCommand:
    @pytest.fixture
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> Machine:
        one = Machine()
        monkeypatch.setattr(child, "call", one.call)
        monkeypatch.setattr("examples.arguments.num_cpus", lambda: 2)
        return one

    def test_a_rehearsal_does_not_touch_the_committed_results(self) -> None:
        assert run.parse(["--quick"]).out == Path("runs/benchmarks/cpu.json")
        assert run.parse([]).out == COMMITTED

    def test_a_backend_that_was_asked_for_and_cannot_be_had(self, machine: Machine, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="error: --backend triton cannot be had on cpu: it is not there"):
            run.main(["--backend", "triton", "--out", str(tmp_path / "out.json")])
        assert not list(tmp_path.iterdir())

    def test_measures_what_is_missing_and_nothing_twice(self, machine: Machine, tmp_path: Path) -> None:
        out = tmp_path / "out.json"
        machine.stop_at = 12
        assert run.main(["--quick", "--suite", "kernels", "--out", str(out)]) == 130
        kept = Results.load(out).rows
        assert len(kept) > 5
        assert run.main(["--quick", "--out", str(out)]) == 0
        assert kept.keys() < Results.load(out).rows.keys()
        assert {key.suite for key in Results.load(out).rows} == set(SUITES)
        machine.asked.clear()
        assert run.main(["--quick", "--out", str(out)]) == 0
        assert len(machine.asked) == 3
        machine.stop_at = 0
        with pytest.raises(SystemExit, match=r"error: .* was measured with `threads` = 1, and now it is 2"):
            run.main(["--quick", "--out", str(out), "--threads", "2"])
        assert run.main(["--quick", "--suite", "kernels", "--out", str(out), "--threads", "2", "--restart"]) == 0
        assert Results.load(out).machine["threads"] == 2
