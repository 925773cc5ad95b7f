"""Semantic-aware slot attention and correlation fusion against their references, gradients, types, errors."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from ssync_loss.attention import CorrelationFusion, SemanticAwareSlotAttention, SemanticSlots
from ssync_loss.functional import valid_instances
from ssync_loss.methods.smtc.reference import (
    reference_correlation_fusion,
    reference_semantic_aware_slot_attention,
    reference_slot_attention,
)
from steps import assert_same, saved_elements

NAN = float("nan")
DIM, SEMANTICS, INSTANCES = 6, 3, 2


def attention(*, seed: int = 0, dtype: torch.dtype = torch.float64, **given: Any) -> SemanticAwareSlotAttention:
    torch.manual_seed(seed)
    given = {"num_slots": SEMANTICS, "num_instances": INSTANCES, "hidden": 5, **given}
    return SemanticAwareSlotAttention(DIM, **given).to(dtype)


def sample(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, sizes: tuple[int, int] = (SEMANTICS, INSTANCES)
) -> tuple[Tensor, Tensor]:
    """Return features and noise for the shape (B, T, H, W)."""
    clips, frames, height, width = shape or (2, 2, 2, 3)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(clips, frames, DIM, height, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(clips, frames, *sizes, DIM, generator=generator, dtype=torch.float64)
    return features.to(dtype), noise.to(dtype)


def slowly(module: SemanticAwareSlotAttention, features: Tensor, noise: Tensor, iters: int) -> SemanticSlots:
    settings: dict[str, Any] = {"iters": iters, "gate": module.gate, "gate_thr": module.gate_thr}
    weights = module.state_dict()
    return SemanticSlots(*reference_semantic_aware_slot_attention(features, noise, weights, **settings))


# --- values ---


@settings(max_examples=25)
@given(
    shape=st.tuples(*(st.integers(1, 2) for _ in range(3)), st.integers(1, 3)),
    seed=st.integers(0, 2**31),
    iters=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 2)),
)
def test_both_stages_equal_the_reference(shape: tuple[int, ...], seed: int, iters: int, sizes: tuple[int, int]) -> None:
    module = attention(seed=seed, num_slots=sizes[0], num_instances=sizes[1])
    features, noise = sample(*shape, seed=seed, sizes=sizes)
    assert_same(module(features, noise, iters=iters), slowly(module, features, noise, iters), 1e-9)


@pytest.mark.parametrize(("gate", "gate_thr"), [("prob", 0.3), ("logit", -0.1), ("logit", 0.0)])
def test_hard_gates_equal_the_reference(gate: Any, gate_thr: float) -> None:
    module, (features, noise) = attention(gate=gate, gate_thr=gate_thr), sample(1, 1, 3, 4)
    actual = module(features, noise)
    # every gate is open somewhere, so only the 1e-8 of hard gates differs
    logits = actual.logits.softmax(2) if gate == "prob" else actual.logits
    open_ = logits > gate_thr
    assert open_.flatten(3).any(3).all()
    assert not open_.all()
    assert_same(actual, slowly(module, features, noise, 3), 1e-6)


def test_a_closed_hard_gate_leaves_only_the_mlp() -> None:
    module, (features, noise) = attention(gate="prob", gate_thr=1.0), sample()
    found = module(features, noise, iters=1)
    start = module.mu.unsqueeze(1) + module.log_sigma.exp().unsqueeze(1) * noise
    torch.testing.assert_close(found.instances, start + module.mlp(module.norm_mlp(start)))


def test_every_frame_draws_new_noise() -> None:
    module, (features, _) = attention(), sample()
    same_frames = features[:, :1].expand(features.shape)
    torch.manual_seed(3)
    found = module(same_frames)
    assert torch.equal(found.slots[:, 0], found.slots[:, 1])
    assert not torch.isclose(found.instances[:, 0], found.instances[:, 1]).all()
    torch.manual_seed(3)
    assert_same(module(same_frames), found, 0.0)


def test_masks_sum_to_one_and_scores_are_cosines() -> None:
    module, (features, noise) = attention(), sample()
    found = module(features, noise)
    assert found.masks().shape == (2, 2, SEMANTICS, INSTANCES, 2, 3)
    torch.testing.assert_close(found.masks().sum((2, 3)), torch.ones(2, 2, 2, 3, dtype=torch.float64))
    torch.testing.assert_close(found.masks().sum(3), found.logits.softmax(2))
    expected = torch.cosine_similarity(found.slots.unsqueeze(3), found.instances, dim=-1)
    torch.testing.assert_close(found.scores(), expected)
    alike = found.scores() > 0.5
    valid = valid_instances(found.logits, found.slots, found.instances, area_thr=0.0, p_thr=0.0)
    assert torch.equal(valid, alike)


def test_initial_parameters() -> None:
    module = SemanticAwareSlotAttention(384)
    assert module.mu.shape == (16, 384)
    assert 0.02 < module.log_sigma.abs().max() < 0.0304
    assert 0.9 < module.mu.std() < 1.1
    assert module.mlp[0].out_features == 384
    assert SemanticAwareSlotAttention(8).mlp[0].out_features == 128


# --- gradients ---


def test_only_the_last_step_and_the_initial_slots_get_gradients() -> None:
    module, (features, noise) = attention(), sample()
    # the last step starts from the current slots and passes its gradient to the initial slots
    frames = module.norm_features(features.flatten(0, 1).flatten(2).mT)
    keys, values = module.to_k(frames), module.to_v(frames)
    start = module.mu.expand(len(frames), 1, -1, -1)
    with torch.no_grad():
        first, _ = module._step(start, keys, values, None)
        second, _ = module._step(first, keys, values, None)
    expected, _ = module._step(second - start.detach() + start, keys, values, None)
    weights = [one for name, one in module.named_parameters() if name != "log_sigma"]
    found = module(features, noise).slots
    torch.testing.assert_close(found.flatten(0, 1), expected.squeeze(1))
    actual = torch.autograd.grad(found.square().sum(), weights)
    for one, other in zip(actual, torch.autograd.grad(expected.square().sum(), weights), strict=True):
        torch.testing.assert_close(one, other)


def test_a_single_step_has_the_full_gradient() -> None:
    module, (features, noise) = attention(iters=1), sample(1, 1, 2, 3)
    found = module(features, noise).slots.square().sum()
    (actual,) = torch.autograd.grad(found, module.mu)
    # the reference has the full gradient
    mu = module.mu.detach().requires_grad_()
    slots, _ = reference_slot_attention(mu, features[0, 0].flatten(1).T, module.state_dict(), iters=1)
    torch.testing.assert_close(actual, torch.autograd.grad(slots.square().sum(), mu)[0])


def test_earlier_steps_save_no_memory() -> None:
    module, (features, noise) = attention(), sample()
    saved = [sum(saved_elements(module, features, noise, iters=iters)) for iters in (1, 2, 7)]
    assert saved[0] > 0
    assert saved[0] == saved[1] == saved[2]


@pytest.mark.parametrize(
    ("gate", "reparam", "unreached"),
    [
        ("soft", True, []),
        ("soft", False, ["log_sigma"]),
        ("prob", False, ["mu", "log_sigma"]),
        ("logit", False, ["mu", "log_sigma"]),
    ],
)
def test_parameters_without_a_gradient(gate: Any, reparam: bool, unreached: list[str]) -> None:
    module, (features, noise) = attention(reparam=reparam, gate=gate, gate_thr=0.2), sample()
    module(features.requires_grad_(), noise).instances.square().sum().backward()
    weights = [("features", features), *module.named_parameters()]
    assert [name for name, one in weights if one.grad is None or not one.grad.any()] == unreached


@pytest.mark.parametrize("wanted", ["slots", "logits", "instances", "instance_logits"])
def test_gradcheck_of_one_step(wanted: str) -> None:
    module, (features, noise) = attention(iters=1), sample(1, 1, 1, 2)
    module.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda one: getattr(module(one, noise), wanted), (features.requires_grad_(),))


def test_a_gate_that_underflows_is_finite() -> None:
    # each patch has one semantic slot, and there are more semantic slots than patches
    module, features = attention(num_slots=9, dtype=torch.float32), sample(dtype=torch.float32)[0].requires_grad_()
    with torch.no_grad():
        module.to_q.weight.mul_(1e4)
    found = module(features)
    assert (found.logits.softmax(2).flatten(3).amax(3) == 0).any()
    sum(one.sum() for one in found).backward()
    assert all(one.isfinite().all() for one in found)
    assert all(one.grad is not None and one.grad.isfinite().all() for one in (features, *module.parameters()))


# --- types, graphs, copies ---


def test_autocast_changes_nothing() -> None:
    module, (features, noise) = attention(dtype=torch.float32), sample(dtype=torch.float32)
    weights = list(module.parameters())
    expected = module(features, noise)
    wanted = torch.autograd.grad(expected.instances.square().sum(), weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = module(features, noise)
    given = torch.autograd.grad(actual.instances.square().sum(), weights)
    assert_same(actual, expected, 0.0)
    for one, other in zip(given, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("half_weights", [True, False])
def test_half_precision_gives_float32(dtype: torch.dtype, half_weights: bool) -> None:
    module, (features, noise) = attention(dtype=torch.float32), sample(dtype=torch.float32)
    expected = module(features, noise)
    found = (module.to(dtype) if half_weights else module)(features.to(dtype), noise.to(dtype))
    assert {one.dtype for one in found} == {torch.float32}
    assert_same(found, expected, 0.1)
    found.instances.sum().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in module.parameters())


def test_an_empty_batch_has_empty_results() -> None:
    found = attention()(sample(0, 2, 2, 3)[0])
    assert [tuple(one.shape) for one in found] == [(0, 2, 3, 6), (0, 2, 3, 2, 3), (0, 2, 3, 2, 6), (0, 2, 3, 2, 2, 3)]


def test_nan_stays_in_its_frame() -> None:
    module, (features, noise) = attention(), sample()
    clean = module(features, noise)
    features[0, 1, 0, 0, 0] = NAN
    found = module(features, noise)
    assert all(one[0, 1].isnan().any() for one in found)
    assert_same(SemanticSlots(*(one[1] for one in found)), SemanticSlots(*(one[1] for one in clean)), 0.0)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("gate", ["soft", "logit"])
def test_a_step_compiles_to_one_graph(gate: Any) -> None:
    module, (features, noise) = attention(gate=gate), sample()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    found = compiled(features, noise)
    weights = list(module.parameters())
    actual = torch.autograd.grad(found.instances.square().sum(), weights)
    assert counter.frame_count == 1
    expected = module(features, noise)
    assert_same(found, expected, 1e-9)
    for one, other in zip(actual, torch.autograd.grad(expected.instances.square().sum(), weights), strict=True):
        torch.testing.assert_close(one, other)
    assert compiled(features).instances.shape == found.instances.shape


def test_fake_tensors() -> None:
    with FakeTensorMode():
        module = SemanticAwareSlotAttention(6, num_slots=3, num_instances=2)
        found = module(torch.randn(2, 2, 6, 2, 3))
        found.masks().sum().backward()
        assert module.mu.grad is not None


def test_copies_are_equal_and_settings_are_shown() -> None:
    module, (features, noise) = attention(gate="prob", gate_thr=0.2, reparam=False, iters=2), sample()
    shown = "dim=6, num_slots=3, num_instances=2, iters=2, gate='prob', gate_thr=0.2, reparam=False"
    assert shown in repr(module)
    fresh = attention(seed=1, gate="prob", gate_thr=0.2, reparam=False, iters=2)
    fresh.load_state_dict(module.state_dict())
    for twin in (fresh, pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert_same(twin(features, noise), module(features, noise), 0.0)


# --- errors ---


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"dim": 0}, ValueError, r"`dim` must be at least 1; got 0"),
        ({"dim": "4"}, TypeError, r"`dim` must be an integer; got str"),
        ({"num_slots": 0}, ValueError, r"`num_slots` must be at least 1; got 0"),
        ({"iters": 0}, ValueError, r"`iters` must be at least 1; got 0"),
        ({"hidden": 0}, ValueError, r"`hidden` must be at least 1; got 0"),
        ({"gate_thr": -0.1}, ValueError, r"`gate_thr` must be finite and at least 0.0; got -0.1"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SemanticAwareSlotAttention(**{"dim": 4, **wrong})


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("features", torch.zeros(2, 2, 5, 2, 3), ValueError, r"`features` must have shape \(B, T, D=6, H, W\); got"),
        ("features", torch.zeros(2, 2, 6, 0, 3), ValueError, r"`features` must have H >= 1; got H=0"),
        ("noise", torch.zeros(2, 2, 3, 3, 6), ValueError, r"`noise` must have shape \(B=2, T=2, S=3, P=2, D=6\); got"),
        ("noise", torch.zeros(2, 2, 3, 2, 6).long(), TypeError, r"`noise` must be floating point; got torch.int64"),
        ("iters", 0, ValueError, r"`iters` must be at least 1; got 0"),
    ],
)
def test_a_wrong_tensor_is_named(name: str, value: Any, error: type[Exception], message: str) -> None:
    features, noise = sample()
    with pytest.raises(error, match=message):
        attention()(**{"features": features, "noise": noise, name: value})


# --- correlation fusion ---


def fusion(grid: Any = (2, 3), *, dtype: torch.dtype = torch.float64) -> CorrelationFusion:
    torch.manual_seed(0)
    return CorrelationFusion(4, grid).to(dtype)


def keys(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return features for the shape (B, T, H, W)."""
    clips, frames, height, width = shape or (2, 3, 2, 3)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(clips, frames, 4, height, width, generator=generator, dtype=torch.float64).to(dtype)


@settings(max_examples=20)
@given(shape=st.tuples(st.integers(1, 2), st.integers(1, 3)), seed=st.integers(0, 2**31))
def test_fusion_equals_its_quadratic_definition(shape: tuple[int, ...], seed: int) -> None:
    module, given_ = fusion(), keys(*shape, 2, 3, seed=seed)
    weights = (module.project.weight, module.project.bias)
    one, other = given_.requires_grad_(), given_.detach().clone().requires_grad_()
    actual, expected = module(one), reference_correlation_fusion(other, *weights)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    slopes = torch.autograd.grad(actual.square().sum(), (one, *weights))
    for slope, wanted in zip(slopes, torch.autograd.grad(expected.square().sum(), (other, *weights)), strict=True):
        torch.testing.assert_close(slope, wanted, rtol=1e-10, atol=1e-10)


def test_fusion_does_not_form_the_correlation_matrix() -> None:
    module, frames = fusion((32, 32), dtype=torch.float32), keys(1, 2, 32, 32, dtype=torch.float32)
    assert 0 < max(saved_elements(module, frames.requires_grad_())) <= 2 * 4 * 32**2


def test_another_grid_is_resized_to_the_grid_of_training() -> None:
    module = fusion((2, 3))
    coarse = keys(1, 2, 2, 3)
    fine = coarse.repeat_interleave(2, 3).repeat_interleave(2, 4)
    # bilinear downsampling by two averages four equal cells
    expected = module(coarse).repeat_interleave(2, 3).repeat_interleave(2, 4)
    torch.testing.assert_close(module(fine), expected)


def test_a_number_of_cells_means_a_square_grid() -> None:
    assert fusion(9).grid == (3, 3)
    assert repr(fusion(9)).startswith("CorrelationFusion(\n  dim=4, n_ref=(3, 3)")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fusion_computes_in_float32_and_keeps_the_type(dtype: torch.dtype) -> None:
    module, frames = fusion(dtype=torch.float32), keys(dtype=dtype)
    expected = module(frames.float()).to(dtype)
    assert torch.equal(module(frames), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(frames), expected)
    assert module.to(dtype)(frames).dtype == dtype


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("grid", [(2, 3), (3, 2)])
def test_fusion_compiles_to_one_graph(grid: tuple[int, int]) -> None:
    module, frames = fusion(grid), keys().requires_grad_()
    counter = CompileCounterWithBackend("aot_eager")
    fused = torch.compile(module, fullgraph=True, backend=counter)(frames)
    fused.sum().backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(fused, module(frames))
    with FakeTensorMode():
        assert CorrelationFusion(4, grid)(torch.randn(2, 3, 4, 2, 3)).shape == fused.shape


def test_fusion_of_an_empty_batch_is_empty() -> None:
    assert fusion()(keys(0, 2, 2, 3)).shape == (0, 2, 4, 2, 3)


@pytest.mark.parametrize(
    ("given_", "error", "message"),
    [
        ((0, 4), ValueError, r"`dim` must be at least 1; got 0"),
        ((4, 5), ValueError, r"`n_ref` must be \(height, width\) or the number of cells of a square; got 5"),
        ((4, 0), ValueError, r"`n_ref` must be at least 1; got 0"),
        ((4, (2, 0)), ValueError, r"`n_ref` must be at least 1; got 0"),
        ((4, (2, 2, 2)), ValueError, r"`n_ref` must be \(height, width\) or a number of cells; got \(2, 2, 2\)"),
        ((4, "4"), TypeError, r"`n_ref` must be an integer; got str"),
    ],
)
def test_wrong_settings_of_fusion_are_named(given_: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CorrelationFusion(*given_)


@pytest.mark.parametrize(
    ("given_", "error", "message"),
    [
        (torch.zeros(2, 3, 5, 2, 3), ValueError, r"`keys` must have shape \(B, T, C=4, H, W\); got"),
        (torch.zeros(2, 0, 4, 2, 3), ValueError, r"`keys` must have T >= 1; got T=0"),
        (torch.zeros(2, 3, 4, 2, 3, device="meta"), ValueError, r"`keys` must be on the device of `weight` \(cpu\)"),
    ],
)
def test_wrong_keys_are_named(given_: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fusion()(given_)
