"""Second pass over the encoder's map: the number of patches of a frame on which two slots are active."""

import triton
import triton.language as tl

from ssync_loss.ssync.engines.triton.gpu.tiles import in_plane, read_tile, slots_of


@triton.jit
def overlap_kernel(
    enc,
    slot_mask,
    labels,
    parts,
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
):
    """Write ``counts`` (B, T, chunks, S, S) of patches where both slots are active, and ``areas`` (B, T, chunks, S).

    A slot is active where its logit exceeds the slot's mean over the clip. Every program computes the means from the
    parts. The area of a slot is the number of patches with its label. A program takes a chunk of one large frame, or a
    group of small frames. Products of zeros and ones, added in float32, count exactly.
    """
    program = tl.program_id(0)
    chunk = program % num_chunks
    first_frame = program // num_chunks % num_groups * group_frames
    clip = (program // (num_chunks * num_groups)).to(tl.int64)
    slots = slots_of(slot_mask, clip, S, SLOTS)
    number = slots[0]
    known = number < S

    total = tl.zeros([SLOTS], tl.float32)
    counted = tl.zeros([PARTS], tl.int32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at = clip * num_parts + part
        both_known = (part < num_parts)[:, None] & known[None, :]
        total += tl.sum(tl.load(parts[0] + at[:, None] * S + number[None, :], mask=both_known, other=0.0), 0)
        counted += tl.load(parts[1] + at, mask=part < num_parts, other=0)
    num_counted = tl.maximum(tl.sum(counted, 0), 1).to(tl.float32)
    mean = tl.math.div_rn(total, tl.broadcast_to(num_counted, [SLOTS]))

    for index in range(tl.minimum(group_frames, shape[0] - first_frame)):
        frame = first_frame + index
        both = tl.zeros([SLOTS, SLOTS], tl.float32)
        won = tl.zeros([SLOTS, TILE], tl.int32)
        for tile in range(chunk * chunk_tiles, (chunk + 1) * chunk_tiles):
            patches = tile * TILE + tl.arange(0, TILE)
            place = (clip, frame, patches, patches < shape[1])
            x = read_tile(enc, slot_mask, slots, place, shape, S, SLOTS)
            label = tl.load(labels + in_plane(place, shape), mask=place[3], other=-1)
            active = ((x > mean[:, None]) & (label >= 0)[None, :]).to(tl.float16)
            both = tl.dot(active, tl.trans(active), both)
            won += (number[:, None] == label[None, :]).to(tl.int32)
        at = (clip * shape[0] + frame) * num_chunks + chunk
        pairs = number[:, None] * S + number[None, :]
        tl.store(counts + at * (S * S) + pairs, both.to(tl.int32), mask=known[:, None] & known[None, :])
        tl.store(areas + at * S + number, tl.sum(won, 1), mask=known)
