"""The kernels as operators of torch: compilation, fake tensors, gradients, launches, memory, requirements."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernel_runs import DEVICE, KERNELS, Run, quick_interpreter
from sample_maps import leaf, sample_maps
from ssync_loss import SSyncLoss
from ssync_loss.ssync.engines import triton as kernels
from ssync_loss.ssync.engines.triton import _distill, _labels, _launch, _limits, _loss
from ssync_loss.ssync.maps import Maps
from ssync_loss.ssync.settings import Settings
from ssync_loss.testing import SSyncCase, assert_close_loss, assert_same_labels

__all__ = ["quick_interpreter"]

PATCHES = torch.zeros(2, 2, 5, 12, dtype=torch.int64, device=DEVICE)
REGION = PATCHES == 0
ONES = torch.ones(PATCHES.shape, device=DEVICE)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def maps(num_clips: int = 2) -> tuple[Tensor, Tensor]:
    enc, dec = sample_maps(num_clips)
    return leaf(enc.to(DEVICE)), leaf(dec.to(DEVICE))


def masks(num_clips: int = 2) -> dict[str, Any]:
    valid = torch.rand(num_clips, 2, 5, 12, device=DEVICE) > 0.2
    return {
        "valid": valid,
        "slot_mask": torch.tensor([[True, True, False, True]], device=DEVICE).expand(num_clips, 4),
        "clean": torch.tensor(True, device=DEVICE),
    }


def of(enc: Tensor, dec: Tensor, valid: Any = None, slot_mask: Any = None, clean: Any = None) -> Maps:
    return Maps(enc, dec, valid, slot_mask, clean)


def total(enc: Tensor, dec: Tensor, **settings: Any) -> Tensor:
    return KERNELS.loss(of(enc, dec), Settings(**settings))


def distill(logits: Tensor, reduction: Any = "mean") -> Tensor:
    return KERNELS.distill(logits, PATCHES, REGION, None, Settings(), reduction)


OPERATOR_CASES: dict[str, tuple[Any, Callable[[Tensor, Tensor], tuple[Any, ...]]]] = {
    "label": (_labels.label, lambda enc, dec: (enc, dec, None, None, 0.6, None, None, None, 1, 1, 0, True, True)),
    "label, masked, without targets": (
        _labels.label,
        lambda enc, dec: (enc, dec, *list(masks().values())[:2], *(None,) * 4, 1, 1, 0, False, True),
    ),
    "label, with slot labels": (
        _labels.label,
        lambda enc, dec: (
            *(enc, dec, None, None, None, None, torch.stack([PATCHES] * 2).char()),
            *(torch.zeros(len(enc), enc.shape[2], dtype=torch.int8, device=DEVICE), 1, 1, 0, True, True),
        ),
    ),
    "find": (_labels.find, lambda enc, dec: (enc, dec, None, None, 0.6, None)),
    "find, unmerged": (_labels.find, lambda enc, dec: (enc, dec, None, None, None, None)),
    "loss": (
        _loss.loss,
        lambda enc, dec: (enc, dec, torch.stack([PATCHES] * 2).char(), None, None, "mse", 0.0, 1.0, 1.0, 1.0),
    ),
    "loss, masked": (
        _loss.loss,
        lambda enc, dec: (
            *(enc, dec, torch.stack([PATCHES] * 2).char(), masks()["slot_mask"], masks()["clean"]),
            *("cross_entropy", 0.1, 0.5, 2.0, 0.5),
        ),
    ),
    "loss_backward": (
        _loss.loss_backward,
        lambda enc, dec: (
            *(torch.ones((), device=DEVICE), None, None, enc.detach(), dec.detach()),
            *(torch.stack([PATCHES] * 2).char(), None, torch.ones(2, device=DEVICE)),
            *("mse", 0.0, 1.0, 1.0, 1.0, True, False),
        ),
    ),
    "distill": (
        _distill.distill,
        lambda enc, _: (enc, PATCHES, REGION, None, "mse", 0.0, 1.0, "mean"),
    ),
    "distill, by patch": (
        _distill.distill,
        lambda enc, _: (enc, PATCHES, REGION, masks()["slot_mask"], "cross_entropy", 0.1, 1.0, "none"),
    ),
    "distill_backward": (
        _distill.distill_backward,
        lambda enc, _: (
            *(torch.ones((), device=DEVICE), enc.detach(), PATCHES.char(), torch.ones(1, device=DEVICE)),
            *(None, "mse", 0.0, 1.0, "sum"),
        ),
    ),
}


class TestOperators:
    @pytest.mark.parametrize("name", OPERATOR_CASES)
    def test_opcheck(self, name: str) -> None:
        operator, arguments = OPERATOR_CASES[name]
        torch.library.opcheck(operator, arguments(*maps()))

    def test_terms_of_masked_maps_compile_to_one_graph(self) -> None:
        chosen, settings = masks(), Settings()
        counter = CompileCounterWithBackend("aot_eager")

        def step(enc: Tensor, dec: Tensor) -> Any:
            return KERNELS.terms(of(enc, dec, **chosen), settings)

        compiled = torch.compile(step, fullgraph=True, backend=counter)
        results: list[tuple[Any, Any]] = []
        for function in (compiled, step):
            given = maps()
            terms = function(*given)
            results.append((terms, torch.autograd.grad(terms.total, given)))
        (actual, grads), (expected, expected_grads) = results
        assert all(torch.equal(*pair) for pair in zip(actual[:5], expected[:5], strict=True))
        assert_same_labels(actual.labels, expected.labels)
        assert all(torch.equal(*pair) for pair in zip(grads, expected_grads, strict=True))
        assert counter.frame_count == 1

    def test_batches_of_any_size_share_a_graph(self) -> None:
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(total, fullgraph=True, backend=counter)
        for num_clips in (2, 3, 5):
            enc, dec = maps(num_clips)
            loss = compiled(enc, dec)
            assert torch.equal(loss, total(enc, dec))
            loss.backward()
        # one graph for the first size, and one for all others
        assert counter.frame_count == 2

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_a_distillation_compiles(self, reduction: str) -> None:
        compiled = torch.compile(distill, fullgraph=True, backend="aot_eager")
        results = []
        for function in (compiled, distill):
            logits, _ = maps()
            loss = function(logits, reduction)
            results.append((loss, *torch.autograd.grad(loss.sum(), logits)))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


class TestGradients:
    def test_each_term_has_its_own_gradient(self) -> None:
        for name, weight in (("boundary", 0.5), ("interior", 2.0)):
            enc, dec = maps()
            terms = KERNELS.terms(of(enc, dec), Settings(boundary_weight=0.5, interior_weight=2.0))
            grads = torch.autograd.grad(terms.total, (enc, dec), retain_graph=True)
            alone = torch.autograd.grad(getattr(terms, name), (enc, dec), allow_unused=True)
            taught, other = (1, 0) if name == "boundary" else (0, 1)
            # zeros would have to be filled
            assert alone[other] is None
            torch.testing.assert_close(alone[taught] * weight, grads[taught])

    def test_gradients_of_a_sum_add_up(self) -> None:
        enc, dec = maps()
        terms = KERNELS.terms(of(enc, dec), Settings())
        grads = torch.autograd.grad(terms.total, (enc, dec), retain_graph=True)
        mixed = 2 * terms.total - 3 * terms.boundary + terms.interior
        grad_enc, grad_dec = torch.autograd.grad(mixed, (enc, dec))
        torch.testing.assert_close(grad_enc, 3 * grads[0])
        torch.testing.assert_close(grad_dec, -grads[1])

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_map_may_need_no_gradient(self, which: int) -> None:
        given = maps()
        full = torch.autograd.grad(total(*given), given)
        enc, dec = (one.detach() if place == which else one for place, one in enumerate(given))
        (grad,) = torch.autograd.grad(total(enc, dec), given[1 - which])
        assert torch.equal(grad, full[1 - which])

    def test_no_gradient_at_all(self) -> None:
        enc, dec = (one.detach() for one in maps())
        assert not total(enc, dec).requires_grad
        with torch.no_grad():
            assert not total(*maps()).requires_grad

    def test_backward_can_run_twice(self) -> None:
        enc, dec = maps()
        loss = total(enc, dec)
        once = torch.autograd.grad(loss, (enc, dec), retain_graph=True)
        again = torch.autograd.grad(loss, (enc, dec))
        assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_second_derivative_is_an_error(self, which: int) -> None:
        given = maps()
        enc, dec = (one if place == which else one.detach() for place, one in enumerate(given))
        (grad,) = torch.autograd.grad(total(enc, dec), given[which], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()

    def test_a_second_derivative_of_a_distillation_is_an_error(self) -> None:
        logits, _ = maps()
        (grad,) = torch.autograd.grad(distill(logits), logits, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()

    def test_functional_gradients_equal_those_of_autograd(self) -> None:
        enc, dec = maps()
        expected = torch.autograd.grad(total(enc, dec), (enc, dec))
        actual = torch.func.grad(total, argnums=(0, 1))(enc.detach(), dec.detach())
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
        (expected_one,) = torch.autograd.grad(distill(dec), dec)
        assert torch.equal(torch.func.grad(distill)(dec.detach()), expected_one)

    @pytest.mark.parametrize("which", [0, 1])
    def test_the_value_of_a_functional_gradient_is_differentiable(self, which: int) -> None:
        given = [one.detach() for one in maps()]

        def loss(taught: Tensor, weight: Tensor) -> Tensor:
            pair = [taught, given[1]]
            pair[which] = pair[which] * weight
            return total(pair[0], pair[1])

        weight, plain = leaf(torch.ones((), device=DEVICE)), leaf(torch.ones((), device=DEVICE))
        _, value = torch.func.grad_and_value(loss)(given[0], weight)
        value.backward()
        loss(given[0], plain).backward()
        assert plain.grad is not None
        assert weight.grad is not None
        assert plain.grad != 0
        assert_close_loss(weight.grad, plain.grad)

    # torch implements forward derivatives with torch.jit.script
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    @pytest.mark.parametrize("function", [lambda one: total(one, one), distill])
    def test_a_forward_derivative_is_an_error(self, function: Callable[[Tensor], Tensor]) -> None:
        enc = maps()[0].detach()
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(function, (enc,), (enc,))
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.func.grad(lambda one: torch.func.grad(function)(one).square().sum())(enc)


OPERATORS = {
    str(one._opoverload): one
    for module in (_labels, _loss, _distill)
    for one in vars(module).values()
    if isinstance(one, CustomOpDef)
}


class Launches(TorchDispatchMode):
    """Records launches of kernels, and all other operators of torch except allocations."""

    FREE = ("aten.empty", "aten.new_empty", "aten.detach", "aten.view", "aten.alias", "aten.expand")

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[str] = []
        self.others: list[str] = []
        launch = _launch.launch

        def counted(kernel: Any, *arguments: Any, **constants: Any) -> None:
            self.kernels.append(kernel.__name__)
            # operators of the interpreter do not count
            with torch._C._DisableTorchDispatch():
                launch(kernel, *arguments, **constants)

        patch.setattr(_launch, "launch", counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name in OPERATORS:
            # a mode is off while it handles a call
            with self:
                return OPERATORS[name]._init_fn(*args, **(kwargs or {}))
        if not name.startswith(self.FREE):
            self.others.append(name)
        return func(*args, **(kwargs or {}))


class TestLaunches:
    @pytest.mark.parametrize("masked", [False, True])
    def test_a_step_has_seven_launches(self, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        given = of(*maps(), **masks() if masked else {})
        with Launches(monkeypatch) as launches:
            KERNELS.loss(given, Settings()).backward()
        assert launches.kernels == [
            "label_kernel",
            "overlap_kernel",
            "merge_kernel",
            "target_kernel",
            "loss_kernel",
            "finish_kernel",
            "gradient_kernel",
        ]
        # autograd starts the backward pass with a 1
        assert launches.others == ["aten.ones_like.default"]

    @pytest.mark.parametrize("masked", [False, True])
    def test_the_module_adds_no_launch(self, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        enc, dec = maps()
        chosen = {name: masks()[name] for name in ("valid", "slot_mask")} if masked else {}
        criterion = SSyncLoss(backend="triton")
        # the first call on a CPU reads values
        criterion(enc, dec, **chosen)
        with Launches(monkeypatch) as launches:
            criterion(enc, dec, **chosen).backward()
        assert len(launches.kernels) == 7
        assert [name for name in launches.others if "unsqueeze" not in name] == ["aten.ones_like.default"]

    @pytest.mark.parametrize(
        ("call", "number"),
        [
            pytest.param(lambda given: KERNELS.terms(given, Settings()).total.backward(), 7, id="labels for logging"),
            pytest.param(lambda given: KERNELS.loss(given, Settings(None)).backward(), 5, id="without merging"),
            pytest.param(lambda given: KERNELS.pseudo_labels(given, Settings()), 4, id="labels alone"),
            pytest.param(lambda given: distill(given.enc, "mean").backward(), 3, id="mean"),
            pytest.param(lambda given: distill(given.enc, "sum").backward(), 3, id="sum"),
            pytest.param(lambda given: distill(given.enc, "none").backward(ONES), 2, id="by patch"),
        ],
    )
    def test_other_calls(self, call: Callable[[Maps], Any], number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        given = of(*maps())
        with Launches(monkeypatch) as launches:
            call(given)
        assert len(launches.kernels) == number
        # autograd starts the backward pass with a 1
        assert launches.others in ([], ["aten.ones_like.default"])

    def test_the_recorder_sees_operators_of_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        find = _labels.find_labels

        def find_after_an_addition(tiling: Any, enc: Tensor, *rest: Any, **how: Any) -> Any:
            return find(tiling, enc + 1, *rest, **how)

        monkeypatch.setattr(_labels, "find_labels", find_after_an_addition)
        given = maps()
        with Launches(monkeypatch) as launches:
            torch.zeros(2, device=DEVICE)
            total(*given)
        assert launches.others == ["aten.zeros.default", "aten.add.Tensor"]
        assert len(OPERATORS) == 6

    def test_only_the_first_axis_of_a_grid_is_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        grids = []

        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                grids.append(grid)
                return lambda *arguments, **constants: None

        _launch.launch(Kernel(), 2**31 - 1)
        assert grids == [(2**31 - 1,)]


class TestMemory:
    @pytest.fixture
    def kept(self) -> Iterator[list[Tensor]]:
        """Collect the tensors that autograd saves for the backward pass."""
        kept: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield kept

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_two_bytes_per_patch_are_saved(self, kept: list[Tensor], dtype: torch.dtype) -> None:
        enc, dec = (leaf(one.to(dtype)) for one in maps())
        loss = KERNELS.loss(of(enc, dec, **masks()), Settings())
        stored = {one.untyped_storage().data_ptr(): one for one in kept}
        own = [stored.pop(one.untyped_storage().data_ptr()) for one in (enc, dec)]
        assert all(one.dtype == dtype for one in own)
        assert loss.requires_grad
        by_type = {one.dtype: one.untyped_storage().nbytes() for one in stored.values()}
        # targets, scales, and one row of the given slot mask
        assert by_type == {torch.int8: 2 * PATCHES.numel(), torch.float32: 8, torch.bool: 4}

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_teacher_is_not_saved(self, kept: list[Tensor], which: int) -> None:
        given = list(maps())
        given[which] = given[which].detach()
        assert total(*given).requires_grad
        places = {one.data_ptr() for one in kept}
        assert given[which].data_ptr() not in places
        assert given[1 - which].data_ptr() in places

    def test_a_distillation_saves_one_byte_per_patch(self, kept: list[Tensor]) -> None:
        logits, _ = maps()
        distill(logits)
        assert sorted(one.nbytes for one in kept) == [4, PATCHES.numel(), logits.nbytes]


class TestRequirements:
    def test_supported_inputs(self) -> None:
        assert kernels.missing() is None
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert kernels.missing(torch.empty(1, 1, kernels.MAX_SLOTS, 2, 2, dtype=dtype, device=DEVICE)) is None

    @pytest.mark.parametrize(
        ("lacking", "message"),
        [
            (torch.empty(1, 1, 80, 2, 2, device=DEVICE), "S <= 64; got S=80"),
            (
                torch.empty(1, 1, 4, 2, 2, device=DEVICE, dtype=torch.float64),
                "float16, bfloat16 or float32; got torch.float64",
            ),
            (torch.empty(1, 1, 4, 2, 2, device="meta"), "a CUDA tensor; got meta"),
            (
                torch.empty(1, 1, 1, 1, 1, device=DEVICE).expand(1, 2, 1, 2**15, 2**15),
                f"T*H*W <= {2**30}; got {2**31}",
            ),
        ],
    )
    def test_the_missing_requirement_is_named(self, lacking: Tensor, message: str) -> None:
        assert kernels.missing(lacking) == message
        fine = torch.empty(1, 1, 4, 2, 2, device=DEVICE)
        assert kernels.missing(fine, lacking) == message

    def test_rocm_is_not_supported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_limits, "IS_ROCM", True)
        with FakeTensorMode():
            assert kernels.missing(torch.empty(1, 1, 4, 2, 2, device="cuda")) == "a CUDA tensor; got one of ROCm"

    @pytest.mark.parametrize(("capability", "lacks"), [((6, 1), True), ((7, 0), False), ((9, 0), False)])
    def test_old_gpus_are_not_supported(
        self, capability: tuple[int, int], lacks: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gpus = {torch.device("cuda", 0): SimpleNamespace(major=capability[0], minor=capability[1])}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
        with FakeTensorMode():
            said = kernels.missing(torch.empty(1, 1, 4, 2, 2, device="cuda"))
        assert said == ("a GPU of compute capability 7.0 or above; got 6.1" if lacks else None)

    def test_an_absent_gpu_is_not_queried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_properties", None)
        with FakeTensorMode():
            assert kernels.missing(torch.empty(1, 1, 4, 2, 2, device="cuda")) is None

    def test_the_library_is_imported_without_triton(self) -> None:
        code = (
            "from importlib.machinery import PathFinder\n"
            "find = PathFinder.find_spec\n"
            "PathFinder.find_spec = lambda name, *rest: None if name.startswith('triton') else find(name, *rest)\n"
            "import ssync_loss.ssync.engines.triton, torch\n"
            "print(ssync_loss.ssync.engines.triton.missing(torch.ones(1, 1, 1, 1, 1)))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "the package triton, which is not installed"


def test_the_torch_path_launches_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    # otherwise comparisons with it would prove nothing
    monkeypatch.setattr(_launch, "launch", None)
    enc, dec = maps()
    run = Run("torch", SSyncCase(enc, dec, None, None))
    assert_close_loss(run.loss, run.values[1] + run.values[2])
