"""The arguments of `.ci/run`, and the test files that it names."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / ".ci" / "run"


def test_the_fast_run_names_existing_tests() -> None:
    (names,) = re.findall(r"tests/test_\{([\w,]+)\}\.py", RUN.read_text())
    named = names.split(",")
    assert named == sorted(set(named))
    assert [name for name in named if not (Path(__file__).parent / f"test_{name}.py").exists()] == []


def test_the_fast_run_stops_at_the_first_failure_and_runs_all_steps(tmp_path: Path) -> None:
    # the python of this copy records its arguments
    (tmp_path / ".ci").mkdir()
    shutil.copy(RUN, tmp_path / ".ci")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)

    def steps(failing: str) -> tuple[int, list[str]]:
        log = tmp_path / "log"
        log.write_text("")
        python.write_text(f'#!/bin/sh\necho "$2" >> {shlex.quote(str(log))}\n[ "$2" != {failing} ]\n')
        python.chmod(0o755)
        return subprocess.run([tmp_path / ".ci" / "run", "--fast"], check=False).returncode, log.read_text().split()

    assert steps("nothing") == (0, ["ruff", "ruff", "mypy", "pytest"])
    assert steps("mypy") == (1, ["ruff", "ruff", "mypy"])


@pytest.mark.parametrize("words", [["--quick"], ["--slow", "--fast"], ["--fast", "--slow"]])
def test_other_arguments_are_refused(words: list[str], tmp_path: Path) -> None:
    # run in a folder without the project
    (tmp_path / ".ci").mkdir()
    done = subprocess.run([shutil.copy(RUN, tmp_path / ".ci"), *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: .ci/run [--fast]\n")
