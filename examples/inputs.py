"""Maps of drifting blobs with redundant slots, features that follow them, and a step on such inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Outputs: TypeAlias = Tensor | tuple[Tensor, ...]


def moving_blobs(shape: Mapping[str, int], *, dtype: str = "float32", device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return an encoder and a decoder map (B, T, S, H, W) of drifting blobs. Every third slot is redundant.

    The decoder map has less noise. Both maps are leaves. They are drawn on the CPU, so every device gets the same.
    """
    clips, frames, slots, height, width = (shape[axis] for axis in "BTSHW")
    generator = torch.Generator().manual_seed(0)
    center = torch.rand(clips, 1, slots, 1, 1, 2, generator=generator)
    # two slots share a blob
    center[:, :, 1::3] = center[:, :, 0::3][:, :, : len(range(1, slots, 3))]
    # a blob crosses a fifth of the image in any number of frames
    drift = 0.2 * torch.linspace(0, 1, frames).view(1, frames, 1, 1, 1)
    down = center[..., 0] + drift - torch.linspace(0, 1, height).view(height, 1)
    across = center[..., 1] - torch.linspace(0, 1, width)
    near = (down.square_() + across.square_()).mul_(-20)
    maps = []
    for noise in (0.5, 0.2):
        one = torch.randn(near.shape, generator=generator).mul_(noise).add_(near)
        maps.append(one.to(device, getattr(torch, dtype)).requires_grad_())
    return maps[0], maps[1]


class Features(NamedTuple):
    """Features of a decoder and an encoder (leaves) and anchors, (B, T, D, H, W); labels of both maps (B, T, H, W)."""

    decoder: Tensor
    encoder: Tensor
    anchors: Tensor
    enc_labels: Tensor
    dec_labels: Tensor


class Inputs:
    """Inputs of one shape: B, T, S, H, W and, as needed, channels D, prototypes Kp and weights."""

    def __init__(self, shape: Mapping[str, int], device: str = "cpu", *, dtype: str = "float32") -> None:
        self.size = dict(shape)
        self.device = device
        self.dtype = dtype
        self.patches = self.size["H"] * self.size["W"]

    @cached_property
    def maps(self) -> tuple[Tensor, Tensor]:
        """An encoder and a decoder map (B, T, S, H, W), leaves."""
        return moving_blobs(self.size, dtype=self.dtype, device=self.device)

    @cached_property
    def features(self) -> Features:
        """Features of the same blobs, and the labels of their maps."""
        enc, dec = (one.detach() for one in moving_blobs(self.size))
        clean = torch.einsum("btshw,sd->btdhw", enc.softmax(2), self.normal("S", "D").cpu())
        noise = [self.normal(*clean.shape, seed=seed) for seed in (1, 2, 3)]
        drawn = [one.mul_(0.3).add_(clean.to(self.device)) for one in noise]
        labels = [one.argmax(2).to(self.device) for one in (enc, dec)]
        return Features(drawn[0].requires_grad_(), drawn[1].requires_grad_(), drawn[2], *labels)

    def normal(self, *axes: str | int, seed: int = 0) -> Tensor:
        """Draw normal numbers. An axis is a name or a length."""
        sizes = [self.size[axis] if isinstance(axis, str) else axis for axis in axes]
        return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def leaf(self, *axes: str | int, seed: int = 0) -> Tensor:
        """Draw normal numbers that need a gradient."""
        return self.normal(*axes, seed=seed).requires_grad_()


@dataclass
class Step:
    """A forward, its definition, and the leaves whose gradients the backward computes.

    Attributes:
        forward: the measured call.
        expected: the definition of its outputs.
        leaves: the step has a backward if there are any.
        before: runs before each call, and is not measured.
        seen: selects the outputs that the definition gives.
        num_bytes: the inputs and outputs that a step must move.
        incoming: the gradients of the outputs, made in the first call, as a host has them.
    """

    forward: Callable[[], Any]
    expected: Callable[[], Outputs]
    leaves: list[Tensor] = field(default_factory=list)
    before: Callable[[], object] | None = None
    seen: Callable[[Any], Outputs] = lambda outputs: outputs
    num_bytes: int = 0
    incoming: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, function: Callable[..., Any], reference: Callable[..., Outputs], *given: Any) -> "Step":
        """Make a step of a function and its definition on the same arguments; leaves among them get gradients."""
        leaves = [one for one in given if isinstance(one, Tensor) and one.requires_grad]
        return cls(lambda: function(*given), lambda: reference(*given), leaves)

    def prepare(self) -> None:
        """Run what comes before a call."""
        if self.before is not None:
            self.before()

    def once(self) -> tuple[Any, ...]:
        """Take the step; return its outputs and its gradients, which are not accumulated."""
        outputs = self.forward()
        if not self.leaves:
            return (outputs,)
        grads = self.gradients(as_tuple(outputs))
        return (outputs.detach() if isinstance(outputs, Tensor) else None, *grads)

    def gradients(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the gradients of the leaves. A loss gets a 1, a map gets numbers of both signs."""
        self.incoming = self.incoming or tuple(
            torch.arange(one.numel(), device=one.device, dtype=one.dtype).cos().view_as(one) for one in outputs
        )
        return torch.autograd.grad(outputs, self.leaves, self.incoming)


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    """Return one or several outputs as several."""
    return (outputs,) if isinstance(outputs, Tensor) else outputs
