"""The golden files of the neighboring losses; see golden/neighbors/README.md."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden" / "neighbors"

LOSS_TOL = {torch.float32: 1e-6, torch.float64: 1e-10}
GRADIENT_TOL = {torch.float32: 5e-6, torch.float64: 1e-10}


class Golden:
    """One golden file."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz") as file:
            self.fields = {key: file[key] for key in file.files}

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return torch.from_numpy(np.asarray(self.fields[name])).to(dtype)

    def number(self, name: str) -> float:
        return float(self.fields[f"param_{name}"])

    def numbers(self, *names: str) -> dict[str, Any]:
        return {name: self.number(name) for name in names}

    def count(self, name: str) -> int:
        return int(self.fields[f"param_{name}"])

    def text(self, name: str, default: str) -> str:
        return str(self.fields.get(f"param_{name}", default))

    def assert_same_step(self, loss: Tensor, source: Tensor, name: str, *, loss_name: str = "loss") -> None:
        """Compare a loss, and its gradient with respect to the named input."""
        (gradient,) = torch.autograd.grad(loss, source)
        assert loss.dtype == source.dtype
        assert deviation(loss, self.tensor(f"{loss_name}_f64")) <= LOSS_TOL[source.dtype]
        assert deviation(gradient, self.tensor(f"grad_{name}_f64")) <= GRADIENT_TOL[source.dtype]


def golden_names(prefix: str, number: int) -> list[str]:
    """Return the names of the files with a prefix, after checking their number."""
    names = sorted(path.stem for path in FOLDER.glob(f"{prefix}*.npz"))
    assert len(names) == number, f"{prefix}*.npz: {names}"
    return names


def deviation(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a fraction of the largest expected magnitude."""
    worst = (actual.detach().double() - expected).abs().max().item()
    scale = expected.abs().max().item()
    if scale == 0:
        return 0.0 if worst == 0 else float("inf")
    return worst / scale
