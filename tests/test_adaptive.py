"""The adaptive loss against loops and values computed by hand; its steps, state, compilers and two processes."""

import copy
import pickle
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import two_adaptive
from contract import INF, NAN, Case
from ranks import run_ranks
from refusals import refuses
from sample_maps import sample_maps
from ssync_loss import AdaptiveSSyncLoss, SSyncLoss
from ssync_loss.ssync.adaptive import LEVELS
from ssync_loss.ssync.engines.triton._limits import INSTALLED
from ssync_loss.ssync.reference_adaptive import ReferenceAdaptiveState, reference_adaptive_step
from ssync_loss.testing import SSyncCase, decidable_clips, map_pairs, ssync_cases, thresholds
from test_ssync_contract import SSyncContract

pytestmark = pytest.mark.filterwarnings("ignore:.*looks like probabilities", "ignore:.*`slot_mask` leaves")

# debiasing no longer matters after this many measurements
ASKED = 10_000


def adaptive(level: str = "full", *, criterion: dict[str, Any] | None = None, **given: Any) -> AdaptiveSSyncLoss:
    """Return a loss at a level, after many measurements."""
    loss = AdaptiveSSyncLoss(SSyncLoss(**(criterion or {})), **given)
    signs = {"full": (-1.0, 1.0), "unmerged": (1.0, -1.0), "interior": (-1.0, -1.0)}
    loss.margins.copy_(0.5 * torch.tensor(signs[level]))
    loss.levels[LEVELS.index(level)] = ASKED
    return loss


def of_decoder(dec: Tensor) -> Tensor:
    """Return features with one channel per slot, which the decoder's partition explains completely."""
    return torch.nn.functional.one_hot(dec.detach().argmax(2), dec.shape[2]).movedim(-1, 2).float()


def maps_of(labels: list[list[int]], num_slots: int = 3) -> Tensor:
    """Return confident logits (B, 1, S, 1, N) for rows of labels."""
    chosen = torch.nn.functional.one_hot(torch.tensor(labels), num_slots).movedim(-1, 1)
    return (9.0 * chosen)[:, None, :, None].requires_grad_()


def step_of(loss: Any, enc: Tensor, dec: Tensor, *given: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    enc, dec = (one.detach().requires_grad_() for one in (enc, dec))
    value = loss(enc, dec, *given, **named)
    return value.detach(), *torch.autograd.grad(value, (enc, dec))


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


# --- against loops ---


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@given(
    cases=st.lists(ssync_cases(maps=map_pairs(batch=3, minus_inf=True)), min_size=1, max_size=4),
    kinds=st.lists(st.sampled_from(["random", "decoder", "constant", "broken"]), min_size=4, max_size=4),
    threshold=thresholds(tied=False),
    knobs=st.fixed_dictionaries(
        {
            "momentum": st.sampled_from((0.0, 0.5, 0.98)),
            "warmup": st.sampled_from((0, 1, 2)),
            "dead_zone": st.sampled_from((0.0, 0.0, 0.1)),
        }
    ),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_sequences_equal_loops(
    backend: Any, cases: list[SSyncCase], kinds: list[str], threshold: float | None, knobs: dict[str, Any], seed: int
) -> None:
    torch.manual_seed(seed)
    weights: dict[str, Any] = {"boundary_weight": 2.0, "interior_weight": 0.5}
    loss = AdaptiveSSyncLoss(SSyncLoss(merge_threshold=threshold, backend=backend, **weights), **knobs)
    state = ReferenceAdaptiveState()
    for case, kind in zip(cases, kinds, strict=False):
        masks: dict[str, Any] = {"valid": case.valid, "slot_mask": case.slot_mask}
        assume(decidable_clips(case.enc_logits, merge_threshold=threshold, dyadic=True, **masks).all())
        B, T, _, H, W = case.enc_logits.shape
        features = torch.randint(-4, 5, (B, T, 3, H, W)) / 2
        if kind == "decoder":
            features = of_decoder(case.dec_logits)
        elif kind == "constant":
            features[0] = 0.1
        elif kind == "broken":
            features[-1, 0, 0, 0, 0] = NAN
        maps = case.enc_logits, case.dec_logits
        fast, slow = ([one.clone().requires_grad_() for one in maps] for _ in range(2))
        expected, state, level = reference_adaptive_step(
            state, slow[0], slow[1], features, merge_threshold=threshold, **weights, **knobs, **masks
        )
        actual = loss(fast[0], fast[1], features, **masks)
        told = loss.describe()
        debias = 1 - knobs["momentum"] ** state.questions if state.questions else 1.0
        assert told["questions"] == state.questions
        assert told["margin"] == pytest.approx(state.margin / debias, abs=1e-5)
        assert told["merged_margin"] == pytest.approx(state.merged_margin / debias, abs=1e-5)
        # rounding may move a margin across the dead zone
        off = [abs(one / debias - knobs["dead_zone"]) for one in state[:2]]
        assume(all(one == 0 or one > 1e-5 for one in off))
        assert told["level"] == level
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
        actual.backward()
        expected.backward()
        for one, other in zip(fast, slow, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, equal_nan=True)


# --- levels ---


@pytest.mark.parametrize("is_tensor", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((name, dtype) for name in ("torch", "cpu", "reference") for dtype in (torch.float32, torch.float64)),
        pytest.param("triton", torch.float32, marks=pytest.mark.skipif(not INSTALLED, reason="there is no triton")),
    ],
)
def test_every_level_equals_an_ssync_loss(backend: Any, is_tensor: bool, dtype: torch.dtype) -> None:
    enc, dec = sample_maps(dtype=dtype)
    # the third slot equals the second, so they merge
    enc = torch.cat([enc[:, :, :2], enc[:, :, 1:2] - 0.1, enc[:, :, 3:]], 2)
    weights: dict[str, Any] = {"boundary_weight": 0.7, "interior_weight": 0.3}
    threshold: Any = 0.6
    if is_tensor:
        threshold, weights = torch.tensor(0.6, dtype=dtype), {name: torch.tensor(one) for name, one in weights.items()}
    knobs = {"merge_threshold": threshold, "backend": backend, **weights}
    wanted = {
        "full": knobs,
        "unmerged": knobs | {"merge_threshold": None},
        "interior": knobs | {"merge_threshold": None, "boundary_weight": 0.0},
    }
    found = {}
    for level, instead in wanted.items():
        loss = adaptive(level, criterion=knobs)
        actual, expected = step_of(loss, enc, dec, of_decoder(dec)), step_of(SSyncLoss(**instead), enc, dec)
        assert loss.describe()["level"] == level
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
        found[level] = actual[0].item()
    assert len(set(found.values())) == 3


def test_the_full_level_is_bitwise_the_criterion() -> None:
    enc, dec = sample_maps()
    assert_equal(step_of(adaptive(), enc, dec, of_decoder(dec)), step_of(SSyncLoss(), enc, dec))


def test_margins_are_debiased() -> None:
    # the encoder explains everything, the decoder 16/3 of 16; then they swap
    features = torch.tensor([0.0, 0.0, 4.0, 4.0]).view(1, 1, 1, 1, 4)
    right, wrong = maps_of([[0, 0, 1, 1]]), maps_of([[0, 0, 0, 1]])
    loss = AdaptiveSSyncLoss(SSyncLoss(merge_threshold=1.0), momentum=0.75, warmup=1)
    loss(right, wrong, features)
    assert loss.margins.tolist() == pytest.approx([2 / 3 / 4] * 2)
    assert loss.describe()["margin"] == pytest.approx(2 / 3)
    loss(wrong, right, features)
    # (3/4 * 1/4 - 1/4) * 2/3 / (1 - 9/16)
    assert loss.describe()["margin"] == loss.describe()["merged_margin"] == pytest.approx(-2 / 3 / 7)
    assert loss.describe()["level"] == "interior"
    assert loss.levels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("momentum", [0.0, 0.98, 1 - 1e-9])
def test_the_first_measurement_is_the_mean_for_any_momentum(momentum: float) -> None:
    features = torch.tensor([0.0, 0.0, 4.0, 4.0]).view(1, 1, 1, 1, 4)
    loss = AdaptiveSSyncLoss(SSyncLoss(merge_threshold=1.0), momentum=momentum, warmup=1)
    loss(maps_of([[0, 0, 1, 1]]), maps_of([[0, 0, 0, 1]]), features)
    assert loss.describe()["margin"] == pytest.approx(2 / 3)
    assert loss.describe()["level"] == "full"


def test_a_bad_merge_lowers_only_the_merged_margin() -> None:
    # there are three objects, and the encoder's logits of the first two overlap
    enc = torch.tensor([[9.0, 0, 9, 8, 0, 0], [8, 0, 8, 9, 0, 9], [0, 9, 0, 0, 9, 0]]).view(1, 1, 3, 1, 6)
    dec = maps_of([[0, 0, 0, 1, 1, 2]])
    features = torch.tensor([0.0, 8, 0, 4, 8, 4]).view(1, 1, 1, 1, 6)
    loss = AdaptiveSSyncLoss(SSyncLoss(merge_threshold=0.4), warmup=1)
    loss(enc.requires_grad_(), dec, features)
    told = loss.describe()
    # the total variance is 64, which the unmerged encoder explains
    merged = (4 * 2.0**2 + 2 * 4.0**2) / 64
    decoder = (3 * (4 - 8 / 3) ** 2 + 2 * 2.0**2) / 64
    assert told["margin"] == pytest.approx(1 - decoder)
    assert told["merged_margin"] == pytest.approx(merged - decoder)


def test_the_warm_up_is_exactly_zero_and_has_a_graph() -> None:
    enc, dec = sample_maps()
    loss = AdaptiveSSyncLoss(SSyncLoss(), warmup=3)
    values = []
    for _ in range(3):
        value, *gradients = step_of(loss, enc, dec, of_decoder(dec))
        values.append(value.item())
        assert [bool(one.any()) for one in gradients] == ([False] * 2 if len(values) < 3 else [True, False])
    # the third measurement decides its own step
    assert values[:2] == [0.0, 0.0] != values[2:]
    assert loss.levels.tolist() == [2, 1, 0, 0]


def test_a_margin_must_exceed_the_dead_zone() -> None:
    for margin, wanted in ((0.5, "interior"), (0.49, "full")):
        loss = adaptive(dead_zone=margin)
        loss.margins[0] = -1.0
        assert loss.describe()["level"] == wanted
    loss = adaptive("unmerged", dead_zone=0.49)
    assert loss.describe()["level"] == "unmerged"
    loss.dead_zone = 0.5
    assert loss.describe()["level"] == "interior"


def test_a_single_slot_has_no_loss() -> None:
    enc, dec = (one[:, :, :1].detach().requires_grad_() for one in sample_maps())
    loss = AdaptiveSSyncLoss(SSyncLoss(), warmup=1)
    value = loss(enc, dec, torch.randn(2, 2, 5, 5, 12))
    value.backward()
    assert value == 0
    assert loss.describe()["level"] == "interior"
    assert loss.describe()["margin"] == loss.describe()["merged_margin"] == 0


# --- which clips a measurement counts ---


def test_constant_features_and_invalid_clips_do_not_count() -> None:
    enc, dec = sample_maps(3)
    features, valid = torch.randn(3, 2, 5, 5, 12), torch.ones(3, 2, dtype=torch.bool)
    alone, together = AdaptiveSSyncLoss(SSyncLoss()), AdaptiveSSyncLoss(SSyncLoss())
    alone(enc[1:2], dec[1:2], features[1:2])
    features[0], valid[2] = 0.1, False
    together(enc, dec, features, valid=valid)
    torch.testing.assert_close(together.margins, alone.margins)
    assert alone.margins.any()
    # without any clip there is no measurement
    before = together.state_dict()
    before = {name: one.clone() for name, one in before.items()}
    together(enc, dec, features * 0)
    together(enc, dec, features, valid=valid & False)
    together(enc[:0], dec[:0], features[:0])
    assert all(torch.equal(one, before[name]) for name, one in together.state_dict().items())


@pytest.mark.parametrize("broken", ["features", "enc", "dec"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_nonfinite_margin_skips_the_measurement(broken: str, bad: float) -> None:
    enc, dec = sample_maps(requires_grad=False)
    given = {"enc": enc, "dec": dec, "features": of_decoder(dec)}
    given[broken][1, 0, 0, 2, 2] = bad
    loss = adaptive()
    before = copy.deepcopy(loss.state_dict())
    value, *_ = step_of(loss, *given.values())
    assert all(torch.equal(one, before[name]) for name, one in loss.state_dict().items())
    # nonfinite maps make the loss NaN; nonfinite features do not
    assert value.isfinite() == (broken == "features")
    # invalid cells do not matter
    valid = torch.ones(2, 2, 5, 12, dtype=torch.bool)
    valid[1, 0, 2, 2] = False
    assert step_of(loss, *given.values(), valid=valid)[0].isfinite()
    assert loss.describe()["questions"] == ASKED + 1


# --- when it measures ---


def test_it_does_not_measure_before_the_start_and_the_ramp_continues_during_warm_up() -> None:
    enc, dec = sample_maps()
    features = of_decoder(dec)
    criterion = SSyncLoss(start_step=5, ramp_steps=10)
    loss = AdaptiveSSyncLoss(criterion, warmup=2)
    assert_equal(step_of(loss, enc, dec, features, step=4), step_of(criterion, enc, dec, step=4))
    assert loss.levels.sum() == 0
    loss(enc, dec, features, step=5)
    assert loss.levels.tolist() == [1, 0, 0, 0]
    interior = SSyncLoss(start_step=5, ramp_steps=10, merge_threshold=None, boundary_weight=0.0)
    actual, expected = step_of(loss, enc, dec, features, step=9), step_of(interior, enc, dec, step=9)
    assert_equal(actual, expected)
    assert expected[0] > 0
    refuses(ValueError, "`step` must be given with a schedule", loss, enc, dec, features)


def test_it_measures_every_kth_step_from_the_start() -> None:
    enc, dec = sample_maps()
    loss = AdaptiveSSyncLoss(SSyncLoss(start_step=2), every=3, warmup=2)
    asked = []
    for step in range(10):
        before = int(loss.levels.sum())
        value = loss(enc, dec, of_decoder(dec), step=step)
        asked.append(int(loss.levels.sum()) > before)
        # between measurements the level stays
        assert bool(value > 0) == (step >= 5)
    assert [step for step, one in enumerate(asked) if one] == [2, 5, 8]
    refuses(ValueError, "`step` must be given with every=3; got None.", loss, enc, dec, of_decoder(dec))
    refuses(TypeError, "`step` must be a Python int; got float.", loss, enc, dec, of_decoder(dec), step=3.0)


def test_it_does_not_measure_in_evaluation() -> None:
    enc, dec = sample_maps()
    features = of_decoder(dec)
    for loss in (adaptive("interior").eval(), adaptive("interior")):
        before = copy.deepcopy(loss.state_dict())
        with torch.set_grad_enabled(not loss.training):
            value = loss(enc, dec, features)
        assert torch.equal(value, SSyncLoss(merge_threshold=None, boundary_weight=0.0)(enc, dec))
        assert all(torch.equal(one, before[name]) for name, one in loss.state_dict().items())
    # before the first measurement the level is "listening"
    assert AdaptiveSSyncLoss(SSyncLoss()).eval()(enc, dec, features) == 0
    assert AdaptiveSSyncLoss(SSyncLoss(), warmup=0).eval().describe()["level"] == "interior"


@pytest.mark.parametrize("accumulated", [1, 2])
def test_recomputation_does_not_measure_again(accumulated: int) -> None:
    enc, dec = sample_maps()
    loss = adaptive()
    values = [checkpoint(loss, enc, dec, of_decoder(dec), use_reentrant=False) for _ in range(accumulated)]
    assert loss.describe()["questions"] == ASKED + accumulated
    sum(values).backward()
    assert loss.describe()["questions"] == ASKED + accumulated


def test_a_reentrant_checkpoint_does_not_measure_and_warns() -> None:
    enc, dec = sample_maps()
    loss = AdaptiveSSyncLoss(SSyncLoss())
    with pytest.warns(UserWarning, match="with use_reentrant=True it never asks"):
        checkpoint(loss, enc, dec, of_decoder(dec), use_reentrant=True).backward()
    # the warning comes once
    checkpoint(loss, enc, dec, of_decoder(dec), use_reentrant=True).backward()
    assert loss.describe()["questions"] == 0
    # there is no warning before the start
    loss = AdaptiveSSyncLoss(SSyncLoss(start_step=5))
    checkpoint(loss, enc, dec, of_decoder(dec), step=0, use_reentrant=False).backward()


# --- state ---


def test_the_state_dict_holds_the_margins_and_levels() -> None:
    host = torch.nn.ModuleDict({"loss": adaptive("unmerged")})
    state = host.state_dict()
    assert list(state) == ["loss.margins", "loss.levels"]
    loss = AdaptiveSSyncLoss(SSyncLoss())
    torch.nn.ModuleDict({"loss": loss}).load_state_dict(state)
    assert loss.describe() == adaptive("unmerged").describe()
    assert loss.describe()["level"] == "unmerged"
    # a checkpoint of a host with plain SSync lacks them
    loss = AdaptiveSSyncLoss(SSyncLoss())
    fresh = torch.nn.ModuleDict({"loss": loss})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "loss.margins", "loss.levels"'):
        fresh.load_state_dict({})
    assert fresh.load_state_dict({}, strict=False).missing_keys == ["loss.margins", "loss.levels"]
    assert loss.describe()["level"] == "listening"


def test_margins_stay_float32_after_a_cast_to_half_precision() -> None:
    enc, dec = sample_maps()
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        loss = adaptive().to(dtype)
        loss(enc, dec, of_decoder(dec))
        assert loss.margins.dtype == wanted
        assert loss.levels.dtype == torch.int64
        assert loss.describe()["questions"] == ASKED + 1


def test_a_loss_from_inference_mode_measures() -> None:
    enc, dec = sample_maps()
    with torch.inference_mode():
        loss, features = AdaptiveSSyncLoss(SSyncLoss()), of_decoder(dec)
    loss(enc, dec, features).backward()
    assert loss.describe()["questions"] == 1


def test_copies_are_independent() -> None:
    enc, dec = sample_maps()
    loss = adaptive(criterion={"merge_threshold": 0.7}, momentum=0.9)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        twin(enc, dec, of_decoder(dec))
        assert twin.describe() != loss.describe()
        assert (twin.criterion.merge_threshold, twin.momentum) == (0.7, 0.9)
    assert loss.describe()["questions"] == ASKED


def test_describe() -> None:
    loss = adaptive()
    loss.levels.copy_(torch.tensor([10, 20, 30, 40]))
    shares = {"listening": 0.1, "interior": 0.2, "unmerged": 0.3, "full": 0.4}
    debias = 1 - 0.98**100
    assert loss.describe() == pytest.approx(
        {"margin": -0.5 / debias, "merged_margin": 0.5 / debias, "level": "full", "questions": 100, **shares}
    )
    empty = AdaptiveSSyncLoss(SSyncLoss()).describe()
    assert empty == {"margin": 0.0, "merged_margin": 0.0, "level": "listening", "questions": 0} | dict.fromkeys(
        shares, 0
    )


# --- arguments ---


def test_axes_describe_maps_and_features() -> None:
    enc, dec = sample_maps()
    features = torch.randn(2, 2, 5, 5, 12)
    wanted, loss = (
        adaptive(),
        adaptive(criterion={"axes": "(b t) (h w) s", "grid": (5, 12)}, features_axes="b t (h w) d"),
    )
    flat = [one.movedim(2, -1).flatten(0, 1).flatten(1, 2) for one in (enc, dec)]
    value = loss(flat[0], flat[1], features.movedim(2, -1).flatten(2, 3), num_frames=2)
    assert torch.equal(value, wanted(enc, dec, features))
    torch.testing.assert_close(loss.margins, wanted.margins)


@pytest.mark.parametrize("step", [0, 9])
def test_features_on_another_grid_are_refused_even_before_the_start(step: int) -> None:
    enc, dec = sample_maps()
    loss = adaptive(criterion={"start_step": 5})
    message = "`features` must have shape (B=2, T=2, D, H=5, W=12); got (2, 2, 5, 12, 5)."
    refuses(ValueError, message, loss, enc, dec, torch.randn(2, 2, 5, 12, 5), step=step)
    message = "`features` must have shape (B=2, T=2, D, H=5, W=12), or another that `features_axes` tells"
    refuses(ValueError, message, loss, enc, dec, torch.randn(2, 2, 60, 5), step=step)


@pytest.mark.parametrize("step", [0, 9])
def test_maps_on_another_device_are_refused_even_before_the_start(step: int) -> None:
    enc, dec = (one.to("meta") for one in sample_maps())
    loss = adaptive(criterion={"start_step": 5})
    message = "`enc_logits` must be on the device of `margins` (cpu); got meta."
    refuses(ValueError, message, loss, enc, dec, torch.randn(2, 2, 5, 5, 12, device="meta"), step=step)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"momentum": 1.0}, ValueError, "`momentum` must be below 1; got 1"),
        ({"momentum": -0.1}, ValueError, "`momentum` must be within [0.0, 1.0]; got -0.1."),
        ({"warmup": -1}, ValueError, "`warmup` must be at least 0; got -1."),
        ({"dead_zone": -0.1}, ValueError, "`dead_zone` must be finite and at least 0.0; got -0.1."),
        ({"every": 0}, ValueError, "`every` must be at least 1; got 0."),
        ({"features_axes": "b t d"}, ValueError, "`features_axes` must name b, t, d, h, w once each"),
        ({"criterion": torch.nn.MSELoss()}, TypeError, "`criterion` must be SSyncLoss; got MSELoss."),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, Any], error: Any, message: str) -> None:
    refuses(error, message, AdaptiveSSyncLoss, **{"criterion": SSyncLoss(), **settings})


# --- compilers ---


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_step_is_one_graph_and_measures() -> None:
    enc, dec = sample_maps()
    eager = AdaptiveSSyncLoss(SSyncLoss(start_step=1), every=2, warmup=2)
    counter = CompileCounterWithBackend("aot_eager")
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    features = [of_decoder(dec), of_decoder(enc), of_decoder(dec), of_decoder(enc)]
    for step in range(1, 13):
        given = features[step % 4]
        for one, other in zip(
            step_of(compiled, enc, dec, given, step=step), step_of(eager, enc, dec, given, step=step), strict=True
        ):
            torch.testing.assert_close(one, other)
    assert module.describe() == pytest.approx(eager.describe())
    assert eager.describe()["questions"] == 6
    # graphs with and without a measurement; the first step is a constant, later steps are variables
    assert counter.frame_count <= 4


# --- two processes ---


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(two_adaptive.__file__, tmp_path_factory.mktemp("ranks"))


def test_all_ranks_have_the_same_level(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    whole = two_adaptive.train(slice(None))
    for rank in ranks:
        for way in ("together", "compiled"):
            torch.testing.assert_close(rank[way]["margins"], whole["margins"])
            assert torch.equal(rank[way]["levels"], whole["levels"])
        # one all-reduce of three numbers per measurement
        assert rank["sent"] == [3] * two_adaptive.STEPS
    assert len(set(whole["levels"].tolist())) > 1
    # alone the ranks reach different levels
    alone = [two_adaptive.train(one)["levels"].tolist() for one in two_adaptive.SHARES]
    assert alone[0] != alone[1]


# --- the contract of every loss ---


class AdaptiveContract(SSyncContract):
    """The decoder explains the features. One measurement keeps the level, but alone it would select the interior."""

    loss = AdaptiveSSyncLoss
    settings: ClassVar = {"momentum": 0.0, "warmup": 2 * ASKED, "dead_zone": 0.9}
    inert: ClassVar = {"every": 2, "features_axes": "b t d h w"}
    state: ClassVar = ["margins", "levels"]
    narrow: ClassVar = {"features": "they are only measured"}
    hides_dirt: ClassVar = {"features": "a nonfinite measurement is skipped"}
    taught = ("enc_logits", "dec_logits")
    more: ClassVar = {"step": 4}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # these are settings of the criterion
        cls.knobs = {}

    def make(self, **given: Any) -> AdaptiveSSyncLoss:
        criterion = {"criterion": "cross_entropy", "max_different": 4, "backend": self.backend}
        return adaptive(criterion=criterion, **given)

    def case(self) -> Case:
        case = super().case()
        return case._replace(others={"features": of_decoder(case.inputs["dec_logits"]), **case.others})

    def unselected(self, case: Case) -> dict[str, Tensor]:
        features = case.others["features"]
        return super().unselected(case) | {"features": ~case.others["valid"].unsqueeze(2).expand_as(features)}


class TestContract(AdaptiveContract):
    """The contract in plain torch."""


class TestContractInC(AdaptiveContract):
    backend = "cpu"
    twice_differentiable: ClassVar = False
    not_applicable: ClassVar = {"default_compiler": "TestContract covers it"}
