"""The strategies draw the documented cases, and the comparisons can fail."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants
from torch import Tensor

from ssync_loss import testing
from ssync_loss.ssync.reference import (
    reference_merge_slots,
    reference_pseudo_labels,
    reference_selective_distillation_loss,
    reference_slot_overlap,
    reference_ssync,
)
from ssync_loss.testing import (
    DistillationCase,
    MapPair,
    SlotGraph,
    SSyncCase,
    assert_close_gradient,
    assert_close_loss,
    assert_same_labels,
    decidable_clips,
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

Drawn = TypeVar("Drawn")


@pytest.fixture(autouse=True)
def _the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep hypothesis from drawing constants of modules that other tests load."""
    monkeypatch.setattr(providers, "_get_local_constants", Constants)


def tally(
    strategy: st.SearchStrategy[Drawn], count: Callable[[Drawn], dict[str, int]], examples: int = 40
) -> Counter[str]:
    """Draw the same examples in every call, and sum the counts of all examples."""
    totals: Counter[str] = Counter()

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(strategy)
    def add(drawn: Drawn) -> None:
        totals.update({"examples": 1, **count(drawn)})

    add()
    return totals


def clips_with(condition: Tensor) -> int:
    return int(condition.flatten(1).any(dim=1).sum())


def count_maps(maps: MapPair) -> dict[str, int]:
    enc, dec = maps
    b, t, s, h, w = enc.shape
    assert enc.shape == dec.shape
    top = enc.amax(dim=2, keepdim=True)
    labels = reference_pseudo_labels(enc, dec)
    return {
        "clips": b,
        "distinct": len({clip.numpy().tobytes() for clip in enc}),
        "one frame": int(t == 1),
        "one slot": int(s == 1),
        "one row": int(h == 1),
        "not square": int(h != w),
        "ties": clips_with((enc == top).sum(dim=2) > 1),
        "constant": b - clips_with(enc != enc[:, :1, :, :1, :1]),
        "agreeing": b - clips_with(enc != dec),
        "merging": clips_with(labels.representative != torch.arange(s)),
        "boundary": clips_with(labels.boundary),
        "interior": clips_with(labels.interior),
        "minus infinity": clips_with(enc.isneginf()),
        "slot of minus infinity": clips_with(enc.isneginf().all(dim=4).all(dim=3).all(dim=1)),
        "patch of minus infinity": clips_with(enc.isneginf().all(dim=2)),
        "not dyadic": clips_with((enc * 64).frac().nan_to_num(neginf=0) != 0),
        "not finite": clips_with(enc.isnan() | enc.isposinf() | dec.isnan() | dec.isposinf()),
    }


class TestMapPairs:
    def test_edge_cases_are_common(self) -> None:
        seen = tally(map_pairs(), count_maps)
        assert seen["clips"] == 16 * seen["examples"]
        for kind in ("one frame", "one slot", "one row"):
            assert 0.08 < seen[kind] / seen["examples"] < 0.6, kind
        assert seen["not square"] > 0.5 * seen["examples"]
        for kind in ("ties", "constant", "agreeing", "merging", "boundary", "interior"):
            assert 0.08 < seen[kind] / seen["clips"] < 0.9, kind
        assert seen["distinct"] > 0.6 * seen["clips"]
        assert not any(seen[kind] for kind in seen if "infinity" in kind)
        assert not seen["not dyadic"]
        assert not seen["not finite"]

    def test_minus_infinity_comes_in_cells_slots_and_patches(self) -> None:
        seen = tally(map_pairs(minus_inf=True), count_maps)
        for kind in ("minus infinity", "slot of minus infinity", "patch of minus infinity"):
            assert 0.08 < seen[kind] / seen["clips"] < 0.9, kind
        assert not seen["not dyadic"]
        assert not seen["not finite"]

    @pytest.mark.parametrize("minus_inf", [False, True])
    def test_without_ties_every_argmax_is_unique(self, minus_inf: bool) -> None:
        def count(maps: MapPair) -> dict[str, int]:
            ties = sum(clips_with((x == x.amax(dim=2, keepdim=True)).sum(dim=2) > 1) for x in maps)
            return {**count_maps(maps), "ties": ties}

        seen = tally(map_pairs(ties=False, minus_inf=minus_inf), count, examples=20)
        assert not seen["ties"]
        assert not seen["not dyadic"]
        assert seen["merging"] > 0.1 * seen["clips"]

    def test_sizes_and_dtype_follow_the_arguments(self) -> None:
        def count(maps: MapPair) -> dict[str, int]:
            b, t, s, h, w = maps.enc_logits.shape
            assert maps.enc_logits.dtype == maps.dec_logits.dtype == torch.float64
            assert b == 3
            return {f"T={t}": 1, f"S={s}": 1, f"H={h}": 1, f"W={w}": 1}

        seen = tally(
            map_pairs(batch=3, max_frames=2, max_slots=3, max_height=1, max_width=2, dtype=torch.float64),
            count,
        )
        wanted = {"T=1", "T=2", "S=1", "S=2", "S=3", "H=1", "W=1", "W=2"}
        assert set(seen) == wanted | {"examples"}

    def test_a_failure_shrinks_to_one_nonzero_clip(self) -> None:
        def has_a_boundary(maps: MapPair) -> bool:
            return bool(reference_pseudo_labels(*maps).boundary.any())

        enc, _ = find(
            map_pairs(batch=4),
            has_a_boundary,
            settings=settings(database=None, derandomize=True, deadline=None),
        )
        assert clips_with(enc != 0) == 1
        assert enc.shape[2] == 2
        assert enc[0, :, 0].numel() == 2


class TestSlotGraphs:
    def test_paths_ties_and_overlaps_on_the_threshold_are_common(self) -> None:
        def count(drawn: tuple[SlotGraph, float | None]) -> dict[str, int]:
            (overlap, area), threshold = drawn
            assert torch.equal(overlap, overlap.mT)
            assert (overlap.dtype, area.dtype) == (torch.float32, torch.int64)
            slots = area.shape[1]
            names = reference_merge_slots(overlap, area, threshold=threshold)
            tied = (names != torch.arange(slots)) & (area == area.gather(1, names))
            apart = ~torch.eye(slots, dtype=torch.bool)
            on_it = overlap == torch.tensor(-1.0 if threshold is None else threshold)
            return {
                "clips": len(area),
                "merging": clips_with(names != torch.arange(slots)),
                "groups of four": sum(int(torch.bincount(row).max() >= 4) for row in names),
                "chains": sum(longest_detour(row, threshold) >= 3 for row in overlap),
                "tied": clips_with(tied),
                "on the threshold": clips_with(on_it & apart) if threshold else 0,
                "no merging": int(threshold is None),
            }

        seen = tally(st.tuples(slot_graphs(), thresholds()), count)
        assert seen["clips"] == 16 * seen["examples"]
        for kind in ("merging", "groups of four", "chains", "tied", "on the threshold"):
            assert 0.05 < seen[kind] / seen["clips"] < 0.9, kind
        assert seen["no merging"]

    def test_distinct_areas(self) -> None:
        def count(graph: SlotGraph) -> dict[str, int]:
            assert all(len(row.tolist()) == len(set(row.tolist())) for row in graph.area)
            return {}

        tally(slot_graphs(distinct_areas=True), count, examples=20)


def longest_detour(overlap: Tensor, threshold: float | None) -> int:
    """Return the largest distance between two slots of a group, in links."""
    if threshold is None:
        return 0
    links = overlap > torch.tensor(threshold)
    reached, steps = torch.eye(len(links), dtype=torch.bool), 0
    while True:
        further = reached | (reached.float() @ links.float() > 0)
        if torch.equal(further, reached):
            return steps
        reached, steps = further, steps + 1


class TestLabelVideos:
    def test_all_counts_and_constants_occur(self) -> None:
        def count(labels: Tensor) -> dict[str, int]:
            assert labels.dtype == torch.int64
            assert labels.min() >= 0
            assert labels.max() < 3
            counts = testing.reference_neighbor_difference(labels)
            return {
                "clips": len(labels),
                "constant": len(labels) - clips_with(labels != labels[:, :1, :1, :1]),
                **{f"{n} differ": int((counts == n).any()) for n in range(11)},
            }

        seen = tally(label_videos(num_slots=3), count)
        assert 0.05 < seen["constant"] / seen["clips"] < 0.6
        assert all(seen[f"{n} differ"] for n in range(11))


class TestMasks:
    @pytest.mark.parametrize("size", [(4, 2, 3, 2), (4, 3)])
    def test_valid_patches_are_all_some_or_none(self, size: tuple[int, ...]) -> None:
        def count(valid: Tensor) -> dict[str, int]:
            assert (valid.shape, valid.dtype) == (size, torch.bool)
            flat = valid.flatten(1)
            whole, none = int(flat.all(dim=1).sum()), len(flat) - clips_with(flat)
            return {"whole": whole, "none": none, "part": len(flat) - whole - none}

        seen = tally(valid_masks(*size), count)
        assert min(seen["whole"], seen["none"], seen["part"]) > 10
        assert not tally(valid_masks(*size, empty=False), count)["none"]

    def test_present_slots_are_all_some_one_or_none(self) -> None:
        def count(mask: Tensor) -> dict[str, int]:
            assert (mask.shape, mask.dtype) == ((4, 5), torch.bool)
            return {f"{n} present": 1 for n in mask.sum(dim=1).tolist()}

        assert set(tally(slot_masks(4, 5), count)) == {"examples", *(f"{n} present" for n in range(6))}
        assert not tally(slot_masks(4, 5, empty=False), count)["0 present"]


class TestCases:
    def test_ssync_cases_come_with_and_without_masks(self) -> None:
        def count(drawn: tuple[SSyncCase, dict[str, int]]) -> dict[str, int]:
            case, knobs = drawn
            arguments: dict[str, Any] = {**case._asdict(), **knobs}
            terms = reference_ssync(**arguments)
            return {
                "frames": int(case.valid is not None and case.valid.ndim == 2),
                "patches": int(case.valid is not None and case.valid.ndim == 4),
                "slots": int(case.slot_mask is not None),
                "neither": int(case.valid is None and case.slot_mask is None),
                "boundary": int(terms.boundary > 0),
                "interior": int(terms.interior > 0),
                "other counts": int(knobs != {"min_different": 1, "min_same": 1, "max_different": 0}),
            }

        seen = tally(st.tuples(ssync_cases(maps=map_pairs(batch=4)), region_knobs()), count)
        for kind in ("frames", "patches", "slots", "neither", "boundary", "interior", "other counts"):
            assert seen[kind] > 3, kind

    def test_distillation_targets_name_present_slots(self) -> None:
        def count(case: DistillationCase) -> dict[str, int]:
            logits = case.logits.requires_grad_()
            # the reference refuses any selected target that is absent
            loss = reference_selective_distillation_loss(**{**case._asdict(), "logits": logits})
            (gradient,) = torch.autograd.grad(loss, logits)
            assert gradient.isfinite().all()
            labels = case.target.flatten(1).sort(dim=1).values
            return {
                "clips": len(labels),
                "masked": int(case.slot_mask is not None),
                "several labels": clips_with(labels[:, 1:] != labels[:, :-1]),
                "nothing selected": len(labels) - clips_with(case.region),
                "all selected": int(case.region.flatten(1).all(dim=1).sum()),
                "gradient": clips_with(gradient != 0),
            }

        seen = tally(distillation_cases(maps=map_pairs(minus_inf=True)), count)
        assert seen["masked"] > 3
        for kind in ("several labels", "nothing selected", "all selected", "gradient"):
            assert seen[kind] > 0.08 * seen["clips"], kind


class TestConditions:
    def test_an_overlap_at_the_threshold_is_undecidable(self) -> None:
        # one slot is active on two patches, the other on one of these: overlap 1/2
        logits = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).view(1, 1, 2, 1, 4)
        assert decidable_clips(logits, merge_threshold=0.5 + 2e-6).item()
        assert not decidable_clips(logits, merge_threshold=0.5 + 5e-7).item()
        assert decidable_clips(logits, merge_threshold=None).item()

    def test_a_logit_at_its_mean_is_undecidable_unless_dyadic(self) -> None:
        logits = torch.tensor([1.0, 0.0, 0.5]).view(1, 1, 1, 1, 3).repeat(3, 1, 2, 1, 1)
        logits[1, :, :, :, 2] = 0.50002
        assert decidable_clips(logits, merge_threshold=0.3).tolist() == [False, True, False]
        assert decidable_clips(logits, merge_threshold=0.3, dyadic=True).all()
        unseen = torch.tensor([[True, True, False]] * 3).view(3, 1, 1, 3)
        assert decidable_clips(logits, merge_threshold=0.3, valid=unseen).all()
        nobody = torch.zeros(3, 2, dtype=torch.bool)
        assert decidable_clips(logits, merge_threshold=0.3, slot_mask=nobody).all()

    def test_minus_infinity_is_decidable(self) -> None:
        logits = torch.tensor([[1.0, -torch.inf, 0.0], [-torch.inf] * 3]).view(1, 1, 2, 1, 3)
        assert decidable_clips(logits, merge_threshold=0.3).item()

    def test_generic_thresholds_leave_clips_decidable(self) -> None:
        def count(drawn: tuple[SSyncCase, float | None]) -> dict[str, int]:
            case, threshold = drawn
            masks = {"valid": case.valid, "slot_mask": case.slot_mask}
            clear = decidable_clips(case.enc_logits, merge_threshold=threshold, dyadic=True, **masks)
            return {"unclear": int((~clear).sum())}

        assert not tally(st.tuples(ssync_cases(), thresholds(tied=False)), count)["unclear"]

    def test_decidable_labels_survive_rounding(self) -> None:
        generator = torch.Generator().manual_seed(0)
        clean = torch.randint(-2, 3, (200, 2, 4, 2, 3), generator=generator).double()
        noise = torch.rand(clean.shape, generator=generator) * 2e-7 - 1e-7
        clear = decidable_clips(clean, merge_threshold=0.5)
        before, after = (
            reference_merge_slots(reference_slot_overlap(x), torch.zeros(200, 4), threshold=0.5)
            for x in (clean, clean + noise)
        )
        assert 20 < clear.sum() < 180
        assert torch.equal(before[clear], after[clear])
        assert not torch.equal(before, after)

    def test_untied_clips_have_unique_winners_and_areas(self) -> None:
        logits = torch.tensor([[5.0, 5.0, 0.0, 0.0], [6.0, 4.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]])
        logits = logits.view(1, 1, 3, 1, 4)
        # slots 0 and 1 merge, and each wins one patch
        assert untied_clips(logits, logits, merge_threshold=None).item()
        assert not untied_clips(logits, logits, merge_threshold=0.6).item()
        valid = torch.tensor([[[[False, True, True, True]]]])
        assert untied_clips(logits, logits, merge_threshold=0.0, valid=valid).item()
        mask = torch.tensor([[True, False, True]])
        assert untied_clips(logits, logits, merge_threshold=0.0, slot_mask=mask).item()
        assert not untied_clips(logits, torch.zeros_like(logits), merge_threshold=None).item()

    def test_poison_fills_all_masked_cells(self) -> None:
        valid, mask = torch.tensor([[[[True, False]]]]), torch.tensor([[False, True]])
        poisoned = poison(torch.zeros(1, 1, 2, 1, 2), valid=valid, slot_mask=mask, value=7.0)
        assert poisoned.flatten().tolist() == [7.0, 7.0, 0.0, 7.0]
        assert poison(torch.zeros(1, 2, 1, 1, 1)).eq(0).all()


class TestComparisons:
    labels = reference_pseudo_labels(torch.eye(3).view(1, 1, 3, 1, 3), torch.eye(3).view(1, 1, 3, 1, 3))

    @pytest.mark.parametrize("field", ["enc_labels", "dec_labels", "representative"])
    def test_a_different_label_fails(self, field: str) -> None:
        assert_same_labels(self.labels, self.labels._replace(boundary=self.labels.boundary.clone()))
        wrong = getattr(self.labels, field).clone()
        wrong.view(-1)[1] += 5
        with pytest.raises(AssertionError, match=rf"{field} differ in 1 places, first at .*: got 6, expected 1"):
            assert_same_labels(self.labels._replace(**{field: wrong}), self.labels)

    @pytest.mark.parametrize("field", ["boundary", "interior"])
    def test_a_different_region_fails(self, field: str) -> None:
        wrong = getattr(self.labels, field).logical_not()
        with pytest.raises(AssertionError, match=f"{field} differ in 3 places"):
            assert_same_labels(self.labels._replace(**{field: wrong}), self.labels)

    def test_a_different_dtype_or_shape_fails(self) -> None:
        with pytest.raises(AssertionError, match=r"enc_labels: got torch.int32"):
            assert_same_labels(self.labels._replace(enc_labels=self.labels.enc_labels.int()), self.labels)
        with pytest.raises(AssertionError, match=r"interior: got torch.bool \(1, 1, 3\)"):
            assert_same_labels(self.labels._replace(interior=self.labels.interior[0]), self.labels)

    def test_only_the_named_clips_are_compared(self) -> None:
        wrong = self.labels._replace(enc_labels=self.labels.enc_labels + 1)
        assert_same_labels(wrong, self.labels, clips=torch.tensor([False]))
        with pytest.raises(AssertionError, match="enc_labels differ"):
            assert_same_labels(wrong, self.labels, clips=torch.tensor([True]))

    def test_losses(self) -> None:
        loss = torch.tensor(0.1, dtype=torch.float64)
        assert_close_loss(loss * (1 + 4e-6), loss)
        assert_close_loss(loss * torch.nan, loss * torch.nan)
        for wrong in (loss * (1 + 6e-6), loss * torch.nan, loss.float(), loss[None]):
            with pytest.raises(AssertionError):
                assert_close_loss(wrong, loss)
        with pytest.raises(AssertionError):
            assert_close_loss(loss, loss * torch.nan)

    def test_gradients_are_compared_relative_to_their_scale(self) -> None:
        wanted = torch.tensor([0.1, 0.0])
        assert_close_gradient(wanted + 2e-7, wanted, scale=0.1)
        for wrong in (wanted + 4e-7, wanted * torch.nan, wanted[None], None):
            with pytest.raises(AssertionError):
                assert_close_gradient(wrong, wanted, scale=0.1)

    def test_gradients_of_an_empty_region_must_be_zero(self) -> None:
        zero, scale = torch.zeros(2), gradient_scale(torch.zeros(1, 1, 1, 2).bool(), 3)
        assert_close_gradient(zero, zero, scale=scale)
        with pytest.raises(AssertionError):
            assert_close_gradient(zero + 1e-30, zero, scale=scale)

    def test_gradient_scale_counts_present_slots(self) -> None:
        region = torch.tensor([[[[True, True]]], [[[True, False]]], [[[True, True]]]])
        mask = torch.tensor([[True, True, True], [True, False, True], [False] * 3])
        assert gradient_scale(region, 3) == pytest.approx(2 / 15)
        assert gradient_scale(region, 3, slot_mask=mask, temperature=0.5) == pytest.approx(4 / 8)
        assert gradient_scale(region, 3, slot_mask=mask, criterion="cross_entropy") == pytest.approx(1 / 3)


class TestImports:
    def test_only_the_strategies_need_hypothesis(self) -> None:
        program = """
import sys
sys.modules["hypothesis"] = None
import torch
import ssync_loss.testing as testing
assert testing.reference_hard_labels(torch.zeros(1, 1, 2, 1, 1)).item() == 0
try:
    testing.map_pairs
except ImportError as error:
    print(error)
"""
        done = subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=source_path()
        )
        assert done.stdout.strip() == (
            "`map_pairs` needs hypothesis, which is not installed: pip install 'ssync-loss[test]'."
        )

    def test_every_public_name_exists(self) -> None:
        assert all(getattr(testing, name) is not None for name in testing.__all__)
        assert dir(testing) == sorted(testing.__all__)

    def test_other_names_do_not_exist(self) -> None:
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = testing.nothing


def source_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
