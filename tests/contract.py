"""The checks that every loss must pass. A test class inherits them and supplies one case.

``not_applicable`` names the checks to skip, with reasons.
"""

import copy
import inspect
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

NAN, INF = float("nan"), float("inf")
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda one: pickle.loads(pickle.dumps(one))}
HALVES = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
EXPORTS = pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])


def refusal(message: str, strict: bool) -> str | None:
    """Return the expected message of a refused export. Strict export in torch 2.6 replaces every message."""
    return None if strict and torch.__version__ < "2.7" else message


# the same values with other strides; "expanded" repeats the first clip
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda one: one.mT.contiguous().mT,
    "channels last": lambda one: one.movedim(min(2, one.ndim - 2), -1).contiguous().movedim(-1, min(2, one.ndim - 2)),
    "sliced": lambda one: one.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda one: one[:1].expand_as(one),
}


class Case(NamedTuple):
    """A module and its arguments. The first axis of every tensor is clips, and there is a second axis."""

    module: nn.Module
    # the inputs get gradients
    inputs: dict[str, Tensor]
    others: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        given = self.inputs | self.others
        return {name: one for name, one in given.items() if isinstance(one, Tensor)}

    def floats(self) -> dict[str, Tensor]:
        return {name: one for name, one in self.tensors().items() if one.is_floating_point()}

    def replaced(self, **given: Tensor) -> "Case":
        """Return the case with some of its tensors replaced."""
        inputs, others = ({name: given.get(name, one) for name, one in some.items()} for some in self[1:])
        return Case(self.module, inputs, others)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Case":
        """Return the case with every tensor changed."""
        return self.replaced(**{name: change(one) for name, one in self.tensors().items()})

    def to(self, dtype: torch.dtype) -> "Case":
        """Return the case with its floating-point tensors converted to a type."""
        return self.replaced(**{name: one.to(dtype) for name, one in self.floats().items()})

    def clips(self, *numbers: int) -> "Case":
        """Return the case with the given clips of its batch."""
        return self.mapped(lambda one: one[torch.tensor(numbers, dtype=torch.int64)])

    def owned(self) -> "Case":
        """Return the case with a copy of the module, and with inputs that are leaves."""
        inputs = {name: one.detach().requires_grad_() for name, one in self.inputs.items()}
        return Case(copy.deepcopy(self.module), inputs, self.others)


class Step(NamedTuple):
    """The results of a forward and a backward pass."""

    loss: Tensor
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]


def value(case: Case, call: Callable[..., Tensor] | None = None) -> Tensor:
    """Return the loss of a case, computed by the module or by a wrapper of it."""
    return (case.module if call is None else call)(**case.inputs, **case.others)


def run(case: Case, call: Callable[..., Tensor] | None = None) -> Step:
    loss = value(case, call)
    gradients = torch.autograd.grad(loss, list(case.inputs.values()))
    return Step(loss.detach(), dict(zip(case.inputs, gradients, strict=True)), case.module.state_dict())


def step(case: Case) -> Step:
    """Run a copy of a case."""
    return run(case.owned())


def assert_same(actual: Step, expected: Step, tol: float = 0.0) -> None:
    """Compare two steps. The tolerance is a fraction of each tensor's largest magnitude."""
    pairs = [(actual.loss, expected.loss)]
    for some, other in ((actual.gradients, expected.gradients), (actual.state, expected.state)):
        assert some.keys() == other.keys()
        pairs += [(some[name], other[name]) for name in other]
    for one, wanted in pairs:
        scale = wanted.abs().max().item() if wanted.numel() else 0.0
        torch.testing.assert_close(one, wanted, rtol=0, atol=tol * scale)


class LossContract:
    """The checks. A test class sets these attributes for its loss."""

    loss: ClassVar[type[nn.Module]]
    # the functional form of the module, as a static method
    function: ClassVar[Callable[..., Tensor] | None] = None
    # the settings of the case
    knobs: ClassVar[dict[str, Any]] = {}
    # another value of every setting: `settings` change the loss of the case, `inert` ones do not
    settings: ClassVar[dict[str, Any]] = {}
    inert: ClassVar[dict[str, Any]] = {}
    # whether the loss has second derivatives; otherwise they must raise an error
    twice_differentiable: ClassVar[bool] = False
    # keys of the state dict
    state: ClassVar[list[str]] = []
    # the reason why a compiled graph serves only one batch size
    one_size: ClassVar[str] = ""
    # tolerance for another order of summation in float32
    tolerance: ClassVar[float] = 1e-6
    # arguments that do not promote the loss to float64, with the reason
    narrow: ClassVar[dict[str, str]] = {}
    # arguments whose NaN and infinity may leave the loss finite, with the reason
    hides_dirt: ClassVar[dict[str, str]] = {}
    # wrong arguments or settings, and their error messages
    refused: ClassVar[list[tuple[dict[str, Any], type[Exception], str]]] = []
    not_applicable: ClassVar[dict[str, str]] = {}

    def case(self) -> Case:
        """Return a small case of two clips, in float32."""
        raise NotImplementedError

    def make(self, **settings: Any) -> nn.Module:
        """Return a module with the settings of the case, updated by the given ones."""
        return self.loss(**self.knobs | settings)

    def large_case(self) -> Case:
        """Return a case for the default compiler, whose sizes fill whole processor vectors and parts of them."""
        return self.fresh()

    def empty_cases(self, case: Case) -> dict[str, Case]:
        """Return cases whose loss must be exactly 0."""
        return {"no clips": case.clips()}

    def unselected(self, case: Case) -> dict[str, Tensor]:
        """Return masks of the cells that must not matter, by argument."""
        raise NotImplementedError

    def fresh(self) -> Case:
        """Return the case, which is the same in every call."""
        torch.manual_seed(0)
        return self.case().mapped(Tensor.detach)

    def closed(self, case: Case) -> tuple[Callable[..., Tensor], list[Tensor]]:
        """Return the loss as a function of only its inputs, and the inputs."""

        def loss(*given: Tensor) -> Tensor:
            module = copy.deepcopy(case.module)
            return value(Case(module, dict(zip(case.inputs, given, strict=True)), case.others))

        return loss, list(case.owned().inputs.values())

    def __init_subclass__(cls) -> None:
        unknown = [name for name in cls.not_applicable if not hasattr(cls, f"test_{name}")]
        assert not unknown, f"{cls.__name__} leaves out checks that are not there: {unknown}"

    @pytest.fixture(autouse=True)
    def _applies(self, request: pytest.FixtureRequest) -> None:
        name = request.function.__name__.removeprefix("test_")
        if name in self.not_applicable:
            pytest.skip(self.not_applicable[name])

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "wrong" in metafunc.fixturenames:
            # the class that defines the refusals runs them, its subclasses do not
            own = type(self).__dict__.get("refused", [])
            nothing = pytest.param({}, Exception, "", marks=pytest.mark.skip("another case of the loss has them"))
            metafunc.parametrize(("wrong", "error", "message"), own or [nothing])

    # --- the graph ---

    def test_graph(self) -> None:
        case = self.fresh().owned()
        case = case.replaced(**{name: one.detach().requires_grad_() for name, one in case.floats().items()})
        before = {name: one.detach().clone() for name, one in case.tensors().items()}
        versions = {name: one._version for name, one in case.tensors().items()}
        loss = value(case)
        assert loss.shape == ()
        assert loss.isfinite()
        assert loss != 0
        loss.backward()
        for name, one in case.floats().items():
            assert (one.grad is not None and bool(one.grad.any())) == (name in case.inputs), name
            assert (one.grad is None) == (name not in case.inputs), name
        assert not any(one.requires_grad for one in case.module.buffers())
        assert versions == {name: one._version for name, one in case.tensors().items()}
        assert all(torch.equal(one, before[name]) for name, one in case.tensors().items())

    def test_no_gradient(self) -> None:
        case = self.fresh()
        expected = step(case).loss
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(value(case.owned()), expected)
        # in training mode a loss may warn about a detached map
        case.module.eval()
        assert not value(case).requires_grad

    def test_gradcheck(self) -> None:
        assert torch.autograd.gradcheck(*self.closed(self.fresh().to(torch.float64)))

    def test_second_derivative(self) -> None:
        case = self.fresh().to(torch.float64)
        if self.twice_differentiable:
            assert torch.autograd.gradgradcheck(*self.closed(case))
            return
        case = case.owned()
        for one in torch.autograd.grad(value(case), list(case.inputs.values()), create_graph=True):
            with pytest.raises(RuntimeError, match=r"no second derivative|not implemented"):
                one.sum().backward(retain_graph=True)

    def test_backward_twice(self) -> None:
        case = self.fresh().to(torch.float64).owned()
        inputs, loss = list(case.inputs.values()), value(case)
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        kept = [one.clone() for one in first]
        second = torch.autograd.grad(loss, inputs, retain_graph=True)
        chained = torch.autograd.grad(-3 * loss.square(), inputs)
        for wanted, *others, last in zip(kept, first, second, chained, strict=True):
            assert all(torch.equal(one, wanted) for one in others)
            torch.testing.assert_close(last, -6 * loss.detach() * wanted, rtol=1e-10, atol=1e-15)

    def test_checkpoint(self) -> None:
        case = self.fresh().owned()
        assert_same(run(case, partial(checkpoint, case.module, use_reentrant=False)), step(self.fresh()))

    def test_save_on_cpu(self) -> None:
        expected = step(self.fresh())
        with torch.autograd.graph.save_on_cpu():
            assert_same(step(self.fresh()), expected)

    def test_in_place(self) -> None:
        """If a tensor is overwritten before the backward pass, autograd raises an error or the gradient is right."""
        expected = step(self.fresh()).gradients
        given = self.fresh()
        for name in [*given.tensors(), *given.module.state_dict()]:
            case = self.fresh().mapped(Tensor.clone).owned()
            loss = value(case)
            with torch.no_grad():
                (case.tensors() | dict(case.module.named_buffers()))[name].zero_()
            try:
                gradients = torch.autograd.grad(loss, list(case.inputs.values()))
            except RuntimeError as error:
                if "modified by an inplace operation" in str(error):
                    continue
                raise
            for one, wanted in zip(gradients, expected.values(), strict=True):
                assert torch.equal(one, wanted), name

    def test_determinism(self) -> None:
        case = self.fresh()
        expected = step(case)
        assert_same(step(case), expected)
        # deterministic mode fills uninitialized memory with NaN
        torch.use_deterministic_algorithms(True)
        try:
            assert_same(step(case), expected)
        finally:
            torch.use_deterministic_algorithms(False)

    # --- types, memory ---

    @HALVES
    def test_halves(self, half: torch.dtype) -> None:
        case = self.fresh().to(half)
        actual, wide = step(case), step(case.to(torch.float32))
        assert actual.loss.dtype == torch.float32
        assert_same(actual, wide._replace(gradients={name: one.to(half) for name, one in wide.gradients.items()}))

    def test_widest_type(self) -> None:
        case = self.fresh()
        expected = step(case.to(torch.float64)).loss
        for name, given in case.floats().items():
            actual = step(case.replaced(**{name: given.double()}))
            assert actual.loss.dtype == (torch.float32 if name in self.narrow else torch.float64)
            for argument, one in actual.gradients.items():
                assert one.dtype == (torch.float64 if argument == name else torch.float32)
            torch.testing.assert_close(actual.loss.double(), expected, rtol=1e-5, atol=0)

    @HALVES
    def test_autocast(self, half: torch.dtype) -> None:
        expected = step(self.fresh())
        with torch.autocast("cpu", dtype=half):
            assert_same(step(self.fresh()), expected)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_strides(self, layout: str) -> None:
        case = self.fresh().mapped(LAYOUTS[layout])
        assert not all(one.is_contiguous() for one in case.tensors().values())
        assert_same(step(case), step(case.mapped(Tensor.contiguous)), self.tolerance)

    # --- compilers ---

    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile(self) -> None:
        """One graph serves batches of any size, or of one size if `one_size` is set."""
        counter = CompileCounterWithBackend("aot_eager")
        module = self.fresh().owned().module
        compiled = torch.compile(module, fullgraph=True, backend=counter)
        batches = [(0, 1)] if self.one_size else [(0, 1, 0), (1, 0, 0, 1, 1)]
        for clips in batches:
            batch = self.fresh().clips(*clips)._replace(module=module)
            expected = step(batch)
            batch = batch.owned()._replace(module=module)
            for one in batch.tensors().values() if len(batches) > 1 else ():
                # makes it an error to specialize the size
                torch._dynamo.mark_dynamic(one, 0)
            assert_same(run(batch, compiled), expected, self.tolerance)
        assert counter.frame_count == 1

    @EXPORTS
    @pytest.mark.usefixtures("fresh_compiler")
    def test_export(self, strict: bool) -> None:
        """An exported program has gradients, whether or not the example inputs required them."""
        case = self.fresh()
        program = torch.export.export(case.module, (), case.inputs | case.others, strict=strict).module()
        assert_same(run(self.fresh().owned()._replace(module=program)), step(self.fresh()), self.tolerance)

    # the compiler's own modules emit deprecations and hints
    @pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
    @pytest.mark.usefixtures("fresh_compiler", "fresh_kernels")
    def test_default_compiler(self) -> None:
        case = self.large_case().owned()
        expected = step(case)
        assert_same(run(case, torch.compile(case.module, fullgraph=True)), expected, 10 * self.tolerance)

    def test_fake_tensors(self) -> None:
        """The loss reads no data on the host."""
        case = self.fresh().owned()
        expected = step(self.fresh())
        with FakeTensorMode() as mode:
            for part in case.module.modules():
                for name, one in part.named_buffers(recurse=False):
                    part._buffers[name] = mode.from_tensor(one)
            actual = run(case.mapped(mode.from_tensor))
        assert actual.loss.shape == ()
        assert actual.loss.dtype == expected.loss.dtype
        for name, one in expected.gradients.items():
            assert (actual.gradients[name].shape, actual.gradients[name].dtype) == (one.shape, one.dtype)

    # --- empty, masked and nonfinite input ---

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_empty(self, dtype: torch.dtype) -> None:
        for name, case in self.empty_cases(self.fresh()).items():
            narrow = case.to(dtype)
            zero = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32))
            gradients = {argument: torch.zeros_like(one) for argument, one in narrow.inputs.items()}
            actual = step(narrow)
            assert torch.equal(actual.loss, zero), name
            assert_same(actual._replace(state={}), Step(zero, gradients, {}))
            for key, one in case.module.state_dict().items():
                assert torch.equal(actual.state[key].to(one.dtype), one), name

    @pytest.mark.parametrize("rubbish", [NAN, INF, -INF])
    def test_poison(self, rubbish: float) -> None:
        case = self.fresh()
        masks, expected = self.unselected(case), step(case)
        assert masks
        assert all(one.any() and not one.all() for one in masks.values())
        filled = {name: case.floats()[name].masked_fill(mask, rubbish) for name, mask in masks.items()}
        assert_same(step(case.replaced(**filled)), expected)
        for name in masks.keys() & case.inputs.keys():
            assert not expected.gradients[name].masked_select(masks[name]).any()

    @pytest.mark.parametrize("dirt", [NAN, INF])
    def test_dirt(self, dirt: float) -> None:
        """NaN or infinity in a selected cell makes the loss undefined."""
        case = self.fresh()
        masks = {} if "poison" in self.not_applicable else self.unselected(case)
        for name, one in case.floats().items():
            counts = ~masks.get(name, torch.zeros((), dtype=torch.bool)).expand_as(one)
            dirty = one.clone()
            dirty[tuple(counts.nonzero()[0])] = dirt
            loss = value(case.replaced(**{name: dirty}).owned())
            assert not loss.isfinite() or name in self.hides_dirt, name

    # --- the module ---

    @pytest.mark.parametrize("way", COPIES)
    def test_copies(self, way: str) -> None:
        case = self.fresh()
        case.module.eval()
        twin = COPIES[way](case.module)
        assert repr(twin) == repr(case.module)
        assert not twin.training
        assert_same(step(case._replace(module=twin)), step(case))
        memory = {one.data_ptr() for one in case.module.buffers()}
        assert memory.isdisjoint(one.data_ptr() for one in twin.buffers())

    def test_state_dict(self) -> None:
        case = self.fresh()
        assert list(case.module.state_dict()) == self.state
        assert not list(case.module.parameters())
        twin = self.make()
        for one in twin.buffers():
            one.zero_()
        twin.load_state_dict(case.module.state_dict(), strict=True)
        assert_same(step(case._replace(module=twin)), step(case))

    def test_settings(self) -> None:
        """Each setting is an attribute that takes effect when it is set."""
        case = self.fresh()
        expected = step(case).loss
        parameters = inspect.signature(type(case.module)).parameters.values()
        others = self.settings | self.inert
        assert {one.name for one in parameters if one.kind is one.KEYWORD_ONLY} == others.keys()
        for name, other in others.items():
            made, changed = self.make(**{name: other}), copy.deepcopy(case.module)
            assert getattr(made, name) == other != getattr(changed, name)
            setattr(changed, name, other)
            loss = step(case._replace(module=made)).loss
            assert torch.equal(step(case._replace(module=changed)).loss, loss), name
            assert torch.isclose(loss, expected, rtol=10 * self.tolerance) == (name in self.inert), name

    def test_settings_by_name(self) -> None:
        module: Any = self.fresh().module
        for name, other in (self.settings | self.inert).items():
            made: Any = self.make(**{name: other})
            assert made.settings[name] == other != module.settings[name]
            setattr(made, name, getattr(module, name))
            assert made.settings[name] == module.settings[name]

    def test_repr(self) -> None:
        """The repr shows every setting that differs from its default."""
        parameters = inspect.signature(type(self.make())).parameters
        for name, other in (self.settings | self.inert).items():
            shown = repr(self.make(**{name: other}))
            for setting, one in (self.knobs | {name: other}).items():
                if one != parameters[setting].default:
                    assert f"{setting}={one!r}" in shown

    def test_function(self) -> None:
        """The module passes its settings to the function."""
        function = type(self).function
        if function is None:
            pytest.skip("the module has no functional form")
        for changed in [{}, *({name: other} for name, other in (self.settings | self.inert).items())]:
            knobs = self.knobs | changed
            case = self.fresh()._replace(module=self.make(**knobs)).owned()
            parts = dict(case.owned().module.named_children())
            assert torch.equal(value(case), function(**case.inputs, **case.others, **parts, **knobs))

    def test_wrong_tensors(self) -> None:
        """The error names a tensor of a wrong kind, shape or device."""
        case = self.fresh()
        case.module.eval()
        given = case.inputs | case.others
        optional = inspect.signature(case.module.forward).parameters
        for name, one in case.tensors().items():
            wanted = "be boolean" if one.dtype == torch.bool else "hold integers"
            wanted, other = ("be floating point", one.long()) if one.is_floating_point() else (wanted, one.float())
            wrong: list[tuple[Any, type[Exception], str]] = [
                (other, TypeError, f"`{name}` must {wanted}; got {other.dtype}"),
                ([0.0], TypeError, f"`{name}` must be a tensor; got list"),
                (one[0, 0], ValueError, f"`{name}` must have|must have the shape of `{name}`"),
            ]
            if len(case.tensors()) > 1:
                device = f"`{name}` must be on the device of|must be on the device of `{name}`"
                wrong.append((one.to("meta"), ValueError, device))
            if optional[name].default is inspect.Parameter.empty:
                wrong.append((None, TypeError, f"`{name}` must be a tensor; got NoneType"))
            for instead, error, message in wrong:
                with pytest.raises(error, match=message):
                    case.module(**given | {name: instead})

    def test_refused(self, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
        case = self.fresh()
        given = case.inputs | case.others
        settings = {name: one for name, one in wrong.items() if name not in given}
        with pytest.raises(error, match=message):
            self.make(**settings) if settings else case.module(**given | wrong)
        function = type(self).function
        if function is not None:
            with pytest.raises(error, match=message):
                function(**given | dict(case.module.named_children()) | self.knobs | wrong)
