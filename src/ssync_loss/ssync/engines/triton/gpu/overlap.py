"""Second pass over the encoder's map: on how many patches of a frame two slots are active together."""

import triton
import triton.language as tl

from ssync_loss.ssync.engines.triton.gpu.tiles import present_slots, read_tile


@triton.jit
def overlap_kernel(
    enc,
    enc_strides,
    slot_mask,
    mask_strides,
    labels,
    sums,
    numbers,
    counts,
    areas,
    shape,
    num_parts,
    group_frames,
    num_groups,
    num_chunks,
    chunk_tiles,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Write ``counts`` (B, T, chunks, S, S) of patches where both slots are active, and ``areas`` (B, T, chunks, S).

    A slot is active where its logit exceeds its mean over the clip, which every program adds up once more. Its
    area is the number of patches it has won. A program takes a chunk of one large frame, or a group of small
    frames. Products of zeros and ones, added in float32, count exactly.
    """
    program = tl.program_id(0)
    chunk = program % num_chunks
    first_frame = program // num_chunks % num_groups * group_frames
    clip = (program // (num_chunks * num_groups)).to(tl.int64)
    slots = tl.arange(0, SLOTS)
    present, _ = present_slots(slot_mask, mask_strides, clip, slots, S)

    total = tl.zeros([SLOTS], tl.float32)
    number = tl.zeros([PARTS], tl.int32)
    for first in range(0, num_parts, PARTS):
        parts = first + tl.arange(0, PARTS)
        at = (clip * num_parts + parts)[:, None] * S + slots[None, :]
        known = (parts < num_parts)[:, None] & (slots < S)[None, :]
        total += tl.sum(tl.load(sums + at, mask=known, other=0.0), 0)
        number += tl.load(numbers + clip * num_parts + parts, mask=parts < num_parts, other=0)
    num_counted = tl.maximum(tl.sum(number, 0), 1).to(tl.float32)
    mean = tl.math.div_rn(total, tl.broadcast_to(num_counted, [SLOTS]))

    for index in range(tl.minimum(group_frames, shape[0] - first_frame)):
        frame = first_frame + index
        row = clip * shape[0] + frame
        both = tl.zeros([SLOTS, SLOTS], tl.float32)
        won = tl.zeros([SLOTS, TILE], tl.int32)
        for tile in range(chunk * chunk_tiles, (chunk + 1) * chunk_tiles):
            patches = tile * TILE + tl.arange(0, TILE)
            inside = patches < shape[1]
            x = read_tile(
                enc, enc_strides, slot_mask, present, clip, frame, slots, patches, inside, shape, S, SLOTS, LAYOUT
            )
            label = tl.load(labels + row * shape[1] + patches, mask=inside, other=-1)
            active = ((x > mean[:, None]) & (label >= 0)[None, :]).to(tl.float16)
            both = tl.dot(active, tl.trans(active), both)
            won += (slots[:, None] == label[None, :]).to(tl.int32)
        at = row * num_chunks + chunk
        pairs = slots[:, None] * S + slots[None, :]
        known = (slots < S)[:, None] & (slots < S)[None, :]
        tl.store(counts + at * (S * S) + pairs, both.to(tl.int32), mask=known)
        tl.store(areas + at * S + slots, tl.sum(won, 1), mask=slots < S)
