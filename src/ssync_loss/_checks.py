"""Checks of arguments. Every message names the argument, the wanted value and the given value."""

import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def check_shape(name: str, tensor: Tensor, axes: str, **sizes: int) -> dict[str, int]:
    """Bind the axes of a tensor to names, e.g. ``"B T S H W"``, and require known sizes.

    A name that occurs twice requires equal sizes. Returns the known sizes and the bound sizes.

    >>> check_shape("labels", torch.zeros(2, 3), "B N", B=2)
    {'B': 2, 'N': 3}
    >>> check_shape("labels", torch.zeros(2, 3), "B N", B=4)
    Traceback (most recent call last):
    ValueError: `labels` must have shape (B=4, N); got (2, 3).
    """
    check_tensor(name, tensor)
    names = axes.split()
    shape = tuple(tensor.shape)
    bound = dict(sizes)
    pairs = zip(names, shape, strict=False)
    if len(shape) != len(names) or any(bound.setdefault(axis, size) != size for axis, size in pairs):
        wanted = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in names)
        raise ValueError(f"`{name}` must have shape ({wanted}); got {shape}.")
    return bound


def check_tensor(name: str, tensor: object) -> None:
    """Require a dense tensor: not sparse, nested, quantized or of oneDNN."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{name}` must be a tensor; got {type(tensor).__name__}.")
    if tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else tensor.layout
        raise TypeError(f"`{name}` must be a dense tensor; got a {kind} one.")


def check_type(name: str, value: object, wanted: type, *, optional: bool = False) -> None:
    """Require an object of a class, or None if ``optional``."""
    if not (isinstance(value, wanted) or (optional and value is None)):
        raise TypeError(f"`{name}` must be {wanted.__name__}; got {type(value).__name__}.")


def check_not_empty(name: str, sizes: dict[str, int], axes: str) -> None:
    for axis in axes.split():
        if sizes[axis] < 1:
            raise ValueError(f"`{name}` must have {axis} >= 1; got {axis}={sizes[axis]}.")


# a bound instead of `isfinite`, which fails for huge integers, and which torch 2.6 cannot compile
LARGEST = sys.float_info.max
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(name: str, tensor: Tensor) -> None:
    """Require a floating-point tensor of 16, 32 or 64 bits."""
    if not tensor.is_floating_point():
        raise TypeError(f"`{name}` must be floating point; got {tensor.dtype}.")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"`{name}` must have 16, 32 or 64 bits; got {tensor.dtype}.")


INTEGERS = tuple(getattr(torch, f"{sign}int{bits}") for bits in (8, 16, 32, 64) for sign in ("", "u"))


def check_integer(name: str, tensor: Tensor) -> None:
    """Require an integer tensor of 8 to 64 bits (bool does not count)."""
    if tensor.dtype not in INTEGERS:
        raise TypeError(f"`{name}` must hold integers; got {tensor.dtype}.")


def as_index(name: str, tensor: Tensor) -> Tensor:
    """Require an integer tensor and return it as int64, as torch lacks operators for other integers.

    A number that int64 cannot hold is an error if :func:`read_numbers` can see it; otherwise it becomes negative.
    """
    check_integer(name, tensor)
    index = tensor.to(torch.int64)
    if tensor.dtype == torch.uint64:
        values = read_numbers(index)
        if values is not None and bool((values < 0).any()):
            raise ValueError(f"`{name}` must lie below 2**63; got {int(values.min()) % 2**64}.")
    return index


def check_bool(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.bool:
        raise TypeError(f"`{name}` must be boolean; got {tensor.dtype}.")


def check_same_device(name: str, tensor: Tensor, **beside: Tensor) -> None:
    for other_name, other in beside.items():
        if tensor.device != other.device:
            raise ValueError(f"`{name}` must be on the device of `{other_name}` ({other.device}); got {tensor.device}.")


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Require a Python integer within [low, high]; a bool is no integer here."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer; got {type(value).__name__}.")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"within [{low}, {high}]"
        raise ValueError(f"`{name}` must be {wanted}; got {value}.")


def check_number(name: str, value: object, low: float, high: float | None = None, *, open_low: bool = False) -> None:
    """Require a finite Python number within [low, high], or above low when ``open_low``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number; got {type(value).__name__}.")
    inside = (value > low if open_low else value >= low) and value <= LARGEST
    if not inside or (high is not None and value > high):
        above = f"finite and {'above' if open_low else 'at least'} {low}"
        wanted = above if high is None else f"within [{low}, {high}]"
        raise ValueError(f"`{name}` must be {wanted}; got {value}.")


def check_flag(name: str, value: object) -> None:
    """Require True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False; got {type(value).__name__}.")


def has_ranks() -> bool:
    """Tell whether a process group is initialized."""
    return dist.is_available() and dist.is_initialized()


def check_group(name: str, group: object) -> None:
    """Require None, or a process group that this rank is in."""
    in_group = has_ranks()
    if group is not None and not (in_group and isinstance(group, dist.ProcessGroup)):
        wanted = "a process group of this rank" if in_group else "None where no process group is initialized"
        raise TypeError(f"`{name}` must be {wanted}; got {group!r}.")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {listed}; got {value!r}.")


def check_positive(name: str, tensor: Tensor) -> None:
    """Require numbers above 0, if :func:`read_numbers` can see them; NaN passes."""
    values = read_numbers(tensor)
    if values is not None and (lowest := values.min().item()) <= 0:
        raise ValueError(f"`{name}` must be above 0 everywhere; got {lowest}.")


def check_nonnegative(name: str, tensor: Tensor) -> None:
    """Require numbers of at least 0, if :func:`read_numbers` can see them; NaN and infinities pass."""
    # torch has no minimum for some unsigned types
    values = read_numbers(tensor) if tensor.dtype.is_signed else None
    if values is not None and float("-inf") < (lowest := values.min().item()) < 0:
        raise ValueError(f"`{name}` must be at least 0; got {lowest}.")


def check_label_range(name: str, labels: Tensor, num_slots: int) -> None:
    """Require slot labels within [0, num_slots), if :func:`read_numbers` can see them.

    Otherwise an index out of range triggers an assertion of the device.
    """
    values = read_numbers(labels)
    if values is None:
        return
    low, high = (int(bound) for bound in as_index(name, values).aminmax())
    if low < 0 or high >= num_slots:
        raise ValueError(f"`{name}` must lie within [0, {num_slots - 1}]; got values from {low} to {high}.")


def check_labels_present(name: str, labels: Tensor, region: Tensor, slot_mask: Tensor) -> None:
    """Require labels of a region to name present slots, if all can be read; clips without a slot are left out."""
    if any(read_numbers(one) is None for one in (labels, region, slot_mask)):
        return
    present = slot_mask.gather(1, labels.flatten(1).long()).view(labels.shape)
    absent = region & ~present & slot_mask.any(1)[:, None, None, None]
    if absent.any():
        clip, *_ = first = tuple(absent.nonzero()[0].tolist())
        slots = slot_mask[clip].nonzero().flatten().tolist()
        raise ValueError(
            f"`{name}` must name present slots on selected patches, one of {slots} in clip {clip}; "
            f"got {int(labels[first])}."
        )


def check_equal_counts(name: str, mask: Tensor) -> None:
    """Require a mask (B, T, N) to keep as many positions in each frame, if :func:`read_numbers` can see it."""
    kept = read_numbers(mask)
    low, high = (0, 0) if kept is None else (int(one) for one in kept.sum(2).aminmax())
    if low != high:
        raise ValueError(f"`{name}` must keep the same number of positions in every frame; got {low} to {high}.")


def read_numbers(tensor: Tensor) -> Tensor | None:
    """Return the numbers of a tensor if reading them waits for no device and breaks no trace, else None.

    The numbers must be in CPU memory, see :func:`memory_of`. An empty tensor gives None.
    """
    return tensor.detach().as_subclass(Tensor) if memory_of(tensor) == "cpu" and tensor.numel() > 0 else None


def memory_of(tensor: Tensor) -> str | None:
    """Return the type of the device whose memory holds a tensor's numbers.

    Fake tensors, and tensors inside a trace, vmap, grad or functionalize, have no numbers: the result is None.
    """
    traced = torch.compiler.is_compiling() or torch._C._is_tracing()
    if traced or any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack()):
        return None
    try:
        storage = tensor.untyped_storage()
        kind: str = storage.device.type
        # the storage of a fake tensor is on meta; asking for its address would warn
        return kind if kind != "meta" and storage.data_ptr() != 0 else None
    except (NotImplementedError, RuntimeError):
        # a wrapper has no storage
        return None
