"""The golden files as arguments and expected results; see golden/README.md."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))


class GoldenCase(NamedTuple):
    """One golden file: maps (B, T, S, H, W), the arguments for the labels, and the results."""

    enc_logits: Tensor
    dec_logits: Tensor
    label_args: dict[str, Any]
    temperature: float
    # labels are int64, gradients (B, T, S, H, W); the loss of an empty region is 0
    expected: dict[str, Tensor]


def load_golden(name: str) -> GoldenCase:
    """Read one golden file."""
    with np.load(FOLDER / f"{name}.npz") as file:
        raw = {key: file[key] for key in file.files if key != "note"}
    shape = (*raw["enc_logits"].shape[:3], int(raw["H"]), int(raw["W"]))
    expected = {key: torch.from_numpy(np.asarray(value)) for key, value in raw.items()}
    for key, value in expected.items():
        if "labels" in key and key != "f64_labels_agree":
            expected[key] = value.long()
        elif key.startswith("grad_"):
            expected[key] = value.reshape(shape)
        elif key.startswith("loss_"):
            expected[key] = value.nan_to_num(nan=0.0)
    return GoldenCase(
        enc_logits=expected.pop("enc_logits").reshape(shape),
        dec_logits=expected.pop("dec_logits").reshape(shape),
        label_args={
            "merge_threshold": float(raw["thr"]),
            "min_different": int(raw["n_bd"]),
            "min_same": int(raw["n_bd_noise"]),
            "max_different": int(raw["n_nbd"]) - 1,
        },
        temperature=float(raw["temperature"]),
        expected=expected,
    )
