"""How the benchmarks measure: only what is right, in turn, counted, within limits."""

import dataclasses
import os
import re
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gate, measure, plan
from benchmarks.add_ons import ADD_ONS, BY_NAME, DENSE
from benchmarks.contenders import COPY, EXP, MERGE_THRESHOLD, STEP, TWO_THREADS, step_of
from benchmarks.counted import count, peak_memory
from benchmarks.inputs import Inputs, Step, moving_blobs
from benchmarks.plan import Job
from benchmarks.results import Key, Row, Spread
from benchmarks.suites import growth, kernels, training_step
from benchmarks.timing import MAX_CALLS, Work, interleave, over
from torch import Tensor, nn

import ssync_loss
from benchmark_results import options
from ssync_loss import attention, curriculum, functional
from ssync_loss.functional import pseudo_labels
from ssync_loss.testing import decidable_clips

SMALL = {"B": 2, "T": 4, "S": 3, "H": 8, "W": 12, "D": 8, "Kp": 16, "weights": 2 * 256**2}
MAPS = tuple((axis, SMALL[axis]) for axis in "BTSHW")
QUICK = options(quick=True)
# definitions that take seconds, or have several outputs
SLOW = ("StructureAware", "SemanticConsistency", "AffinityConsistency", "SemanticAware", "InstanceConsistency", "dense")


def key_of(contender: str, suite: str = "add_ons", case: str = "H*W") -> Key:
    return Key(suite, case, contender, MAPS if suite == "kernels" else tuple(SMALL.items()))


def measured(*keys: Key) -> dict[str, Any]:
    """Measure keys in their order; return values by contender and case."""
    rows = measure.measure(keys, QUICK)
    assert [(row.key, row.status, row.note) for row in rows] == [(key, "measured", "") for key in keys]
    return {f"{row.key.contender}, {row.key.case}": row.values for row in rows}


class TestTiming:
    def test_contenders_take_turns_and_slow_ones_warm_up_once(self) -> None:
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
            # the call before is not timed
            ([work("w", 0.001, before=100.0)], 1000.0, "ww" + 20 * MAX_CALLS * "w", 0.001),
        ):
            calls = ""
            rounds = interleave(dict(enumerate(works)), lambda: now, budget)
            assert calls == expected
            assert rounds[0] == pytest.approx([seconds] * len(rounds[0]))
        # a machine that slows down from round to round does not change a ratio
        assert over([4.0, 40.0, 80.0], [1.0, 10.0, 20.0], 2.0) == Spread(8.0, 8.0, 8.0, 3)

    def test_a_step_returns_its_gradients_and_accumulates_none(self) -> None:
        leaf = torch.ones(3, requires_grad=True)
        step = Step(lambda: leaf * 2, lambda: leaf, [leaf], incoming=(torch.full((3,), 5.0),))
        assert [one.tolist() for one in step.once()] == [[2.0] * 3, [10.0] * 3]
        assert leaf.grad is None

    @pytest.mark.parametrize("axis", growth.SWEEPS["add_ons"])
    def test_every_add_on_is_measured(self, axis: str) -> None:
        names = ["SSync cpu", *(one.name for one in (*DENSE, *ADD_ONS) if one.axis == axis)]
        for values in measured(*(key_of(name, "add_ons", axis) for name in names)).values():
            assert values.keys() == {"step", "ratio", "allocated", "kept", "resident"}

    def test_every_operation_is_measured(self) -> None:
        named = [(COPY, "torch"), (EXP, "torch"), *kernels.names(SMALL, QUICK)]
        found = measured(*(key_of(name, "kernels", case) for case, name in named))
        assert len(found) == 16
        for name, values in found.items():
            bytes_ = {"allocated", "kept", "resident"}
            parts = {"step", "over_floor", "over_exp", "launches", "host_reads"} | bytes_
            if ", step" in name or ", distillation" in name:
                parts |= {"forward", "maps_beyond_gradients", "maps_waiting"}
            if TWO_THREADS in name:
                parts = {"step", "over_floor", "over_exp", "speedup"}
            assert values.keys() == ({"step"} | bytes_ if name.startswith("torch,") else parts)
        held, plain = found[f"SSync cpu, {STEP}"], found[f"SSync torch, {STEP}"]
        assert 0 <= held["maps_waiting"] <= held["maps_beyond_gradients"] < 0.01 < 1 < plain["maps_beyond_gradients"]
        assert plain["host_reads"] == 0

    def test_two_threads_are_there_only_during_a_call(self) -> None:
        seen: list[int] = []
        measure.on_two_threads(lambda: seen.append(torch.get_num_threads()))
        assert [*seen, torch.get_num_threads()] == [2, 1]

    def test_the_first_use_compiles(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compiler = tmp_path / "cc"
        # it compiles quickly, and leaves a sign
        compiler.write_text(f'#!/bin/bash\ntouch {tmp_path}/used\nexec cc "${{@/-O3/-O0}}"\n')
        compiler.chmod(0o700)
        monkeypatch.setenv("CC", str(compiler))
        (row,) = kernels.first_use([key_of("SSync cpu")], QUICK)
        assert row.number("step") > 0.1
        assert (tmp_path / "used").exists()
        compiler.write_text("#!/bin/bash\nexit 7\n")
        with pytest.raises(RuntimeError, match=r"`backend`='cpu' needs a C compiler that works: .* failed with 7"):
            kernels.first_use([key_of("SSync cpu")], QUICK)

    def test_the_share_of_a_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(training_step.PUBLISHED, "tiny", {"D": 6})
        for case in ("tiny", training_step.EXAMPLE):
            (row,) = training_step.share([Key("training_step", case, "SSync cpu", MAPS)], QUICK)
            assert row.values.keys() == {"without", "with", "alone", "alone_over_with", "without_over_with"}


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
            assert (values["allocated"], values["kept"]) == (8000, 4000)
            # memory that malloc kept does not hide it
            resident = peak_memory(lambda: [torch.ones(1_000_000) for _ in range(20)], "cpu")["resident"]
            assert 79_000_000 < resident < 120_000_000

    def test_operators_and_host_reads_are_counted(self) -> None:
        x = torch.ones(4)
        assert count(lambda: (x + 1).view(2, 2).sum().item(), "cpu") == {"launches": 3, "host_reads": 1}

    def test_memory_is_that_of_a_step(self) -> None:
        kernel, scores = 2 * 96**2 * 4, 4 * 2 * 384**2
        names = [f"SemanticConsistencyLoss, {form}" for form in ("pair by pair", "all pairs at once", "pooled 2x2")]
        names += ["SlotCurriculum, elsewhere", "dense"]
        found = [one["allocated"] for one in measured(*map(key_of, names)).values()]
        pairs, at_once, pooled, elsewhere, dense = found
        # one kernel of a pair, or six, and what is linear
        assert pooled < kernel < pairs < 3 * kernel < 6 * kernel < at_once < 12 * kernel
        assert elsewhere == 0
        assert 2 * scores < dense < 3 * scores

    def test_blobs_are_redundant_and_have_both_regions(self) -> None:
        labels = pseudo_labels(*moving_blobs({"B": 2, "T": 4, "S": 11, "H": 24, "W": 24}), merge_threshold=0.7)
        # slots 0 and 1, 3 and 4 and so on share a blob
        assert torch.equal(labels.representative[:, 0::3], labels.representative[:, 1::3])
        assert min(labels.boundary.float().mean(), labels.interior.float().mean()) > 0.05


class TestEntries:
    def test_every_public_loss_and_part_has_one(self) -> None:
        measured = {re.split("[ .,]", one.name)[0] for one in ADD_ONS}
        public = {name: getattr(ssync_loss, name) for name in ssync_loss.__all__}
        modules = {name for name, one in public.items() if isinstance(one, type) and issubclass(one, nn.Module)}
        ours = {"SSyncLoss", "AdaptiveSSyncLoss", "BoundaryRefinementLoss", "InteriorDenoisingLoss"}
        ours |= {"boundary_region", "interior_region", "merge_slots", "neighbor_difference", "pseudo_labels"}
        ours |= {"selective_distillation_loss", "slot_overlap"}
        # another suite has the first two; others run inside of an entry
        others = {"DenseDecoderAlignmentLoss", "DenseEncoderAlignmentLoss", "SemanticSlots", "propagate_masks"}
        others |= set(curriculum.__all__) - {"slot_error", "SlotCurriculum"}
        functions = {name for name in functional.__all__ if not name.endswith("_loss")}
        assert measured >= {*modules, *functions, *attention.__all__, "EmaTeacher", "SlotCurriculum"} - ours - others
        assert measured.isdisjoint(ours | others)

    def test_a_cyclic_scan_takes_almost_twice_the_steps(self) -> None:
        names = ("a scan of some step", "cyclic_scan of the same step")
        forth, cyclic = (count(step_of("", one, Inputs(SMALL)).forward, "cpu")["launches"] for one in names)
        # one launch stacks the outputs
        assert (cyclic - 1) * 4 == (forth - 1) * 7


class TestGate:
    @pytest.mark.parametrize("name", [*BY_NAME, "SSync cpu", "SSync torch"])
    def test_an_agreeing_contender_passes_and_a_wrong_one_is_refused(self, name: str) -> None:
        keys = [Key("gate", gate.CASE, name, MAPS, dtype) for dtype in ("float32", "float16")]
        keys = keys[: 2 if name.startswith("SSync") else 1]
        assert gate.check(keys, QUICK) == [Row(key) for key in keys]
        if name.startswith(SLOW):
            return
        shape = gate.SHAPE if name in BY_NAME else gate.SSYNC_SHAPES[0]
        right, again = (step_of(STEP, name, Inputs(shape), gate=True) for _ in range(2))
        wrong = [dataclasses.replace(right, seen=lambda outputs: _off(right.seen(outputs)))]
        # a gradient is a little off in one of the leaves
        for leaf in right.leaves[:1] + right.leaves[-1:]:
            size = max(one.abs().max().item() for one in torch.autograd.grad(right.forward().sum(), right.leaves))
            off = partial(lambda leaf, size: right.forward() + size * (leaf - leaf.detach()).sum(), leaf, 1e-4 * size)
            wrong.append(dataclasses.replace(right, forward=off))
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

    def test_a_large_loss_must_be_that_of_the_contender_that_computes_the_same(self, monkeypatch: Any) -> None:
        plain, other = (one for one in DENSE if "windows" not in one.name)
        monkeypatch.setitem(BY_NAME, other.name, dataclasses.replace(other, make=BY_NAME["dense in windows of 2"].make))
        first, second = measure.measure([key_of(plain.name), key_of(other.name)], QUICK)
        assert (first.status, second.status, second.values) == ("measured", "wrong", {})
        assert re.fullmatch(r"the loss is [\d.]+, and [\d.]+ by dense", second.note)

    def test_a_missing_backend_says_why(self) -> None:
        assert gate.missing("SSync cpu", "cpu") == ""
        assert "got 'abacus'" in gate.missing("SSync abacus", "cpu")


def _off(outputs: Any) -> Any:
    return outputs * 1.001 if outputs.is_floating_point() else outputs ^ True


class TestWork:
    @pytest.mark.parametrize(
        ("error", "status", "note"),
        [
            (ValueError("as it was told"), "failed", "ValueError: as it was told"),
            (AssertionError("it disagrees"), "wrong", "it disagrees"),
            (None, "memory", "RuntimeError: .*can't allocate memory"),
        ],
    )
    def test_an_error_is_a_row_and_lifts_the_limit(self, error: Exception | None, status: str, note: str) -> None:
        def fail(keys: Any, options: Any) -> list[Row]:
            if error is None:
                return [Row(key, values={"size": len(torch.ones(1 << 34))}) for key in keys]
            raise error

        before = resource.getrlimit(resource.RLIMIT_AS)
        (row,) = plan.work(Job([key_of("dense")], fail), [key_of("dense")], QUICK)
        assert (row.key, row.status) == (key_of("dense"), status)
        assert re.match(note, row.note)
        assert resource.getrlimit(resource.RLIMIT_AS) == before

    def test_malloc_keeps_memory_from_a_job_on(self) -> None:
        code = "from test_benchmarks import faults; print(faults(False), faults(True))"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        usual, raised = map(int, done.stdout.split())
        assert raised < 100 < usual


def faults(raised: bool) -> float:
    """Count the page faults of a large allocation after many."""

    def measure(keys: Any, options: Any) -> list[Row]:
        for _ in range(20):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(20_000_000)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        return [Row(key, values={"faults": after - before}) for key in keys]

    (row,) = plan.work(Job([key_of("dense")], measure, raised=raised), [key_of("dense")], QUICK)
    return row.number("faults")
