"""Seeds and hypothesis profiles.

``ci`` (the default) draws 130 examples of 16 clips each, 2,080 cases per property. ``slow`` draws 1,250 examples,
20,000 cases: ``python -m pytest --hypothesis-profile=slow tests/test_against_reference.py``. ``quick`` draws 10.
"""

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# its assertions show the values that they compare
pytest.register_assert_rewrite("contract")

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

settings.register_profile(
    "ci", max_examples=130, deadline=None, derandomize=True, database=None, suppress_health_check=QUIET
)
settings.register_profile(
    "quick", max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=QUIET
)
settings.register_profile(
    "slow", max_examples=1250, deadline=None, derandomize=True, database=None, suppress_health_check=QUIET
)
settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compiles: uses torch.compile; given with the fixture fresh_compiler")
    config.addinivalue_line("markers", "kernels: runs Triton's kernels, or its compiler")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that compile and tests that run kernels, because `matrix.py` counts them separately."""
    # this import needs TRITON_INTERPRET, which is set below
    from ssync_loss.ssync.engines.triton._limits import MIN_VERSION, VERSION

    for item in items:
        parameters = getattr(item, "callspec", None)
        if item.path.name.startswith("test_kernels") or (parameters and "triton" in parameters.params.values()):
            item.add_marker("kernels")
            if VERSION < MIN_VERSION:
                item.add_marker(pytest.mark.skip("needs Triton {}.{} or above".format(*MIN_VERSION)))
        if any(name.endswith("fresh_compiler") for name in getattr(item, "fixturenames", ())):
            item.add_marker("compiles")


def frames_compiled() -> int:
    # looked up, because the import takes a second
    module = sys.modules.get("torch._dynamo.convert_frame")
    return module.FRAME_COUNTER if module else 0


@pytest.fixture(autouse=True)
def _marked_if_it_compiles(request: pytest.FixtureRequest) -> Iterator[None]:
    before = frames_compiled()
    yield
    if frames_compiled() > before:
        assert request.node.get_closest_marker("compiles"), "use the fixture fresh_compiler, or mark it: compiles"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Reset the compiler before and after a test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def fresh_kernels(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the default compiler an empty folder for its code."""
    folder = tmp_path_factory.getbasetemp() / "kernels"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))


torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined; kernels then run on the CPU, slowly
    os.environ["TRITON_INTERPRET"] = "1"
