"""An operator of torch: labels, regions and targets of both maps. Its launches depend on shapes alone."""

from typing import TypeAlias

import torch
from torch import Tensor

from ssync_loss.ssync.engines.contract import new_labels, new_slots
from ssync_loss.ssync.engines.triton import _launch
from ssync_loss.ssync.engines.triton._tiling import NUM_WARPS, Tiling, ceil_divide, masked, power_of_two, strided

# programs of `label_kernel`: about LABEL_PROGRAMS per map, at most MAX_PARTS per clip. A program sums slots over its
# patches. These sums are one part of the clip's sums.
LABEL_PROGRAMS = 8192
MAX_PARTS = 256
# patches of a program of `overlap_kernel`: about OVERLAP_PATCHES, or more in a clip with many parts. The program first
# adds up all parts, and needs about PATCHES_PER_PART patches for each part.
OVERLAP_PATCHES = 512
PATCHES_PER_PART = 4
# patches that `overlap_kernel` reads at a time
OVERLAP_TILE = 32
# numbers that a program adds up at a time: sums of parts in `overlap_kernel`, cells of frames in `merge_kernel`
PARTS_CELLS = 1024
MERGE_CELLS = 2048
# patches of a program of `target_kernel`
TARGET_TILE = 256

# targets, and the five fields of PseudoLabels
Labels: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
# labels of both maps before merging (2, B, T, H, W); if slots are merged, also the sums of slots (B, parts, S) and the
# numbers of patches (B, parts) of every part of a clip
HardLabels: TypeAlias = tuple[Tensor, tuple[Tensor, Tensor] | None]


@torch.library.custom_op("ssync_loss::label", mutates_args=())
def label(
    enc: Tensor,
    dec: Tensor,
    valid: Tensor | None,
    slot_mask: Tensor | None,
    merge_threshold: float | None,
    threshold_tensor: Tensor | None,
    hard: Tensor | None,
    table: Tensor | None,
    min_different: int,
    min_same: int,
    max_different: int,
    with_targets: bool,
    with_labels: bool,
) -> Labels:
    """Return int8 targets (2, B, T, H, W) and the five tensors of ``PseudoLabels``, empty if not wanted.

    The threshold is a number or a tensor; None for both merges nothing. ``hard`` and ``table`` come from :func:`find`.
    """
    outputs = _new_labels(enc, with_targets, with_labels)
    if enc.shape[0] == 0:
        return outputs
    from ssync_loss.ssync.engines.triton.gpu.targets import target_kernel

    tiling = Tiling.of(enc)
    with torch.cuda.device_of(enc):
        if hard is None:
            hard, table = _find(tiling, enc, dec, valid, slot_mask, merge_threshold, threshold_tensor)
        num_tiles = ceil_divide(tiling.num_frames * tiling.num_patches, TARGET_TILE)
        _, enc_labels, dec_labels, boundary, interior, names = outputs
        written = ((enc_labels, boundary), (dec_labels, interior), names) if with_labels else (None, None, None)
        _launch.launch(
            target_kernel,
            2 * tiling.num_clips * num_tiles,
            *(hard, table, outputs[0] if with_targets else None, *written),
            *((min_different, 10 - min_same, max_different), tiling.plane_size),
            *((tiling.num_frames, tiling.height, tiling.width), num_tiles),
            S=tiling.num_slots,
            SLOTS=tiling.slots,
            TILE=TARGET_TILE,
            num_warps=NUM_WARPS,
        )
    return outputs


label.register_fake(lambda enc, *settings: _new_labels(enc, *settings[-2:]))


def _new_labels(maps: Tensor, with_targets: bool, with_labels: bool) -> Labels:
    num_clips, num_frames, _, height, width = maps.shape
    targets = maps.new_empty((2, num_clips, num_frames, height, width) if with_targets else 0, dtype=torch.int8)
    return targets, *new_labels(maps, wanted=with_labels)


@torch.library.custom_op("ssync_loss::find_slots", mutates_args=())
def find(
    enc: Tensor,
    dec: Tensor,
    valid: Tensor | None,
    slot_mask: Tensor | None,
    merge_threshold: float | None,
    threshold_tensor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the labels before merging, (2, B, T, H, W) int8, and the representatives, (B, S) int8."""
    if enc.shape[0] == 0:
        return new_slots(enc)
    with torch.cuda.device_of(enc):
        hard, table = _find(Tiling.of(enc), enc, dec, valid, slot_mask, merge_threshold, threshold_tensor)
    if table is None:
        itself = torch.arange(enc.shape[2], dtype=torch.int8, device=enc.device)
        table = itself.repeat(enc.shape[0], 1)
    return hard, table


find.register_fake(lambda enc, *_: new_slots(enc))


def _find(
    tiling: Tiling,
    enc: Tensor,
    dec: Tensor,
    valid: Tensor | None,
    slot_mask: Tensor | None,
    merge_threshold: float | None,
    threshold_tensor: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    threshold = merge_threshold if threshold_tensor is None else threshold_tensor.float()
    found = find_labels(tiling, enc, dec, valid, slot_mask, merges=threshold is not None)
    return found[0], None if threshold is None else find_representatives(tiling, enc, slot_mask, found, threshold)


def find_labels(
    tiling: Tiling, enc: Tensor, dec: Tensor, valid: Tensor | None, slot_mask: Tensor | None, *, merges: bool
) -> HardLabels:
    """Label both maps; if slots are merged, sum them in parts: 1 launch."""
    from ssync_loss.ssync.engines.triton.gpu.labels import label_kernel

    num_parts = min(tiling.clip_tiles, MAX_PARTS, max(LABEL_PROGRAMS // tiling.num_clips, 1))
    planes = enc.new_empty((2, *enc.shape[:2], *enc.shape[3:]), dtype=torch.int8)
    shape = (tiling.num_clips, num_parts)
    parts = None
    if merges:
        sums = enc.new_empty((*shape, tiling.num_slots), dtype=torch.float32)
        parts = (sums, enc.new_empty(shape, dtype=torch.int32))
    _launch.launch(
        label_kernel,
        2 * tiling.num_clips * num_parts,
        *(strided(enc), strided(dec), strided(valid), masked(slot_mask), planes, parts),
        *(tiling.shape, tiling.plane_size, num_parts),
        **tiling.constants,
    )
    return planes, parts


def find_representatives(
    tiling: Tiling, enc: Tensor, slot_mask: Tensor | None, hard: HardLabels, threshold: float | Tensor
) -> Tensor:
    """Return the representative of every slot, (B, S) int8: 2 launches."""
    from ssync_loss.ssync.engines.triton.gpu.merge import merge_kernel
    from ssync_loss.ssync.engines.triton.gpu.overlap import overlap_kernel

    planes, parts = hard
    assert parts is not None
    num_parts = parts[0].shape[1]
    # matrix products need at least 16 rows and columns
    slots = max(tiling.slots, 16)
    tile = min(OVERLAP_TILE, max(power_of_two(tiling.num_patches), 16))
    # with enough patches, adding up the parts takes less time than reading the map
    patches = max(OVERLAP_PATCHES, PATCHES_PER_PART * num_parts)
    num_chunks = ceil_divide(tiling.num_patches, patches)
    chunk_tiles = ceil_divide(tiling.num_patches, num_chunks * tile)
    group_frames = min(max(patches // tiling.num_patches, 1), tiling.num_frames)
    num_groups = ceil_divide(tiling.num_frames, group_frames)
    rows = (tiling.num_clips, tiling.num_frames, num_chunks)
    counts = enc.new_empty((*rows, tiling.num_slots, tiling.num_slots), dtype=torch.int32)
    areas = enc.new_empty((*rows, tiling.num_slots), dtype=torch.int32)
    _launch.launch(
        overlap_kernel,
        tiling.num_clips * num_groups * num_chunks,
        *(strided(enc), masked(slot_mask), planes, parts, counts, areas),
        *(tiling.shape, num_parts, group_frames, num_groups, num_chunks, chunk_tiles),
        S=tiling.num_slots,
        SLOTS=slots,
        TILE=tile,
        PARTS=PARTS_CELLS // slots,
        num_warps=slots // 16,
    )
    table = enc.new_empty((tiling.num_clips, tiling.num_slots), dtype=torch.int8)
    _launch.launch(
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
