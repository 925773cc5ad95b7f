"""The READMEs of the golden files list exactly these files, and every test file has a docstring."""

import re
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parent


def rows(readme: Path) -> list[str]:
    """Return the first cells of a README's tables."""
    return re.findall(r"^\| (`.*?) \|", readme.read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("folder", ["golden", "golden/neighbors"])
def test_the_readme_lists_every_golden_file(folder: str) -> None:
    there = sorted(path.stem for path in (TESTS / folder).glob("*.npz"))
    named = [name for row in rows(TESTS / folder / "README.md") for name in re.findall(r"`([\w*]+)`", row)]
    matched = [path.stem for name in named for path in (TESTS / folder).glob(f"{name}.npz")]
    assert all(list((TESTS / folder).glob(f"{name}.npz")) for name in named)
    assert sorted(matched) == there
    assert there


def test_golden_files_hold_only_numbers_and_text() -> None:
    for path in TESTS.glob("golden/**/*.npz"):
        with np.load(path, allow_pickle=False) as file:
            kinds = {file[key].dtype.kind for key in file.files}
        assert kinds <= set("fibU"), path.name


def test_every_test_file_has_its_own_docstring() -> None:
    lines = [path.read_text(encoding="utf-8").partition("\n")[0] for path in TESTS.glob("test_*.py")]
    assert [line for line in lines if not re.match(r'"""[`A-Z]\S* .*\w', line)] == []
    assert len({*lines}) == len(lines) > 50
