"""A verdict on the premise, in words."""

from math import isfinite

import torch

from ssync_loss._checks import check_type
from ssync_loss.diagnostics.verdict import MeanOverClips, Premise, Reason, memorization


def report(premise: Premise, *, fresh: Premise | None = None) -> str:
    """Put a verdict in words, with mean ± standard error over clips and with its limits.

    ``premise`` is a result of :func:`premise` or :func:`pool` on training clips. The text has :meth:`Premise.verdict`,
    a table, :meth:`Premise.reasons` and a caution. If ``fresh`` is a result on fresh clips, the text also tells whether
    the model has memorized its training clips (:func:`memorization`). This reads the tensors, and waits for the device.

    Raises: TypeError if an argument is no Premise.

    >>> clips = {name: torch.tensor([0.5, 0.5]) for name in Premise._fields[:9]}
    >>> margin, measured = torch.tensor([0.375, 0.625]), torch.tensor([True, True])
    >>> print(report(Premise(**clips, margin=margin, measured=measured, holds=torch.tensor(True))))
    ... # doctest: +ELLIPSIS
    SSync's premise holds on these 2 clips: margin +0.500 ± 0.125 (mean ± standard error).
    ...
    """
    check_type("premise", premise, Premise)
    check_type("fresh", fresh, Premise, optional=True)
    margin, reasons = premise.over_clips(premise.decisive), premise.reasons()
    plain, merged = premise.enc_explained, premise.merged_explained
    # without a merge threshold both are equal
    is_merged = merged is not None and not torch.equal(merged.nan_to_num(), plain.nan_to_num())
    if isfinite(margin.value):
        words = _HEADLINES[premise.verdict()].format(_clips(margin))
        error = "no standard error" if margin.num_videos == 1 else "mean ± standard error"
        headline = f"{words} {'merged ' if is_merged else ''}margin {_text(margin, '+')} ({error})."
        reading = [*(_READINGS[one] for one in reasons), _CAUTION]
    else:
        headline, reading = f" cannot be judged: {_READINGS[reasons[0]]}.", []
    lines = [f"SSync's premise{headline}", "", f"{'':<32}{'encoder':>16}{'decoder':>16}"]
    for title, enc, dec in (
        ("feature variance explained", plain, premise.dec_explained),
        ("the same, merged", merged if is_merged else None, None),
        ("slots of the merged target", premise.target_slots if is_merged else None, None),
        ("confidence", premise.enc_confidence, premise.dec_confidence),
        ("edge alignment (AUC)", premise.enc_edge_alignment, premise.dec_edge_alignment),
        ("label flips over time", premise.enc_flicker, premise.dec_flicker),
        ("same label in both maps", premise.agreement, None),
    ):
        cells = [_text(premise.over_clips(values)) for values in (enc, dec) if values is not None]
        if cells:
            lines.append(f"{title:<32}" + "".join(f"{cell:>16}" for cell in cells))
    num_left_out = len(premise.measured) - margin.num_clips
    if margin.num_clips and num_left_out:
        clips, were = ("clip", "was") if num_left_out == 1 else ("clips", "were")
        lines.append(f"{num_left_out} {clips} without a valid patch {were} left out.")
    if fresh is not None:
        reading.insert(0, _compare(premise, fresh))
    return "\n".join([*lines, "", *reading])


def _compare(premise: Premise, fresh: Premise) -> str:
    drop = memorization(premise, fresh)
    if not isfinite(drop.trained - drop.fresh):
        return "Memorization cannot be judged: a set of clips holds NaN, infinities or no valid patch."
    told = f"The decoder explains {drop.trained:.3f} of training clips, and {drop.fresh:.3f} of fresh clips."
    return f"{told}{_MEMORIZED if drop.is_alarming else ''}"


def _clips(mean: MeanOverClips) -> str:
    clips = "one clip" if mean.num_clips == 1 else f"these {mean.num_clips} clips"
    if mean.num_videos == mean.num_clips:
        return clips
    return f"{clips} of {'one video' if mean.num_videos == 1 else f'{mean.num_videos} videos'}"


def _text(mean: MeanOverClips, sign: str = "") -> str:
    if mean.num_clips == 0:
        return "-"
    value = f"{mean.value:{sign}.3f}"
    return value if mean.num_videos < 2 else f"{value} ± {mean.error:.3f}"


_HEADLINES = {"holds": " holds on {}:", "fails": " does not hold on {}:", "cannot tell": ": cannot tell from {},"}

_READINGS: dict[Reason, str] = {
    "no clip": "no clip has a valid patch",
    "not finite": "maps or features of some clips hold NaN or infinities",
    "encoder": """\
The encoder's partition explains more of the features than the decoder's. At boundaries the encoder
can teach the decoder, and the loss can be expected to help.""",
    "decoder": """\
The encoder's partition explains no more of the features than the decoder's. A decoder that learns
this partition can be expected to get worse. Leave the loss off, or switch it on later in training.""",
    "undecided": """\
Both partitions explain about the same share of the features. The margin is within two standard
errors of zero, so its sign is not known. Measure more clips.""",
    "one video": "Clips of one video do not decide. Measure clips of many videos.",
    "merging": """\
Before merging, the encoder's partition is the better one. After merging at this threshold it is not,
because different slots are joined. Do not merge, or raise the threshold.""",
    "one slot": """\
In most clips merging at this threshold leaves one slot. A map that learns this target collapses into
a single slot. Raise the threshold, or switch the loss on later in training.""",
    "unexplained": """\
No partition explains any of the features: are the features constant, or is every patch in one slot?""",
}
_MEMORIZED = """
It has memorized the training clips. On these the decoder is the better map. Train on more clips."""
_CAUTION = """\
This rule was found on one family of synthetic clips, one set of real clips, and moving photographs.
Measure it on training clips, about 160 or more, of many videos."""
