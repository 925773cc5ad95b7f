"""Tables and figures from files of results: ``python -m benchmarks.report``.

Every JSON file in benchmarks/results becomes a section of benchmarks/README.md, between its markers, and a figure
beside the file, if it has curves. Nothing there is typed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import Results
from benchmarks.suites.linear_vs_quadratic import SUITE
from benchmarks.tables import section

HERE = Path(__file__).resolve().parent
START = "<!-- results: python -m benchmarks.report -->"
END = "<!-- end of results -->"


def load_all(folder: Path) -> dict[str, Results]:
    """Read every file of results, by name.

    Raises:
        ValueError: if one is not to be read.
    """
    return {path.stem: Results.load(path) for path in sorted(folder.glob("*.json"))}


def body(found: dict[str, Results], figures: str = "results") -> str:
    """Write what stands between the markers."""
    parts = []
    for device, kind in (("cpu", "CPU"), ("cuda", "GPU")):
        if not any(one.environment["device"] == device for one in found.values()):
            parts.append(f"**There is no {kind} result yet.** Nothing on this page was measured on one.")
    parts += [section(one, name, f"{figures}/{name}.png") for name, one in found.items()]
    return "\n\n".join(parts)


def between_markers(text: str, content: str, name: str) -> str:
    """Replace what stands between the markers of a text.

    Raises:
        ValueError: if it has not both, once.
    """
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"{name} must have one line {START!r} and one line {END!r}.")
    before, rest = text.split(START)
    return f"{before}{START}\n{content}\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of JSON files")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md", help="what to write the tables into")
    options = parser.parse_args(arguments)
    # drawing is not needed for the tables
    from benchmarks.figure import save_figure

    try:
        found = load_all(options.results)
        text = between_markers(options.readme.read_text(), body(found), str(options.readme))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    for name, results in found.items():
        if results.select(suite=SUITE):
            save_figure(results, options.results / f"{name}.png")
    options.readme.write_text(text)
    print(f"{options.readme}: {', '.join(found) or 'no results'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
