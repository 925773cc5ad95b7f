"""What is compared: SSync by each of its backends, and dense alignment in several forms."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import dense_inputs, moving_blobs
from benchmarks.timing import Work
from ssync_loss import SSyncLoss
from ssync_loss.functional import dense_decoder_alignment_loss, dense_encoder_alignment_loss

# everything that could be measured, the fastest first; "reference" is what the gate compares with
BACKENDS = ("cpu", "triton", "torch")
# what backend="auto" takes on a device where it can
AUTO = {"cpu": "cpu", "cuda": "triton"}
MERGE_THRESHOLD = 0.7
CHUNK_SIZE = 1024
PARTS = ("forward", "backward")
# behind the name of a contender, as whatever else follows a comma there
TWO_THREADS = ", 2 threads"


@dataclass(frozen=True)
class Contender:
    """Something that turns inputs into a loss with gradients.

    Attributes:
        name: what it is called in files and tables.
        backend: of SSync; None for dense alignment.
        compiled: whether `torch.compile` is put on top.
        group_frames: frames of a window of dense alignment; None for the whole clip.
        chunk_size: rows of scores that dense alignment holds at once; None for all.
    """

    name: str
    backend: str | None = None
    compiled: bool = False
    group_frames: int | None = None
    chunk_size: int | None = None


def ssync_contender(backend: str, *, compiled: bool = False) -> Contender:
    """Return SSync by one of its backends."""
    return Contender(f"SSync {backend}" + " compiled" * compiled, backend=backend, compiled=compiled)


DENSE = Contender("dense")
DENSE_CHUNKED = Contender("dense chunked", chunk_size=CHUNK_SIZE)
DENSE_WINDOWS = (Contender("dense in windows of 2", group_frames=2), Contender("dense in windows of 4", group_frames=4))
CONTENDERS = {
    one.name: one
    for one in (
        *(ssync_contender(backend, compiled=compiled) for backend in BACKENDS for compiled in (False, True)),
        DENSE,
        DENSE_CHUNKED,
        *DENSE_WINDOWS,
    )
}


def ssync_criterion(contender: Contender, **settings: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Build the loss of a contender; compiled, it is compiled once for every shape.

    Dynamic shapes would also make the settings symbols, and compile to slower code.
    """
    backend: Any = contender.backend
    criterion = SSyncLoss(**{"merge_threshold": MERGE_THRESHOLD, "backend": backend, **settings})
    if contender.compiled:
        compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(criterion, fullgraph=True, dynamic=False)
        return compiled
    return criterion


def dense_loss(
    contender: Contender,
    decoder_features: Tensor,
    encoder_features: Tensor,
    anchors: Tensor,
    enc_labels: Tensor,
    dec_labels: Tensor,
) -> Tensor:
    """Compute both terms of dense alignment."""
    settings: dict[str, Any] = {"group_frames": contender.group_frames, "chunk_size": contender.chunk_size}
    decoder = dense_decoder_alignment_loss(decoder_features, anchors, enc_labels, **settings)
    return decoder + dense_encoder_alignment_loss(encoder_features, anchors, dec_labels, **settings)


def loss_and_leaves(
    contender: Contender, shape: Mapping[str, int], *, dtype: torch.dtype, device: str
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Make inputs; return the forward, and what gets a gradient."""
    if contender.backend is not None:
        maps = moving_blobs(shape, dtype=dtype, device=device)
        criterion = ssync_criterion(contender)
        return lambda: criterion(*maps), list(maps)
    inputs = dense_inputs(shape, dtype=dtype, device=device)
    return lambda: dense_loss(contender, *inputs), [inputs.decoder_features, inputs.encoder_features]


def step_of(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Work:
    """Return a step that marks its start, the end of the forward and the end of the backward.

    The gradient that comes in is at hand, as it is where a loss is one of a sum, and nothing is accumulated:
    gradients are handed back.
    """
    one = torch.ones((), device=leaves[0].device)

    def step(mark: Callable[[], Any]) -> list[Any]:
        marks = [mark()]
        loss = forward()
        marks.append(mark())
        torch.autograd.grad(loss, leaves, grad_outputs=one.to(loss.dtype))
        marks.append(mark())
        return marks

    return step


def run_once(forward: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Run a step; return the loss and the gradients."""
    loss = forward()
    return loss.detach(), *torch.autograd.grad(loss, leaves)
