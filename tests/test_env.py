"""`python -m ssync_loss.env`: its report, even if parts are missing, hang or crash."""

import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ssync_loss
from ssync_loss import env
from ssync_loss.ssync import engines
from ssync_loss.ssync.engines.cpu import library

NAMES = [*env.KNOWN, *env.ASKED]


def script(path: Path, *lines: str) -> str:
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)
    return str(path)


def test_the_command(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(home)}
    given = {name: value for name, value in known.items() if name not in (library.CACHE_VARIABLE, "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-m", "ssync_loss.env"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=given | {"CC": f"{home}/no-compiler"},
    )
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert list(said) == NAMES
    assert done.stderr == ""
    assert not [line for line in said.values() if line.startswith("unknown")]
    assert said["ssync-loss"] == ssync_loss.__version__
    assert [said[name] for name in env.PACKAGES] == [version(name) for name in env.PACKAGES]
    assert said["variables"].startswith("CC=~/no-compiler")
    assert said["cache"].startswith("~/.cache/ssync-loss, ")
    assert str(home) not in done.stdout
    # the library finds another compiler than the missing one
    if not said["C compiler"].startswith("none"):
        assert said["auto on CPU"] == "cpu"
        assert ", 1 libraries of " in said["cache"]
    if not torch.cuda.is_available():
        assert said["CUDA devices"].startswith("none")
        assert said["auto on CUDA"].startswith("no CUDA device")


class TestMissingParts:
    def test_packages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def only_of_torch(name: str) -> str:
            if name != "pytorch-triton":
                raise PackageNotFoundError(name)
            return "3.2"

        monkeypatch.setattr(env, "version", only_of_torch)
        assert env.KNOWN["kornia"]() == "not installed"
        assert env.KNOWN["triton"]() == "3.2"

    def test_a_compiler(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
        assert env.compiler().startswith("none; the engine cpu needs a C compiler")

    def test_a_cache_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path)
        monkeypatch.setenv(library.CACHE_VARIABLE, str(tmp_path / "link"))
        assert "is a link" in env.cache()

    def test_an_unavailable_engine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engines.ENGINES["cpu"], "missing", lambda *_: "a POSIX system")
        assert env.engine_on("cpu") == "torch; cpu needs a POSIX system"

    def test_a_wrong_engine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engines, "is_trusted", lambda *_: False)
        monkeypatch.setattr(engines.ENGINES["cpu"], "missing", lambda *_: None)
        monkeypatch.setattr(engines.ENGINES["cpu"], "terms", lambda *_: 1 / 0)
        assert env.engine_on("cpu") == "torch; cpu differs from torch: ZeroDivisionError: division by zero"

    def test_any_other_error_is_reported(self) -> None:
        def fail() -> str:
            raise RuntimeError("no driver\non this machine")

        assert env.answer(fail) == "unknown, RuntimeError: no driver\n    on this machine"
        assert env.answer(lambda: "first\nsecond") == "first\n    second"


def test_every_gpu_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [SimpleNamespace(name=f"GPU {n}", major=9, minor=n, total_memory=80 * 2**30) for n in range(2)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert env.cuda_devices() == "GPU 0 (9.0, 80 GiB), GPU 1 (9.1, 80 GiB); CUDA 12.8"


class TestOtherProcess:
    def test_a_hanging_process_is_killed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        # the child process must end, too
        lines = ("printf 'C compiler: cc\\nauto on CPU: '", f"(sleep 4; touch {tmp_path}/late) &", "sleep 60")
        monkeypatch.setattr(sys, "executable", script(tmp_path / "python", *lines))
        started = time.monotonic()
        assert env.report(limit=1).endswith("\nC compiler: cc\nauto on CPU: no answer in 1 s")
        assert time.monotonic() - started < 20
        time.sleep(max(0.0, started + 5.5 - time.monotonic()))
        assert not (tmp_path / "late").exists()

    def test_a_crash_is_reported(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(sys, "executable", script(tmp_path / "python", "printf 'auto on CPU: '", "kill -SEGV $$"))
        assert env.report(limit=20).endswith("\nauto on CPU: the process ended with status -11")

    def test_a_hanging_compiler(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("CC", script(tmp_path / "cc", "exec sleep 60"))
        monkeypatch.setattr(env, "COMPILER_SECONDS", 0.2)
        assert env.answer(env.compiler).startswith("unknown, TimeoutExpired")


class TestHome:
    @pytest.mark.parametrize(
        ("text", "short"),
        [
            ("/home/al", "~"),
            ("/home/al/.cache and /home/al.", "~/.cache and ~."),
            ("/home/alice /home/al-2 /home/al_2", "/home/alice /home/al-2 /home/al_2"),
        ],
    )
    def test_it_becomes_a_tilde(self, text: str, short: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/al")
        assert env.without_home(text) == short

    def test_a_link_to_it_becomes_a_tilde(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "linked").symlink_to(tmp_path / "real")
        monkeypatch.setenv("HOME", str(tmp_path / "linked"))
        assert env.without_home(f"{tmp_path}/linked/a {tmp_path}/real/b") == "~/a ~/b"

    def test_a_home_at_the_root_is_not_replaced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/")
        assert env.without_home("/usr/bin/cc") == "/usr/bin/cc"
