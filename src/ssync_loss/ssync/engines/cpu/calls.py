"""Call the C functions of `engine.c` on tensors: pass pointers, shapes and strides."""

import ctypes
from ctypes import Structure, c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from ssync_loss.ssync.engines.cpu.library import load
from ssync_loss.ssync.engines.cpu.team import address_of_team

MAX_SLOTS = 64
KINDS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
# fields of `Call` that are settings
INTEGERS = ("min_different", "min_same", "max_different", "cross_entropy")
NUMBERS = ("label_smoothing", "temperature")


class _Tensor(Structure):
    _fields_ = (("data", c_void_p), ("kind", c_int64), ("strides", c_int64 * 5))


class _Call(Structure):
    """The fields of the C struct `Call`, in the same order."""

    _fields_ = (
        *((name, c_int64) for name in ("num_clips", "num_frames", "num_slots", "height", "width", "num_threads")),
        ("team", c_void_p),
        *((name, _Tensor) for name in ("enc", "dec", "valid")),
        *((name, c_void_p) for name in ("slot_mask", "clean", "knobs")),
        *((name, c_int64) for name in INTEGERS),
        *((name, c_double) for name in NUMBERS),
        *((name, _Tensor) for name in ("target", "region")),
        *((name, c_void_p) for name in ("boundary_mean", "interior_mean", "values", "counts", "grad_enc", "grad_dec")),
        *((name, c_void_p) for name in ("enc_labels", "dec_labels", "representative", "boundary", "interior")),
        *((name, c_void_p) for name in ("hard", "names", "found_clean")),
        *((name, c_int64) for name in ("reduction", "kind")),
        *((name, c_void_p) for name in ("targets", "sums", "selected", "dirty")),
        ("given", c_int64),
        ("scales", c_double * 2),
    )


def call(
    function: str, shape: torch.Size, dtype: torch.dtype, strided: dict[str, Tensor | None], **fields: Any
) -> None:
    """Run a function of the library, in float32 or float64.

    Args:
        function: name of the function, without the suffix for the type.
        shape: (B, T, S, H, W).
        dtype: the type of the computation.
        strided: fields of the call that are tensors with any strides.
        **fields: all other fields; a contiguous tensor is passed as its address.

    Raises: MemoryError if the function cannot allocate memory.
    """
    values = {
        name: value.data_ptr() if isinstance(value, Tensor) else value
        for name, value in fields.items()
        if value is not None
    }
    made = _Call(*shape, torch.get_num_threads(), address_of_team(), **values)
    for name, tensor in strided.items():
        if tensor is not None:
            _describe(getattr(made, name), tensor)
    suffix = "f64" if dtype == torch.float64 else "f32"
    if getattr(load(), f"ssync_{function}_{suffix}")(ctypes.byref(made)):
        raise MemoryError(f"no memory for engine 'cpu' on maps of shape {tuple(shape)}.")


def _describe(field: _Tensor, tensor: Tensor) -> None:
    field.data, field.kind = tensor.data_ptr(), KINDS.get(tensor.dtype, -1)
    *outer, height, width = tensor.stride()
    field.strides = outer[0], outer[1], outer[2] if len(outer) == 3 else 0, height, width
