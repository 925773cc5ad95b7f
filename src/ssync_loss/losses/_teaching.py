"""What both halves of SSync share: one map is taught the labels of the other."""

import torch
from torch import Tensor

from ssync_loss._autocast import at_least_float32
from ssync_loss._backends import Backend
from ssync_loss._checks import (
    check_bool,
    check_integer,
    check_label_range,
    check_labels_present,
    check_same_device,
    check_shape,
)
from ssync_loss._criteria import Criterion
from ssync_loss._maps import Maps
from ssync_loss._types import PseudoLabels
from ssync_loss.distillation import distill


def teach(
    logits: Tensor,
    target: Tensor,
    region: Tensor,
    maps: Maps,
    *,
    criterion: Criterion,
    label_smoothing: float,
    temperature: float,
    backend: Backend,
) -> Tensor:
    """Return the mean distillation of one of the maps.

    Where a map held NaN or +inf, labels mean nothing: the loss, and every gradient of it, is NaN.
    """
    loss = distill(
        logits,
        target,
        region,
        criterion=criterion,
        label_smoothing=label_smoothing,
        temperature=temperature,
        slot_mask=maps.slot_mask,
        reduction="mean",
        backend=backend,
    )
    return loss * torch.where(maps.is_clean(), 1.0, float("nan")).to(loss.dtype)


def fitting_labels(labels: PseudoLabels, target_name: str, region_name: str, maps: Maps) -> PseudoLabels:
    """Check one term's half of labels computed before, and take out of its region what is not valid now."""
    if not isinstance(labels, PseudoLabels):
        raise TypeError(f"`labels` must be PseudoLabels; got {type(labels).__name__}.")
    target, region = getattr(labels, target_name), getattr(labels, region_name)
    size = dict(zip("BTSHW", maps.enc.shape, strict=True))
    num_slots = size.pop("S")
    check_shape(f"labels.{target_name}", target, "B T H W", **size)
    check_integer(f"labels.{target_name}", target)
    check_same_device(f"labels.{target_name}", target, enc_logits=maps.enc)
    check_label_range(f"labels.{target_name}", target, num_slots)
    check_shape(f"labels.{region_name}", region, "B T H W", **size)
    check_bool(f"labels.{region_name}", region)
    check_same_device(f"labels.{region_name}", region, enc_logits=maps.enc)
    counted = maps.counted
    if counted is not None:
        region = region & counted
    if maps.slot_mask is not None:
        check_labels_present(f"labels.{target_name}", target, region, maps.slot_mask)
    return labels._replace(**{region_name: region})


def attached_zero(*maps: Tensor) -> Tensor:
    """Return exactly 0 with a graph to the maps, whatever they hold; no cell is read.

    >>> attached_zero(torch.tensor([float("nan")], requires_grad=True)).item()
    0.0
    """
    total = at_least_float32(maps[0][:0]).sum()
    for one in maps[1:]:
        total = total + at_least_float32(one[:0]).sum()
    return total
