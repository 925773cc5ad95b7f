"""Draw a monitored run: its values over the steps, and panels from start to end.

    python examples/monitored_run.py ssync_monitor             # writes ssync_monitor/run.png
    python examples/monitored_run.py ssync_monitor --out a.png

`ssync_loss.monitor.Monitor` writes that folder.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.image import imread

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lets this file run as a script

from examples.arguments import explained
from examples.files import must_be_writable, written_whole

from ssync_loss.monitor import VALUES

# title, columns, and whether the axis is logarithmic
GRAPHS = (
    ("slots and groups", ("enc_slots", "dec_slots", "enc_groups", "dec_groups"), False),
    ("shares of patches", ("agreement", "boundary_share", "interior_share", "enc_flips", "dec_flips"), False),
    ("margins", ("margin", "merged_margin"), False),
    ("gradients at the maps", ("enc_gradient", "host_enc_gradient", "dec_gradient", "host_dec_gradient"), True),
)
NUM_PANELS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Read a monitor's folder, and write one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that the monitor wrote")
    parser.add_argument("--out", type=Path, metavar="PICTURE.PNG", help="run.png in the folder if not given")
    options = parser.parse_args(arguments)
    out = options.out or options.folder / "run.png"
    with explained():
        values = read_values(options.folder / "values.csv")
        must_be_writable(out, "--out")
        save_figure(values, sorted(options.folder.glob("panel_*.png")), out)
    print(f"{len(values['step'])} logged steps: {out}")
    return 0


def read_values(path: Path) -> dict[str, list[float]]:
    """Read the columns of a monitor's file. Empty cells become NaN.

    Raises:
        ValueError: if it is not such a file.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        if not rows:
            raise ValueError("it holds no step")
        return {name: [float(row[name] or nan) for row in rows] for name in ("step", *VALUES)}
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} must be what a monitor wrote; it cannot be read: {error!r}.") from error


def save_figure(values: dict[str, list[float]], panels: Sequence[Path], path: Path) -> None:
    """Draw the graphs, and below them a few evenly spaced panels."""
    last = len(panels) - 1
    number = min(NUM_PANELS, len(panels))
    chosen = [panels[round(place * last / max(number - 1, 1))] for place in range(number)]
    figure = Figure(figsize=(16, 8 if chosen else 4), layout="constrained")
    grid = figure.add_gridspec(2 if chosen else 1, len(GRAPHS))
    for column, (title, names, is_wide) in enumerate(GRAPHS):
        axis = figure.add_subplot(grid[0, column])
        for name in names:
            if not all(map(isnan, values[name])):
                axis.plot(values["step"], values[name], label=name, marker="." if len(values["step"]) < 30 else "")
        axis.set_title(title)
        axis.set_xlabel("step")
        if is_wide:
            axis.set_yscale("symlog", linthresh=1e-6)
        if axis.lines:
            axis.legend(fontsize="small")
    for column, one in enumerate(chosen):
        axis = figure.add_subplot(grid[1, column])
        axis.imshow(imread(one), interpolation="nearest")
        axis.set_title(f"step {int(one.stem.partition('_')[2])}")
        axis.set_axis_off()
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=100, format="png")


if __name__ == "__main__":
    sys.exit(main())
