"""Every golden file through the fast path, whole and piece by piece: labels to the bit, losses to rounding."""

from typing import Any

import pytest
import torch
from torch import Tensor

from golden_cases import NAMES, GoldenCase, load_golden
from ssync_loss import BoundaryRefinementLoss, InteriorDenoisingLoss, PseudoLabels, SSyncLoss
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
from ssync_loss.testing import assert_close_gradient, assert_close_loss, gradient_scale, reference_slot_overlap

# their overlap adds 1e-6 to both areas, so it is off by up to that over the smallest union, one patch
THEIR_EPSILON = 2e-6
BOUNDARY_COUNTS = ("min_different", "min_same")


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return load_golden(request.param)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture(params=["grid", "5-D"])
def settings(request: pytest.FixtureRequest, case: GoldenCase) -> dict[str, Any]:
    """The settings of the labels, with a grid where the maps are to be given flat."""
    flat: dict[str, Any] = {"grid": tuple(case.enc_logits.shape[3:])} if request.param == "grid" else {}
    return case.label_args | flat


def maps_of(case: GoldenCase, dtype: torch.dtype, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Leaves that take a gradient, (B, T, S, N) where the settings have a grid."""
    maps = (case.enc_logits, case.dec_logits)
    if "grid" in settings:
        maps = (maps[0].flatten(3), maps[1].flatten(3))
    enc, dec = (one.to(dtype).clone().requires_grad_() for one in maps)
    return enc, dec


def loss_of(case: GoldenCase, key: str, dtype: torch.dtype) -> Tensor:
    return case.expected[f"{key}_f64"].to(dtype)


def assert_golden_labels(actual: PseudoLabels, case: GoldenCase) -> None:
    wanted = case.expected
    assert torch.equal(actual.enc_labels, wanted["enc_labels_merged"])
    assert torch.equal(actual.dec_labels, wanted["dec_labels_merged"])
    assert torch.equal(actual.boundary, wanted["is_boundary"])
    assert torch.equal(actual.interior, wanted["is_interior"])
    assert torch.equal(actual.representative, representative_of(case))


def representative_of(case: GoldenCase) -> Tensor:
    """The representatives their merged labels tell, itself for a slot that no label names and no overlap links."""
    wanted = case.expected
    clips, slots = wanted["hard_area"].shape
    names = merge_slots(wanted["slot_iou"], wanted["hard_area"], threshold=case.label_args["merge_threshold"])
    for clip in range(clips):
        for slot in range(slots):
            for key in ("enc_labels", "dec_labels"):
                told = torch.unique(wanted[f"{key}_merged"][clip][wanted[key][clip] == slot])
                assert len(told) <= 1
                names[clip, slot] = told[0] if len(told) else names[clip, slot]
    return names


def assert_golden_gradients(enc: Tensor, dec: Tensor, case: GoldenCase) -> None:
    for leaf, key, region in ((enc, "grad_enc_f64", "is_interior"), (dec, "grad_dec_f64", "is_boundary")):
        scale = gradient_scale(case.expected[region], leaf.shape[2], temperature=case.temperature)
        assert_close_gradient(leaf.grad, case.expected[key].reshape(leaf.shape), scale=scale)


def test_the_files_cover_what_they_should() -> None:
    cases = [load_golden(name) for name in NAMES]
    assert len(cases) == 9
    assert any(not case.expected["is_boundary"].any() for case in cases)
    assert any(not case.expected["is_interior"].any() for case in cases)
    merged = [not torch.equal(case.expected["enc_labels"], case.expected["enc_labels_merged"]) for case in cases]
    assert any(merged)
    assert not all(merged)


class TestModule:
    def test_terms_and_gradients(self, case: GoldenCase, dtype: torch.dtype, settings: dict[str, Any]) -> None:
        enc, dec = maps_of(case, dtype, settings)
        criterion = SSyncLoss(**settings, temperature=case.temperature)
        terms = criterion.terms(enc, dec)
        assert_golden_labels(terms.labels, case)
        assert terms.num_boundary == case.expected["is_boundary"].sum()
        assert terms.num_interior == case.expected["is_interior"].sum()
        assert_close_loss(terms.boundary, loss_of(case, "loss_enc2dec", dtype))
        assert_close_loss(terms.interior, loss_of(case, "loss_dec2enc", dtype))
        both = case.expected["loss_enc2dec_f64"] + case.expected["loss_dec2enc_f64"]
        assert_close_loss(terms.total, both.to(dtype))
        loss = criterion(enc, dec)
        assert torch.equal(loss, terms.total)
        torch.autograd.backward(loss)
        assert_golden_gradients(enc, dec, case)

    def test_an_empty_region_is_exactly_zero(self) -> None:
        for name, term in (("05_single_slot", "boundary"), ("06_all_noise", "interior")):
            case = load_golden(name)
            maps = maps_of(case, torch.float32, {})
            terms = SSyncLoss(**case.label_args, temperature=case.temperature).terms(*maps)
            assert getattr(terms, term) == 0
            assert getattr(terms, f"num_{term}") == 0


class TestPieces:
    def test_pseudo_labels(self, case: GoldenCase, dtype: torch.dtype, settings: dict[str, Any]) -> None:
        assert_golden_labels(pseudo_labels(*maps_of(case, dtype, settings), **settings), case)

    def test_unmerged_labels(self, case: GoldenCase, dtype: torch.dtype, settings: dict[str, Any]) -> None:
        labels = pseudo_labels(*maps_of(case, dtype, settings), **settings | {"merge_threshold": None})
        assert torch.equal(labels.enc_labels, case.expected["enc_labels"])
        assert torch.equal(labels.dec_labels, case.expected["dec_labels"])

    def test_overlap(self, case: GoldenCase, dtype: torch.dtype) -> None:
        overlap = slot_overlap(case.enc_logits.to(dtype))
        assert overlap.dtype == dtype
        torch.testing.assert_close(overlap, case.expected["slot_iou"].to(dtype), rtol=0, atol=THEIR_EPSILON)
        # without their epsilon
        exact = reference_slot_overlap(case.enc_logits.to(dtype))
        torch.testing.assert_close(overlap, exact, rtol=0, atol=4 * torch.finfo(dtype).eps)

    def test_merging(self, case: GoldenCase, dtype: torch.dtype) -> None:
        names = merge_slots(
            slot_overlap(case.enc_logits.to(dtype)),
            case.expected["hard_area"],
            threshold=case.label_args["merge_threshold"],
        )
        assert torch.equal(names, representative_of(case))

    def test_regions(self, case: GoldenCase) -> None:
        wanted = case.expected
        enc, dec = wanted["enc_labels_merged"], wanted["dec_labels_merged"]
        counts = {key: case.label_args[key] for key in BOUNDARY_COUNTS}
        fewest = case.label_args["max_different"]
        assert torch.equal(boundary_region(enc, **counts), wanted["is_boundary"])
        assert torch.equal(interior_region(dec, max_different=fewest), wanted["is_interior"])
        assert torch.equal(neighbor_difference(dec) <= fewest, wanted["is_interior"])

    def test_distillation(self, case: GoldenCase, dtype: torch.dtype) -> None:
        enc, dec = maps_of(case, dtype, {})
        wanted = case.expected
        taught = [
            (dec, wanted["enc_labels_merged"], wanted["is_boundary"], "loss_enc2dec"),
            (enc, wanted["dec_labels_merged"], wanted["is_interior"], "loss_dec2enc"),
        ]
        for leaf, target, region, key in taught:
            loss = selective_distillation_loss(leaf, target, region, temperature=case.temperature)
            assert_close_loss(loss, loss_of(case, key, dtype))
            torch.autograd.backward(loss)
            # the other reductions are this mean put differently
            patches, total = (
                selective_distillation_loss(leaf, target, region, temperature=case.temperature, reduction=reduction)
                for reduction in ("none", "sum")
            )
            assert not patches[~region].any()
            assert_close_loss(patches.sum(), total)
            assert_close_loss(total / region.sum().clamp_min(1), loss_of(case, key, dtype))
        assert_golden_gradients(enc, dec, case)

    def test_one_term_at_a_time(self, case: GoldenCase, dtype: torch.dtype, settings: dict[str, Any]) -> None:
        boundary_settings = {key: value for key, value in settings.items() if key != "max_different"}
        interior_settings = {key: value for key, value in settings.items() if key not in BOUNDARY_COUNTS}
        knobs: dict[str, Any] = {"temperature": case.temperature}
        enc, dec = maps_of(case, dtype, settings)
        boundary = boundary_refinement_loss(enc, dec, **boundary_settings, **knobs)
        interior = interior_denoising_loss(enc, dec, **interior_settings, **knobs)
        assert_close_loss(boundary, loss_of(case, "loss_enc2dec", dtype))
        assert_close_loss(interior, loss_of(case, "loss_dec2enc", dtype))
        labels = pseudo_labels(enc, dec, **settings)
        assert torch.equal(BoundaryRefinementLoss(**boundary_settings, **knobs)(enc, dec, labels=labels), boundary)
        assert torch.equal(InteriorDenoisingLoss(**interior_settings, **knobs)(enc, dec, labels=labels), interior)
        torch.autograd.backward(boundary)
        torch.autograd.backward(interior)
        assert_golden_gradients(enc, dec, case)
