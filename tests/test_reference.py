"""The slow reference against golden files, values computed by hand and brute force."""

import math
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from golden_cases import NAMES, load_golden
from ssync_loss.ssync.reference import (
    UnionFind,
    reference_boundary_region,
    reference_hard_labels,
    reference_interior_region,
    reference_merge_slots,
    reference_neighbor_difference,
    reference_pseudo_labels,
    reference_selective_distillation_loss,
    reference_slot_overlap,
    reference_ssync,
)
from ssync_loss.testing import (
    SlotGraph,
    assert_close_gradient,
    assert_close_loss,
    gradient_scale,
    slot_graphs,
    thresholds,
)

INF = math.inf
NAN = math.nan


class TestGoldenFiles:
    def test_they_cover_empty_regions_and_merges(self) -> None:
        cases = [load_golden(name).expected for name in NAMES]
        assert len(cases) == 9
        for region in ("is_boundary", "is_interior"):
            assert any(not one[region].any() for one in cases)
        merged = [not torch.equal(one["enc_labels"], one["enc_labels_merged"]) for one in cases]
        assert any(merged)
        assert not all(merged)

    @pytest.mark.parametrize("name", NAMES)
    def test_labels_and_regions_are_equal(self, name: str) -> None:
        case = load_golden(name)
        wanted = case.expected
        labels = reference_pseudo_labels(case.enc_logits, case.dec_logits, **case.label_args)

        assert torch.equal(reference_hard_labels(case.enc_logits), wanted["enc_labels"])
        assert torch.equal(reference_hard_labels(case.dec_logits), wanted["dec_labels"])
        assert torch.equal(labels.enc_labels, wanted["enc_labels_merged"])
        assert torch.equal(labels.dec_labels, wanted["dec_labels_merged"])
        assert torch.equal(labels.boundary, wanted["is_boundary"])
        assert torch.equal(labels.interior, wanted["is_interior"])
        rename = labels.representative[:, None, None].expand(*wanted["enc_labels"].shape[:3], -1)
        assert torch.equal(rename.gather(3, wanted["enc_labels"]), wanted["enc_labels_merged"])

    @pytest.mark.parametrize("name", NAMES)
    def test_overlap_agrees_up_to_the_published_epsilon(self, name: str) -> None:
        case = load_golden(name)
        overlap = reference_slot_overlap(case.enc_logits)
        torch.testing.assert_close(overlap, case.expected["slot_iou"], rtol=0, atol=2e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", NAMES)
    def test_losses_and_gradients_are_close(self, name: str, dtype: torch.dtype) -> None:
        case = load_golden(name)
        wanted = case.expected
        enc = case.enc_logits.to(dtype).requires_grad_()
        dec = case.dec_logits.to(dtype).requires_grad_()
        terms = reference_ssync(enc, dec, **case.label_args, temperature=case.temperature)
        torch.autograd.backward(terms.boundary + terms.interior)

        assert_close_loss(terms.boundary, wanted["loss_enc2dec_f64"].to(dtype))
        assert_close_loss(terms.interior, wanted["loss_dec2enc_f64"].to(dtype))
        for gradient, key, region in (
            (enc.grad, "grad_enc_f64", terms.labels.interior),
            (dec.grad, "grad_dec_f64", terms.labels.boundary),
        ):
            scale = gradient_scale(region, enc.shape[2], temperature=case.temperature)
            assert_close_gradient(gradient, wanted[key], scale=scale)


def closure(links: Tensor) -> Tensor:
    """Return reachability (S, S) by Warshall's algorithm."""
    reach = links | torch.eye(len(links), dtype=torch.bool)
    for middle in range(len(links)):
        reach = reach | (reach[:, middle, None] & reach[middle])
    return reach


class TestUnionFind:
    @settings(max_examples=100, deadline=None)
    @given(st.integers(1, 9), st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=12))
    def test_groups_are_the_connected_components(self, size: int, edges: list[tuple[int, int]]) -> None:
        sets, links = UnionFind(size), torch.zeros(size, size, dtype=torch.bool)
        for first, second in edges:
            sets.union(first % size, second % size)
            links[first % size, second % size] = links[second % size, first % size] = True
        rows = [row.nonzero().flatten().tolist() for row in closure(links)]
        assert sets.groups() == sorted({tuple(row): row for row in rows}.values())

    def test_find_compresses_the_path(self) -> None:
        sets = UnionFind(5)
        sets.parent = [0, 0, 1, 2, 3]
        assert sets.find(4) == 0
        assert sets.parent == [0, 0, 0, 0, 0]


class TestMergeSlots:
    @settings(max_examples=50, deadline=None)
    @given(slot_graphs(batch=8), thresholds())
    def test_equals_brute_force(self, graph: SlotGraph, threshold: float | None) -> None:
        merged = reference_merge_slots(*graph, threshold=threshold)
        for overlap, area, names in zip(*graph, merged, strict=True):
            # a tensor compares in the precision of the overlap
            linked = overlap > torch.tensor(INF if threshold is None else threshold)
            linked.fill_diagonal_(False)
            for slot, reach in enumerate(closure(linked)):
                largest = area[reach].max()
                assert names[slot] == (reach & (area == largest)).nonzero().min()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_links_only_strictly_above_the_threshold(self, dtype: torch.dtype) -> None:
        exactly = torch.tensor([[[1.0, 0.6], [0.6, 1.0]]], dtype=dtype)
        above = exactly.nextafter(torch.ones_like(exactly))
        area = torch.tensor([[1, 2]])
        assert reference_merge_slots(exactly, area, threshold=0.6).tolist() == [[0, 1]]
        assert reference_merge_slots(above, area, threshold=0.6).tolist() == [[1, 1]]

    def test_lowest_index_represents_on_ties(self) -> None:
        overlap = torch.ones(1, 4, 4)
        assert reference_merge_slots(overlap, torch.tensor([[1, 7, 7, 0]]), threshold=0.5).tolist() == [[1] * 4]
        assert reference_merge_slots(overlap, torch.zeros(1, 4), threshold=0.5).tolist() == [[0] * 4]

    @pytest.mark.parametrize("threshold", [1.0, None])
    def test_nothing_merges_at_one_or_none(self, threshold: float | None) -> None:
        merged = reference_merge_slots(torch.ones(2, 3, 3), torch.ones(2, 3), threshold=threshold)
        assert merged.tolist() == [[0, 1, 2]] * 2

    def test_a_link_in_one_direction_suffices(self) -> None:
        overlap = torch.tensor([[[0.0, 0.0], [0.9, 0.0]]])
        assert reference_merge_slots(overlap, torch.tensor([[1, 2]]), threshold=0.5).tolist() == [[1, 1]]

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match=r"`overlap` must have shape \(B=1, S=2, S=2\); got \(1, 2, 3\)"):
            reference_merge_slots(torch.zeros(1, 2, 3), torch.zeros(1, 2), threshold=0.5)
        with pytest.raises(TypeError, match=r"`overlap` must be floating point"):
            reference_merge_slots(torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 2), threshold=0.5)


class TestNeighborDifference:
    def count(self, *frames: list[list[int]]) -> list[list[list[int]]]:
        counts: list[list[list[int]]] = reference_neighbor_difference(torch.tensor([frames]))[0].tolist()
        return counts

    def test_an_odd_patch_in_the_middle(self) -> None:
        assert self.count([[0, 0, 0], [0, 1, 0], [0, 0, 0]]) == [[[1, 1, 1], [1, 8, 1], [1, 1, 1]]]

    def test_a_clamped_diagonal_counts_twice(self) -> None:
        assert self.count([[0, 0], [0, 1]]) == [[[1, 2], [2, 5]]]

    def test_time_is_two_neighbors_clamped_at_the_ends(self) -> None:
        assert self.count([[0]], [[1]], [[0]]) == [[[1]], [[2]], [[1]]]

    def test_all_ten_can_differ(self) -> None:
        plain = [[0, 0, 0]] * 3
        assert self.count(plain, [[0, 0, 0], [0, 1, 0], [0, 0, 0]], plain)[1][1][1] == 10

    def test_invalid_patches_differ_from_no_neighbor(self) -> None:
        labels = torch.tensor([[[[0, 1, 2]]]])
        valid = torch.tensor([[[[True, False, True]]]])
        assert reference_neighbor_difference(labels, valid=valid).tolist() == [[[[0, 0, 0]]]]
        frames = torch.tensor([[[[0]], [[1]], [[2]]]])
        by_frame = torch.tensor([[True, True, False]])
        assert reference_neighbor_difference(frames, valid=by_frame).flatten().tolist() == [1, 1, 0]

    def test_keeps_shape_and_counts_in_uint8(self) -> None:
        counts = reference_neighbor_difference(torch.zeros(2, 3, 4, 5, dtype=torch.int32))
        assert (counts.shape, counts.dtype) == ((2, 3, 4, 5), torch.uint8)

    def test_errors(self) -> None:
        with pytest.raises(TypeError, match="`labels` must hold integers"):
            reference_neighbor_difference(torch.zeros(1, 1, 1, 1))
        with pytest.raises(ValueError, match=r"`valid` must have shape \(B=1, T=2\)"):
            reference_neighbor_difference(torch.ones(1, 2, 3, 4).long(), valid=torch.ones(1, 3).bool())
        with pytest.raises(TypeError, match="`valid` must be boolean"):
            reference_neighbor_difference(torch.ones(1, 2, 3, 4).long(), valid=torch.ones(1, 2))


class TestRegions:
    # differing neighbors: 0, 3, 3 in the row, 1 to 8 in the square
    row = torch.tensor([[[[0, 0, 1]]]])
    square = torch.tensor([[[[0, 0, 0], [0, 1, 0], [0, 0, 0]]]])

    def test_boundary_needs_differing_and_equal_neighbors(self) -> None:
        assert reference_boundary_region(self.row).flatten().tolist() == [False, True, True]
        assert reference_boundary_region(self.row, min_different=3).flatten().tolist() == [False, True, True]
        assert not reference_boundary_region(self.row, min_different=4).any()
        # in the middle eight neighbors differ and two are equal
        assert reference_boundary_region(self.square, min_different=2, min_same=2).sum() == 1
        assert not reference_boundary_region(self.square, min_different=2, min_same=3).any()

    def test_an_isolated_patch_is_not_a_boundary(self) -> None:
        labels = torch.zeros(1, 3, 3, 3, dtype=torch.int64)
        labels[0, 1, 1, 1] = 1
        assert not reference_boundary_region(labels)[0, 1, 1, 1]
        assert reference_boundary_region(labels, min_same=0)[0, 1, 1, 1]

    def test_interior_allows_some_differing_neighbors(self) -> None:
        assert reference_interior_region(self.row).flatten().tolist() == [True, False, False]
        assert reference_interior_region(self.row, max_different=2).sum() == 1
        assert reference_interior_region(self.row, max_different=3).all()

    def test_invalid_patches_are_never_selected(self) -> None:
        valid = torch.tensor([[[[True, False, True]]]])
        everywhere = reference_boundary_region(self.row, min_different=0, min_same=0, valid=valid)
        assert torch.equal(everywhere, valid)
        assert torch.equal(reference_interior_region(self.row, max_different=10, valid=valid), valid)


class TestSlotOverlap:
    def overlap(self, *slots: list[list[float]], valid: Tensor | None = None) -> list[list[float]]:
        """Return the overlap of slots that are given as frames of patches."""
        logits = torch.tensor(slots).movedim(0, 1)[None, :, :, None]
        rows: list[list[float]] = reference_slot_overlap(logits, valid=valid)[0].tolist()
        return rows

    def test_is_the_mean_over_frames(self) -> None:
        # the slots are active on {0, 1} | {2, 3} and on {0, 1, 2} | {1, 2, 3}
        first = [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
        second = [[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]]
        assert self.overlap(first, second)[0][1] == pytest.approx(2 / 3)
        # neither slot is active in the second frame, whose overlap is 0
        first, second = [[2.0, 2.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 0.0]]
        assert self.overlap(first, second) == [[0.5, 0.25], [0.25, 0.5]]

    def test_a_frame_without_a_valid_patch_is_left_out(self) -> None:
        first, second = [[2.0, 0.0], [9.0, 9.0]], [[2.0, 0.0], [NAN, INF]]
        valid = torch.tensor([[True, False]])
        assert self.overlap(first, second, valid=valid) == [[1.0, 1.0], [1.0, 1.0]]
        assert self.overlap(first, second, valid=torch.zeros(1, 2).bool()) == [[0.0, 0.0], [0.0, 0.0]]

    def test_an_invalid_patch_enters_no_mean_and_no_area(self) -> None:
        valid = torch.tensor([[[[True, True, True, False]]]])
        slots = [[1.0, 0.0, 0.0, 90.0]], [[1.0, 1.0, 0.0, -90.0]]
        assert self.overlap(*slots, valid=valid) == [[1.0, 0.5], [0.5, 1.0]]

    def test_a_constant_slot_is_inactive(self) -> None:
        assert self.overlap([[2.0, 2.0]], [[2.0, 0.0]]) == [[0.0, 0.0], [0.0, 1.0]]

    def test_minus_infinity(self) -> None:
        # a slot of -inf is inactive; a single -inf makes the mean -inf, which every other patch exceeds
        never, once = [[-INF, -INF, -INF]], [[-INF, 0.0, -9.0]]
        assert self.overlap(never, once, [[0.0, 1.0, 1.0]]) == [[0, 0, 0], [0, 1, 1], [0, 1, 1]]

    def test_an_absent_slot_overlaps_nothing(self) -> None:
        logits = torch.tensor([1.0, 0.0]).view(1, 1, 1, 1, 2).expand(1, 1, 3, 1, 2)
        overlap = reference_slot_overlap(logits, slot_mask=torch.tensor([[True, False, True]]))
        assert overlap.tolist() == [[[1, 0, 1], [0, 0, 0], [1, 0, 1]]]

    @pytest.mark.parametrize(
        ("given", "wanted"),
        [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
    )
    def test_is_float32_or_wider(self, given: torch.dtype, wanted: torch.dtype) -> None:
        overlap = reference_slot_overlap(torch.zeros(2, 1, 3, 1, 1, dtype=given))
        assert (overlap.shape, overlap.dtype) == ((2, 3, 3), wanted)


class TestHardLabels:
    def test_absent_slots_never_win(self) -> None:
        logits = torch.tensor([9.0, -INF, -INF]).view(1, 1, 3, 1, 1)
        mask = torch.tensor([[False, True, True]])
        assert reference_hard_labels(logits, slot_mask=mask).item() == 1

    def test_the_first_of_equal_slots_wins(self) -> None:
        assert reference_hard_labels(torch.tensor([0.0, 2.0, 2.0]).view(1, 1, 3, 1, 1)).item() == 1


class TestPseudoLabels:
    def test_merged_slots_share_a_label(self) -> None:
        # slots 1 and 2 are active on the same two patches, and each wins one
        rows = [[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 4.0, 5.0], [0.0, 0.0, 5.0, 5.0]]
        logits = torch.tensor(rows).view(1, 1, 3, 1, 4)
        apart = reference_pseudo_labels(logits, logits, merge_threshold=None)
        assert apart.enc_labels.flatten().tolist() == [0, 0, 2, 1]
        merged = reference_pseudo_labels(logits, logits)
        assert merged.representative.tolist() == [[0, 1, 1]]
        assert merged.enc_labels.flatten().tolist() == [0, 0, 1, 1]
        assert merged.boundary.flatten().tolist() == [False, True, True, False]
        assert merged.interior.flatten().tolist() == [True, False, False, True]

    def test_only_valid_encoder_labels_count_as_area(self) -> None:
        # both slots are active on the first two patches; slot 1 wins two valid patches, slot 0 wins one valid patch
        # and both invalid patches
        enc = torch.tensor([[4.0, 5.0, 0.0, 9.0, 9.0], [5.0, 4.0, 1.0, 0.0, 0.0]]).view(1, 1, 2, 1, 5)
        dec = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1, 1).expand_as(enc)
        valid = torch.tensor([[[[True, True, True, False, False]]]])
        assert reference_pseudo_labels(enc, dec, valid=valid).representative.tolist() == [[1, 1]]

    def test_invalid_patches_have_label_zero_and_no_region(self) -> None:
        logits = torch.tensor([[0.0, 0.0], [9.0, 9.0]]).view(1, 1, 2, 1, 2)
        valid = torch.tensor([[[[True, False]]]])
        labels = reference_pseudo_labels(logits, logits, valid=valid, min_different=0, min_same=0, max_different=10)
        assert labels.enc_labels.flatten().tolist() == [1, 0]
        assert labels.dec_labels.flatten().tolist() == [1, 0]
        assert torch.equal(labels.boundary, valid)
        assert torch.equal(labels.interior, valid)

    def test_a_clip_without_slots_is_invalid(self) -> None:
        logits = torch.randn(2, 1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        mask = torch.tensor([[False] * 3, [True] * 3])
        labels = reference_pseudo_labels(logits, logits, slot_mask=mask, max_different=10)
        assert not labels.enc_labels[0].any()
        assert not labels.dec_labels[0].any()
        assert not labels.interior[0].any()
        assert labels.interior[1].all()
        assert labels.representative[0].tolist() == [0, 1, 2]

    def test_absent_slots_represent_themselves(self) -> None:
        logits = torch.tensor([1.0, 0.0]).view(1, 1, 1, 1, 2).expand(1, 1, 4, 1, 2)
        mask = torch.tensor([[False, True, False, True]])
        labels = reference_pseudo_labels(logits, logits, slot_mask=mask)
        assert labels.representative.tolist() == [[0, 1, 2, 1]]
        assert labels.enc_labels.flatten().tolist() == [1, 1]

    def test_shapes_and_dtypes(self) -> None:
        labels = reference_pseudo_labels(torch.zeros(2, 3, 4, 5, 6), torch.zeros(2, 3, 4, 5, 6))
        for field in labels[:4]:
            assert field.shape == (2, 3, 5, 6)
        assert labels.representative.shape == (2, 4)
        assert [field.dtype for field in labels] == [torch.int64] * 2 + [torch.bool] * 2 + [torch.int64]

    def test_errors(self) -> None:
        maps = torch.zeros(1, 2, 3, 4, 5)
        with pytest.raises(ValueError, match=r"`dec_logits` must have shape \(B=1, T=2, S=3, H=4, W=5\)"):
            reference_pseudo_labels(maps, maps[:, :1])
        with pytest.raises(TypeError, match="`enc_logits` must be floating point"):
            reference_pseudo_labels(maps.long(), maps)
        with pytest.raises(ValueError, match=r"`slot_mask` must have shape \(B=1, S=3\)"):
            reference_pseudo_labels(maps, maps, slot_mask=torch.ones(1, 2).bool())


def one_patch(*logits: float) -> Tensor:
    return torch.tensor(logits, dtype=torch.float64).view(1, 1, -1, 1, 1).requires_grad_()


def at(label: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([[[[label]]]]), torch.ones(1, 1, 1, 1, dtype=torch.bool)


class TestSelectiveDistillationLoss:
    loss = staticmethod(reference_selective_distillation_loss)

    def test_mse_of_one_patch(self) -> None:
        # P = (3/4, 1/4)
        assert self.loss(one_patch(math.log(3), 0.0), *at(0)).item() == pytest.approx(1 / 16)
        assert self.loss(one_patch(math.log(3), 0.0), *at(1)).item() == pytest.approx(9 / 16)
        assert self.loss(one_patch(math.log(9), 0.0), *at(0), temperature=2.0).item() == pytest.approx(1 / 16)

    def test_cross_entropy_of_one_patch(self) -> None:
        logits = one_patch(math.log(3), 0.0)
        plain = self.loss(logits, *at(1), criterion="cross_entropy")
        assert plain.item() == pytest.approx(math.log(4))
        smooth = self.loss(logits, *at(1), criterion="cross_entropy", label_smoothing=0.5)
        assert smooth.item() == pytest.approx(0.75 * math.log(4) + 0.25 * math.log(4 / 3))

    @pytest.mark.parametrize(
        ("criterion", "mean", "total"),
        # one patch with 2 uniform slots is selected, and two patches with 4 uniform slots
        [
            ("mse", (1 / 2 + 2 * 3 / 4) / (2 + 2 * 4), 1 / 4 + 2 * 3 / 16),
            ("cross_entropy", (math.log(2) + 2 * math.log(4)) / 3, math.log(2) + 2 * math.log(4)),
        ],
    )
    def test_reductions_count_present_slots(self, criterion: str, mean: float, total: float) -> None:
        logits = torch.zeros(2, 1, 4, 1, 2)
        mask = torch.tensor([[True, False, True, False], [True] * 4])
        target = torch.tensor([[[[2, 0]]], [[[1, 3]]]])
        region = torch.tensor([[[[True, False]]], [[[True, True]]]])

        def reduced(reduction: str) -> Tensor:
            return self.loss(logits, target, region, criterion=criterion, slot_mask=mask, reduction=reduction)

        assert reduced("mean").item() == pytest.approx(mean)
        assert reduced("sum").item() == pytest.approx(total)
        assert reduced("none").shape == (2, 1, 1, 2)
        assert reduced("none")[0, 0, 0, 1] == 0
        torch.testing.assert_close(reduced("none").sum(), reduced("sum"))

    def test_smoothing_spreads_over_present_slots(self) -> None:
        mask = torch.tensor([[True, False, True]])
        value = self.loss(
            one_patch(math.log(3), 50.0, 0.0),
            *at(0),
            criterion="cross_entropy",
            label_smoothing=1.0,
            slot_mask=mask,
        )
        assert value.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)

    def test_mse_gradient_equals_the_closed_form(self) -> None:
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(2, 2, 5, 2, 3, dtype=torch.float64, generator=generator).requires_grad_()
        target = torch.randint(0, 5, (2, 2, 2, 3), generator=generator)
        region = torch.rand(2, 2, 2, 3, generator=generator) < 0.6
        torch.autograd.backward(self.loss(logits, target, region, temperature=0.7))

        p = torch.softmax(logits.detach() / 0.7, dim=2)
        won = target[:, :, None] == torch.arange(5).view(5, 1, 1)
        p_y = (p * won).sum(dim=2, keepdim=True)
        r, q = (p * ~won).sum(dim=2, keepdim=True), (p * ~won).square().sum(dim=2, keepdim=True)
        factor = 2 / (0.7 * 5 * region.sum()) * region[:, :, None]
        wanted = factor * torch.where(won, -p_y * (r.square() + q), p * (p + p_y * r - q))
        torch.testing.assert_close(logits.grad, wanted)

    @pytest.mark.parametrize("criterion", ["mse", "cross_entropy"])
    def test_an_empty_region_is_zero_with_a_graph(self, criterion: str) -> None:
        logits = torch.full((1, 1, 2, 1, 2), NAN, requires_grad=True)
        target, region = torch.zeros(1, 1, 1, 2).long(), torch.zeros(1, 1, 1, 2).bool()
        for reduction in ("mean", "sum", "none"):
            loss = self.loss(logits, target, region, criterion=criterion, reduction=reduction)
            assert torch.equal(loss, torch.zeros_like(loss))
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            assert torch.equal(gradient, torch.zeros_like(logits))

    @pytest.mark.parametrize("criterion", ["mse", "cross_entropy"])
    @pytest.mark.parametrize("rubbish", [NAN, INF, -INF])
    def test_values_outside_the_region_do_not_matter(self, criterion: str, rubbish: float) -> None:
        clean = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.5, 0.0]]).view(1, 1, 3, 1, 2)
        dirty = clean.clone()
        dirty[0, 0, :, 0, 1] = rubbish
        dirty[0, 0, 1] = rubbish
        target, region = torch.tensor([[[[2, 0]]]]), torch.tensor([[[[True, False]]]])
        mask = torch.tensor([[True, False, True]])
        results = []
        for logits in (clean, dirty):
            logits.requires_grad_()
            loss = self.loss(logits, target, region, criterion=criterion, slot_mask=mask)
            results.append((loss, *torch.autograd.grad(loss, logits)))
        for left, right in zip(*results, strict=True):
            assert torch.equal(left, right)
        gradient = results[1][1]
        assert gradient[0, 0, [0, 2], 0, 0].all()
        assert not gradient[0, 0, 1].any()
        assert not gradient[0, 0, :, 0, 1].any()

    def test_a_clip_without_slots_is_never_selected(self) -> None:
        logits = torch.zeros(2, 1, 2, 1, 1, requires_grad=True)
        target, region = torch.zeros(2, 1, 1, 1).long(), torch.ones(2, 1, 1, 1).bool()
        mask = torch.tensor([[True, True], [False, False]])
        for criterion, wanted in (("mse", 0.25), ("cross_entropy", math.log(2))):
            loss = self.loss(logits, target, region, criterion=criterion, slot_mask=mask)
            assert loss.item() == pytest.approx(wanted)

    @pytest.mark.parametrize(
        ("criterion", "smoothing", "wanted"),
        [("mse", 0.0, 1 / 4), ("cross_entropy", 0.0, math.log(2)), ("cross_entropy", 0.4, math.log(2))],
    )
    def test_a_patch_of_minus_infinity_is_uniform(self, criterion: str, smoothing: float, wanted: float) -> None:
        logits, mask = one_patch(-INF, 3.0, -INF), torch.tensor([[True, False, True]])
        loss = self.loss(logits, *at(0), criterion=criterion, label_smoothing=smoothing, slot_mask=mask)
        assert loss.item() == pytest.approx(wanted)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert not gradient.any()

    def test_one_slot_at_minus_infinity(self) -> None:
        logits = one_patch(-INF, math.log(3), 0.0)
        assert self.loss(logits, *at(1)).item() == pytest.approx((1 / 16 + 1 / 16) / 3)
        assert self.loss(logits, *at(0)).item() == pytest.approx((1 + 9 / 16 + 1 / 16) / 3)

        tiny = math.log(torch.finfo(torch.float32).tiny)
        entropy = self.loss(logits, *at(0), criterion="cross_entropy")
        assert entropy.item() == pytest.approx(-tiny)
        (gradient,) = torch.autograd.grad(entropy, logits)
        assert not gradient.any()
        smooth = self.loss(logits, *at(1), criterion="cross_entropy", label_smoothing=0.3)
        assert smooth.item() == pytest.approx(0.8 * math.log(4 / 3) + 0.1 * math.log(4) - 0.1 * tiny)
        (gradient,) = torch.autograd.grad(smooth, logits)
        # only the finite slots, with targets 0.8 and 0.1, get gradients
        torch.testing.assert_close(gradient.flatten().tolist(), [0.0, 0.9 * 0.75 - 0.8, 0.9 * 0.25 - 0.1])

    @pytest.mark.parametrize("criterion", ["mse", "cross_entropy"])
    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_a_selected_patch_with_nan_or_infinity_is_nan(self, criterion: str, bad: float) -> None:
        assert self.loss(one_patch(0.0, bad), *at(0), criterion=criterion).isnan()

    @pytest.mark.parametrize(
        ("given", "wanted"),
        [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
    )
    def test_loss_is_float32_or_wider_and_gradients_keep_their_type(
        self, given: torch.dtype, wanted: torch.dtype
    ) -> None:
        logits = one_patch(1.0, 0.0).detach().to(given).requires_grad_()
        loss = self.loss(logits, *at(0))
        torch.autograd.backward(loss)
        assert loss.dtype == wanted
        assert logits.grad is not None
        assert logits.grad.dtype == given

    @pytest.mark.parametrize("criterion", ["mse", "cross_entropy"])
    def test_gradcheck(self, criterion: str) -> None:
        logits = torch.randn(1, 2, 3, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        target, region = torch.tensor([[[[0, 1]], [[2, 0]]]]), torch.tensor([[[[1, 1]], [[0, 1]]]]).bool()
        for reduction in ("mean", "sum", "none"):
            loss = partial(self.loss, criterion=criterion, reduction=reduction)
            assert torch.autograd.gradcheck(loss, (logits.requires_grad_(), target, region))

    def test_errors(self) -> None:
        logits, (target, region) = one_patch(1.0, 0.0), at(0)
        with pytest.raises(ValueError, match="`label_smoothing` needs criterion='cross_entropy'"):
            self.loss(logits, target, region, label_smoothing=0.1)
        with pytest.raises(ValueError, match="`criterion` must be one of 'mse', 'cross_entropy'; got 'l1'"):
            self.loss(logits, target, region, criterion="l1")
        with pytest.raises(ValueError, match="`reduction` must be one of"):
            self.loss(logits, target, region, reduction="max")
        with pytest.raises(ValueError, match="`temperature` must be finite and above"):
            self.loss(logits, target, region, temperature=0.0)
        with pytest.raises(ValueError, match=r"`target` must name a present slot, one of \[0, 1\]; got 2"):
            self.loss(logits, target + 2, region)
        with pytest.raises(ValueError, match=r"`target` must name a present slot, one of \[1\]; got 0"):
            self.loss(logits, target, region, slot_mask=torch.tensor([[False, True]]))
        with pytest.raises(TypeError, match="`region` must be boolean"):
            self.loss(logits, target, target)
        with pytest.raises(TypeError, match="`target` must hold integers"):
            self.loss(logits, region, region)


class TestSSync:
    def maps(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(3)
        enc, dec = torch.randn(2, 2, 2, 3, 3, 4, dtype=torch.float64, generator=generator)
        return enc.requires_grad_(), dec.requires_grad_()

    @pytest.mark.parametrize("bad", [NAN, INF])
    @pytest.mark.parametrize("side", [0, 1])
    def test_nan_and_infinity_anywhere_make_both_terms_nan(self, bad: float, side: int) -> None:
        for t, s, h, w in product(range(2), range(3), range(3), range(4)):
            maps = [x.detach().clone() for x in self.maps()]
            maps[side][1, t, s, h, w] = bad
            terms = reference_ssync(*maps)
            assert terms.boundary.isnan()
            assert terms.interior.isnan()
            assert terms.labels.enc_labels.min() >= 0
            assert terms.labels.enc_labels.max() < 3

    def test_minus_infinity_is_allowed(self) -> None:
        enc, dec = (x.detach().clone() for x in self.maps())
        enc[:, :, 1] = -INF
        dec[:, 0, :, 0, 0] = -INF
        terms = reference_ssync(enc, dec, criterion="cross_entropy", label_smoothing=0.1, max_different=10)
        assert terms.boundary.isfinite()
        assert terms.interior.isfinite()

    @pytest.mark.parametrize("rubbish", [NAN, INF, -INF])
    def test_values_of_invalid_patches_and_absent_slots_do_not_matter(self, rubbish: float) -> None:
        enc, dec = self.maps()
        valid = torch.ones(2, 2, 3, 4, dtype=torch.bool)
        valid[:, :, 0], valid[0, 1] = False, False
        mask = torch.tensor([[True, False, True], [False] * 3])
        knobs: dict[str, Any] = {
            "merge_threshold": None,
            "max_different": 8,
            "valid": valid,
            "slot_mask": mask,
        }
        wanted = reference_ssync(enc, dec, **knobs)
        hidden = ~(valid[:, :, None] & mask[:, None, :, None, None])
        filled = [x.detach().masked_fill(hidden, rubbish).requires_grad_() for x in (enc, dec)]
        actual = reference_ssync(*filled, **knobs)
        assert wanted.boundary > 0
        assert wanted.interior > 0
        assert torch.equal(actual.boundary, wanted.boundary)
        assert torch.equal(actual.interior, wanted.interior)
        for field, other in zip(actual.labels, wanted.labels, strict=True):
            assert torch.equal(field, other)
        torch.autograd.backward(actual.boundary + actual.interior)
        for logits in filled:
            assert logits.grad is not None
            assert logits.grad.isfinite().all()
            assert not logits.grad[hidden].any()
