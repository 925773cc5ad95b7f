"""The base of all losses: settings by name, a repr, subclasses, typed calls."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ssync_loss import losses
from ssync_loss._module import LossModule
from ssync_loss.methods.ino.centered import CenteredCrossEntropy
from ssync_loss.methods.srl.temporal import TemporalSlotContrastLoss, temporal_slot_contrast_loss

SOURCE = Path(__file__).parents[1] / "src"

# arguments of constructors that are not settings
POSITIONAL: dict[str, tuple[Any, ...]] = {
    "CenteredCrossEntropy": (2,),
    "MaskedTokenLoss": (CenteredCrossEntropy(2),),
    "OutGenerativeLoss": (CenteredCrossEntropy(2),),
}
# the losses of SSync have their own tests
CLASSES = {name: getattr(losses, name) for name in losses.__all__ if issubclass(getattr(losses, name), LossModule)}
LOSSES = [name for name, one in CLASSES.items() if one.__module__.startswith("ssync_loss.methods")]

# another value of each setting
OTHER = {
    "all_reduce": True,
    "balance": "per_term",
    "base_temperature": 0.2,
    "chunk_size": 3,
    "eps": 0.3,
    "filters": "torch",
    "group": object(),
    "group_frames": None,
    "iters": 5,
    "k1": 0.02,
    "k2": 0.04,
    "kind": "supervised",
    "m_c": 0.5,
    "margin": 0.7,
    "marginals": "uniform",
    "metric": "euclidean",
    "negatives": "video",
    "normalize": "channel",
    "num_picked": 2,
    "pool": 2,
    "same_frame": False,
    "sigma": 1.0,
    "tau_s": 0.3,
    "tau_t": 0.2,
    "temperature": 0.5,
    "top_k": 4,
    "update_center": True,
    "window": 5,
}


def made(name: str, **settings: Any) -> Any:
    return getattr(losses, name)(*POSITIONAL.get(name, ()), **settings)


def defaults(name: str) -> dict[str, Any]:
    return getattr(losses, name).__init__.__kwdefaults__ or {}


@pytest.mark.parametrize("name", LOSSES)
def test_settings_are_attributes(name: str) -> None:
    wanted = {setting: OTHER[setting] for setting in defaults(name)}
    for criterion in (made(name, **wanted), made(name)):
        assert isinstance(criterion, LossModule)
        for setting, value in wanted.items():
            setattr(criterion, setting, value)
        assert criterion.settings == wanted
        assert {setting: getattr(criterion, setting) for setting in wanted} == wanted
    assert made(name).settings == defaults(name)


@pytest.mark.parametrize("name", LOSSES)
def test_the_repr_shows_other_settings_than_the_defaults(name: str) -> None:
    assert "=" not in repr(made(name))
    for setting in defaults(name):
        assert f"{setting}={OTHER[setting]!r}" in repr(made(name, **{setting: OTHER[setting]}))


@pytest.mark.parametrize("name", LOSSES)
def test_settings_are_not_in_the_state_dict(name: str) -> None:
    criterion = made(name)
    assert {one for one in criterion.state_dict() if "center" not in one} == set()
    assert list(criterion.parameters()) == []
    for twin in (copy.copy(criterion), copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert twin.settings == criterion.settings


def test_a_changed_setting_takes_effect_and_is_checked() -> None:
    slots = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    criterion = TemporalSlotContrastLoss()
    criterion.temperature, criterion.kind = 0.7, "supervised"
    assert torch.equal(criterion(slots), temporal_slot_contrast_loss(slots, temperature=0.7, kind="supervised"))
    criterion.temperature = -1.0
    with pytest.raises(ValueError, match="`temperature` must be finite and above 0"):
        criterion(slots)


def test_settings_are_read_only_as_a_whole() -> None:
    criterion = TemporalSlotContrastLoss()
    with pytest.raises(AttributeError):
        criterion.settings = {}  # type: ignore[misc]
    criterion.settings["temperature"] = 9.0
    assert criterion.temperature == 0.1


def test_a_subclass_with_another_constructor_keeps_the_settings_of_its_parent() -> None:
    class Sharp(TemporalSlotContrastLoss):
        def __init__(self, *, sharpness: float = 2.0) -> None:
            super().__init__(temperature=1 / sharpness)
            self.sharpness = sharpness

    slots = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    criterion = Sharp(sharpness=4.0)
    assert criterion.settings == {"temperature": 0.25, "kind": "adjacent", "negatives": "batch"}
    assert repr(criterion) == "Sharp(temperature=0.25)"
    assert torch.equal(criterion(slots), temporal_slot_contrast_loss(slots, temperature=0.25))


def test_the_merge_threshold_is_always_shown() -> None:
    class Merging(LossModule):
        __module__ = "ssync_loss.somewhere"

        def __init__(self, *, merge_threshold: float | None = 0.6, step: int = 0) -> None:
            super().__init__(merge_threshold=merge_threshold, step=step)

    assert repr(Merging()) == "Merging(merge_threshold=0.6)"
    assert repr(Merging(merge_threshold=None, step=3)) == "Merging(merge_threshold=None, step=3)"
    # the setting may be a tensor
    assert repr(Merging(merge_threshold=torch.tensor(0.5))) == "Merging(merge_threshold=tensor(0.5000))"  # type: ignore[arg-type]


def test_calls_have_the_types_of_forward(tmp_path: Path) -> None:
    file = tmp_path / "host.py"
    file.write_text(
        "import torch\n"
        "from ssync_loss import AffinityConsistencyLoss\n"
        "criterion = AffinityConsistencyLoss(tau_s=0.2)\n"
        "s = torch.zeros(1, 2, 3, 4)\n"
        "criterion.tau_s = 0.5\n"
        "loss: torch.Tensor = criterion(s, s, mask=None)\n"
        "criterion(s)\n"
        "criterion(s, s, mask=3)\n"
        "wrong: str = criterion(s, s)\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), "--no-incremental", str(file)]
    done = subprocess.run(
        command, cwd=tmp_path, env={"MYPYPATH": str(SOURCE), "PATH": ""}, capture_output=True, text=True, check=False
    )
    errors = [line.removeprefix("host.py:").split(":")[0] for line in done.stdout.splitlines() if "host.py" in line]
    assert errors == ["7", "8", "9"], done.stdout + done.stderr
