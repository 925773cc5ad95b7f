"""The short examples run, and their claims hold."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from examples import property_test
from torch import Tensor

from own_code import own_code

EXAMPLES = Path(property_test.__file__).parent


@pytest.mark.parametrize("name", ["linear_vs_quadratic.py", "property_test.py", "quickstart.py"])
def test_an_example_is_short_and_in_the_table(name: str) -> None:
    assert own_code(EXAMPLES / name) < 40
    assert f"| `{name}`" in (EXAMPLES / "README.md").read_text()


def printed_by(name: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    runpy.run_path(str(EXAMPLES / name))
    return capsys.readouterr().out.splitlines()


def test_the_quickstart_trains(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line.replace(",", "").split() for line in printed_by("quickstart.py", capsys)]
    assert [int(row[1].rstrip(":")) for row in rows] == list(range(20, 201, 20))
    own, ssync = ([float(row[column]) for row in rows] for column in (4, 6))
    assert own[-1] < own[0]
    # the loss starts at step 60 and is positive from there on
    assert ssync[:3] == [0, 0, 0]
    assert ssync[3] > ssync[-1] > 0


def test_one_cost_is_linear_and_the_other_quadratic(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line.replace(",", "").split() for line in printed_by("linear_vs_quadratic.py", capsys)[2:]]
    assert [int(row[0]) for row in rows] == [4**k for k in range(4, 9)]
    assert [row[2] == "-" for row in rows] == [False, False, False, True, True]
    ssync, dense = [float(row[1]) for row in rows], [float(row[2]) for row in rows[:3]]
    # 16 times the patches have 256 times the pairs
    assert dense[2] > 20 * dense[0]
    assert ssync[4] < dense[2]


class TestPropertyTest:
    def test_the_command(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "examples/property_test.py"]
        done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout
        assert "2 passed" in done.stdout

    @pytest.mark.parametrize("mistake", ["not transitive", "not strict", "the last of equals", "the first slot"])
    def test_a_wrong_merging_is_found(self, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
        right = property_test.my_merging

        def wrong(overlap: Tensor, area: Tensor, threshold: float | None) -> Tensor:
            if mistake == "the last of equals":
                return area.shape[1] - 1 - right(overlap.flip(1, 2), area.flip(1), threshold).flip(1)
            if mistake == "the first slot":
                return right(overlap, torch.zeros_like(area), threshold)
            if mistake == "not strict" and threshold is not None:
                return right(overlap, area, threshold - 1e-6)
            if mistake == "not transitive" and threshold is not None:
                linked = (overlap > threshold) | torch.eye(area.shape[1], dtype=torch.bool)
                return torch.where(linked, area[:, None], -1).max(dim=2).indices
            return right(overlap, area, threshold)

        monkeypatch.setattr(property_test, "my_merging", wrong)
        with pytest.raises(AssertionError):
            property_test.test_merging_equals_the_reference()
