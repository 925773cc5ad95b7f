"""What is made of measurements: files that outlive an interruption, bars, tables, and the commands."""

import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from benchmarks import gate, in_a_run, plan, report, run
from benchmarks.add_ons import ADD_ONS
from benchmarks.bars import SWEEPS, bars, slope_of
from benchmarks.contenders import REPLAY, STEP, TWO_THREADS, base_of
from benchmarks.plan import Options
from benchmarks.results import SUITES, Key, Results, Row
from benchmarks.suites import growth, kernels
from benchmarks.tables import every_row, section
from examples.markdown import between
from matplotlib.image import imread

from benchmark_results import Machine, measured, options, origin, spread
from ssync_loss.ssync.engines.triton._limits import MIN_VERSION, VERSION

PAGE = run.ROOT / "benchmarks" / "README.md"
MOVI_C = tuple(kernels.MOVI_C.items())
ON_GPU = options(device="cuda", backends=("triton", "torch"))


@pytest.fixture(scope="module")
def made() -> Results:
    """Results in which SSync is exactly linear and dense alignment exactly quadratic."""
    with pytest.MonkeyPatch.context() as patch:
        return measured(patch)


class TestPlan:
    @pytest.mark.parametrize("chosen", [options(), options(quick=True), ON_GPU])
    def test_every_contender_passes_the_gate_first(self, chosen: Options) -> None:
        jobs = run.plan(chosen)
        gates = [job.rows[0] for job in jobs if job.measure is gate.check]
        jobs = jobs[len(gates) :]
        rest = [key for job in jobs for key in job.rows]
        assert {key.suite for key in rest} == set(SUITES[1:])
        gated = {(base_of(key.contender), key.dtype) for key in rest if key.contender != "torch"}
        assert gated == {(key.contender, key.dtype) for key in gates}
        assert len(set(rest)) == len(rest)
        last = [job.rows[0].suite == "kernels" if chosen is ON_GPU else job.raised for job in jobs]
        assert [*last, True] == sorted([*last, any(last)])

    def test_sizes_go_from_256_to_a_million_patches_in_one_clip(self) -> None:
        for case, axes in (("H*W", "HW"), ("T", "T"), ("B", "B")):
            shapes = growth.shapes(growth.LINEAR, case, options())
            assert {axis for axis in "BTSHW" if len({shape[axis] for shape in shapes}) > 1} == set(axes)
            sizes = [math.prod(shape[axis] for axis in "BTHW") for shape in shapes]
            assert (sizes[0], sizes[-1]) == (256 if case == "H*W" else 1024, 1_048_576)
            assert len(growth.shapes(growth.LINEAR, case, options(quick=True))) < len(shapes)

    def test_a_step_that_should_take_too_much_does_not_run(self, made: Results, monkeypatch: Any) -> None:
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

    def test_a_stopped_contender_has_no_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for suite, name, status, where, note in (
            ("gate", "SSync cpu", "wrong", "", "the loss is another"),
            ("gate", "sinkhorn", "wrong", "", "the loss is another"),
            ("gate", "SSync torch", "failed", "", "an error"),
            ("linear_vs_quadratic", "dense", "memory", "as at 256 patches: ", "ran out"),
        ):
            results = measured(monkeypatch, Machine({(suite, name): (status, note)}), quick=True)
            rows = [row for key, row in results.rows.items() if base_of(key.contender) == name and key.suite != "gate"]
            assert {(row.status, *row.values) for row in rows} == {(status,)}
            assert where + note in {row.note for row in rows}
            assert {row.status for row in results.select("add_ons", contender="clip_mask")} == {"measured"}
            said = {"wrong": [f"{name} is wrong"], "failed": [f"{name} failed"], "memory": []}[status]
            assert re.findall(r"\n\*\*(.*)\*\*: ", section(results, "x", "x.png").partition("###")[0])[:1] == said


class TestReport:
    def test_slopes_are_those_of_the_machine(self, made: Results) -> None:
        powers = {"SSync cpu": "111", "SSync torch": "111", "dense": "221", "dense in windows of 2": "21"}
        for contender, said in powers.items():
            for (sweep, power), value in product(zip(SWEEPS, said, strict=False), ("step", "allocated")):
                assert slope_of(made, sweep, contender, value) == pytest.approx(int(power), abs=1e-3)

    def test_each_number_is_held_to_its_own_limit(self, made: Results) -> None:
        def verdicts(*rows: Row) -> dict[str, tuple[str, str, str]]:
            changed = made.rows | {row.key: row for row in rows}
            return {bar[0]: bar[1:] for bar in bars(Results(made.origin, changed))}

        before = verdicts()
        assert len(before) == 16
        # a microsecond a patch is 164 times less than 10 ns a pair at 16,384 patches
        missed = {claim: bar for claim, bar in before.items() if bar[2] != "met"}
        claim = "SSync cpu: faster than dense alignment at 16,384 patches"
        assert missed == {claim: ("≥ 1,000x", "164x", "**missed**")}
        assert {bar.verdict for bar in bars(Results(made.origin))} == {"**not measured**"}
        step = Key("kernels", STEP, "SSync cpu", (("B", kernels.BATCH), *MOVI_C))
        (first,) = (row.key for row in made.select("kernels", case=kernels.FIRST_USE))
        (share,) = (row.key for row in made.select("training_step", contender="SSync cpu" + TWO_THREADS))
        for key, value, worse, part, limit in (
            (step._replace(shape=(("B", 4), *MOVI_C)), "over_exp", spread(3.6), "4 clips", "≤ 3.5"),
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
        results = Results(origin(device="cuda", gpu="H", malloc={}, backends=["triton", "torch"]))
        key = Key("kernels", STEP, "SSync triton", (("B", 64), *MOVI_C), "float16")
        replay = key._replace(contender=key.contender + REPLAY)
        large = replay._replace(shape=(("B", 6000), *MOVI_C))
        results.add([Row(key, values={"launches": 10}), Row(replay, values={"step": spread(50e-6), "over_exp": 1.0})])
        results.add([Row(large, values={"step": spread(1e-3), "over_exp": 1.0, "over_floor": 1.4})])
        found = [(bar.measured[:8], bar.verdict) for bar in bars(results)[-3:]]
        assert found == [("10", "**missed**"), ("0.000050", "met"), ("1.40", "met")]
        assert "There is no" not in report.body({"cpu": Results(origin()), "h": results})

    def test_a_section_says_what_was_measured(self, made: Results, monkeypatch: pytest.MonkeyPatch) -> None:
        text = section(made, "abacus", "results/abacus.png")
        for part in (
            "## Results: abacus\n\nAbacus, 1 thread, torch Abacus, commit Abacus,",
            "`M_MMAP_MAX=0 ",
            "SSync cpu compiled, SSync torch compiled, 33 others.",
            "Of 16: 1 **missed**.",
            "| ≥ 1,000x: **missed** | 164x ",
            "![Time and memory of a step, and their slopes](results/abacus.png)",
            "| 4.1, 0.41 ",
            "takes 0.20% of the example's",
        ):
            assert part in text
        assert [f"\n| {one.name} " in text for one in ADD_ONS] == [one.shown for one in ADD_ONS]
        # a microsecond for each of 4,608 patches, and 0.1 for one of a frame
        assert re.search(r"\| slot_error +\| 0\.0576, 0\.00461 \(0\.0125x\) +\| 1\.00, 1\.00 ", text)
        some = section(measured(monkeypatch, quick=True, suites=("kernels",)), "x", "x.png")
        parts = [[part in one for part in ("### Steps", "### Linear", "**A rehearsal")] for one in (text, some)]
        assert parts == [[True, True, False], [True, False, True]]

    def test_the_command_writes_between_the_markers_draws_and_prints(
        self, made: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (start, end), readme, folder = report.MARKERS, tmp_path / "README.md", tmp_path / "results"
        readme.write_text(f"before\n{start}\ntyped by hand\n{end}\nafter\n")
        Results(made.origin, path=folder / "abacus.json").add(made.rows.values())
        arguments = ["--results", str(folder), "--readme", str(readme)]
        assert report.main(arguments) == 0
        body = report.body(report.load_all(folder))
        assert body.startswith("**There is no GPU result yet.**")
        assert readme.read_text() == f"before\n{start}\n{body}\n{end}\nafter\n"
        assert imread(folder / "abacus.png")[500:, 500:].std() > 0.05
        assert report.main([*arguments, "--rows", "kernels"]) == 0
        assert every_row(made, "kernels") in capsys.readouterr().out

    def test_the_committed_page_is_what_the_commands_make(self) -> None:
        text = PAGE.read_text()
        assert text == between(text, report.body(report.load_all(run.RESULTS)), "page", report.MARKERS)

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

    def test_the_digest_tells_code_apart_and_leaves_reports_out(self, tmp_path: Path) -> None:
        seen = []
        (tmp_path / "benchmarks").mkdir()
        for name, text in (("timing.py", "a = 1"), ("report.py", "b = 1"), ("timing.py", "a = 2"), ("engine.c", "")):
            (tmp_path / "benchmarks" / name).write_text(text)
            seen.append(run.sources_digest(tmp_path))
        assert (seen[0] == seen[1], len(set(seen))) == (True, 3)

    def test_a_rehearsal_does_not_touch_the_committed_results(self) -> None:
        here, there = (run.parse(one).out for one in ([], ["--quick"]))
        assert (here, there) == (run.RESULTS / "cpu.json", Path("runs/benchmarks/cpu.json"))

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
        machine.refused = {("gate", "SSync torch"): ("failed", "an error")}
        # all others are measured, then what failed is tried once more
        assert [1 < jobs("failed.json") < whole, jobs("failed.json")] == [True, 1]
