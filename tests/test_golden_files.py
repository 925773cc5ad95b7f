"""The READMEs of the golden files name every file, and no other; test files say what they are for."""

import re
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parent


def rows(readme: Path) -> list[str]:
    """Return the first cells of a README's tables."""
    return re.findall(r"^\| (`.*?) \|", readme.read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("folder", ["golden", "golden/neighbors"])
def test_every_golden_file_is_said_to_be_there(folder: str) -> None:
    there = sorted(path.stem for path in (TESTS / folder).glob("*.npz"))
    named = [name for row in rows(TESTS / folder / "README.md") for name in re.findall(r"`([\w*]+)`", row)]
    matched = [path.stem for name in named for path in (TESTS / folder).glob(f"{name}.npz")]
    assert all(list((TESTS / folder).glob(f"{name}.npz")) for name in named)
    assert sorted(matched) == there
    assert there


def test_golden_files_hold_numbers_and_remarks_alone() -> None:
    for path in TESTS.glob("golden/**/*.npz"):
        with np.load(path, allow_pickle=False) as file:
            kinds = {file[key].dtype.kind for key in file.files}
        assert kinds <= set("fibU"), path.name


def test_every_test_file_says_in_its_first_line_what_it_checks() -> None:
    lines = [path.read_text(encoding="utf-8").partition("\n")[0] for path in TESTS.glob("test_*.py")]
    assert [line for line in lines if not re.match(r'"""[`A-Z]\S* .*\w', line)] == []
    assert len({*lines}) == len(lines) > 50
