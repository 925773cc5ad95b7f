"""How the benchmarks measure: only what is right, in turn, counted, in fresh processes."""

import dataclasses
import os
import re
import resource
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gate, measure
from benchmarks.add_ons import ADD_ONS, BY_NAME, DENSE
from benchmarks.child import Limits, call
from benchmarks.contenders import COPY, EXP, MERGE_THRESHOLD, STEP, TWO_THREADS, step_of
from benchmarks.counted import count, peak_memory
from benchmarks.inputs import Inputs, Step, moving_blobs
from benchmarks.results import Key, Row, Spread
from benchmarks.slot_video_model import PUBLISHED
from benchmarks.suites import growth, kernels, training_step
from benchmarks.timing import MAX_CALLS, Work, interleave, over
from torch import Tensor, nn

import ssync_loss
from benchmark_results import options
from ssync_loss import attention, curriculum, functional
from ssync_loss.functional import pseudo_labels
from ssync_loss.ssync.engines.cpu.team import address_of_team
from ssync_loss.testing import decidable_clips

SMALL = {"B": 2, "T": 4, "S": 3, "H": 8, "W": 12, "D": 8, "Kp": 16, "weights": 2 * 256**2}
MAPS = tuple((axis, SMALL[axis]) for axis in "BTSHW")
QUICK = options(quick=True)
# their definitions take seconds, or they have several outputs
SLOW = ("StructureAware", "SemanticConsistency", "AffinityConsistency", "SemanticAware", "InstanceConsistencyLoss, P=8")


def key_of(contender: str, suite: str = "add_ons", case: str = "H*W") -> Key:
    return Key(suite, case, contender, MAPS if suite == "kernels" else tuple(SMALL.items()))


def memory_of(contender: str, *where: str) -> Any:
    (values,) = measure.memory([key_of(contender, *where)], QUICK)
    return values


class TestTiming:
    def test_contenders_take_turns_the_fast_several_and_the_slow_warm_up_once(self) -> None:
        now, calls = 0.0, ""

        def work(name: str, seconds: float, before: float = 0.0) -> Work:
            def spend(seconds: float, name: str = "") -> None:
                nonlocal now, calls
                now, calls = now + seconds, calls + name

            return Work(partial(spend, seconds, name), partial(spend, before) if before else None)

        for works, budget, expected, seconds in (
            ([work("a", 1.0), work("b", 1.0)], 0.0, "aabb" + 3 * "ab", 1.0),
            ([work("s", 5.0), work("f", 0.001)], 0.0, "s" + "ff" + 3 * ("s" + MAX_CALLS * "f"), 5.0),
            ([work("a", 0.5)], 4.0, (2 + 8) * "a", 0.5),
            ([work("a", 0.5)], 1000.0, (2 + 20) * "a", 0.5),
            # what comes before each call is not timed
            ([work("w", 0.001, before=100.0)], 1000.0, "ww" + 20 * MAX_CALLS * "w", 0.001),
        ):
            calls = ""
            rounds = interleave(dict(enumerate(works)), lambda: now, budget)
            assert calls == expected
            assert rounds[0] == pytest.approx([seconds] * len(rounds[0]))
        # the machine gets slower from round to round: no matter
        assert over([4.0, 40.0, 80.0], [1.0, 10.0, 20.0], 2.0) == Spread(8.0, 8.0, 8.0, 3)

    def test_a_step_hands_its_gradients_back_and_accumulates_nothing(self) -> None:
        leaf = torch.ones(3, requires_grad=True)
        step = Step(lambda: leaf * 2, lambda: leaf, [leaf], incoming=(torch.full((3,), 5.0),))
        assert [one.tolist() for one in step.once()] == [[2.0] * 3, [10.0] * 3]
        assert leaf.grad is None

    @pytest.mark.parametrize("axis", growth.UNITS)
    def test_everyone_is_timed(self, axis: str) -> None:
        names = ["SSync cpu", *(one.name for one in (*DENSE, *ADD_ONS) if one.axis == axis)]
        for values in measure.times([key_of(name, "add_ons", axis) for name in names], QUICK):
            assert set(values) == {"step", "ratio"}

    def test_every_operation_is_timed(self) -> None:
        keys = [key_of(name, "kernels", case) for case, name in kernels.names(SMALL, QUICK)]
        times = measure.times([*(key_of("torch", "kernels", case) for case in (COPY, EXP)), *keys], QUICK)
        assert (len(keys), len(times)) == (14, 16)
        for key, values in zip(keys, times[2:], strict=True):
            threaded, step = key.contender.endswith(TWO_THREADS), key.case.startswith(("step", "distillation"))
            parts = {"step", "over_floor", "over_exp", *["speedup"] * threaded, *["forward"] * (step and not threaded)}
            assert set(values) == parts

    def test_two_threads_are_there_inside_of_a_call_alone(self) -> None:
        seen: list[int] = []
        measure.on_two_threads(lambda: seen.append(torch.get_num_threads()))
        assert [*seen, torch.get_num_threads()] == [2, 1]

    def test_the_first_use_compiles(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compiler = tmp_path / "cc"
        # quick, and says that it was here
        compiler.write_text(f'#!/bin/bash\ntouch {tmp_path}/used\nexec cc "${{@/-O3/-O0}}"\n')
        compiler.chmod(0o700)
        monkeypatch.setenv("CC", str(compiler))
        (values,) = kernels.first_use([key_of("SSync cpu")], QUICK)
        assert Row(key_of("SSync cpu"), values=values).number("step") > 0.1
        assert (tmp_path / "used").exists()
        compiler.write_text("#!/bin/bash\nexit 7\n")
        with pytest.raises(RuntimeError, match=r"`backend`='cpu' needs a C compiler that works: .* failed with 7"):
            kernels.first_use([key_of("SSync cpu")], QUICK)

    def test_the_share_of_a_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(PUBLISHED, "tiny", {"D": 6})
        for case in ("tiny", training_step.EXAMPLE):
            (values,) = training_step.share([Key("training_step", case, "SSync cpu", MAPS)], QUICK)
            assert set(values) == {"without", "with", "alone", "share", "difference"}


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
            # also where malloc could have kept what it had
            resident = peak_memory(lambda: [torch.ones(1_000_000) for _ in range(20)], "cpu")["resident"]
            assert 79_000_000 < resident < 120_000_000

    def test_operators_and_host_reads_are_counted(self) -> None:
        x = torch.ones(4)
        assert count(lambda: (x + 1).view(2, 2).sum().item(), "cpu") == {"launches": 3, "host_reads": 1}
        (values,) = measure.counts([key_of("SSync torch", "kernels", STEP)], QUICK)
        assert values["host_reads"] == 0

    def test_memory_is_that_of_a_step(self) -> None:
        kernel = 2 * 96**2 * 4
        forms = ("pair by pair", "all pairs at once", "pooled 2x2")
        pairs, at_once, pooled = (memory_of(f"SemanticConsistencyLoss, {form}")["allocated"] for form in forms)
        # the kernel of a pair, or those of six, and what is linear
        assert pooled < kernel < pairs < 3 * kernel < 6 * kernel < at_once < 12 * kernel
        assert memory_of("SlotCurriculum, elsewhere")["allocated"] == 0
        # the scores of dense alignment
        assert 2 * 4 * 2 * 384**2 < memory_of("dense")["allocated"] < 3 * 4 * 2 * 384**2
        assert "loss" not in memory_of("CorrelationFusion") | memory_of("sinkhorn")

    def test_what_waits_for_the_backward_are_the_gradients(self) -> None:
        held, plain = (memory_of(name, "kernels", STEP) for name in ("SSync cpu", "SSync torch"))
        assert 0 <= held["maps_waiting"] <= held["maps_beyond_gradients"] < 0.01 < 1 < plain["maps_beyond_gradients"]
        assert held["loss"] == pytest.approx(plain["loss"])

    def test_blobs_are_redundant_and_leave_something_to_teach(self) -> None:
        labels = pseudo_labels(*moving_blobs({"B": 2, "T": 4, "S": 11, "H": 24, "W": 24}), merge_threshold=0.7)
        # 0 and 1, 3 and 4, .. sit on the same blobs
        assert torch.equal(labels.representative[:, 0::3], labels.representative[:, 1::3])
        assert min(labels.boundary.float().mean(), labels.interior.float().mean()) > 0.05


class TestEntries:
    def test_every_public_loss_and_part_has_one(self) -> None:
        # the first word of a name
        measured = {re.split("[ .,]", one.name)[0] for one in ADD_ONS}
        public = {name: getattr(ssync_loss, name) for name in ssync_loss.__all__}
        modules = {name for name, one in public.items() if isinstance(one, type) and issubclass(one, nn.Module)}
        ours = {"SSyncLoss", "AdaptiveSSyncLoss", "BoundaryRefinementLoss", "InteriorDenoisingLoss"}
        ours |= {"boundary_region", "interior_region", "merge_slots", "neighbor_difference", "pseudo_labels"}
        ours |= {"selective_distillation_loss", "slot_overlap"}
        # a suite of their own; at a milestone, and inside of a longer one
        others = {"DenseDecoderAlignmentLoss", "DenseEncoderAlignmentLoss", "SemanticSlots", "propagate_masks"}
        others |= set(curriculum.__all__) - {"slot_error", "SlotCurriculum"}
        functions = {name for name in functional.__all__ if not name.endswith("_loss")}
        assert measured >= {*modules, *functions, *attention.__all__, "EmaTeacher", "SlotCurriculum"} - ours - others
        assert measured.isdisjoint(ours | others)

    def test_a_cyclic_scan_takes_almost_twice_the_steps(self) -> None:
        names = ("a scan of some step", "cyclic_scan of the same step")
        forth, cyclic = (count(step_of("", one, Inputs(SMALL)).forward, "cpu")["launches"] for one in names)
        # beside the steps, one output is stacked, and two are
        assert (cyclic - 2) * 4 == (forth - 1) * 7


class TestGate:
    @pytest.mark.parametrize("name", [*BY_NAME, "SSync cpu", "SSync torch"])
    def test_who_agrees_passes_and_what_is_wrong_is_refused(self, name: str) -> None:
        for dtype in ("float32", "float16") if name.startswith("SSync") else ("float32",):
            assert gate.check([Key("gate", gate.CASE, name, MAPS, dtype)], QUICK) == [{}]
        if name.startswith(SLOW):
            return
        shape = gate.SHAPE | dict(BY_NAME[name].shape) if name in BY_NAME else gate.SSYNC_SHAPES[0]
        right, again = (step_of(STEP, name, Inputs(shape), gate=True) for _ in range(2))
        wrong = [dataclasses.replace(right, seen=lambda outputs: _off(right.seen(outputs)))]
        # the value of the whole, and a gradient that is a little off in one of the leaves
        for leaf in right.leaves[:1] + right.leaves[-1:]:
            size = max(one.abs().max().item() for one in torch.autograd.grad(right.forward().sum(), right.leaves))
            wrong.append(dataclasses.replace(right, forward=partial(_nudged, right.forward, leaf, 1e-4 * size)))
        for one_wrong in wrong:
            with pytest.raises(AssertionError):
                gate.check_step(one_wrong, again)

    def test_wrong_labels_are_refused(self) -> None:
        right, again = (step_of("pseudo-labels", "SSync cpu", Inputs(gate.SSYNC_SHAPES[0])) for _ in range(2))
        found = right.forward()
        found.dec_labels[0, 0, 0, 0] += 1
        with pytest.raises(AssertionError, match="Mismatched elements: 1 /"):
            gate.check_step(dataclasses.replace(right, forward=lambda: found), again)

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_rounding_decides_no_label_of_the_gate(self, dtype: str) -> None:
        for shape in gate.SSYNC_SHAPES:
            enc, _ = Inputs(shape, dtype=dtype).maps
            assert decidable_clips(enc.detach().float(), merge_threshold=MERGE_THRESHOLD).all()

    def test_backends_that_cannot_be_had_say_why(self) -> None:
        assert gate.missing("SSync cpu", "cpu") == ""
        assert "got 'abacus'" in gate.missing("SSync abacus", "cpu")


def _off(outputs: Any) -> Any:
    return outputs * 1.001 if outputs.is_floating_point() else outputs ^ True


def _nudged(forward: Callable[[], Tensor], leaf: Tensor, size: float) -> Tensor:
    return forward() + size * (leaf - leaf.detach()).sum()


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
        assert (outcome.status, outcome.note[: len(note)]) == (status, note)
