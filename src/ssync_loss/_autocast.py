"""Switch autocast off: losses are computed in float32."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# called at import, as torch 2.11 cannot compile the call
DEVICE_TYPES = [one for one in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(one)]


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast on the tensor's device.

    Matrix products of zeros and ones count patches; in half precision they round from 2048 (float16) or 256 (bfloat16)
    on.
    """
    device_type = tensor.device.type
    if device_type in DEVICE_TYPES and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a half-precision tensor as float32, and any other unchanged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
