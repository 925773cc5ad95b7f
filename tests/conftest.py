"""Seeds and hypothesis profiles.

``ci`` (the default) draws 130 examples of 16 clips each: 2,080 cases a property. ``slow`` draws 1,250, so
20,000 cases: ``python -m pytest --hypothesis-profile=slow tests/test_against_reference.py``.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# its checks say what they compared
pytest.register_assert_rewrite("contract")

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

settings.register_profile(
    "ci", max_examples=130, deadline=None, derandomize=True, database=None, suppress_health_check=QUIET
)
settings.register_profile(
    "slow", max_examples=1250, deadline=None, derandomize=True, database=None, suppress_health_check=QUIET
)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """A compiler that has seen nothing, and remembers nothing."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def fresh_kernels(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for the default compiler's code that holds nothing from before this run."""
    folder = tmp_path_factory.getbasetemp() / "kernels"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))


torch.set_num_threads(1)
if not torch.cuda.is_available():
    # read by triton when a kernel is defined: kernels then run on the CPU, slowly
    os.environ["TRITON_INTERPRET"] = "1"
