"""A description of the machine for a bug report: ``python -m ssync_loss.env``.

A separate process queries the compiler, the engines and the GPUs. If it hangs or crashes, the report says so.
"""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile

import torch

from ssync_loss import __version__
from ssync_loss.ssync.engines import ENGINES, FAST, resolve
from ssync_loss.ssync.engines.cpu import library
from ssync_loss.ssync.engines.self_check import complaint_about

__all__ = ["report"]

PACKAGES = ("torch", "einops", "numpy", "kornia")
VARIABLES = ("CC", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", library.CACHE_VARIABLE, "TRITON_INTERPRET")
# long enough to compile the GPU's engine
SECONDS = 120.0
COMPILER_SECONDS = 10.0

Parts = Mapping[str, Callable[[], str]]


def report(limit: float = SECONDS) -> str:
    """Describe versions, machine, compiler, engines, cache and GPUs, one line each; ``~`` is the user's home.

    Args:
        limit: seconds that compiler, engines, cache and GPUs may take together.

    Returns: the text. The line of a missing part says why it is missing.

    Raises: TypeError if ``limit`` is no number. An error of a part becomes the text of its line.

    >>> [line.partition(":")[0] for line in report(limit=0).splitlines()[:3]]
    ['ssync-loss', 'torch', 'einops']
    """
    known = "".join(f"{name}: {answer(ask)}\n" for name, ask in KNOWN.items())
    return without_home(known + _asked_elsewhere(limit)).rstrip()


def answer(ask: Callable[[], str]) -> str:
    """Call a function, and return an error as the answer."""
    try:
        said = ask()
    except Exception as error:  # the other lines are still useful
        said = f"unknown, {type(error).__name__}: {error}"
    return said.replace("\n", "\n    ")


def without_home(text: str) -> str:
    """Write ``~`` for the path of the user's home."""
    with suppress(RuntimeError, OSError):
        home = Path.home()
        for path in sorted({str(home), str(home.resolve())} - {"/"}, key=len, reverse=True):
            text = re.sub(re.escape(path) + r"(?![\w-])", "~", text)
    return text


def installed(*names: str) -> str:
    """Return the version of a package that has one of these names, without importing it."""
    for name in names:
        with suppress(PackageNotFoundError):
            return version(name)
    return "not installed"


def processor() -> str:
    """Return the name of the processor, the number of its cores, and the number that this process may use."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {os.cpu_count()} cores, {usable} of them for this process"


def variables() -> str:
    """Return the environment variables that change the library's behavior."""
    return ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ) or "none"


def compiler() -> str:
    """Return the compiler's path and the first line of its version."""
    try:
        command = library.find_compiler()
    except library.UnavailableError as error:
        return f"none; the engine cpu needs {error}"
    said = subprocess.run(
        [*command, "--version"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=COMPILER_SECONDS,
        check=False,
    )
    return f"{' '.join(command)}, {said.stdout.decode(errors='replace').partition(chr(10))[0].strip()}"


def engine_on(device: str) -> str:
    """Return the engine that ``"auto"`` takes for small maps on a device, and the reason if it is not the fast one."""
    maps = torch.zeros(1, 1, 2, 1, 1, device=device)
    name = FAST[maps.device.type]
    taken = resolve("auto", maps)
    if taken is ENGINES[name]:
        return name
    missing = ENGINES[name].missing(maps)
    if missing is not None:
        return f"torch; {name} needs {missing}"
    return f"torch; {name} differs from torch: {complaint_about(ENGINES[name], ENGINES['torch'], device)}"


def cuda_engine() -> str:
    """Return the engine that ``"auto"`` takes on the first GPU."""
    if torch.cuda.is_available():
        return engine_on("cuda")
    missing = ENGINES[FAST["cuda"]].missing()
    return "no CUDA device" + (f"; {FAST['cuda']} needs {missing}" if missing else "")


def cuda_devices() -> str:
    """Describe the GPUs that torch sees."""
    built = torch.version.cuda or torch.version.hip
    if not torch.cuda.is_available():
        return "none" if built else "none; torch is built without CUDA"
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    names = [f"{one.name} ({one.major}.{one.minor}, {one.total_memory / 2**30:.0f} GiB)" for one in gpus]
    return f"{', '.join(names)}; CUDA {built}"


def cache() -> str:
    """Describe the folder of compiled engines."""
    try:
        folder = library.cache_folder()
    except library.UnavailableError as error:
        return f"none; the engine cpu needs {error}"
    built = [path.stat().st_size for path in folder.glob("engine-*.so")]
    parts = len(list(folder.glob("*.so.part")))
    unfinished = f", {parts} unfinished" if parts else ""
    free = shutil.disk_usage(folder).free
    return f"{folder}, {len(built)} libraries of {sum(built) / 1e3:.0f} kB{unfinished}, {free / 1e9:.1f} GB free"


KNOWN: Parts = {
    "ssync-loss": lambda: __version__,
    **{name: partial(installed, name) for name in PACKAGES},
    # builds by torch's developers have the second name
    "triton": partial(installed, "triton", "pytorch-triton"),
    "Python": lambda: f"{platform.python_version()}, {platform.python_implementation()}",
    "platform": platform.platform,
    "CPU": processor,
    "threads": lambda: f"{torch.get_num_threads()} in torch",
    "variables": variables,
}
ASKED: Parts = {
    "C compiler": compiler,
    "auto on CPU": lambda: engine_on("cpu"),
    "cache": cache,
    "CUDA devices": cuda_devices,
    "auto on CUDA": cuda_engine,
}


def _asked_elsewhere(limit: float) -> str:
    """Run the parts that may hang in a separate process; keep its output if it hangs or crashes."""
    command = [sys.executable, "-W", "ignore", "-m", "ssync_loss.env", "--asked"]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with TemporaryFile() as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.DEVNULL,
            env=paths,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
            end = f"the process ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            _kill(process)
            end = f"no answer in {limit:g} s"
        said.seek(0)
        return said.read().decode(errors="replace") + end


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and its children; do not wait long for a process that a driver blocks."""
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)


def main(arguments: list[str]) -> None:
    """Print the report, or only the parts that may hang."""
    if arguments != ["--asked"]:
        print(report())
        return
    for name, ask in ASKED.items():
        # print the name first, in case the answer does not come
        print(f"{name}: ", end="", flush=True)
        print(answer(ask), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
