"""How the benchmarks measure: in turn, counted, a row for every error. tests/test_examples_steps.py has the gate."""

import dataclasses
import math
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
from benchmarks.contenders import COPY, EXP, STEP, TWO_THREADS
from benchmarks.counted import count, peak_memory
from benchmarks.plan import Job
from benchmarks.results import Key, Row, Spread
from benchmarks.suites import growth, kernels, training_step
from benchmarks.timing import MAX_CALLS, Work, interleave, over
from torch import Tensor

from benchmark_results import options

SMALL = {"B": 2, "T": 4, "S": 3, "H": 8, "W": 12, "D": 8, "Kp": 16, "weights": 2 * 256**2}
MAPS = tuple((axis, SMALL[axis]) for axis in "BTSHW")
MAP_BYTES = 4 * math.prod(size for _, size in MAPS)
QUICK = options(quick=True)
KEY = Key("add_ons", "H*W", "dense", tuple(SMALL.items()))
BYTES = {"allocated", "kept", "resident"}


def key_of(contender: str, suite: str = "add_ons", case: str = "H*W") -> Key:
    return Key(suite, case, contender, MAPS if suite == "kernels" else KEY.shape)


def measured(*keys: Key) -> dict[str, Any]:
    """Measure keys; return values by contender and case."""
    rows = measure.measure(keys, QUICK)
    assert [(row.key, row.status, row.note) for row in rows] == [(key, "measured", "") for key in keys]
    return {f"{row.key.contender}, {row.key.case}": row.values for row in rows}


def test_contenders_take_turns_and_slow_ones_warm_up_once() -> None:
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


@pytest.mark.parametrize("axis", growth.SWEEPS["add_ons"])
def test_every_add_on_is_measured(axis: str) -> None:
    names = ["SSync cpu", *(one.name for one in (*DENSE, *ADD_ONS) if one.axis == axis)]
    for values in measured(*(key_of(name, "add_ons", axis) for name in names)).values():
        assert values.keys() == {"step", "ratio"} | BYTES


def test_every_operation_is_measured() -> None:
    named = [(COPY, "torch"), (EXP, "torch"), *kernels.names(SMALL, QUICK)]
    found = measured(*(key_of(name, "kernels", case) for case, name in named))
    assert len(found) == 16
    for name, values in found.items():
        parts = {"step", "over_floor", "over_exp", "launches", "host_reads"} | BYTES
        if ", step" in name or ", distillation" in name:
            parts |= {"forward", "maps_beyond_gradients", "maps_waiting"}
        if TWO_THREADS in name:
            parts = {"step", "over_floor", "over_exp", "speedup"}
        assert values.keys() == ({"step"} | BYTES if name.startswith("torch,") else parts)
    held, plain = found[f"SSync cpu, {STEP}"], found[f"SSync torch, {STEP}"]
    assert 0 <= held["maps_waiting"] <= held["maps_beyond_gradients"] < 0.01 < 1 < plain["maps_beyond_gradients"]
    assert plain["host_reads"] == 0
    threads: list[int] = []
    measure.on_two_threads(lambda: threads.append(torch.get_num_threads()))
    assert [*threads, torch.get_num_threads()] == [2, 1]


def test_memory_is_that_of_a_step() -> None:
    kernel, scores = 2 * 96**2 * 4, 4 * 2 * 384**2
    names = [f"SemanticConsistencyLoss, {form}" for form in ("pair by pair", "all pairs at once", "pooled 2x2")]
    names += ["SlotCurriculum, elsewhere", "dense", "SSync cpu"]
    found = measured(*map(key_of, names)).values()
    pairs, at_once, pooled, elsewhere, dense, ssync = (one["allocated"] for one in found)
    # one kernel of a pair, or six, and what is linear
    assert pooled < kernel < pairs < 3 * kernel < 6 * kernel < at_once < 12 * kernel
    assert elsewhere == 0
    assert 2 * scores < dense < 3 * scores
    # both gradients
    assert 2 * MAP_BYTES < ssync < 2.1 * MAP_BYTES


def test_a_loss_must_be_that_of_the_contender_that_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(BY_NAME["dense chunked"], make=BY_NAME["dense in windows of 2"].make)
    monkeypatch.setitem(BY_NAME, other.name, other)
    first, second = measure.measure([key_of("dense"), key_of(other.name)], QUICK)
    assert (first.status, second.status, second.values) == ("measured", "wrong", {})
    assert re.fullmatch(r"the loss is [\d.]+, and [\d.]+ by dense", second.note)


def test_the_first_use_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    # it compiles quickly, and leaves a sign
    compiler.write_text(f'#!/bin/bash\ntouch {tmp_path}/used\nexec cc "${{@/-O3/-O0}}"\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    assert kernels.first_use([key_of("SSync cpu")], QUICK)[0].number("step") > 0.1
    assert (tmp_path / "used").exists()
    compiler.write_text("#!/bin/bash\nexit 7\n")
    with pytest.raises(RuntimeError, match=r"`backend`='cpu' needs a C compiler that works: .* failed with 7"):
        kernels.first_use([key_of("SSync cpu")], QUICK)


def test_the_share_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training_step.PUBLISHED, "tiny", {"D": 6})
    for case in ("tiny", training_step.EXAMPLE):
        (row,) = training_step.share([Key("training_step", case, "SSync cpu", MAPS)], QUICK)
        assert row.values.keys() == {"without", "with", "alone", "alone_over_with", "without_over_with"}


def test_bytes_operators_and_host_reads_are_counted() -> None:
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
    assert count(lambda: (x + 1).view(10, 100).sum().item(), "cpu") == {"launches": 3, "host_reads": 1}


def test_an_error_is_a_row_or_says_what_is_missing() -> None:
    def fail(error: Exception) -> list[Row]:
        raise error

    plan._mapped.cache_clear()
    for call, status, note in (
        (lambda *_: fail(ValueError("as it was told")), "failed", "ValueError: as it was told"),
        (lambda *_: fail(AssertionError("it disagrees")), "wrong", "it disagrees"),
        (lambda *_: [Row(KEY, values={"size": len(torch.ones(1 << 28))})], "memory", "RuntimeError: .*allocate memory"),
    ):
        (row,) = plan.work(Job([KEY], call), [KEY], options(quick=True, memory_cap=1 << 28))
        assert (row.key, row.status) == (KEY, status)
        assert re.match(note, row.note)
    assert (len(torch.ones(1 << 28)), gate.missing("SSync cpu", "cpu")) == (1 << 28, "")
    assert "got 'abacus'" in gate.missing("SSync abacus", "cpu")


def test_malloc_keeps_memory_from_a_job_on() -> None:
    code = "from test_benchmarks import *; print(*(faulting(raised) for raised in (False, True)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    usual, raised = map(int, done.stdout.split())
    assert raised < 100 < usual


def faulting(raised: bool) -> float:
    """Count the page faults of a large allocation after many."""

    def faults(*_: object) -> list[Row]:
        for _number in range(20):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(20_000_000)
        return [Row(KEY, values={"faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before})]

    return plan.work(Job([KEY], faults, raised=raised), [KEY], QUICK)[0].number("faults")
