"""What takes long to compute, kept in a folder a piece at a time: whoever stops half-way loses the piece at hand."""

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
    """Name the user's folder for what can be computed again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssync_loss"


class Pieces:
    """A folder of pieces, named after what they are made from: other data never meet.

    Args:
        cache: where the folder goes.
        name: how its name begins, for people.
        made_from: all that a piece depends on but its number, as JSON has it. `made_from.json` says it, too.
    """

    def __init__(self, cache: Path, name: str, made_from: dict[str, Any]) -> None:
        self.made_from = json.dumps(made_from, sort_keys=True, indent=1)
        key = hashlib.sha256(self.made_from.encode()).hexdigest()[:16]
        self.folder = cache / f"{name}-{key}"

    def path(self, number: int) -> Path:
        """Name the file of a piece."""
        return self.folder / f"{number:05d}.pt"

    def get(self, number: int, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Read a piece, or make it and keep it. A damaged one is made again."""
        path = self.path(number)
        if path.exists():
            try:
                return dict(torch.load(path, weights_only=True))
            except Exception:
                # whatever bytes there are: torch raises what it likes
                path.unlink()
        piece = make()
        self.put(number, piece)
        return piece

    def put(self, number: int, piece: dict[str, Tensor]) -> None:
        """Keep a piece."""
        about = self.folder / "made_from.json"
        if not about.exists():
            write_text(about, self.made_from)
        with written_whole(self.path(number)) as partial:
            torch.save(piece, partial)
