"""The command, its plan, and the tables that are made of results."""

import doctest
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmarks import report, run, slopes
from benchmarks import results as results_module
from benchmarks.bars import Bar, bars, movi_c_steps, slope_of
from benchmarks.child import Outcome, Worker
from benchmarks.contenders import DENSE, DENSE_CHUNKED, DENSE_WINDOWS, TWO_THREADS, ssync_contender
from benchmarks.results import Results, Row, RowId
from benchmarks.session import Options
from benchmarks.suites import add_ons, kernels, linear_vs_quadratic, training_step
from benchmarks.suites.linear_vs_quadratic import num_patches
from benchmarks.tables import section
from matplotlib.image import imread

from benchmark_results import ENVIRONMENT, Machine, fresh, measured, options, spread

ROOT = Path(__file__).parents[1]
SSYNC, PLAIN = ssync_contender("cpu"), ssync_contender("torch")
ON_GPU = options(device="cuda", backends=("triton", "torch"))


@pytest.fixture(scope="module")
def made() -> Results:
    """What a machine gives on which SSync is exactly linear and dense alignment exactly quadratic."""
    with pytest.MonkeyPatch.context() as patch:
        return measured(patch)


@pytest.mark.parametrize("module", [results_module, slopes, add_ons], ids=lambda module: module.__name__)
def test_examples_in_docstrings_hold(module: ModuleType) -> None:
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0


class TestPlan:
    @pytest.mark.parametrize("chosen", [options(), options(quick=True), ON_GPU])
    def test_covers_every_suite_with_rows_of_their_own(self, chosen: Options) -> None:
        rows = [row for task in run.plan(chosen) for row in task.rows]
        assert {row.suite for row in rows} == {"gate", *run.SUITES}
        assert len(set(rows)) == len(rows)

    def test_every_contender_passes_the_gate_first(self) -> None:
        rows = [row for task in run.plan(options()) for row in task.rows]
        gated = {row.contender for row in rows if row.suite == "gate"}
        last = max(i for i, row in enumerate(rows) if row.suite == "gate")
        assert all(row.suite == "gate" for row in rows[: last + 1])
        assert {row.contender.removesuffix(TWO_THREADS) for row in rows[last + 1 :]} <= gated | {"torch"}

    def test_a_rehearsal_is_a_part_of_everything(self) -> None:
        quick, whole = (
            {(row.suite, row.case) for task in run.plan(options(quick=flag)) for row in task.rows}
            for flag in (True, False)
        )
        assert quick < whole
        assert {suite for suite, _ in quick} == {suite for suite, _ in whole}

    def test_sizes_go_from_256_to_a_million_patches_in_one_clip(self) -> None:
        spatial, temporal, clips = linear_vs_quadratic.sweeps(options())
        sizes = [num_patches(shape) for shape in spatial.shapes]
        assert (min(sizes), max(sizes)) == (256, 1_048_576)
        assert {shape["B"] for shape in spatial.shapes + temporal.shapes} == {1}
        for sweep, axes in ((spatial, "HW"), (temporal, "T"), (clips, "B")):
            changing = {axis for axis in "BTSHW" if len({shape[axis] for shape in sweep.shapes}) > 1}
            assert changing == set(axes)

    def test_a_suite_alone(self) -> None:
        rows = [row for task in run.plan(options(suites=("training_step",))) for row in task.rows]
        assert {row.suite for row in rows} == {"gate", "training_step"}


class TestStops:
    def test_what_would_take_too_long_is_not_run_and_says_so(self, made: Results) -> None:
        # 10 ns a pair: 10.7 s at 32,768 patches
        rows = {
            num_patches(row.id.sizes): row
            for row in made.select(suite="linear_vs_quadratic", case="H*W", contender="dense", measure="time")
        }
        assert [rows[size].status for size in (16_384, 32_768, 1_048_576)] == ["measured", "time", "time"]
        note = "a step should take 10.7 s after 2.68 s at 16,384 patches; the cap is 10 s"
        assert rows[32_768].note == note

    def test_what_would_take_too_much_is_not_run_and_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        results = measured(monkeypatch, suites=("linear_vs_quadratic",), time_cap=1e9, memory_cap=5_000_000_000)
        for measure in ("memory", "time"):
            rows = {
                num_patches(row.id.sizes): row for row in results.select(case="H*W", contender="dense", measure=measure)
            }
            assert [rows[size].status for size in (16_384, 32_768)] == ["measured", "memory"]
            note = "a step should take 17.2 GB after 4.29 GB at 16,384 patches; the cap is 5 GB"
            assert rows[32_768].note == note
        chunked = results.select(case="H*W", contender="dense chunked", measure="memory")
        assert max(num_patches(row.id.sizes) for row in chunked if row.status == "measured") == 262_144

    def test_what_runs_out_of_memory_has_neither_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Small(Machine):
            def call(self, function: str, **arguments: Any) -> Outcome:
                if arguments.get("contender") == "dense" and function.endswith(":measure_memory"):
                    return Outcome("memory", "ran out", None)
                return super().call(function, **arguments)

        results = measured(monkeypatch, Small(), quick=True, suites=("linear_vs_quadratic",))
        rows = results.select(suite="linear_vs_quadratic", contender="dense")
        assert {row.status for row in rows} == {"memory"}
        assert {row.note for row in rows} == {
            "ran out",
            "as at 256 patches: ran out",
            "as at 1,024 patches: ran out",
        }


class TestBars:
    def test_slopes_are_those_of_the_machine(self, made: Results) -> None:
        for contender, sweep, power in (
            (SSYNC, "H*W", 1.0),
            (SSYNC, "T", 1.0),
            (SSYNC, "B", 1.0),
            (PLAIN, "H*W", 1.0),
            (DENSE, "H*W", 2.0),
            (DENSE, "T", 2.0),
            (DENSE, "B", 1.0),
            (DENSE_WINDOWS[0], "H*W", 2.0),
            (DENSE_WINDOWS[0], "T", 1.0),
        ):
            for measure in ("time", "memory"):
                slope = slope_of(made, sweep, contender, measure)
                assert slope is not None
                assert slope.exponent == pytest.approx(power, abs=1e-3)
                assert slope.enough
        chunked = slope_of(made, "H*W", DENSE_CHUNKED, "memory")
        assert chunked is not None
        assert chunked.exponent == pytest.approx(1.0, abs=1e-3)

    def test_all_are_met_where_all_is_well_but_what_is_not(self, made: Results) -> None:
        missed = [bar for bar in bars(made) if bar.verdict != "met"]
        # a microsecond a patch is 164 times less than 10 ns a pair at 16,384 patches
        assert missed == [
            Bar("SSync cpu: faster than full dense alignment at 16,384 patches", "≥ 1,000x", "164x", "**missed**")
        ]
        # of plain torch, linearity alone
        claims = [bar.claim for bar in bars(made)]
        assert sum("SSync cpu" in claim for claim in claims) == 18
        assert [claim for claim in claims if "cpu" not in claim] == [
            f"SSync torch: slope of {measure} in {axis}" for axis in ("H·W", "T", "B") for measure in ("time", "memory")
        ]

    def test_each_number_is_held_to_its_own_limit(self, made: Results) -> None:
        def verdicts(rows: dict[RowId, Row]) -> dict[str, tuple[str, str, str]]:
            return {bar[0]: bar[1:] for bar in bars(Results(made.environment, made.settings, made.rows | rows))}

        (small, large), (threaded,) = movi_c_steps(made).values(), [movi_c_steps(made, suffix=TWO_THREADS)[64]]
        waiting = movi_c_steps(made, "memory")[64]
        (first,) = made.select(case=kernels.FIRST_USE)
        (share,) = made.select(case=training_step.EXAMPLE, contender=SSYNC.name + TWO_THREADS)
        for row, value, worse, part, limit in (
            (small, "over_exp", 3.6, "4 clips", "≤ 3.5"),
            (large, "over_exp", 3.3, "64 clips", "≤ 3.2"),
            (threaded, "speedup", 1.6, "two threads", "≥ 1.70x"),
            (waiting, "maps_waiting", 0.2, "wait for the backward", "≤ 0.10"),
            (first, "step", 3.1, "first use", "≤ 3.0 s"),
            (share, "share", 0.011, "2 threads: share", "< 1.00%"),
        ):
            slower = replace(row, values={**row.values, value: worse if value == "maps_waiting" else spread(worse)})
            found, before = verdicts({row.id: slower}), verdicts({})
            ((claim, (bound, _, verdict)),) = found.items() - before.items()
            assert part in claim
            assert (bound, verdict, before[claim][2]) == (limit, "**missed**", "met")

    def test_nothing_measured_is_nothing_met(self) -> None:
        verdicts = {bar.verdict for bar in bars(fresh(options()))}
        assert verdicts == {"not measured"}

    def test_a_slope_over_few_sizes_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = bars(measured(monkeypatch, quick=True, suites=("linear_vs_quadratic",)))
        assert {bar.verdict for bar in found if "slope" in bar.claim} == {"not measured"}
        assert "met" in {bar.verdict for bar in found}

    def test_a_gpu_is_held_against_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        results = fresh(ON_GPU)
        results.environment |= {"device": "cuda", "gpu": "H", "cuda": "13"}
        shape = {"B": 64, "T": 4, "S": 11, "H": 24, "W": 24}
        large = shape | {"B": 6000}
        name, replay = "SSync triton", "SSync triton, graph replay"

        def row(contender: str, measure: str, shape: dict[str, int], **values: Any) -> Row:
            return Row(RowId.of("kernels", "step, mse", contender, measure, shape, "float16"), "measured", "", values)

        results.add(
            [
                row(name, "counts", shape, launches=10, host_reads=0),
                row(replay, "time", shape, step=spread(50e-6), over_floor=spread(9.0)),
                row(replay, "time", large, step=spread(1e-3), over_floor=spread(1.4)),
            ]
        )
        found = {bar.claim: (bar.measured, bar.verdict) for bar in bars(results)}
        assert found["SSync triton: launches of a step"] == ("10", "**missed**")
        assert found["SSync triton: µs of a replayed step, MOVi-C, 64 clips, float16"] == ("50", "met")
        assert found["SSync triton: replayed step over its bandwidth floor, large maps"] == ("1.40", "met")
        assert not any("torch.exp" in claim for claim in found)


class TestReport:
    def test_says_what_was_measured(self, made: Results) -> None:
        text = section(made, "abacus", "results/abacus.png")
        for part in (
            "## Results: abacus",
            "Abacus, 2 cores, 16 GB, 1 thread; Linux; Python 3.11, torch 2.13; commit abcdef0123,",
            "`MALLOC_MMAP_THRESHOLD_=",
            "SSync cpu, SSync torch, dense, dense chunked, ",
            "dense in windows of 4, SSync cpu compiled, SSync torch compiled, ",
            "| SSync cpu: slope of time in H·W",
            "| the example, T=4, S=9, 12x12 | SSync cpu, 2 threads ",
            "| step, mse                    | SSync cpu, 2 threads ",
            "| first use, compiler included | SSync cpu  ",
            "![Time and memory of a step, and their slopes](results/abacus.png)",
            "- dense, H·W, at 32,768 patches, for time: a step should take 10.7 s",
            "2 of 64",
            "**0.20%**",
            "copy of 128 MB in the same run (20 to 20 GB/s)",
            "### Weak spots",
        ):
            assert part in text
        row = next(line for line in text.splitlines() if line.startswith("| 16,384 "))
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert cells[:4] == ["16,384", "16.4", "16.4 (1x)", "2,684 (164x)"]
        assert "rehearsal" not in text

    def test_a_rehearsal_says_that_it_is_one(self) -> None:
        assert "**A rehearsal (`--quick`)" in section(fresh(options(quick=True)), "x", "x.png")

    @pytest.mark.parametrize("changes", [{"quick": True}, {"suites": ("kernels",)}])
    def test_parts_that_are_missing_are_left_out(self, changes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        text = section(measured(monkeypatch, **changes), "x", "x.png")
        assert "### Operations" in text
        assert ("### Linear against" in text) == ("quick" in changes)

    def test_the_command_writes_between_the_markers_and_draws(
        self, made: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        readme, folder = tmp_path / "README.md", tmp_path / "results"
        readme.write_text(f"before\n{report.START}\ntyped by hand\n{report.END}\nafter\n")
        Results(made.environment, made.settings, path=folder / "abacus.json").add(made.rows.values())
        assert report.main(["--results", str(folder), "--readme", str(readme)]) == 0
        text = readme.read_text()
        assert text.startswith(f"before\n{report.START}\n**There is no GPU result yet.**")
        assert text.endswith(f"{report.END}\nafter\n")
        assert "typed by hand" not in text
        assert report.between_markers(text, report.body(report.load_all(folder)), "page") == text
        assert "abacus" in capsys.readouterr().out
        picture = imread(folder / "abacus.png")
        assert min(picture.shape[:2]) > 500
        assert picture.std() > 0.05

    def test_a_gpu_result_takes_the_sentence_away(self, made: Results) -> None:
        gpu = Results({**ENVIRONMENT, "device": "cuda", "gpu": "H", "cuda": "13"}, made.settings)
        assert "There is no GPU result yet" in report.body({"cpu": made})
        assert "There is no" not in report.body({"cpu": made, "h": gpu})

    @pytest.mark.parametrize("text", ["", report.START, f"{report.END}\n{report.START}\n{report.START}"])
    def test_a_page_without_markers_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"page must have one line '<!-- results"):
            report.between_markers(text, "x", "page")


class TestCommittedPage:
    README = ROOT / "benchmarks" / "README.md"

    def test_is_what_the_command_makes_of_the_committed_results(self) -> None:
        text = self.README.read_text()
        assert text == report.between_markers(
            text, report.body(report.load_all(self.README.parent / "results")), "page"
        )

    def test_links_lead_somewhere(self) -> None:
        for target in re.findall(r"\]\(([^)#]+)\)", self.README.read_text()):
            assert (self.README.parent / target).exists(), target


class TestCommand:
    def test_a_rehearsal_does_not_touch_the_committed_results(self) -> None:
        assert run.parse(["--quick"]).out == Path("runs/benchmarks/cpu.json")
        assert run.parse([]).out == ROOT / "benchmarks" / "results" / "cpu.json"

    @pytest.fixture
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> Machine:
        one = Machine()
        monkeypatch.setattr(Worker, "call", lambda _, function, **arguments: one.call(function, **arguments))
        monkeypatch.setattr(Worker, "start", lambda _: None)
        monkeypatch.setattr("examples.arguments.num_cpus", lambda: 2)
        return one

    def test_a_backend_that_was_asked_for_and_cannot_be_had(self, machine: Machine, tmp_path: Path) -> None:
        out = tmp_path / "out.json"
        with pytest.raises(SystemExit, match="error: --backend triton cannot be had on cpu: it is not there"):
            run.main(["--backend", "triton", "--out", str(out)])
        assert not out.exists()

    def test_measures_what_is_missing_and_nothing_twice(
        self, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out.json"
        arguments = ["--quick", "--out", str(out)]
        assert run.main([*arguments, "--suite", "kernels"]) == 0
        assert {row.id.suite for row in Results.load(out).rows.values()} == {"gate", "kernels"}
        assert run.main(arguments) == 0
        assert {row.id.suite for row in Results.load(out).rows.values()} == {"gate", *run.SUITES}
        machine.asked.clear()
        assert run.main(arguments) == 0
        assert set(machine.asked) == {"benchmarks.gate:available"}
        assert str(out) in capsys.readouterr().out

    def test_ctrl_c_keeps_every_row(self, machine: Machine, tmp_path: Path) -> None:
        out = tmp_path / "out.json"
        arguments = ["--quick", "--suite", "linear_vs_quadratic", "--out", str(out)]
        machine.stop_at = 25
        assert run.main(arguments) == 130
        kept = Results.load(out).rows
        assert len(kept) > 10
        assert run.main(arguments) == 0
        assert Results.load(out).rows.items() > kept.items()

    def test_restarting_measures_anew(self, machine: Machine, tmp_path: Path) -> None:
        out = tmp_path / "out.json"
        arguments = ["--quick", "--suite", "training_step", "--out", str(out)]
        assert run.main(arguments) == 0
        with pytest.raises(SystemExit, match=r"error: .* was measured with `threads` = 1, and now it is 2"):
            run.main([*arguments, "--threads", "2"])
        assert run.main([*arguments, "--threads", "2", "--restart"]) == 0
        assert Results.load(out).settings["threads"] == 2
