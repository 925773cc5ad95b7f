"""Every public function with every kind of tensor. It works, or its error names the argument."""

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from ssync_loss import (
    AdaptiveSSyncLoss,
    BoundaryRefinementLoss,
    CenteredCrossEntropy,
    InteriorDenoisingLoss,
    PrototypeHead,
    PseudoLabels,
    SSyncLoss,
    _checks,
    _vectors,
    diagnostics,
    metrics,
)
from ssync_loss import functional as fn
from ssync_loss.attention import CorrelationFusion, SemanticAwareSlotAttention
from ssync_loss.distributed import global_mean
from ssync_loss.metrics._scores import SCORES
from ssync_loss.visualize import filmstrip, outline, overlay, panel, roles

UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]
NARROW = [torch.int8, torch.int16, torch.int32]


class Call(NamedTuple):
    """A function, its tensors by name, and its settings."""

    function: Callable[..., Any]
    tensors: dict[str, Tensor]
    settings: Mapping[str, Any] = MappingProxyType({})

    def __call__(self, **changed: Any) -> Any:
        return self.function(**(self.tensors | changed), **self.settings)


def numbers(*size: int) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(len(size)))


def integers(high: int, *size: int) -> Tensor:
    return torch.randint(high, size, generator=torch.Generator().manual_seed(high))


def taking_labels(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function take the fields of pseudo-labels as separate arguments, named as in messages."""

    @wraps(function)
    def call(**given: Any) -> Any:
        fields = {name.partition(".")[2]: given.pop(name) for name in FIELDS if name in given}
        return function(**given, labels=PSEUDO._replace(**fields))

    return call


MAPS = {"enc_logits": numbers(2, 2, 3, 4, 4), "dec_logits": numbers(2, 2, 3, 4, 4).flip(2)}
MASKS = {"valid": torch.ones(2, 2, 4, 4, dtype=torch.bool), "slot_mask": torch.ones(2, 3, dtype=torch.bool)}
LABELS, REGION = integers(3, 2, 2, 4, 4), torch.ones(2, 2, 4, 4, dtype=torch.bool)
VALID = {"valid": MASKS["valid"]}
TARGETS = {"pred": LABELS, "target": LABELS.flip(0)}
PSEUDO = PseudoLabels(LABELS, LABELS, REGION, REGION, integers(3, 2, 3))
FIELDS = {f"labels.{name}": one for name, one in PSEUDO._asdict().items()}
ENCODER_LABELS = {name: FIELDS[name] for name in ("labels.enc_labels", "labels.boundary")}
DECODER_LABELS = {name: FIELDS[name] for name in ("labels.dec_labels", "labels.interior")}
REGIONS = {name: FIELDS[name] for name in ("labels.boundary", "labels.interior")}
RENAMED = {name: FIELDS[name] for name in ("labels.representative",)}
FEATURES, VIDEO, FRAME = numbers(2, 2, 5, 4, 4), numbers(2, 2, 3, 8, 8), integers(3, 2, 4, 4)
ENTROPY = CenteredCrossEntropy(6)
INSTANCES, FOUND = numbers(2, 2, 3, 4, 5), torch.ones(2, 2, 3, 4, dtype=torch.bool)
TOKENS = numbers(2, 2, 6, 4, 4)
WEIGHTS = {"mu": numbers(2, 4) + 0.1, "nu": numbers(2, 5) + 0.1}

CALLS = {
    "SSyncLoss": Call(SSyncLoss().eval(), MAPS | MASKS),
    "SSyncLoss, reference": Call(SSyncLoss(backend="reference").eval(), MAPS | MASKS),
    "SSyncLoss, before its start": Call(SSyncLoss(start_step=1).eval(), MAPS | MASKS, {"step": 0}),
    "BoundaryRefinementLoss": Call(BoundaryRefinementLoss().eval(), MAPS | MASKS),
    "InteriorDenoisingLoss": Call(InteriorDenoisingLoss().eval(), MAPS | MASKS),
    "global_mean": Call(global_mean, MAPS | MASKS, {"criterion": SSyncLoss().eval()}),
    "pseudo_labels": Call(fn.pseudo_labels, MAPS | MASKS),
    "pseudo_labels, probs": Call(fn.pseudo_labels, MAPS | MASKS, {"kind": "probs"}),
    "boundary_refinement_loss": Call(taking_labels(fn.boundary_refinement_loss), MAPS | MASKS | ENCODER_LABELS),
    "interior_denoising_loss": Call(taking_labels(fn.interior_denoising_loss), MAPS | MASKS | DECODER_LABELS),
    "selective_distillation_loss": Call(
        fn.selective_distillation_loss,
        {"logits": MAPS["enc_logits"], "target": LABELS, "region": REGION, "slot_mask": MASKS["slot_mask"]},
    ),
    "slot_overlap": Call(fn.slot_overlap, {"logits": MAPS["enc_logits"]} | MASKS),
    "merge_slots": Call(fn.merge_slots, {"overlap": numbers(2, 3, 3), "area": integers(9, 2, 3)}, {"threshold": 0.5}),
    "neighbor_difference": Call(fn.neighbor_difference, {"labels": LABELS} | VALID),
    "boundary_region": Call(fn.boundary_region, {"labels": LABELS} | VALID),
    "interior_region": Call(fn.interior_region, {"labels": LABELS} | VALID),
    "propagate_labels": Call(fn.propagate_labels, {"features": FEATURES, "labels": FRAME}),
    "propagate_masks": Call(fn.propagate_masks, {"features": FEATURES, "masks": numbers(2, 3, 4, 4)}),
    "sinkhorn": Call(fn.sinkhorn, {"cost": numbers(2, 4, 5)} | WEIGHTS),
    "affinity_consistency_loss": Call(
        fn.affinity_consistency_loss,
        {"s": numbers(2, 3, 4, 5), "t": numbers(2, 3, 4, 5), "mask": torch.zeros(2, 3, 4, dtype=torch.bool)},
    ),
    "dense_decoder_alignment_loss": Call(
        fn.dense_decoder_alignment_loss, {"features": FEATURES, "anchors": FEATURES, "enc_labels": LABELS}
    ),
    "dense_encoder_alignment_loss": Call(
        fn.dense_encoder_alignment_loss, {"features": FEATURES, "anchors": FEATURES, "dec_labels": LABELS}
    ),
    "instance_consistency_loss": Call(
        fn.instance_consistency_loss,
        {"embeddings": INSTANCES, "teacher_embeddings": INSTANCES, "valid": FOUND, "teacher_valid": FOUND},
    ),
    "valid_instances": Call(
        fn.valid_instances, {"logits": MAPS["enc_logits"], "slots": numbers(2, 2, 3, 5), "instances": INSTANCES}
    ),
    "masked_token_loss": Call(
        fn.masked_token_loss,
        {"s_pat": TOKENS, "t_pat": TOKENS, "mask": MASKS["valid"]},
        {"ce_patch": ENTROPY},
    ),
    "out_generative_loss": Call(
        fn.out_generative_loss,
        {"s_glob": numbers(2, 2, 2, 6), "s_loc": numbers(2, 2, 1, 6), "t_glob": numbers(2, 2, 2, 6)},
        {"ce": ENTROPY},
    ),
    "semantic_consistency_loss": Call(
        fn.semantic_consistency_loss,
        {"logits": MAPS["enc_logits"], "teacher_logits": MAPS["dec_logits"], "feats": FEATURES},
    ),
    "mask_diversity_loss": Call(fn.mask_diversity_loss, {"logits": MAPS["enc_logits"]}),
    "structure_aware_loss": Call(fn.structure_aware_loss, {"pred": VIDEO, "target": VIDEO.flip(0)}),
    "temporal_slot_contrast_loss": Call(fn.temporal_slot_contrast_loss, {"slots": numbers(2, 3, 4, 5)}),
    "slot_redundancy_loss": Call(
        fn.slot_redundancy_loss, {"attention": numbers(2, 2, 6, 4, 4), "slots": numbers(2, 2, 6, 5)}
    ),
    "slot_error": Call(fn.slot_error, {"recon": FEATURES, "target": FEATURES, "masks": MAPS["enc_logits"].softmax(2)}),
    "allot_children": Call(fn.allot_children, {"errors": numbers(4)}, {"n_new": 3}),
    "spawn_children": Call(
        fn.spawn_children,
        {"slots_active": numbers(3, 5), "counts": integers(3, 3), "unborn": numbers(9, 5)},
        {"neighbors": "all"},
    ),
    "CenteredCrossEntropy": Call(ENTROPY, {"s": numbers(4, 6), "t": numbers(4, 6)}),
    "update_center": Call(CenteredCrossEntropy(6).update_center, {"t": numbers(4, 6)}),
    "PrototypeHead": Call(PrototypeHead(5, Kp=6, hidden=7, bottleneck=4), {"x": numbers(4, 5)}),
    "CorrelationFusion": Call(CorrelationFusion(5, 16), {"keys": FEATURES}),
    "SemanticAwareSlotAttention": Call(
        SemanticAwareSlotAttention(5, num_slots=3, num_instances=2), {"features": FEATURES}
    ),
    "summary": Call(taking_labels(diagnostics.summary), MASKS | ENCODER_LABELS | DECODER_LABELS | RENAMED),
    "region_share": Call(diagnostics.region_share, {"region": REGION} | VALID),
    "agreement": Call(diagnostics.agreement, {"enc_labels": LABELS, "dec_labels": LABELS} | VALID),
    "slots_in_use": Call(diagnostics.slots_in_use, {"labels": LABELS} | VALID),
    "label_flips": Call(diagnostics.label_flips, {"labels": LABELS} | VALID),
    "merges": Call(diagnostics.merges, {"representative": integers(3, 2, 3)}),
    "explained_variance": Call(
        diagnostics.explained_variance, {"features": FEATURES, "labels": LABELS} | VALID, {"num_slots": 3}
    ),
    "edge_alignment": Call(diagnostics.edge_alignment, {"features": FEATURES, "labels": LABELS} | VALID),
    "premise": Call(diagnostics.premise, MAPS | MASKS | {"features": FEATURES, "groups": integers(2, 2)}),
    "AdaptiveSSyncLoss": Call(AdaptiveSSyncLoss(SSyncLoss()).eval(), MAPS | MASKS | {"features": FEATURES}),
    "overlay": Call(overlay, {"video": VIDEO, "labels": LABELS} | VALID),
    "outline": Call(outline, {"video": VIDEO, "region": REGION}),
    "filmstrip": Call(filmstrip, {"video": VIDEO}),
    "roles": Call(taking_labels(roles), VALID | REGIONS),
    "panel": Call(taking_labels(panel), MAPS | MASKS | ENCODER_LABELS | DECODER_LABELS | {"video": VIDEO}),
}
SCORED = {
    one.__name__: Call(one, TARGETS, {"background": 0} if "background" in inspect.signature(one).parameters else {})
    for one in SCORES
    if one is not metrics.unused_slots
}
READERS = SCORED | {
    "unused_slots": Call(metrics.unused_slots, {"pred": LABELS}, {"num_slots": 3}),
    "masks_to_labels": Call(metrics.masks_to_labels, {"masks": MAPS["enc_logits"]}, {"size": (8, 8)}),
    "objects_to_labels": Call(metrics.objects_to_labels, {"masks": REGION[:, :, None]}),
}
CALLS |= READERS | {"has_objects": Call(metrics.has_objects, {"target": LABELS}, {"background": 0})}


def cases(calls: dict[str, Call], wanted: Callable[[Tensor], bool] = lambda _: True) -> pytest.MarkDecorator:
    """Parametrize over the wanted tensors of every call."""
    found = [(name, tensor) for name, call in calls.items() for tensor, one in call.tensors.items() if wanted(one)]
    return pytest.mark.parametrize(("name", "argument"), found)


def is_integer(tensor: Tensor) -> bool:
    return tensor.dtype == torch.int64


def assert_same(actual: Any, expected: Any) -> None:
    """Compare the values of tensors of any class."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# --- tensors that are not dense ---

with warnings.catch_warnings():
    # torch warns that these are prototypes
    warnings.simplefilter("ignore")
    PIECES = [torch.ones(2), torch.ones(3)]
    NOT_DENSE = {
        "torch.sparse_coo": torch.eye(3).to_sparse(),
        "torch.sparse_csr": torch.eye(3).to_sparse_csr(),
        "torch._mkldnn": torch.ones(3).to_mkldnn(),
        "nested": torch.nested.nested_tensor(PIECES),
        "nested, jagged": torch.nested.nested_tensor(PIECES, layout=torch.jagged),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    }


@cases(CALLS)
def test_sparse_nested_quantized_and_mkldnn_tensors_are_refused_by_name(name: str, argument: str) -> None:
    own = {"torch.sparse_coo, with the axes of its own": CALLS[name].tensors[argument].to_sparse()}
    for kind, tensor in (NOT_DENSE | own).items():
        message = f"`{argument}` must be a dense tensor; got a {kind.partition(',')[0]} one."
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            CALLS[name](**{argument: tensor})


# --- wrong types, shapes and devices ---

TYPES = {
    torch.float32: ("be floating point", torch.int64, torch.bool, torch.complex64),
    torch.int64: ("hold integers", torch.bool, torch.complex64, torch.float8_e4m3fn),
    torch.bool: ("be boolean", torch.uint8, torch.float32),
}
# functions that accept any number of axes
OPEN = ("CenteredCrossEntropy", "update_center", "PrototypeHead")


@cases(CALLS)
def test_a_wrong_type_is_refused_by_name(name: str, argument: str) -> None:
    call, right = CALLS[name], CALLS[name].tensors[argument]
    for wrong in ([0], "map", 7):
        with pytest.raises(TypeError, match=f"^`{argument}` must be a tensor; got {type(wrong).__name__}"):
            call(**{argument: wrong})
    wanted, *dtypes = TYPES[right.dtype]
    for dtype in dtypes if argument != "area" else [torch.bool, torch.complex64, torch.float8_e5m2]:
        with pytest.raises(TypeError, match=rf"^`{argument}` must {wanted}.*; got {dtype}\.$"):
            call(**{argument: right.to(dtype)})


@cases({name: call for name, call in CALLS.items() if name not in OPEN})
def test_a_wrong_number_of_axes_is_refused_by_name(name: str, argument: str) -> None:
    call, right = CALLS[name], CALLS[name].tensors[argument]
    for wrong in (right[None, None], right.flatten()[0]):
        shape = re.escape(str(tuple(wrong.shape)))
        with pytest.raises(ValueError, match=rf"^`{argument}` must have shape \(.*\); got {shape}\.$"):
            call(**{argument: wrong})


@cases({name: call for name, call in CALLS.items() if len(call.tensors) > 1})
def test_a_tensor_on_another_device_is_refused_by_name(name: str, argument: str) -> None:
    message = r"^`[\w.]+` must be on the device of `[\w.]+` \((cpu|meta)\); got (cpu|meta)\.$"
    with pytest.raises(ValueError, match=message):
        CALLS[name](**{argument: CALLS[name].tensors[argument].to("meta")})


# --- wrong settings ---

# wrong values for settings of each type, with the error messages
SETTINGS: dict[type, list[tuple[object, type[Exception], str]]] = {
    float: [("1", TypeError, "must be a number; got str."), (True, TypeError, "must be a number; got bool.")],
    int: [(1.5, TypeError, "must be an integer; got float."), (True, TypeError, "must be an integer; got bool.")],
    str: [("nonsense", ValueError, "must be one of "), (None, ValueError, "must be (one of|'logits', 'probs' or) ")],
    bool: [("no", TypeError, "must be True or False; got str.")],
}


MADE = {
    "AdaptiveSSyncLoss": Call(AdaptiveSSyncLoss, {}, {"criterion": SSyncLoss()}),
    "SSyncLoss": Call(SSyncLoss, {}),
    "BoundaryRefinementLoss": Call(BoundaryRefinementLoss, {}),
    "InteriorDenoisingLoss": Call(InteriorDenoisingLoss, {}),
    "CenteredCrossEntropy": Call(CenteredCrossEntropy, {}, {"Kp": 6}),
    "PrototypeHead": Call(PrototypeHead, {}, {"C": 5}),
    "SemanticAwareSlotAttention": Call(SemanticAwareSlotAttention, {}, {"dim": 5}),
}
CONFIGURED = {name: call for name, call in CALLS.items() if not isinstance(call.function, nn.Module)} | MADE


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        (name, setting)
        for name, call in CONFIGURED.items()
        for setting, one in inspect.signature(call.function).parameters.items()
        if type(one.default) in SETTINGS
    ],
)
def test_a_setting_of_another_type_is_refused_by_name(name: str, setting: str) -> None:
    call = CONFIGURED[name]
    default = inspect.signature(call.function).parameters[setting].default
    for wrong, error, message in SETTINGS[type(default)]:
        with pytest.raises(error, match=f"^`{setting}` {message}"):
            call._replace(settings={**call.settings, setting: wrong})()


# --- integers ---


@pytest.mark.parametrize("dtype", UNSIGNED + NARROW)
@cases(CALLS, is_integer)
def test_integers_of_any_width_are_equal(name: str, argument: str, dtype: torch.dtype) -> None:
    call = CALLS[name]
    torch.manual_seed(0)
    wanted = call()
    torch.manual_seed(0)
    assert_same(call(**{argument: call.tensors[argument].to(dtype)}), wanted)


# in other functions integers are only names
INDEXED = {
    "selective_distillation_loss": "target",
    "boundary_refinement_loss": "labels.enc_labels",
    "interior_denoising_loss": "labels.dec_labels",
    "explained_variance": "labels",
    "unused_slots": "pred",
}
COUNTED = {
    "merge_slots": "area",
    "spawn_children": "counts",
    "propagate_labels": "labels",
    "slots_in_use": "labels",
    "merges": "representative",
    "overlay": "labels",
}


@pytest.mark.parametrize(("name", "argument"), (INDEXED | COUNTED).items())
def test_an_integer_beyond_int64_is_refused_by_name(name: str, argument: str) -> None:
    large = CALLS[name].tensors[argument].to(torch.uint64)
    large.view(torch.int64).view(-1)[0] = -1
    with pytest.raises(ValueError, match=rf"^`{argument}` must lie below 2\*\*63; got {2**64 - 1}\.$"):
        CALLS[name](**{argument: large})


@pytest.mark.usefixtures("fresh_compiler")
def test_as_index_compiles() -> None:
    def index(labels: Tensor) -> Tensor:
        return _checks.as_index("labels", labels) + 1

    compiled = torch.compile(index, fullgraph=True, backend="eager")
    for dtype in UNSIGNED:
        labels = torch.tensor([3, 200]).to(dtype)
        assert compiled(labels).tolist() == [4, 201]
        with FakeTensorMode() as mode:
            assert index(mode.from_tensor(labels)).dtype == torch.int64
    for other in (torch.bool, torch.float32, torch.complex64):
        with pytest.raises(TypeError, match=f"^`labels` must hold integers; got {other}.$"):
            index(torch.zeros(2).to(other))


# --- tensors whose values can be read, and others ---


class Sub(Tensor):
    """A subclass with its own memory, like torchvision's."""


class Wrapper(Tensor):
    """A subclass without memory that wraps a tensor, like distributed tensors."""

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "Wrapper":
        wrapper: Wrapper = Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype)
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        raise AssertionError(f"{function} was called")


def look(numbers: Tensor) -> Tensor:
    _checks.check_nonnegative("numbers", numbers)
    return numbers


NEGATIVE = torch.tensor([[1.0, -2.0]])


@pytest.mark.parametrize(
    "numbers",
    [
        NEGATIVE,
        NEGATIVE.to(torch.bfloat16),
        NEGATIVE.long(),
        NEGATIVE.T[1:].expand(3, 4),
        NEGATIVE.as_subclass(Sub),
        nn.Parameter(NEGATIVE.clone()),
        NEGATIVE.clone().requires_grad_() * 1,
    ],
    ids=["plain", "half", "integers", "expanded", "subclass", "parameter", "with a graph"],
)
def test_values_in_cpu_memory_are_read(numbers: Tensor) -> None:
    with torch.inference_mode(), FlopCounterMode(display=False):
        for one in (numbers, numbers + 0):
            with pytest.raises(ValueError, match=r"^`numbers` must be at least 0; got -2(\.0)?\.$"):
                look(one)


def in_fake_mode(numbers: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        look(numbers)
        look(mode.from_tensor(numbers))
    look(mode.from_tensor(numbers))


def exported(numbers: Tensor) -> None:
    class Module(nn.Module):
        def forward(self, numbers: Tensor) -> Tensor:
            return look(numbers) + 1

    torch.export.export(Module(), (numbers,), strict=False)


def traced(mode: Any) -> Callable[[Tensor], Any]:
    return make_fx(look, tracing_mode=mode)


@pytest.mark.parametrize(
    "use",
    [
        lambda x: look(x.to("meta")),
        lambda x: look(Wrapper(x)),
        lambda x: look(x[:0]),
        in_fake_mode,
        # exporting counts as compiling from torch 2.15 on
        pytest.param(exported, marks=pytest.mark.compiles),
        traced("real"),
        traced("fake"),
        traced("symbolic"),
        make_fx(torch.func.functionalize(look)),
        torch.func.functionalize(look),
        torch.vmap(look),
        torch.vmap(torch.vmap(look)),
        torch.func.grad(lambda x: look(x).sum()),
        torch.func.jacfwd(look),
        pytest.param(torch.compile(look, fullgraph=True, backend="eager"), marks=pytest.mark.compiles),
        lambda x: torch.jit.trace(lambda y: look(y) + 1, x, check_trace=False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_values_of_other_tensors_are_not_read(use: Callable[[Tensor], Any]) -> None:
    use(NEGATIVE)


@cases(CALLS)
def test_a_subclass_gives_the_result_of_its_values(name: str, argument: str) -> None:
    call = CALLS[name]
    torch.manual_seed(0)
    wanted = call()
    for kind in (lambda x: x.as_subclass(Sub), lambda x: nn.Parameter(x, requires_grad=False)):
        torch.manual_seed(0)
        assert_same(call(**{argument: kind(call.tensors[argument])}), wanted)


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: x.as_subclass(Sub), lambda x: nn.Parameter(x, False)])
@pytest.mark.parametrize(("name", "argument"), INDEXED.items())
def test_labels_of_a_subclass_are_checked(name: str, argument: str, kind: Any) -> None:
    with pytest.raises(ValueError, match=rf"^`{argument}` must lie within \[0, 2\]; got values from 1 to 3\.$"):
        CALLS[name](**{argument: kind(LABELS + 1)})


def test_labels_under_vmap_are_not_read() -> None:
    both = torch.stack([LABELS, LABELS.flip(1)])
    values = torch.vmap(lambda labels: diagnostics.explained_variance(FEATURES, labels, num_slots=3))(both)
    wanted = [diagnostics.explained_variance(FEATURES, labels, num_slots=3) for labels in both]
    torch.testing.assert_close(values, torch.stack(wanted))


# --- tensors without values ---


@pytest.mark.parametrize("call", READERS.values(), ids=READERS)
def test_metrics_refuse_tensors_without_values(call: Call) -> None:
    with FakeTensorMode() as mode:
        fakes = {key: mode.from_tensor(one) for key, one in call.tensors.items()}
    for tensors in ({key: one.to("meta") for key, one in call.tensors.items()}, fakes):
        with pytest.raises(ValueError, match=r"^`(pred|masks)` must hold numbers, which are read here; got a meta or "):
            call(**tensors)


def test_has_objects_accepts_meta_tensors() -> None:
    answer = metrics.has_objects(LABELS.to("meta"), background=0)
    assert (answer.shape, answer.dtype, answer.device.type) == ((2,), torch.bool, "meta")


# --- vectors of any length ---

# functions of directions; a factor does not change the result
TURNED = {
    "temporal_slot_contrast_loss": ["slots"],
    "affinity_consistency_loss": ["s", "t"],
    "dense_decoder_alignment_loss": ["features", "anchors"],
    "dense_encoder_alignment_loss": ["features", "anchors"],
    "semantic_consistency_loss": ["feats"],
    "slot_redundancy_loss": ["slots"],
    "valid_instances": ["slots", "instances"],
    "propagate_labels": ["features"],
    "propagate_masks": ["features"],
}
# float32 ends at 2^128, its normal numbers begin at 2^-126
FACTORS = [2.0**100, 2.0**-66, 2.0**125, 2.0**-123]


def signed(tensor: Tensor) -> Tensor:
    return tensor - tensor.mean() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("name", "argument"), [(name, one) for name, some in TURNED.items() for one in some])
def test_the_norm_of_a_vector_neither_overflows_nor_underflows(name: str, argument: str, factor: float) -> None:
    call = CALLS[name]
    everywhere = {"mask": torch.ones_like(call.tensors["mask"])} if "mask" in call.tensors else {}

    def step(scale: float) -> tuple[Tensor, Tensor | None]:
        one = (signed(call.tensors[argument]) * scale).requires_grad_()
        value = call(**{argument: one}, **everywhere)
        if not value.requires_grad:
            return value, None
        (slope,) = torch.autograd.grad(value, one)
        return value, slope * scale

    (value, slope), (wanted, wanted_slope) = step(factor), step(1.0)
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=0)
    if slope is not None and wanted_slope is not None:
        assert (slope - wanted_slope).abs().max() <= 1e-4 * wanted_slope.abs().max()


@pytest.mark.parametrize("factor", FACTORS[:2])
def test_a_head_accepts_prototypes_and_tokens_of_any_norm(factor: float) -> None:
    head = PrototypeHead(5, Kp=6, hidden=7, bottleneck=4, layers=1)
    x = signed(numbers(4, 5))
    wanted = head(x)
    with torch.no_grad():
        head.prototypes.mul_(factor)
        weight = next(head.mlp.parameters()).mul_(factor)
    assert weight.abs().min() > 0
    torch.testing.assert_close(head(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [2.0**100, 2.0**-20])
def test_the_jitter_of_children_scales_with_the_slots(factor: float) -> None:
    # the mean norm includes 1e-8, so tiny slots have smaller jitter
    slots, counts = signed(numbers(3, 5)), torch.tensor([1, 2, 0])
    found, wanted = (
        fn.spawn_children(slots * scale, counts, generator=torch.Generator().manual_seed(0)) / scale
        for scale in (factor, 1.0)
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-2 if factor < 1 else 1e-5)


@pytest.mark.parametrize("dirt", [float("nan"), float("inf")])
def test_a_nonfinite_vector_has_no_direction(dirt: float) -> None:
    units, inverse = _vectors.directions(torch.tensor([[dirt, 1.0], [3.0, 4.0], [1e-45, 0.0]]))
    assert units[0].isnan().all()
    assert inverse[0].isnan().all()
    torch.testing.assert_close(units[1:], torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


# --- tensors of inference mode ---


@cases(CALLS)
def test_inference_tensors_mix_with_trained_ones(name: str, argument: str) -> None:
    call = CALLS[name]
    torch.manual_seed(0)
    wanted = call()
    with torch.inference_mode():
        given = call.tensors[argument].clone()
    others = {
        key: one.clone().requires_grad_() if one.is_floating_point() else one for key, one in call.tensors.items()
    }
    torch.manual_seed(0)
    value = call(**{**others, argument: given})
    if isinstance(value, Tensor):
        torch.testing.assert_close(value, wanted)
        if value.requires_grad:
            value.sum().backward()


def test_a_single_inference_frame_mixes_with_trained_ones() -> None:
    student = numbers(2, 1, 1, 3, 4).requires_grad_()
    with torch.inference_mode():
        teacher, valid = numbers(2, 1, 1, 3, 4), torch.ones(2, 1, 1, 3, dtype=torch.bool)
    fn.instance_consistency_loss(student, teacher, valid, valid).backward()
    assert student.grad is not None
