"""The picture of a monitored run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from examples import monitored_run
from matplotlib.figure import Figure
from PIL import Image

from ssync_loss import SSyncLoss
from ssync_loss.monitor import Monitor


def watch(folder: Path, *, steps: int, **given: Any) -> None:
    monitor = Monitor(SSyncLoss(), every=10, to=folder)
    for step in range(0, steps, 10):
        enc, dec = (torch.randn(1, 2, 3, 4, 4, requires_grad=True) for _ in range(2))
        monitor((enc, dec), step=step, loss=(enc + dec).square().mean(), **given)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the figures of a run."""
    figures: list[Any] = []
    whole = Figure.savefig

    def save(figure: Any, *given: Any, **named: Any) -> None:
        figures.append(figure)
        whole(figure, *given, **named)

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


def test_the_picture_has_graphs_and_panels(tmp_path: Path, drawn: list[Any]) -> None:
    watch(tmp_path, steps=70, video=torch.rand(1, 2, 3, 8, 8), features=torch.randn(1, 2, 5, 4, 4))
    assert monitored_run.main([str(tmp_path)]) == 0
    with Image.open(tmp_path / "run.png") as picture:
        picture.verify()
    (figure,) = drawn
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:4] == [title for title, *_ in monitored_run.GRAPHS]
    # four of seven panels, including the first and the last
    assert titles[4:] == ["step 0", "step 20", "step 40", "step 60"]
    values = monitored_run.read_values(tmp_path / "values.csv")
    assert values["step"] == [0, 10, 20, 30, 40, 50, 60]
    lines = {line.get_label(): line for axis in figure.axes[:4] for line in axis.lines}
    assert lines["margin"].get_ydata().tolist() == values["margin"]
    assert lines["dec_gradient"].get_xdata().tolist() == values["step"]
    # without a host's loss there are no such gradients
    assert not {"host_enc_gradient", "host_dec_gradient"} & lines.keys()


def test_a_run_with_one_step_and_no_panel(tmp_path: Path, drawn: list[Any]) -> None:
    watch(tmp_path / "run", steps=1)
    assert monitored_run.main([str(tmp_path / "run"), "--out", str(tmp_path / "new" / "a.png")]) == 0
    assert (tmp_path / "new" / "a.png").exists()
    assert len(drawn[0].axes) == 4


def test_foreign_files_end_with_one_line(tmp_path: Path) -> None:
    for content in (None, "step,loss\n0,1\n", "\0", "a\n"):
        if content is not None:
            (tmp_path / "values.csv").write_text(content, encoding="utf-8")
        with pytest.raises(SystemExit, match=r"^error: .*values.csv must be what a monitor wrote"):
            monitored_run.main([str(tmp_path)])
    assert not (tmp_path / "run.png").exists()
