"""Every kernel compiles for three generations of GPUs, which need not be present, and spills no registers."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest

from cross_compile import NUM_SLOTS
from ssync_loss.ssync.engines.triton import gpu
from ssync_loss.ssync.engines.triton._limits import VERSION

CAPABILITIES = (80, 90, 100)
REGISTERS = 65536
# the default shared memory of every GPU
SHARED_MEMORY = 48 * 1024

Report = dict[str, Any]


def compiling(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the compiler in a process without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    source = str(Path(__file__).parents[1] / "src")
    environment |= {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    command = [sys.executable, str(Path(__file__).with_name("cross_compile.py")), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def reports_of(process: subprocess.Popen[str]) -> list[Report]:
    said, complaints = process.communicate()
    assert process.returncode == 0, complaints
    return [json.loads(line) for line in said.splitlines()]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """Return the assembler's reports of all kernels, from two processes at a time."""
    folder = tmp_path_factory.mktemp("compiled")
    halves = [[str(one) for one in NUM_SLOTS[::2]], [str(one) for one in NUM_SLOTS[1::2]]]
    found: list[Report] = []
    for capability in CAPABILITIES:
        processes = [compiling(folder, str(capability), "--slots", *half) for half in halves]
        for process in processes:
            found += reports_of(process)
    return found


def kernel_names() -> list[str]:
    modules = [import_module(f"{gpu.__name__}.{found.name}") for found in iter_modules(gpu.__path__)]
    return sorted({name for module in modules for name in vars(module) if name.endswith("_kernel")})


def test_every_kernel_is_compiled_for_every_gpu(reports: list[Report]) -> None:
    assert len(kernel_names()) == 10
    for capability in CAPABILITIES:
        for_all = [one for one in reports if one["capability"] == capability]
        assert sorted({one["kernel"] for one in for_all}) == kernel_names()
        # kernels with slots in registers are compiled for every number of slots
        for name in ("label_kernel", "overlap_kernel", "merge_kernel", "loss_kernel", "gradient_kernel"):
            assert {one["num_slots"] for one in for_all if one["kernel"] == name} == set(NUM_SLOTS)


def test_no_register_is_spilled(reports: list[Report]) -> None:
    spilled = [one for one in reports if one["spilled"]]
    kernels = {(one["kernel"].removeprefix("distill_"), one["num_slots"]) for one in spilled}
    known = {("gradient_kernel", 32)} if VERSION < (3, 9) else {("gradient_kernel", 16), ("gradient_kernel", 32)}
    if VERSION >= (3, 8) and kernels == known and max(one["spilled"] for one in spilled) <= 48:
        slots = " or ".join(str(number) for _, number in sorted(known))
        pytest.skip(
            f"Triton {VERSION[0]}.{VERSION[1]} spills up to 48 bytes a thread of the gradients with {slots} slots"
        )
    assert spilled == []


def test_shared_memory_fits_any_gpu(reports: list[Report]) -> None:
    assert max(one["shared_memory"] for one in reports) <= SHARED_MEMORY


def test_spills_are_detected(tmp_path: Path) -> None:
    tight = reports_of(compiling(tmp_path, "80", "--slots", "8", "--variants", "1", "--max-registers", "32"))
    assert any(one["spilled"] for one in tight)
