"""Representatives of slots, from the numbers of shared patches: one program per clip."""

import triton
import triton.language as tl


@triton.jit
def merge_kernel(
    counts,
    areas,
    table,
    threshold,
    num_frames,
    num_chunks,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    FRAMES: tl.constexpr,
    SQUARINGS: tl.constexpr,
    THRESHOLD_IN_MEMORY: tl.constexpr,
):
    """Write ``table`` (B, S), int8: the representative of every slot.

    The kernel averages the IoU over frames with a valid patch, links slots above the threshold, and squares the links
    ceil(log2 S) times. The representative of a group has the largest area, or the lowest index among equals.
    """
    clip = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, SLOTS)
    known = (slots < S)[:, None] & (slots < S)[None, :]
    same = slots[:, None] == slots[None, :]

    # in float64 the mean of equal numbers equals these numbers
    overlap = tl.zeros([SLOTS, SLOTS], tl.float64)
    area = tl.zeros([SLOTS], tl.int32)
    num_counted = 0
    for first in range(0, num_frames, FRAMES):
        frames = first + tl.arange(0, FRAMES)
        both = tl.zeros([FRAMES, SLOTS, SLOTS], tl.int32)
        won = tl.zeros([FRAMES, SLOTS], tl.int32)
        for chunk in range(num_chunks):
            at = (clip * num_frames + frames) * num_chunks + chunk
            pairs = counts + at[:, None, None] * (S * S) + (slots[:, None] * S + slots[None, :])[None, :, :]
            both += tl.load(pairs, mask=(frames < num_frames)[:, None, None] & known[None, :, :], other=0)
            singles = areas + at[:, None] * S + slots[None, :]
            won += tl.load(singles, mask=(frames < num_frames)[:, None] & (slots < S)[None, :], other=0)
        own = tl.sum(tl.where(same[None, :, :], both, 0), 2)
        either = own[:, :, None] + own[:, None, :] - both
        iou = tl.math.div_rn(both.to(tl.float32), tl.maximum(either, 1).to(tl.float32))
        overlap += tl.sum(iou.to(tl.float64), 0)
        # one slot wins every valid patch
        num_counted += tl.sum((tl.sum(won, 1) > 0).to(tl.int32), 0)
        area += tl.sum(won, 0)
    mean = (overlap / tl.maximum(num_counted, 1)).to(tl.float32)

    if THRESHOLD_IN_MEMORY:
        threshold = tl.load(threshold)
    # a path has at most S - 1 links, and every squaring doubles the reach
    reach = ((mean > threshold) | same).to(tl.float16)
    for _ in range(SQUARINGS):
        reach = (tl.dot(reach, reach) > 0).to(tl.float16)
    member = reach > 0

    largest = tl.max(tl.where(member, area[None, :], -1), 1)
    leads = member & (area[None, :] == largest[:, None])
    representative = tl.min(tl.where(leads, slots[None, :], SLOTS), 1)
    tl.store(table + clip * S + slots, representative.to(tl.int8), mask=slots < S)
