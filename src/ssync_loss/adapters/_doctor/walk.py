"""All tensors inside of what a model returned, each with the code that reaches it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import FunctionType, MethodType, ModuleType
from typing import NamedTuple

from torch import Tensor

MAX_DEPTH = 12
MAX_NODES = 20_000


class Found(NamedTuple):
    """A tensor, code such as ``outputs["decoder"].masks[0]``, and the names in it, from the root."""

    tensor: Tensor
    path: str
    names: tuple[str, ...]


def tensors_in(outputs: object, path: str) -> Iterator[Found]:
    """Go through mappings, sequences, named tuples, dataclasses and attributes; nothing is called or consumed.

    A container inside of itself is entered once; below ``MAX_DEPTH`` and after ``MAX_NODES`` it ends.
    """
    nodes = 0

    def visit(node: object, path: str, names: tuple[str, ...], above: tuple[int, ...]) -> Iterator[Found]:
        nonlocal nodes
        nodes += 1
        if isinstance(node, Tensor):
            yield Found(node, path, names)
        elif id(node) not in above and len(above) < MAX_DEPTH:
            for step, name, child in _children(node):
                if nodes >= MAX_NODES:
                    return
                yield from visit(child, path + step, (*names, name) if name else names, (*above, id(node)))

    return visit(outputs, path, (), ())


def _children(node: object) -> Iterator[tuple[str, str, object]]:
    if isinstance(node, Mapping):
        for key, child in node.items():
            yield f"[{json.dumps(key) if isinstance(key, str) else repr(key)}]", str(key).lower(), child
    elif isinstance(node, tuple) and hasattr(node, "_fields"):
        for name, child in zip(node._fields, node, strict=False):
            yield f".{name}", name.lower(), child
    elif isinstance(node, (list, tuple)):
        for index, child in enumerate(node):
            yield f"[{index}]", "", child
    elif not isinstance(node, (type, ModuleType, FunctionType, MethodType)):
        # a property may compute: only what is stored is looked at
        named = [one.name for one in fields(node)] if is_dataclass(node) else list(getattr(node, "__dict__", ()))
        for name in named:
            if not name.startswith("_"):
                yield f".{name}", name.lower(), getattr(node, name, None)
