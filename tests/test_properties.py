"""What must hold for any maps: renaming, merging, flips, poison, cropping, shifts, empty selections, order."""

import math
from itertools import pairwise, product
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
    boundary_region,
    interior_denoising_loss,
    interior_region,
    merge_slots,
    neighbor_difference,
    pseudo_labels,
    selective_distillation_loss,
    slot_overlap,
)
from ssync_loss.testing import (
    DistillationCase,
    MapPair,
    SlotGraph,
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
    slot_graphs,
    slot_masks,
    ssync_cases,
    thresholds,
    untied_clips,
    valid_masks,
)

INF, NAN = math.inf, math.nan
RUBBISH = (NAN, INF, -INF)
SOFT = [("mse", 0.0), ("cross_entropy", 0.2)]
Settings: TypeAlias = dict[str, Any]

# batches of 16 clips: 800 cases a property
few = settings(max_examples=50)
generators = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))
MAPS = map_pairs(minus_inf=True)
GENERIC = thresholds(tied=False)


class Result(NamedTuple):
    """The terms of a loss and what the total sends back to both maps."""

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
    """To the last bit."""
    assert_same_labels(actual.terms.labels, expected.terms.labels)
    for got, wanted in zip((*actual.terms[:5], *actual[1:]), (*expected.terms[:5], *expected[1:]), strict=True):
        assert torch.equal(got, wanted)


def assert_close(actual: Result, expected: Result, *, slot_mask: Tensor | None = None, **knobs: Any) -> None:
    """Same selection, losses and gradients up to rounding; labels may bear other names."""
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
    """Valid patches (B, T, H, W), those of clips without a present slot left out."""
    cells = torch.ones_like(case.enc_logits[:, :, 0], dtype=torch.bool)
    if case.valid is not None:
        cells = cells & (case.valid if case.valid.ndim == 4 else case.valid[:, :, None, None])
    return cells if case.slot_mask is None else cells & case.slot_mask.any(1)[:, None, None, None]


def seen_by(case: SSyncCase) -> Tensor:
    """The entries of a map that may matter, (B, T, S, H, W)."""
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

    @given(ssync_cases(maps=MAPS))
    @few
    def test_the_lowest_present_slot_of_equals_wins_a_patch(self, case: SSyncCase) -> None:
        labels = pseudo_labels(**case._asdict(), merge_threshold=None)
        slots = torch.arange(case.enc_logits.shape[2])[:, None, None]
        for logits, actual in ((case.enc_logits, labels.enc_labels), (case.dec_logits, labels.dec_labels)):
            # 99 beats nothing: neither absent slots nor those that are not the largest
            present = torch.ones(logits.shape[0], len(slots)).bool() if case.slot_mask is None else case.slot_mask
            present = present[:, None, :, None, None]
            largest = logits.masked_fill(~present, -INF).amax(2, keepdim=True)
            winner = torch.where(present & (logits == largest), slots, 99).amin(2)
            assert torch.equal(actual, torch.where(cells_of(case), winner, 0))

    def test_a_tie_for_the_largest_area_goes_to_the_lowest_slot(self) -> None:
        # slots 1, 2 and 3 are active on the last three places, where 2 and 3 win one and a half each
        rows = [[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 5.0, 5.0], [0.0, 0.0, 6.0, 5.5], [0.0, 0.0, 5.5, 6.0]]
        maps = torch.tensor(rows).view(1, 1, 4, 1, 4)
        for order, names in (([0, 1, 2, 3], [0, 2, 2, 2]), ([0, 3, 1, 2], [0, 1, 1, 1]), ([3, 2, 1, 0], [0, 0, 0, 3])):
            renamed = maps[:, :, order]
            labels = pseudo_labels(renamed, renamed)
            assert labels.representative.tolist() == [names]
            assert set(labels.enc_labels.unique().tolist()) == set(names)

    def test_a_group_without_any_area_is_named_by_its_lowest_slot(self) -> None:
        rows = [[9.0, 9.0, 9.0, 9.0], [0.0, 0.0, 0.0, 5.0], [0.0, 0.0, 0.0, 5.0]]
        maps = torch.tensor(rows).view(1, 1, 3, 1, 4)
        assert pseudo_labels(maps, maps).representative.tolist() == [[0, 1, 1]]

    def test_more_slots_than_a_byte_can_name(self) -> None:
        labels = torch.tensor([[[[0, 126, 127, 128, 129]]]])
        maps = F.one_hot(labels, 130).movedim(-1, 2).float()
        found = pseudo_labels(maps, maps)
        assert torch.equal(found.enc_labels, labels)
        assert torch.equal(found.dec_labels, labels)
        assert found.representative.tolist() == [list(range(130))]

    @pytest.mark.parametrize(
        ("num_slots", "names"), [(128, (0, 127, 3)), (129, (0, 128, 3)), (256, (1, 255, 2)), (257, (0, 256, 44))]
    )
    def test_a_step_with_more_slots_than_a_byte_can_name(self, num_slots: int, names: tuple[int, int, int]) -> None:
        labels = torch.tensor(names)[torch.randint(3, (1, 2, 3, 4))]
        enc, dec = (
            F.one_hot(labels, num_slots).movedim(-1, 2).float() * 3 + torch.rand(1, 2, num_slots, 3, 4)
            for _ in range(2)
        )
        assert torch.equal(pseudo_labels(enc, dec, merge_threshold=None).enc_labels, labels)
        expected = run(enc, dec, merge_threshold=None, backend="reference")
        assert expected.terms.num_boundary > 0
        assert_close(run(enc, dec, merge_threshold=None), expected)


class TestMerging:
    @given(slot_graphs(), thresholds())
    @few
    def test_a_representative_represents_itself(self, graph: SlotGraph, threshold: float | None) -> None:
        names = merge_slots(*graph, threshold=threshold)
        assert torch.equal(names.gather(1, names), names)

    @given(slot_graphs(), thresholds())
    @few
    def test_merging_what_is_merged_changes_nothing(self, graph: SlotGraph, threshold: float | None) -> None:
        names = merge_slots(*graph, threshold=threshold)
        together = (names[:, :, None] == names[:, None]).float()
        assert torch.equal(merge_slots(together, graph.area, threshold=0.5), names)

    @given(slot_graphs(), thresholds())
    @few
    def test_links_are_followed_to_their_end(self, graph: SlotGraph, threshold: float | None) -> None:
        names = merge_slots(*graph, threshold=threshold)
        together = names[:, :, None] == names[:, None]
        linked = torch.zeros_like(together)
        if threshold is not None:
            linked = graph.overlap > threshold
        # every link lies within a group, and no proper part of a group is cut off from the rest of it
        assert not (linked & ~together).any()
        for links, group in zip(linked | linked.mT, names, strict=True):
            for name in group.unique().tolist():
                members = (group == name).nonzero().flatten().tolist()
                reached, frontier = {members[0]}, [members[0]]
                while frontier:
                    near = set(links[frontier.pop()].nonzero().flatten().tolist()) - reached
                    reached |= near
                    frontier += near
                assert reached == set(members)

    @given(slot_graphs(), st.lists(thresholds().filter(lambda drawn: drawn is not None), min_size=2, max_size=4))
    @few
    def test_a_higher_threshold_never_merges_more(self, graph: SlotGraph, levels: list[float]) -> None:
        for low, high in pairwise(sorted(levels)):
            few_groups, many_groups = (merge_slots(*graph, threshold=level) for level in (low, high))
            apart_below = few_groups[:, :, None] != few_groups[:, None]
            apart_above = many_groups[:, :, None] != many_groups[:, None]
            assert not (apart_below & ~apart_above).any()

    @given(slot_graphs(), thresholds())
    @few
    def test_the_representative_has_the_largest_area(self, graph: SlotGraph, threshold: float | None) -> None:
        names = merge_slots(*graph, threshold=threshold)
        assert (graph.area.gather(1, names) >= graph.area).all()

    @given(slot_graphs())
    @few
    def test_nothing_merges_at_one_or_none(self, graph: SlotGraph) -> None:
        alone = torch.arange(graph.area.shape[1]).expand_as(graph.area)
        assert torch.equal(merge_slots(*graph, threshold=1.0), alone)
        assert torch.equal(merge_slots(*graph, threshold=1), alone)
        assert torch.equal(merge_slots(*graph, threshold=None), alone)

    @pytest.mark.parametrize("threshold", [1.0, None])
    @given(case=ssync_cases(maps=MAPS))
    @few
    def test_maps_are_not_merged_at_one_or_none(self, threshold: float | None, case: SSyncCase) -> None:
        labels = pseudo_labels(**case._asdict(), merge_threshold=threshold)
        clips, slots = case.enc_logits.shape[0], case.enc_logits.shape[2]
        assert torch.equal(labels.representative, torch.arange(slots).expand(clips, slots))

    @given(case=ssync_cases(maps=MAPS), threshold=GENERIC)
    @few
    def test_merging_only_coarsens_the_labels(self, case: SSyncCase, threshold: float | None) -> None:
        apart = pseudo_labels(**case._asdict(), merge_threshold=None)
        merged = pseudo_labels(**case._asdict(), merge_threshold=threshold)
        cells = cells_of(case)
        for field in ("enc_labels", "dec_labels"):
            before, after = getattr(apart, field), getattr(merged, field)
            rewritten = merged.representative.gather(1, before.flatten(1)).view_as(before)
            assert torch.equal(after, torch.where(cells, rewritten, 0))
        # fewer labels, fewer edges
        assert not (merged.boundary & ~boundary_region(apart.enc_labels, min_same=0, valid=cells)).any()
        assert not (apart.interior & ~merged.interior).any()

    @given(case=ssync_cases(maps=MAPS))
    @few
    def test_absent_slots_never_merge(self, case: SSyncCase) -> None:
        representative = pseudo_labels(**case._asdict(), merge_threshold=0.0).representative
        if case.slot_mask is not None:
            alone = representative == torch.arange(representative.shape[1])
            assert alone[~case.slot_mask].all()
            assert case.slot_mask.gather(1, representative)[case.slot_mask].all()

    @given(ssync_cases(maps=MAPS))
    @few
    def test_overlap_is_a_symmetric_share(self, case: SSyncCase) -> None:
        overlap = slot_overlap(case.enc_logits, valid=case.valid, slot_mask=case.slot_mask)
        assert torch.equal(overlap, overlap.mT)
        assert overlap.min() >= 0
        assert overlap.max() <= 1
        own = overlap.diagonal(dim1=1, dim2=2)
        assert (overlap <= own[:, :, None]).all()

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float16, torch.float64])
    def test_an_area_of_any_type(self, dtype: torch.dtype) -> None:
        overlap = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
        area = torch.tensor([[1, 5, 0]]).to(dtype)
        assert merge_slots(overlap, area, threshold=0.5).tolist() == [[1, 1, 2]]

    @pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
    def test_areas_below_zero_compare_too(self, dtype: torch.dtype) -> None:
        overlap = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
        area = torch.tensor([[-3, -7, -5]]).to(dtype)
        assert merge_slots(overlap, area, threshold=0.5).tolist() == [[0, 0, 2]]

    def test_a_link_in_one_direction_counts(self) -> None:
        overlap = torch.tensor([[[0.0, 0.9], [0.1, 0.0]], [[0.0, 0.1], [0.9, 0.0]]])
        assert merge_slots(overlap, torch.tensor([[1, 2], [1, 2]]), threshold=0.5).tolist() == [[1, 1], [1, 1]]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_an_overlap_at_the_threshold_is_no_link(self, dtype: torch.dtype) -> None:
        at = torch.tensor([[[1.0, 0.7], [0.7, 1.0]]], dtype=dtype)
        area = torch.tensor([[1, 2]])
        assert merge_slots(at, area, threshold=0.7).tolist() == [[0, 1]]
        assert merge_slots(at.nextafter(torch.ones_like(at)), area, threshold=0.7).tolist() == [[1, 1]]


# time, up-down, left-right, and some together, as axes of (B, T, H, W)
FLIPS = [(1,), (2,), (3,), (2, 3), (1, 3), (1, 2, 3)]


class TestFlips:
    @pytest.mark.parametrize("axes", FLIPS)
    @given(labels=label_videos(), data=st.data(), knobs=region_knobs())
    @settings(max_examples=10)
    def test_regions_flip_with_the_labels(
        self, axes: tuple[int, ...], labels: Tensor, data: st.DataObject, knobs: Settings
    ) -> None:
        valid = data.draw(st.none() | valid_masks(*labels.shape))
        turned = None if valid is None else valid.flip(axes)
        edge: Settings = {key: knobs[key] for key in ("min_different", "min_same")}
        calm: Settings = {"max_different": knobs["max_different"]}
        flipped = labels.flip(axes)
        count = neighbor_difference(labels, valid=valid)
        assert torch.equal(neighbor_difference(flipped, valid=turned), count.flip(axes))
        boundary = boundary_region(labels, **edge, valid=valid)
        assert torch.equal(boundary_region(flipped, **edge, valid=turned), boundary.flip(axes))
        interior = interior_region(labels, **calm, valid=valid)
        assert torch.equal(interior_region(flipped, **calm, valid=turned), interior.flip(axes))

    @given(label_videos())
    @few
    def test_counts_turn_with_the_picture(self, labels: Tensor) -> None:
        assert torch.equal(neighbor_difference(labels.mT), neighbor_difference(labels).mT)

    @given(label_videos(), st.permutations(range(4)))
    @few
    def test_counts_ignore_names(self, labels: Tensor, names: list[int]) -> None:
        assert torch.equal(neighbor_difference(torch.tensor(names)[labels]), neighbor_difference(labels))

    @pytest.mark.parametrize("axes", FLIPS)
    @given(maps=MAPS, threshold=GENERIC, knobs=region_knobs())
    @settings(max_examples=10)
    def test_the_loss_does_not_know_directions(
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
    @pytest.mark.parametrize(("criterion", "smoothing"), [("mse", 0.0), ("cross_entropy", 0.0)])
    @given(labels=label_videos(), threshold=thresholds())
    @few
    def test_confident_maps_that_agree_cost_nothing(
        self, criterion: str, smoothing: float, labels: Tensor, threshold: float | None
    ) -> None:
        # slots are active on disjoint places, so nothing is merged
        maps = 60.0 * F.one_hot(labels, 4).movedim(-1, 2).float()
        result = run(maps, maps, merge_threshold=threshold, criterion=criterion, label_smoothing=smoothing)
        assert torch.equal(result.terms.labels.enc_labels, labels)
        assert 0 <= result.terms.total.item() < 1e-20
        assert result.enc_grad.abs().max() < 1e-20
        assert result.dec_grad.abs().max() < 1e-20

    def test_confident_maps_that_disagree_cost_the_most(self) -> None:
        labels = torch.tensor([[[[0, 0, 1, 1]]]])
        enc, dec = (60.0 * F.one_hot(one, 2).movedim(-1, 2).float() for one in (labels, 1 - labels))
        terms = SSyncLoss().eval().terms(enc, dec)
        # (0 - 1)^2 and (1 - 0)^2 average to 1
        assert terms.boundary == 1
        assert terms.interior == 1

    @given(labels=label_videos(), factor=st.sampled_from((1.0, 4.0, 30.0)), generator=generators)
    @few
    def test_the_loss_is_never_negative_and_a_share_of_two(
        self, labels: Tensor, factor: float, generator: torch.Generator
    ) -> None:
        noise = torch.randn(*labels.shape[:2], 4, *labels.shape[2:], generator=generator)
        target = labels.roll(1, 0)
        patches = selective_distillation_loss(
            factor * noise, target, torch.ones_like(labels, dtype=torch.bool), reduction="none"
        )
        assert patches.min() >= 0
        # the two vertices of a simplex are sqrt(2) apart
        assert patches.max() <= 2 / 4 + 1e-6


def shared_length(first: int, first_of: int, second: int, second_of: int) -> int:
    """How much cell `first` of `first_of` and cell `second` of `second_of` share, in units of 1 / (product)."""
    low = max(first * second_of, second * first_of)
    high = min((first + 1) * second_of, (second + 1) * first_of)
    return max(high - low, 0)


def seen_from(cells: Tensor, height: int, width: int) -> Tensor:
    """The cells of another grid that share area with a valid patch, looked up one by one."""
    rows, columns = cells.shape[2:]
    seen = torch.zeros(*cells.shape[:2], height, width, dtype=torch.bool)
    for h, w, y, x in product(range(rows), range(columns), range(height), range(width)):
        if shared_length(h, rows, y, height) and shared_length(w, columns, x, width):
            seen[:, :, y, x] |= cells[:, :, h, w]
    return seen


class TestPoison:
    @ENGINES_IN_TURN
    @pytest.mark.parametrize("kind", ["logits", "probs", ("logits", "probs")])
    @pytest.mark.parametrize(("criterion", "smoothing"), SOFT)
    @given(
        case=ssync_cases(maps=map_pairs(batch=8)),
        threshold=GENERIC,
        knobs=region_knobs(),
        value=st.sampled_from((*RUBBISH, 1e30)),
    )
    @settings(max_examples=15)
    def test_what_invalid_patches_and_absent_slots_hold_never_matters(
        self,
        engine: Any,
        kind: Any,
        criterion: Any,
        smoothing: float,
        case: SSyncCase,
        threshold: float | None,
        knobs: Settings,
        value: float,
    ) -> None:
        kinds = (kind, kind) if isinstance(kind, str) else kind
        maps = [
            one if what == "logits" else torch.softmax(one, 2)
            for one, what in zip((case.enc_logits, case.dec_logits), kinds, strict=True)
        ]
        masks: Settings = {"valid": case.valid, "slot_mask": case.slot_mask}
        loss: Settings = {
            "criterion": criterion,
            "label_smoothing": smoothing,
            "merge_threshold": threshold,
            "kind": kind,
        }
        with engine():
            clean = run(*maps, **masks | loss | knobs)
            dirty = run(*(poison(one, value=value, **masks) for one in maps), **masks | loss | knobs)
        assert dirty.terms.total.isfinite()
        assert_same(dirty, clean)
        unseen = ~seen_by(case)
        assert not dirty.enc_grad[unseen].any()
        assert not dirty.dec_grad[unseen].any()

    @pytest.mark.parametrize("size", [(8, 12), (2, 3), (1, 1), (3, 5), (7, 4), (4, 3)])
    @pytest.mark.parametrize("kind", ["logits", "probs"])
    @given(data=st.data(), value=st.sampled_from((*RUBBISH, 1e30)), generator=generators)
    @settings(max_examples=6)
    def test_nor_does_it_on_a_decoder_grid_of_its_own(
        self, size: tuple[int, int], kind: Any, data: st.DataObject, value: float, generator: torch.Generator
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
    def test_the_overlap_does_not_look_there(self, case: SSyncCase, value: float) -> None:
        masks: Settings = {"valid": case.valid, "slot_mask": case.slot_mask}
        dirty = poison(case.enc_logits, value=value, **masks)
        assert torch.equal(slot_overlap(dirty, **masks), slot_overlap(case.enc_logits, **masks))

    @given(labels=label_videos(), data=st.data(), knobs=region_knobs(), generator=generators)
    @few
    def test_nor_do_the_counts(
        self, labels: Tensor, data: st.DataObject, knobs: Settings, generator: torch.Generator
    ) -> None:
        valid = data.draw(valid_masks(*labels.shape))
        dirty = torch.where(valid, labels, torch.randint(4, labels.shape, generator=generator))
        count = neighbor_difference(labels, valid=valid)
        assert torch.equal(neighbor_difference(dirty, valid=valid), count)
        assert not count[~valid].any()
        edge: Settings = {key: knobs[key] for key in ("min_different", "min_same")}
        calm: Settings = {"max_different": knobs["max_different"]}
        assert not (boundary_region(labels, **edge, valid=valid) & ~valid).any()
        assert not (interior_region(labels, **calm, valid=valid) & ~valid).any()

    @ENGINES_IN_TURN
    @pytest.mark.parametrize(("criterion", "smoothing"), SOFT)
    @given(case=distillation_cases(maps=MAPS), value=st.sampled_from(RUBBISH))
    @few
    def test_a_loss_does_not_look_at_patches_it_does_not_teach(
        self, engine: Any, criterion: Any, smoothing: float, case: DistillationCase, value: float
    ) -> None:
        results = []
        for logits in (case.logits, poison(case.logits, valid=case.region, slot_mask=case.slot_mask, value=value)):
            leaf = logits.clone().requires_grad_()
            with engine():
                patches = selective_distillation_loss(
                    **case._replace(logits=leaf)._asdict(),
                    criterion=criterion,
                    label_smoothing=smoothing,
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
    def test_what_overflows_there_does_not_matter(
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
    def test_labels_from_elsewhere_teach_no_invalid_patch(self, value: float) -> None:
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
    """A box of patches, as slices of (T, H, W)."""

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
    @settings(max_examples=60)
    def test_a_valid_box_is_a_crop(
        self, maps: MapPair, data: st.DataObject, threshold: float | None, knobs: Settings
    ) -> None:
        b, t, _, h, w = maps.enc_logits.shape
        box = data.draw(boxes(t, h, w))
        valid = box.valid(b, (t, h, w))
        cropped = [box.maps(one) for one in maps]
        torch.testing.assert_close(
            slot_overlap(maps.enc_logits, valid=valid), slot_overlap(cropped[0]), rtol=0, atol=1e-6
        )
        # labels for any counts
        whole = pseudo_labels(*maps, merge_threshold=threshold, valid=valid, **knobs)
        part = pseudo_labels(*cropped, merge_threshold=threshold, **knobs)
        assert torch.equal(box.labels(whole.enc_labels), part.enc_labels)
        assert torch.equal(box.labels(whole.dec_labels), part.dec_labels)
        assert torch.equal(whole.representative, part.representative)
        # regions and losses for the default counts
        before = run(*maps, merge_threshold=threshold, valid=valid)
        after = run(*cropped, merge_threshold=threshold)
        assert torch.equal(box.labels(before.terms.labels.boundary), after.terms.labels.boundary)
        assert torch.equal(box.labels(before.terms.labels.interior), after.terms.labels.interior)
        assert before.terms.labels.boundary.sum() == after.terms.labels.boundary.sum()
        assert before.terms.labels.interior.sum() == after.terms.labels.interior.sum()
        assert_close(Result(before.terms, *(box.maps(grad) for grad in before[1:])), after)
        assert not (before.enc_grad * ~valid[:, :, None]).any()

    @pytest.mark.parametrize("knobs", [{"min_different": 2}, {"max_different": 2}, {"min_same": 8}])
    def test_for_other_counts_it_need_not_be(self, knobs: Settings) -> None:
        # a middle row of three: cropped, rows above and below are the row itself, and a neighbor counts thrice
        labels = torch.tensor([[[[0, 0, 1]] * 3]])
        maps = F.one_hot(labels, 2).movedim(-1, 2).float()
        valid = torch.tensor([[[[False] * 3, [True] * 3, [False] * 3]]])
        whole = pseudo_labels(maps, maps, valid=valid, **knobs)
        part = pseudo_labels(maps[..., 1:2, :], maps[..., 1:2, :], **knobs)
        assert torch.equal(whole.enc_labels[:, :, 1:2], part.enc_labels)
        regions = [(one.boundary, one.interior) for one in (whole, part)]
        same = [torch.equal(left[:, :, 1:2], right) for left, right in zip(*regions, strict=True)]
        assert same == ["max_different" in knobs, "max_different" not in knobs]

    @pytest.mark.parametrize(("numerator", "denominator"), [(2, 1), (1, 2), (3, 1), (3, 2)])
    @given(data=st.data(), generator=generators)
    @settings(max_examples=15)
    def test_a_decoder_on_another_grid_is_cropped_with_it(
        self, numerator: int, denominator: int, data: st.DataObject, generator: torch.Generator
    ) -> None:
        b, t, s, h, w = 4, 2, 3, 4, 6
        size = (h * numerator // denominator, w * numerator // denominator)
        enc, dec = (torch.randn(b, t, s, *one, dtype=torch.float64, generator=generator) for one in ((h, w), size))
        # the box ends where cells of both grids end
        box = data.draw(boxes(t, h, w, step=denominator))
        before = run(enc, dec, valid=box.valid(b, (t, h, w)))
        dec_box = box.scaled(numerator, denominator)
        after = run(box.maps(enc), dec_box.maps(dec))
        for field in PseudoLabels._fields[:4]:
            whole, part = (getattr(one.terms.labels, field) for one in (before, after))
            assert torch.equal(box.labels(whole), part)
        assert_close(Result(before.terms, box.maps(before.enc_grad), dec_box.maps(before.dec_grad)), after)

    @given(maps=MAPS, data=st.data(), threshold=GENERIC)
    @few
    def test_invalid_frames_at_the_ends_are_cut_off(
        self, maps: MapPair, data: st.DataObject, threshold: float | None
    ) -> None:
        b, t = maps.enc_logits.shape[:2]
        box = data.draw(boxes(t, 1, 1))
        valid = torch.zeros(b, t, dtype=torch.bool)
        valid[:, box.frames] = True
        before = run(*maps, valid=valid, merge_threshold=threshold)
        after = run(*(one[:, box.frames] for one in maps), merge_threshold=threshold)
        assert torch.equal(before.terms.labels.enc_labels[:, box.frames], after.terms.labels.enc_labels)
        assert torch.equal(before.terms.labels.dec_labels[:, box.frames], after.terms.labels.dec_labels)
        assert_close(Result(before.terms, *(grad[:, box.frames] for grad in before[1:])), after)

    @given(maps=MAPS, data=st.data())
    @few
    def test_a_frame_without_valid_patches_leaves_the_mean_over_frames(
        self, maps: MapPair, data: st.DataObject
    ) -> None:
        enc = maps.enc_logits
        kept = data.draw(st.lists(st.booleans(), min_size=enc.shape[1], max_size=enc.shape[1]))
        kept[0] = True
        valid = torch.tensor(kept).expand(enc.shape[0], -1)
        wanted = slot_overlap(enc[:, kept])
        torch.testing.assert_close(slot_overlap(enc, valid=valid), wanted, rtol=0, atol=1e-6)
        patches = valid[:, :, None, None].expand(-1, -1, *enc.shape[3:])
        torch.testing.assert_close(slot_overlap(enc, valid=patches), wanted, rtol=0, atol=1e-6)

    @given(case=ssync_cases(maps=MAPS), data=st.data(), threshold=GENERIC, knobs=region_knobs())
    @few
    def test_frames_are_short_for_all_their_patches(
        self, case: SSyncCase, data: st.DataObject, threshold: float | None, knobs: Settings
    ) -> None:
        case = case._replace(valid=data.draw(valid_masks(*case.enc_logits.shape[:2])))
        spelled = case._replace(valid=cells_of(case._replace(slot_mask=None)))
        assert_same(
            run(**case._asdict(), merge_threshold=threshold, **knobs),
            run(**spelled._asdict(), merge_threshold=threshold, **knobs),
        )

    @given(maps=MAPS, threshold=GENERIC, knobs=region_knobs())
    @few
    def test_masks_that_hide_nothing_change_nothing(
        self, maps: MapPair, threshold: float | None, knobs: Settings
    ) -> None:
        b, t, s, h, w = maps.enc_logits.shape
        plain = run(*maps, merge_threshold=threshold, **knobs)
        nothing_hidden: list[Settings] = [
            {"valid": torch.ones(b, t, h, w).bool()},
            {"valid": torch.ones(b, t).bool()},
            {"slot_mask": torch.ones(b, s).bool()},
        ]
        for masks in nothing_hidden:
            masked = run(*maps, merge_threshold=threshold, **masks | knobs)
            assert_same_labels(masked.terms.labels, plain.terms.labels)
            assert_close(masked, plain)


class TestSlotMask:
    @pytest.mark.parametrize(("criterion", "smoothing"), SOFT)
    @given(maps=MAPS, data=st.data(), threshold=GENERIC, knobs=region_knobs())
    @few
    def test_masking_slots_is_taking_them_away(
        self,
        criterion: Any,
        smoothing: float,
        maps: MapPair,
        data: st.DataObject,
        threshold: float | None,
        knobs: Settings,
    ) -> None:
        b, _, s, _, _ = maps.enc_logits.shape
        mask = data.draw(slot_masks(1, s, empty=False))
        kept = mask[0].nonzero().flatten()
        loss: Settings = {"criterion": criterion, "label_smoothing": smoothing, "merge_threshold": threshold}
        masked = run(*maps, slot_mask=mask.expand(b, s), **loss | knobs)
        taken = run(*(one[:, :, kept] for one in maps), **loss | knobs)
        old, new = masked.terms.labels, taken.terms.labels
        assert torch.equal(kept[new.enc_labels], old.enc_labels)
        assert torch.equal(kept[new.dec_labels], old.dec_labels)
        assert torch.equal(kept[new.representative], old.representative[:, kept])
        assert torch.equal(new.boundary, old.boundary)
        assert torch.equal(new.interior, old.interior)
        assert_close(Result(masked.terms, *(grad[:, :, kept] for grad in masked[1:])), taken, criterion=criterion)

    @given(case=ssync_cases(maps=MAPS), threshold=GENERIC)
    @few
    def test_a_clip_without_slots_is_no_clip(self, case: SSyncCase, threshold: float | None) -> None:
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

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize(("criterion", "smoothing"), SOFT)
    @given(case=distillation_cases(maps=MAPS))
    @few
    def test_a_clip_without_slots_has_nothing_to_teach(
        self, criterion: Any, smoothing: float, reduction: Any, case: DistillationCase
    ) -> None:
        knobs: Settings = {"criterion": criterion, "label_smoothing": smoothing, "reduction": reduction}
        clips, slots = len(case.logits), case.logits.shape[2]
        mask = torch.ones(clips, slots).bool() if case.slot_mask is None else case.slot_mask.clone()
        mask[::2] = False
        actual = selective_distillation_loss(*case[:3], slot_mask=mask, **knobs)
        wanted = selective_distillation_loss(*(one[1::2] for one in case[:3]), slot_mask=mask[1::2], **knobs)
        if reduction == "none":
            assert not actual[::2].any()
            actual = actual[1::2]
        assert_close_loss(actual, wanted)


def shift_of(maps: Tensor, generator: torch.Generator) -> Tensor:
    """A dyadic constant for every patch, (B, T, 1, H, W): no two slots come to tie by rounding."""
    return torch.randint(-64, 65, (*maps.shape[:2], 1, *maps.shape[3:]), generator=generator) / 8


class TestShifts:
    """A softmax does not see a constant added to all slots of a patch."""

    @given(maps=MAPS, threshold=GENERIC, knobs=region_knobs(), generator=generators)
    @few
    def test_a_shift_of_the_decoder(
        self, maps: MapPair, threshold: float | None, knobs: Settings, generator: torch.Generator
    ) -> None:
        enc, dec = maps
        shift = shift_of(enc, generator)
        before = run(enc, dec, merge_threshold=threshold, **knobs)
        after = run(enc, dec + shift, merge_threshold=threshold, **knobs)
        assert_same_labels(after.terms.labels, before.terms.labels)
        assert_close(after, before)

    @given(maps=MAPS, knobs=region_knobs(), generator=generators)
    @few
    def test_a_shift_of_the_encoder_without_merging(
        self, maps: MapPair, knobs: Settings, generator: torch.Generator
    ) -> None:
        enc, dec = maps
        shift = shift_of(enc, generator)
        before = run(enc, dec, merge_threshold=None, **knobs)
        after = run(enc + shift, dec, merge_threshold=None, **knobs)
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
        # slots are active in the first and in the last place, until the first is raised for both
        enc = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 4.0]]).view(1, 1, 2, 1, 3)
        raised = enc + torch.tensor([90.0, 0.0, 0.0])
        assert torch.equal(torch.softmax(raised, 2), torch.softmax(enc, 2))
        assert pseudo_labels(enc, enc).representative.tolist() == [[0, 1]]
        assert pseudo_labels(raised, enc).representative.tolist() == [[0, 0]]
        assert pseudo_labels(enc, enc).enc_labels.tolist() == [[[[0, 0, 1]]]]
        assert pseudo_labels(raised, enc).enc_labels.tolist() == [[[[0, 0, 0]]]]


class TestGradients:
    @pytest.mark.parametrize("size", [(4, 5), (8, 10), (3, 3)])
    @pytest.mark.parametrize("masked", [False, True])
    def test_no_gradient_crosses_between_the_maps(self, size: tuple[int, int], masked: bool) -> None:
        enc, dec = torch.randn(2, 3, 4, 4, 5).requires_grad_(), torch.randn(2, 3, 4, *size).requires_grad_()
        masks: Settings = {}
        if masked:
            masks = {
                "valid": torch.rand(2, 3, 4, 5) < 0.8,
                "slot_mask": torch.tensor([[True] * 4, [True, False] * 2]),
            }
        terms = SSyncLoss(merge_threshold=None, max_different=5).terms(enc, dec, **masks)
        assert terms.boundary > 0
        assert terms.interior > 0
        for term, taught, teacher in ((terms.boundary, dec, enc), (terms.interior, enc, dec)):
            taught_grad, teacher_grad = torch.autograd.grad(
                term, (taught, teacher), allow_unused=True, retain_graph=True
            )
            assert taught_grad.any()
            assert teacher_grad is None
        # and labels are no function of either
        assert not any(part.requires_grad for part in (terms.num_boundary, terms.num_interior, *terms.labels))

    @pytest.mark.parametrize(("off", "taught"), [("boundary_weight", 0), ("interior_weight", 1)])
    def test_a_term_of_weight_zero_teaches_nobody(self, off: str, taught: int) -> None:
        maps = [torch.randn(2, 3, 4, 4, 5).requires_grad_() for _ in range(2)]
        switched: Settings = {off: 0.0}
        criterion = SSyncLoss(merge_threshold=None, max_different=5, **switched)
        grads = torch.autograd.grad(criterion(*maps), maps)
        assert grads[taught].any()
        assert not grads[1 - taught].any()

    @given(maps=MAPS, weights=st.tuples(*[st.sampled_from((0.0, 0.5, 1.0, 3.0))] * 2))
    @few
    def test_weights_scale_terms_and_gradients(self, maps: MapPair, weights: tuple[float, float]) -> None:
        plain = run(*maps)
        weighted = run(*maps, boundary_weight=weights[0], interior_weight=weights[1])
        assert torch.equal(weighted.terms.boundary, plain.terms.boundary)
        assert torch.equal(weighted.terms.interior, plain.terms.interior)
        total = weights[0] * plain.terms.boundary + weights[1] * plain.terms.interior
        assert_close_loss(weighted.terms.total, total)
        torch.testing.assert_close(weighted.dec_grad, weights[0] * plain.dec_grad)
        torch.testing.assert_close(weighted.enc_grad, weights[1] * plain.enc_grad)

    @given(case=distillation_cases(maps=MAPS), temperature=st.sampled_from((0.5, 1.0, 2.0)))
    @few
    def test_a_gradient_adds_up_to_zero_over_slots(self, case: DistillationCase, temperature: float) -> None:
        # a softmax does not see a shift, so it pulls in no direction that shifts
        leaf = case.logits.clone().requires_grad_()
        loss = selective_distillation_loss(
            **case._replace(logits=leaf)._asdict(), temperature=temperature, reduction="sum"
        )
        (grad,) = torch.autograd.grad(loss, leaf)
        assert grad.sum(2).abs().max() < 1e-6

    @pytest.mark.parametrize(("criterion", "smoothing"), SOFT)
    def test_a_graph_that_is_kept_gives_the_same_gradient_again(self, criterion: Any, smoothing: float) -> None:
        maps = [torch.randn(2, 3, 4, 4, 5).requires_grad_() for _ in range(2)]
        loss = SSyncLoss(merge_threshold=None, criterion=criterion, label_smoothing=smoothing)(*maps)
        first = torch.autograd.grad(loss, maps, retain_graph=True)
        kept = [grad.clone() for grad in first]
        second = torch.autograd.grad(3.0 * loss, maps, retain_graph=True)
        third = torch.autograd.grad(loss, maps)
        for one, copy, three_times, again in zip(first, kept, second, third, strict=True):
            assert torch.equal(one, copy)
            assert torch.equal(again, copy)
            torch.testing.assert_close(three_times, 3.0 * copy)

    @pytest.mark.parametrize(("criterion", "smoothing"), SOFT)
    def test_nothing_is_written_into_what_was_given(self, criterion: Any, smoothing: float) -> None:
        case: Settings = {
            "enc_logits": torch.randn(2, 3, 4, 4, 5),
            "dec_logits": torch.randn(2, 3, 4, 8, 10),
            "valid": torch.rand(2, 3, 4, 5) < 0.8,
            "slot_mask": torch.tensor([[True] * 4, [True, False] * 2]),
        }
        copies = {name: one.clone() for name, one in case.items()}
        for name in ("enc_logits", "dec_logits"):
            case[name].requires_grad_()
        terms = SSyncLoss(criterion=criterion, label_smoothing=smoothing).terms(**case)
        labels = [one.clone() for one in terms.labels]
        torch.autograd.backward(terms.total)
        for name, one in case.items():
            assert torch.equal(one, copies[name]), name
        for one, copy in zip(terms.labels, labels, strict=True):
            assert torch.equal(one, copy)


class TestEmptySelections:
    @pytest.mark.parametrize(("criterion", "smoothing"), SOFT)
    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_no_boundary_and_no_interior(self, criterion: Any, smoothing: float, backend: Any) -> None:
        checker = torch.tensor([[[[0, 1], [1, 0]], [[1, 0], [0, 1]]]])
        constant = F.one_hot(torch.zeros_like(checker), 2).movedim(-1, 2).float()
        mixed = F.one_hot(checker, 2).movedim(-1, 2).float()
        knobs: Settings = {
            "criterion": criterion,
            "label_smoothing": smoothing,
            "backend": backend,
            "merge_threshold": None,
        }
        result = run(constant, mixed, **knobs)
        assert result.terms.num_boundary == 0
        assert result.terms.num_interior == 0
        for value in result.terms[:3]:
            assert value == 0
            assert value.requires_grad
        assert not result.enc_grad.any()
        assert not result.dec_grad.any()

    @pytest.mark.parametrize(("criterion", "smoothing"), SOFT)
    @pytest.mark.parametrize("backend", ["torch", "reference"])
    @pytest.mark.parametrize("nothing", ["valid frames", "valid patches", "present slots"])
    @pytest.mark.parametrize("size", [(2, 3), (4, 6), (1, 2)])
    def test_nothing_valid_or_present(
        self, criterion: Any, smoothing: float, backend: Any, nothing: str, size: tuple[int, int]
    ) -> None:
        enc, dec = torch.full((2, 2, 3, 2, 3), NAN), torch.full((2, 2, 3, *size), INF)
        masks: Settings = {
            "valid frames": {"valid": torch.zeros(2, 2).bool()},
            "valid patches": {"valid": torch.zeros(2, 2, 2, 3).bool()},
            "present slots": {"slot_mask": torch.zeros(2, 3).bool()},
        }[nothing]
        result = run(
            enc, dec, **masks, criterion=criterion, label_smoothing=smoothing, backend=backend, max_different=10
        )
        assert [value.item() for value in result.terms[:5]] == [0, 0, 0, 0, 0]
        assert result.terms.total.requires_grad
        assert not result.enc_grad.any()
        assert not result.dec_grad.any()
        assert result.terms.labels.representative.tolist() == [[0, 1, 2]] * 2

    @pytest.mark.parametrize(("criterion", "smoothing"), SOFT)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("value", [0.0, *RUBBISH])
    def test_an_empty_region(self, criterion: Any, smoothing: float, reduction: Any, value: float) -> None:
        leaf = torch.full((2, 1, 3, 2, 2), value, requires_grad=True)
        target, region = torch.zeros(2, 1, 2, 2).long(), torch.zeros(2, 1, 2, 2).bool()
        loss = selective_distillation_loss(
            leaf, target, region, criterion=criterion, label_smoothing=smoothing, reduction=reduction
        )
        assert torch.equal(loss, torch.zeros(region.shape if reduction == "none" else ()))
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        assert torch.equal(grad, torch.zeros_like(leaf))

    @pytest.mark.parametrize("value", [0.0, *RUBBISH])
    def test_before_the_start_it_is_zero_whatever_the_maps_hold(self, value: float) -> None:
        kinds: list[Any] = ["logits", "probs"]
        for kind, masked in product(kinds, (False, True)):
            enc = torch.full((1, 2, 3, 2, 2), value, requires_grad=True)
            dec = torch.full((1, 2, 3, 4, 4), value, requires_grad=True)
            masks: Settings = {"valid": torch.zeros(1, 2).bool()} if masked else {}
            criterion = SSyncLoss(start_step=5, kind=kind)
            for zero in (criterion(enc, dec, step=4, **masks), criterion.terms(enc, dec, step=4, **masks).total):
                assert zero.item() == 0
                for grad in torch.autograd.grad(zero, (enc, dec)):
                    assert torch.equal(grad, torch.zeros_like(grad))


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
    @few
    def test_a_batch_is_the_mean_over_all_that_its_clips_select(self, case: SSyncCase, threshold: float | None) -> None:
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
    @pytest.mark.parametrize("size", [(24, 24), (128, 128), (1024, 1024), (1, 1 << 16)])
    @pytest.mark.parametrize("constant", [True, False])
    def test_large_planes_are_added_up_as_small_ones(self, engine: Any, size: tuple[int, int], constant: bool) -> None:
        enc, dec = torch.randn(2, 1, 1, 3, *size).unbind()
        if constant:
            # every square is rounded to the same side
            enc, dec = torch.zeros_like(enc), torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand_as(dec)
        everywhere: Settings = {"min_different": 0, "min_same": 0, "max_different": 10, "merge_threshold": None}
        criterion = SSyncLoss(**everywhere).eval()
        exact = criterion.terms(enc.double(), dec.double())
        with engine():
            terms = criterion.terms(enc, dec)
        # more than two bytes count
        assert terms.num_boundary == terms.num_interior == math.prod(size)
        assert terms.boundary.item() == pytest.approx(exact.boundary.item(), rel=2e-6)
        assert terms.interior.item() == pytest.approx(exact.interior.item(), rel=2e-6)

    @pytest.mark.parametrize("dirty", range(5))
    def test_dirt_in_any_clip_is_dirt(self, dirty: int) -> None:
        enc, dec = torch.randn(2, 5, 2, 3, 4, 5).unbind()
        assert SSyncLoss().eval()(enc, dec).isfinite()
        for maps in (enc, dec):
            maps[dirty, 1, 2, 3, 4] = float("nan")
            assert SSyncLoss().eval()(enc, dec).isnan()
            maps[dirty, 1, 2, 3, 4] = 0.0

    @given(case=ssync_cases(maps=MAPS))
    @few
    def test_twice_is_the_same(self, case: SSyncCase) -> None:
        assert_same(run(**case._asdict()), run(**case._asdict()))


class TestSmallShapes:
    @given(maps=map_pairs(max_frames=1), threshold=GENERIC)
    @few
    def test_an_image_is_a_clip_that_stands_still(self, maps: MapPair, threshold: float | None) -> None:
        still = run(*maps, merge_threshold=threshold)
        moving = run(*(one.expand(-1, 3, -1, -1, -1) for one in maps), merge_threshold=threshold)
        for field in PseudoLabels._fields[:4]:
            image, clip = (getattr(one.terms.labels, field) for one in (still, moving))
            assert torch.equal(image.expand_as(clip), clip)
        assert_close_loss(moving.terms.boundary, still.terms.boundary)
        assert_close_loss(moving.terms.interior, still.terms.interior)

    @given(case=ssync_cases(maps=map_pairs(max_slots=1, minus_inf=True)), knobs=region_knobs())
    @few
    def test_a_single_slot_has_nothing_to_learn(self, case: SSyncCase, knobs: Settings) -> None:
        for criterion in ("mse", "cross_entropy"):
            result = run(**case._asdict(), criterion=criterion, **knobs)
            assert result.terms.total == 0
            assert not result.enc_grad.any()
            assert not result.dec_grad.any()
        labels = result.terms.labels
        assert not labels.enc_labels.any()
        # nothing differs, so all that is valid is interior
        assert torch.equal(labels.interior, cells_of(case))

    @given(label_videos(max_height=1), region_knobs())
    @few
    def test_a_row_sees_its_sides_three_times(self, labels: Tensor, knobs: Settings) -> None:
        left = labels != torch.cat([labels[..., :1], labels[..., :-1]], -1)
        right = labels != torch.cat([labels[..., 1:], labels[..., -1:]], -1)
        before = labels != torch.cat([labels[:, :1], labels[:, :-1]], 1)
        after = labels != torch.cat([labels[:, 1:], labels[:, -1:]], 1)
        count = 3 * (left.int() + right.int()) + before.int() + after.int()
        assert torch.equal(neighbor_difference(labels).int(), count)
        calm = knobs["max_different"]
        assert torch.equal(interior_region(labels, max_different=calm), count <= calm)

    def test_one_patch_has_no_neighbor_but_itself(self) -> None:
        enc, dec = torch.tensor([2.0, 0.0]).view(1, 1, 2, 1, 1), torch.tensor([3.0, 1.0]).log().view(1, 1, 2, 1, 1)
        terms = SSyncLoss().eval().terms(enc, dec)
        assert not terms.labels.boundary.any()
        assert terms.labels.interior.all()
        assert terms.boundary == 0
        # 1 / (1 + e^2) twice, squared
        assert terms.interior.item() == pytest.approx((1 / (1 + math.exp(2))) ** 2)
