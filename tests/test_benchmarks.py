"""How the benchmarks measure: only what is right, in turn, counted, in fresh processes."""

import dataclasses
import math
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import add_ons as entries
from benchmarks import gate
from benchmarks.add_ons import ADD_ONS, BY_NAME, DENSE, Entry
from benchmarks.child import Limits, call
from benchmarks.contenders import COMPILED, TWO_THREADS, ssync_criterion
from benchmarks.counted import count, peak_memory
from benchmarks.inputs import Inputs, Step, moving_blobs
from benchmarks.results import Key, Spread
from benchmarks.slot_video_model import PUBLISHED
from benchmarks.suites import growth, kernels, training_step
from benchmarks.timing import MAX_CALLS, Clock, Samples, interleave
from torch import Tensor, nn

import ssync_loss
from benchmark_results import options
from ssync_loss import attention, curriculum, functional
from ssync_loss.functional import pseudo_labels
from ssync_loss.ssync.engines.cpu.team import address_of_team

SMALL = {"B": 2, "T": 4, "S": 3, "H": 8, "W": 12, "D": 8, "Kp": 16, "weights": 2 * 256**2}
MAPS = tuple((axis, SMALL[axis]) for axis in "BTSHW")
QUICK = options(quick=True)
# their definitions take seconds, or they have several outputs
SLOW = ("dense", "StructureAware", "SemanticConsistency", "AffinityConsistency", "SemanticAware")
FAST = [one for one in ADD_ONS if not one.name.startswith((*SLOW, "InstanceConsistencyLoss, P=8"))]


def named(one: Entry) -> str:
    return one.name


class FakeClock(Clock):
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls = ""

    def mark(self) -> float:
        return self.now

    def work(self, name: str, *parts: float) -> Callable[[Callable[[], Any]], list[float]]:
        def work(mark: Callable[[], Any]) -> list[float]:
            self.calls += name
            marks = [mark()]
            for seconds in parts:
                self.now += seconds
                marks.append(mark())
            return marks

        return work


class TestTiming:
    def test_contenders_take_turns_the_fast_several_and_the_slow_warm_up_once(self) -> None:
        clock = FakeClock()
        samples = interleave({name: clock.work(name, 1.0) for name in "abc"}, clock, 0.0)
        assert clock.calls == "aabbcc" + 3 * "abc"
        assert [len(one.rounds) for one in samples.values()] == [3, 3, 3]
        clock.calls = ""
        interleave({"s": clock.work("s", 5.0), "f": clock.work("f", 0.001)}, clock, 0.0)
        assert clock.calls == "s" + "ff" + 3 * ("s" + MAX_CALLS * "f")

    def test_the_budget_bounds_the_rounds(self) -> None:
        for budget, rounds in ((4.0, 8), (1000.0, 20)):
            clock = FakeClock()
            interleave({"a": clock.work("a", 0.5)}, clock, budget)
            assert len(clock.calls) == 2 + rounds

    def test_parts_the_whole_and_ratios_within_a_round(self) -> None:
        clock = FakeClock()
        values = interleave({"a": clock.work("a", 1.0, 2.0)}, clock, 0.0)["a"].values("forward", "backward")
        assert values == {"forward": Spread(1, 1, 1, 3), "backward": Spread(2, 2, 2, 3), "step": Spread(3, 3, 3, 3)}
        # the machine gets slower from round to round: no matter
        one, other = Samples([[[1.0]], [[10.0]], [[20.0]]]), Samples([[[4.0]], [[40.0]], [[80.0]]])
        assert other.over(one, 2.0) == Spread(8.0, 8.0, 8.0, 3)

    def test_a_step_marks_its_parts_and_accumulates_nothing(self) -> None:
        leaf = torch.ones(3, requires_grad=True)
        seen: list[Any] = []
        leaf.register_hook(seen.append)
        given = (lambda: leaf * 2, lambda: leaf, [leaf], (torch.full((3,), 5.0),))
        step = Step(*given, before=lambda: seen.append("before"))
        assert step.work(lambda: len(seen)) == [1, 1, 2]
        assert seen[1].tolist() == [10.0] * 3
        assert leaf.grad is None


class TestGrowth:
    def test_small_sizes_measure_the_calling(self) -> None:
        points = [(2**k, 1000.0 + 2**k) for k in range(20)]
        whole, late = growth.fit(points), growth.fit(points[14:])
        assert whole is not None
        assert late is not None
        assert whole.exponent < 0.5
        assert 0.95 < late.exponent < 1.0
        assert not growth.fit(points[:2]).enough  # type: ignore[union-attr]
        assert growth.fit(points[:1]) is None

    def test_predictions_go_by_the_last_two_sizes(self) -> None:
        assert growth.predict([(16, 1.0)], 8) is None
        assert growth.predict([(2, 9.0), (4, 1.0), (8, 8.0), (64, 0.0)], 16) == 64.0
        # calls cost the same whatever the size: from here on it is taken to grow
        assert growth.predict([(4, 1.0), (8, 1.0)], 16) == 2.0

    @pytest.mark.parametrize("axis", growth.UNITS)
    def test_everyone_is_timed(self, axis: str) -> None:
        names = ["SSync cpu", *(one.name for one in ADD_ONS if one.axis == axis), *DENSE]
        keys = [Key("add_ons", axis, name, tuple(SMALL.items())) for name in names]
        for key, values in zip(keys, growth.times(keys, QUICK), strict=True):
            parts = growth.step_of(key.contender, Inputs(SMALL)).parts
            assert set(values) == {"step", "ratio", *parts}

    def test_memory_is_that_of_a_step(self) -> None:
        def held(name: str) -> Any:
            (values,) = growth.memory([Key("add_ons", "H*W", name, tuple(SMALL.items()))], QUICK)
            return values

        kernel = 2 * 96**2 * 4
        pairs, at_once, pooled = (
            held(f"SemanticConsistencyLoss, {form}")["allocated"]
            for form in ("pair by pair", "all pairs at once", "pooled 2x2")
        )
        # the kernel of a pair, or those of six, and what is linear
        assert kernel < pairs < 3 * kernel
        assert 6 * kernel < at_once < 12 * kernel
        assert pooled < kernel
        assert held("SlotCurriculum, elsewhere")["allocated"] == 0
        # the scores of dense alignment
        assert 2 * 4 * 2 * 384**2 < held("dense")["allocated"] < 3 * 4 * 2 * 384**2
        assert 0 < held("SSync torch")["loss"] < 1
        assert "loss" not in held("CorrelationFusion") | held("sinkhorn")


class TestCounted:
    def test_bytes_are_counted_exactly(self) -> None:
        x = torch.ones(1000)

        def work() -> Tensor:
            y = x + x
            z = y * y
            del y
            return z + z

        for _ in range(2):
            values = peak_memory(work, "cpu")
            # the last with what is returned
            assert (values["allocated"], values["kept"]) == (8000, 4000)
        assert 79_000_000 < peak_memory(lambda: torch.ones(20_000_000), "cpu")["resident"] < 120_000_000

    def test_operators_and_host_reads_are_counted(self) -> None:
        x = torch.ones(4)
        assert count(lambda: (x + 1).view(2, 2).sum().item(), "cpu") == {"launches": 3, "host_reads": 1}
        (values,) = kernels.counts([Key("kernels", "step, mse", "SSync torch", MAPS)], QUICK)
        assert values["host_reads"] == 0
        assert float(values["launches"]) > 20  # type: ignore[arg-type]

    def test_what_waits_for_the_backward_are_the_gradients(self) -> None:
        shape = tuple((SMALL | {"H": 64, "W": 64}).items())[:5]
        (held,), (plain,) = (
            kernels.memory([Key("kernels", "step, mse", name, shape)], QUICK) for name in ("SSync cpu", "SSync torch")
        )
        assert 0 <= held["maps_waiting"] <= held["maps_beyond_gradients"] < 0.01  # type: ignore[operator]
        assert plain["maps_beyond_gradients"] > 1  # type: ignore[operator]


class TestInputs:
    def test_blobs_are_redundant_and_leave_something_to_teach(self) -> None:
        enc, dec = moving_blobs({"B": 2, "T": 4, "S": 11, "H": 24, "W": 24})
        labels = pseudo_labels(enc, dec, merge_threshold=0.7)
        # 0 and 1, 3 and 4, .. sit on the same blobs
        for first in (0, 3, 6, 9):
            assert torch.equal(labels.representative[:, first], labels.representative[:, first + 1])
        assert labels.boundary.float().mean() > 0.05
        assert labels.interior.float().mean() > 0.05
        inputs = Inputs(SMALL)
        assert inputs.maps[0] is inputs.maps[0]
        assert [one.requires_grad for one in inputs.features] == [True, True, False, False, False]


class TestEntries:
    def test_every_public_loss_and_part_has_one(self) -> None:
        measured = {one.of for one in ADD_ONS}
        modules = {name for name in ssync_loss.__all__ if _is_module(getattr(ssync_loss, name))}
        ours = {"SSyncLoss", "AdaptiveSSyncLoss", "BoundaryRefinementLoss", "InteriorDenoisingLoss"}
        ours |= {"boundary_region", "interior_region", "merge_slots", "neighbor_difference", "pseudo_labels"}
        ours |= {"selective_distillation_loss", "slot_overlap"}
        # a suite of their own; at a milestone, and inside of a longer one
        others = {"DenseDecoderAlignmentLoss", "DenseEncoderAlignmentLoss", "SemanticSlots", "propagate_masks"}
        others |= set(curriculum.__all__) - {"slot_error", "SlotCurriculum"}
        functions = {name for name in functional.__all__ if not name.endswith("_loss")}
        parts = {*modules, *functions, *attention.__all__, "EmaTeacher", "SlotCurriculum"}
        assert measured >= parts - ours - others
        assert measured.isdisjoint(ours | others)

    @pytest.mark.parametrize("one", [one for one in ADD_ONS if one.of != "a"], ids=named)
    def test_measures_what_it_is_named_after(self, one: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
        class AskedError(Exception):
            pass

        def ask(*_: Any, **__: Any) -> Any:
            raise AskedError

        monkeypatch.setattr(entries, one.of, ask)
        with pytest.raises(AskedError):
            growth.step_of(one.name, Inputs(SMALL)).forward()

    def test_a_cyclic_scan_takes_almost_twice_the_steps(self) -> None:
        names = ("a scan of some step", "cyclic_scan of the same step")
        forth, cyclic = (count(growth.step_of(one, Inputs(SMALL)).forward, "cpu")["launches"] for one in names)
        # beside the steps, one output is stacked, and two are
        assert (cyclic - 2) * 4 == (forth - 1) * 7


def _is_module(one: object) -> bool:
    return isinstance(one, type) and issubclass(one, nn.Module)


class TestGate:
    @pytest.mark.parametrize("name", [*BY_NAME, "SSync cpu", "SSync torch"])
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_all_agree_with_their_definitions(self, name: str, dtype: str) -> None:
        if dtype == "float32" or name.startswith("SSync"):
            assert gate.check([Key("gate", gate.CASE, name, MAPS, dtype)], QUICK) == [{}]

    @pytest.mark.parametrize("fault", ["value", "first gradient", "last gradient"])
    @pytest.mark.parametrize("one", [*FAST, BY_NAME["dense chunked"]], ids=named)
    def test_what_is_wrong_is_refused(self, one: Entry, fault: str) -> None:
        def make(inputs: Inputs, **settings: Any) -> Step:
            right = one.make(inputs, **settings)
            if fault == "value":
                return dataclasses.replace(right, seen=lambda outputs: _off(right.seen(outputs)))
            # the value of the whole, and a gradient that is a little off in one of the leaves
            leaf = right.leaves[-(fault == "last gradient")]
            return dataclasses.replace(right, forward=lambda: right.forward() + (leaf - leaf.detach()).sum())

        if fault == "value" or one.make(Inputs(SMALL), **one.settings).leaves:
            with pytest.raises(AssertionError):
                gate.check_entry(dataclasses.replace(one, make=make))

    def test_ssync_that_is_wrong_is_refused(self) -> None:
        loss, shapes = ssync_criterion("SSync cpu"), gate.SSYNC_SHAPES[:1]

        def labels(enc: Tensor, dec: Tensor, wrong: int = 0) -> Any:
            found = pseudo_labels(enc, dec, merge_threshold=0.7)
            dec_labels = found.dec_labels.clone()
            dec_labels[0, 0, 0, 0] += wrong
            return found._replace(dec_labels=dec_labels)

        gate.check_ssync(loss, labels, shapes=shapes)
        with pytest.raises(AssertionError, match="dec_labels differ in 1 place"):
            gate.check_ssync(loss, lambda enc, dec: labels(enc, dec, 1), shapes=shapes)
        with pytest.raises(AssertionError):
            gate.check_ssync(lambda *maps: loss(*maps) * 1.00001, labels, shapes=shapes)
        for wrong in (0, 1):
            with pytest.raises(AssertionError):
                gate.check_ssync(
                    lambda *maps, wrong=wrong: loss(*maps) + 1e-5 * (maps[wrong] - maps[wrong].detach()).sum(),
                    labels,
                    shapes=shapes,
                )

    def test_backends_that_cannot_be_had_say_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert gate.available("SSync cpu", "cpu") == ""

        def missing(*_: Any, **__: Any) -> Any:
            raise RuntimeError("needs a CUDA tensor")

        monkeypatch.setattr(gate, "ssync_criterion", missing)
        assert gate.available("SSync triton", "cpu") == "needs a CUDA tensor"


def _off(outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return (_off(outputs[0]), *outputs[1:])
    return outputs * 1.001 if outputs.is_floating_point() else outputs + 1


class TestSuites:
    def test_every_operation_is_timed(self) -> None:
        keys = [
            Key("kernels", case, name, MAPS) for case, name in kernels.names(SMALL, ["SSync cpu", "SSync torch"], "cpu")
        ]
        assert not any(key.contender.endswith(COMPILED) for key in keys)
        times = kernels.times(
            [keys[0]._replace(case=one, contender="torch") for one in ("copy", kernels.EXP)] + keys, QUICK
        )
        assert (len(keys), len(times)) == (14, 16)
        for key, values in zip(keys, times[2:], strict=True):
            assert {"step", "over_floor", "over_exp", "bytes"} <= set(values)
            assert ("speedup" in values) == key.contender.endswith(TWO_THREADS)
            assert key.case != "step, mse" or values["bytes"] == 9 * 4 * math.prod(size for _, size in MAPS)

    def test_two_threads_are_there_inside_of_a_call_alone(self) -> None:
        seen: list[int] = []
        work = kernels.on_two_threads(lambda mark: [mark(), mark()])
        work(lambda: seen.append(torch.get_num_threads()))
        assert [*seen, torch.get_num_threads()] == [2, 2, 1]

    def test_the_first_use_compiles(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compiler = tmp_path / "cc"
        # quick, and says that it was here
        compiler.write_text(f'#!/bin/bash\ntouch {tmp_path}/used\nexec cc "${{@/-O3/-O0}}"\n')
        compiler.chmod(0o700)
        monkeypatch.setenv("CC", str(compiler))
        key = Key("kernels", kernels.FIRST_USE, "SSync cpu", MAPS)
        ((_, seconds),) = kernels.first_use([key], QUICK)[0].items()
        assert isinstance(seconds, Spread)
        assert seconds.median > 0.1
        assert (tmp_path / "used").exists()
        compiler.write_text("#!/bin/bash\nexit 7\n")
        with pytest.raises(RuntimeError, match=r"`backend`='cpu' needs a C compiler that works: .* failed with 7"):
            kernels.first_use([key], QUICK)

    def test_the_share_of_a_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(PUBLISHED, "tiny", {"D": 6})
        for case in ("tiny", training_step.EXAMPLE):
            (values,) = training_step.share([Key("training_step", case, "SSync cpu", MAPS)], QUICK)
            assert set(values) == {"without", "with", "alone", "share", "difference", "batch"}
            assert values["batch"] == 2

    def test_the_batch_is_what_memory_and_time_allow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # a clip takes 3 s and a step may take 10
        monkeypatch.setattr(training_step, "one_clip", lambda *_: (3.0, 100_000_000))
        key = Key("training_step", "MOVi-C", "SSync cpu", (("B", 64), *MAPS[1:]))
        assert training_step.affordable(key, options()) == 2
        assert training_step.affordable(key, options(time_cap=1000.0, memory_cap=500_000_000)) == 4
        assert training_step.affordable(key._replace(case=training_step.EXAMPLE), options()) == 64


def process() -> tuple[int, int, int]:
    """Say which process this is, how many threads it has, and how many faults memory takes in the long run."""
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(20_000_000)
    return os.getpid(), torch.get_num_threads(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def has_a_team() -> bool:
    """Whether the CPU engine may use torch's threads here."""
    return address_of_team() is not None


def fails(kind: str) -> None:
    """Fail in one of several ways."""
    if kind == "error":
        raise ValueError("as it was told to")
    assert kind != "disagrees", "it disagrees"
    if kind == "memory":
        torch.ones(1 << 30)
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(3)


class TestChild:
    def test_every_call_has_a_process_of_its_own_and_a_malloc_that_keeps_memory_if_told_to(self) -> None:
        usual, raised = (call(process, limits=Limits(raised=one, threads=1 + one)).value for one in (False, True))
        assert len({os.getpid(), usual[0], raised[0]}) == 3
        assert (usual[1], raised[1]) == (1, 2)
        assert raised[2] < 100 < usual[2]

    def test_alone_it_may_use_torchs_threads(self) -> None:
        assert call(has_a_team, limits=Limits(alone=True)).value is True

    @pytest.mark.parametrize(
        ("kind", "status", "note"),
        [
            ("error", "failed", "ValueError: as it was told to"),
            ("disagrees", "wrong", "it disagrees"),
            ("memory", "memory", "ran out of memory at the cap of 1.0 GB"),
            ("killed", "memory", "killed by the system, as when memory runs out"),
            ("code", "failed", "the process ended with code 3"),
        ],
    )
    def test_a_call_that_fails_says_how(self, kind: str, status: str, note: str) -> None:
        outcome = call(fails, kind, limits=Limits(memory=1_000_000_000))
        assert outcome.status == status
        assert note in outcome.note
