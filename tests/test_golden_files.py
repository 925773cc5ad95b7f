"""The READMEs of the tests name every file, and no other."""

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


def test_every_test_file_is_said_to_be_there() -> None:
    named = [name for row in rows(TESTS / "README.md") for name in re.findall(r"`([\w*]+\.py)`", row)]
    matched = [path.name for name in named for path in TESTS.glob(name)]
    assert all(list(TESTS.glob(name)) for name in named)
    assert sorted(matched) == sorted(path.name for path in TESTS.glob("test_*.py"))
