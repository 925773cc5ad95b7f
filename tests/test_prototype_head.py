"""The prototype head: cosines with prototypes, initial weights, gradients, types, errors."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from ssync_loss import CenteredCrossEntropy, PrototypeHead
from ssync_loss.methods.ino.reference import reference_prototype_head


def small(**given: Any) -> PrototypeHead:
    """Return a head with large random weights."""
    head = PrototypeHead(6, **{"Kp": 7, "hidden": 5, "bottleneck": 4, **given})
    with torch.no_grad():
        for one in head.parameters():
            one.mul_(20)
    return head


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (2, 3, 6)), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def by_hand(head: PrototypeHead, x: Tensor) -> Tensor:
    return reference_prototype_head(x.double(), head.state_dict())


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_it_equals_its_definition(layers: int) -> None:
    head = small(layers=layers)
    x = tokens()
    torch.testing.assert_close(head(x).double(), by_hand(head, x), rtol=0, atol=1e-5)
    torch.testing.assert_close(head.double()(x.double()), by_hand(head, x), rtol=0, atol=1e-12)
    assert sum(isinstance(one, nn.GELU) for one in head.mlp) == layers - 1


def test_the_defaults_are_published() -> None:
    head = PrototypeHead(384)
    shapes = {name: tuple(one.shape) for name, one in head.named_parameters()}
    assert shapes == {
        "prototypes": (4096, 256),
        "mlp.0.weight": (2048, 384),
        "mlp.0.bias": (2048,),
        "mlp.2.weight": (2048, 2048),
        "mlp.2.bias": (2048,),
        "mlp.4.weight": (256, 2048),
        "mlp.4.bias": (256,),
    }
    for name, one in head.named_parameters():
        if name.endswith("bias"):
            assert not one.any()
        else:
            assert abs(one.std().item() - 0.02) < 2e-4
            assert abs(one.mean().item()) < 2e-4


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 4, 6), (0, 6), (2, 0, 6)])
def test_tokens_may_have_any_shape_and_are_independent(shape: tuple[int, ...]) -> None:
    head = small()
    x = tokens(*shape)
    cosines = head(x)
    assert cosines.shape == (*shape[:-1], 7)
    for one, other in zip(x.view(-1, 6), cosines.view(-1, 7), strict=True):
        torch.testing.assert_close(head(one), other)


def test_norms_of_prototypes_do_not_matter() -> None:
    head = small().double()
    x = tokens(dtype=torch.float64)
    expected = head(x)
    (expected[..., 0].sum() + expected.square().sum()).backward()
    assert head.prototypes.grad is not None
    along = (head.prototypes.grad * head.prototypes).sum(1)
    assert along.abs().max() < 1e-12 < head.prototypes.grad.abs().sum(1).min()
    with torch.no_grad():
        head.prototypes.mul_(torch.arange(1.0, 8).unsqueeze(1))
    torch.testing.assert_close(head(x), expected, rtol=0, atol=1e-14)


def test_gradcheck() -> None:
    head = small(layers=2).double()
    x = tokens(3, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: head(x), (x, *head.parameters()))


def test_a_zero_token_has_finite_gradients() -> None:
    head = PrototypeHead(6, Kp=7, hidden=5, bottleneck=4)
    x = tokens().clone()
    # biases are 0, so all layers return 0
    x[0, 0] = 0
    x.requires_grad_()
    cosines = head(x)
    assert not cosines[0, 0].any()
    CenteredCrossEntropy(7)(cosines, cosines.detach().roll(1, 2)).backward()
    assert x.grad is not None
    assert not x.grad[0, 0].any()
    assert x.grad[0, 1].any()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in head.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_in_half_precision_gives_float32_cosines(dtype: torch.dtype) -> None:
    head = small().to(dtype)
    x = tokens(dtype=dtype).requires_grad_()
    cosines = head(x)
    cosines.square().sum().backward()
    assert cosines.dtype == torch.float32
    torch.testing.assert_close(cosines.double(), by_hand(head, x.detach()), rtol=0, atol=0.05)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert head.prototypes.grad is not None
    assert head.prototypes.grad.dtype == dtype


def test_autocast_applies_to_layers_but_not_to_cosines() -> None:
    head = small()
    x = tokens()
    seen = []
    head.mlp[-1].register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cosines = head(x)
        cosines.square().sum().backward()
    assert seen[0].dtype == torch.bfloat16
    assert cosines.dtype == torch.float32
    units, prototypes = (nn.functional.normalize(one.float(), dim=-1) for one in (seen[0], head.prototypes))
    torch.testing.assert_close(cosines, units @ prototypes.T, rtol=0, atol=1e-6)
    assert all(one.grad is not None and one.grad.any() for one in head.parameters())


@pytest.mark.usefixtures("fresh_compiler")
def test_it_compiles_to_one_graph() -> None:
    head = small()
    counter = CompileCounterWithBackend("aot_eager")
    x = tokens()
    cosines = torch.compile(head, fullgraph=True, backend=counter)(x)
    torch.testing.assert_close(cosines, head(x))
    parameters = tuple(head.parameters())
    actual, expected = (torch.autograd.grad(one.square().sum(), parameters) for one in (cosines, head(x)))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


def test_fake_tensors() -> None:
    head = small()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(2, 3, 6, requires_grad=True)
        cosines = head(x)
        cosines.sum().backward()
        assert cosines.shape == (2, 3, 7)
        assert x.grad is not None


def test_copies_are_equal() -> None:
    head = small()
    x = tokens()
    twins = [copy.deepcopy(head), pickle.loads(pickle.dumps(head)), small()]
    twins[2].load_state_dict(head.state_dict())
    for twin in twins:
        assert torch.equal(twin(x), head(x))
    head.reset_parameters()
    assert not torch.allclose(twins[0](x), head(x), atol=1e-2)


def test_repr() -> None:
    assert repr(small()).startswith("PrototypeHead(\n  Kp=7\n  (mlp): Sequential(\n    (0): Linear(in_features=6")


@pytest.mark.parametrize("name", ["C", "Kp", "hidden", "bottleneck", "layers"])
def test_a_wrong_setting_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be at least 1; got 0"):
        PrototypeHead(**{"C": 6, name: 0})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(()), ValueError, r"`x` must have shape \(..., C=6\); got \(\)"),
        (torch.zeros(2, 5), ValueError, r"`x` must have shape \(..., C=6\); got \(2, 5\)"),
    ],
)
def test_a_wrong_tensor_is_named(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small()(x)


# --- tokens of another type ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layers", [torch.bfloat16, torch.float32, torch.float64])
def test_tokens_are_cast_to_the_type_of_the_layers(layers: torch.dtype, dtype: torch.dtype) -> None:
    head = PrototypeHead(3, Kp=4, hidden=5, bottleneck=2).to(layers)
    x = torch.randn(6, 3).to(dtype).requires_grad_()
    cosines = head(x)
    assert cosines.dtype == torch.promote_types(layers, torch.float32)
    assert torch.equal(cosines, head(x.detach().to(layers)))
    cosines.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
