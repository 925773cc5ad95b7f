"""Properties of arbitrary maps: renaming, flips, NaN, cropping, shifts, empty selections, order."""

import math
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines_in_turn import ENGINES_IN_TURN
from ssync_loss import PseudoLabels, SSyncLoss, SSyncTerms
from ssync_loss.functional import (
    boundary_refinement_loss,
    interior_denoising_loss,
    pseudo_labels,
    selective_distillation_loss,
    slot_overlap,
)
from ssync_loss.testing import (
    DistillationCase,
    MapPair,
    SSyncCase,
    assert_close_gradient,
    assert_close_loss,
    assert_same_labels,
    distillation_cases,
    gradient_scale,
    label_videos,
    map_pairs,
    poison,
    region_knobs,
    slot_masks,
    ssync_cases,
    thresholds,
    untied_clips,
    valid_masks,
)

# some drawn maps and masks look like mistakes
pytestmark = pytest.mark.filterwarnings("ignore:.*looks like probabilities", "ignore:.*`slot_mask` leaves")

INF, NAN = math.inf, math.nan
RUBBISH = (NAN, INF, -INF)
SOFT = [("mse", 0.0), ("cross_entropy", 0.2)]
Settings: TypeAlias = dict[str, Any]

# 15 batches of 16 clips are 240 cases per property
few = settings(max_examples=15)
generators = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))
MAPS = map_pairs(minus_inf=True)
GENERIC = thresholds(tied=False)


class Result(NamedTuple):
    """The terms of a loss, and the gradients of the total at both maps."""

    terms: SSyncTerms
    enc_grad: Tensor
    dec_grad: Tensor


def run(
    enc_logits: Tensor,
    dec_logits: Tensor,
    *,
    valid: Tensor | None = None,
    slot_mask: Tensor | None = None,
    **knobs: Any,
) -> Result:
    enc, dec = (one.detach().clone().requires_grad_() for one in (enc_logits, dec_logits))
    terms = SSyncLoss(**knobs).terms(enc, dec, valid=valid, slot_mask=slot_mask)
    enc_grad, dec_grad = torch.autograd.grad(terms.total, (enc, dec))
    return Result(terms, enc_grad, dec_grad)


def assert_same(actual: Result, expected: Result) -> None:
    """Require bitwise equality."""
    assert_same_labels(actual.terms.labels, expected.terms.labels)
    for got, wanted in zip((*actual.terms[:5], *actual[1:]), (*expected.terms[:5], *expected[1:]), strict=True):
        assert torch.equal(got, wanted)


def assert_close(actual: Result, expected: Result, *, slot_mask: Tensor | None = None, **knobs: Any) -> None:
    """Require equal counts, and equal losses and gradients up to rounding. Labels may differ."""
    labels = expected.terms.labels
    assert torch.equal(actual.terms.num_boundary, expected.terms.num_boundary)
    assert torch.equal(actual.terms.num_interior, expected.terms.num_interior)
    for got, wanted in zip(actual.terms[:3], expected.terms[:3], strict=True):
        assert_close_loss(got, wanted)
    for got, wanted, region in (
        (actual.enc_grad, expected.enc_grad, labels.interior),
        (actual.dec_grad, expected.dec_grad, labels.boundary),
    ):
        criterion = knobs.get("criterion", "mse")
        scale = gradient_scale(region, wanted.shape[2], criterion=criterion, slot_mask=slot_mask)
        assert_close_gradient(got, wanted, scale=scale)


def clips_of(case: SSyncCase, clips: Tensor) -> SSyncCase:
    enc, dec, valid, slot_mask = case
    return SSyncCase(
        enc[clips],
        dec[clips],
        None if valid is None else valid[clips],
        None if slot_mask is None else slot_mask[clips],
    )


def cells_of(case: SSyncCase) -> Tensor:
    """Return the valid patches (B, T, H, W) of clips with a present slot."""
    cells = torch.ones_like(case.enc_logits[:, :, 0], dtype=torch.bool)
    if case.valid is not None:
        cells = cells & (case.valid if case.valid.ndim == 4 else case.valid[:, :, None, None])
    return cells if case.slot_mask is None else cells & case.slot_mask.any(1)[:, None, None, None]


def seen_by(case: SSyncCase) -> Tensor:
    """Return the cells of a map that may matter, (B, T, S, H, W)."""
    cells = cells_of(case)[:, :, None].expand_as(case.enc_logits)
    return cells if case.slot_mask is None else cells & case.slot_mask[:, None, :, None, None]


class TestRenaming:
    @given(
        case=ssync_cases(maps=map_pairs(ties=False, minus_inf=True, max_slots=4)),
        order=st.permutations(range(4)),
        threshold=GENERIC,
        knobs=region_knobs(),
    )
    @few
    def test_renamed_slots_rename_labels(
        self, case: SSyncCase, order: list[int], threshold: float | None, knobs: Settings
    ) -> None:
        masks: Settings = {"valid": case.valid, "slot_mask": case.slot_mask}
        untied = untied_clips(case.enc_logits, case.dec_logits, merge_threshold=threshold, **masks)
        case = clips_of(case, untied)
        # new slot i is old slot names[i]
        names = torch.tensor([old for old in order if old < case.enc_logits.shape[2]])
        renamed = SSyncCase(
            case.enc_logits[:, :, names],
            case.dec_logits[:, :, names],
            case.valid,
            None if case.slot_mask is None else case.slot_mask[:, names],
        )
        before = run(**case._asdict(), merge_threshold=threshold, **knobs)
        after = run(**renamed._asdict(), merge_threshold=threshold, **knobs)

        old, new = before.terms.labels, after.terms.labels
        cells = cells_of(case)
        for field in ("enc_labels", "dec_labels"):
            assert torch.equal(names[getattr(new, field)][cells], getattr(old, field)[cells])
        assert torch.equal(names[new.representative], old.representative[:, names])
        assert torch.equal(new.boundary, old.boundary)
        assert torch.equal(new.interior, old.interior)
        back = Result(after.terms, *(torch.empty_like(g).index_copy(2, names, g) for g in after[1:]))
        assert_close(back, before, slot_mask=case.slot_mask)

    @pytest.mark.parametrize(
        ("num_slots", "names"), [(128, (0, 127, 3)), (129, (0, 128, 3)), (256, (1, 255, 2)), (257, (0, 256, 44))]
    )
    def test_slot_indices_may_exceed_a_byte(self, num_slots: int, names: tuple[int, int, int]) -> None:
        labels = torch.tensor(names)[torch.randint(3, (1, 2, 3, 4))]
        enc, dec = (
            F.one_hot(labels, num_slots).movedim(-1, 2).float() * 3 + torch.rand(1, 2, num_slots, 3, 4)
            for _ in range(2)
        )
        assert torch.equal(pseudo_labels(enc, dec, merge_threshold=None).enc_labels, labels)
        expected = run(enc, dec, merge_threshold=None, backend="reference")
        assert expected.terms.num_boundary > 0
        assert_close(run(enc, dec, merge_threshold=None), expected)


# axes of (B, T, H, W) to flip
FLIPS = [(1,), (2,), (3,), (2, 3), (1, 3), (1, 2, 3)]


class TestFlips:
    @given(axes=st.sampled_from(FLIPS), maps=MAPS, threshold=GENERIC, knobs=region_knobs())
    @settings(max_examples=30)
    def test_flipped_maps_flip_labels_and_gradients(
        self, axes: tuple[int, ...], maps: MapPair, threshold: float | None, knobs: Settings
    ) -> None:
        # the slot axis of maps lies between time and height
        map_axes = [axis if axis == 1 else axis + 1 for axis in axes]
        before = run(*maps, merge_threshold=threshold, **knobs)
        after = run(*(one.flip(map_axes) for one in maps), merge_threshold=threshold, **knobs)
        turned = before.terms.labels._replace(
            **{key: getattr(before.terms.labels, key).flip(axes) for key in PseudoLabels._fields[:4]}
        )
        assert_same_labels(after.terms.labels, turned)
        assert_close(Result(after.terms, *(grad.flip(map_axes) for grad in after[1:])), before)


class TestAgreement:
    @given(labels=label_videos(), threshold=thresholds(), criterion=st.sampled_from(("mse", "cross_entropy")))
    @few
    def test_confident_maps_that_agree_have_no_loss(
        self, labels: Tensor, threshold: float | None, criterion: str
    ) -> None:
        # slots are active on disjoint patches, so none merge
        maps = 60.0 * F.one_hot(labels, 4).movedim(-1, 2).float()
        result = run(maps, maps, merge_threshold=threshold, criterion=criterion)
        assert torch.equal(result.terms.labels.enc_labels, labels)
        assert 0 <= result.terms.total.item() < 1e-20
        assert result.enc_grad.abs().max() < 1e-20
        assert result.dec_grad.abs().max() < 1e-20

    def test_confident_maps_that_disagree_have_the_largest_loss(self) -> None:
        labels = torch.tensor([[[[0, 0, 1, 1]]]])
        enc, dec = (60.0 * F.one_hot(one, 2).movedim(-1, 2).float() for one in (labels, 1 - labels))
        terms = SSyncLoss().eval().terms(enc, dec)
        # (0 - 1)^2 and (1 - 0)^2 average to 1
        assert terms.boundary == 1
        assert terms.interior == 1


def shared_length(first: int, first_of: int, second: int, second_of: int) -> int:
    """Return the overlap of cell `first` of `first_of` and cell `second` of `second_of`, in units of 1 / (product)."""
    low = max(first * second_of, second * first_of)
    high = min((first + 1) * second_of, (second + 1) * first_of)
    return max(high - low, 0)


def seen_from(cells: Tensor, height: int, width: int) -> Tensor:
    """Return the cells of another grid that share area with a valid patch, in a loop over all pairs."""
    rows, columns = cells.shape[2:]
    seen = torch.zeros(*cells.shape[:2], height, width, dtype=torch.bool)
    for h, w, y, x in product(range(rows), range(columns), range(height), range(width)):
        if shared_length(h, rows, y, height) and shared_length(w, columns, x, width):
            seen[:, :, y, x] |= cells[:, :, h, w]
    return seen


class TestPoison:
    @ENGINES_IN_TURN
    @given(
        case=ssync_cases(maps=map_pairs(batch=8)),
        kinds=st.sampled_from((("logits", "logits"), ("probs", "probs"), ("logits", "probs"))),
        soft=st.sampled_from(SOFT),
        threshold=GENERIC,
        knobs=region_knobs(),
        value=st.sampled_from((*RUBBISH, 1e30)),
    )
    @settings(max_examples=30)
    def test_values_of_invalid_patches_and_absent_slots_do_not_matter(
        self,
        engine: Any,
        case: SSyncCase,
        kinds: tuple[str, str],
        soft: tuple[str, float],
        threshold: float | None,
        knobs: Settings,
        value: float,
    ) -> None:
        maps = [
            one if what == "logits" else torch.softmax(one, 2)
            for one, what in zip((case.enc_logits, case.dec_logits), kinds, strict=True)
        ]
        masks: Settings = {"valid": case.valid, "slot_mask": case.slot_mask}
        loss: Settings = {
            "criterion": soft[0],
            "label_smoothing": soft[1],
            "merge_threshold": threshold,
            "kind": kinds,
        }
        with engine():
            clean = run(*maps, **masks | loss | knobs)
            dirty = run(*(poison(one, value=value, **masks) for one in maps), **masks | loss | knobs)
        assert dirty.terms.total.isfinite()
        assert_same(dirty, clean)
        unseen = ~seen_by(case)
        assert not dirty.enc_grad[unseen].any()
        assert not dirty.dec_grad[unseen].any()

    @given(
        size=st.sampled_from([(8, 12), (2, 3), (1, 1), (3, 5), (7, 4), (4, 3)]),
        kind=st.sampled_from(("logits", "probs")),
        data=st.data(),
        value=st.sampled_from((*RUBBISH, 1e30)),
        generator=generators,
    )
    @settings(max_examples=40)
    def test_nor_do_they_on_another_decoder_grid(
        self, size: tuple[int, int], kind: str, data: st.DataObject, value: float, generator: torch.Generator
    ) -> None:
        enc, dec = (torch.randn(6, 2, 3, *one, generator=generator) for one in ((4, 6), size))
        if kind == "probs":
            enc, dec = torch.softmax(enc, 2), torch.softmax(dec, 2)
        valid = data.draw(valid_masks(6, 2, 4, 6) | valid_masks(6, 2))
        slot_mask = data.draw(st.none() | slot_masks(6, 3))
        case = SSyncCase(enc, enc, valid, slot_mask)
        dec_valid = seen_from(cells_of(case), *size)
        masks: Settings = {"valid": valid, "slot_mask": slot_mask}
        clean = run(enc, dec, **masks, kind=kind)
        dirty = run(
            poison(enc, value=value, **masks),
            poison(dec, value=value, valid=dec_valid, slot_mask=slot_mask),
            **masks,
            kind=kind,
        )
        assert dirty.terms.total.isfinite()
        assert_same(dirty, clean)
        assert not dirty.dec_grad[~dec_valid[:, :, None].expand_as(dec)].any()
        assert not dirty.enc_grad[~seen_by(case)].any()
        if slot_mask is not None:
            absent = ~slot_mask[:, None, :, None, None]
            assert not (dirty.dec_grad * absent).any()

    @given(case=ssync_cases(maps=MAPS), value=st.sampled_from(RUBBISH))
    @few
    def test_nor_do_they_in_the_overlap(self, case: SSyncCase, value: float) -> None:
        masks: Settings = {"valid": case.valid, "slot_mask": case.slot_mask}
        dirty = poison(case.enc_logits, value=value, **masks)
        assert torch.equal(slot_overlap(dirty, **masks), slot_overlap(case.enc_logits, **masks))

    @ENGINES_IN_TURN
    @given(case=distillation_cases(maps=MAPS), value=st.sampled_from(RUBBISH), soft=st.sampled_from(SOFT))
    @few
    def test_values_of_patches_outside_the_region_do_not_matter(
        self, engine: Any, case: DistillationCase, value: float, soft: tuple[Any, float]
    ) -> None:
        results = []
        for logits in (case.logits, poison(case.logits, valid=case.region, slot_mask=case.slot_mask, value=value)):
            leaf = logits.clone().requires_grad_()
            with engine():
                patches = selective_distillation_loss(
                    **case._replace(logits=leaf)._asdict(),
                    criterion=soft[0],
                    label_smoothing=soft[1],
                    reduction="none",
                )
                results.append((patches, *torch.autograd.grad(patches.sum(), leaf)))
        (clean, clean_grad), (dirty, dirty_grad) = results
        assert torch.equal(dirty, clean)
        assert torch.equal(dirty_grad, clean_grad)
        assert not dirty[~case.region].any()
        assert not dirty_grad[~case.region[:, :, None].expand_as(dirty_grad)].any()

    @ENGINES_IN_TURN
    @pytest.mark.parametrize(("criterion", "smoothing"), SOFT)
    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_overflow_in_invalid_patches_does_not_matter(
        self, engine: Any, criterion: Any, smoothing: float, temperature: float
    ) -> None:
        enc, dec = torch.randn(2, 2, 2, 4, 5, 6).unbind()
        valid = torch.rand(2, 2, 5, 6) < 0.7
        wild = torch.tensor([-3e38, 3e38, 0.0, -3e38]).view(4, 1, 1)
        knobs: Settings = {"criterion": criterion, "label_smoothing": smoothing, "temperature": temperature}
        results = []
        for value in (torch.zeros(()), wild):
            maps = [torch.where(valid.unsqueeze(2), one, value).requires_grad_() for one in (enc, dec)]
            with engine():
                loss = SSyncLoss(merge_threshold=None, **knobs)(*maps, valid=valid)
                results.append((loss, *torch.autograd.grad(loss, maps)))
        for quiet, loud in zip(*results, strict=True):
            torch.testing.assert_close(loud, quiet)

    @pytest.mark.parametrize("value", RUBBISH)
    def test_given_labels_do_not_teach_invalid_patches(self, value: float) -> None:
        enc, dec = torch.randn(2, 2, 3, 4, 5), torch.randn(2, 2, 3, 4, 5)
        everywhere = pseudo_labels(enc, dec, min_different=0, min_same=0, max_different=10)
        valid = torch.rand(2, 2, 4, 5) < 0.5
        enc_dirty, dec_dirty = (poison(one, valid=valid, value=value).requires_grad_() for one in (enc, dec))
        boundary = boundary_refinement_loss(enc_dirty, dec_dirty, labels=everywhere, valid=valid)
        interior = interior_denoising_loss(enc_dirty, dec_dirty, labels=everywhere, valid=valid)
        assert_close_loss(boundary, selective_distillation_loss(dec, everywhere.enc_labels, valid))
        assert_close_loss(interior, selective_distillation_loss(enc, everywhere.dec_labels, valid))
        enc_grad, dec_grad = torch.autograd.grad(boundary + interior, (enc_dirty, dec_dirty))
        hidden = ~valid[:, :, None].expand_as(enc)
        assert enc_grad.isfinite().all()
        assert not enc_grad[hidden].any()
        assert not dec_grad[hidden].any()


class Box(NamedTuple):
    """A box of patches, given by slices of (T, H, W)."""

    frames: slice
    rows: slice
    columns: slice

    def valid(self, batch: int, size: tuple[int, int, int]) -> Tensor:
        mask = torch.zeros(batch, *size, dtype=torch.bool)
        mask[:, self.frames, self.rows, self.columns] = True
        return mask

    def labels(self, labels: Tensor) -> Tensor:
        return labels[:, self.frames, self.rows, self.columns]

    def maps(self, maps: Tensor) -> Tensor:
        return maps[:, self.frames, :, self.rows, self.columns]

    def scaled(self, numerator: int, denominator: int = 1) -> "Box":
        rows, columns = (
            slice(one.start * numerator // denominator, one.stop * numerator // denominator)
            for one in (self.rows, self.columns)
        )
        return Box(self.frames, rows, columns)


@st.composite
def boxes(draw: st.DrawFn, frames: int, height: int, width: int, step: int = 1) -> Box:
    parts = []
    for size, grid in ((frames, 1), (height, step), (width, step)):
        low, high = sorted((draw(st.integers(0, size // grid)), draw(st.integers(0, size // grid))))
        low = min(low, size // grid - 1)
        parts.append(slice(low * grid, max(high, low + 1) * grid))
    return Box(*parts)


class TestCropping:
    @given(maps=map_pairs(minus_inf=True, max_height=6), data=st.data(), threshold=GENERIC, knobs=region_knobs())
    @settings(max_examples=25)
    def test_a_valid_box_equals_a_crop(
        self, maps: MapPair, data: st.DataObject, threshold: float | None, knobs: Settings
    ) -> None:
        b, t, _, h, w = maps.enc_logits.shape
        box = data.draw(boxes(t, h, w))
        valid = box.valid(b, (t, h, w))
        cropped = [box.maps(one) for one in maps]
        torch.testing.assert_close(
            slot_overlap(maps.enc_logits, valid=valid), slot_overlap(cropped[0]), rtol=0, atol=1e-6
        )
        # labels are equal for any neighbor counts
        whole = pseudo_labels(*maps, merge_threshold=threshold, valid=valid, **knobs)
        part = pseudo_labels(*cropped, merge_threshold=threshold, **knobs)
        assert torch.equal(box.labels(whole.enc_labels), part.enc_labels)
        assert torch.equal(box.labels(whole.dec_labels), part.dec_labels)
        assert torch.equal(whole.representative, part.representative)
        # regions and losses are equal for the default counts
        before = run(*maps, merge_threshold=threshold, valid=valid)
        after = run(*cropped, merge_threshold=threshold)
        assert torch.equal(box.labels(before.terms.labels.boundary), after.terms.labels.boundary)
        assert torch.equal(box.labels(before.terms.labels.interior), after.terms.labels.interior)
        assert before.terms.labels.boundary.sum() == after.terms.labels.boundary.sum()
        assert before.terms.labels.interior.sum() == after.terms.labels.interior.sum()
        assert_close(Result(before.terms, *(box.maps(grad) for grad in before[1:])), after)
        assert not (before.enc_grad * ~valid[:, :, None]).any()

    @pytest.mark.parametrize("knobs", [{"min_different": 2}, {"max_different": 2}, {"min_same": 8}])
    def test_a_valid_box_may_differ_from_a_crop_for_other_counts(self, knobs: Settings) -> None:
        # the middle of three rows is cropped; padding repeats the row, so each neighbor counts three times
        labels = torch.tensor([[[[0, 0, 1]] * 3]])
        maps = F.one_hot(labels, 2).movedim(-1, 2).float()
        valid = torch.tensor([[[[False] * 3, [True] * 3, [False] * 3]]])
        whole = pseudo_labels(maps, maps, valid=valid, **knobs)
        part = pseudo_labels(maps[..., 1:2, :], maps[..., 1:2, :], **knobs)
        assert torch.equal(whole.enc_labels[:, :, 1:2], part.enc_labels)
        regions = [(one.boundary, one.interior) for one in (whole, part)]
        same = [torch.equal(left[:, :, 1:2], right) for left, right in zip(*regions, strict=True)]
        assert same == ["max_different" in knobs, "max_different" not in knobs]

    @given(ratio=st.sampled_from([(2, 1), (1, 2), (3, 1), (3, 2)]), data=st.data(), generator=generators)
    @settings(max_examples=25)
    def test_a_decoder_on_another_grid_is_cropped_with_it(
        self, ratio: tuple[int, int], data: st.DataObject, generator: torch.Generator
    ) -> None:
        b, t, s, h, w = 4, 2, 3, 4, 6
        numerator, denominator = ratio
        size = (h * numerator // denominator, w * numerator // denominator)
        enc, dec = (torch.randn(b, t, s, *one, dtype=torch.float64, generator=generator) for one in ((h, w), size))
        # the box ends on cell borders of both grids
        box = data.draw(boxes(t, h, w, step=denominator))
        before = run(enc, dec, valid=box.valid(b, (t, h, w)))
        dec_box = box.scaled(numerator, denominator)
        after = run(box.maps(enc), dec_box.maps(dec))
        for field in PseudoLabels._fields[:4]:
            whole, part = (getattr(one.terms.labels, field) for one in (before, after))
            assert torch.equal(box.labels(whole), part)
        assert_close(Result(before.terms, box.maps(before.enc_grad), dec_box.maps(before.dec_grad)), after)


class TestSlotMask:
    @given(maps=MAPS, data=st.data(), soft=st.sampled_from(SOFT), threshold=GENERIC, knobs=region_knobs())
    @few
    def test_masking_slots_equals_removing_them(
        self, maps: MapPair, data: st.DataObject, soft: tuple[str, float], threshold: float | None, knobs: Settings
    ) -> None:
        b, _, s, _, _ = maps.enc_logits.shape
        mask = data.draw(slot_masks(1, s, empty=False))
        kept = mask[0].nonzero().flatten()
        loss: Settings = {"criterion": soft[0], "label_smoothing": soft[1], "merge_threshold": threshold}
        masked = run(*maps, slot_mask=mask.expand(b, s), **loss | knobs)
        taken = run(*(one[:, :, kept] for one in maps), **loss | knobs)
        old, new = masked.terms.labels, taken.terms.labels
        assert torch.equal(kept[new.enc_labels], old.enc_labels)
        assert torch.equal(kept[new.dec_labels], old.dec_labels)
        assert torch.equal(kept[new.representative], old.representative[:, kept])
        assert torch.equal(new.boundary, old.boundary)
        assert torch.equal(new.interior, old.interior)
        assert_close(Result(masked.terms, *(grad[:, :, kept] for grad in masked[1:])), taken, criterion=soft[0])

    @given(case=ssync_cases(maps=MAPS), threshold=GENERIC)
    @few
    def test_a_clip_without_slots_counts_as_no_clip(self, case: SSyncCase, threshold: float | None) -> None:
        clips = len(case.enc_logits)
        mask = torch.ones(clips, case.enc_logits.shape[2]).bool() if case.slot_mask is None else case.slot_mask.clone()
        mask[::2] = False
        masked = run(**case._replace(slot_mask=mask)._asdict(), merge_threshold=threshold)
        rest = clips_of(case._replace(slot_mask=mask), torch.arange(1, clips, 2))
        assert_close(
            Result(masked.terms, *(grad[1::2] for grad in masked[1:])),
            run(**rest._asdict(), merge_threshold=threshold),
            slot_mask=rest.slot_mask,
        )
        labels = masked.terms.labels
        for field in labels[:4]:
            assert not field[::2].any()
        assert not masked.enc_grad[::2].any()
        assert not masked.dec_grad[::2].any()


def shift_of(maps: Tensor, generator: torch.Generator) -> Tensor:
    """Return a constant for every patch, (B, T, 1, H, W). It is dyadic, so that rounding makes no ties."""
    return torch.randint(-64, 65, (*maps.shape[:2], 1, *maps.shape[3:]), generator=generator) / 8


class TestShifts:
    """A constant added to all slots of a patch does not change the softmax."""

    @pytest.mark.parametrize("both", [False, True], ids=["the decoder", "both, without merging"])
    @given(maps=MAPS, threshold=GENERIC, knobs=region_knobs(), generator=generators)
    @few
    def test_a_shift(
        self, both: bool, maps: MapPair, threshold: float | None, knobs: Settings, generator: torch.Generator
    ) -> None:
        enc, dec = maps
        shift = shift_of(enc, generator)
        threshold = None if both else threshold
        before = run(enc, dec, merge_threshold=threshold, **knobs)
        after = run(enc + shift * both, dec + shift, merge_threshold=threshold, **knobs)
        assert_same_labels(after.terms.labels, before.terms.labels)
        assert_close(after, before)

    @given(maps=MAPS, threshold=GENERIC, generator=generators)
    @few
    def test_a_shift_of_the_encoder_with_given_labels(
        self, maps: MapPair, threshold: float | None, generator: torch.Generator
    ) -> None:
        enc, dec = maps
        shift = shift_of(enc, generator)
        labels = pseudo_labels(enc, dec, merge_threshold=threshold)
        for loss in (boundary_refinement_loss, interior_denoising_loss):
            assert_close_loss(loss(enc + shift, dec, labels=labels), loss(enc, dec, labels=labels))

    def test_a_shift_of_the_encoder_can_change_the_groups(self) -> None:
        # one slot is active on the first patch, the other on the last; the shift makes both active on the first
        enc = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 4.0]]).view(1, 1, 2, 1, 3)
        raised = enc + torch.tensor([90.0, 0.0, 0.0])
        assert torch.equal(torch.softmax(raised, 2), torch.softmax(enc, 2))
        assert pseudo_labels(enc, enc).representative.tolist() == [[0, 1]]
        assert pseudo_labels(raised, enc).representative.tolist() == [[0, 0]]
        assert pseudo_labels(enc, enc).enc_labels.tolist() == [[[[0, 0, 1]]]]
        assert pseudo_labels(raised, enc).enc_labels.tolist() == [[[[0, 0, 0]]]]


class TestEmptySelections:
    @pytest.mark.parametrize("backend", ["torch", "cpu", "reference"])
    @pytest.mark.parametrize("nothing", ["valid frames", "valid patches", "present slots"])
    @pytest.mark.parametrize("size", [(2, 3), (4, 6)])
    def test_nothing_valid_or_present(self, backend: Any, nothing: str, size: tuple[int, int]) -> None:
        enc, dec = torch.full((2, 2, 3, 2, 3), NAN), torch.full((2, 2, 3, *size), INF)
        masks: Settings = {
            "valid frames": {"valid": torch.zeros(2, 2).bool()},
            "valid patches": {"valid": torch.zeros(2, 2, 2, 3).bool()},
            "present slots": {"slot_mask": torch.zeros(2, 3).bool()},
        }[nothing]
        result = run(enc, dec, **masks, backend=backend, max_different=10)
        assert [value.item() for value in result.terms[:5]] == [0, 0, 0, 0, 0]
        assert result.terms.total.requires_grad
        assert not result.enc_grad.any()
        assert not result.dec_grad.any()
        assert result.terms.labels.representative.tolist() == [[0, 1, 2]] * 2


class TestOrder:
    @given(case=ssync_cases(maps=MAPS), order=st.permutations(range(16)), threshold=GENERIC, knobs=region_knobs())
    @few
    def test_the_order_of_clips_does_not_matter(
        self, case: SSyncCase, order: list[int], threshold: float | None, knobs: Settings
    ) -> None:
        before = run(**case._asdict(), merge_threshold=threshold, **knobs)
        after = run(**clips_of(case, torch.tensor(order))._asdict(), merge_threshold=threshold, **knobs)
        assert_same_labels(after.terms.labels, PseudoLabels(*(one[order] for one in before.terms.labels)))
        back = torch.tensor(order).argsort()
        assert_close(Result(after.terms, *(grad[back] for grad in after[1:])), before, slot_mask=case.slot_mask)

    @given(case=ssync_cases(maps=MAPS), threshold=GENERIC)
    @settings(max_examples=8)
    def test_a_batch_averages_over_all_selected_patches(self, case: SSyncCase, threshold: float | None) -> None:
        whole = run(**case._asdict(), merge_threshold=threshold).terms
        clips, _, slots = case.enc_logits.shape[:3]
        sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for clip in range(clips):
            alone = clips_of(case, torch.tensor([clip]))
            terms = run(**alone._asdict(), merge_threshold=threshold).terms
            present = slots if alone.slot_mask is None else int(alone.slot_mask.sum())
            assert_same_labels(terms.labels, PseudoLabels(*(one[clip : clip + 1] for one in whole.labels)))
            for i, (value, number) in enumerate(
                ((terms.boundary, terms.num_boundary), (terms.interior, terms.num_interior))
            ):
                sums[i] += value.double().item() * number.item() * present
                counts[i] += number.item() * present
        means = (sums / counts.clamp_min(1)).float()
        torch.testing.assert_close(whole.boundary, means[0], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(whole.interior, means[1], rtol=1e-5, atol=1e-8)

    @ENGINES_IN_TURN
    @pytest.mark.parametrize("size", [(24, 24), (1024, 1024), (1, 1 << 16)])
    @pytest.mark.parametrize("constant", [True, False])
    def test_large_frames_are_summed_exactly(self, engine: Any, size: tuple[int, int], constant: bool) -> None:
        enc, dec = torch.randn(2, 1, 1, 3, *size).unbind()
        if constant:
            # every square rounds in the same direction
            enc, dec = torch.zeros_like(enc), torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand_as(dec)
        everywhere: Settings = {"min_different": 0, "min_same": 0, "max_different": 10, "merge_threshold": None}
        criterion = SSyncLoss(**everywhere).eval()
        exact = criterion.terms(enc.double(), dec.double())
        with engine():
            terms = criterion.terms(enc, dec)
        # the largest count exceeds two bytes
        assert terms.num_boundary == terms.num_interior == math.prod(size)
        assert terms.boundary.item() == pytest.approx(exact.boundary.item(), rel=2e-6)
        assert terms.interior.item() == pytest.approx(exact.interior.item(), rel=2e-6)

    def test_nan_in_any_clip_makes_the_loss_nan(self) -> None:
        enc, dec = torch.randn(2, 5, 2, 3, 4, 5).unbind()
        assert SSyncLoss().eval()(enc, dec).isfinite()
        for maps, dirty in product((enc, dec), range(5)):
            maps[dirty, 1, 2, 3, 4] = float("nan")
            assert SSyncLoss().eval()(enc, dec).isnan()
            maps[dirty, 1, 2, 3, 4] = 0.0


class TestSmallShapes:
    @given(maps=map_pairs(max_frames=1), threshold=GENERIC)
    @few
    def test_an_image_equals_a_static_clip(self, maps: MapPair, threshold: float | None) -> None:
        still = run(*maps, merge_threshold=threshold)
        moving = run(*(one.expand(-1, 3, -1, -1, -1) for one in maps), merge_threshold=threshold)
        for field in PseudoLabels._fields[:4]:
            image, clip = (getattr(one.terms.labels, field) for one in (still, moving))
            assert torch.equal(image.expand_as(clip), clip)
        assert_close_loss(moving.terms.boundary, still.terms.boundary)
        assert_close_loss(moving.terms.interior, still.terms.interior)

    def test_a_single_patch_is_interior(self) -> None:
        enc, dec = torch.tensor([2.0, 0.0]).view(1, 1, 2, 1, 1), torch.tensor([3.0, 1.0]).log().view(1, 1, 2, 1, 1)
        terms = SSyncLoss().eval().terms(enc, dec)
        assert not terms.labels.boundary.any()
        assert terms.labels.interior.all()
        assert terms.boundary == 0
        # 1 / (1 + e^2) twice, squared
        assert terms.interior.item() == pytest.approx((1 / (1 + math.exp(2))) ** 2)
