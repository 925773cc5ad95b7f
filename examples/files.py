"""Files of results: atomic writes, checked reads, and an early check that a file can be written."""

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeVar

# bytes to write as a test
PROBE = 1 << 20

T = TypeVar("T")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary file next to a file, and rename it at the end. An interruption leaves the old file.

    A symbolic link stays, and its target is replaced.
    """
    target = _target(path)
    partial = _beside(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        os.replace(partial, target)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text atomically."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def must_be_writable(path: Path, option: str, *, num_bytes: int = PROBE) -> None:
    """Check that a file can be written, before its content is computed.

    Args:
        path: the file, new or to be replaced.
        option: the option that names the file, for the message.
        num_bytes: size of all files to be written.

    Raises:
        ValueError: if it cannot be written, or is not a file; the message names the option and the reason.
    """
    try:
        reason = _why_not(_target(path), num_bytes)
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise ValueError(f"{option} must be a place to write to; {path} cannot be written: {reason}.")


def must_be_ours(path: Path, option: str, load: Callable[[Path], T]) -> T | None:
    """Read the file that the command is about to replace, if it exists.

    Raises:
        ValueError: if another program wrote it.
    """
    try:
        return load(path) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{option} must not lead to a file of something else, which would be lost; {error}") from error


def _why_not(target: Path, num_bytes: int) -> str:
    # a file would replace a device
    if target.exists() and not target.is_file():
        return "it is there, and no file"
    if target.exists() and not os.access(target, os.W_OK):
        return "it is read-only"
    target.parent.mkdir(parents=True, exist_ok=True)
    probe = _beside(target)
    try:
        # random bytes, as zeros take no space on some file systems
        probe.write_bytes(os.urandom(PROBE))
    finally:
        probe.unlink(missing_ok=True)
    free = shutil.disk_usage(target.parent).free
    return "" if free >= num_bytes else f"{num_bytes / 1e6:.1f} MB are needed, and {free / 1e6:.1f} are free"


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _beside(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: if the file is missing or is not JSON; the message names the file and the reason.
    """
    try:
        # reading a pipe or a device may never end
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file of results: {error}.") from error


Fields = Mapping[str, type | tuple[type, ...]]


def check_fields(
    content: Any, fields: Fields, where: str, *, optional: Collection[str] = (), more: bool = False
) -> None:
    """Check the fields of a JSON object: their names, their types, and that no number is huge.

    Args:
        content: parsed JSON.
        fields: types by name; only `bool` accepts true and false.
        where: name of the object, for the message.
        optional: names of fields that may be missing.
        more: whether other fields are allowed.

    Raises:
        ValueError: at the first mistake; the message names the field and its value.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be an object; found {type(content).__name__}.")
    missing = sorted(fields.keys() - content.keys() - set(optional))
    unknown = [] if more else sorted(content.keys() - fields.keys())
    if missing or unknown:
        raise ValueError(f"{where} must have other fields; missing are {short(missing)}, unknown are {short(unknown)}.")
    for key in fields.keys() & content.keys():
        value = content[key]
        by_mistake = isinstance(value, bool) and fields[key] is not bool
        if by_mistake or not isinstance(value, fields[key]):
            raise ValueError(f"{where}: `{key}` has the wrong type; found {short(value)}.")
        # NaN, a number that was not measured, passes
        if isinstance(value, int | float) and abs(value) > 1e100:
            raise ValueError(f"{where}: `{key}` must be at most 1e100; found more.")
