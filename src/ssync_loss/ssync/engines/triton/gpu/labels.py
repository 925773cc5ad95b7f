"""First pass over both maps: hard labels of every patch, and what merging must know of the encoder's slots."""

import triton
import triton.language as tl

from ssync_loss.ssync.engines.triton.gpu.tiles import patch_cells, patches_of, present_slots, read_tile


@triton.jit
def label_kernel(
    enc,
    enc_strides,
    dec,
    dec_strides,
    valid,
    valid_strides,
    slot_mask,
    mask_strides,
    labels,
    sums,
    numbers,
    shape,
    plane_size,
    num_parts,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENC_LAYOUT: tl.constexpr,
    DEC_LAYOUT: tl.constexpr,
    VALID_LAYOUT: tl.constexpr,
):
    """Write int8 labels (2, B, T, H, W), the encoder's and the decoder's, -1 where a patch does not count.

    One half of the programs reads the encoder, the other the decoder. A clip is shared by ``num_parts`` programs
    a map; those of the encoder write ``sums`` (B, parts, S), float32, of a slot's logits over the patches that
    count, and ``numbers`` (B, parts), int32, of these patches. Without merging both are None.
    """
    program = tl.program_id(0)
    half = tl.num_programs(0) // 2
    if program < half:
        _label(
            enc, enc_strides, valid, valid_strides, slot_mask, mask_strides, labels, sums, numbers,
            program, shape, num_parts, S, SLOTS, TILE, COLUMNS, ENC_LAYOUT, VALID_LAYOUT,
        )  # fmt: skip
    else:
        _label(
            dec, dec_strides, valid, valid_strides, slot_mask, mask_strides, labels + plane_size, None, None,
            program - half, shape, num_parts, S, SLOTS, TILE, COLUMNS, DEC_LAYOUT, VALID_LAYOUT,
        )  # fmt: skip


@triton.jit
def _label(
    maps,
    strides,
    valid,
    valid_strides,
    slot_mask,
    mask_strides,
    labels,
    sums,
    numbers,
    program,
    shape,
    num_parts,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAYOUT: tl.constexpr,
    VALID_LAYOUT: tl.constexpr,
):
    clip = program // num_parts
    slots = tl.arange(0, SLOTS)
    present, _ = present_slots(slot_mask, mask_strides, clip, slots, S)
    # a clip without a present slot is invalid throughout
    has_slots = tl.max(present.to(tl.int32), 0) > 0
    total = tl.zeros([SLOTS, TILE], tl.float32)
    number = tl.zeros([TILE], tl.int32)
    for tile in range(program % num_parts, shape[0] * shape[3], num_parts):
        frame = tile // shape[3]
        patches, inside = patches_of(tile % shape[3], shape, TILE, COLUMNS)
        counts = inside & has_slots
        if valid is not None:
            cells = patch_cells(valid, valid_strides, clip, frame, patches, shape, VALID_LAYOUT)
            counts = counts & (tl.load(cells, mask=inside, other=0) != 0)
        x = read_tile(maps, strides, slot_mask, present, clip, frame, slots, patches, inside, shape, S, SLOTS, LAYOUT)
        # NaN, which fails this comparison, wins as in torch's argmax: the label of such a patch means nothing, but
        # it names a present slot
        x = tl.where(x <= float("inf"), x, float("inf"))
        leads = (x == tl.max(x, 0)[None, :]) & present[:, None]
        label = tl.min(tl.where(leads, slots[:, None], SLOTS), 0)
        label = tl.where(counts, label, -1)
        row = clip.to(tl.int64) * shape[0] + frame
        tl.store(labels + row * shape[1] + patches, label.to(tl.int8), mask=inside)
        if sums is not None:
            total += tl.where(counts[None, :], x, 0.0)
            number += counts.to(tl.int32)
    if sums is not None:
        tl.store(sums + program.to(tl.int64) * S + slots, tl.sum(total, 1), mask=slots < S)
        tl.store(numbers + program, tl.sum(number, 0))
