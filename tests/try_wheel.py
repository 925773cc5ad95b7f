"""Try the package as a stranger gets it, before a release: ``python -m tests.try_wheel --python PATH [PATH ...]``.

Builds the sdist, and the wheel from it. Its description must be one that PyPI can show. For each Python it makes a new
environment with the wheel and what it asks for. There it imports every module, runs the first lines of the README, and
asks for ``python -m ssync_loss.env``. Then pip builds the sdist again; the wheel must be the same. ``--reuse`` takes
torch and the rest from the environment that PATH belongs to, in place of a download: what the wheel asks for, and
nothing else.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# these are asked for by name, and need packages that only some users have
OPTIONAL = ("ssync_loss.testing.strategies", "ssync_loss.ssync.engines.triton.gpu")

IMPORTS = """
import importlib, pkgutil, sys, ssync_loss
for one in pkgutil.walk_packages(ssync_loss.__path__, "ssync_loss."):
    if not one.name.startswith(tuple(sys.argv[1:])):
        importlib.import_module(one.name)
"""
VERSIONS = "import platform, torch; print(f'Python {platform.python_version()}, torch {torch.__version__}')"
FOLDER = "import sysconfig; print(sysconfig.get_path('purelib'))"
# what a package asks for, and what that asks for; pip brings what reads the markers
LINKS = """
import os, sys
from importlib.metadata import PackageNotFoundError, distribution
from pip._vendor.packaging.requirements import Requirement
wanted, linked = sys.argv[2:], set()
while wanted:
    one = Requirement(wanted.pop())
    if one.name in linked or (one.marker and not one.marker.evaluate({"extra": ""})):
        continue
    linked.add(one.name)
    there = distribution(one.name)
    if there.version not in one.specifier:
        sys.exit(f"{one} is wanted, {there.version} is there")
    wanted += there.requires or []
    for top in {file.parts[0] for file in there.files} - {"..", "__pycache__"}:
        new = os.path.join(sys.argv[1], top)
        if not os.path.lexists(new):
            os.symlink(there.locate_file(top), new)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that sees no PYTHONPATH and no user's packages, and return what it prints."""
    hidden = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    own = {"PYTHONNOUSERSITE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=hidden | own, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))[:300]}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def built(folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def contents(wheel: Path) -> dict[str, bytes]:
    """Return every file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata_of(wheel: Path) -> str:
    """Return what a wheel says of itself."""
    (metadata,) = (text.decode() for name, text in contents(wheel).items() if name.endswith(".dist-info/METADATA"))
    return metadata


def asked_for(wheel: Path) -> list[str]:
    """Return the requirements of a wheel, without those of its extras."""
    asked = re.findall(r"^Requires-Dist: (.*)$", metadata_of(wheel), flags=re.MULTILINE)
    return [one for one in asked if "extra ==" not in one]


def unfit_for_pypi(wheel: Path) -> list[str]:
    """Return what the description has that PyPI cannot show, and the README's headings that it lacks."""
    page = metadata_of(wheel).partition("\n\n")[2]
    headings = re.findall(r"^##? .*$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    shown = re.findall(r"<img|!\[|\$|\\\w+|\]\((?!https:)[^)]*", page)
    return shown + [one for one in headings if f"{one}\n" not in page]


def first_lines() -> str:
    """Return the first Python of the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return readme.partition("```python\n")[2].partition("\n```")[0]


def try_with(python: str, sdist: Path, wheel: Path, folder: Path, *, reuse: bool) -> str:
    """Make an environment, use the package in it, and say what it was."""
    run(python, "-m", "venv", folder / "venv", cwd=folder)
    new = folder / "venv" / "bin" / "python"
    if reuse:
        run(python, "-c", LINKS, run(new, "-c", FOLDER, cwd=folder), *asked_for(wheel), cwd=folder)
    run(new, "-m", "pip", "install", "-q", *(["--no-deps"] if reuse else []), wheel, cwd=folder)
    run(new, "-m", "pip", "check", cwd=folder)
    run(new, "-c", IMPORTS, *OPTIONAL, cwd=folder)

    seeded = f"import torch\ntorch.manual_seed(0)\n{first_lines()}\nprint(f'{{loss.item():.6f}}')"
    loss = run(new, "-W", "error", "-c", seeded, cwd=folder)
    report = dict(line.split(": ", 1) for line in run(new, "-m", "ssync_loss.env", cwd=folder).splitlines())
    if f"ssync_loss-{report['ssync-loss']}-" not in wheel.name:
        raise SystemExit(f"{wheel.name} says that it is {report['ssync-loss']}")

    run(new, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", folder / "again", sdist, cwd=folder)
    if contents(folder / "again" / wheel.name) != contents(wheel):
        raise SystemExit(f"pip builds another {wheel.name} from the sdist")
    packages = len(run(new, "-m", "pip", "list", cwd=folder).splitlines()) - 2
    versions = run(new, "-c", VERSIONS, cwd=folder)
    return f"{versions}, {packages} packages: loss {loss}, engine {report['auto on CPU']}"


def main(arguments: Sequence[str]) -> None:
    """Build once, and try with every Python."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=[sys.executable], metavar="PATH", help="the Pythons to try")
    parser.add_argument("--reuse", action="store_true", help="take torch and the rest from where these Pythons are")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        sdist, wheel = built(Path(name))
        print(*(f"{one.name}: {one.stat().st_size / 1e3:.0f} kB" for one in (sdist, wheel)), sep="\n")
        if unfit := unfit_for_pypi(wheel):
            raise SystemExit(f"PyPI cannot show {', '.join(unfit)}: pyproject.toml has what becomes of the README")
        for number, python in enumerate(options.python):
            folder = Path(name) / str(number)
            folder.mkdir()
            # the engine is compiled anew
            os.environ["SSYNC_LOSS_CACHE"] = str(folder / "cache")
            print(try_with(python, sdist, wheel, folder, reuse=options.reuse), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
