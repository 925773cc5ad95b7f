"""The C library: compilation, threads, forks, extreme values, and sanitizers."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor

from sample_maps import leaf, sample_maps
from ssync_loss import SSyncLoss, _forks
from ssync_loss._forks import take_one_thread_if_forked
from ssync_loss.functional import pseudo_labels, selective_distillation_loss
from ssync_loss.ssync.engines import ENGINES, cpu
from ssync_loss.ssync.engines.cpu import library, operators, team
from ssync_loss.ssync.engines.self_check import complaint_about
from ssync_loss.testing import assert_close_loss

TESTS = Path(__file__).parent
FLAGS = library.FLAGS
UNOPTIMIZED = ("-O0", "-fPIC", "-shared", "-pthread")
SOURCE = Path(library.__file__).with_name("engine.c")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the test an empty cache folder, and unload the library before and after."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(library.CACHE_VARIABLE, str(folder))
    monkeypatch.setattr(cpu, "_reasons", [])
    # compiles five times as fast
    monkeypatch.setattr(library, "FLAGS", UNOPTIMIZED)
    library.load.cache_clear()
    yield folder
    library.load.cache_clear()


def fake_compiler(folder: Path, script: str) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def run_python(program: str) -> "subprocess.CompletedProcess[str]":
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", dedent(program)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=known)


class TestLibrary:
    def test_it_is_built_once_into_a_private_folder(self, cache: Path) -> None:
        assert isinstance(library.load(), ctypes.CDLL)
        (built,) = cache.iterdir()
        assert cache.stat().st_mode & 0o777 == 0o700
        assert built.name.startswith("engine-")
        first = built.stat().st_mtime_ns
        library.load.cache_clear()
        library.load()
        assert [one.stat().st_mtime_ns for one in cache.iterdir()] == [first]

    def test_the_cache_folder_follows_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(library.CACHE_VARIABLE, raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert library.cache_folder() == tmp_path / "xdg" / "ssync-loss"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert library.cache_folder() == tmp_path / ".cache" / "ssync-loss"

    @pytest.mark.parametrize("part", ["source", "flags", "compiler", "processor"])
    def test_source_flags_compiler_and_processor_determine_the_file(
        self, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compiler = library.find_compiler()
        before = library._key(compiler)
        if part == "source":
            changed = tmp_path / "engine.c"
            changed.write_bytes(SOURCE.read_bytes() + b"\n")
            monkeypatch.setattr(library, "SOURCE", changed)
        elif part == "flags":
            monkeypatch.setattr(library, "FLAGS", ("-O2",))
        elif part == "compiler":
            compiler = [fake_compiler(tmp_path, "exit 0")]
        else:
            monkeypatch.setattr(library, "_processor", lambda: "another")
        assert library._key(compiler) != before

    @pytest.mark.parametrize("damage", ["truncated", "empty", "a byte", "a link", "writable by others"])
    def test_a_changed_file_is_never_loaded(self, damage: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        library.load()
        (built,) = cache.iterdir()
        content = built.read_bytes()
        if damage == "a link":
            shutil.move(built, cache.parent / "elsewhere")
            built.symlink_to(cache.parent / "elsewhere")
        elif damage == "writable by others":
            built.chmod(0o777)
        else:
            # a new file, because the old one is loaded
            built.unlink()
            built.write_bytes({"truncated": content[:3000], "empty": b""}.get(damage, b"\0" + content[1:]))
            built.chmod(0o700)
        loaded: list[bytes] = []
        monkeypatch.setattr(library, "CDLL", lambda path: loaded.append(Path(path).read_bytes()))
        library.load.cache_clear()
        library.load()
        assert loaded == [content]
        assert not built.is_symlink()
        assert not built.stat().st_mode & 0o022

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ("link", "is a link"),
            ("file", "File exists"),
            ("open", "can be written by others"),
            ("owner", "another user"),
        ],
    )
    def test_a_folder_that_others_can_write_is_refused(
        self, wrong: str, words: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if wrong == "link":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            cache.symlink_to(tmp_path / "elsewhere")
        elif wrong == "file":
            cache.write_text("")
        else:
            cache.mkdir(mode=0o700)
            if wrong == "open":
                cache.chmod(0o777)
            else:
                monkeypatch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(library.UnavailableError, match=words):
            library.load()
        # `"auto"` silently falls back to torch; `"cpu"` gives the reason
        maps = sample_maps()
        assert_close_loss(SSyncLoss()(*maps), SSyncLoss(backend="torch")(*maps))
        with pytest.raises(ValueError, match=rf"`backend`='cpu' needs a cache folder.*{words}"):
            SSyncLoss(backend="cpu")

    def test_auto_falls_back_silently_without_a_compiler(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(cache.parent))
        monkeypatch.delenv("CC", raising=False)
        maps = sample_maps()
        assert_close_loss(SSyncLoss()(*maps), SSyncLoss(backend="torch")(*maps))
        with pytest.raises(ValueError, match="`backend`='cpu' needs a C compiler; none of cc, gcc, clang"):
            SSyncLoss(backend="cpu")

    def test_the_library_needs_a_posix_system(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "win32")
        assert cpu.missing_library() == "a POSIX system"

    def test_the_library_needs_a_folder_to_load_from(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: str) -> None:
            raise OSError(f"{path}: failed to map segment from shared object")

        monkeypatch.setattr(library, "CDLL", refuse)
        assert "a cache folder that libraries can be loaded from" in str(cpu.missing_library())

    def test_the_library_needs_a_writable_folder(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(**_: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(tempfile, "mkstemp", refuse)
        assert "a cache folder that can be written" in str(cpu.missing_library())

    @pytest.mark.parametrize(
        ("script", "words"),
        [("echo no such flag; exit 3", "failed with 3: no such flag"), ("sleep 60", "took more than")],
    )
    def test_a_compiler_that_fails_or_hangs_is_reported_once(
        self, script: str, words: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CC", fake_compiler(tmp_path / "bin", script))
        monkeypatch.setattr(library, "SECONDS", 0.5)
        maps = sample_maps()
        started = time.monotonic()
        with pytest.warns(UserWarning, match=f"could not compile its CPU engine.*{words}"):
            loss = SSyncLoss()(*maps)
        assert time.monotonic() - started < 20
        assert_close_loss(loss, SSyncLoss(backend="torch")(*maps))
        SSyncLoss()(*maps)
        with pytest.raises(ValueError, match="`backend`='cpu' needs a C compiler that works"):
            SSyncLoss(backend="cpu")
        assert not list(cache.iterdir())

    def test_many_processes_can_build_at_once(self, cache: Path) -> None:
        # loads the module without torch, which takes seconds to import
        code = (
            "import sys\nfrom importlib.util import module_from_spec, spec_from_file_location\n"
            "spec = spec_from_file_location('library', sys.argv[1])\nlibrary = module_from_spec(spec)\n"
            f"spec.loader.exec_module(library)\nlibrary.FLAGS = {UNOPTIMIZED!r}\nlibrary.load()\n"
        )
        processes = [subprocess.Popen([sys.executable, "-c", code, library.__file__]) for _ in range(10)]
        assert [one.wait(timeout=120) for one in processes] == [0] * 10
        assert len(list(cache.iterdir())) == 1

    def test_the_flags_respect_nan(self) -> None:
        assert not {"-ffast-math", "-Ofast", "-ffinite-math-only", "-funsafe-math-optimizations"} & set(library.FLAGS)


def step(*maps: Tensor, **settings: Any) -> tuple[Tensor, ...]:
    loss = SSyncLoss(backend="cpu", **settings)(*maps)
    return (loss.detach(), *torch.autograd.grad(2.0 * loss, maps))


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class TestThreads:
    @pytest.mark.parametrize("shape", [(5, 3, 7, 49, 51), (1, 6, 2, 140, 133), (2, 9, 64, 15, 25)])
    @pytest.mark.parametrize("criterion", ["mse", "cross_entropy"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_any_number_of_threads_gives_the_same_bits(
        self, threads: Any, shape: tuple[int, ...], criterion: str, dtype: torch.dtype
    ) -> None:
        maps = [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(2)]
        results = []
        for number in (1, 2, 3, 8):
            threads(number)
            results.append(step(*maps, criterion=criterion, merge_threshold=0.3, max_different=5))
        for result in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))

    def test_a_forked_child_may_call_the_library_after_its_parent(self, threads: Any) -> None:
        threads(2)
        maps = [torch.randn(8, 4, 11, 24, 24).requires_grad_() for _ in range(2)]
        wanted = step(*maps)
        # start torch's threads, too
        torch.randn(1 << 20).exp().sum()
        context = get_context("fork")
        queue = context.SimpleQueue()

        def child() -> None:
            queue.put([float(one.sum()) if one.dim() == 0 else one.flatten()[:50].tolist() for one in step(*maps)])

        process = context.Process(target=child)
        process.start()
        process.join(60)
        alive = process.is_alive()
        process.kill()
        assert not alive
        assert queue.get() == [float(one) if one.dim() == 0 else one.flatten()[:50].tolist() for one in wanted]

    @pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux tells of forks")
    def test_a_forked_child_may_import_and_call_the_library(self) -> None:
        program = """
            import os, signal, torch
            torch.set_num_threads(2)
            maps = [torch.randn(8, 4, 11, 24, 24, requires_grad=True) for _ in range(2)]
            torch.randn(1 << 20).exp().sum()
            pid = os.fork()
            if pid == 0:
                signal.alarm(60)
                from ssync_loss import SSyncLoss
                from ssync_loss.ssync.engines.cpu.team import address_of_team
                assert address_of_team() is None
                SSyncLoss(backend="cpu")(*maps).backward()
                os._exit(0)
            print(os.waitpid(pid, 0)[1])
            from ssync_loss.ssync.engines.cpu.team import address_of_team
            assert address_of_team() is not None
        """
        done = run_python(program)
        assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr

    @pytest.mark.skipif(_forks.is_forked() is None, reason="only Linux tells of forks")
    @pytest.mark.parametrize("preload", [[], ["torch"], ["ssync_loss"], ["used_threads"]])
    def test_a_child_of_a_fork_server_without_threads_counts_as_no_fork(
        self, preload: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(tmp_path)
        used = "import torch; torch.set_num_threads(2); torch.randn(1 << 20).exp().sum()"
        (tmp_path / "used_threads.py").write_text(used, encoding="utf-8")
        program = f"""
            import os, signal, torch
            signal.alarm(60)
            torch.set_num_threads(2)
            from ssync_loss import SSyncLoss, _forks
            assert _forks.is_forked() is {preload == ["used_threads"]}
            maps = [torch.randn(8, 4, 11, 24, 24, requires_grad=True) for _ in range(2)]
            SSyncLoss(backend="cpu")(*maps).backward()
            SSyncLoss(backend="torch")(*maps).backward()
            assert torch.get_num_threads() == (1 if _forks.is_forked() else 2)
            if os.fork() == 0:
                os._exit(not _forks.is_forked())
            assert os.wait()[1] == 0
        """
        server = f"""
            from multiprocessing import get_context
            context = get_context("forkserver")
            context.set_forkserver_preload({preload})
            process = context.Process(target=exec, args=({dedent(program)!r}, {{}}))
            process.start()
            process.join()
            print(process.exitcode)
        """
        done = run_python(server)
        assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr

    @pytest.mark.parametrize("number", [2, 3])
    def test_the_bits_are_the_same_without_a_team(
        self, threads: Any, number: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        maps = [torch.randn(4, 4, 11, 40, 41).requires_grad_() for _ in range(2)]
        wanted = step(*maps)
        threads(number)
        monkeypatch.setattr(_forks, "_forked", [None])
        assert all(torch.equal(one, other) for one, other in zip(step(*maps), wanted, strict=True))

    @pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux tells of forks")
    def test_a_forked_child_may_call_losses_that_use_torch(self) -> None:
        program = """
            import os, signal, torch, warnings
            from ssync_loss import AdaptiveSSyncLoss, BoundaryRefinementLoss, SSyncLoss
            from ssync_loss.monitor import Monitor
            torch.set_num_threads(2)
            maps = [torch.rand(8, 4, 11, 24, 24, requires_grad=True) for _ in range(2)]
            finer = torch.rand(8, 4, 11, 48, 48, requires_grad=True)
            features = torch.rand(8, 4, 64, 24, 24)
            torch.randn(1 << 20).exp().sum()
            warnings.simplefilter("ignore")
            for backward in (
                lambda: SSyncLoss(kind="probs")(*maps).backward(),
                lambda: SSyncLoss()(maps[0], finer).backward(),
                lambda: SSyncLoss(backend="torch")(*maps).backward(),
                lambda: BoundaryRefinementLoss()(*maps).backward(),
                lambda: Monitor(SSyncLoss(), to="/dev/null")(maps, step=0, loss=SSyncLoss()(*maps)),
                lambda: AdaptiveSSyncLoss(SSyncLoss(), warmup=0)(*maps, features).backward(),
            ):
                pid = os.fork()
                if pid == 0:
                    signal.alarm(60)
                    backward()
                    os._exit(0)
                print(os.waitpid(pid, 0)[1])
        """
        done = run_python(program)
        assert (done.stdout, done.returncode) == ("0\n" * 6, 0), done.stderr

    def test_a_forked_process_warns_and_limits_torch_to_one_thread(
        self, threads: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        threads(2)
        take_one_thread_if_forked("cpu")
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(_forks, "_forked", [True])
        with pytest.warns(UserWarning, match="was forked"):
            SSyncLoss(kind="probs")(*(torch.rand(1, 1, 2, 4, 4, requires_grad=True) for _ in range(2)))
        assert torch.get_num_threads() == 1
        take_one_thread_if_forked("cpu")

    @pytest.mark.skipif(_forks.is_forked() is None, reason="only Linux tells of forks")
    def test_a_process_may_have_any_name(self) -> None:
        wanted, place = _forks._read(), Path("/proc/self/comm")
        before = place.read_bytes()
        try:
            # the system may truncate a name within a letter
            place.write_bytes("обучение".encode()[:15])
            assert _forks._read() is wanted
        finally:
            place.write_bytes(before)

    @pytest.mark.parametrize("told", [b"", b"1 (python) S 1", b"1 (python) S 1 1 1 0 -1 0 0 0 0 0"])
    def test_there_is_no_team_if_forks_are_unknown(self, told: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Path, "read_bytes", lambda _: told)
        assert _forks._read() is None
        monkeypatch.setattr(_forks, "_forked", [None])
        assert team.address_of_team() is None


class TestNumbers:
    """Operations that only the library implements itself."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_converted_as_in_torch(self, dtype: torch.dtype) -> None:
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        every = every[every.isfinite()]
        # the gradient of a single slot is 0, so this tests only the scaling
        grad = torch.cat([every.float(), torch.randn(5000) * torch.logspace(-12, 6, 5000)]).view(1, 1, 1, 1, -1)
        for factor in (1.0, 3.7, 1e-3):
            got = operators._scale(grad, torch.tensor(factor), dtype)
            assert torch.equal(got, (grad * torch.tensor(factor)).to(dtype))
        for special in (torch.nan, torch.inf, -torch.inf):
            got = operators._scale(torch.full((1, 1, 1, 1, 1), special), torch.tensor(1.0), dtype)
            assert torch.equal(got.float().isnan(), torch.tensor(special).isnan().expand(got.shape))
            assert got.isnan().all() or got.item() == special
        # the loss of half precision equals that of float32
        logits = torch.stack([every[: len(every) // 2 * 2], torch.zeros(len(every) // 2 * 2, dtype=dtype)]).view(
            1, 1, 2, 2, -1
        )
        target, region = torch.zeros(logits[:, :, 0].shape).long(), torch.ones(logits[:, :, 0].shape).bool()
        half, single = (
            selective_distillation_loss(one, target, region, criterion="cross_entropy", reduction="none", backend="cpu")
            for one in (logits, logits.float())
        )
        assert torch.equal(half, single)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_exponential_is_exact_to_rounding(self, dtype: torch.dtype) -> None:
        # two slots give P = 1 / (1 + exp(-x)), down to the smallest numbers
        below = torch.linspace(0, 80 if dtype == torch.float32 else 700, 200_001, dtype=dtype)
        logits = torch.stack([torch.zeros_like(below), -below]).view(1, 1, 2, 1, -1)
        target, region = torch.zeros(1, 1, 1, len(below)).long(), torch.ones(1, 1, 1, len(below)).bool()
        got = selective_distillation_loss(
            logits, target, region, criterion="cross_entropy", reduction="none", backend="cpu"
        ).flatten()
        wanted = torch.log1p((-below.double()).exp()).to(dtype)
        normal = wanted > 1e-37 if dtype == torch.float32 else wanted > 1e-300
        eps = torch.finfo(dtype).eps
        # the logarithm of 2^x multiplies an error of the argument by x
        error = ((got - wanted).abs() / wanted)[normal] / (1 + below[normal])
        assert error.max() < 2 * eps

    @pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are of x86")
    @pytest.mark.parametrize("flag", ["-mno-avx512f", "-mno-avx"])
    def test_every_instruction_set_counts_valid_patches_only(
        self, flag: str, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In a clip of one valid patch no slot exceeds its mean, and nothing is merged."""
        monkeypatch.setattr(library, "FLAGS", (*FLAGS, flag))
        num_patches = 37
        valid = torch.eye(num_patches, dtype=torch.bool).view(num_patches, 1, 1, num_patches)
        for dtype in (torch.float32, torch.float64):
            enc, dec = 1 + torch.rand(2, num_patches, 1, 3, 1, num_patches, dtype=dtype)
            found = pseudo_labels(enc, dec, merge_threshold=0.0, valid=valid, backend="cpu")
            assert torch.equal(found.representative, torch.arange(3).expand(num_patches, 3))

    def test_a_process_that_compiles_nothing_loads_no_dynamo(self) -> None:
        done = run_python(
            """
            import sys, torch
            from ssync_loss import SSyncLoss
            from ssync_loss.functional import pseudo_labels

            maps = [torch.randn(1, 2, 3, 4, 4, requires_grad=True) for _ in range(2)]
            (2 * SSyncLoss(merge_threshold=0.5)(*maps)).backward()
            pseudo_labels(*maps, merge_threshold=0.5, backend="cpu")
            print("torch._dynamo" in sys.modules)
            """
        )
        assert (done.stdout, done.stderr) == ("False\n", "")

    def test_batched_gradients_and_traces_use_the_operators(self) -> None:
        enc, dec = (leaf(one) for one in sample_maps())
        loss = SSyncLoss(merge_threshold=0.5, backend="cpu")(enc, dec)
        (one,) = torch.autograd.grad(loss, [enc], retain_graph=True)
        (batch,) = torch.autograd.grad(loss, [enc], torch.tensor([1.0, 2.0]), is_grads_batched=True)
        assert torch.equal(batch, torch.stack([one, 2 * one]))

        def label(enc: Tensor, dec: Tensor) -> tuple[Tensor, ...]:
            return tuple(pseudo_labels(enc, dec, merge_threshold=0.5, backend="cpu"))

        with warnings.catch_warnings():
            # a trace warns of every check of a shape
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(label, (enc.detach(), dec.detach()))
        for got, wanted in zip(traced(dec, enc), label(dec, enc), strict=True):
            assert torch.equal(got, wanted)

    def test_operators_pass_opcheck(self) -> None:
        enc, dec = (leaf(one[:1, :, :, :3, :4]) for one in sample_maps())
        knobs = torch.tensor([0.6, 1.0, 0.5], dtype=torch.float64)
        target, region = torch.zeros(1, 2, 3, 4).long(), torch.ones(1, 2, 3, 4).bool()
        all_valid, cross_entropy = torch.ones(1, 4).bool(), ([1, 1, 0, 1], [0.1, 0.5])
        squared_error = ([1, 1, 0, 0], [0.0, 1.0])
        mixed = (leaf(enc.half()), leaf(dec.double()), region, all_valid, torch.tensor(True))
        found = (torch.zeros(2, 1, 2, 3, 4, dtype=torch.int8), torch.zeros(1, 4, dtype=torch.int8))
        cases: list[tuple[Any, tuple[Any, ...]]] = [
            (operators._step_operator, (enc, dec, *(None,) * 5, knobs, *squared_error, True, True, True)),
            (operators._step_operator, (*mixed, *found, knobs, *cross_entropy, False, True, True)),
            (operators._find_operator, (enc.detach(), dec.detach(), region, None, None, knobs)),
            (operators._label_operator, (enc.detach(), dec.detach(), region, None, knobs, *squared_error)),
            (operators._distill_operator, (dec, target, region, None, *cross_entropy, "none", True)),
            (operators._scale_operator, (enc.detach(), torch.tensor(2.0), torch.float16)),
        ]
        for operator, inputs in cases:
            torch.library.opcheck(operator._opoverload, inputs)


def test_the_library_runs_clean_under_the_sanitizers(tmp_path: Path) -> None:
    """A separate program checks addresses, leaks, undefined behavior, and equal bits for any number of threads."""
    compiler = library.find_compiler()
    program = tmp_path / "cases"
    flags = ["-std=gnu11", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]
    built = subprocess.run(
        [*compiler, *flags, f"-I{SOURCE.parent}", str(TESTS / "engine_cases.c"), "-o", str(program), "-lm"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program), "400"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "400 cases\n"


def test_the_self_check_finds_mistakes_in_the_library(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in any step makes the result differ from torch."""
    source = SOURCE.read_text()
    breaks = {
        "value > largest[i]": "value < largest[i]",
        # bug 114375 of GCC: another lane decides
        "kept[i] = valid[start + i]": "kept[i] = valid[start + i / LANES * LANES + i % 4]",
        "one[word] & other[word]": "one[word]",
        "area[s] > area[largest[root]]": "area[s] < area[largest[root]]",
        "DIFFERS(before[i])": "0",
        "r * r + q": "r * r - q",
        "p + excess[i]": "p - excess[i]",
    }
    for right, wrong in breaks.items():
        assert right in source
        broken = tmp_path / "engine.c"
        broken.write_text(source.replace(right, wrong))
        monkeypatch.setattr(library, "SOURCE", broken)
        library.load.cache_clear()
        assert complaint_about(ENGINES["cpu"], ENGINES["torch"], "cpu") is not None, wrong
