"""Compiles every kernel for a GPU that need not be present, and prints a line of JSON with the assembler's report.

``python cross_compile.py 80``, without ``TRITON_INTERPRET``. Every launch compiles its kernel instead of running it.
The arguments and constants are those of the launch, so the kernel is specialized (strides of 1, multiples of 16) as on
the GPU.
"""

import argparse
import contextlib
import io
import json
import re
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from ssync_loss.ssync.engines.triton import TritonEngine, _launch
from ssync_loss.ssync.maps import Maps
from ssync_loss.ssync.settings import Criterion, Reduction, Settings

NUM_SLOTS = (8, 16, 32, 64)
REPORT = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", re.DOTALL
)


class Variant(NamedTuple):
    """The maps and settings of a compilation."""

    num_slots: int
    grid: tuple[int, int]
    enc_dtype: torch.dtype
    dec_dtype: torch.dtype
    criterion: Criterion
    masked: bool
    slots_last: bool


def variants(num_slots: int) -> list[Variant]:
    """Return a large frame, an odd frame without common divisors, and for few slots the published frame.

    The decoder map of the odd frame has its slots adjacent in memory, like the output of attention.
    """
    large = Variant(num_slots, (64, 64), torch.float16, torch.float16, "mse", False, False)
    odd = Variant(num_slots, (37, 37), torch.float32, torch.bfloat16, "cross_entropy", True, True)
    small = large._replace(grid=(24, 24))
    return [large, odd, small] if num_slots <= 16 else [large, odd]


class Compiler:
    """Compiles kernels instead of launching them, and collects the assembler's reports."""

    def __init__(self, capability: int, max_registers: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.backend = make_backend(self.target)
        self.max_registers = max_registers
        self.reports: dict[str, dict[str, Any]] = {}

    def __call__(self, kernel: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:
        constants["maxnreg"] = self.max_registers
        # the same steps as in a launch
        bind = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        bound, specialization, options = bind(*arguments, **constants)
        options, signature, given, hints = kernel._pack_args(self.backend, constants, bound, specialization, options)
        source = ASTSource(kernel, signature, given, hints)
        if source.hash() in self.reports:
            return
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            compiled = triton.compile(source, target=self.target, options=options.__dict__)
        found = REPORT.search(said.getvalue())
        if found is None:
            raise RuntimeError(f"The assembler did not report on {kernel.__name__}: {said.getvalue()!r}")
        stack, stores, loads, registers = map(int, found.groups())
        self.reports[source.hash()] = {
            "kernel": kernel.__name__,
            "capability": self.target.arch,
            "spilled": stack + stores + loads,
            "registers": registers,
            "shared_memory": compiled.metadata.shared,
        }


def launch_all(variant: Variant) -> None:
    """Run a step and a distillation, forward and backward."""
    patches = (2, 4, *variant.grid)
    shape = (2, 4, variant.num_slots, *variant.grid)
    enc = torch.empty(shape, dtype=variant.enc_dtype, requires_grad=True)
    dec = torch.empty(shape, dtype=variant.dec_dtype)
    if variant.slots_last:
        dec = dec.movedim(2, -1).contiguous().movedim(-1, 2)
    dec.requires_grad_()
    smoothing = 0.1 if variant.criterion == "cross_entropy" else 0.0
    settings = Settings(criterion=variant.criterion, label_smoothing=smoothing, temperature=0.5)
    slot_mask = torch.empty(2, variant.num_slots, dtype=torch.bool) if variant.masked else None
    valid = torch.empty(patches, dtype=torch.bool) if variant.masked else None
    kernels, maps = TritonEngine(), Maps(enc, dec, valid, slot_mask, None)
    result = kernels.terms(maps, settings).total if variant.masked else kernels.loss(maps, settings)
    torch.autograd.backward(result)
    target, region = torch.empty(patches, dtype=torch.int64), torch.empty(patches, dtype=torch.bool)
    reduction: Reduction = "none" if variant.masked else "mean"
    torch.autograd.backward(kernels.distill(dec, target, region, slot_mask, settings, reduction).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", type=int)
    parser.add_argument("--slots", type=int, nargs="+", default=NUM_SLOTS)
    parser.add_argument("--variants", type=int, help="variants per number of slots; all by default")
    parser.add_argument("--max-registers", type=int, default=_launch.MAX_REGISTERS)
    chosen = parser.parse_args()
    triton.knobs.nvidia.dump_ptxas_log = True
    # cached kernels would have no report
    triton.knobs.compilation.always_compile = True
    compiler = Compiler(chosen.capability, chosen.max_registers)
    _launch.launch = compiler
    for num_slots in chosen.slots:
        for variant in variants(num_slots)[: chosen.variants]:
            known = set(compiler.reports)
            launch_all(variant)
            for key in set(compiler.reports) - known:
                print(json.dumps(compiler.reports[key] | {"num_slots": num_slots}), flush=True)


if __name__ == "__main__":
    main()
