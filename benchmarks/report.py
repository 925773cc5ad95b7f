"""Tables and figures from results: ``python -m benchmarks.report``.

Each JSON file in benchmarks/results becomes a section of benchmarks/README.md, between its markers, and a figure.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.arguments import explained
from examples.files import must_be_writable, write_text
from examples.markdown import between

from benchmarks.results import SUITES, Results
from benchmarks.suites.growth import LINEAR
from benchmarks.tables import every_row, section

HERE = Path(__file__).resolve().parent
MARKERS = ("<!-- results: python -m benchmarks.report -->", "<!-- end of results -->")


def load_all(folder: Path) -> dict[str, Results]:
    """Read all files of results by name, except hidden ones."""
    paths = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
    if not paths:
        raise ValueError(f"--results must be a folder with a JSON file of results; found none in {folder}.")
    return {path.stem: Results.load(path) for path in paths}


def body(found: dict[str, Results], figures: str = "results") -> str:
    """Write what stands between the markers."""
    devices = {one.origin["device"] for one in found.values()}
    parts = [
        f"**There is no {name} result yet.**"
        for name in ("CPU", "GPU")
        if {"CPU": "cpu", "GPU": "cuda"}[name] not in devices
    ]
    for name, one in found.items():
        try:
            parts.append(section(one, name, f"{figures}/{name}.png"))
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"{one.path or name}: `rows` must be those of a run; they lead to {error!r}.") from error
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of JSON files")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md", help="page to write the tables into")
    parser.add_argument("--rows", choices=SUITES, help="only print all rows of a suite")
    options = parser.parse_args(arguments)
    with explained():
        found = load_all(options.results)
        if options.rows:
            print(*(f"{name}\n{every_row(one, options.rows)}" for name, one in found.items()), sep="\n\n")
            return 0
        text = between(options.readme.read_text(encoding="utf-8"), body(found), str(options.readme), MARKERS)
        must_be_writable(options.readme, "--readme")
    # tables need no matplotlib
    from benchmarks.figure import save_figure

    with explained(OSError):
        for name, results in found.items():
            if results.select(LINEAR):
                save_figure(results, options.results / f"{name}.png")
        write_text(options.readme, text)
    print(f"{options.readme}: {', '.join(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
