"""Compile `engine.c` at first use, keep the library in the user's cache folder, and load it."""

import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from ctypes import CDLL
from functools import lru_cache
from pathlib import Path

SOURCE = Path(__file__).with_name("engine.c")
# -fno-trapping-math and -fno-math-errno let the compiler vectorize selects; NaN remains NaN.
# -fno-unswitch-loops: loops that the compiler splits by a mask take longer to compile and to run.
FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-fPIC", "-shared", "-pthread"),
    *("-fno-trapping-math", "-fno-math-errno", "-fno-unswitch-loops"),
)
COMPILERS = ("cc", "gcc", "clang")
SECONDS = 10.0
CACHE_VARIABLE = "SSYNC_LOSS_CACHE"


class UnavailableError(Exception):
    """This machine lacks a requirement of the engine."""


class BrokenError(Exception):
    """This machine meets the requirements of the engine, but the compiler failed."""


@lru_cache(maxsize=1)
def load() -> CDLL:
    """Return the engine's library; compile it if the cache lacks it.

    Raises: UnavailableError without a compiler, or without a cache folder that is safe, writable and allows loading;
        BrokenError if the compiler fails, or takes more than 10 seconds, up to a minute on a busy machine.
    """
    if sys.platform == "win32":
        raise UnavailableError("a POSIX system")
    folder = cache_folder()
    compiler = find_compiler()
    try:
        path = _find(folder, _key(compiler)) or _build(folder, compiler)
    except OSError as error:
        raise BrokenError(str(error)) from None
    try:
        return CDLL(str(path))
    except OSError as error:
        raise UnavailableError(f"a cache folder that libraries can be loaded from ({error})") from None


def find_compiler() -> list[str]:
    """Return the command of the system's compiler; the variable CC may contain arguments."""
    wanted = os.environ.get("CC", "").split()
    for name in (*wanted[:1], *COMPILERS):
        path = shutil.which(name)
        if path is not None:
            return [path, *wanted[1:]] if wanted and name == wanted[0] else [path]
    raise UnavailableError(f"a C compiler; none of {', '.join(COMPILERS)} is on the PATH")


def cache_folder() -> Path:
    """Make the cache folder, and require that only this user can write to it."""
    chosen = os.environ.get(CACHE_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(chosen) if chosen else (Path(base) if base else Path.home() / ".cache") / "ssync-loss"
        folder = folder.absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except (OSError, RuntimeError) as error:
        raise UnavailableError(f"a cache folder; set {CACHE_VARIABLE} to one ({error})") from None
    for wrong, is_so in (
        ("is a link", stat.S_ISLNK(status.st_mode)),
        ("is no folder", not stat.S_ISDIR(status.st_mode)),
        ("belongs to another user", status.st_uid != os.geteuid()),
        ("can be written by others", status.st_mode & 0o022),
    ):
        if is_so:
            raise UnavailableError(f"a cache folder of its own: {folder} {wrong}; set {CACHE_VARIABLE} to another")
    return folder


def _key(compiler: list[str]) -> str:
    """Hash the inputs of a build: source, flags, compiler and processor."""
    program = os.stat(compiler[0])
    machine = (platform.machine(), _processor())
    parts = (SOURCE.read_bytes(), FLAGS, compiler, program.st_size, program.st_mtime_ns, machine)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _processor() -> str:
    """Describe the processor as far as `-march=native` depends on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    told = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))


def _find(folder: Path, key: str) -> Path | None:
    """Return a library whose name holds the hash of its content; a truncated file has another hash."""
    for path in folder.glob(f"engine-{key}-*.so"):
        status = path.lstat()
        ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
        if ours and path.name == _name(key, path):
            return path
    return None


def _name(key: str, path: Path) -> str:
    return f"engine-{key}-{hashlib.sha256(path.read_bytes()).hexdigest()[:24]}.so"


def _build(folder: Path, compiler: list[str]) -> Path:
    """Compile to a temporary name and rename: several processes may build at once."""
    try:
        handle, beside = tempfile.mkstemp(dir=folder, suffix=".so.part")
    except OSError as error:
        raise UnavailableError(f"a cache folder that can be written; set {CACHE_VARIABLE} to one ({error})") from None
    os.close(handle)
    try:
        # not every compiler accepts -march=native
        for flags in (FLAGS, [flag for flag in FLAGS if flag != "-march=native"]):
            complaint = _compile([*compiler, *flags, str(SOURCE), "-o", beside, "-lm"])
            if complaint is None:
                break
        else:
            raise BrokenError(complaint)
        os.chmod(beside, 0o700)
        path = folder / _name(_key(compiler), Path(beside))
        os.replace(beside, path)
    finally:
        Path(beside).unlink(missing_ok=True)
    return path


def _compile(command: list[str]) -> str | None:
    # a new session, so that all processes of a compiler that hangs can be killed
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        # a compiler takes longer on a busy machine
        limit = SECONDS * min(max(1.0, _programs_per_processor()), 6.0)
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            raise BrokenError(f"`{' '.join(command)}` took more than {limit:.3g} s") from None
    text = said.decode(errors="replace").strip()[-2000:]
    return f"`{' '.join(command)}` failed with {process.returncode}: {text}" if process.returncode else None


def _programs_per_processor() -> float:
    """Return the average number of programs that wait for each processor or use it."""
    with suppress(OSError):
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    return 1.0
