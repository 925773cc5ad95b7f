"""Does the premise of the loss hold for a model? Asked of its maps and features, without ground truth.

The loss copies encoder labels into the decoder at boundaries and decoder labels into the encoder in
interiors. It can only help where the encoder has something to teach: where its partition fits the image
better than the decoder's. Fit is measured on the features both maps are made from.
"""

from collections.abc import Iterable
from math import isfinite, nan, sqrt
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ssync_loss._axes import FEATURES, Axes, place, solve
from ssync_loss._checks import check_type
from ssync_loss._inputs import check_floats
from ssync_loss.diagnostics.fit import edge_alignment, explained_of
from ssync_loss.diagnostics.statistics import agreement, label_flips
from ssync_loss.ssync.labels import hard_labels
from ssync_loss.ssync.maps import Grid, KindArgument, only_present, prepare_maps

Verdict: TypeAlias = Literal["holds", "fails", "cannot tell"]


class Premise(NamedTuple):
    """What :func:`premise` measures, one value per clip unless said otherwise.

    Attributes:
        enc_explained, dec_explained: (B,), share of the feature variance explained by the hard partition of a map.
        enc_confidence, dec_confidence: (B,), mean of its largest slot probability.
        enc_edge_alignment, dec_edge_alignment: (B,), AUC of the feature distance across its label edges.
        enc_flicker, dec_flicker: (B,), share of its labels that change from one frame to the next.
        agreement: (B,), share of patches with one label in both maps.
        margin: (B,), ``enc_explained - dec_explained``.
        measured: (B,) bool, clips with a valid patch; the others are left out of every mean.
        holds: scalar bool, ``margin[measured].mean() > 0``; :meth:`verdict` asks how sure that is.
    """

    enc_explained: Tensor
    dec_explained: Tensor
    enc_confidence: Tensor
    dec_confidence: Tensor
    enc_edge_alignment: Tensor
    dec_edge_alignment: Tensor
    enc_flicker: Tensor
    dec_flicker: Tensor
    agreement: Tensor
    margin: Tensor
    measured: Tensor
    holds: Tensor

    def verdict(self) -> Verdict:
        """Tell whether the mean margin of the measured clips is more than two standard errors away from zero.

        "holds" above, "fails" below, "cannot tell" within, and where there is no standard error: of fewer than two
        clips, or with a margin that is not finite. Of noise "holds" is said once in 40 times, of few clips more often.
        It reads the tensors, like :func:`report`.

        >>> clip, yes = torch.zeros(1), torch.tensor([True])
        >>> parts = [Premise(*[clip] * 9, torch.tensor([margin]), yes, yes[0]) for margin in (0.5, -0.25, 0.5)]
        >>> pool(parts).verdict(), pool([parts[0], parts[2]]).verdict()  # 0.25 ± 0.25, and 0.5 ± 0
        ('cannot tell', 'holds')
        """
        return _over_clips(self.margin, self.measured).verdict()


def premise(
    enc_logits: Tensor,
    dec_logits: Tensor,
    features: Tensor,
    *,
    kind: KindArgument = "logits",
    grid: Grid = None,
    axes: Axes = None,
    features_axes: str | None = None,
    valid: Tensor | None = None,
    slot_mask: Tensor | None = None,
    num_frames: int | None = None,
) -> Premise:
    """Ask whether the encoder's partition explains more of the features than the decoder's.

    ``holds = mean(explained(enc) - explained(dec)) > 0``, with :func:`explained_variance` of the unmerged
    hard labels. Ask it of a model trained with its own losses, before this one is switched on, and of a
    whole, varied evaluation set: :func:`pool` puts batches together, :func:`report` puts the verdict in
    words. Confidence, edge alignment, flicker and agreement are there to be looked at; they do not enter the
    verdict.

    NaN or +inf in a valid patch of either map (or -inf for every slot of it), and NaN or infinities in its
    features, make the clip's margin NaN, and then the premise does not hold.

    Shape: enc_logits, dec_logits: (B, T, S, H, W) or (B, T, S, N), or what ``axes`` says. features: (B, T, D, H, W) on
        the encoder's grid, or what ``features_axes`` says. Returns (B,) tensors in float64, ``measured`` (B,) bool,
        ``holds`` scalar bool: nothing is read on the host.

    ``features`` are what the model encodes, for example backbone features, in any floating point. ``features_axes`` is
    their layout in einops' words, with d for the channels: (B, T, N, D) is ``"b t (h w) d"``. Other arguments are as in
    ``pseudo_labels``; a clip without any slot present has no valid patch.

    Raises: TypeError, ValueError if a dtype, shape or device does not fit, or features are on another grid than the
        encoder map.

    >>> features = torch.tensor([0.0, 0.0, 4.0, 4.0]).view(1, 1, 1, 1, 4)
    >>> enc = torch.tensor([[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]]).view(1, 1, 2, 1, 4)
    >>> dec = torch.tensor([[9.0, 9.0, 9.0, 0.0], [0.0, 0.0, 0.0, 9.0]]).view(1, 1, 2, 1, 4)
    >>> verdict = premise(enc, dec, features)
    >>> round(verdict.margin.item(), 4), verdict.holds.item()  # 16/16 explained, less 16/3 of 16
    (0.6667, True)
    """
    with torch.no_grad():
        given: dict[str, Any] = {"valid": valid, "slot_mask": slot_mask, "num_frames": num_frames}
        maps = prepare_maps(enc_logits, dec_logits, kind=kind, grid=grid, axes=axes, **given)
        B, T, S, H, W = maps.enc.shape
        size = {"B": B, "T": T, "H": H, "W": W}
        if features_axes is not None:
            shown = solve("features", features, features_axes, {"b": B, "t": T, "h": H, "w": W}, FEATURES)
            features = place("features", features, features_axes, shown, FEATURES)
        elif isinstance(features, Tensor) and features.dim() == 4:
            raise ValueError(
                f"`features` must have shape (B={B}, T={T}, D, H={H}, W={W}), or another that `features_axes` tells, "
                f"such as 'b t (h w) d'; got {tuple(features.shape)}."
            )
        check_floats("features", features, "B T D H W", size, filled="D", enc_logits=enc_logits)
        enc, dec = hard_labels(maps)
        patches = torch.ones_like(enc, dtype=torch.bool) if maps.counted is None else maps.counted
        fit: dict[str, Tensor] = {}
        for side, logits, labels in (("enc", maps.enc, enc), ("dec", maps.dec, dec)):
            fit[f"{side}_explained"] = explained_of(features, labels, S, patches)
            fit[f"{side}_confidence"] = _confidence(logits, patches, maps.slot_mask)
            fit[f"{side}_edge_alignment"] = edge_alignment(features, labels, valid=patches)
            fit[f"{side}_flicker"] = label_flips(labels, valid=patches).double()
        # a map that holds NaN has an argmax all the same, and would be judged by it
        sound = (fit["enc_confidence"] + fit["dec_confidence"]).isfinite()
        margin = torch.where(sound, fit["enc_explained"] - fit["dec_explained"], torch.nan)
        measured = patches.flatten(1).any(1)
        same = agreement(enc, dec, valid=patches).double()
        return Premise(**fit, agreement=same, margin=margin, measured=measured, holds=_holds(margin, measured))


def pool(parts: Iterable[Premise]) -> Premise:
    """Put the clips of several batches together and judge them as one set.

    The verdict is of all clips, each counted once; it is not a vote of the batches. Parts, one per batch, lie on one
    device; their clips keep the order given.

    Raises: TypeError, ValueError if there is none, or one is no Premise.

    >>> nine, yes = [torch.zeros(1)] * 9, torch.tensor([True])
    >>> parts = [Premise(*nine, torch.tensor([margin]), yes, yes[0]) for margin in (0.5, -0.25, -0.125)]
    >>> pool(parts).holds.item()  # 0.125 in sum, though two of three are negative
    True
    """
    parts = tuple(parts)
    if not parts:
        raise ValueError("`parts` must hold at least one Premise; got none.")
    for part in parts:
        check_type("parts", part, Premise)
    # every field but the last has a value per clip
    *per_clip, _ = zip(*parts, strict=True)
    pooled = [torch.cat(values) for values in per_clip]
    return Premise._make([*pooled, _holds(*pooled[-2:])])


def report(premise: Premise) -> str:
    """Put a verdict in words, with mean ± standard error over clips and with its limits.

    It takes what :func:`premise` or :func:`pool` returned, and gives a few lines to print; the first says what
    :meth:`Premise.verdict` does. This one reads the tensors: call it where a wait for the device does no harm.

    Raises: TypeError if it is no Premise.

    >>> clips = {name: torch.tensor([0.5, 0.5]) for name in Premise._fields[:9]}
    >>> margin, measured = torch.tensor([0.375, 0.625]), torch.tensor([True, True])
    >>> print(report(Premise(**clips, margin=margin, measured=measured, holds=torch.tensor(True))))
    ... # doctest: +ELLIPSIS
    SSync's premise holds on these 2 clips: margin +0.500 ± 0.125 (mean ± standard error).
    ...
    """
    check_type("premise", premise, Premise)
    margin = _over_clips(premise.margin, premise.measured)
    alone = margin.num_clips == 1
    if isfinite(margin.value):
        words = _HEADLINES[margin.verdict()].format("one clip" if alone else f"these {margin.num_clips} clips")
        error = "no standard error" if alone else "mean ± standard error"
        headline = f"{words} margin {margin.text('+')} ({error})."
        reading = [_ONE_CLIP if alone else _READINGS[margin.verdict()], _CAUTION]
    else:
        broken = "maps or features of some clips hold NaN or infinities"
        headline = f" cannot be judged: {broken if margin.num_clips else 'no clip has a valid patch'}."
        reading = []
    lines = [f"SSync's premise{headline}", "", f"{'':<32}{'encoder':>16}{'decoder':>16}"]
    for title, enc, dec in (
        ("feature variance explained", premise.enc_explained, premise.dec_explained),
        ("confidence", premise.enc_confidence, premise.dec_confidence),
        ("edge alignment (AUC)", premise.enc_edge_alignment, premise.dec_edge_alignment),
        ("label flips over time", premise.enc_flicker, premise.dec_flicker),
    ):
        cells = (_over_clips(values, premise.measured).text() for values in (enc, dec))
        lines.append(f"{title:<32}" + "".join(f"{cell:>16}" for cell in cells))
    lines.append(f"{'same label in both maps':<32}{_over_clips(premise.agreement, premise.measured).text():>16}")
    num_left_out = len(premise.measured) - margin.num_clips
    if margin.num_clips and num_left_out:
        clips, were = ("clip", "was") if num_left_out == 1 else ("clips", "were")
        lines.append(f"{num_left_out} {clips} without a valid patch {were} left out.")
    return "\n".join([*lines, "", *reading])


class _Mean(NamedTuple):
    """Mean over clips, its standard error (NaN below two clips) and how many clips there are."""

    value: float
    error: float
    num_clips: int

    def text(self, sign: str = "") -> str:
        if self.num_clips == 0:
            return "-"
        value = f"{self.value:{sign}.3f}"
        return value if self.num_clips < 2 else f"{value} ± {self.error:.3f}"

    def verdict(self) -> Verdict:
        # a comparison with NaN is false
        if not abs(self.value) > 2 * self.error:
            return "cannot tell"
        return "holds" if self.value > 0 else "fails"


def _over_clips(values: Tensor, measured: Tensor) -> _Mean:
    kept = values.detach()[measured].double().cpu()
    # torch warns of a deviation of fewer than two
    error = kept.std().item() / sqrt(len(kept)) if len(kept) > 1 else nan
    return _Mean(kept.mean().item(), error, len(kept))


_HEADLINES = {"holds": " holds on {}:", "fails": " does not hold on {}:", "cannot tell": ": cannot tell from {},"}


_READINGS = {
    "holds": """\
The encoder's partition explains more of the features than the decoder's: at boundaries it has
something to teach, and the loss can be expected to help.""",
    "fails": """\
The encoder's partition explains no more of the features than the decoder's: copied into the
decoder, it can be expected to harm. Leave the loss off, or switch it on later in training.""",
    "cannot tell": """\
Both partitions explain about as much of the features: the margin is within two standard errors of
zero, so its sign is open. Take more clips.""",
}
_ONE_CLIP = "One clip says next to nothing: ask a whole evaluation set."
_CAUTION = """\
How far to trust it: the rule was found on one family of synthetic clips and one set of real ones,
and on a single kind of clips its sign can mislead. Take a whole, varied evaluation set."""


def _holds(margin: Tensor, measured: Tensor) -> Tensor:
    return torch.where(measured, margin, 0.0).sum() > 0


def _confidence(logits: Tensor, patches: Tensor, slot_mask: Tensor | None) -> Tensor:
    # the largest probability is exp(max - logsumexp); invalid patches may hold anything
    logits = only_present(logits, slot_mask).double()
    largest = (logits.amax(2) - logits.logsumexp(2)).exp()
    total = torch.where(patches, largest, 0.0).flatten(1).sum(1)
    return total / patches.flatten(1).sum(1).clamp_min(1)
