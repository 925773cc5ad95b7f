"""A cache for slow computations, a file per piece. An interrupted run loses only the current piece."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from examples.files import write_text, written_whole
from torch import Tensor


def default_cache() -> Path:
    """Return the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssync_loss"


class Pieces:
    """A folder of pieces. Its name contains a hash of their inputs, so pieces of different inputs never mix.

    Args:
        cache: the parent folder.
        name: readable beginning of the folder's name.
        made_from: all inputs of a piece except its number, as JSON. The folder's `made_from.json` holds them.
    """

    def __init__(self, cache: Path, name: str, made_from: dict[str, Any]) -> None:
        self.made_from = json.dumps(made_from, sort_keys=True, indent=1)
        key = hashlib.sha256(self.made_from.encode()).hexdigest()[:16]
        self.folder = cache / f"{name}-{key}"

    def path(self, number: int) -> Path:
        """Return the file of a piece."""
        return self.folder / f"{number:05d}.pt"

    def get(self, number: int, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Read a piece, or make and store it. A damaged piece is made again."""
        path = self.path(number)
        if path.exists():
            try:
                return dict(torch.load(path, weights_only=True))
            except Exception:
                # torch may raise anything on damaged bytes
                path.unlink()
        piece = make()
        self.put(number, piece)
        return piece

    def put(self, number: int, piece: dict[str, Tensor]) -> None:
        """Store a piece."""
        about = self.folder / "made_from.json"
        if not about.exists():
            write_text(about, self.made_from)
        with written_whole(self.path(number)) as partial:
            torch.save(piece, partial)
