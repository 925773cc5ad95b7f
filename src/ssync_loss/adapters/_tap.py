"""What all taps share: hooks on modules, what they collect, and the checks that it is of one forward."""

import itertools
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ssync_loss._checks import check_int
from ssync_loss._compilers import is_recomputing, is_traced

if TYPE_CHECKING:
    from typing_extensions import Self

LEFTOVERS = (
    "is an earlier forward left in the tap? pop() or reset() after each, or give the tap its `host`, or `num_frames`"
)
PIECES = " If its calls are pieces of one map, and no frames, tap the module that puts them together."

_CLOCK = itertools.count()


class Held(NamedTuple):
    """What a module gave: the tensor, its version then, and the time of the call on the clock of all taps."""

    place: str
    tensor: Tensor
    version: int | None
    when: int | None

    @classmethod
    def now(cls, place: str, output: object) -> "Self":
        """Hold what a module has just given."""
        if not isinstance(output, Tensor):
            raise TypeError(f"{place} must give a tensor; got {type(output).__name__}.")
        if is_traced():
            return cls(place, output, None, None)
        # a tensor of inference mode has no version
        return cls(place, output, None if output.is_inference() else output._version, next(_CLOCK))

    def get(self) -> Tensor:
        """Return the output, unless it has been written to since."""
        if self.version is not None and self.version != self.tensor._version:
            raise RuntimeError(
                f"the host wrote to the output of {self.place} in place, so what the module gave is lost."
            )
        return self.tensor


class _Mark:
    """Whether a module between the host and what is tapped was called; traced code only writes it."""

    def __init__(self, place: str) -> None:
        self.place, self.called = place, False

    def on_call(self, *call: object) -> None:
        del call
        self.called = True


class Hooked(ABC):
    """Hooks on modules, until they are removed or a context ends; a copy, deep or unpickled, has no hooks or data."""

    @abstractmethod
    def remove(self) -> None:
        """Take the hooks off; a second call does nothing."""

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Tap(Hooked):
    """Forward hooks on a host, and what they collect."""

    def __init__(
        self, host: nn.Module | None, num_frames: int | None, **hooks: tuple[nn.Module, Callable[..., None]]
    ) -> None:
        modules = {name: module for name, (module, _) in hooks.items()}
        self._places = _places(host, modules)
        if num_frames is not None:
            check_int("num_frames", num_frames, 1)
            if host is not None:
                raise ValueError(f"`num_frames` must be None with `host`, whose forward is a clip; got {num_frames}.")
        self._num_frames = num_frames
        # a tap without a host listens all the time, one with a host during the host's calls
        self._hosted = host is not None
        self._attached = self._listening = True
        self._handles: list[RemovableHandle] = []
        self._marks: list[_Mark] = []
        if host is not None:
            self._listening = False
            self._handles.append(host.register_forward_pre_hook(self._on_host))
            for path, inner in host.named_modules():
                if path and set(modules.values()) <= set(inner.modules()):
                    self._marks.append(_Mark(path))
                    self._handles.append(inner.register_forward_pre_hook(self._marks[-1].on_call))
        self._handles += [module.register_forward_hook(hook) for module, hook in hooks.values()]
        if host is not None:
            # last, as the host itself may be tapped; always, as a forward may break
            self._handles.append(host.register_forward_hook(self._on_host_done, always_call=True))
        self.reset()

    def reset(self) -> None:
        """Forget what was collected, and with it the graph."""
        self._calls: list[Held] = []
        # whether what is tapped ran while nobody listened, and when it first did
        self._missed = False
        self._missed_when: int | None = None
        for mark in self._marks:
            mark.called = False

    def remove(self) -> None:
        """Take the hooks off the host and forget what was collected; a second call does nothing."""
        # code that was compiled before goes on calling the hooks, which look at the flag
        self._attached = self._listening = False
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.reset()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._attached = self._listening = False
        self._handles, self._marks = [], []
        self.reset()

    def _on_host(self, *call: object) -> None:
        # where a compiler breaks its graph, it guards every local variable that is left
        del call
        if self._attached and not is_recomputing():
            self.reset()
            self._listening = True

    def _on_host_done(self, *call: object) -> None:
        del call
        self._listening = False

    def _listens(self) -> bool:
        """Say whether the call that a hook sees is part of a forward; remember one outside of the host."""
        if is_recomputing():
            return False
        if not self._listening:
            if not (is_traced() or self._missed):
                self._missed_when = next(_CLOCK)
            self._missed = True
        return self._listening

    def _hold(self, place: str, output: object, limit: int | None) -> None:
        """Keep an output, and forget all but the last ``limit``."""
        self._calls.append(Held.now(place, output))
        if limit is not None and len(self._calls) > limit:
            self._calls.pop(0)

    def _before(self, other: "Tap") -> bool:
        """Say whether all that is held is known to be older than all that another tap holds."""
        if is_traced() or not (self._calls and other._calls):
            return False
        ended, began = self._calls[-1].when, other._calls[0].when
        return ended is not None and began is not None and ended < began

    def _overlook_what_ran_after(self, decoder: "Tap") -> None:
        """Allow what ran outside of the host after the decoder, such as slots that attend to its reconstruction."""
        if self._calls and decoder._calls and not decoder._missed and self._missed_when is not None:
            decoded = decoder._calls[-1].when
            self._missed = decoded is None or decoded > self._missed_when

    def _take(self, name: str) -> list[Held]:
        """Empty the tap and return what it held, which is one forward's."""
        calls, problem = self._calls, self._problem(name)
        self.reset()
        if problem is not None:
            raise RuntimeError(problem)
        return calls

    def _problem(self, name: str) -> str | None:
        if not self._attached:
            return "this tap hangs on no module: it was removed or is a copy. Attach a new one."
        if self._missed:
            called = [mark.place for mark in self._marks if mark.called]
            give = f"`host=model.{called[0]}`, which was called, or, if it sees frame by frame, " if called else ""
            return (
                f"{self._places[name]} ran outside of a call of `host`: hooks run where a module is called, and not "
                f"where its forward() or another method is. Instead of this `host`, give {give}`num_frames`. If it "
                "ran after the forward to be popped, pop() before that, or join it with the decoder's tap."
            )
        if not self._calls:
            return (
                f"{self._places[name]} has not run since the last pop() or reset(): call the model first. If "
                "it is compiled, attach the tap before the model's first call. A copy of it takes a tap of its own."
            )
        return None

    def _check_frames(self, name: str, number: int) -> None:
        if self._num_frames not in (None, number):
            hint = " If one call holds all frames in the batch, give the tap `num_frames`=1." if number == 1 else ""
            raise RuntimeError(
                f"{self._places[name]} gave {number} frames where `num_frames`={self._num_frames}.{hint}"
            )

    def _leftovers(self) -> str:
        return (
            "does one forward of `host` make several clips? Give a module that makes one" if self._hosted else LEFTOVERS
        )

    def _stack(self, name: str, frames: Sequence[Tensor]) -> Tensor:
        """Stack calls as the frames of a clip; refuse other shapes, and warn if some carry no gradient."""
        if any(frame.shape != frames[0].shape for frame in frames):
            raise RuntimeError(f"{self._places[name]} made no clip of {count(frames)}: {self._leftovers()}.{PIECES}")
        num_detached = sum(not frame.requires_grad for frame in frames)
        if 0 < num_detached < len(frames) and not is_traced():
            warnings.warn(
                f"{num_detached} of {len(frames)} frames of {self._places[name]} carry no gradient. Unless "
                f"the host means that, {self._leftovers()}.",
                stacklevel=3,
            )
        return torch.stack(list(frames), 1)


def count(tensors: Sequence[Tensor]) -> str:
    """Say how many calls gave which shapes, in a few words.

    >>> count([torch.zeros(2, 3)] * 64)
    '64 calls of shape (2, 3)'
    """
    shapes = Counter(tuple(tensor.shape) for tensor in tensors)
    if len(shapes) > 2:
        first, *_, last = shapes
        return f"{len(tensors)} calls of {len(shapes)} shapes, {first} to {last}"
    return " and ".join(f"{number} call{'s' * (number > 1)} of shape {shape}" for shape, number in shapes.items())


def _places(host: nn.Module | None, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Return a name of each argument for messages, with the module's path in the host or its class."""
    for name, module in (({} if host is None else {"host": host}) | modules).items():
        if not isinstance(module, nn.Module):
            raise TypeError(f"`{name}` must be a module; got {type(module).__name__}.")
    paths = {} if host is None else {id(inner): path for path, inner in host.named_modules()}
    for name, module in modules.items():
        if host is not None and id(module) not in paths:
            raise ValueError(f"`host` must contain `{name}`; this {type(host).__name__} does not.")
    return {name: f"`{name}` ({paths.get(id(one)) or type(one).__name__})" for name, one in modules.items()}
