"""The modules: settings, terms, schedule, warnings, gradients, given labels."""

import inspect
import linecache
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sample_maps import leaf, sample_maps
from ssync_loss import BoundaryRefinementLoss, InteriorDenoisingLoss, PseudoLabels, SSyncLoss, SSyncTerms
from ssync_loss.distributed import global_mean
from ssync_loss.functional import boundary_refinement_loss, interior_denoising_loss, pseudo_labels
from ssync_loss.ssync import functions
from ssync_loss.testing import assert_close_loss, assert_same_labels

NAN, INF = float("nan"), float("inf")


def gradients(loss: Tensor, *maps: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(loss, maps, allow_unused=True, retain_graph=True)


# --- settings ---


def test_the_signature_is_as_documented() -> None:
    expected = {
        "merge_threshold": 0.6,
        "boundary_weight": 1.0,
        "interior_weight": 1.0,
        "criterion": "mse",
        "label_smoothing": 0.0,
        "temperature": 1.0,
        "min_different": 1,
        "min_same": 1,
        "max_different": 0,
        "kind": "logits",
        "grid": None,
        "axes": None,
        "start_step": 0,
        "ramp_steps": 0,
        "backend": "auto",
    }
    parameters = inspect.signature(SSyncLoss).parameters
    assert {name: one.default for name, one in parameters.items()} == expected
    assert list(parameters) == list(expected)
    assert all(one.kind is inspect.Parameter.KEYWORD_ONLY for one in parameters.values())
    criterion = SSyncLoss()
    assert {name: getattr(criterion, name) for name in expected} == expected


@pytest.mark.parametrize("method", [SSyncLoss.forward, SSyncLoss.terms])
def test_only_maps_are_positional(method: Any) -> None:
    parameters = list(inspect.signature(method).parameters.values())
    names = ["self", "enc_logits", "dec_logits", "step", "valid", "slot_mask", "num_frames"]
    assert [one.name for one in parameters] == names
    assert all(one.kind is inspect.Parameter.KEYWORD_ONLY and one.default is None for one in parameters[3:])
    assert all(one.default is inspect.Parameter.empty for one in parameters[:3])


@pytest.mark.parametrize(("name", "threshold"), [("movi_c", 0.7), ("movi_e", 0.65), ("ytvis", 0.6), ("coco", 0.9)])
def test_presets_have_the_published_thresholds(name: str, threshold: float) -> None:
    criterion = SSyncLoss.from_preset(name)
    assert isinstance(criterion, SSyncLoss)
    assert criterion.merge_threshold == threshold
    assert repr(criterion) == f"SSyncLoss(merge_threshold={threshold})"


def test_settings_override_a_preset() -> None:
    criterion = SSyncLoss.from_preset("coco", merge_threshold=None, start_step=30, ramp_steps=5)
    assert (criterion.merge_threshold, criterion.start_step, criterion.ramp_steps) == (None, 30, 5)


def test_a_preset_of_a_subclass_builds_the_subclass() -> None:
    class MyLoss(SSyncLoss):
        pass

    assert type(MyLoss.from_preset("ytvis")) is MyLoss


# --- terms ---


def test_types_and_shapes_of_terms() -> None:
    terms = SSyncLoss().terms(*sample_maps(dtype=torch.bfloat16))
    assert SSyncTerms._fields == ("total", "boundary", "interior", "num_boundary", "num_interior", "labels")
    assert PseudoLabels._fields == ("enc_labels", "dec_labels", "boundary", "interior", "representative")
    assert [one.dtype for one in terms[:5]] == [torch.float32] * 3 + [torch.int64] * 2
    assert [one.shape for one in terms[:5]] == [()] * 5
    assert [one.dtype for one in terms.labels] == [torch.int64] * 2 + [torch.bool] * 2 + [torch.int64]
    assert [one.shape for one in terms.labels] == [(2, 2, 5, 12)] * 4 + [(2, 4)]
    assert not any(one.requires_grad for one in terms.labels)
    assert all(isinstance(one, Tensor) for one in tree_leaves(terms))


def test_terms_hold_counts_and_merged_labels() -> None:
    enc, dec = sample_maps()
    # the new slot is active on the same patches as the first, but wins none
    enc = torch.cat([enc, enc[:, :, :1] - 0.5], 2)
    dec = torch.cat([dec, dec[:, :, :1] + 9.0], 2)
    terms = SSyncLoss().terms(enc, dec)
    assert torch.equal(terms.num_boundary, terms.labels.boundary.sum())
    assert torch.equal(terms.num_interior, terms.labels.interior.sum())
    assert terms.labels.representative.tolist() == [[0, 1, 2, 3, 0]] * 2
    # slot 4 wins every patch of the decoder map, and its representative is slot 0
    assert not terms.labels.dec_labels.any()
    assert_same_labels(terms.labels, pseudo_labels(enc, dec))


def test_weights_and_ramp_apply_only_to_the_total() -> None:
    maps = sample_maps()
    plain = SSyncLoss().terms(*maps)
    assert plain.boundary > 0
    assert plain.interior > 0
    assert torch.equal(plain.total, plain.boundary + plain.interior)
    criterion = SSyncLoss(boundary_weight=3.0, interior_weight=0.25, start_step=10, ramp_steps=4)
    for step, ramp in ((11, 0.25), (13, 0.75), (14, 1.0), (1000, 1.0)):
        terms = criterion.terms(*maps, step=step)
        assert torch.equal(terms.boundary, plain.boundary)
        assert torch.equal(terms.interior, plain.interior)
        assert_close_loss(terms.total, ramp * (3.0 * plain.boundary + 0.25 * plain.interior))
        assert torch.equal(terms.total, criterion(*maps, step=step))


def test_a_weight_of_zero_switches_a_term_off() -> None:
    enc, dec = sample_maps()
    terms = SSyncLoss().terms(enc, dec)
    assert torch.equal(SSyncLoss(interior_weight=0.0)(enc, dec), terms.boundary)
    assert torch.equal(SSyncLoss(boundary_weight=0.0)(enc, dec), terms.interior)
    grad_enc, grad_dec = gradients(SSyncLoss(boundary_weight=0.0)(enc, dec), enc, dec)
    assert grad_enc is not None
    assert grad_enc.any()
    assert grad_dec is None or not grad_dec.any()
    assert SSyncLoss(boundary_weight=0.0, interior_weight=0.0)(enc, dec) == 0


def test_no_gradient_crosses_between_the_maps() -> None:
    enc, dec = sample_maps()
    terms = SSyncLoss().terms(enc, dec)
    grad_enc, grad_dec = gradients(terms.boundary, enc, dec)
    assert grad_enc is None
    assert grad_dec is not None
    assert torch.equal(grad_dec.abs().sum(2) > 0, terms.labels.boundary)
    grad_enc, grad_dec = gradients(terms.interior, enc, dec)
    assert grad_dec is None
    assert grad_enc is not None
    assert torch.equal(grad_enc.abs().sum(2) > 0, terms.labels.interior)


@pytest.mark.parametrize(("module", "student"), [(BoundaryRefinementLoss, 1), (InteriorDenoisingLoss, 0)])
def test_a_single_term_warns_only_about_its_student(module: Any, student: int) -> None:
    maps = sample_maps()
    teacher_detached = [one if i == student else one.detach() for i, one in enumerate(maps)]
    student_detached = [one.detach() if i == student else one for i, one in enumerate(maps)]
    criterion = module()
    criterion(*teacher_detached)
    with pytest.warns(UserWarning, match=("`enc_logits`", "`dec_logits`")[student]):
        criterion(*student_detached)
    criterion(*student_detached)


# --- schedule ---


def test_the_ramp_is_linear_from_the_start_to_its_end() -> None:
    maps = sample_maps()
    full = SSyncLoss()(*maps)
    criterion = SSyncLoss(start_step=30, ramp_steps=20)
    table = {0: 0.0, 29: 0.0, 30: 0.0, 31: 0.05, 35: 0.25, 40: 0.5, 49: 0.95, 50: 1.0, 51: 1.0, 10**12: 1.0}
    for step, ramp in table.items():
        assert_close_loss(criterion(*maps, step=step), ramp * full)
    assert torch.equal(criterion(*maps, step=50), full)
    # without a ramp the loss starts at once, and without a schedule any step is valid
    sudden = SSyncLoss(start_step=30)
    assert sudden(*maps, step=29) == 0
    assert torch.equal(sudden(*maps, step=30), full)
    assert torch.equal(SSyncLoss()(*maps, step=7), full)


@pytest.mark.parametrize("method", ["forward", "terms"])
@pytest.mark.parametrize("dirt", [0.0, NAN, -INF])
def test_the_total_is_zero_with_a_graph_before_the_start(method: str, dirt: float) -> None:
    enc, dec = sample_maps(requires_grad=False)
    enc[0], dec[1] = dirt, dirt
    enc.requires_grad_()
    dec.requires_grad_()
    result = getattr(SSyncLoss(start_step=1), method)(enc, dec, step=0)
    total = result if method == "forward" else result.total
    assert total.item() == 0.0
    assert total.grad_fn is not None
    # backward works together with a host's loss
    (total + 0.0 * torch.nan_to_num(enc).sum()).backward()
    for one in (enc, dec):
        assert one.grad is not None
        assert torch.equal(one.grad, torch.zeros_like(one))


def test_shapes_are_checked_before_the_start() -> None:
    enc, dec = sample_maps()
    with pytest.raises(ValueError, match=r"`dec_logits` must have shape .*T=2"):
        SSyncLoss(start_step=9)(enc, dec[:, :1], step=0)


def test_terms_are_computed_before_the_start() -> None:
    maps = sample_maps()
    before, after = SSyncLoss(start_step=1).terms(*maps, step=0), SSyncLoss().terms(*maps)
    assert before.total == 0
    for field in ("boundary", "interior", "num_boundary", "num_interior"):
        assert torch.equal(getattr(before, field), getattr(after, field))
    assert_same_labels(before.labels, after.labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_type_of_the_loss_does_not_change_at_the_start(dtype: torch.dtype) -> None:
    maps = sample_maps(dtype=dtype)
    criterion = SSyncLoss(start_step=1, ramp_steps=2)
    assert len({criterion(*maps, step=step).dtype for step in range(4)}) == 1


# --- the warning about maps without gradients ---


def caught(criterion: SSyncLoss, enc: Tensor, dec: Tensor, **settings: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        criterion(enc, dec, **settings)
    return [str(one.message) for one in record]


def test_a_map_without_gradient_is_named() -> None:
    enc, dec = sample_maps()
    assert caught(SSyncLoss(), enc, dec) == []
    (message,) = caught(SSyncLoss(), enc.detach(), dec)
    assert message.startswith("`enc_logits` (taught by the interior term) carries no gradient")
    assert "dec_logits" not in message
    (message,) = caught(SSyncLoss(), enc, dec.detach())
    assert message.startswith("`dec_logits` (taught by the boundary term) carries no gradient")
    assert "enc_logits" not in message
    (message,) = caught(SSyncLoss(), enc.detach(), dec.detach())
    assert "`enc_logits`" in message
    assert "`dec_logits`" in message


def test_the_warning_comes_once_per_module() -> None:
    enc, dec = sample_maps()
    criterion, other = SSyncLoss(), SSyncLoss()
    assert len(caught(criterion, enc.detach(), dec)) == 1
    assert caught(criterion, enc.detach(), dec) == []
    assert caught(criterion, enc, dec.detach()) == []
    assert len(caught(other, enc.detach(), dec)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion.terms(enc.detach(), dec)


def test_a_term_without_weight_needs_no_gradient() -> None:
    enc, dec = sample_maps()
    assert caught(SSyncLoss(interior_weight=0.0), enc.detach(), dec) == []
    assert caught(SSyncLoss(boundary_weight=0.0), enc, dec.detach()) == []
    assert len(caught(SSyncLoss(boundary_weight=0.0), enc.detach(), dec)) == 1


def test_the_warning_needs_training() -> None:
    enc, dec = sample_maps(requires_grad=False)
    criterion = SSyncLoss()
    assert caught(criterion.eval(), enc, dec) == []
    with torch.no_grad():
        assert caught(criterion.train(), enc, dec) == []
    with torch.inference_mode():
        assert caught(criterion, enc, dec) == []
    # the module has not warned yet
    assert len(caught(criterion, enc, dec)) == 1


def test_the_warning_comes_even_before_the_start() -> None:
    enc, dec = sample_maps()
    assert len(caught(SSyncLoss(start_step=100), enc.detach(), dec, step=0)) == 1


def test_the_warning_points_at_the_calling_line() -> None:
    enc, dec = sample_maps()
    enc = enc.detach()
    hooked = SSyncLoss()
    hooked.register_forward_pre_hook(lambda _module, _inputs: None)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        SSyncLoss()(enc, dec)  # plain
        SSyncLoss().terms(enc, dec)  # terms
        hooked(enc, dec)  # hooked
        global_mean(SSyncLoss(), enc, dec)  # global mean
    lines = [linecache.getline(one.filename, one.lineno).partition("#")[2].strip() for one in record]
    assert lines == ["plain", "terms", "hooked", "global mean"]


def test_the_other_map_gets_gradients() -> None:
    enc, dec = sample_maps()
    expected = gradients(SSyncLoss()(enc, dec), enc, dec)
    with pytest.warns(UserWarning, match="dec_logits"):
        loss = SSyncLoss()(enc, dec.detach())
    assert_close_loss(loss, SSyncLoss()(enc, dec))
    (grad,) = gradients(loss, enc)
    torch.testing.assert_close(grad, expected[0], rtol=0, atol=0)


# --- gradients ---


def test_gradients_of_summed_terms() -> None:
    enc, dec = sample_maps()
    expected = gradients(SSyncLoss(boundary_weight=2.0, interior_weight=0.5)(enc, dec), enc, dec)
    terms = SSyncLoss().terms(enc, dec)
    # the total already contains both terms
    actual = gradients(terms.total + terms.boundary - 0.5 * terms.interior, enc, dec)
    for one, other in zip(actual, expected, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("criterion", ["mse", "cross_entropy"])
def test_overwriting_maps_before_backward_changes_nothing(criterion: Any, backend: Any) -> None:
    enc, dec = sample_maps()
    loss = SSyncLoss(criterion=criterion, backend=backend)
    wanted = gradients(loss(enc, dec), enc, dec)
    copies = enc * 1.0, dec * 1.0
    value = loss(*copies)
    for one in copies:
        one.detach().mul_(2.0)
    for got, right in zip(gradients(value, enc, dec), wanted, strict=True):
        assert got is not None
        assert right is not None
        assert torch.equal(got, right)


def test_functional_gradients_equal_those_of_autograd() -> None:
    enc, dec = sample_maps()
    criterion = SSyncLoss()
    expected = gradients(criterion(enc, dec), enc, dec)
    actual = torch.func.grad(criterion, argnums=(0, 1))(enc.detach(), dec.detach())
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# --- modules of a single term ---

SINGLES: dict[str, tuple[Any, Any]] = {
    "boundary": (BoundaryRefinementLoss, boundary_refinement_loss),
    "interior": (InteriorDenoisingLoss, interior_denoising_loss),
}
REGION_KNOBS = {"boundary": {"min_different": 2, "min_same": 3}, "interior": {"max_different": 3}}
SHARED = {"merge_threshold": 0.4, "criterion": "cross_entropy", "label_smoothing": 0.1, "temperature": 0.7}


@pytest.mark.parametrize("term", list(SINGLES))
@pytest.mark.parametrize("settings", [{}, SHARED])
def test_a_module_of_a_single_term_equals_the_term(term: str, settings: dict[str, Any]) -> None:
    enc, dec = sample_maps()
    knobs: dict[str, Any] = {**settings, **(REGION_KNOBS[term] if settings else {})}
    masks: dict[str, Any] = {
        "valid": torch.rand(2, 2, 5, 12) > 0.2,
        "slot_mask": torch.tensor([[True] * 4, [True, True, False, True]]),
    }
    expected = getattr(SSyncLoss(**knobs).terms(enc, dec, **masks), term)
    assert expected > 0
    module, function = SINGLES[term]
    for actual in (module(**knobs)(enc, dec, **masks), function(enc, dec, **knobs, **masks)):
        assert torch.equal(actual, expected)
        for one, other in zip(gradients(actual, enc, dec), gradients(expected, enc, dec), strict=True):
            assert (one is None) == (other is None)
            assert one is None or other is None or torch.equal(one, other)


def test_shared_labels_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    enc, dec = sample_maps()
    total = SSyncLoss().terms(enc, dec).total
    apart = BoundaryRefinementLoss()(enc, dec) + InteriorDenoisingLoss()(enc, dec)
    labels = pseudo_labels(enc, dec)
    monkeypatch.delattr(functions, "labels_of")
    shared = BoundaryRefinementLoss()(enc, dec, labels=labels) + InteriorDenoisingLoss()(enc, dec, labels=labels)
    assert torch.equal(shared, total)
    assert torch.equal(apart, total)


def test_labels_may_be_overwritten() -> None:
    enc, dec = sample_maps()
    expected = gradients(SSyncLoss()(enc, dec), enc, dec)
    terms = SSyncLoss().terms(enc, dec)
    for one in terms.labels:
        one.zero_()
    for got, wanted in zip(gradients(terms.total, enc, dec), expected, strict=True):
        assert got is not None
        assert wanted is not None
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize(
    "knobs", [{}, {"merge_threshold": None}, {"criterion": "cross_entropy"}, {"boundary_weight": 0.5, "ramp_steps": 9}]
)
@pytest.mark.parametrize("masked", [False, True])
def test_results_are_not_inference_tensors(masked: bool, knobs: dict[str, Any], tracked: bool) -> None:
    enc, dec = sample_maps()
    masks: dict[str, Any] = {}
    if masked:
        B, T, S, H, W = enc.shape
        masks = {"valid": torch.rand(B, T, H, W) > 0.1, "slot_mask": torch.arange(S).expand(B, S) < S - 1}
    with torch.set_grad_enabled(tracked):
        terms = SSyncLoss(**knobs).terms(enc, dec, step=5, **masks)
    made = tree_leaves(terms)
    assert len(made) == 10
    if tracked:
        for _ in range(2):
            made += torch.autograd.grad(terms.total, (enc, dec), retain_graph=True)
    assert not [one for one in made if one.is_inference()]


def test_given_labels_override_the_maps() -> None:
    enc, dec = sample_maps()
    labels = pseudo_labels(enc, dec)
    # both regions are one patch, and its label is slot 2
    here = torch.zeros_like(labels.boundary)
    here[0, 1, 2, 3] = True
    two = torch.full_like(labels.enc_labels, 2)
    labels = labels._replace(enc_labels=two, dec_labels=two, boundary=here, interior=here)
    aim = torch.tensor([0.0, 0.0, 1.0, 0.0])
    expected = (dec[0, 1, :, 2, 3].softmax(0) - aim).square().mean()
    assert_close_loss(BoundaryRefinementLoss(merge_threshold=0.0)(enc, dec, labels=labels), expected)
    expected = (enc[0, 1, :, 2, 3].softmax(0) - aim).square().mean()
    assert_close_loss(InteriorDenoisingLoss(max_different=9)(enc, dec, labels=labels), expected)


@pytest.mark.parametrize("term", list(SINGLES))
def test_labels_of_another_type_are_refused(term: str) -> None:
    enc, dec = sample_maps()
    with pytest.raises(TypeError, match="`labels` must be PseudoLabels; got Tensor"):
        SINGLES[term][0]()(enc, dec, labels=torch.zeros(2, 2, 5, 12).long())


# --- other transforms and modes ---


@pytest.mark.parametrize("weighed", ["enc", "dec"])
def test_the_value_of_a_functional_gradient_is_differentiable(weighed: str) -> None:
    enc, dec = (one.detach() for one in sample_maps())
    criterion = SSyncLoss(max_different=10).eval()

    def loss(maps: Tensor, weight: Tensor) -> Tensor:
        return criterion(maps * weight, dec) if weighed == "enc" else criterion(maps, dec * weight)

    weight, plain = leaf(torch.ones(())), leaf(torch.ones(()))
    _, value = torch.func.grad_and_value(loss)(enc, weight)
    value.backward()
    loss(enc, plain).backward()
    assert plain.grad is not None
    assert weight.grad is not None
    assert plain.grad != 0
    assert_close_loss(weight.grad, plain.grad)


def test_a_teacher_may_be_an_inference_tensor() -> None:
    with torch.inference_mode():
        enc = torch.randn(2, 2, 3, 4, 4)
    dec = leaf(torch.randn(2, 2, 3, 4, 4))
    SSyncLoss(interior_weight=0.0)(enc, dec).backward()
    assert dec.grad is not None
