"""Measure everything, or a suite, on this machine: ``python -m benchmarks.run``.

    python -m benchmarks.run                                     # all suites on the CPU, about fifteen minutes
    python -m benchmarks.run --quick                             # all suites in less than two minutes, a rehearsal
    python -m benchmarks.run --device cuda --out benchmarks/results/h200.json
    python -m benchmarks.report                                  # tables and figures from what was measured

Every row is written as soon as it is measured. A run that was stopped goes on with the rows that are missing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from examples.arguments import Bounded, above, add_threads, at_most, explained
from examples.files import must_be_ours, must_be_writable
from tqdm import tqdm

from benchmarks import environment
from benchmarks.add_ons import AddOn
from benchmarks.child import Worker
from benchmarks.contenders import BACKENDS, Contender, ssync_contender
from benchmarks.results import Results
from benchmarks.session import Options, Session, Task
from benchmarks.suites import add_ons, gate, kernels, linear_vs_quadratic, training_step

SUITES = ("linear_vs_quadratic", "training_step", "kernels", "add_ons")
RESULTS = Path(__file__).resolve().parent / "results"
MEMORY_CAP_GB = 12.0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", choices=(*SUITES, "all"), default="all", help="what to measure; all if nothing is said")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where; the CPU if nothing is said")
    add("--backend", choices=(*BACKENDS, "all"), default="all", help="of SSync; every one that can be had here")
    add("--quick", action="store_true", help="fewer and smaller sizes in less than two minutes: a rehearsal")
    add("--out", type=Path, help="file of results; benchmarks/results/<device>.json, runs/ for a rehearsal")
    add("--restart", action="store_true", help="measure anew what --out holds")
    for name, unit, help_ in (
        ("--time-cap", "SECONDS", "no step that should take longer; 10, quick 0.5"),
        ("--memory-cap", "GB", "no step that should take more; 12, on a GPU what it has free"),
    ):
        add(name, type=float, metavar=unit, action=Bounded, rules=[above(0), at_most(1_000_000)], help=help_)
    add_threads(parser, above(0), help="of torch, 1 if nothing is said; the kernels take one, and two")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda needs a GPU that torch can see; torch {torch.__version__} sees none")
    if options.out is None:
        folder = Path("runs/benchmarks") if options.quick else RESULTS
        options.out = folder / f"{options.device}.json"
    return options


def plan(options: Options) -> list[Task]:
    """Plan what was asked for, the gate in front."""
    tasks: list[Task] = []
    gated: dict[tuple[Contender, str], None] = {}
    gated_add_ons: list[AddOn] = []
    if "linear_vs_quadratic" in options.suites:
        tasks += linear_vs_quadratic.plan(options)
        dtype = linear_vs_quadratic.DTYPE
        gated.update(dict.fromkeys((one, dtype) for one in linear_vs_quadratic.contenders_of(options)))
    if "training_step" in options.suites:
        tasks += training_step.plan(options)
        gated.update(dict.fromkeys(training_step.contenders_of(options)))
    if "kernels" in options.suites:
        tasks += kernels.plan(options)
        gated.update(dict.fromkeys(kernels.contenders_of(options)))
    if "add_ons" in options.suites:
        tasks += add_ons.plan(options)
        gated.update({(ssync_contender(options.backends[0]), add_ons.DTYPE): None})
        gated_add_ons = add_ons.add_ons_of(options)
    return [*gate.plan(options, gated, gated_add_ons), *tasks]


def available_backends(device: str, wanted: str) -> tuple[str, ...]:
    """Find out which backends of SSync can be had, the fastest first: the others are compared with it.

    Raises:
        ValueError: if one was asked for by name and cannot be had; it says why.
    """
    worker = Worker({}, device=device, threads=1, memory_cap=1 << 32, prepared=False)
    found = []
    try:
        for backend in BACKENDS if wanted == "all" else (wanted,):
            outcome = worker.call("benchmarks.gate:available", backend=backend, device=device)
            missing = outcome.note if outcome.status != "measured" else outcome.value
            if not missing:
                found.append(backend)
            elif wanted != "all":
                raise ValueError(f"--backend {backend} cannot be had on {device}: {missing}")
    finally:
        worker.close()
    return tuple(found)


def memory_cap(device: str, wanted: float | None) -> int:
    """Return the bytes that a step may take."""
    if wanted is not None:
        return int(wanted * 1e9)
    if device == "cuda":
        return int(0.9 * torch.cuda.get_device_properties(0).total_memory)
    return int(min(MEMORY_CAP_GB * 1e9, 0.55 * environment.total_memory()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 130 when Ctrl-C cut it short."""
    asked = parse(arguments)
    with explained():
        must_be_writable(asked.out, "--out")
        must_be_ours(asked.out, "--out", Results.load)
        options = Options(
            suites=SUITES if asked.suite == "all" else (asked.suite,),
            device=asked.device,
            backends=available_backends(asked.device, asked.backend),
            quick=asked.quick,
            time_cap=asked.time_cap or (0.5 if asked.quick else 10.0),
            memory_cap=memory_cap(asked.device, asked.memory_cap),
            threads=asked.threads,
        )
        described = environment.describe(asked.device)
        results = Results.resume(asked.out, described, options.settings(), restart=asked.restart)
    tasks = plan(options)
    rows = [row for task in tasks for row in task.rows]
    done = sum(row in results.rows for row in rows)
    with tqdm(total=len(rows), initial=done, unit="row", dynamic_ncols=True) as bar:
        session = Session(options, results, bar=bar)
        try:
            if done < len(rows):
                session.start()
            with explained(OSError):
                session.run(tasks)
        except KeyboardInterrupt:
            bar.write(f"stopped; the same command goes on with the rows that {asked.out} does not have")
            return 130
        finally:
            session.close()
    without = [row for row in results.rows.values() if row.status in ("failed", "wrong")]
    for row in without:
        print(f"{row.status}: {row.id}: {row.note}")
    print(f"results {asked.out}\ntables and figures: python -m benchmarks.report")
    return 0


if __name__ == "__main__":
    sys.exit(main())
