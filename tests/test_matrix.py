"""Both tables of versions equal versions.json, and a row holds the results of pytest."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from examples.markdown import between

import matrix

START, END = matrix.MARKERS

TINY = """
import pytest


def test_good():
    pass


def test_with_a_bad_end(broken):
    pass


@pytest.fixture
def broken():
    yield
    assert False


@pytest.mark.compiles
@pytest.mark.parametrize("number", [1, 2, 3])
def test_compiled(number):
    assert number < 3


@pytest.mark.compiles
@pytest.mark.skip("a compiler takes other filters")
def test_left_out():
    pass


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.skipif(True, reason="torch 2.6 cannot")
def test_limit(number):
    pass


@pytest.mark.compiles
@pytest.mark.kernels
def test_kernels():
    pass


@pytest.mark.kernels
def test_kernels_of_a_newer_version():
    pytest.skip("needs Triton 9.9 or above")


@pytest.mark.kernels
@pytest.mark.cuda
@pytest.mark.skipif(True, reason="needs a CUDA device")
def test_gpu():
    pass


@pytest.mark.xfail
def test_known():
    assert False
"""


def counts(**some: int) -> dict[str, int]:
    return dict.fromkeys(matrix.OUTCOMES, 0) | some


def row(python: str = "3.11.7", torch: str = "2.13.0", **more: Any) -> matrix.Row:
    columns = {name: counts(passed=1) for name in matrix.COLUMNS.values()}
    rest = {"triton": "3.7.1", "date": "2026-01-31", "commit": "abcdef0", "failures": [], "limits": {}}
    return {"python": python, "torch": torch} | rest | columns | more


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Return a repository whose tests have every outcome."""
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    compiles\n    kernels\n    cuda\n")
    (folder / "test_tiny.py").write_text(TINY)
    (folder / "test_broken.py").write_text("import a_module_that_is_not_there\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "tiny"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("several", [[], ["-n", "2", "--dist", "loadfile"]], ids=["one process", "two"])
def test_a_row_holds_the_results(suite: Path, several: list[str]) -> None:
    found = matrix.measured(sys.executable, suite, *several)
    assert found["eager"] == counts(passed=1, skipped=3, failed=2)
    assert found["limits"] == {"torch 2.6 cannot": 2}
    assert found["compile"] == counts(passed=2, skipped=1, failed=1)
    assert found["Triton's kernels"] == counts(passed=1, untested=1)
    assert found["GPU"] == counts(untested=1)
    failures = ["test_broken.py", "test_tiny.py::test_compiled[3]", "test_tiny.py::test_with_a_bad_end"]
    assert found["failures"] == failures
    assert found["python"] == sys.version.split()[0]
    assert found["torch"] == matrix.installed("torch")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=suite, check=True, capture_output=True, text=True).stdout
    # the commit of that repository, perhaps with bytecode files as changes
    assert found["commit"].rstrip("+") == head[:7]


COMPILING = """
import pytest
import torch


def compiled():
    torch.compile(lambda one: one + 1, backend="eager")(torch.zeros(1))


def test_unmarked():
    compiled()


@pytest.mark.usefixtures("fresh_compiler")
def test_marked():
    compiled()
"""


def test_a_test_that_compiles_is_marked(suite: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), suite)
    (suite / "test_broken.py").unlink()
    (suite / "test_tiny.py").write_text(COMPILING)
    found = matrix.measured(sys.executable, suite, "-o", f"pythonpath={matrix.ROOT / 'src'}")
    assert found["eager"] == counts(failed=1)
    assert found["compile"] == counts(passed=1)
    assert found["failures"] == ["test_tiny.py::test_unmarked"]


def test_a_commit_with_changes_has_a_plus(suite: Path) -> None:
    clean = matrix.commit(suite)
    (suite / "tests").mkdir()
    (suite / "tests" / "versions.json").write_text("[]")
    assert matrix.commit(suite) == clean
    (suite / "test_tiny.py").write_text("")
    assert matrix.commit(suite) == f"{clean}+"


@pytest.mark.parametrize("arguments", [["--no-such-option"], ["no_such_file.py"]])
def test_a_failed_start_gives_no_row(suite: Path, arguments: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^no row: pytest with .* ended with exit status 4\.$"):
        matrix.measured(sys.executable, suite, *arguments)


def test_an_environment_without_the_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "installed", lambda _: None)
    assert matrix.main(["--record", str(tmp_path / "row.json"), "--", "-q"]) == 4
    assert "lacks the package: -m pip install --no-deps -e ." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of tests with one row, and pages with markers."""
    tests = tmp_path / "tests"
    tests.mkdir()
    monkeypatch.setattr(matrix, "HERE", tests)
    for page, (start, end) in ((tests, matrix.MARKERS), (tmp_path, matrix.IN_SHORT)):
        (page / "README.md").write_text(f"before\n{start}\ntyped\n{end}\nafter\n")
    matrix.save(tests, [row(torch="2.6.0")])
    return tests


class TestRows:
    def test_a_rerun_replaces_its_row(self) -> None:
        rows: list[matrix.Row] = []
        old = row(torch="2.6.0")
        for one in (row(), row("3.13.0", "2.14.1"), old, row("3.10.1", "2.14.1")):
            rows = matrix.replaced(rows, one)
        assert [one["torch"] for one in rows] == ["2.6.0", "2.13.0", "2.14.1", "2.14.1"]
        assert [one["python"] for one in rows[2:]] == ["3.10.1", "3.13.0"]
        patched = row("3.11.9", "2.6.1")
        assert matrix.replaced(rows, patched) == [patched, *rows[1:]]

    def test_a_cell_shows_nonzero_counts(self) -> None:
        assert matrix.cell(counts()) == "none"
        everything = counts(passed=4321, skipped=2, untested=3, failed=1)
        assert matrix.cell(everything) == "**1 failed**, 4,321 passed, 2 skipped, 3 untested"

    def test_the_table_names_failures(self) -> None:
        bad = row(triton=None, compile=counts(failed=1), failures=["tests/test_a.py::test_b"])
        head, line, first, second, *below = matrix.table([row(), bad]).split("\n")
        assert head == "| Python | torch | Triton | eager | compile | Triton's kernels | GPU | run |"
        assert line == "|---|---|---|---|---|---|---|---|"
        assert first == "| 3.11.7 | 2.13.0 | 3.7.1 | 1 passed | 1 passed | 1 passed | 1 passed | 2026-01-31, abcdef0 |"
        assert second.startswith("| 3.11.7 | 2.13.0 | none | 1 passed | **1 failed** |")
        assert below == ["", "Failed with Python 3.11.7, torch 2.13.0:", "", "- `tests/test_a.py::test_b`"]

    def test_the_short_table_has_marks(self) -> None:
        one = row(eager=counts(passed=1200, untested=3), compile=counts(passed=998, failed=2))
        del one["GPU"]
        assert matrix.in_short([one]).split("\n") == [
            "| Python | torch | eager | compile | Triton's kernels | GPU |",
            "|---|---|---|---|---|---|",
            "| 3.11.7 | 2.13.0 | ✓ | ✗ 2 of 1,000 | ✓ | untested |",
        ]
        assert matrix.cell({}) == "none"

    def test_the_table_lists_every_limit_once(self) -> None:
        one, other = row(limits={"torch 2.6 cannot": 7}), row(limits={"torch 2.6 cannot": 7, "Triton 3.9 spills": 1})
        lines = matrix.table([row(), one, other]).split("\n")
        limits = ["- torch 2.6 cannot (7 tests)", "- Triton 3.9 spills (1 test)"]
        assert lines[-5:] == ["", "What a version cannot do:", "", *limits]
        assert lines[:-5] == matrix.table([row(), row(), row()]).split("\n")

    @pytest.mark.parametrize("text", ["", START, f"{END}\n{START}"])
    def test_a_page_without_markers_is_unchanged(self, folder: Path, text: str) -> None:
        page, rows = folder / "README.md", folder / "versions.json"
        before = page.read_text(), rows.read_text()
        (folder.parent / "README.md").write_text(text)
        with pytest.raises(ValueError, match=r"^README.md must have one line '<!-- support"):
            matrix.save(folder, [row()])
        assert (page.read_text(), rows.read_text()) == before
        page.write_text(text)
        with pytest.raises(ValueError, match=r"^README.md must have one line '<!-- versions"):
            matrix.save(folder, [row()])
        assert (page.read_text(), rows.read_text()) == (text, before[1])


class TestCommand:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
        """Record the commands instead of running the suite and pip."""
        calls: list[tuple[str, ...]] = []

        def measured(python: str, root: Path, *arguments: str) -> matrix.Row:
            calls.append((python, *arguments))
            return row()

        monkeypatch.setattr(matrix, "measured", measured)
        monkeypatch.setattr(subprocess, "run", lambda command, **_: calls.append(tuple(command)))
        return calls

    def test_a_run_is_a_row(self, folder: Path, asked: list[tuple[str, ...]]) -> None:
        assert matrix.main(["--python", "py", "--processes", "2"]) == 0
        assert asked == [("py", "-n", "2", "--dist", "loadfile")]
        rows = [row(torch="2.6.0"), row()]
        assert matrix.load(folder) == rows
        page = (folder / "README.md").read_text()
        assert page == f"before\n{START}\n{matrix.table(rows)}\n{END}\nafter\n"
        front = (folder.parent / "README.md").read_text()
        start, end = matrix.IN_SHORT
        assert front == f"before\n{start}\n{matrix.in_short(rows)}\n{end}\nafter\n"

    def test_without_a_python_the_tables_are_rewritten(self, folder: Path, asked: list[tuple[str, ...]]) -> None:
        page = (folder / "README.md").read_text()
        (folder / "README.md").write_text(page.replace("2.6.0", "9.9.9"))
        assert matrix.main([]) == 0
        assert (folder / "README.md").read_text() == page
        assert not asked

    def test_an_environment_has_the_wanted_torch(
        self, folder: Path, asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(matrix, "ROOT", folder)
        assert matrix.main(["--torch", "2.6.0", "--python", "python3.10"]) == 0
        made = folder / "runs" / "versions" / "torch-2.6.0-python3.10"
        python, pin = str(made / "bin" / "python"), made / "constraints.txt"
        assert asked == [
            ("python3.10", "-m", "venv", str(made)),
            (python, "-m", "pip", "install", "-q", "-c", str(pin), "-e", f"{folder}[test]"),
            (python,),
        ]
        assert pin.read_text() == "torch==2.6.0\n"


def test_the_committed_tables_equal_the_rows() -> None:
    text, front = ((folder / "README.md").read_text() for folder in (matrix.HERE, matrix.ROOT))
    rows = matrix.load(matrix.HERE)
    assert text == between(text, matrix.table(rows), "README.md", matrix.MARKERS)
    assert front == between(front, matrix.in_short(rows), "README.md", matrix.IN_SHORT)


def test_the_marks_of_columns_exist(pytestconfig: pytest.Config) -> None:
    known = {one.partition(":")[0] for one in pytestconfig.getini("markers")}
    assert {mark for mark in matrix.COLUMNS if mark} <= known
