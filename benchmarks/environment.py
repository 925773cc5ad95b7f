"""What a number must travel with: the machine, the versions, the code and the date."""

import hashlib
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from examples.machine import cpu_name

ROOT = Path(__file__).resolve().parents[1]
# what a result depends on; the report and the results themselves do not belong to it
CODE = ("src/ssync_loss", "benchmarks", "examples")
LANGUAGES = ("py", "c")
# by name, without the ending
REPORT = ("report", "figure", "bars", "tables", "add_on_tables", "cells", "markdown", "weak_spots")

# glibc hands large blocks back to the system and takes fresh pages at the next step: each costs a fault, from a
# size on, which bends the slope of time. Below these thresholds memory stays with the process.
RAISED_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def describe(device: str) -> dict[str, Any]:
    """Describe where and on what code this runs."""
    gpu = cuda = None
    if device == "cuda":
        gpu, cuda = torch.cuda.get_device_name(), torch.version.cuda
    return {
        "device": device,
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "memory_gb": round(total_memory() / 1e9),
        "gpu": gpu,
        "cuda": cuda,
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".rstrip(", "),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _git("rev-parse", "--short=10", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--", *_globs())),
        "sources": sources_digest(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def sources_digest(root: Path = ROOT) -> str:
    """Fingerprint the measured and the measuring code: it also tells two uncommitted states apart."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted(one for end in LANGUAGES for one in (root / folder).rglob(f"*.{end}")):
            if path.stem not in REPORT:
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def total_memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _globs() -> list[str]:
    return [f":(glob){folder}/**/*.{end}" for folder in CODE for end in LANGUAGES]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
