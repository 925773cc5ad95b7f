"""The loss is one graph and reads no data: torch.compile, symbolic and fake tensors, meta device, CUDA graphs."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engines_in_turn import ENGINES_IN_TURN, by_c, by_torch
from sample_maps import leaf, sample_maps
from ssync_loss import BoundaryRefinementLoss, InteriorDenoisingLoss, SSyncLoss
from ssync_loss.distributed import global_mean
from ssync_loss.functional import (
    boundary_region,
    interior_region,
    merge_slots,
    neighbor_difference,
    pseudo_labels,
    selective_distillation_loss,
    slot_overlap,
)
from ssync_loss.testing import assert_close_loss, assert_same_labels

# every test starts with a reset compiler
pytestmark = pytest.mark.usefixtures("fresh_compiler")

Case = tuple[Callable[..., Any], tuple[Tensor, Tensor], dict[str, Any]]


def probabilities(maps: Tensor) -> Tensor:
    return leaf(maps.detach().softmax(2))


def cases() -> dict[str, Case]:
    """Return named cases: a callable of two maps, the maps, and the other arguments."""
    enc, dec = sample_maps()
    valid = torch.rand(2, 2, 5, 12, generator=torch.Generator().manual_seed(1)) > 0.2
    masks = {"valid": valid, "slot_mask": torch.tensor([[True] * 4, [True, True, False, True]])}
    dirty = dec.detach().clone()
    dirty[0, 0, 0, 0, 0] = float("nan")
    smoothed: dict[str, Any] = {"criterion": "cross_entropy", "label_smoothing": 0.1}
    knobs: dict[str, Any] = {"boundary_weight": 2.0, "temperature": 0.5, "min_different": 2, "max_different": 2}
    other_grid = leaf(dec[..., 1:, 2::3])
    return {
        "default": (SSyncLoss(), (enc, dec), {}),
        "no merging": (SSyncLoss(merge_threshold=None), (enc, dec), {}),
        "other knobs": (SSyncLoss(**knobs), (enc, dec), {}),
        "probabilities": (SSyncLoss(kind="probs"), (probabilities(enc), probabilities(dec)), {"valid": valid}),
        "flat maps": (SSyncLoss(grid=(5, 12)), (leaf(enc.flatten(3)), leaf(dec.flatten(3))), {}),
        "valid frames": (SSyncLoss(), (enc, dec), {"valid": torch.tensor([[True, True], [True, False]])}),
        "both masks": (SSyncLoss(**smoothed), (enc, dec), masks),
        "another grid, masked": (SSyncLoss(), (enc, other_grid), masks),
        "enc without gradient": (SSyncLoss(), (enc.detach(), dec), {}),
        "dec without gradient": (SSyncLoss(), (enc, dec.detach()), {}),
        "no gradient": (SSyncLoss(), (enc.detach(), dec.detach()), {}),
        "bfloat16": (SSyncLoss(**smoothed), (leaf(enc.bfloat16()), leaf(dec.bfloat16())), {}),
        "two types": (SSyncLoss(), (leaf(enc.double()), dec), {}),
        "strided maps": (SSyncLoss(), (leaf(enc).movedim(2, -1).contiguous().movedim(-1, 2), dec[..., ::2, :]), {}),
        "before the start": (SSyncLoss(start_step=5), (enc, dec), {"step": 4}),
        "in the ramp": (SSyncLoss(start_step=5, ramp_steps=4), (enc, dec), {"step": 6}),
        "NaN": (SSyncLoss(), (enc, leaf(dirty)), {}),
        "boundary alone": (BoundaryRefinementLoss(), (enc, dec), {"valid": valid}),
        "interior alone": (InteriorDenoisingLoss(**smoothed), (enc, dec), {"slot_mask": masks["slot_mask"]}),
        "given labels": (BoundaryRefinementLoss(), (enc, dec), {"labels": pseudo_labels(enc, dec)}),
        "no process group": (partial(global_mean, SSyncLoss()), (enc, dec), {}),
    }


CASES = list(cases())
# the contract and the engine tests compile the other cases
BY_C = [one for one in CASES if one not in ("default", "both masks")]
# cases to compile with the torch engine
BY_TORCH = ["no merging", "other knobs", "another grid, masked", "enc without gradient", "two types", "NaN"]


def assert_same_step(
    actual: Callable[..., Any], wanted: Callable[..., Any], maps: tuple[Tensor, ...], **rest: Any
) -> None:
    """Compare loss and gradients of two functions, without warnings about missing gradients."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(enc|dec)_logits`", UserWarning)
        expected = wanted(*maps, **rest)
    loss = actual(*maps, **rest)
    assert_close_loss(loss, expected)
    assert loss.requires_grad == expected.requires_grad
    taught = [one for one in maps if one.requires_grad]
    if not taught:
        return
    grads = torch.autograd.grad(loss, taught, allow_unused=True)
    for grad, other in zip(grads, torch.autograd.grad(expected, taught, allow_unused=True), strict=True):
        assert (grad is None) == (other is None)
        if grad is not None:
            torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-8, equal_nan=True)


# the compiler reads the .grad of all inputs, and some maps are not leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("engine", "name"), [*((by_c, name) for name in BY_C), *((by_torch, name) for name in BY_TORCH)]
)
def test_a_step_is_one_graph_with_eager_values(engine: Any, name: str) -> None:
    function, maps, rest = cases()[name]
    counter = CompileCounterWithBackend("aot_eager")
    with engine():
        assert_same_step(torch.compile(function, fullgraph=True, backend=counter), function, maps, **rest)
    assert counter.frame_count == 1


def test_compiling_does_not_warn_about_missing_gradients() -> None:
    enc, dec = sample_maps()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        torch.compile(SSyncLoss(), fullgraph=True, backend="aot_eager")(enc.detach(), dec)
    assert not [one for one in record if "gradient" in str(one.message)]


def test_terms_compile() -> None:
    maps = sample_maps()
    criterion = SSyncLoss()
    actual = torch.compile(criterion.terms, fullgraph=True, backend="aot_eager")(*maps)
    expected = criterion.terms(*maps)
    assert type(actual) is type(expected)
    for one, other in zip(actual[:3], expected[:3], strict=True):
        assert_close_loss(one, other)
    assert actual[3:5] == expected[3:5]
    assert_same_labels(actual.labels, expected.labels)


def test_labels_compile() -> None:
    maps = sample_maps(requires_grad=False)
    compiled = torch.compile(pseudo_labels, fullgraph=True, backend="aot_eager")
    assert_same_labels(compiled(*maps, merge_threshold=0.3), pseudo_labels(*maps, merge_threshold=0.3))


@pytest.mark.parametrize("criterion", ["mse", "cross_entropy"])
def test_a_compiled_label_out_of_range_gives_nan(criterion: Any) -> None:
    _, dec = sample_maps()
    target = torch.zeros(2, 2, 5, 12, dtype=torch.int64)
    target[0, 0, 0, 0] = 4
    compiled = torch.compile(selective_distillation_loss, fullgraph=True, backend="aot_eager")
    for region, wanted in ((target == 4, True), (target == 0, False)):
        assert compiled(dec, target, region, criterion=criterion).isnan() == wanted


def test_the_backward_of_a_compiled_step_can_run_twice() -> None:
    maps = sample_maps()
    loss = torch.compile(SSyncLoss(), fullgraph=True, backend="aot_eager")(*maps)
    once = torch.autograd.grad(loss, maps, retain_graph=True)
    for one, other in zip(once, torch.autograd.grad(loss, maps), strict=True):
        assert torch.equal(one, other)


def test_autocast_around_a_compiled_loss_changes_nothing() -> None:
    maps = sample_maps()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = torch.compile(SSyncLoss(), fullgraph=True, backend="aot_eager")(*maps)
    assert_close_loss(loss, SSyncLoss()(*maps))


def test_a_batch_declared_dynamic_is_not_specialized() -> None:
    maps = sample_maps(3, 3)
    for one in maps:
        # makes it an error to specialize these sizes
        torch._dynamo.mark_dynamic(one, [0, 1, 3, 4])
    criterion = SSyncLoss()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    assert_same_step(compiled, criterion, maps)
    for shape in ((2, 3, 4, 5, 12), (5, 4, 4, 6, 9), (4, 7, 4, 3, 21)):
        assert_same_step(compiled, criterion, sample_maps(*shape))
    assert counter.frame_count == 1


@pytest.mark.parametrize(("start_step", "ramp_steps"), [(30, 0), (30, 40), (0, 500)])
def test_a_hundred_steps_with_a_schedule_are_at_most_three_graphs(start_step: int, ramp_steps: int) -> None:
    maps = sample_maps()
    criterion = SSyncLoss(start_step=start_step, ramp_steps=ramp_steps)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    full = SSyncLoss()(*maps).detach()
    for step in range(100):
        loss = compiled(*maps, step=step)
        assert torch.equal(loss, criterion(*maps, step=step))
        ramp = float(step >= start_step) * (min((step - start_step) / ramp_steps, 1.0) if ramp_steps else 1.0)
        assert_close_loss(loss, ramp * full)
    assert counter.frame_count <= 3


# --- no data is read ---


@pytest.mark.parametrize("name", [one for one in CASES if one != "given labels"])
def test_fake_tensors_run_a_step(name: str) -> None:
    function, maps, rest = cases()[name]
    data = [one.detach() for one in maps]
    with FakeTensorMode() as mode, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(enc|dec)_logits`", UserWarning)
        fake = [mode.from_tensor(one).requires_grad_(old.requires_grad) for one, old in zip(data, maps, strict=True)]
        masks = {key: mode.from_tensor(one) if isinstance(one, Tensor) else one for key, one in rest.items()}
        loss = function(*fake, **masks)
        assert loss.shape == ()
        if loss.requires_grad:
            loss.backward()
            for one in fake:
                assert one.grad is None or one.grad.shape == one.shape
            assert any(one.grad is not None for one in fake)


def test_fake_tensors_run_every_function() -> None:
    with FakeTensorMode():
        logits = torch.randn(2, 3, 4, 5, 6)
        labels, region = torch.zeros(2, 3, 5, 6, dtype=torch.int64), torch.ones(2, 3, 5, 6, dtype=torch.bool)
        overlap = slot_overlap(logits, valid=region, slot_mask=torch.ones(2, 4, dtype=torch.bool))
        assert overlap.shape == (2, 4, 4)
        assert merge_slots(overlap, torch.ones(2, 4), threshold=0.6).shape == (2, 4)
        assert neighbor_difference(labels, valid=region).shape == labels.shape
        assert boundary_region(labels).dtype == interior_region(labels).dtype == torch.bool
        for reduction in ("none", "sum", "mean"):
            loss = selective_distillation_loss(logits, labels, region, reduction=reduction)
            assert loss.shape == (labels.shape if reduction == "none" else ())


@ENGINES_IN_TURN
@pytest.mark.parametrize("name", ["both masks", "probabilities"])
def test_no_size_depends_on_the_data(engine: Any, name: str) -> None:
    function, maps, rest = cases()[name]

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        with engine():
            loss = function(*given[:2], **dict(zip(rest, given[2:], strict=True)))
        return (loss, *torch.autograd.grad(loss, given[:2]))

    graph = make_fx(step, tracing_mode="symbolic")(*maps, *rest.values()).graph
    values = [one for node in graph.nodes for one in tree_leaves(node.meta.get("val"))]
    shapes = [one.shape for one in values if isinstance(one, Tensor)]
    assert len(shapes) > 20
    unbacked = [shape for shape in shapes if any("u" in str(size) for size in shape)]
    assert not unbacked
    assert not [node for node in graph.nodes if "_local_scalar_dense" in str(node.target)]


class HostTraffic(TorchFunctionMode):
    """Records calls that move data between a device and the host."""

    FORBIDDEN = (
        torch.tensor,
        torch.as_tensor,
        torch.from_numpy,
        torch.nonzero,
        torch.masked_select,
        Tensor.nonzero,
        Tensor.masked_select,
        Tensor.item,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.cpu,
        Tensor.__bool__,
        Tensor.__int__,
        Tensor.__float__,
        Tensor.__index__,
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mask = func is Tensor.__getitem__ and any(
            isinstance(one, Tensor) for one in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        if func in self.FORBIDDEN or mask:
            self.calls.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class CpuTensors(TorchDispatchMode):
    """Records operators that take or return a CPU tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[str] = []
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.number += 1
        tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, Tensor)]
        if any(one.device.type == "cpu" for one in tensors):
            self.calls.append(str(func))
        return out


@pytest.mark.parametrize("name", [one for one in CASES if one != "given labels"])
def test_no_data_moves_between_device_and_host(name: str) -> None:
    function, maps, rest = cases()[name]
    # the meta device has no data, so a read fails, and CPU tensors are noticed
    there = [one.detach().to("meta").requires_grad_(one.requires_grad) for one in maps]
    masks = {key: one.to("meta") if isinstance(one, Tensor) else one for key, one in rest.items()}
    with warnings.catch_warnings(), HostTraffic() as traffic, CpuTensors() as operators:
        warnings.filterwarnings("ignore", "`(enc|dec)_logits`", UserWarning)
        loss = function(*there, **masks)
        if loss.requires_grad:
            loss.backward()
    assert operators.number > 3
    assert not operators.calls
    assert not traffic.calls


def test_the_recorders_notice_host_traffic() -> None:
    with HostTraffic() as traffic, CpuTensors() as operators:
        x = torch.arange(3)
        assert x[x > 1].tolist() == [2]
        assert torch.tensor(1).item() == 1
        torch.ones(2, device="meta") * torch.ones((), device="cpu")
    assert traffic.calls == ["__getitem__", "tolist", "tensor", "item"]
    assert operators.calls


# --- on a GPU ---

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA_CASES = [one for one in CASES if one not in ("given labels", "no process group", "strided maps")]


def on_cuda(name: str) -> Case:
    function, maps, rest = cases()[name]
    there = (leaf(maps[0].cuda()), leaf(maps[1].cuda()))
    return function, there, {key: one.cuda() if isinstance(one, Tensor) else one for key, one in rest.items()}


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("name", CUDA_CASES)
def test_a_gpu_gives_the_same_values_as_the_cpu(name: str) -> None:
    function, maps, rest = on_cuda(name)
    function_cpu, maps_cpu, rest_cpu = cases()[name]
    assert_close_loss(function(*maps, **rest).cpu(), function_cpu(*map(leaf, maps_cpu), **rest_cpu), rtol=2e-5)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("name", CUDA_CASES)
def test_a_step_never_waits_for_the_gpu(name: str) -> None:
    function, maps, rest = on_cuda(name)
    function(*maps, **rest).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*maps, **rest).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("name", ["default", "both masks", "probabilities"])
def test_a_captured_step_can_be_replayed_on_new_data(name: str) -> None:
    function, maps, rest = on_cuda(name)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(function(*maps, **rest), maps)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = function(*maps, **rest)
        grads = torch.autograd.grad(loss, maps)
    for seed in (1, 2):
        new = [
            one.softmax(2) if name == "probabilities" else one for one in sample_maps(seed=seed, requires_grad=False)
        ]
        with torch.no_grad():
            for one, data in zip(maps, new, strict=True):
                one.copy_(data)
        graph.replay()
        fresh = [leaf(one) for one in maps]
        expected = function(*fresh, **rest)
        assert_close_loss(loss, expected)
        for one, other in zip(grads, torch.autograd.grad(expected, fresh), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
