"""Files of results: written whole or not at all, read with care, and no writing where there is no place."""

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeVar

# what is written to see whether it can be
PROBE = 1 << 20

T = TypeVar("T")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a place beside a file to write to, and rename it at the end: whoever stops half-way leaves what was there.

    A link stays one: what it leads to is replaced.
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
    """Write a text, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def must_be_writable(path: Path, option: str, *, num_bytes: int = PROBE) -> None:
    """Find out whether a file can be written, before what is to be in it is computed.

    Args:
        path: the file, new or to be replaced.
        option: that names it, for the message.
        num_bytes: that everything takes which is to be written.

    Raises:
        ValueError: if it cannot be, or is no file; it names the option and the reason.
    """
    try:
        reason = _why_not(_target(path), num_bytes)
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise ValueError(f"{option} must be a place to write to; {path} cannot be written: {reason}.")


def must_be_ours(path: Path, option: str, load: Callable[[Path], T]) -> T | None:
    """Read the file that is to be replaced, if there is one.

    Raises:
        ValueError: if it is not of the command that is about to replace it.
    """
    try:
        return load(path) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{option} must not lead to a file of something else, which would be lost; {error}") from error


def _why_not(target: Path, num_bytes: int) -> str:
    # a device would be replaced by a file
    if target.exists() and not target.is_file():
        return "it is there, and no file"
    if target.exists() and not os.access(target, os.W_OK):
        return "it is read-only"
    target.parent.mkdir(parents=True, exist_ok=True)
    probe = _beside(target)
    try:
        # no zeros: there are file systems on which they take no place
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
    """Read what JSON holds.

    Raises:
        ValueError: if there is no such file, or another one; it names the file and the reason.
    """
    try:
        # a pipe or a device may have no end
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
    """Check that an object of JSON has fields of these types, and numbers that can be worked with.

    Args:
        content: what JSON held.
        fields: types by name; none but `bool` takes true and false.
        where: what it is, for the message.
        optional: names of fields that may be missing.
        more: whether there may be others.

    Raises:
        ValueError: at the first thing that is wrong; it names the place, the wanted and the found.
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
        # NaN is a number that was not measured
        if isinstance(value, int | float) and abs(value) > 1e100:
            raise ValueError(f"{where}: `{key}` must be at most 1e100; found more.")
