"""Import paths and pickles of earlier versions."""

import base64
import pickle
import subprocess
import sys
import zlib
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssync_loss
from ssync_loss import _moved, losses
from ssync_loss._moved import MOVED

TESTS = Path(__file__).parent

# paths and names of version 0.1.0
OLD = {
    "attention": ["CorrelationFusion", "SemanticAwareSlotAttention", "SemanticSlots"],
    "attention.correlation": ["CorrelationFusion"],
    "attention.semantic": ["GATES", "Gate", "SemanticAwareSlotAttention", "SemanticSlots"],
    "curriculum": ["SlotCurriculum", "hold_rows", "inherit_moments", "milestones", "slot_schedule"],
    "curriculum.allotment": ["allot_children"],
    "curriculum.children": ["NEIGHBORS", "Neighbors", "place_children", "spawn_children", "_radii"],
    "curriculum.controller": ["SlotCurriculum"],
    "curriculum.error": ["slot_error"],
    "curriculum.moments": ["hold_rows", "inherit_moments", "rows_of"],
    "curriculum.schedule": ["milestones", "slot_schedule"],
    "inference": ["Step", "cyclic_scan"],
    "losses.affinity": ["AffinityConsistencyLoss", "affinity_consistency_loss"],
    "losses.centered": ["CenteredCrossEntropy", "check_criterion"],
    "losses.dense": [
        "DenseDecoderAlignmentLoss",
        "DenseEncoderAlignmentLoss",
        "dense_decoder_alignment_loss",
        "dense_encoder_alignment_loss",
    ],
    "losses.diversity": ["EPSILON", "MaskDiversityLoss", "mask_diversity_loss"],
    "losses.instance": ["InstanceConsistencyLoss", "METRICS", "instance_consistency_loss", "valid_instances"],
    "losses.masked_tokens": ["MaskedTokenLoss", "masked_token_loss"],
    "losses.out_generative": ["BALANCES", "OutGenerativeLoss", "out_generative_loss"],
    "losses.prototypes": ["PrototypeHead"],
    "losses.redundancy": ["EPSILON", "SlotRedundancyLoss", "redundant_slots", "slot_redundancy_loss"],
    "losses.semantic": ["EPSILON", "MARGINALS", "SemanticConsistencyLoss", "semantic_consistency_loss"],
    "losses.structure": ["FILTERS", "NORMALIZE", "StructureAwareLoss", "structure_aware_loss"],
    "losses.temporal": ["CONTRASTS", "NEGATIVES", "TemporalSlotContrastLoss", "temporal_slot_contrast_loss"],
    "propagation": ["propagate_labels", "propagate_masks"],
    "reference.dense": [
        "reference_dense_decoder_alignment_loss",
        "reference_dense_encoder_alignment_loss",
        "reference_slot_redundancy_loss",
        "reference_temporal_slot_contrast_loss",
    ],
    "reference.ino": [
        "reference_affinity_consistency_loss",
        "reference_centered_cross_entropy",
        "reference_masked_token_loss",
        "reference_moved_center",
        "reference_out_generative_loss",
        "reference_propagate_masks",
    ],
    "reference.slotcurri": [
        "reference_allot_children",
        "reference_place_children",
        "reference_slot_error",
        "reference_structure_aware_loss",
    ],
    "reference.smtc": [
        "reference_correlation_fusion",
        "reference_instance_consistency_loss",
        "reference_mask_diversity_loss",
        "reference_semantic_consistency_loss",
        "reference_sinkhorn",
        "reference_slot_attention",
        "reference_valid_instances",
    ],
    "sinkhorn": ["scalings", "sinkhorn", "transport_plan"],
    "tube_mask": ["clip_mask"],
}


@pytest.mark.parametrize("old", OLD)
def test_an_old_path_has_its_names(old: str) -> None:
    module = import_module(f"ssync_loss.{old}")
    assert [name for name in OLD[old] if not hasattr(module, name)] == []


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_has_the_objects_of_the_new_one(old: str) -> None:
    places = [import_module(f"ssync_loss.{new}") for new in MOVED[old].split()]
    here = vars(import_module(f"ssync_loss.{old}"))
    there: dict[str, Any] = {name: one for place in places for name, one in vars(place).items()}
    shared = {name for name in there if not name.startswith("__")} & here.keys()
    assert len(shared) > 1
    assert all(here[name] is there[name] for name in shared)
    # the module of a removed file has all of its names
    if not Path(here.get("__file__") or "").is_file():
        assert {name for name in there if not name.startswith("__")} <= here.keys()
        assert here["__doc__"].startswith("Moved to ssync_loss.")


def test_a_moved_module_may_have_several_places_and_an_empty_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(MOVED, "old", "")
    monkeypatch.setitem(MOVED, "old.both", "methods.ino.tube_mask methods.smtc.sinkhorn")
    for name in ("old", "old.both"):
        monkeypatch.delitem(sys.modules, f"ssync_loss.{name}", raising=False)
    both = import_module("ssync_loss.old.both")
    assert both.clip_mask is import_module("ssync_loss.methods.ino.tube_mask").clip_mask
    assert both.sinkhorn is import_module("ssync_loss.methods.smtc.sinkhorn").sinkhorn
    for name in ("old", "old.both"):
        del sys.modules[f"ssync_loss.{name}"]
    delattr(ssync_loss, "old")


def test_other_names_are_not_found() -> None:
    for name in ("ssync_loss.losses.nothing", "ssync_loss.nothing", "other.sinkhorn"):
        with pytest.raises(ModuleNotFoundError):
            import_module(name)
    assert find_spec("sinkhorn") is None


def test_the_finder_is_installed_once_before_the_path_finder() -> None:
    _moved.install()
    (place,) = [i for i, one in enumerate(sys.meta_path) if type(one).__module__ == "ssync_loss._moved"]
    # an update may leave empty folders, which the path finder takes for packages
    assert place < sys.meta_path.index(PathFinder)


def test_old_paths_are_imported_on_demand() -> None:
    code = (
        "import sys, ssync_loss\n"
        "assert not [one for one in sys.modules if one.removeprefix('ssync_loss.') in ssync_loss._moved.MOVED\n"
        "            and not one.endswith('_modules')]\n"
        "from ssync_loss.losses import dense\n"
        "import ssync_loss.sinkhorn\n"
        "print(dense.dense_decoder_alignment_loss.__module__, ssync_loss.sinkhorn.sinkhorn.__module__)\n"
    )
    source = str(TESTS.parent / "src")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r})\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ssync_loss.methods.srl.dense", "ssync_loss.methods.smtc.sinkhorn"]


@pytest.fixture(scope="module")
def unpickled() -> dict[str, nn.Module]:
    """Return modules that version 0.1.0 pickled with settings other than the defaults."""
    text = "".join((TESTS / "old_losses.b85").read_text().split())
    modules = pickle.loads(zlib.decompress(base64.b85decode(text)))
    return {type(one).__name__: one for one in modules}


def test_every_loss_has_an_old_pickle(unpickled: dict[str, nn.Module]) -> None:
    classes = {name for name in losses.__all__ if issubclass(getattr(losses, name), nn.Module)}
    # version 0.1.0 did not have it
    classes.remove("AdaptiveSSyncLoss")
    assert unpickled.keys() == classes | {"CorrelationFusion", "SlotCurriculum"}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


LABELS = torch.arange(16).view(1, 2, 2, 4) % 3
EVERYWHERE = torch.ones(1, 2, 3, 2, dtype=torch.bool)
# settings other than the defaults, and arguments
CASES: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "AffinityConsistencyLoss": ({"tau_s": 0.2}, (randn(1, 2, 5, 3), 2 * randn(1, 2, 5, 3))),
    "BoundaryRefinementLoss": ({"min_same": 2}, (randn(1, 2, 3, 2, 4), randn(1, 2, 3, 4, 2).mT)),
    "DenseDecoderAlignmentLoss": (
        {"group_frames": 1, "temperature": 0.2},
        (randn(1, 2, 3, 2, 4), 1 + randn(1, 2, 3, 2, 4), LABELS),
    ),
    "DenseEncoderAlignmentLoss": ({"top_k": 3}, (randn(1, 2, 3, 2, 4), 1 + randn(1, 2, 3, 2, 4), LABELS)),
    "InstanceConsistencyLoss": (
        {"margin": 0.9},
        (randn(1, 2, 3, 2, 4), 1 + randn(1, 2, 3, 2, 4), EVERYWHERE, EVERYWHERE),
    ),
    "InteriorDenoisingLoss": ({"temperature": 0.5}, (randn(1, 2, 3, 2, 4), torch.zeros(1, 2, 3, 2, 4))),
    "MaskDiversityLoss": ({}, (randn(1, 2, 3, 2, 4),)),
    "SSyncLoss": (
        {"merge_threshold": 0.7, "start_step": 3, "ramp_steps": 2},
        (randn(1, 2, 3, 2, 4), randn(1, 2, 3, 4, 2).mT),
    ),
    "SemanticConsistencyLoss": ({"pool": 2}, (randn(1, 2, 3, 2, 4), 2 * randn(1, 2, 3, 2, 4), randn(1, 2, 5, 2, 4))),
    "SlotRedundancyLoss": ({"num_picked": 2}, (randn(1, 2, 3, 4).softmax(3), randn(1, 2, 3, 5))),
    "StructureAwareLoss": ({"filters": "torch"}, (randn(1, 3, 3, 3, 4), 1 + randn(1, 3, 3, 3, 4))),
    "TemporalSlotContrastLoss": ({"kind": "supervised"}, (randn(1, 3, 3, 4),)),
}


@pytest.mark.parametrize("name", CASES)
def test_an_old_pickle_equals_a_new_module(name: str, unpickled: dict[str, nn.Module]) -> None:
    settings, given = CASES[name]
    old, new = unpickled[name].eval(), getattr(losses, name)(**settings).eval()
    assert type(old) is type(new)
    assert repr(old) == repr(new)
    step = {"step": 4} if name == "SSyncLoss" else {}
    assert torch.equal(old(*given, **step), new(*given, **step))
    assert old(*given, **step) != 0


def test_old_pickles_have_their_state(unpickled: dict[str, Any]) -> None:
    assert unpickled["CenteredCrossEntropy"].center.tolist() == [0.0, 0.0]
    assert unpickled["CenteredCrossEntropy"].tau_s == 0.3
    assert unpickled["MaskedTokenLoss"].update_center
    assert unpickled["OutGenerativeLoss"].balance == "per_term"
    assert unpickled["PrototypeHead"](torch.ones(1)).shape == (2,)
    assert unpickled["SlotCurriculum"].budgets == (2, 3)
    assert unpickled["CorrelationFusion"].grid == (1, 1)
