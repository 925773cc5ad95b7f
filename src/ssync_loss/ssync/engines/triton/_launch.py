"""Launching: grids, strides and scratch memory, all from shapes; nothing here looks at data or waits for a device.

The kernels' own modules are imported when one of them is launched first, so that this one needs no triton.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssync_loss.ssync.engines.triton._tiling import (
    NUM_WARPS,
    Tiling,
    ceil_divide,
    mask_strides,
    power_of_two,
    strides_of,
)

# programs that label a map, about; those that share a clip are at most so many, as what they found is added up
# by every program of the overlap
LABEL_PROGRAMS = 8192
MAX_PARTS = 256
# patches a program of the overlap takes, about: so many, or so many for each part that it adds up; and at once
OVERLAP_PATCHES = 512
PATCHES_PER_PART = 4
OVERLAP_TILE = 32
# sums of parts that are added up at once
PARTS_CELLS = 1024
# programs that share the loss of a map, at most: one program adds up what they found
MAX_SHARES = 8192
SHARES_AT_ONCE = 1024
# cells of the frames that are merged at once
MERGE_CELLS = 2048
# patches of a program that handles labels alone
TARGET_TILE = 256

# registers of a thread: with no limit at all the assembler spills a few to fit one more program beside the others
MAX_REGISTERS = 168

LOG2E = 1.4426950408889634


def launch(kernel: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on one axis of programs; the second and third hold no more than 65,535."""
    kernel[(num_programs,)](*arguments, maxnreg=MAX_REGISTERS, **constants)


class Criterion(NamedTuple):
    """What a patch pays."""

    name: str
    label_smoothing: float
    temperature: float

    @property
    def softness(self) -> tuple[float, float, float]:
        """The argument of this name of the kernels."""
        return LOG2E / self.temperature, 1 / self.temperature, self.label_smoothing

    @property
    def constants(self) -> dict[str, bool]:
        """What a kernel is compiled for."""
        return {"CROSS_ENTROPY": self.name == "cross_entropy", "SMOOTHED": self.label_smoothing != 0}


class HardLabels(NamedTuple):
    """What the first pass finds.

    Attributes:
        planes: (2, B, T, H, W) int8, labels of both maps before merging, -1 where a patch does not count.
        sums: (B, parts, S) float32, the encoder's logits added up, or None.
        numbers: (B, parts) int32, how many patches count, or None.
    """

    planes: Tensor
    sums: Tensor | None
    numbers: Tensor | None


def find_labels(
    tiling: Tiling, enc: Tensor, dec: Tensor, valid: Tensor | None, slot_mask: Tensor | None, *, merges: bool
) -> HardLabels:
    """Label both maps, and add up what merging needs: 1 launch."""
    from ssync_loss.ssync.engines.triton.gpu.labels import label_kernel

    num_parts = min(tiling.clip_tiles, MAX_PARTS, max(LABEL_PROGRAMS // tiling.num_clips, 1))
    planes = enc.new_empty((2, *enc.shape[:2], *enc.shape[3:]), dtype=torch.int8)
    parts = (tiling.num_clips, num_parts)
    found = HardLabels(
        planes,
        enc.new_empty((*parts, tiling.num_slots), dtype=torch.float32) if merges else None,
        enc.new_empty(parts, dtype=torch.int32) if merges else None,
    )
    enc_strides, enc_layout = strides_of(enc)
    dec_strides, dec_layout = strides_of(dec)
    valid_strides, valid_layout = strides_of(valid)
    launch(
        label_kernel,
        2 * tiling.num_clips * num_parts,
        *(enc, enc_strides, dec, dec_strides, valid, valid_strides, slot_mask, mask_strides(slot_mask)),
        *found,
        *(tiling.shape, tiling.plane_size, num_parts),
        **tiling.constants,
        ENC_LAYOUT=enc_layout,
        DEC_LAYOUT=dec_layout,
        VALID_LAYOUT=valid_layout,
        num_warps=tiling.num_warps,
    )
    return found


def find_representatives(
    tiling: Tiling, enc: Tensor, slot_mask: Tensor | None, found: HardLabels, threshold: float | Tensor
) -> Tensor:
    """Name every slot's representative, (B, S) int8: 2 launches."""
    from ssync_loss.ssync.engines.triton.gpu.merge import merge_kernel
    from ssync_loss.ssync.engines.triton.gpu.overlap import overlap_kernel

    assert found.sums is not None
    num_parts = found.sums.shape[1]
    # matrix products want 16 rows, and as many columns
    slots = max(tiling.slots, 16)
    tile = min(OVERLAP_TILE, max(power_of_two(tiling.num_patches), 16))
    # so that adding up the parts costs less than reading the map
    patches = max(OVERLAP_PATCHES, PATCHES_PER_PART * num_parts)
    num_chunks = ceil_divide(tiling.num_patches, patches)
    chunk_tiles = ceil_divide(tiling.num_patches, num_chunks * tile)
    group_frames = min(max(patches // tiling.num_patches, 1), tiling.num_frames)
    num_groups = ceil_divide(tiling.num_frames, group_frames)
    rows = (tiling.num_clips, tiling.num_frames, num_chunks)
    counts = enc.new_empty((*rows, tiling.num_slots, tiling.num_slots), dtype=torch.int32)
    areas = enc.new_empty((*rows, tiling.num_slots), dtype=torch.int32)
    enc_strides, enc_layout = strides_of(enc)
    launch(
        overlap_kernel,
        tiling.num_clips * num_groups * num_chunks,
        *(enc, enc_strides, slot_mask, mask_strides(slot_mask), *found, counts, areas),
        *(tiling.shape, num_parts, group_frames, num_groups, num_chunks, chunk_tiles),
        S=tiling.num_slots,
        SLOTS=slots,
        TILE=tile,
        PARTS=PARTS_CELLS // slots,
        LAYOUT=enc_layout,
        num_warps=slots // 16,
    )
    table = enc.new_empty((tiling.num_clips, tiling.num_slots), dtype=torch.int8)
    launch(
        merge_kernel,
        tiling.num_clips,
        *(counts, areas, table, threshold, tiling.num_frames, num_chunks),
        S=tiling.num_slots,
        SLOTS=slots,
        FRAMES=max(MERGE_CELLS // slots**2, 1),
        SQUARINGS=(tiling.num_slots - 1).bit_length(),
        THRESHOLD_IN_MEMORY=isinstance(threshold, Tensor),
        num_warps=NUM_WARPS if slots < 64 else 2 * NUM_WARPS,
    )
    return table


class Regions(NamedTuple):
    """How many of ten neighbors may differ."""

    min_different: int
    min_same: int
    max_different: int

    @property
    def scalars(self) -> tuple[int, int, int]:
        """The arguments ``min_different``, ``max_boundary`` and ``max_interior`` of the kernel."""
        return self.min_different, 10 - self.min_same, self.max_different


def find_targets(
    tiling: Tiling,
    planes: Tensor,
    table: Tensor | None,
    regions: Regions,
    targets: Tensor | None,
    labels: Sequence[Tensor] | None,
) -> None:
    """Write int8 targets (2, B, T, H, W), the five tensors of ``PseudoLabels``, or both: 1 launch."""
    from ssync_loss.ssync.engines.triton.gpu.targets import target_kernel

    num_tiles = ceil_divide(tiling.num_frames * tiling.num_patches, TARGET_TILE)
    launch(
        target_kernel,
        2 * tiling.num_clips * num_tiles,
        *(planes, table, targets, *([None] * 5 if labels is None else labels), *regions.scalars),
        *(tiling.plane_size, tiling.num_frames, tiling.height, tiling.width, num_tiles),
        S=tiling.num_slots,
        SLOTS=tiling.slots,
        TILE=TARGET_TILE,
        num_warps=NUM_WARPS,
    )


def compute_loss(
    tiling: Tiling,
    enc: Tensor,
    dec: Tensor,
    slot_mask: Tensor | None,
    targets: Tensor,
    clean: Tensor | None,
    criterion: Criterion,
    weights: tuple[float, float],
    outputs: Sequence[Tensor],
) -> None:
    """Write total, both means, both counts, and the scales of the gradients: 2 launches."""
    from ssync_loss.ssync.engines.triton.gpu.losses import finish_kernel, loss_kernel

    errors, tallies = _shares(enc, 2, tiling)
    enc_strides, enc_layout = strides_of(enc)
    dec_strides, dec_layout = strides_of(dec)
    num_programs = errors.shape[1]
    if num_programs:
        launch(
            loss_kernel,
            2 * num_programs,
            *(enc, enc_strides, dec, dec_strides, slot_mask, mask_strides(slot_mask), targets, errors, tallies),
            *(criterion.softness, tiling.shape, tiling.plane_size, tiling.num_tiles),
            **tiling.constants,
            **criterion.constants,
            ENC_LAYOUT=enc_layout,
            DEC_LAYOUT=dec_layout,
            num_warps=tiling.num_warps,
        )
    launch(
        finish_kernel,
        1,
        *(errors, tallies, clean, *outputs, *weights, num_programs),
        PROGRAMS=SHARES_AT_ONCE,
        CROSS_ENTROPY=criterion.constants["CROSS_ENTROPY"],
        num_warps=NUM_WARPS,
    )


def _shares(maps: Tensor, num_maps: int, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Return memory for what the programs that share a loss find."""
    num_programs = min(tiling.num_tiles, MAX_SHARES)
    errors = maps.new_empty((num_maps, num_programs), dtype=torch.float32)
    return errors, maps.new_empty((num_maps, 3, num_programs), dtype=torch.int32)


def compute_gradients(
    tiling: Tiling,
    enc: Tensor,
    dec: Tensor,
    slot_mask: Tensor | None,
    targets: Tensor,
    scales: Tensor,
    incoming: tuple[Tensor | None, Tensor | None, Tensor | None],
    grad_enc: Tensor | None,
    grad_dec: Tensor | None,
    criterion: Criterion,
    weights: tuple[float, float],
) -> None:
    """Write the gradients that are not None, from those of the total and of both means: 1 launch."""
    from ssync_loss.ssync.engines.triton.gpu.gradients import gradient_kernel

    enc_strides, enc_layout = strides_of(enc)
    dec_strides, dec_layout = strides_of(dec)
    # a gradient that is not wanted has no programs, and what would be written is never touched
    num_enc = 0 if grad_enc is None else tiling.num_tiles
    num_dec = 0 if grad_dec is None else tiling.num_tiles
    grad_enc = enc if grad_enc is None else grad_enc
    grad_dec = dec if grad_dec is None else grad_dec
    grad_enc_strides, grad_enc_layout = strides_of(grad_enc)
    grad_dec_strides, grad_dec_layout = strides_of(grad_dec)
    launch(
        gradient_kernel,
        num_dec + num_enc,
        *(enc, enc_strides, dec, dec_strides, slot_mask, mask_strides(slot_mask), targets, scales, *incoming),
        *(grad_enc, grad_enc_strides, grad_dec, grad_dec_strides, *weights),
        *(criterion.softness, tiling.shape, tiling.plane_size, num_dec),
        **tiling.constants,
        **criterion.constants,
        ENC_LAYOUT=enc_layout,
        DEC_LAYOUT=dec_layout,
        GRAD_ENC_LAYOUT=grad_enc_layout,
        GRAD_DEC_LAYOUT=grad_dec_layout,
        num_warps=tiling.num_warps,
    )


def compute_distillation(
    tiling: Tiling,
    logits: Tensor,
    target: Tensor,
    region: Tensor,
    slot_mask: Tensor | None,
    criterion: Criterion,
    reduction: str,
    outputs: Sequence[Tensor],
) -> None:
    """Write the loss, int8 targets (B, T, H, W) and what the gradient of a scalar is scaled by: 1 or 2 launches."""
    from ssync_loss.ssync.engines.triton.gpu.distill import distill_kernel, finish_distill_kernel

    loss, targets, scale = outputs
    by_patch = reduction == "none"
    errors, tallies = _shares(logits, 1, tiling)
    num_programs = errors.shape[1]
    strides, layout = strides_of(logits)
    target_strides, target_layout = strides_of(target)
    region_strides, region_layout = strides_of(region)
    if num_programs:
        launch(
            distill_kernel,
            tiling.num_tiles if by_patch else num_programs,
            *(logits, strides, slot_mask, mask_strides(slot_mask), target, target_strides, region, region_strides),
            *(targets, loss, None, None) if by_patch else (targets, None, errors, tallies),
            *(criterion.softness, tiling.shape, tiling.num_tiles),
            **tiling.constants,
            **criterion.constants,
            LAYOUT=layout,
            TARGET_LAYOUT=target_layout,
            REGION_LAYOUT=region_layout,
            OVER_SLOTS=over_slots(criterion, reduction),
            num_warps=tiling.num_warps,
        )
    if not by_patch:
        launch(
            finish_distill_kernel,
            1,
            *(errors, tallies, loss, scale, num_programs),
            PROGRAMS=SHARES_AT_ONCE,
            CROSS_ENTROPY=criterion.constants["CROSS_ENTROPY"],
            MEAN=reduction == "mean",
            num_warps=NUM_WARPS,
        )


def over_slots(criterion: Criterion, reduction: str) -> bool:
    """Tell whether a patch's own value is a mean over slots; the mean over a batch divides by all of them at once."""
    return criterion.name == "mse" and reduction != "mean"


def compute_distillation_gradient(
    tiling: Tiling,
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    slot_mask: Tensor | None,
    grad_logits: Tensor,
    criterion: Criterion,
    reduction: str,
) -> None:
    """Write the gradient of a distillation loss: 1 launch."""
    from ssync_loss.ssync.engines.triton.gpu.distill import distill_gradient_kernel

    by_patch = reduction == "none"
    strides, layout = strides_of(logits)
    grad_strides, grad_layout = strides_of(grad if by_patch else None)
    grad_logits_strides, grad_logits_layout = strides_of(grad_logits)
    launch(
        distill_gradient_kernel,
        tiling.num_tiles,
        *(logits, strides, slot_mask, mask_strides(slot_mask), targets, None if by_patch else scale),
        *(grad, grad_strides, grad_logits, grad_logits_strides, criterion.softness, tiling.shape),
        **tiling.constants,
        **criterion.constants,
        LAYOUT=layout,
        GRAD_LAYOUT=grad_layout,
        GRAD_LOGITS_LAYOUT=grad_logits_layout,
        OVER_SLOTS=over_slots(criterion, reduction),
        num_warps=tiling.num_warps,
    )
