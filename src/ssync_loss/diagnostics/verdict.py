"""Test the premise of the loss on a model's maps and features, without ground truth.

The encoder teaches the decoder at boundaries. This can only help if the encoder's partition fits the features better
than the decoder's.
"""

from collections.abc import Iterable
from math import hypot, isfinite, nan, sqrt
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ssync_loss._axes import Axes
from ssync_loss._checks import as_index, check_type
from ssync_loss._inputs import check_labels
from ssync_loss.diagnostics.fit import edge_alignment
from ssync_loss.diagnostics.statistics import agreement, label_flips, slots_in_use
from ssync_loss.ssync.doubts import warn_of_doubts
from ssync_loss.ssync.fit import explained_shares, place_features
from ssync_loss.ssync.functions import labels_of
from ssync_loss.ssync.labels import hard_labels
from ssync_loss.ssync.maps import Grid, KindArgument, only_present, prepare_maps
from ssync_loss.ssync.merging import unmerged
from ssync_loss.ssync.settings import Settings

Verdict: TypeAlias = Literal["holds", "fails", "cannot tell"]
Reason: TypeAlias = Literal[
    "no clip", "not finite", "unexplained", "one slot", "merging", "encoder", "decoder", "undecided", "one video"
]
# a model has memorized its clips if its explained variance drops below this fraction on fresh clips. In one study it
# dropped to a half for a model trained on 41 clips, and did not drop for a model trained on 1,500.
MEMORIZED = 0.75


class Premise(NamedTuple):
    """The result of :func:`premise`, one value per clip unless stated otherwise.

    Attributes:
        enc_explained, dec_explained: (B,), share of the feature variance that the hard labels of a map explain.
        enc_confidence, dec_confidence: (B,), mean of the largest slot probability.
        enc_edge_alignment, dec_edge_alignment: (B,), AUC of the feature distance across label edges.
        enc_flicker, dec_flicker: (B,), share of labels that change from one frame to the next.
        agreement: (B,), share of patches with the same label in both maps.
        margin: (B,), ``enc_explained - dec_explained``.
        measured: (B,) bool, clips with a valid patch; the means leave out the others.
        holds: scalar bool, ``margin[measured].mean() > 0``; :meth:`verdict` adds the standard error.
        merged_explained: (B,), share that the encoder's merged labels explain.
        merged_margin: (B,), ``merged_explained - dec_explained``. Without a merge threshold it equals ``margin``.
        target_slots: (B,) int64, number of slots in the encoder's merged labels.
        groups: (B,) int64, the video of every clip; a clip with -1 counts as a whole video.

    The last four are None in a Premise of an earlier version.

    Raises: nothing; fields are not checked.

    >>> half, yes = torch.tensor([0.5]), torch.tensor([True])
    >>> Premise(*[half] * 10, measured=yes, holds=yes[0], merged_margin=half / 2).decisive.item()
    0.25
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
    merged_explained: Tensor | None = None
    merged_margin: Tensor | None = None
    target_slots: Tensor | None = None
    groups: Tensor | None = None

    def verdict(self) -> Verdict:
        """Tell whether the mean of the merged margin is more than two standard errors away from zero.

        The verdict is "holds" if the mean is above, "fails" if it is below, else "cannot tell". Fewer than two videos
        or a margin that is not finite give "cannot tell". If merging leaves one slot in most clips, the verdict is
        "fails". Noise gives "holds" once in 40 times, more often with few videos. This reads the tensors.

        >>> clip, yes = torch.zeros(1), torch.tensor([True])
        >>> parts = [Premise(*[clip] * 9, torch.tensor([margin]), yes, yes[0]) for margin in (0.5, -0.25, 0.5)]
        >>> pool(parts).verdict(), pool([parts[0], parts[2]]).verdict()  # 0.25 ± 0.25, and 0.5 ± 0
        ('cannot tell', 'holds')
        """
        return "fails" if "one slot" in self.reasons() else self.over_clips(self.decisive).verdict()

    def reasons(self) -> tuple[Reason, ...]:
        """Name the reasons of the verdict; :func:`report` puts them in words.

        The last reason is ``"encoder"`` or ``"decoder"``, the map that explains more; ``"undecided"`` if the margin is
        within two standard errors of zero; ``"one video"``; ``"no clip"`` or ``"not finite"`` if there is no margin; or
        ``"one slot"`` if merging leaves one slot in most clips. ``"unexplained"`` precedes it if no partition explains
        anything, as with constant features; ``"merging"`` precedes it if the plain margin holds, but not the merged.

        >>> clips, yes = torch.tensor([0.5, 0.5]), torch.tensor([True, True])
        >>> Premise(*[clips] * 9, margin=clips, measured=yes, holds=yes[0], merged_margin=-clips).reasons()
        ('merging', 'decoder')
        """
        margin = self.over_clips(self.decisive)
        if not isfinite(margin.value):
            return ("not finite" if margin.num_clips else "no clip",)
        reasons: list[Reason] = []
        explained = (self.enc_explained > 0) & self.measured
        if not explained.any() and not (self.dec_explained > 0)[self.measured].any():
            reasons.append("unexplained")
        verdict = margin.verdict()
        if verdict != "holds" and self.over_clips(self.margin).verdict() == "holds":
            reasons.append("merging")
        if self.target_slots is not None and 2 * int((explained & (self.target_slots == 1)).sum()) > margin.num_clips:
            return *reasons, "one slot"
        last: dict[Verdict, Reason] = {"holds": "encoder", "fails": "decoder", "cannot tell": "undecided"}
        return *reasons, "one video" if margin.num_videos == 1 else last[verdict]

    @property
    def decisive(self) -> Tensor:
        """The margin that decides the verdict: the merged margin, if there is one."""
        return self.margin if self.merged_margin is None else self.merged_margin

    def over_clips(self, values: Tensor) -> "MeanOverClips":
        """Average a field over the measured clips; the standard error counts videos."""
        measured = self.measured.cpu()
        kept = values.detach().cpu()[measured].double()
        videos = alone = -1 - torch.arange(len(measured))
        if self.groups is not None:
            videos = torch.where(self.groups.cpu() < 0, alone, self.groups.cpu())
        videos, video = videos[measured].unique(return_inverse=True)
        mean, number = kept.mean(), len(videos)
        # if every clip is a video, this is the standard deviation over the root of the number of clips
        deviation = torch.zeros(number, dtype=torch.float64).index_add(0, video, kept - mean)
        error = nan
        if number > 1:
            error = sqrt(deviation.square().sum().item() * number / (number - 1)) / len(kept)
        return MeanOverClips(mean.item(), error, len(kept), number)


class MeanOverClips(NamedTuple):
    """Mean over clips, its standard error (NaN below two videos), and the numbers of clips and videos."""

    value: float
    error: float
    num_clips: int
    num_videos: int

    def verdict(self) -> Verdict:
        """Tell whether the mean is more than two standard errors away from zero."""
        # a comparison with NaN is false
        if not abs(self.value) > 2 * self.error:
            return "cannot tell"
        return "holds" if self.value > 0 else "fails"


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
    merge_threshold: float | Tensor | None = None,
    groups: Tensor | None = None,
) -> Premise:
    """Test whether the encoder's partition explains more of the features than the decoder's.

    ``holds = mean(explained(enc) - explained(dec)) > 0``, with :func:`explained_variance` of the unmerged hard labels.
    If ``merge_threshold`` is given, the encoder's labels are also merged, and :meth:`Premise.verdict` judges the merged
    margin. In trials on small models the merged margin predicted the sign of the effect more often.

    Test a model that trains with its own losses, before SSync is switched on. Test it **on its training clips**: there
    the loss acts. :func:`memorization` compares training clips with fresh clips. :func:`pool` joins batches, and
    :func:`report` puts the verdict in words. Confidence, edge alignment, flicker and agreement do not affect the
    verdict.

    A clip's margins are NaN, and the premise does not hold, if a valid patch has NaN or +inf in a map, -inf for all
    slots, or features that are not finite.

    Shape: enc_logits, dec_logits: (B, T, S, H, W) or (B, T, S, N), or as ``axes`` says. features: (B, T, D, H, W) on
        the encoder's grid, or as ``features_axes`` says. groups: (B,) integers. Returns (B,) tensors, all but the
        counts in float64, ``measured`` (B,) bool, ``holds`` scalar bool: nothing is read on the host.

    ``features`` are the input of the slots, for example backbone features, of any floating-point type.
    ``features_axes`` is their layout in einops' notation, with d for the channels: (B, T, N, D) is ``"b t (h w) d"``.
    ``groups`` names the video of each clip, so that standard errors count videos. Other arguments are as in
    ``pseudo_labels``. A clip without a present slot has no valid patch.

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
        masks: dict[str, Any] = {"valid": valid, "slot_mask": slot_mask, "num_frames": num_frames}
        maps = prepare_maps(enc_logits, dec_logits, kind=kind, grid=grid, axes=axes, look=warn_of_doubts, **masks)
        features = place_features(features, features_axes, maps.enc)
        B, _, S = maps.enc.shape[:3]
        if groups is not None:
            check_labels("groups", groups, "B", {"B": B}, enc_logits=maps.enc)
        enc, dec = hard_labels(maps)
        patches = torch.ones_like(enc, dtype=torch.bool) if maps.counted is None else maps.counted
        representative = unmerged(B, S, enc.device)
        if merge_threshold is not None:
            settings = Settings(merge_threshold)
            settings.check()
            representative = labels_of(maps, settings, "auto").representative
        shares, _ = explained_shares(features, enc, dec, S, maps.counted, representative)
        fit: dict[str, Tensor] = {}
        for side, logits, labels, share in (("enc", maps.enc, enc, shares[0]), ("dec", maps.dec, dec, shares[1])):
            fit[f"{side}_explained"] = share
            fit[f"{side}_confidence"] = _confidence(logits, patches, maps.slot_mask)
            fit[f"{side}_edge_alignment"] = edge_alignment(features, labels, valid=patches)
            fit[f"{side}_flicker"] = label_flips(labels, valid=patches).double()
        # a map with NaN has an argmax, too, but no valid margin
        sound = (fit["enc_confidence"] + fit["dec_confidence"]).isfinite()
        margin, merged_margin = (torch.where(sound, one - shares[1], torch.nan) for one in (shares[0], shares[2]))
        measured = patches.flatten(1).any(1)
        merged = representative.gather(1, enc.flatten(1)).view_as(enc)
        return Premise(
            **fit,
            agreement=agreement(enc, dec, valid=patches).double(),
            margin=margin,
            measured=measured,
            holds=_holds(margin, measured),
            merged_explained=shares[2],
            merged_margin=merged_margin,
            target_slots=slots_in_use(merged, valid=patches),
            groups=torch.full_like(enc[:, 0, 0, 0], -1) if groups is None else as_index("groups", groups),
        )


def pool(parts: Iterable[Premise]) -> Premise:
    """Join the clips of several batches into one set.

    The verdict counts each clip once. The parts, one per batch, must be on one device; clips stay in order.

    Raises: ValueError if there is no part; TypeError if a part is no Premise.

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
    whole = {}
    for name, values in zip(Premise._fields, zip(*parts, strict=True), strict=True):
        # a field that is None in one part is None in the whole
        if name != "holds" and all(one is not None for one in values):
            whole[name] = torch.cat(values)
    return Premise(**whole, holds=_holds(whole["margin"], whole["measured"]))


class Memorization(NamedTuple):
    """The explained variance of the decoder on training clips and on fresh clips, from :func:`memorization`.

    Attributes:
        trained, fresh: means over clips of ``dec_explained``.
        standard_error: standard error of their difference.

    Raises: nothing; fields are not checked.

    >>> Memorization(0.5, 0.25, 0.01).is_alarming, Memorization(0.5, 0.45, 0.01).is_alarming
    (True, False)
    """

    trained: float
    fresh: float
    standard_error: float

    @property
    def is_alarming(self) -> bool:
        """Whether fresh clips are explained less than 3/4 as well, with a drop above two standard errors."""
        return self.trained - self.fresh > 2 * self.standard_error and self.fresh < MEMORIZED * self.trained


def memorization(trained: Premise, fresh: Premise) -> Memorization:
    """Compare the explained variance of the decoder on a model's training clips and on fresh clips.

    A large drop shows that the model has memorized its training clips. On these clips the decoder is then the better
    map, and the loss can be expected to harm. On fresh clips any encoder looks good next to such a decoder. This reads
    the tensors.

    Raises: TypeError if an argument is no Premise.

    >>> values, yes = torch.tensor([0.5, 0.5]), torch.tensor([True, True])
    >>> trained, fresh = (Premise(*[one] * 10, measured=yes, holds=yes[0]) for one in (values, values / 2))
    >>> memorization(trained, fresh)
    Memorization(trained=0.5, fresh=0.25, standard_error=0.0)
    """
    check_type("trained", trained, Premise)
    check_type("fresh", fresh, Premise)
    there, elsewhere = (one.over_clips(one.dec_explained) for one in (trained, fresh))
    return Memorization(there.value, elsewhere.value, hypot(there.error, elsewhere.error))


def _holds(margin: Tensor, measured: Tensor) -> Tensor:
    return torch.where(measured, margin, 0.0).sum() > 0


def _confidence(logits: Tensor, patches: Tensor, slot_mask: Tensor | None) -> Tensor:
    # the largest probability is exp(max - logsumexp); invalid patches may hold NaN
    logits = only_present(logits, slot_mask).double()
    largest = (logits.amax(2) - logits.logsumexp(2)).exp()
    total = torch.where(patches, largest, 0.0).flatten(1).sum(1)
    return total / patches.flatten(1).sum(1).clamp_min(1)
