"""The versions on which the suite passes. One run is one row of the table in tests/README.md.

The README of the repository has a short form of the same rows.

``python -m tests.matrix --python PATH`` runs all tests with the interpreter of an environment that has the package.
``--torch 2.6.0`` first makes such an environment with pip and the interpreter of ``--python`` or this one. The new row
replaces a row with the same Python and torch, up to patch versions. Without both options, the command only rewrites the
tables from versions.json.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = dict[str, Any]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MARKERS = ("<!-- versions: python -m tests.matrix -->", "<!-- end of versions -->")
IN_SHORT = ("<!-- support: python -m tests.matrix -->", "<!-- end of support -->")
# the mark of a test and its column; the first mark of a test decides
COLUMNS = {"cuda": "GPU", "kernels": "Triton's kernels", "compiles": "compile", "": "eager"}
# from best to worst; the worst of a test's setup, call and teardown counts
OUTCOMES = ("passed", "skipped", "untested", "failed")
# beginnings of the reasons in limits.py
LIMITED = ("torch ", "Triton ")


class Recorder:
    """A pytest plugin that records the outcome and the column of every test."""

    def __init__(self) -> None:
        self.ends: dict[str, tuple[str, str]] = {}
        self.limits: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record a setup, a call or a teardown."""
        column = next(name for mark, name in COLUMNS.items() if not mark or mark in report.keywords)
        self._note(report.nodeid, column, outcome(report))
        if reason(report).startswith(LIMITED):
            self.limits[reason(report)] += 1

    def pytest_collectreport(self, report: Any) -> None:
        """Record a file that could not be imported as one failed test."""
        if report.failed:
            self._note(report.nodeid, "eager", "failed")

    def _note(self, test: str, column: str, end: str) -> None:
        _, before = self.ends.get(test, (column, end))
        self.ends[test] = column, max(before, end, key=OUTCOMES.index)

    def row(self) -> Row:
        """Return the counts by column, and the names of the failed tests."""
        counts = Counter(self.ends.values())
        return {column: {end: counts[column, end] for end in OUTCOMES} for column in sorted(COLUMNS.values())} | {
            "failures": sorted(test for test, (_, end) in self.ends.items() if end == "failed"),
            "limits": dict(sorted(self.limits.items())),
        }


def reason(report: Any) -> str:
    """Return the reason of a skip, or an empty text for other tests and expected failures."""
    skipped = report.skipped and isinstance(report.longrepr, tuple | list)
    return str(report.longrepr[2]).removeprefix("Skipped: ") if skipped else ""


def outcome(report: Any) -> str:
    """Return the outcome of a part of a test. A test that was skipped for a missing requirement is untested."""
    return "untested" if reason(report).startswith("needs ") else str(report.outcome)


def installed(package: str) -> str | None:
    """Return the version of a package without the build suffix."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None


def record(out: Path, arguments: Sequence[str]) -> int:
    """Run pytest in this process, write the counts, and return pytest's exit status."""
    import pytest

    if installed("ssync-loss") is None:
        # the tests must see an installed package
        print(f"{sys.executable} lacks the package: -m pip install --no-deps -e .", file=sys.stderr)
        return 4
    recorder = Recorder()
    status = int(pytest.main(list(arguments), plugins=[recorder]))
    versions = {"python": platform.python_version()} | {name: installed(name) for name in ("torch", "triton")}
    out.write_text(json.dumps(versions | recorder.row()), encoding="utf-8")
    return status


def measured(python: str, root: Path, *arguments: str) -> Row:
    """Run the tests of a folder with an interpreter, and return the row.

    Raises:
        ValueError: if pytest did not finish.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        # other versions emit other warnings, which must not fail a test
        command = [python, __file__, "--record", str(out), "--", "-q", "-W", "default", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors"]
        status = subprocess.run([*command, *arguments], cwd=root, check=False).returncode
        # 1 means that some tests failed
        if status not in (0, 1) or not out.exists():
            raise ValueError(f"no row: pytest with {python} ended with exit status {status}.")
        row: Row = json.loads(out.read_text(encoding="utf-8"))
    return {"date": date.today().isoformat(), "commit": commit(root)} | row


def commit(root: Path) -> str:
    """Return the current commit, with a + if files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    # this command's own output does not count as a difference
    own = [f":!{path}" for path in ("README.md", "tests/README.md", "tests/versions.json")]
    return git("rev-parse", "--short=7", "HEAD") + "+" * bool(git("status", "--porcelain", "--", ".", *own))


def environment(python: str, torch: str, folder: Path) -> str:
    """Make an environment with a version of torch and the newest other packages, and return its interpreter."""
    folder.mkdir(parents=True, exist_ok=True)
    pin = folder / "constraints.txt"
    pin.write_text(f"torch=={torch}\n", encoding="utf-8")
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    made = str(folder / "bin" / "python")
    subprocess.run([made, "-m", "pip", "install", "-q", "-c", str(pin), "-e", f"{ROOT}[test]"], check=True)
    return made


def numbers(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version.

    >>> numbers("2.14.1")
    (2, 14)
    """
    return tuple(int(one) for one in text.split(".")[:2])


def key(row: Row) -> tuple[tuple[int, ...], ...]:
    """Return the sort key of a row: torch and Python, without patch versions."""
    return numbers(row["torch"]), numbers(row["python"])


def replaced(rows: Sequence[Row], row: Row) -> list[Row]:
    """Return the rows with a new row, which replaces the row with the same key."""
    return sorted([*(one for one in rows if key(one) != key(row)), row], key=key)


def cell(counts: dict[str, int]) -> str:
    """Format the counts that are not 0, failures first.

    >>> cell({"passed": 1200, "skipped": 3, "untested": 0, "failed": 1})
    '**1 failed**, 1,200 passed, 3 skipped'
    """
    said = {end: f"{counts[end]:,} {end}" for end in ("failed", "passed", "skipped", "untested") if counts.get(end)}
    return ", ".join(f"**{text}**" if end == "failed" else text for end, text in said.items()) or "none"


def table(rows: Sequence[Row]) -> str:
    """Format rows as Markdown, with the failed and impossible tests below."""
    columns = list(COLUMNS.values())[::-1]
    lines = [f"| Python | torch | Triton | {' | '.join(columns)} | run |", "|---" * (4 + len(columns)) + "|"]
    for row in rows:
        versions = [row["python"], row["torch"], row["triton"] or "none"]
        # an old row may lack a new column
        cells = [*versions, *(cell(row.get(column, {})) for column in columns), f"{row['date']}, {row['commit']}"]
        lines.append(f"| {' | '.join(cells)} |")
    for row in rows:
        if row["failures"]:
            lines += ["", f"Failed with Python {row['python']}, torch {row['torch']}:", ""]
            lines += [f"- `{test}`" for test in row["failures"]]
    limits = {reason: times for row in rows for reason, times in row["limits"].items()}
    if limits:
        lines += ["", "What a version cannot do:", ""]
        lines += [f"- {reason} ({times} test{'s' * (times != 1)})" for reason, times in limits.items()]
    return "\n".join(lines)


def mark(counts: dict[str, int]) -> str:
    """Format whether the tests of a column passed. The column is untested if most of its tests lacked a requirement.

    >>> mark({"passed": 1200, "failed": 2}), mark({"passed": 200, "untested": 30}), mark({"untested": 30})
    ('✗ 2 of 1,202', '✓', 'untested')
    """
    passed, failed, untested = (counts.get(end, 0) for end in ("passed", "failed", "untested"))
    if failed:
        return f"✗ {failed:,} of {passed + failed:,}"
    return "✓" if passed > untested else "untested"


def in_short(rows: Sequence[Row]) -> str:
    """Format rows as Markdown with one mark per column."""
    columns = list(COLUMNS.values())[::-1]
    lines = [f"| Python | torch | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for row in rows:
        marks = [mark(row.get(column, {})) for column in columns]
        lines.append(f"| {row['python']} | {row['torch']} | {' | '.join(marks)} |")
    return "\n".join(lines)


def load(folder: Path) -> list[Row]:
    """Read the rows."""
    rows: list[Row] = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
    return rows


def save(folder: Path, rows: Sequence[Row]) -> None:
    """Write the rows and both tables."""
    # a recording process starts as a script and cannot import the examples
    from examples.markdown import between

    page, front = folder / "README.md", folder.parent / "README.md"
    text = between(page.read_text(encoding="utf-8"), table(rows), page.name, MARKERS)
    short = between(front.read_text(encoding="utf-8"), in_short(rows), front.name, IN_SHORT)
    (folder / "versions.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    front.write_text(short, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--python", help="interpreter to test with, or to make the environment with")
    parser.add_argument("--torch", help="make an environment with this version of torch in runs/")
    parser.add_argument("--processes", type=int, default=1, help="number of test processes")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.record:
        return record(options.record, options.rest)
    python = options.python
    if options.torch:
        name = f"torch-{options.torch}-{Path(python or sys.executable).resolve().name}"
        python = environment(python or sys.executable, options.torch, ROOT / "runs" / "versions" / name)
    rows = load(HERE)
    if python:
        several = ["-n", str(options.processes), "--dist", "loadfile"] if options.processes > 1 else []
        rows = replaced(rows, measured(python, ROOT, *several))
    save(HERE, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
