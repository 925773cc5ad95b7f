"""Statistics of the pseudo-labels of a step, as tensors for a logger."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssync_loss._checks import as_index, check_nonnegative, check_not_empty, check_shape, check_type
from ssync_loss._inputs import check_labels, check_mask
from ssync_loss.ssync.maps import check_slot_mask, check_valid
from ssync_loss.ssync.types import PseudoLabels


class Summary(NamedTuple):
    """Statistics of pseudo-labels, one value per clip. Shares are shares of the clip's valid patches.

    Attributes:
        boundary_share: (B,), where the encoder teaches the decoder.
        interior_share: (B,), where the decoder teaches the encoder.
        untaught_share: (B,), where neither teaches the other.
        agreement: (B,), where both maps have the same merged label.
        enc_slots, dec_slots: (B,) int64, number of different merged labels in each map.
        merges: (B,) int64, number of slots that merging renames.
        enc_flips, dec_flips: (B,), share of patches whose label changes from one frame to the next.

    Raises: nothing; fields are not checked.

    >>> labels, none = torch.tensor([[[[0, 1]]]]), torch.zeros(1, 1, 1, 2, dtype=torch.bool)
    >>> found = summary(PseudoLabels(labels, labels, ~none, none, torch.tensor([[0, 1]])))
    >>> found.enc_slots.item(), found.boundary_share.item()
    (2, 1.0)
    """

    boundary_share: Tensor
    interior_share: Tensor
    untaught_share: Tensor
    agreement: Tensor
    enc_slots: Tensor
    dec_slots: Tensor
    merges: Tensor
    enc_flips: Tensor
    dec_flips: Tensor


def summary(labels: PseudoLabels, *, valid: Tensor | None = None, slot_mask: Tensor | None = None) -> Summary:
    """Summarize pseudo-labels per clip, without waiting for the device.

    All values describe the labels *after* merging. The means over the batch, for a logger, are
    ``{f"ssync/{name}": value.float().mean() for name, value in summary(labels)._asdict().items()}``.

    Shape: valid: (B, T) or (B, T, H, W) bool. slot_mask: (B, S) bool. Returns (B,) tensors; a share without any patch
        is 0.

    ``labels`` come from ``pseudo_labels`` or ``SSyncLoss.terms``, with the same ``valid`` and ``slot_mask``. A clip
    without any slot has no valid patch.

    Raises: TypeError, ValueError if ``labels`` are no PseudoLabels, or a dtype, shape or device does not fit.

    >>> row = torch.tensor([[[[0, 0, 1, 1]]]])
    >>> everywhere = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    >>> labels = PseudoLabels(row, row.flip(-1), everywhere, ~everywhere, torch.tensor([[0, 1, 1]]))
    >>> {name: value.item() for name, value in summary(labels)._asdict().items()}["merges"]
    1
    """
    check_type("labels", labels, PseudoLabels)
    size = check_shape("labels.enc_labels", labels.enc_labels, "B T H W")
    check_shape("labels.dec_labels", labels.dec_labels, "B T H W", **size)
    check_mask("labels.boundary", labels.boundary, "B T H W", size)
    check_mask("labels.interior", labels.interior, "B T H W", size)
    size = check_shape("labels.representative", labels.representative, "B S", **size)
    enc, dec, representative = (
        as_index(f"labels.{name}", getattr(labels, name)) for name in ("enc_labels", "dec_labels", "representative")
    )
    if slot_mask is not None:
        check_slot_mask(slot_mask, size, representative=representative)
        valid = valid_patches(valid, enc) & slot_mask.any(1)[:, None, None, None]
    return Summary(
        boundary_share=region_share(labels.boundary, valid=valid),
        interior_share=region_share(labels.interior, valid=valid),
        untaught_share=region_share(~(labels.boundary | labels.interior), valid=valid),
        agreement=agreement(enc, dec, valid=valid),
        enc_slots=slots_in_use(enc, valid=valid),
        dec_slots=slots_in_use(dec, valid=valid),
        merges=merges(representative),
        enc_flips=label_flips(enc, valid=valid),
        dec_flips=label_flips(dec, valid=valid),
    )


def region_share(region: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Share of a clip's valid patches that lie in a region: ``(region & valid).sum() / valid.sum()``.

    Shape: region: (B, T, H, W), bool, for example ``PseudoLabels.boundary``. valid: (B, T) or (B, T, H, W) bool.
        Returns (B,), float32; 0 for a clip without a valid patch.

    Raises: TypeError, ValueError if a dtype, shape or device does not fit.

    >>> region_share(torch.tensor([[[[True, False, False, False]]]])).tolist()
    [0.25]
    """
    check_mask("region", region, "B T H W", {})
    return _share(region, valid_patches(valid, region))


def agreement(enc_labels: Tensor, dec_labels: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Share of a clip's valid patches with the same label in both maps: ``mean(enc == dec)``.

    Shape: enc_labels, dec_labels: (B, T, H, W), integer. ``valid``, results and errors are as in :func:`region_share`.

    >>> agreement(torch.tensor([[[[0, 0, 1, 1]]]]), torch.tensor([[[[0, 0, 0, 1]]]])).tolist()
    [0.75]
    """
    size = check_labels("enc_labels", enc_labels, "B T H W", {})
    check_labels("dec_labels", dec_labels, "B T H W", size, enc_labels=enc_labels)
    same = as_index("enc_labels", enc_labels) == as_index("dec_labels", dec_labels)
    return _share(same, valid_patches(valid, enc_labels))


def slots_in_use(labels: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Count the different labels on a clip's valid patches.

    A slot is in use if it wins a patch of the clip. Labels before merging count slots, labels after merging groups.

    Shape: labels: (B, T, H, W), integer >= 0. valid: (B, T) or (B, T, H, W) bool. Returns (B,), int64; 0 for a clip
        without a valid patch.

    Raises: TypeError, ValueError if a dtype, shape or device does not fit, or labels are seen to be negative.

    >>> slots_in_use(torch.tensor([[[[4, 0, 4, 2]]]])).tolist()
    [3]
    """
    check_not_empty("labels", check_shape("labels", labels, "B T H W"), "T H W")
    index = as_index("labels", labels)
    check_nonnegative("labels", index)
    # in sorted order every new label starts a run; invalid patches are -1
    values = index.masked_fill(~valid_patches(valid, labels), -1).flatten(1).sort(dim=1).values
    starts = F.pad(values.diff(dim=1) != 0, (1, 0), value=True)
    return (starts & (values >= 0)).sum(1)


def merges(representative: Tensor) -> Tensor:
    """Count the slots that merging renames: ``(representative != arange(S)).sum()``.

    Three slots merged into one group are two merges.

    Shape: representative: (B, S), integer, from ``merge_slots`` or ``PseudoLabels``. Returns (B,), int64.

    Raises: TypeError, ValueError if the dtype or rank does not fit.

    >>> merges(torch.tensor([[0, 0, 2, 0]])).tolist()
    [2]
    """
    size = check_shape("representative", representative, "B S")
    slots = torch.arange(size["S"], device=representative.device)
    return (as_index("representative", representative) != slots).sum(1)


def label_flips(labels: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Share of patches whose label changes from one frame to the next: ``mean(l[t + 1] != l[t])``.

    Only patches valid in both frames count. Moving objects also flip labels, so compare maps of the same clips.

    Shape: labels: (B, T, H, W), integer. ``valid``, results and errors are as in :func:`region_share`; 0 for T = 1.

    >>> label_flips(torch.tensor([[[[0, 0, 1, 1]], [[0, 1, 1, 1]]]])).tolist()
    [0.25]
    """
    check_shape("labels", labels, "B T H W")
    index, counted = as_index("labels", labels), valid_patches(valid, labels)
    return _share(index[:, 1:] != index[:, :-1], counted[:, 1:] & counted[:, :-1])


def _share(event: Tensor, counted: Tensor) -> Tensor:
    hits = (event & counted).flatten(1).sum(1)
    return hits.float() / counted.flatten(1).sum(1).clamp_min(1)


def valid_patches(valid: Tensor | None, labels: Tensor) -> Tensor:
    """Return ``valid`` as (B, T, H, W); None is valid everywhere."""
    patches = check_valid(valid, dict(zip("BTHW", labels.shape, strict=True)), labels=labels)
    return torch.ones_like(labels, dtype=torch.bool) if patches is None else patches
