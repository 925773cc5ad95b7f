"""A step of each method, as the benchmarks take it: it agrees with its definition, and one that does not is refused."""

import dataclasses
import re
from functools import partial
from typing import Any

import pytest
import torch
from benchmarks import gate
from benchmarks.add_ons import ADD_ONS, BY_NAME
from benchmarks.contenders import MERGE_THRESHOLD, STEP, step_of
from benchmarks.counted import count
from benchmarks.results import Key, Row
from examples.inputs import Inputs, Step, moving_blobs
from examples.neighbors import steps
from torch import nn

import ssync_loss
from benchmark_results import options
from ssync_loss import attention, curriculum, functional
from ssync_loss.functional import pseudo_labels
from ssync_loss.testing import decidable_clips

# definitions that take seconds, or have several outputs
SLOW = ("StructureAware", "SemanticConsistency", "AffinityConsistency", "SemanticAware", "InstanceConsistency", "dense")


def test_the_page_of_steps_is_true() -> None:
    inputs = Inputs({"B": 2, "T": 4, "S": 7, "H": 8, "W": 12, "D": 16})
    loss, gradient = steps.mask_diversity(inputs).once()
    assert (loss.shape, gradient.shape) == ((), inputs.maps[0].shape)


@pytest.mark.parametrize("name", [*BY_NAME, "SSync cpu", "SSync torch"])
def test_an_agreeing_step_passes_and_a_wrong_one_is_refused(name: str) -> None:
    keys = [Key("gate", gate.CASE, name, (), dtype) for dtype in ("float32", "float16")]
    keys = keys[: 2 if name.startswith("SSync") else 1]
    assert gate.check(keys, options()) == [Row(key) for key in keys]
    if name.startswith(SLOW) and name != "dense":
        return
    shape = gate.SHAPE if name in BY_NAME else gate.SSYNC_SHAPES[0]
    right, again = (step_of(STEP, name, Inputs(shape), gate=True) for _ in range(2))
    wrong = [dataclasses.replace(right, seen=lambda outputs: _off(right.seen(outputs)))]
    # a gradient is a little off in one of the leaves
    for leaf in right.leaves[:1] + right.leaves[-1:]:
        size = max(one.abs().max().item() for one in torch.autograd.grad(right.forward().sum(), right.leaves))
        off = partial(lambda leaf, size: right.forward() + size * (leaf - leaf.detach()).sum(), leaf, 1e-4 * size)
        wrong.append(dataclasses.replace(right, forward=off))
    for one_wrong in wrong:
        with pytest.raises(AssertionError):
            gate.check_step(one_wrong, again)


def _off(outputs: Any) -> Any:
    return outputs * 1.001 if outputs.is_floating_point() else outputs ^ True


def test_wrong_labels_are_refused() -> None:
    right, again = (step_of("pseudo-labels", "SSync cpu", Inputs(gate.SSYNC_SHAPES[0])) for _ in range(2))
    found = right.forward()
    found.dec_labels[0, 0, 0, 0] += 1
    with pytest.raises(AssertionError, match="Mismatched elements: 1 /"):
        gate.check_step(dataclasses.replace(right, forward=lambda: found), again)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rounding_decides_no_label_of_the_gate(dtype: str) -> None:
    for shape in gate.SSYNC_SHAPES:
        enc, _ = Inputs(shape, dtype=dtype).maps
        assert decidable_clips(enc.detach().float(), merge_threshold=MERGE_THRESHOLD).all()


def test_a_step_returns_its_gradients_and_accumulates_none() -> None:
    leaf = torch.ones(3, requires_grad=True)
    step = Step(lambda: leaf * 2, lambda: leaf, [leaf], incoming=(torch.full((3,), 5.0),))
    assert [one.tolist() for one in step.once()] == [[2.0] * 3, [10.0] * 3]
    assert leaf.grad is None


def test_a_cyclic_scan_takes_almost_twice_the_steps() -> None:
    inputs = Inputs({"B": 2, "T": 4, "S": 3, "H": 4, "W": 6, "D": 8})
    forth, cyclic = (count(steps.scan(inputs, cyclic=one).forward, "cpu")["launches"] for one in (False, True))
    # one launch stacks the outputs
    assert (cyclic - 1) * 4 == (forth - 1) * 7


def test_blobs_are_redundant_and_have_both_regions() -> None:
    labels = pseudo_labels(*moving_blobs({"B": 2, "T": 4, "S": 11, "H": 24, "W": 24}), merge_threshold=0.7)
    # slots 0 and 1, 3 and 4 and so on share a blob
    assert torch.equal(labels.representative[:, 0::3], labels.representative[:, 1::3])
    assert min(labels.boundary.float().mean(), labels.interior.float().mean()) > 0.05


def test_every_public_loss_and_part_has_a_step() -> None:
    measured = {re.split("[ .,]", one.name)[0] for one in ADD_ONS}
    public = {name: getattr(ssync_loss, name) for name in ssync_loss.__all__}
    modules = {name for name, one in public.items() if isinstance(one, type) and issubclass(one, nn.Module)}
    ours = {"SSyncLoss", "AdaptiveSSyncLoss", "BoundaryRefinementLoss", "InteriorDenoisingLoss"}
    ours |= {"boundary_region", "interior_region", "merge_slots", "neighbor_difference", "pseudo_labels"}
    ours |= {"selective_distillation_loss", "slot_overlap"}
    # another suite has the first two; others run inside of an entry
    others = {"DenseDecoderAlignmentLoss", "DenseEncoderAlignmentLoss", "SemanticSlots", "propagate_masks"}
    others |= set(curriculum.__all__) - {"slot_error", "SlotCurriculum"}
    functions = {name for name in functional.__all__ if not name.endswith("_loss")}
    assert measured >= {*modules, *functions, *attention.__all__, "EmaTeacher", "SlotCurriculum"} - ours - others
    assert measured.isdisjoint(ours | others)
