"""How the benchmarks measure: in turn, counted, in fresh processes, and only what is right."""

import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gate, slopes
from benchmarks.child import Worker
from benchmarks.contenders import CONTENDERS, DENSE, DENSE_CHUNKED, DENSE_WINDOWS, dense_loss, ssync_criterion
from benchmarks.counting import count
from benchmarks.inputs import moving_blobs
from benchmarks.memory import peak_memory
from benchmarks.results import Spread, values_from_json
from benchmarks.slot_video_model import PUBLISHED, Workload
from benchmarks.suites import kernels, linear_vs_quadratic, training_step
from benchmarks.timing import MAX_CALLS, Samples, interleave
from torch import Tensor

from benchmark_results import Machine, measured
from ssync_loss.functional import pseudo_labels
from ssync_loss.ssync.engines.cpu.team import address_of_team

SMALL = {"B": 2, "T": 4, "S": 4, "H": 4, "W": 6}


class FakeClock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def mark(self) -> float:
        return self.now

    def wait(self) -> None:
        return None

    def seconds(self, before: float, after: float) -> float:
        return after - before

    def work(self, name: str, *parts: float) -> Callable[[Callable[[], Any]], Sequence[float]]:
        def call(mark: Callable[[], Any]) -> list[float]:
            self.calls.append(name)
            marks = [mark()]
            for seconds in parts:
                self.now += seconds
                marks.append(mark())
            return marks

        return call


class TestTiming:
    def test_contenders_take_turns(self) -> None:
        clock = FakeClock()
        works = {name: clock.work(name, 1.0) for name in "abc"}
        samples = interleave(works, clock, budget=0.0)
        # warm-ups one after the other, then three rounds
        assert "".join(clock.calls) == "aabbcc" + 3 * "abc"
        assert [len(one.rounds) for one in samples.values()] == [3, 3, 3]

    def test_the_fast_get_more_calls_in_their_turn_and_the_slow_one_warm_up(self) -> None:
        clock = FakeClock()
        works = {"slow": clock.work("s", 5.0), "fast": clock.work("f", 0.001)}
        samples = interleave(works, clock, budget=0.0)
        assert "".join(clock.calls) == "s" + "ff" + 3 * ("s" + MAX_CALLS * "f")
        assert samples["slow"].whole().samples == 3
        assert samples["fast"].whole().samples == 3 * MAX_CALLS

    def test_the_budget_bounds_the_rounds(self) -> None:
        clock = FakeClock()
        interleave({"a": clock.work("a", 0.5)}, clock, budget=4.0)
        assert len(clock.calls) == 2 + 8
        clock.calls.clear()
        interleave({"a": clock.work("a", 0.5)}, clock, budget=1000.0, max_rounds=9)
        assert len(clock.calls) == 2 + 9

    def test_parts_and_the_whole(self) -> None:
        clock = FakeClock()
        values = interleave({"a": clock.work("a", 1.0, 2.0)}, clock, budget=0.0)["a"].values(("forward", "backward"))
        assert {name: value.median for name, value in values.items() if not isinstance(value, float | int)} == {
            "forward": 1.0,
            "backward": 2.0,
            "step": 3.0,
        }

    def test_ratios_are_formed_within_a_round(self) -> None:
        # the machine gets slower from round to round: no matter
        one, other = Samples([[[1.0]], [[10.0]], [[20.0]]]), Samples([[[4.0]], [[40.0]], [[80.0]]])
        ratio = other.over(one)
        assert (ratio.median, ratio.noise) == (4.0, 0.0)


class TestSlopes:
    @pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
    def test_known_powers_are_found(self, power: float) -> None:
        points = [(2**k, 3.0 * 2 ** (k * power)) for k in range(4, 12)]
        found = slopes.fit(points, start=32)
        assert found is not None
        assert found == slopes.Slope(power, 32, 2048, 7)
        assert found.enough

    def test_small_sizes_stay_out(self) -> None:
        # a constant cost that small sizes are nothing beside
        points = [(2**k, 1000.0 + 2**k) for k in range(20)]
        whole, late = slopes.fit(points), slopes.fit(points, start=2**14)
        assert whole is not None
        assert late is not None
        assert whole.exponent < 0.5
        assert 0.95 < late.exponent < 1.0

    def test_few_sizes_are_said_to_be_few(self) -> None:
        assert slopes.fit([(1, 1.0)]) is None
        found = slopes.fit([(1, 1.0), (2, 2.0)])
        assert found is not None
        assert not found.enough

    def test_predictions_go_by_the_last_two_sizes(self) -> None:
        assert slopes.predict([], 8) is None
        assert slopes.predict([(16, 1.0)], 8) is None
        assert slopes.predict([(2, 9.0), (4, 1.0), (8, 8.0), (64, 0.0)], 16) == 64.0
        # calls cost the same whatever the size: from here on it is taken to grow
        assert slopes.predict([(4, 1.0), (8, 1.0)], 16) == 2.0


class TestMemory:
    def test_bytes_are_counted_exactly(self) -> None:
        x = torch.ones(1000)

        def work() -> Tensor:
            y = x + x
            z = y * y
            del y
            return z + z

        peaks = [peak_memory(work, "cpu")["allocated"] for _ in range(2)]
        assert peaks == [8000, 8000]
        # with what is returned
        assert peak_memory(work, "cpu")["kept"] == 4000

    def test_the_system_sees_what_is_large(self) -> None:
        values = peak_memory(lambda: torch.ones(20_000_000), "cpu")
        assert values["allocated"] == 80_000_000
        assert 79_000_000 < values["resident"] < 120_000_000

    def test_a_step_of_dense_alignment_holds_its_scores(self) -> None:
        shape = {"B": 1, "T": 4, "S": 4, "H": 16, "W": 16}
        whole, chunked = (
            linear_vs_quadratic.measure_memory(name, shape, "cpu") for name in ("dense", "dense in windows of 2")
        )
        assert 2 * 4 * 1024**2 < whole["allocated"] < 3 * 4 * 1024**2
        assert 2 * 4 * 2 * 512**2 < chunked["allocated"] < 0.7 * whole["allocated"]


def test_operators_and_host_reads_are_counted() -> None:
    x = torch.ones(4)
    counts = count(lambda: (x + 1).view(2, 2).sum().item(), "cpu")
    assert counts == {"launches": 3, "host_reads": 1}


def test_a_training_step_on_an_accelerator_would_read_nothing() -> None:
    counts = kernels.count_all(SMALL, "float32", True, ["SSync torch"], "cpu")
    assert counts["step, mse / SSync torch"]["host_reads"] == 0
    assert counts["step, mse / SSync torch"]["launches"] > 20


class TestInputs:
    def test_blobs_are_redundant_and_leave_something_to_teach(self) -> None:
        enc, dec = moving_blobs({"B": 2, "T": 4, "S": 11, "H": 24, "W": 24})
        labels = pseudo_labels(enc, dec, merge_threshold=0.7)
        # 0 and 1, 3 and 4, .. sit on the same blobs
        for first in (0, 3, 6, 9):
            assert torch.equal(labels.representative[:, first], labels.representative[:, first + 1])
        assert labels.boundary.float().mean() > 0.05
        assert labels.interior.float().mean() > 0.05
        assert enc.requires_grad
        assert dec.requires_grad

    @pytest.mark.parametrize("slots", [1, 2, 3, 11])
    def test_any_number_of_slots(self, slots: int) -> None:
        assert moving_blobs({"B": 1, "T": 2, "S": slots, "H": 3, "W": 4})[0].shape == (1, 2, slots, 3, 4)


class TestGate:
    SHAPES = gate.SSYNC_SHAPES[:1]

    def check(self, loss: gate.Criterion, labels: gate.Labels) -> None:
        gate.check_ssync(loss, labels, shapes=self.SHAPES)

    def right(self) -> tuple[gate.Criterion, gate.Labels]:
        return ssync_criterion(CONTENDERS["SSync cpu"]), lambda enc, dec: pseudo_labels(enc, dec, merge_threshold=0.7)

    def test_what_is_right_passes(self) -> None:
        self.check(*self.right())

    def test_half_precision_passes(self) -> None:
        gate.check_ssync(*self.right(), dtype=torch.float16, shapes=self.SHAPES)

    def test_a_wrong_loss_is_refused(self) -> None:
        loss, labels = self.right()
        with pytest.raises(AssertionError):
            self.check(lambda enc, dec: loss(enc, dec) * 1.00001, labels)

    def test_a_wrong_gradient_is_refused(self) -> None:
        loss, labels = self.right()
        for wrong in (0, 1):
            with pytest.raises(AssertionError):
                # the value of the whole, and a gradient that is a little off in one of the maps
                self.check(lambda *maps, wrong=wrong: loss(*maps) + _only_gradient(maps[wrong]), labels)

    def test_a_wrong_label_is_refused(self) -> None:
        loss, labels = self.right()

        def off_by_one(enc: Tensor, dec: Tensor) -> Any:
            found = labels(enc, dec)
            dec_labels = found.dec_labels.clone()
            dec_labels[0, 0, 0, 0] += 1
            return found._replace(dec_labels=dec_labels)

        with pytest.raises(AssertionError, match="dec_labels differ in 1 place"):
            self.check(loss, off_by_one)

    @pytest.mark.parametrize("contender", [DENSE, DENSE_CHUNKED, *DENSE_WINDOWS], ids=lambda one: one.name)
    def test_dense_alignment_passes_and_can_fail(self, contender: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        assert gate.gate(contender.name, "float32", "cpu") == ""
        monkeypatch.setattr(gate, "dense_loss", lambda *given: dense_loss(*given) * 1.0001)
        assert "close" in gate.gate(contender.name, "float32", "cpu")

    def test_who_is_wrong_gets_no_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        results = measured(monkeypatch, Machine(wrong="SSync cpu"), quick=True)
        rows = [row for one in ("SSync cpu", "SSync cpu, 2 threads") for row in results.select(contender=one)]
        assert {row.status for row in rows} == {"wrong"}
        assert {row.note for row in rows} == {"the loss is another"}
        assert {row.status for row in results.select(contender="dense")} >= {"measured"}

    def test_a_loss_that_differs_at_size_gets_no_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = Machine(loss_of={"dense chunked": 1.001})
        results = measured(monkeypatch, machine, quick=True, suites=("linear_vs_quadratic",))
        rows = results.select(suite="linear_vs_quadratic", contender="dense chunked")
        # and there is nothing to predict larger sizes from: they are left alone
        assert {row.status for row in rows} == {"wrong"}
        notes = {row.note for row in rows}
        assert "the loss is 1.001, and 1 by dense" in notes
        assert "as at 256 patches: the loss is 1.001, and 1 by dense" in notes

    def test_backends_that_cannot_be_had_say_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert [gate.available(one, "cpu") for one in ("cpu", "torch")] == ["", ""]

        def missing(*_: Any, **__: Any) -> Any:
            raise RuntimeError("needs a CUDA tensor")

        monkeypatch.setattr(gate, "ssync_criterion", missing)
        assert gate.available("triton", "cpu") == "needs a CUDA tensor"


def _only_gradient(maps: Tensor) -> Tensor:
    """Return 0 with a small gradient."""
    return 1e-5 * (maps - maps.detach()).sum()


class TestSuites:
    def test_times_and_memory_of_a_size(self) -> None:
        times = linear_vs_quadratic.measure_times(["SSync torch", "dense", "dense chunked"], SMALL, "cpu", 0.0)
        assert list(times) == ["SSync torch", "dense", "dense chunked"]
        for one in map(values_from_json, times.values()):
            assert set(one) == {"forward", "backward", "step", "ratio"}
        memory = linear_vs_quadratic.measure_memory("SSync torch", SMALL, "cpu")
        # two gradients at least
        assert memory["allocated"] > 2 * 4 * math.prod(SMALL.values())
        assert 0 < memory["loss"] < 1

    def test_every_planned_operation_is_timed_and_counted(self) -> None:
        workload = kernels.Workload(SMALL, "float32", False)
        chosen = ["SSync cpu", "SSync torch"]
        names = {f"{case} / {name}" for case, name in kernels.names(workload, chosen, "cpu")}
        times = kernels.time_all(**workload._asdict(), contenders=chosen, device="cpu", budget=0.0)
        assert set(times) == names | {"copy / torch", "exp of both maps / torch"}
        threaded = {name for name in names if name.endswith("2 threads")}
        assert {name for name, values in times.items() if "speedup" in values} == threaded
        assert (len(names), len(threaded)) == (14, 2)
        counts = kernels.count_all(**workload._asdict(), contenders=chosen, device="cpu")
        assert set(counts) == names - threaded

    def test_what_waits_for_the_backward_are_the_gradients(self) -> None:
        given: dict[str, Any] = {**kernels.Workload(SMALL | {"H": 64, "W": 64}, "float32", False)._asdict()}
        held, plain = (
            kernels.measure_memory(**given, contender=name, device="cpu") for name in ("SSync cpu", "SSync torch")
        )
        assert 0 <= held["maps_waiting"] <= held["maps_beyond_gradients"] < 0.01
        assert plain["maps_beyond_gradients"] > 1

    def test_two_threads_are_there_inside_of_a_call_alone(self) -> None:
        seen: list[int] = []
        usual = torch.get_num_threads()
        torch.set_num_threads(1)
        work = kernels._on_two_threads(lambda mark: [mark(), mark()])
        work(lambda: seen.append(torch.get_num_threads()))
        seen.append(torch.get_num_threads())
        torch.set_num_threads(usual)
        assert seen == [2, 2, 1]

    def test_the_first_use_compiles(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compiler = tmp_path / "cc"
        # quick, and says that it was here
        compiler.write_text(f'#!/bin/bash\ntouch {tmp_path}/used\nexec cc "${{@/-O3/-O0}}"\n')
        compiler.chmod(0o700)
        monkeypatch.setenv("CC", str(compiler))
        (seconds,) = values_from_json(kernels.time_first_use(times=1)).values()
        assert isinstance(seconds, Spread)
        assert seconds.median > 0.1
        assert (tmp_path / "used").exists()
        compiler.write_text("#!/bin/bash\nexit 7\n")
        with pytest.raises(RuntimeError, match=r"`backend`='cpu' needs a C compiler that works: .* failed with 7"):
            kernels.time_first_use(times=1)

    def test_a_step_takes_its_passes_over_a_map(self) -> None:
        made = kernels.operations(kernels.Workload(SMALL, "float32", True), ["SSync torch"], "cpu")
        assert {one.num_bytes for one in made} == {9 * 4 * math.prod(SMALL.values())}

    @pytest.mark.parametrize("case", ["tiny", training_step.EXAMPLE])
    def test_the_share_of_a_step(self, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(PUBLISHED, "tiny", Workload(8, 2, 3, 4, 5, 6))
        shape = {"B": 2, "T": 2, "S": 3, "H": 4, "W": 5}
        given: dict[str, Any] = {"case": case, "shape": shape, "device": "cpu", "budget": 0.0}
        found = values_from_json(training_step.measure(contender="SSync cpu", **given))
        assert set(found) == {"without", "with", "alone", "share", "difference", "batch"}
        assert found["batch"] == 2
        tried = training_step.try_step("tiny", shape, "cpu")
        assert tried["bytes"] > 10_000
        assert tried["seconds"] > 0

    def test_the_batch_is_what_memory_and_time_allow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        results = measured(monkeypatch, suites=("training_step",))
        # a clip takes 3 s and a step may take 10
        row = results.select(suite="training_step", case="MOVi-C")[0]
        assert (row.number("batch"), row.id.sizes["B"]) == (2, 64)
        assert row.note == "2 of 64 clips: memory and time of this machine"
        assert results.select(suite="training_step", case=training_step.EXAMPLE)[0].number("batch") == 16


def process() -> int:
    """Say which process this is."""
    return os.getpid()


def fails(kind: str) -> None:
    """Fail in one of several ways."""
    if kind == "error":
        raise ValueError("as it was told to")
    if kind == "memory":
        torch.ones(1 << 30)
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(3)


def settings_of_malloc() -> str | None:
    """Return what the environment says."""
    return os.environ.get("MALLOC_MMAP_THRESHOLD_")


def has_a_team() -> bool:
    """Whether the CPU engine may use torch's threads here."""
    return address_of_team() is not None


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker({"MALLOC_MMAP_THRESHOLD_": "77777"}, device="cpu", threads=1, memory_cap=1 << 30)
    yield one
    one.close()


class TestWorker:
    def test_every_job_has_a_process_of_its_own(self, worker: Worker) -> None:
        outcomes = [worker.call("test_benchmarks_measure:process") for _ in range(2)]
        assert [one.status for one in outcomes] == ["measured"] * 2
        assert len({os.getpid(), *(one.value for one in outcomes)}) == 3
        assert worker.call("test_benchmarks_measure:settings_of_malloc").value == "77777"

    def test_alone_it_may_use_torchs_threads(self, worker: Worker) -> None:
        asked = [worker.call("test_benchmarks_measure:has_a_team", alone=alone).value for alone in (False, True)]
        assert asked == [False, True]

    @pytest.mark.parametrize(
        ("kind", "status", "note"),
        [
            ("error", "failed", "ValueError: as it was told to"),
            ("memory", "memory", "ran out of memory at the cap of 1.1 GB"),
            ("killed", "memory", "killed by the system, as when memory runs out"),
            ("code", "failed", "the process ended with code 3"),
        ],
    )
    @pytest.mark.parametrize("alone", [False, True])
    def test_a_job_that_fails_says_how_and_the_next_one_runs(
        self, kind: str, status: str, note: str, alone: bool, worker: Worker
    ) -> None:
        outcome = worker.call("test_benchmarks_measure:fails", kind=kind, alone=alone)
        assert (outcome.status, outcome.note) == (status, note)
        assert worker.call("test_benchmarks_measure:process").status == "measured"
