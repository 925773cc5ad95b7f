"""Measure everything, or one suite, on this machine: ``python -m benchmarks.run``.

    python -m benchmarks.run                                     # all suites on the CPU, about half an hour
    python -m benchmarks.run --quick                             # few sizes of all suites, a rehearsal of minutes
    python -m benchmarks.run --device cuda --out benchmarks/results/h200.json
    python -m benchmarks.report                                  # tables and figures from the results

A job writes its rows when it ends. A run that was stopped continues with the missing rows.
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

from benchmarks import gate
from benchmarks.contenders import BACKENDS, TORCH, base_of, name_of
from benchmarks.plan import RAISED, Job, Options, do
from benchmarks.results import SUITES, Results
from benchmarks.suites import growth, kernels, training_step

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEMORY_CAP = 12e9
TOTAL_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
# a result depends on this code, but not on the modules that only show results
CODE = ("src/ssync_loss", "benchmarks", "examples")
SHOWING = ("report", "figure", "bars", "tables", "in_a_run", "markdown")
PLANS: dict[str, Any] = {
    training_step.SUITE: training_step.plan,
    kernels.SUITE: kernels.plan,
    **{suite: partial(growth.plan, suite) for suite in growth.SWEEPS},
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", choices=(*SUITES[1:], "all"), default="all", help="what to measure (default: all)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--backend", choices=(*BACKENDS, "all"), default="all", help="of SSync (default: all that run here)")
    add("--quick", action="store_true", help="few and small sizes in minutes: a rehearsal")
    add("--out", type=Path, help="results file (default: benchmarks/results/DEVICE.json, runs/ for a rehearsal)")
    add("--restart", action="store_true", help="replace the rows of --out")
    cap: Any = {"type": float, "action": Bounded, "rules": [above(0), at_most(1_000_000)]}
    add("--time-cap", metavar="SECONDS", help="longest step (default: 10, quick 0.5)", **cap)
    add(
        "--memory-cap",
        metavar="GB",
        help="largest step, and what a run may add (default: 12, at most 55%% of the memory; 90%% of a GPU)",
        **cap,
    )
    add_threads(parser, above(0), help="of torch (default: 1; kernels run on one and on two)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda needs a GPU that torch can see; torch {torch.__version__} sees none")
    options.out = options.out or (Path("runs/benchmarks") if options.quick else RESULTS) / f"{options.device}.json"
    return options


def chosen(asked: argparse.Namespace) -> Options:
    """Complete the options by what this machine has. The first backend is the yardstick."""
    missing = {one: gate.missing(name_of(one), asked.device) for one in BACKENDS if asked.backend in (one, "all")}
    if missing.get(asked.backend):
        raise ValueError(f"--backend {asked.backend} cannot be had on {asked.device}: {missing[asked.backend]}")
    on_gpu = asked.device == "cuda"
    most = 0.9 * torch.cuda.get_device_properties(0).total_memory if on_gpu else min(MEMORY_CAP, 0.55 * TOTAL_MEMORY)
    return Options(
        suites=SUITES[1:] if asked.suite == "all" else (asked.suite,),
        device=asked.device,
        backends=tuple(one for one, why in missing.items() if not why),
        quick=asked.quick,
        time_cap=asked.time_cap or (0.5 if asked.quick else 10.0),
        memory_cap=int(1e9 * asked.memory_cap if asked.memory_cap else most),
        threads=asked.threads,
    )


def plan(options: Options) -> list[Job]:
    """Plan the gate of all contenders, then the suites. What changes the process for good comes last.

    Raised malloc cannot be lowered. The kernels' suite counts launches with a profiler, which may slow a GPU down.
    """
    jobs = [job for suite in options.suites for job in PLANS[suite](options)]
    jobs.sort(key=lambda job: job.rows[0].suite == kernels.SUITE if options.device == "cuda" else job.raised)
    measured = dict.fromkeys((base_of(key.contender), key.dtype) for job in jobs for key in job.rows)
    return [*gate.plan([one for one in measured if one[0] != TORCH]), *jobs]


def origin(options: Options) -> dict[str, Any]:
    """Return all that a result depends on."""
    on_gpu = options.device == "cuda"
    return this_machine() | {
        "threads": options.threads,
        "device": options.device,
        "memory_gb": round(TOTAL_MEMORY / 1e9),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "triton": next((one.version for one in metadata.distributions(name="triton")), None),
        "sources": sources_digest(),
        "quick": options.quick,
        "time_cap": options.time_cap,
        "memory_cap": options.memory_cap,
        "malloc": {} if on_gpu else {name: value for name, (_, value) in RAISED.items()},
        "backends": list(options.backends),
    }


def sources_digest(root: Path = ROOT) -> str:
    """Hash the code that a result depends on. This differs between uncommitted states, too."""
    digest = hashlib.sha256()
    paths = [path for folder in CODE for end in ("py", "c") for path in (root / folder).rglob(f"*.{end}")]
    for path in sorted(path for path in paths if path.stem not in SHOWING):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 130 after Ctrl-C."""
    asked = parse(arguments)
    with explained():
        must_be_writable(asked.out, "--out")
        must_be_ours(asked.out, "--out", Results.load)
        options = chosen(asked)
        results = Results.resume(asked.out, origin(options), restart=asked.restart)
    with tqdm(plan(options), unit="job", dynamic_ncols=True) as jobs, explained(OSError):
        # malloc maps no block below the largest that was freed, 32 MB at most. A continued run starts there, too
        torch.empty(31 << 20, dtype=torch.uint8)
        try:
            for job in jobs:
                jobs.set_postfix_str(f"{job.rows[0].suite}, {job.rows[0].case}")
                do(job, results, options)
        except KeyboardInterrupt:
            jobs.write(f"stopped; the same command continues with the rows that {asked.out} does not have")
            return 130
    for row in results.rows.values():
        if row.status in ("failed", "wrong"):
            print(f"{row.status}: {row.key.suite}, {row.key.case}, {row.key.contender}: {row.note}")
    print(f"results {asked.out}\ntables and figures: python -m benchmarks.report")
    return 0


if __name__ == "__main__":
    sys.exit(main())
