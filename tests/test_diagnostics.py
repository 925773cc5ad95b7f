"""Statistics against hand computations and loops, the verdict on maps with a known answer, and its text."""

import math
import pickle
from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from refusals import refuses
from ssync_loss.diagnostics import (
    Premise,
    Summary,
    agreement,
    edge_alignment,
    explained_variance,
    memorization,
    pool,
    premise,
    report,
    slots_in_use,
    summary,
)
from ssync_loss.functional import pseudo_labels
from ssync_loss.ssync.types import PseudoLabels
from ssync_loss.testing import (
    SSyncCase,
    decidable_clips,
    label_videos,
    poison,
    reference_hard_labels,
    reference_pseudo_labels,
    ssync_cases,
    thresholds,
    valid_masks,
)

few = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)
PER_CLIP = Premise._fields[:9]


def row(*values: float) -> Tensor:
    """Return one clip with one frame of one row."""
    return torch.tensor(values)[None, None, None]


def features_of(labels: Tensor, seed: int, *, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return features (B, T, D, H, W) with few dyadic values, so that distances tie."""
    B, T, H, W = labels.shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (B, T, channels, H, W), generator=generator).to(dtype) / 2


def valid_of(labels: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return torch.ones(labels.shape, dtype=torch.bool)
    return valid if valid.dim() == 4 else valid[:, :, None, None].expand(labels.shape)


# --- references that loop over clips in numpy ---


def slow_explained(features: Tensor, labels: Tensor, valid: Tensor) -> list[float]:
    answer = []
    for x, label, ok in zip(features.double().numpy(), labels.numpy(), valid.numpy(), strict=True):
        points, names = np.moveaxis(x, 1, -1)[ok], label[ok]
        if len(points) == 0:
            answer.append(0.0)
            continue
        total = np.square(points - points.mean(0)).sum()
        within = sum(
            np.square(points[names == name] - points[names == name].mean(0)).sum() for name in set(names.tolist())
        )
        answer.append(0.0 if total == 0 else float(1 - within / total))
    return answer


def slow_edge_alignment(features: Tensor, labels: Tensor, valid: Tensor) -> list[float]:
    answer = []
    for x, label, ok in zip(features.double().numpy(), labels.numpy(), valid.numpy(), strict=True):
        edges: list[bool] = []
        distances: list[float] = []
        for t, i, j in product(*(range(n) for n in label.shape)):
            for other in ((t, i + 1, j), (t, i, j + 1)):
                if other[1] < label.shape[1] and other[2] < label.shape[2] and ok[t, i, j] and ok[other]:
                    edges.append(bool(label[t, i, j] != label[other]))
                    difference: NDArray[np.float64] = x[t, :, i, j] - x[other[0], :, other[1], other[2]]
                    distances.append(float(np.linalg.norm(difference)))
        answer.append(float(roc_auc_score(edges, distances)) if len(set(edges)) == 2 else 0.5)
    return answer


def slow_flips(labels: Tensor, valid: Tensor) -> list[float]:
    answer = []
    for label, ok in zip(labels.tolist(), valid.tolist(), strict=True):
        pairs = [
            label[t][i][j] != label[t + 1][i][j]
            for t, i, j in product(range(len(label) - 1), range(len(label[0])), range(len(label[0][0])))
            if ok[t][i][j] and ok[t + 1][i][j]
        ]
        answer.append(sum(pairs) / len(pairs) if pairs else 0.0)
    return answer


def slow_share(event: Tensor, valid: Tensor) -> list[float]:
    return [float(one[ok].double().mean()) if bool(ok.any()) else 0.0 for one, ok in zip(event, valid, strict=True)]


# --- statistics ---


@few
@given(ssync_cases())
def test_summary_equals_loops(case: SSyncCase) -> None:
    labels = pseudo_labels(**case._asdict())
    valid = valid_of(labels.enc_labels, case.valid)
    if case.slot_mask is not None:
        valid = valid & case.slot_mask.any(1)[:, None, None, None]
    wanted = {
        "boundary_share": slow_share(labels.boundary, valid),
        "interior_share": slow_share(labels.interior, valid),
        "untaught_share": slow_share(~labels.boundary & ~labels.interior, valid),
        "agreement": slow_share(labels.enc_labels == labels.dec_labels, valid),
        "enc_slots": [len(set(one[ok].tolist())) for one, ok in zip(labels.enc_labels, valid, strict=True)],
        "dec_slots": [len(set(one[ok].tolist())) for one, ok in zip(labels.dec_labels, valid, strict=True)],
        "merges": [sum(name != s for s, name in enumerate(one)) for one in labels.representative.tolist()],
        "enc_flips": slow_flips(labels.enc_labels, valid),
        "dec_flips": slow_flips(labels.dec_labels, valid),
    }
    actual = summary(labels, valid=case.valid, slot_mask=case.slot_mask)._asdict()
    assert {name: value.tolist() for name, value in actual.items()} == {
        name: pytest.approx(value, abs=1e-6) for name, value in wanted.items()
    }
    assert actual.keys() == wanted.keys() == set(Summary._fields)


# --- how well a partition fits features ---


@few
@given(label_videos(num_slots=4), SEEDS, st.data())
def test_explained_variance_equals_loops(labels: Tensor, seed: int, data: st.DataObject) -> None:
    features = features_of(labels, seed)
    valid = data.draw(valid_masks(*labels.shape))
    actual = explained_variance(features, labels, num_slots=4, valid=valid)
    assert actual.dtype == torch.float64
    assert actual.tolist() == pytest.approx(slow_explained(features, labels, valid), abs=1e-12)


@few
@given(label_videos(num_slots=4), SEEDS, st.data())
def test_edge_alignment_equals_sklearn(labels: Tensor, seed: int, data: st.DataObject) -> None:
    features = features_of(labels, seed, channels=1)
    valid = data.draw(valid_masks(*labels.shape))
    actual = edge_alignment(features, labels, valid=valid)
    assert actual.dtype == torch.float64
    assert actual.tolist() == pytest.approx(slow_edge_alignment(features, labels, valid), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_features_explain_nothing(dtype: torch.dtype) -> None:
    # in some cases the mean differs from the constant by an ulp
    for value, width in product((0.0, 0.1, 1e-30, 12345.678, 1e30), (1, 3, 6, 7, 11)):
        labels = torch.arange(3 * width).view(1, 1, 3, width) % 4
        features = torch.full((1, 1, 4, 3, width), value, dtype=dtype)
        assert explained_variance(features, labels, num_slots=4).tolist() == [0.0]
        assert edge_alignment(features, labels).tolist() == [0.5]


def test_a_large_common_mean_does_not_matter() -> None:
    labels = torch.randint(4, (2, 3, 5, 6), generator=torch.Generator().manual_seed(0))
    features = features_of(labels, 1, channels=70)
    # multiples of 1/2 stay exact in float32 up to 2^23
    shifted = features + 2.0**22
    wanted = explained_variance(features, labels, num_slots=4)
    assert explained_variance(shifted, labels, num_slots=4).tolist() == pytest.approx(wanted.tolist(), rel=1e-9)
    assert torch.equal(edge_alignment(shifted, labels), edge_alignment(features, labels))


@pytest.mark.parametrize("channels", [1, 63, 64, 65, 130])
def test_any_number_of_channels_is_summed(channels: int) -> None:
    labels = torch.randint(4, (2, 2, 4, 5), generator=torch.Generator().manual_seed(0))
    features, valid = features_of(labels, 2, channels=channels), torch.ones(2, 2, 4, 5, dtype=torch.bool)
    assert explained_variance(features, labels, num_slots=4).tolist() == pytest.approx(
        slow_explained(features, labels, valid), abs=1e-12
    )
    assert edge_alignment(features, labels).tolist() == pytest.approx(
        slow_edge_alignment(features, labels, valid), abs=1e-12
    )


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", ["plain", "common mean", "outlier", "large", "small"])
def test_products_in_single_precision_are_good_to_six_digits(dtype: torch.dtype, off: float, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (2, 4, 24, 24), generator=generator)
    features = torch.randn(2, 4, 70, 24, 24, generator=generator, dtype=torch.float64)
    features = features + 0.1 * labels.unsqueeze(2)
    if kind == "common mean":
        features = features + 100 * torch.randn(2, 1, 70, 1, 1, generator=generator)
    elif kind == "outlier":
        # the first patch is the reference of all others
        features[:, 0, :, 0, 0] *= 30
    features = (features * {"large": 1e25, "small": 1e-25}.get(kind, 1.0)).to(dtype)
    valid = torch.rand(labels.shape, generator=generator) < 0.9
    valid[:, 0, 0, 0] = True
    wanted = slow_explained(features, labels, valid)
    assert explained_variance(features, labels, num_slots=4, valid=valid).tolist() == pytest.approx(wanted, abs=off)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_and_autocast_change_nothing(dtype: torch.dtype) -> None:
    labels = torch.randint(4, (2, 2, 4, 5), generator=torch.Generator().manual_seed(0))
    features = features_of(labels, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        explained = explained_variance(features.to(dtype), labels, num_slots=4)
        aligned = edge_alignment(features.to(dtype), labels)
    assert torch.equal(explained, explained_variance(features, labels, num_slots=4))
    assert torch.equal(aligned, edge_alignment(features, labels))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_features_give_nan_unless_invalid(bad: float) -> None:
    labels = torch.tensor([[[[0, 0, 1, 1]]]])
    features = row(0.0, 1.0, 3.0, bad)[:, :, None]
    assert explained_variance(features, labels, num_slots=2).isnan().all()
    assert edge_alignment(features, labels).isnan().all()
    valid = torch.tensor([[[[True, True, True, False]]]])
    assert explained_variance(features, labels, num_slots=2, valid=valid).isfinite().all()
    assert edge_alignment(features, labels, valid=valid).tolist() == [1.0]


# --- the premise ---


@few
@given(ssync_cases(), SEEDS)
def test_premise_equals_loops(case: SSyncCase, seed: int) -> None:
    enc = reference_hard_labels(case.enc_logits, valid=case.valid, slot_mask=case.slot_mask)
    dec = reference_hard_labels(case.dec_logits, valid=case.valid, slot_mask=case.slot_mask)
    features = features_of(enc, seed)
    valid = valid_of(enc, case.valid)
    present = torch.ones(case.enc_logits.shape[::2][:2], dtype=torch.bool)
    if case.slot_mask is not None:
        present = case.slot_mask
        valid = valid & present.any(1)[:, None, None, None]
    actual = premise(case.enc_logits, case.dec_logits, features, valid=case.valid, slot_mask=case.slot_mask)
    wanted: dict[str, list[float]] = {"agreement": slow_share(enc == dec, valid)}
    for side, logits, labels in (("enc", case.enc_logits, enc), ("dec", case.dec_logits, dec)):
        wanted[f"{side}_explained"] = slow_explained(features, labels, valid)
        wanted[f"{side}_edge_alignment"] = slow_edge_alignment(features, labels, valid)
        wanted[f"{side}_flicker"] = slow_flips(labels, valid)
        confidence = []
        for one, ok, here in zip(logits.double().movedim(2, -1), valid, present, strict=True):
            probabilities = one[ok][:, here].softmax(1)
            confidence.append(float(probabilities.amax(1).mean()) if probabilities.numel() else 0.0)
        wanted[f"{side}_confidence"] = confidence
    wanted["margin"] = [a - b for a, b in zip(wanted["enc_explained"], wanted["dec_explained"], strict=True)]
    for name, values in wanted.items():
        assert getattr(actual, name).dtype == torch.float64
        assert getattr(actual, name).tolist() == pytest.approx(values, abs=1e-6), name
    assert torch.equal(actual.measured, valid.flatten(1).any(1))
    margins = actual.margin[actual.measured]
    if len(margins) == 0 or abs(float(margins.mean())) > 1e-9:
        assert bool(actual.holds) == (len(margins) > 0 and float(margins.mean()) > 0)


@few
@given(ssync_cases(), SEEDS, thresholds(tied=False))
def test_the_merged_margin_equals_loops(case: SSyncCase, seed: int, threshold: float | None) -> None:
    masks: dict[str, Any] = {"valid": case.valid, "slot_mask": case.slot_mask}
    assume(decidable_clips(case.enc_logits, merge_threshold=threshold, dyadic=True, **masks).all())
    labels = reference_pseudo_labels(case.enc_logits, case.dec_logits, merge_threshold=threshold, **masks)
    features = features_of(labels.enc_labels, seed)
    actual = premise(case.enc_logits, case.dec_logits, features, merge_threshold=threshold, **masks)
    valid = valid_of(labels.enc_labels, case.valid)
    if case.slot_mask is not None:
        valid = valid & case.slot_mask.any(1)[:, None, None, None]
    explained = slow_explained(features, labels.enc_labels, valid)
    assert actual.merged_explained is not None
    assert actual.merged_margin is not None
    assert actual.target_slots is not None
    assert actual.merged_explained.tolist() == pytest.approx(explained, abs=1e-12)
    assert torch.equal(actual.merged_margin, actual.merged_explained - actual.dec_explained)
    in_use = [len(set(one[ok].tolist())) for one, ok in zip(labels.enc_labels, valid, strict=True)]
    assert actual.target_slots.tolist() == in_use
    plain = premise(case.enc_logits, case.dec_logits, features, **masks)
    assert torch.equal(actual.margin, plain.margin)
    if threshold is None:
        assert torch.equal(actual.merged_margin, plain.margin)


@few
@given(ssync_cases(), SEEDS, st.sampled_from([math.nan, math.inf, 7.0]))
def test_values_of_invalid_cells_do_not_matter(case: SSyncCase, seed: int, value: float) -> None:
    enc, dec, valid, slot_mask = case
    features = features_of(enc[:, :, 0], seed)
    seen = valid_of(enc[:, :, 0], valid)
    before = premise(enc, dec, features, valid=valid, slot_mask=slot_mask)
    after = premise(
        poison(enc, valid=valid, slot_mask=slot_mask, value=value),
        poison(dec, valid=valid, slot_mask=slot_mask, value=-value),
        torch.where(seen.unsqueeze(2), features, value),
        valid=valid,
        slot_mask=slot_mask,
    )
    for one, other in zip(before._asdict().values(), after._asdict().values(), strict=True):
        assert torch.equal(one, other)


def blobs(seed: int, *, clips: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return features of a moving square on a background, sharp logits and blurred logits of the square."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(clips, 3, 12, 12, dtype=torch.int64)
    for t in range(3):
        labels[:, t, 3 + t : 8 + t, 2 : 7 + t] = 1
    objects = F.one_hot(labels, 2).movedim(-1, 2).float()
    direction = torch.randn(clips, 1, 8, 1, 1, generator=generator)
    features = direction * objects[:, :, 1:] + 0.3 * torch.randn(clips, 3, 8, 12, 12, generator=generator)
    sharp = 6 * objects + torch.randn(clips, 3, 2, 12, 12, generator=generator)
    # shifting and smoothing keep the shape but misplace its edge
    blurred = F.avg_pool2d(objects.roll(2, -1).flatten(0, 1), 5, 1, 2, count_include_pad=False).view_as(sharp)
    return features, sharp, 6 * blurred


def test_premise_holds_if_the_encoder_map_is_sharper() -> None:
    features, sharp, blurred = blobs(0)
    there, back, equal = (premise(*maps, features) for maps in ((sharp, blurred), (blurred, sharp), (sharp, sharp)))
    assert (there.margin > 0.1).all()
    assert (there.enc_edge_alignment > 0.9).all()
    assert (there.enc_confidence > there.dec_confidence).all()
    assert torch.equal(back.margin, -there.margin)
    assert torch.equal(back.agreement, there.agreement)
    assert equal.margin.tolist() == [0.0] * 4
    assert equal.agreement.tolist() == [1.0] * 4
    assert [bool(one.holds) for one in (there, back, equal)] == [True, False, False]
    assert [one.verdict() for one in (there, back, equal)] == ["holds", "fails", "cannot tell"]
    assert "premise holds on these 4 clips" in report(there)
    assert "premise does not hold on these 4 clips" in report(back)


def test_premise_accepts_probabilities_flat_maps_and_another_decoder_grid() -> None:
    features, sharp, blurred = blobs(0)
    wanted = premise(sharp, blurred, features)
    for got in (
        premise(sharp.softmax(2), blurred.softmax(2), features, kind="probs"),
        premise(sharp.flatten(3), blurred.flatten(3), features, grid=(12, 12)),
        premise(sharp, blurred.repeat_interleave(3, 3).repeat_interleave(3, 4), features),
    ):
        # resizing blocks up and down is not exact at their edges
        assert got.enc_explained.tolist() == pytest.approx(wanted.enc_explained.tolist())
        assert got.dec_explained.tolist() == pytest.approx(wanted.dec_explained.tolist(), abs=0.05)


@pytest.mark.parametrize("broken", [0, 1, 2], ids=["features", "encoder", "decoder"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_premise_does_not_hold_for_nonfinite_inputs(broken: int, bad: float) -> None:
    features, sharp, blurred = given = blobs(0)
    given[broken][1, 0, 0, 4, 4] = bad
    verdict = premise(sharp, blurred, features)
    assert verdict.margin.isnan().tolist() == [False, True, False, False]
    assert not verdict.holds


def test_a_slot_of_minus_infinity_changes_nothing() -> None:
    features, sharp, blurred = blobs(0)
    dead = torch.full_like(sharp[:, :, :1], -math.inf)
    verdict = premise(torch.cat([sharp, dead], 2), torch.cat([blurred, dead], 2), features)
    assert torch.allclose(verdict.margin, premise(sharp, blurred, features).margin)


def test_premise_makes_no_graph_and_leaves_its_inputs_alone() -> None:
    features, sharp, blurred = blobs(0)
    before = [one.clone() for one in (sharp, blurred, features)]
    given_maps = [one.requires_grad_() for one in (sharp, blurred, features)]
    verdict = premise(*given_maps)
    assert not any(value.requires_grad for value in verdict._asdict().values())
    assert all(torch.equal(one, two) for one, two in zip(before, given_maps, strict=True))


def test_pooled_batches_equal_one_batch() -> None:
    features, sharp, blurred = blobs(0, clips=5)
    parts = [premise(sharp[i:j], blurred[i:j], features[i:j]) for i, j in ((0, 2), (2, 3), (3, 5))]
    pooled, whole = pool(parts), premise(sharp, blurred, features)
    assert type(pooled) is Premise
    for one, other in zip(pooled._asdict().values(), whole._asdict().values(), strict=True):
        assert torch.allclose(one.double(), other.double())
    assert torch.equal(pooled.holds, whole.holds)


def test_pooling_recomputes_holds() -> None:
    features, sharp, blurred = blobs(0)
    strong, weak = premise(sharp, blurred, features), premise(sharp, sharp, features)
    assert not weak.holds
    assert pool([weak, strong]).holds
    with pytest.raises(ValueError, match="`parts` must hold at least one Premise; got none"):
        pool([])


def test_a_premise_of_an_earlier_version_can_be_pooled_and_reported() -> None:
    features, sharp, blurred = blobs(0)
    whole = premise(sharp, blurred, features, merge_threshold=0.6)
    # the way pickle restores it
    old = Premise.__new__(Premise, *whole[:12])
    assert old.merged_margin is None
    assert old.verdict() == whole.verdict() == "holds"
    pooled = pool([old, whole])
    for one, other in zip(pooled[:12], pool([whole, whole])[:12], strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert pooled.target_slots is None
    assert report(pooled).startswith("SSync's premise holds on these 8 clips")
    assert pickle.loads(pickle.dumps(whole)).reasons() == ("encoder",)


def test_standard_errors_count_videos() -> None:
    features, sharp, blurred = blobs(0)
    # repeated clips add no evidence
    apart = premise(sharp, blurred, features)
    again = torch.arange(4).repeat(5)
    named = premise(sharp[again], blurred[again], features[again], groups=again)
    unnamed = premise(sharp[again], blurred[again], features[again])
    errors = [one.over_clips(one.margin).error for one in (apart, named, unnamed)]
    assert errors[1] == pytest.approx(errors[0])
    assert errors[2] < errors[0] / 2
    assert report(named).startswith("SSync's premise holds on these 20 clips of 4 videos: margin")
    assert report(unnamed).startswith("SSync's premise holds on these 20 clips: margin")
    # pooling keeps the videos; a clip without one counts as a video
    pooled = pool([named, named, apart])
    mean = pooled.over_clips(pooled.margin)
    assert (mean.num_clips, mean.num_videos) == (44, 8)
    one = premise(sharp, blurred, features, groups=torch.zeros(4, dtype=torch.int64))
    assert (one.verdict(), one.reasons()) == ("cannot tell", ("one video",))
    assert report(one).startswith("SSync's premise: cannot tell from these 4 clips of one video, margin")


def test_a_bad_merge_is_distinguished_from_a_bad_encoder() -> None:
    features, sharp, blurred = blobs(0)
    # the object and its background are active on the same patches
    everywhere = sharp + 8 * torch.ones(12, 12).tril()
    given_maps = everywhere, blurred, features
    assert premise(*given_maps).verdict() == "holds"
    bad = premise(*given_maps, merge_threshold=0.2)
    assert bad.holds
    assert bad.verdict() == "fails"
    assert bad.reasons() == ("merging", "one slot")
    text = report(bad)
    assert text.startswith("SSync's premise does not hold on these 4 clips: merged margin -")
    for words in ("leaves one slot", "Do not merge, or raise the threshold", "slots of the merged target"):
        assert words in text
    assert "expected to help" not in text
    # nothing merges at the highest threshold
    assert premise(*given_maps, merge_threshold=1.0).reasons() == ("encoder",)


def test_the_report_mentions_merging_only_with_a_threshold() -> None:
    features, sharp, blurred = blobs(0)
    features[0, 0, 0, 0, 0] = math.nan
    assert "merged" not in report(premise(sharp, blurred, features))
    everywhere = sharp + 8 * torch.ones(12, 12).tril()
    assert "the same, merged" in report(premise(everywhere, blurred, features, merge_threshold=0.2))


def test_constant_features_are_named() -> None:
    _, sharp, blurred = blobs(0)
    constant = premise(sharp, blurred, torch.full((4, 3, 8, 12, 12), 0.1))
    assert constant.reasons() == ("unexplained", "undecided")
    assert "are the features constant" in report(constant)


def test_memorization_is_reported() -> None:
    features, sharp, blurred = blobs(0)
    trained, fresh = premise(blurred, sharp, features), premise(blurred, sharp, features.flip(0).roll(5, -1))
    found = memorization(trained, fresh)
    assert found.trained == pytest.approx(float(trained.dec_explained.mean()))
    assert found.fresh == pytest.approx(float(fresh.dec_explained.mean()))
    error = math.hypot(*(float(one.dec_explained.std()) / 2 for one in (trained, fresh)))
    assert found.standard_error == pytest.approx(error)
    assert found.is_alarming
    text = report(trained, fresh=fresh)
    assert text.startswith(report(trained).splitlines()[0])
    assert f"explains {found.trained:.3f} of training clips, and {found.fresh:.3f} of fresh clips." in text
    assert "has memorized the training clips" in text
    assert "memorized" not in report(trained, fresh=trained)
    broken, empty = premise(blurred, sharp, features * math.nan), premise(blurred[:0], sharp[:0], features[:0])
    for unknown in (broken, empty):
        assert "Memorization cannot be judged" in report(trained, fresh=unknown)
        assert "nan" not in report(trained, fresh=unknown)
    # one clip gives no verdict
    assert not memorization(premise(blurred[:1], sharp[:1], features[:1]), fresh).is_alarming


def test_no_tensor_is_read_on_the_host() -> None:
    with FakeTensorMode():
        enc, dec = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 7, 9)
        valid, slot_mask = torch.rand(2, 3, 5, 6) > 0.2, torch.rand(2, 4) > 0.2
        features = torch.randn(2, 3, 70, 5, 6, dtype=torch.float16)
        verdict = premise(enc, dec, features, valid=valid, slot_mask=slot_mask)
        assert [tuple(value.shape) for value in verdict._asdict().values()] == [(2,)] * 11 + [()] + [(2,)] * 4
        assert premise(enc.softmax(2), dec.softmax(2), features, kind="probs").holds.shape == ()
        assert pool([verdict, verdict]).margin.shape == (4,)
        labels = pseudo_labels(enc, dec, valid=valid, slot_mask=slot_mask)
        counts = summary(labels, valid=valid, slot_mask=slot_mask)
        assert all(value.shape == (2,) for value in (*counts, *summary(labels)))


# --- the report ---


def verdict_of(*margins: float, measured: list[bool] | None = None) -> Premise:
    margin = torch.tensor(margins, dtype=torch.float64)
    ok = torch.tensor([True] * len(margins) if measured is None else measured, dtype=torch.bool)
    values = {name: torch.linspace(0.1 + i / 10, 0.2 + i / 10, len(margins)) for i, name in enumerate(PER_CLIP)}
    holds = torch.where(ok, margin, 0.0).sum() > 0
    return Premise(**values, margin=margin, measured=ok, holds=holds)


def test_report_shows_mean_and_standard_error_over_clips() -> None:
    text = report(verdict_of(0.10, 0.20, 0.15))
    error = np.std([0.10, 0.20, 0.15], ddof=1) / math.sqrt(3)
    assert text.splitlines()[0] == (
        f"SSync's premise holds on these 3 clips: margin +0.150 ± {error:.3f} (mean ± standard error)."
    )
    assert "can be expected to help" in text
    # 0.1, 0.15 and 0.2
    assert "feature variance explained" in text
    assert f"0.150 ± {0.05 / math.sqrt(3):.3f}" in text
    assert "one family of synthetic clips, one set of real clips" in text
    assert "training clips, about 160 or more" in text


@pytest.mark.parametrize(
    ("verdict", "first", "later"),
    [
        (verdict_of(-0.03, -0.02, -0.025), "premise does not hold on these 3 clips: margin -0.025 ± 0.003", "worse"),
        (
            verdict_of(0.10, 0.0, 0.20, measured=[True, False, True]),
            "premise holds on these 2 clips: margin +0.150 ± 0.050",
            "1 clip without a valid patch was left out",
        ),
        (
            verdict_of(0.25),
            "premise: cannot tell from one clip, margin +0.250 (no standard error).",
            "Clips of one video do not decide. Measure clips of many videos.",
        ),
        (verdict_of(0.5, measured=[False]), "premise cannot be judged: no clip has a valid patch.", ""),
        (verdict_of(0.5, math.nan), "premise cannot be judged", "NaN or infinities"),
    ],
)
def test_report_states_its_evidence(verdict: Premise, first: str, later: str) -> None:
    text = report(verdict)
    assert text.startswith(f"SSync's {first}")
    assert later in text
    assert ("±" in text) == (verdict.measured.sum() > 1)


@pytest.mark.parametrize(
    ("margins", "wanted"),
    [
        ((0.30, 0.31, 0.29), "holds"),
        ((-0.30, -0.31, -0.29), "fails"),
        ((0.30, -0.25, 0.01), "cannot tell"),
        ((-0.30, 0.25, -0.01), "cannot tell"),
        # just less than two standard errors, and just more
        ((0.099, 0.3), "cannot tell"),
        ((0.101, 0.3), "holds"),
        ((-0.099, -0.3), "cannot tell"),
        ((-0.101, -0.3), "fails"),
        # no variance
        ((0.25, 0.25), "holds"),
        ((-0.25, -0.25, -0.25), "fails"),
        ((0.0, 0.0), "cannot tell"),
        # no standard error
        ((0.25,), "cannot tell"),
        ((-0.25,), "cannot tell"),
        ((), "cannot tell"),
        ((0.5, math.nan, 0.5), "cannot tell"),
        ((0.5, math.inf), "cannot tell"),
    ],
)
def test_the_verdict_is_undecided_within_two_standard_errors(margins: tuple[float, ...], wanted: str) -> None:
    verdict = verdict_of(*margins)
    assert verdict.verdict() == wanted
    words = {"holds": " holds ", "fails": " does not hold ", "cannot tell": "cannot"}
    text = report(verdict)
    assert [word for word, sign in words.items() if sign in text.splitlines()[0]] == [wanted]
    assert ("expected to" in text) == (wanted != "cannot tell")
    # `holds` is the sign of the mean, with any standard error
    assert bool(verdict.holds) == (len(margins) > 0 and sum(margins) > 0)


@pytest.mark.parametrize("clips", [2, 4, 8, 16])
def test_noise_seldom_gets_a_verdict(clips: int) -> None:
    generator = torch.Generator().manual_seed(clips)
    maps = [torch.randn(100, clips, 2, 4, 8, 8, generator=generator) for _ in range(2)]
    features = torch.randn(100, clips, 2, 6, 8, 8, generator=generator)
    verdicts = Counter(premise(*draw).verdict() for draw in zip(*maps, features, strict=True))
    # mean / error has Student's distribution with clips - 1 degrees of freedom
    share = {2: 0.295, 4: 0.139, 8: 0.086, 16: 0.064}[clips]
    assert abs(verdicts["holds"] + verdicts["fails"] - 100 * share) < 3 * math.sqrt(100 * share)


# --- errors ---

MAPS, FEATURES = torch.zeros(2, 3, 4, 5, 6), torch.zeros(2, 3, 7, 5, 6)
LABELS = torch.zeros(2, 3, 5, 6, dtype=torch.int64)
NO_FRAME = {"features": FEATURES[:, :0], "labels": LABELS[:, :0]}
PSEUDO = PseudoLabels(LABELS, LABELS, LABELS == 0, LABELS == 0, torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("call", "given", "message"),
    [
        (premise, {"features": FEATURES.mT}, "`features` must have shape (B=2, T=3, D, H=5, W=6); got (2, 3, 7, 6, 5)"),
        (premise, {"features": FEATURES[:, :, :0]}, "`features` must have D >= 1; got D=0."),
        (premise, {"groups": torch.zeros(3, dtype=torch.int64)}, "`groups` must have shape (B=2); got (3,)."),
        (premise, {"merge_threshold": 1.5}, "`merge_threshold` must be within [0.0, 1.0]; got 1.5."),
        (explained_variance, {"labels": LABELS + 2}, "`labels` must lie within [0, 1]; got values from 2 to 2."),
        (explained_variance, {"num_slots": 0}, "`num_slots` must be at least 1; got 0."),
        (edge_alignment, {"valid": torch.ones(2, 4) > 0}, "`valid` must have shape (B=2, T=3); got (2, 4)."),
        (edge_alignment, NO_FRAME, "`labels` must have T >= 1; got T=0."),
        (agreement, {"dec_labels": LABELS[:, :1]}, "`dec_labels` must have shape (B=2, T=3, H=5, W=6); got"),
        (slots_in_use, {"labels": LABELS[:, :0]}, "`labels` must have T >= 1; got T=0."),
        (slots_in_use, {"labels": LABELS - 1}, "`labels` must be at least 0; got -1."),
        (summary, {"slot_mask": torch.ones(2, 5) > 0}, "`slot_mask` must have shape (B=2, S=4); got (2, 5)."),
    ],
)
def test_values_are_refused_by_name(call: Any, given: dict[str, Any], message: str) -> None:
    usual: dict[Any, dict[str, Any]] = {
        premise: {"enc_logits": MAPS, "dec_logits": MAPS, "features": FEATURES},
        explained_variance: {"features": FEATURES, "labels": LABELS, "num_slots": 2},
        edge_alignment: {"features": FEATURES, "labels": LABELS},
        agreement: {"enc_labels": LABELS},
        summary: {"labels": PSEUDO},
    }
    refuses(ValueError, message, call, **usual.get(call, {}) | given)


@pytest.mark.parametrize("wrong", [tuple(PSEUDO), "labels", None, LABELS])
def test_other_types_are_refused_by_name(wrong: Any) -> None:
    kind = type(wrong).__name__
    refuses(TypeError, f"`labels` must be PseudoLabels; got {kind}.", summary, wrong)
    refuses(TypeError, f"`premise` must be Premise; got {kind}.", report, wrong)
    refuses(TypeError, f"`trained` must be Premise; got {kind}.", memorization, wrong, verdict_of(0.5))
    refuses(TypeError, f"`fresh` must be Premise; got {kind}.", memorization, verdict_of(0.5), wrong)
    refuses(TypeError, f"`parts` must be Premise; got {kind}.", pool, [verdict_of(0.5), wrong])
    refuses(TypeError, "`parts` must be Premise; got Tensor.", pool, verdict_of(0.5))
