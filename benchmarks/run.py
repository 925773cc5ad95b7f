"""Measure everything, or a suite, on this machine: ``python -m benchmarks.run``.

    python -m benchmarks.run                                     # all suites on the CPU, about twenty minutes
    python -m benchmarks.run --quick                             # few sizes of all suites in minutes, a rehearsal
    python -m benchmarks.run --device cuda --out benchmarks/results/h200.json
    python -m benchmarks.report                                  # tables and figures from what was measured

Every row is written as soon as it is measured. A run that was stopped goes on with the rows that are missing.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from examples.arguments import Bounded, above, add_threads, at_most, explained
from examples.files import must_be_ours, must_be_writable
from examples.machine import this_machine
from tqdm import tqdm

from benchmarks import child, gate
from benchmarks.child import ROOT, Limits
from benchmarks.contenders import BACKENDS, TORCH, base_of, name_of
from benchmarks.plan import Job, Options, do
from benchmarks.results import SUITES, Results
from benchmarks.suites import growth, kernels, training_step

RESULTS = Path(__file__).resolve().parent / "results"
MEMORY_CAP_GB = 12.0
TOTAL_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
# what a result depends on; what is made of results does not belong to it
CODE = ("src/ssync_loss", "benchmarks", "examples")
REPORT = ("report", "figure", "bars", "tables", "in_a_run", "markdown")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", choices=(*SUITES[1:], "all"), default="all", help="what to measure; all if nothing is said")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where; the CPU if nothing is said")
    add("--backend", choices=(*BACKENDS, "all"), default="all", help="of SSync; every one that can be had here")
    add("--quick", action="store_true", help="fewer and smaller sizes in minutes: a rehearsal")
    add("--out", type=Path, help="file of results; benchmarks/results/<device>.json, runs/ for a rehearsal")
    add("--restart", action="store_true", help="measure anew what --out holds")
    cap: Any = {"type": float, "action": Bounded, "rules": [above(0), at_most(1_000_000)]}
    add("--time-cap", metavar="SECONDS", help="no size that should take longer; 10, quick 0.5", **cap)
    add("--memory-cap", metavar="GB", help="no size that should take more; 12, on a GPU what it has free", **cap)
    add_threads(parser, above(0), help="of torch, 1 if nothing is said; the kernels take one, and two")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda needs a GPU that torch can see; torch {torch.__version__} sees none")
    folder = Path("runs/benchmarks") if options.quick else RESULTS
    options.out = options.out or folder / f"{options.device}.json"
    return options


def plan(options: Options) -> list[Job]:
    """Plan what was asked for, the gate of everyone who takes part in front."""
    plans: dict[str, Any] = {training_step.SUITE: training_step.plan, kernels.SUITE: kernels.plan}
    plans |= {suite: partial(growth.plan, suite) for suite in growth.SWEEPS}
    jobs = [job for suite in options.suites for job in plans[suite](options)]
    measured = dict.fromkeys((base_of(key.contender), key.dtype) for job in jobs for key in job.rows)
    return [*gate.plan([one for one in measured if one[0] != TORCH]), *jobs]


def machine(device: str, threads: int) -> dict[str, Any]:
    """Describe where and on what code this runs."""
    on_gpu = device == "cuda"
    return this_machine() | {
        "threads": threads,
        "device": device,
        "memory_gb": round(TOTAL_MEMORY / 1e9),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "triton": next((one.version for one in metadata.distributions(name="triton")), None),
        "sources": sources_digest(),
    }


def sources_digest(root: Path = ROOT) -> str:
    """Fingerprint the measured and the measuring code: it also tells two uncommitted states apart."""
    digest = hashlib.sha256()
    paths = [path for folder in CODE for end in ("py", "c") for path in (root / folder).rglob(f"*.{end}")]
    for path in sorted(paths):
        if path.stem not in REPORT:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def memory_cap(device: str, wanted: float | None) -> int:
    """Return the bytes that a step may take."""
    if wanted is not None:
        return int(wanted * 1e9)
    if device == "cuda":
        return int(0.9 * torch.cuda.get_device_properties(0).total_memory)
    return int(min(MEMORY_CAP_GB * 1e9, 0.55 * TOTAL_MEMORY))


def available_backends(device: str, wanted: str) -> tuple[str, ...]:
    """Find out which backends of SSync can be had, the fastest first: the others are compared with it."""
    limits, missing = Limits(alone=device == "cuda"), {}
    for backend in BACKENDS:
        outcome = child.call(gate.missing, name_of(backend), device, limits=limits)
        missing[backend] = outcome.note or outcome.value
    if missing.get(wanted):
        raise ValueError(f"--backend {wanted} cannot be had on {device}: {missing[wanted]}")
    return tuple(one for one in BACKENDS if not missing[one] and wanted in (one, "all"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 130 when Ctrl-C cut it short."""
    asked = parse(arguments)
    with explained():
        must_be_writable(asked.out, "--out")
        must_be_ours(asked.out, "--out", Results.load)
        options = Options(
            suites=SUITES[1:] if asked.suite == "all" else (asked.suite,),
            device=asked.device,
            backends=available_backends(asked.device, asked.backend),
            quick=asked.quick,
            time_cap=asked.time_cap or (0.5 if asked.quick else 10.0),
            memory_cap=memory_cap(asked.device, asked.memory_cap),
            threads=asked.threads,
        )
        described = machine(asked.device, asked.threads)
        results = Results.resume(asked.out, described, options.settings(), restart=asked.restart)
    with tqdm(plan(options), unit="job", dynamic_ncols=True) as jobs, explained(OSError):
        try:
            for job in jobs:
                jobs.set_postfix_str(f"{job.rows[0].case}, {job.rows[0].contender}")
                do(job, results, options)
        except KeyboardInterrupt:
            jobs.write(f"stopped; the same command goes on with the rows that {asked.out} does not have")
            return 130
    for row in results.rows.values():
        if row.status in ("failed", "wrong"):
            print(f"{row.status}: {row.key.suite}, {row.key.case}, {row.key.contender}: {row.note}")
    print(f"results {asked.out}\ntables and figures: python -m benchmarks.report")
    return 0


if __name__ == "__main__":
    sys.exit(main())
