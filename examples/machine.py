"""The origin of a result: machine, versions, commit and date, also as one line."""

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from examples.files import check_fields


def this_machine() -> dict[str, Any]:
    """Describe machine, versions, commit and date."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """Format the origin as the line that stands below every table.

    >>> machine_line({"cpu": "Abacus", "threads": 2, "torch": "2.13", "commit": "abc", "date": "2026-11-20"})
    'Abacus, 2 threads, torch 2.13, commit abc, 2026-11-20.'
    """
    gpu = f"{machine['gpu']}, " if machine.get("gpu") else ""
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] != 1)
    return f"{gpu}{machine['cpu']}, {threads}, torch {machine['torch']}, commit {machine['commit']}, {machine['date']}."


def check_origin(settings: Any, machine: Any, where: str) -> None:
    """Check the fields of the settings and the machine that tables print.

    Raises:
        ValueError: if a field is missing or has the wrong type; the message names it.
    """
    number = (int, float)
    counts = dict.fromkeys(("num_clips", "slots", "steps", "start_step"), number)
    check_fields(
        settings, counts | {"data": str, "threshold": (*number, type(None))}, f"{where}: `settings`", more=True
    )
    words = dict.fromkeys(("cpu", "torch", "commit", "date"), str)
    check_fields(machine, words | {"threads": int}, f"{where}: `machine`", more=True)


def cpu_name() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit of the code, with a mark if the working tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
