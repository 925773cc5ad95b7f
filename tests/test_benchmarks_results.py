"""What is made of measurements: files that outlive an interruption, bars, tables, and the commands."""

import doctest
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks import gate, in_a_run, plan, report, run
from benchmarks import results as results_module
from benchmarks.add_ons import ADD_ONS
from benchmarks.bars import bars, slope_of
from benchmarks.contenders import REPLAY, STEP, TWO_THREADS, base_of
from benchmarks.plan import Options
from benchmarks.results import SUITES, Key, Results, Row, Spread
from benchmarks.suites import growth, kernels
from benchmarks.tables import every_row, section
from examples.markdown import between
from matplotlib.image import imread

from benchmark_results import Machine, measured, options, origin, spread
from ssync_loss.ssync.engines.triton._limits import MIN_VERSION, VERSION

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "benchmarks" / "README.md"
COMMITTED = ROOT / "benchmarks" / "results" / "cpu.json"
KEY = Key("linear_vs_quadratic", "H*W", "dense", (("B", 1), ("T", 4), ("S", 3), ("H", 2), ("W", 2)))
ROW = Row(KEY, values={"step": Spread(2.0, 1.0, 3.0, 5), "ratio": 4.0})
ON_GPU = options(device="cuda", backends=("triton", "torch"))


@pytest.fixture(scope="module")
def made() -> Results:
    """Results in which SSync is exactly linear and dense alignment exactly quadratic."""
    with pytest.MonkeyPatch.context() as patch:
        return measured(patch)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with one row."""
    Results(origin(), path=tmp_path / "results.json").add([ROW])
    return tmp_path / "results.json"


@pytest.mark.parametrize("module", [results_module, growth], ids=lambda module: module.__name__)
def test_examples_in_docstrings_hold(module: Any) -> None:
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0


class TestFile:
    def test_committed_results_have_the_schema_and_come_back_as_they_were(self) -> None:
        results = Results.load(COMMITTED)
        assert results.text() == COMMITTED.read_text()
        # a step that would take too long is a row without a number
        assert {"measured", "time"} <= {row.status for row in results.rows.values()}

    def test_a_row_is_written_at_once_and_tried_again_after_a_failure(self, file: Path) -> None:
        failed = Row(KEY._replace(contender="SSync cpu"), "failed", "no idea")
        Results.load(file).add([failed])
        assert Results.load(file).rows == {KEY: ROW, failed.key: failed}
        assert [one.name for one in file.parent.iterdir()] == ["results.json"]
        assert Results.resume(file, origin()).rows == {KEY: ROW}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c.update(schema="benchmarks 0"), "must have the schema .* found 'benchmarks 0'"),
            (lambda c: c.pop("schema"), "found 'no schema'. It is left as it is"),
            (lambda c: c["origin"].pop("commit"), r"`origin` must have other fields; missing are \['commit'\]"),
            (lambda c: c["origin"].update(threads=True), "`threads` has the wrong type; found True"),
            (lambda c: c["rows"].append(c["rows"][0]), r"`rows\[1\]` must have another subject"),
            (lambda c: c["rows"][0].update(suite="speed"), r"`rows\[0\]`: `suite` must be one of .*; found 'speed'"),
            (lambda c: c["rows"][0].update(status="fine"), "`status` must be one of measured, .*; found 'fine'"),
            (lambda c: c["rows"][0].update(status="time"), "the status 'time' must have a note"),
            (lambda c: c["rows"][0]["shape"].update(T=0), "`shape.T` must be a positive integer; found 0"),
            (lambda c: c["rows"][0]["values"].update(step="fast"), "`values.step` must be a finite .* found 'fast'"),
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

    def test_the_digest_tells_code_apart_and_leaves_reports_out(self, tmp_path: Path) -> None:
        folder = tmp_path / "benchmarks"
        folder.mkdir()
        seen = []
        for name, text in (("timing.py", "a = 1"), ("report.py", "b = 1"), ("timing.py", "a = 2"), ("engine.c", "")):
            (folder / name).write_text(text)
            seen.append(run.sources_digest(tmp_path))
        assert seen[0] == seen[1]
        assert len(set(seen)) == 3


class TestPlan:
    @pytest.mark.parametrize("chosen", [options(), options(quick=True), ON_GPU])
    def test_every_contender_passes_the_gate_first(self, chosen: Options) -> None:
        first, *jobs = run.plan(chosen)
        rest = [key for job in jobs for key in job.rows]
        assert {key.suite for key in rest} == set(SUITES[1:])
        assert {(base_of(key.contender), key.dtype) for key in rest if key.contender != "torch"} == {
            (key.contender, key.dtype) for key in first.rows
        }
        assert len(set(rest)) == len(rest)
        # malloc cannot be lowered again
        assert [job.raised for job in jobs] == sorted(job.raised for job in jobs)

    def test_sizes_go_from_256_to_a_million_patches_in_one_clip(self) -> None:
        for case, axes in (("H*W", "HW"), ("T", "T"), ("B", "B")):
            shapes = growth.shapes(growth.LINEAR, case, options())
            assert {axis for axis in "BTSHW" if len({shape[axis] for shape in shapes}) > 1} == set(axes)
            sizes = [growth.size_of(KEY._replace(shape=tuple(shape.items()))) for shape in shapes]
            assert (sizes[0], sizes[-1]) == (256 if case == "H*W" else 1024, 1_048_576)
            assert len(growth.shapes(growth.LINEAR, case, options(quick=True))) < len(shapes)

    def test_a_step_that_should_take_too_long_does_not_run(self, made: Results) -> None:
        rows = made.select("linear_vs_quadratic", case="H*W", contender="dense")
        by_size = {growth.size_of(row.key): row for row in rows}
        assert "step" in by_size[16_384].values
        # 10 ns a pair
        said = "a step should take 10.7 s after 2.68 s at 16,384 patches; the cap is 10 s"
        assert (by_size[32_768].status, by_size[32_768].note) == ("time", said)
        assert by_size[1_048_576].status == "time"

    @pytest.mark.parametrize(
        ("suite", "name", "no"),
        [
            ("gate", "SSync cpu", ("wrong", "the loss is another")),
            ("gate", "sinkhorn", ("wrong", "the loss is another")),
            ("linear_vs_quadratic", "dense", ("memory", "as at 256 patches: ran out")),
        ],
    )
    def test_a_stopped_contender_has_no_number(
        self, suite: str, name: str, no: tuple[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        results = measured(monkeypatch, Machine({(suite, name): (no[0], no[1].split(": ")[-1])}), quick=True)
        rows = [row for row in results.rows.values() if base_of(row.key.contender) == name and row.key.suite != "gate"]
        assert {row.status for row in rows} == {no[0]}
        assert no[1] in {row.note for row in rows}
        assert not any(row.values for row in rows)
        assert {row.status for row in results.select("add_ons", contender="clip_mask")} == {"measured"}
        assert (f"**{name} is wrong**: the loss is" in section(results, "x", "x.png")) == (no[0] == "wrong")


class TestReport:
    def test_slopes_are_those_of_the_machine(self, made: Results) -> None:
        powers = {"SSync cpu": "111", "SSync torch": "111", "dense": "221", "dense in windows of 2": "21"}
        for contender, said in powers.items():
            for sweep, power in zip(("H*W", "T", "B"), said, strict=False):
                for value in ("step", "allocated"):
                    assert slope_of(made, sweep, contender, value) == pytest.approx(int(power), abs=1e-3)

    def test_each_number_is_held_to_its_own_limit(self, made: Results) -> None:
        def verdicts(*rows: Row) -> dict[str, tuple[str, str, str]]:
            changed = made.rows | {row.key: row for row in rows}
            return {bar[0]: bar[1:] for bar in bars(Results(made.origin, changed))}

        before = verdicts()
        # a microsecond a patch is 164 times less than 10 ns a pair at 16,384 patches
        missed = {claim: bar for claim, bar in before.items() if bar[2] != "met"}
        assert missed == {
            "SSync cpu: faster than dense alignment at 16,384 patches": ("≥ 1,000x", "164x", "**missed**")
        }
        assert len(before) == 16
        assert {bar.verdict for bar in bars(Results(made.origin))} == {"**not measured**"}
        small, large = (("B", clips) for clips in (4, kernels.BATCH))
        step = Key("kernels", STEP, "SSync cpu", (large, *kernels.MOVI_C.items()))
        (first,) = (row.key for row in made.select("kernels", case=kernels.FIRST_USE))
        (share,) = (row.key for row in made.select("training_step", contender="SSync cpu" + TWO_THREADS))
        for key, value, worse, part, limit in (
            (step._replace(shape=(small, *step.shape[1:])), "over_exp", spread(3.6), "4 clips", "≤ 3.5"),
            (step, "over_exp", spread(3.3), "64 clips", "≤ 3.2"),
            (step._replace(contender="SSync cpu" + TWO_THREADS), "speedup", spread(1.6), "two threads", "≥ 1.70x"),
            (step, "maps_waiting", 0.2, "kept for the backward", "≤ 0.10"),
            (first, "step", spread(3.1), "first use", "≤ 3.0 s"),
            (share, "alone_over_with", spread(0.011), "2 threads: share", "< 1.00%"),
        ):
            after = verdicts(replace(made.rows[key], values={**made.rows[key].values, value: worse}))
            ((claim, (bound, _, verdict)),) = after.items() - before.items()
            assert part in claim
            assert (bound, verdict, before[claim][2]) == (limit, "**missed**", "met")

    def test_a_gpu_has_its_own_bars(self) -> None:
        on_gpu: dict[str, Any] = {
            "device": "cuda",
            "gpu": "H",
            "cuda": "13",
            "malloc": {},
            "backends": ["triton", "torch"],
        }
        key = Key("kernels", STEP, "SSync triton", (("B", 64), *kernels.MOVI_C.items()), "float16")
        replay = key._replace(contender=key.contender + REPLAY)
        large = replay._replace(shape=(("B", 6000), *kernels.MOVI_C.items()))
        results = Results(origin(**on_gpu))
        results.add([Row(key, values={"launches": 10}), Row(replay, values={"step": spread(50e-6), "over_exp": 1.0})])
        results.add([Row(large, values={"step": spread(1e-3), "over_exp": 1.0, "over_floor": 1.4})])
        found = [(bar.measured[:8], bar.verdict) for bar in bars(results)[-3:]]
        assert found == [("10", "**missed**"), ("0.000050", "met"), ("1.40", "met")]
        assert "There is no" not in report.body({"cpu": Results(origin()), "h": results})

    def test_a_section_says_what_was_measured(self, made: Results, monkeypatch: pytest.MonkeyPatch) -> None:
        text = section(made, "abacus", "results/abacus.png")
        for part in (
            "## Results: abacus\n\nAbacus, 1 thread, torch Abacus, commit abcdef0123,",
            "`M_MMAP_MAX=0 ",
            "SSync cpu compiled, SSync torch compiled, 33 others.",
            "**missed**: SSync cpu: faster than",
            "| SSync cpu: slopes of time",
            "![Time and memory of a step, and their slopes](results/abacus.png)",
            "| 4.1, 0.41 ",
            "takes 0.20% of the example's",
        ):
            assert part in text
        for one in ADD_ONS:
            assert (f"\n| {one.name} " in text) == one.shown
        # a microsecond for each of 4,608 patches, and 0.1 for one of a frame
        assert re.search(r"\| slot_error +\| 0\.0576, 0\.00461 \(0\.0125x\) +\| 1\.00, 1\.00 ", text)
        assert "rehearsal" not in text
        some = section(measured(monkeypatch, quick=True, suites=("kernels",)), "x", "x.png")
        assert "**A rehearsal (`--quick`)" in some
        assert ("### Steps" in some, "### Linear against" in some) == (True, False)

    def test_the_command_writes_between_the_markers_draws_and_prints(
        self, made: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (start, end), readme, folder = report.MARKERS, tmp_path / "README.md", tmp_path / "results"
        readme.write_text(f"before\n{start}\ntyped by hand\n{end}\nafter\n")
        Results(made.origin, path=folder / "abacus.json").add(made.rows.values())
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

    def test_the_committed_page_is_what_the_commands_make(self) -> None:
        text = PAGE.read_text()
        assert text == between(text, report.body(report.load_all(COMMITTED.parent)), "page", report.MARKERS)
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (PAGE.parent / target).exists(), target

    @pytest.mark.kernels
    @pytest.mark.skipif(VERSION < MIN_VERSION, reason="needs Triton {}.{} or above".format(*MIN_VERSION))
    def test_what_the_page_counts_is_what_is_counted(self) -> None:
        text = PAGE.read_text()
        assert text == between(text, in_a_run.lines(), "page", in_a_run.MARKERS)


class TestCommand:
    @pytest.fixture
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> Machine:
        one = Machine()
        monkeypatch.setattr(plan, "work", one.work)
        monkeypatch.setattr(gate, "missing", lambda name, _: "it is not there" if "triton" in name else "")
        monkeypatch.setattr("examples.arguments.num_cpus", lambda: 2)
        return one

    def test_a_rehearsal_does_not_touch_the_committed_results(self) -> None:
        assert run.parse(["--quick"]).out == Path("runs/benchmarks/cpu.json")
        assert run.parse([]).out == COMMITTED

    def test_a_backend_that_cannot_run_here_is_refused(self, machine: Machine, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="error: --backend triton cannot be had on cpu: it is not there"):
            run.main(["--backend", "triton", "--out", str(tmp_path / "out.json")])
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("stop_at", [1, 2, 9, 30])
    def test_a_stopped_run_continues_and_measures_nothing_twice(
        self, stop_at: int, machine: Machine, tmp_path: Path
    ) -> None:
        def jobs(name: str, *given: str) -> int:
            machine.jobs = 0
            assert run.main(["--quick", "--out", str(tmp_path / name), *given]) == (130 if machine.stop_at else 0)
            return machine.jobs

        whole = jobs("whole.json")
        machine.stop_at = stop_at
        assert jobs("part.json") == stop_at
        machine.stop_at = 0
        assert jobs("part.json") == whole - (stop_at - 1)
        assert Results.load(tmp_path / "part.json").rows == Results.load(tmp_path / "whole.json").rows
        assert jobs("part.json") == 0
        with pytest.raises(SystemExit, match=r"error: .* was measured with `threads` = 1, and now it is 2"):
            jobs("part.json", "--threads", "2")
        assert 0 < jobs("part.json", "--suite", "kernels", "--threads", "2", "--restart") < whole
        assert Results.load(tmp_path / "part.json").origin["threads"] == 2
