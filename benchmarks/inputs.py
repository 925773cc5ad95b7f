"""Maps of drifting blobs with redundant slots, and features that follow them; and what a step on them is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Outputs: TypeAlias = Tensor | tuple[Tensor, ...]


def moving_blobs(shape: Mapping[str, int], *, dtype: str = "float32", device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return an encoder and a decoder map (B, T, S, H, W): drifting blobs, every third slot redundant.

    The decoder's map is the less noisy one. Both are leaves that collect gradients. Drawn on the CPU, they are the same
    for all devices.
    """
    clips, frames, slots, height, width = (shape[axis] for axis in "BTSHW")
    generator = torch.Generator().manual_seed(0)
    center = torch.rand(clips, 1, slots, 1, 1, 2, generator=generator)
    # a slot and the one after it sit on the same blob
    center[:, :, 1::3] = center[:, :, 0::3][:, :, : len(range(1, slots, 3))]
    # a blob crosses a fifth of the image, however many frames that takes
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
    """Features (B, T, D, H, W) of a decoder and an encoder, which are leaves, and anchors; labels (B, T, H, W)."""

    decoder: Tensor
    encoder: Tensor
    anchors: Tensor
    enc_labels: Tensor
    dec_labels: Tensor


class Inputs:
    """What clips of a shape give a loss: B, T, S, H, W, channels D, prototypes Kp and weights, as far as asked for.

    What several ask for is made once.
    """

    def __init__(self, shape: Mapping[str, int], device: str = "cpu", *, dtype: str = "float32") -> None:
        self.size = dict(shape)
        self.device = device
        self.dtype = dtype

    @cached_property
    def maps(self) -> tuple[Tensor, Tensor]:
        """An encoder and a decoder map (B, T, S, H, W), leaves."""
        return moving_blobs(self.size, dtype=self.dtype, device=self.device)

    @cached_property
    def features(self) -> Features:
        """Features that follow the same blobs, and the labels of their maps."""
        enc, dec = (one.detach() for one in moving_blobs(self.size))
        clean = torch.einsum("btshw,sd->btdhw", enc.softmax(2), self.normal("S", "D").cpu())
        noise = [self.normal(*clean.shape, seed=seed) for seed in (1, 2, 3)]
        drawn = [one.mul_(0.3).add_(clean.to(self.device)) for one in noise]
        labels = [one.argmax(2).to(self.device) for one in (enc, dec)]
        return Features(drawn[0].requires_grad_(), drawn[1].requires_grad_(), drawn[2], *labels)

    def normal(self, *axes: str | int, seed: int = 0) -> Tensor:
        """Draw numbers, with axes by name or by length."""
        sizes = [self.size[axis] if isinstance(axis, str) else axis for axis in axes]
        return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def leaf(self, *axes: str | int, seed: int = 0) -> Tensor:
        """Draw numbers that get a gradient."""
        return self.normal(*axes, seed=seed).requires_grad_()


@dataclass
class Step:
    """A step of whatever is measured, and what its outputs are by definition, which is asked first."""

    forward: Callable[[], Any]
    expected: Callable[[], Outputs]
    # what gets a gradient; without any, there is no backward
    leaves: list[Tensor] = field(default_factory=list)
    # what has to be done before each call, and is not measured
    before: Callable[[], object] | None = None
    # what of the outputs the definition is about
    seen: Callable[[Any], Outputs] = lambda outputs: outputs
    # that have to be moved: inputs read and outputs written
    num_bytes: int = 0
    # the gradients that come in, at hand from the first call on, as they are where a loss is one of a sum
    incoming: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, function: Callable[..., Any], reference: Callable[..., Outputs], *given: Any) -> "Step":
        """Make a step of a function and its definition on the same arguments; those that can get a gradient do."""
        leaves = [one for one in given if isinstance(one, Tensor) and one.requires_grad]
        return cls(lambda: function(*given), lambda: reference(*given), leaves)

    def prepare(self) -> None:
        """Do what comes before."""
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
        """Return the gradients of the leaves, where a loss gets a 1, and a map numbers of both signs."""
        self.incoming = self.incoming or tuple(
            torch.arange(one.numel(), device=one.device, dtype=one.dtype).cos().view_as(one) for one in outputs
        )
        return torch.autograd.grad(outputs, self.leaves, self.incoming)


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    """Return one or several outputs as several."""
    return (outputs,) if isinstance(outputs, Tensor) else outputs
