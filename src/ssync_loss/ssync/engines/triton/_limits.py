"""The requirements of the kernels on maps and machines. Nothing here reads data, so a compiler can trace it."""

import os
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

MAX_SLOTS = 64
# int32 numbers count the patches of a clip, including those of the last tile that exceed the clip
MAX_PATCHES = 2**30
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# torch.compile has the same requirement
MIN_CAPABILITY = 7

# the oldest Triton that compiled and ran the kernels in tests; torch 2.10 installs it
MIN_VERSION = (3, 6)
NO_VERSION = (0, 0)
INSTALLED = find_spec("triton") is not None
# torch calls devices of NVIDIA and of AMD "cuda"
IS_ROCM = torch.version.hip is not None
# triton reads this variable when a kernel is defined
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def triton_version() -> tuple[int, int]:
    """Return the first two numbers of Triton's version without importing it; zeros if it has none."""
    for name in ("triton", "pytorch-triton"):
        with suppress(PackageNotFoundError):
            major, minor = re.findall(r"\d+", version(name))[:2]
            return int(major), int(minor)
    return NO_VERSION


# a constant, as a compiler cannot call the function
VERSION = triton_version()


def missing(*maps: Tensor) -> str | None:
    """Return a requirement of the kernels that maps (B, T, S, H, W) or the machine do not meet, or None.

    >>> missing(torch.zeros(1, 1, 4, 2, 2, dtype=torch.float64)) is None
    False
    """
    if not INSTALLED:
        return "the package triton, which is not installed"
    if NO_VERSION < VERSION < MIN_VERSION:
        return "Triton {}.{} or above; got {}.{}".format(*MIN_VERSION, *VERSION)
    for one in maps:
        lack = _lack_of_device(one.device) or _lack_of_form(one)
        if lack is not None:
            return lack
    return None


def _lack_of_device(device: torch.device) -> str | None:
    if device.type == "cpu" and INTERPRETED:
        return None
    if device.type != "cuda":
        return f"a CUDA tensor; got {device.type}"
    if IS_ROCM:
        return "a CUDA tensor; got one of ROCm"
    # a fake tensor may name a GPU on a machine without one
    if torch.cuda.is_available():
        # a compiler can trace this, but not `get_device_capability`
        gpu = torch.cuda.get_device_properties(device)
        if gpu.major < MIN_CAPABILITY:
            return f"a GPU of compute capability {MIN_CAPABILITY}.0 or above; got {gpu.major}.{gpu.minor}"
    return None


def _lack_of_form(maps: Tensor) -> str | None:
    _, num_frames, num_slots, height, width = maps.shape
    if maps.dtype not in DTYPES:
        return f"float16, bfloat16 or float32; got {maps.dtype}"
    if num_slots > MAX_SLOTS:
        return f"S <= {MAX_SLOTS}; got S={num_slots}"
    if num_frames * height * width > MAX_PATCHES:
        return f"T*H*W <= {MAX_PATCHES}; got {num_frames * height * width}"
    return None
