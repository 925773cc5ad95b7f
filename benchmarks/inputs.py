"""Maps of drifting blobs with redundant slots, and features that follow them; and what a step on them is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Outputs: TypeAlias = Tensor | tuple[Tensor, ...]


def moving_blobs(
    shape: Mapping[str, int], *, dtype: str = "float32", device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return an encoder and a decoder map (B, T, S, H, W): drifting blobs, every third slot redundant.

    The decoder's map is the less noisy one. Both are leaves that collect gradients, drawn where they live.
    """
    clips, frames, slots, height, width = (shape[axis] for axis in "BTSHW")
    generator = torch.Generator(device).manual_seed(seed)
    center = torch.rand(clips, 1, slots, 1, 1, 2, generator=generator, device=device)
    # a slot and the one after it sit on the same blob
    center[:, :, 1::3] = center[:, :, 0::3][:, :, : len(range(1, slots, 3))]
    # a blob crosses a fifth of the image, however many frames that takes
    drift = 0.2 * torch.linspace(0, 1, frames, device=device).view(1, frames, 1, 1, 1)
    down = center[..., 0] + drift - torch.linspace(0, 1, height, device=device).view(height, 1)
    across = center[..., 1] - torch.linspace(0, 1, width, device=device)
    near = (down.square_() + across.square_()).mul_(-20)
    maps = []
    for noise in (0.5, 0.2):
        one = torch.randn(near.shape, generator=generator, device=device).mul_(noise).add_(near)
        maps.append(one.to(getattr(torch, dtype)).requires_grad_())
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

    What several ask for is made once. Drawn on the CPU, it is the same for all devices.
    """

    def __init__(
        self, shape: Mapping[str, int], device: str = "cpu", *, dtype: str = "float32", drawn_on: str | None = None
    ) -> None:
        self.size = dict(shape)
        self.device = device
        self.dtype = dtype
        self.drawn_on = drawn_on or device

    @cached_property
    def maps(self) -> tuple[Tensor, Tensor]:
        """An encoder and a decoder map (B, T, S, H, W), leaves."""
        enc, dec = moving_blobs(self.size, dtype=self.dtype, device=self.drawn_on)
        return self._here(enc), self._here(dec)

    @cached_property
    def features(self) -> Features:
        """Features that follow the same blobs, and the labels of their maps."""
        maps = [one.detach() for one in moving_blobs(self.size, device=self.drawn_on)]
        generator = torch.Generator(self.drawn_on).manual_seed(1)
        directions = torch.randn(self.size["S"], self.size["D"], generator=generator, device=self.drawn_on)
        clean = torch.einsum("btshw,sd->btdhw", maps[0].softmax(2), directions)
        drawn = [
            torch.randn(clean.shape, generator=generator, device=self.drawn_on).mul_(noise).add_(clean)
            for noise in (0.3, 0.3, 0.2)
        ]
        leaves = [one.requires_grad_() for one in drawn[:2]]
        return Features(*map(self._here, [*leaves, drawn[2], *(one.argmax(2) for one in maps)]))

    def normal(self, *axes: str | int, seed: int = 0) -> Tensor:
        """Draw numbers, with axes by name or by length."""
        generator = torch.Generator(self.drawn_on).manual_seed(seed)
        sizes = [self.size[axis] if isinstance(axis, str) else axis for axis in axes]
        return torch.randn(sizes, generator=generator, device=self.drawn_on).to(self.device)

    def leaf(self, *axes: str | int, seed: int = 0) -> Tensor:
        """Draw numbers that get a gradient."""
        return self.normal(*axes, seed=seed).requires_grad_()

    def _here(self, drawn: Tensor) -> Tensor:
        return drawn.detach().to(self.device).requires_grad_(drawn.requires_grad)


@dataclass
class Step:
    """A step of whatever is measured, and what its outputs are by definition, which is asked first."""

    forward: Callable[[], Any]
    expected: Callable[[], Outputs]
    # what gets a gradient; without any, there is no backward
    leaves: list[Tensor] = field(default_factory=list)
    # the gradients that come in; 1 for a loss
    incoming: tuple[Tensor, ...] = ()
    # what has to be done before each call, and is not measured
    before: Callable[[], object] | None = None
    # what of the outputs the definition is about
    seen: Callable[[Any], Outputs] = lambda outputs: outputs
    # that have to be moved: inputs read and outputs written
    num_bytes: int = 0

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
        # at hand from the first call on, as it is where a loss is one of a sum
        self.incoming = self.incoming or (torch.ones_like(outputs),)
        grads = torch.autograd.grad(outputs, self.leaves, self.incoming)
        return (outputs.detach() if isinstance(outputs, Tensor) else None, *grads)
