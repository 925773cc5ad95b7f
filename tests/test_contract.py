"""The contract itself: a correct loss passes, and every check fails if its rule is broken."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from contract import Case, LossContract


def masked(x: Tensor, t: Tensor, keep: Tensor, *, weight: float = 2.0) -> Tensor:
    """Return the mean square over a mask."""
    if not weight > 0:
        raise ValueError(f"`weight` must be above 0; got {weight}.")
    dtype = torch.promote_types(torch.promote_types(x.dtype, t.dtype), torch.float32)
    x, t = (torch.where(keep, one.to(dtype), 0.0) for one in (x, t.detach()))
    return weight * (x - t).square().sum() / keep.sum().clamp_min(1)


class Masked(nn.Module):
    def __init__(self, *, weight: float = 2.0) -> None:
        super().__init__()
        if not weight > 0:
            raise ValueError(f"`weight` must be above 0; got {weight}.")
        self.weight = weight

    @property
    def settings(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def forward(self, x: Tensor, t: Tensor, keep: Tensor) -> Tensor:
        return masked(x, t, keep, weight=self.weight)

    def extra_repr(self) -> str:
        return f"weight={self.weight!r}"


class TestMasked(LossContract):
    loss = Masked
    function = staticmethod(masked)
    twice_differentiable = True
    settings: ClassVar = {"weight": 3.0}
    not_applicable: ClassVar = {"wrong_tensors": "this loss checks nothing"}
    refused: ClassVar = [({"weight": 0.0}, ValueError, r"`weight` must be above 0; got 0.0")]

    def case(self) -> Case:
        return Case(
            self.make(), {"x": torch.randn(2, 3, 4)}, {"t": torch.randn(2, 3, 4), "keep": torch.rand(2, 3, 4) < 0.7}
        )

    def unselected(self, case: Case) -> dict[str, Tensor]:
        return dict.fromkeys(("x", "t"), ~case.others["keep"])


def mean(x: Tensor, t: Tensor, keep: Tensor) -> Tensor:
    return (x - t.detach())[keep].square().mean()


class CountedBackward(torch.autograd.Function):
    """Returns a different gradient in every call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.calls = 0
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.calls += 1
        return grad * ctx.calls


class UnseenByAutograd(torch.autograd.Function):
    """Saves its input without telling autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 2 * grad * ctx.x


counted: Callable[[Tensor], Tensor] = CountedBackward.apply
unseen: Callable[[Tensor], Tensor] = UnseenByAutograd.apply


class Stateful(Masked):
    calls = 0

    def forward(self, x: Tensor, t: Tensor, keep: Tensor) -> Tensor:
        self.calls += 1
        return masked(x * self.calls, t, keep)


class Unpicklable(Masked):
    def __init__(self, *, weight: float = 2.0) -> None:
        super().__init__(weight=weight)
        self.callback = lambda: None


class Forgetful(Masked):
    def __deepcopy__(self, memo: Any) -> Masked:
        return type(self)(weight=1.0)


class Remembering(Masked):
    def __init__(self, *, weight: float = 2.0) -> None:
        super().__init__(weight=weight)
        self.register_buffer("steps", torch.zeros(1))


class Frozen(Masked):
    def __init__(self, *, weight: float = 2.0) -> None:
        super().__init__(weight=weight)
        self.given = weight

    @property
    def settings(self) -> dict[str, Any]:
        return {"weight": self.given}

    def forward(self, x: Tensor, t: Tensor, keep: Tensor) -> Tensor:
        return masked(x, t, keep, weight=self.given)


class Silent(Masked):
    def extra_repr(self) -> str:
        return ""


class Careless(Masked):
    def __init__(self, *, weight: float = 2.0) -> None:
        nn.Module.__init__(self)
        self.weight = weight


def formula(compute: Callable[[Tensor, Tensor, Tensor], Tensor]) -> type[Masked]:
    """Return a loss class for a formula."""

    class Formula(Masked):
        def forward(self, x: Tensor, t: Tensor, keep: Tensor) -> Tensor:
            return compute(x, t, keep)

    return Formula


BROKEN: list[tuple[str, type[Masked], tuple[Any, ...]]] = [
    ("graph", formula(lambda x, t, keep: (x - t)[keep].square().mean()), ()),
    ("graph", formula(lambda x, t, keep: masked(x, t, keep).detach()), ()),
    ("graph", formula(lambda x, t, keep: masked(x, t.detach().mul_(2), keep)), ()),
    ("no_gradient", formula(lambda x, t, keep: masked(x, t, keep) * (1 if torch.is_grad_enabled() else 2)), ()),
    ("gradcheck", formula(lambda x, t, keep: masked(x * x.detach(), t, keep)), ()),
    ("second_derivative", formula(lambda x, t, keep: (2 * x * x.detach() - x.detach().square()).sum()), ()),
    ("backward_twice", formula(lambda x, t, keep: masked(counted(x), t, keep)), ()),
    ("checkpoint", Stateful, ()),
    ("save_on_cpu", formula(lambda x, t, keep: torch.func.grad_and_value(lambda one: masked(one, t, keep))(x)[1]), ()),
    ("in_place", formula(lambda x, t, keep: unseen(x).sum()), ()),
    ("determinism", formula(lambda x, t, keep: masked(x * torch.rand(()), t, keep)), ()),
    ("determinism", formula(lambda x, t, keep: masked(x + 0 * torch.empty(4), t, keep)), ()),
    ("halves", formula(mean), (torch.float16,)),
    ("widest_type", formula(lambda x, t, keep: masked(x.float(), t.float(), keep)), ()),
    ("autocast", formula(lambda x, t, keep: masked(x @ torch.eye(4), t, keep)), (torch.bfloat16,)),
    ("strides", formula(lambda x, t, keep: masked(x.as_strided(x.shape, (12, 4, 1)), t, keep)), ("transposed",)),
    ("compile", formula(lambda x, t, keep: masked(x, t, keep) * (2 if torch.compiler.is_compiling() else 1)), ()),
    ("compile", formula(lambda x, t, keep: masked(x, t, keep) if keep.any() else x.sum()), ()),
    ("default_compiler", formula(lambda x, t, keep: masked(x, t, keep) if keep.any() else x.sum()), ()),
    ("export", formula(lambda x, t, keep: masked(x, t, keep) * (2 if torch.compiler.is_compiling() else 1)), (False,)),
    ("fake_tensors", formula(lambda x, t, keep: masked(x, t, keep) * keep.sum().item()), ()),
    ("empty", formula(mean), (torch.float32,)),
    ("poison", formula(lambda x, t, keep: ((x - t.detach()) * keep).square().sum()), (float("nan"),)),
    ("dirt", formula(lambda x, t, keep: masked(x.nan_to_num(), t, keep)), (float("nan"),)),
    ("copies", Forgetful, ("deepcopy",)),
    ("copies", Unpicklable, ("pickle",)),
    ("state_dict", Remembering, ()),
    ("settings", Frozen, ()),
    ("settings_by_name", Frozen, ()),
    ("repr", Silent, ()),
    ("function", formula(masked), ()),
    ("wrong_tensors", Masked, ()),
    ("refused", Careless, TestMasked.refused[0]),
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize(("check", "broken", "given"), BROKEN, ids=[f"{i}-{one[0]}" for i, one in enumerate(BROKEN)])
def test_a_broken_loss_fails(check: str, broken: type[Masked], given: tuple[Any, ...]) -> None:
    class Broken(TestMasked):
        loss = broken

    with pytest.raises((AssertionError, RuntimeError, AttributeError, pytest.fail.Exception)):
        getattr(Broken(), f"test_{check}")(*given)


def test_every_check_has_a_broken_loss() -> None:
    checks = {name.removeprefix("test_") for name in dir(LossContract) if name.startswith("test_")}
    assert checks == {check for check, _, _ in BROKEN}


def test_unknown_checks_cannot_be_left_out() -> None:
    with pytest.raises(AssertionError, match=r"leaves out checks that are not there: \['gradchek'\]"):
        type("Wrong", (TestMasked,), {"not_applicable": {"gradchek": "a typo"}})
