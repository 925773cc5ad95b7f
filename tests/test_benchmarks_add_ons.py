"""The neighboring methods in the benchmarks: who is measured, against which definition, and what is said of it."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import add_ons as entries
from benchmarks import gate
from benchmarks.add_on_tables import costs, growth_of
from benchmarks.add_ons import ADD_ONS, BY_NAME, AddOn, Inputs, Step
from benchmarks.counting import count
from benchmarks.results import Results, values_from_json
from benchmarks.suites import add_ons
from benchmarks.tables import section
from benchmarks.weak_spots import weak_spots
from torch import Tensor, nn

import ssync_loss
from benchmark_results import Machine, measured
from ssync_loss import attention, curriculum, functional

SUITE = ("add_ons",)
COMMITTED = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu.json"
SMALL = {"B": 2, "T": 4, "S": 3, "H": 8, "W": 12, "D": 8, "Kp": 16, "weights": 2 * 256**2}
# their definitions take seconds, or they have several outputs
SLOW = ("StructureAwareLoss", "SemanticConsistencyLoss", "AffinityConsistencyLoss", "SemanticAwareSlotAttention")
FORWARD_ONLY = {
    "slot_error",
    "SlotCurriculum, at a milestone",
    "SlotCurriculum, elsewhere",
    "a scan of some step",
    "cyclic_scan of the same step",
    "sinkhorn",
    "valid_instances",
    "EmaTeacher.update",
    "clip_mask",
    "propagate_labels, 64 patches at once",
}
QUICK = [one for one in ADD_ONS if not one.name.startswith((*SLOW, "InstanceConsistencyLoss, P=8"))]


def named(one: AddOn) -> str:
    return one.name


@pytest.fixture(scope="module")
def made() -> Results:
    """What a machine gives on which every add-on grows as it should."""
    with pytest.MonkeyPatch.context() as patch:
        return measured(patch, suites=SUITE)


class TestEntries:
    def test_every_public_loss_has_one(self) -> None:
        public = {name for name in ssync_loss.__all__ if _is_module(getattr(ssync_loss, name))}
        ours = {"SSyncLoss", "AdaptiveSSyncLoss", "BoundaryRefinementLoss", "InteriorDenoisingLoss"}
        # a suite of their own
        dense = {"DenseDecoderAlignmentLoss", "DenseEncoderAlignmentLoss"}
        assert {one.of for one in ADD_ONS} >= public - ours - dense
        assert {one.of for one in ADD_ONS}.isdisjoint(ours | dense)

    def test_so_has_every_other_part_of_an_add_on(self) -> None:
        measured_ones = {one.of for one in ADD_ONS}
        assert measured_ones >= {*attention.__all__, "EmaTeacher", "SlotCurriculum"} - {"SemanticSlots"}
        ours = {"boundary_region", "interior_region", "merge_slots", "neighbor_difference", "pseudo_labels"}
        ours |= {"selective_distillation_loss", "slot_overlap"}
        # at a milestone, and inside of a longer one
        events = set(curriculum.__all__) - {"slot_error", "SlotCurriculum"} | {"propagate_masks"}
        losses = {name for name in functional.__all__ if name.endswith("_loss")}
        assert set(functional.__all__) - ours - events - losses <= measured_ones

    def test_names_are_told_apart(self) -> None:
        assert len(BY_NAME) == len(ADD_ONS)

    @pytest.mark.parametrize("one", [one for one in ADD_ONS if one.of], ids=named)
    def test_measures_what_it_is_named_after(self, one: AddOn, monkeypatch: pytest.MonkeyPatch) -> None:
        class AskedError(Exception):
            pass

        def ask(*_: Any, **__: Any) -> Any:
            raise AskedError

        monkeypatch.setattr(entries, one.of, ask)
        with pytest.raises(AskedError):
            one.step(Inputs(SMALL)).forward()

    def test_the_forms_of_a_loss_are_compared_with_each_other(self) -> None:
        forms = [{one.name for one in ADD_ONS if one.value == value} for value in ("structure", "semantic", "affinity")]
        assert [len(names) for names in forms] == [2, 2, 2]

    def test_a_cyclic_scan_takes_almost_twice_the_steps(self) -> None:
        forth, cyclic = (
            count(entries._scan(Inputs(SMALL), cyclic=one).forward, "cpu")["launches"] for one in (False, True)
        )
        # beside the steps, one output is stacked, and two are
        assert isinstance(forth, int)
        assert isinstance(cyclic, int)
        assert (cyclic - 2) * 4 == (forth - 1) * 7


def _is_module(one: object) -> bool:
    return inspect.isclass(one) and issubclass(one, nn.Module)


class TestGate:
    @pytest.mark.parametrize("one", ADD_ONS, ids=named)
    def test_all_agree_with_their_definitions(self, one: AddOn) -> None:
        assert gate.gate_add_on(one.name, "cpu") == ""

    @pytest.mark.parametrize("one", QUICK, ids=named)
    def test_a_wrong_value_is_refused(self, one: AddOn) -> None:
        def make(inputs: Inputs, **settings: Any) -> Step:
            right = one.make(inputs, **settings)
            return dataclasses.replace(right, seen=lambda outputs: _off(right.seen(outputs)))

        with pytest.raises(AssertionError):
            gate.check_add_on(dataclasses.replace(one, make=make))

    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize("one", [one for one in QUICK if one.name not in FORWARD_ONLY], ids=named)
    def test_a_wrong_gradient_is_refused(self, one: AddOn, last: bool) -> None:
        def make(inputs: Inputs, **settings: Any) -> Step:
            right = one.make(inputs, **settings)
            # the value of the whole, and a gradient that is a little off in one of the leaves
            leaf = right.leaves[-last]
            return dataclasses.replace(right, forward=lambda: right.forward() + (leaf - leaf.detach()).sum())

        with pytest.raises(AssertionError):
            gate.check_add_on(dataclasses.replace(one, make=make))

    @pytest.mark.parametrize("name", ["SlotRedundancyLoss", "SemanticAwareSlotAttention", "propagate_labels"])
    def test_a_wrong_function_is_refused(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(entries, name)

        def wrong(*given: Any, **settings: Any) -> Any:
            if name == "propagate_labels":
                return right(*given, **settings | {"temperature": 10.0, "top_k": 50})
            built = right(*given, **settings)
            if name == "SlotRedundancyLoss":
                built.num_picked = 1
            else:
                built.norm_mlp.eps = 0.1
            return built

        monkeypatch.setattr(entries, name, wrong)
        one = next(one for one in ADD_ONS if one.of == name)
        assert gate.gate_add_on(one.name, "cpu") != ""

    def test_who_is_wrong_gets_no_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        results = measured(monkeypatch, Machine(wrong="sinkhorn"), quick=True, suites=SUITE)
        assert {row.status for row in results.select(contender="sinkhorn")} == {"wrong"}
        assert {row.status for row in results.select(contender="clip_mask")} == {"measured"}
        assert "sinkhorn" not in costs(results)
        text = section(results, "x", "x.png")
        assert "Without numbers: sinkhorn (wrong: the loss is another)." in text
        assert "28 rows of add-ons agree" in text
        assert "sinkhorn is wrong: the loss is another." in weak_spots(results)

    def test_forms_that_differ_at_size_get_no_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        name = "AffinityConsistencyLoss, 128 rows at once"
        results = measured(monkeypatch, Machine(loss_of={name: 1.01}), quick=True, suites=SUITE)
        rows = results.select(suite="add_ons", contender=name)
        assert {row.status for row in rows} == {"wrong"}
        notes = {row.note for row in rows}
        assert "the loss is 1.01, and 1 by AffinityConsistencyLoss" in notes
        assert "as at 288 patches a frame: the loss is 1.01, and 1 by AffinityConsistencyLoss" in notes


def _off(outputs: Any) -> Tensor:
    wrong: Tensor = outputs * 1.001 if outputs.is_floating_point() else outputs + 1
    return wrong


class TestMeasure:
    @pytest.mark.parametrize("axis", add_ons.UNITS)
    def test_everyone_is_timed(self, axis: str) -> None:
        names = ["SSync cpu", *(one.name for one in ADD_ONS if one.axis == axis)]
        times = add_ons.measure_times(names, SMALL, "cpu", 0.0)
        assert list(times) == names
        for name, one in times.items():
            parts = set() if name in FORWARD_ONLY else {"forward", "backward"}
            assert set(values_from_json(one)) == {"step", "ratio"} | parts

    def test_inputs_are_made_once_for_all(self) -> None:
        inputs = Inputs(SMALL)
        steps = [BY_NAME[name].step(inputs) for name in ("MaskDiversityLoss", "SemanticConsistencyLoss, pair by pair")]
        assert steps[0].leaves[0] is steps[1].leaves[0]

    def test_what_comes_before_is_not_timed(self) -> None:
        calls: list[str] = []
        one = Step(lambda: calls.append("forward"), lambda: torch.empty(0), before=lambda: calls.append("before"))
        add_ons.work_of(one)(lambda: calls.append("mark"))
        assert calls == ["before", "mark", "forward", "mark"]

    def test_a_gradient_is_a_part_of_the_step(self) -> None:
        leaf = torch.ones(3, requires_grad=True)
        seen: list[Tensor] = []
        leaf.register_hook(seen.append)
        step = Step(lambda: leaf * 2, lambda: torch.empty(0), [leaf], (torch.full((3,), 5.0),))
        marks = add_ons.work_of(step)(lambda: len(seen))
        assert marks == [0, 0, 1]
        assert seen[0].tolist() == [10.0] * 3
        assert leaf.grad is None

    def test_memory_is_that_of_a_step(self) -> None:
        def allocated(name: str) -> Any:
            return add_ons.measure_memory(name, SMALL, "cpu")["allocated"]

        kernel = 2 * 96**2 * 4
        pairs, all_at_once, pooled = (
            allocated(f"SemanticConsistencyLoss, {form}")
            for form in ("pair by pair", "all pairs at once", "pooled 2x2")
        )
        # the kernel of a pair, or those of six, and what is linear
        assert kernel < pairs < 3 * kernel
        assert 6 * kernel < all_at_once < 12 * kernel
        assert pooled < kernel
        assert allocated("SlotCurriculum, elsewhere") == 0
        # the gradients of three layers, which is more than what they compute
        assert allocated("PrototypeHead") > 4 * (8 * 2048 + 2048**2 + 2048 * 256)

    def test_losses_are_kept_to_be_compared(self) -> None:
        assert "loss" in add_ons.measure_memory("MaskDiversityLoss", SMALL, "cpu")
        assert "loss" not in add_ons.measure_memory("CorrelationFusion", SMALL, "cpu")
        assert "loss" not in add_ons.measure_memory("sinkhorn", SMALL, "cpu")


class TestTables:
    def test_slopes_are_those_of_the_machine(self, made: Results) -> None:
        for one in ADD_ONS:
            for measure, power in (("time", one.time), ("memory", one.memory)):
                slope = growth_of(made, one.axis, one.name, measure)
                if measure == "memory" and power == 0:
                    assert slope is None
                else:
                    assert slope is not None
                    assert slope.enough
                    assert slope.num_sizes == 5
                    assert slope.exponent == pytest.approx(power, abs=1e-3)

    def test_everyone_has_a_line(self, made: Results) -> None:
        text = section(made, "abacus", "x.png")
        table = text.split("### Add-ons")[1].split("How the quadratic")[0]
        lines = {cells[0]: cells[1:] for cells in map(_cells, table.splitlines()) if len(cells) == 7}
        assert set(lines) >= {"SSync cpu", *BY_NAME}
        # a microsecond for each of 4,608 patches, and 8 bytes for one of a frame
        assert lines["SSync cpu"][:3] == ["4.61", "0.461", "H·W"]
        assert lines["slot_error"] == [
            "0.0576 (0.0125x)",
            "0.00461 (0.01x)",
            "H·W",
            "5: 2,304 to 36,864",
            "1.00 (1)",
            "1.00 (1)",
        ]
        assert lines["sinkhorn"][3:] == ["5: 144 to 2,304", "2.00 (2)", "2.00 (2)"]
        assert lines["SlotCurriculum, elsewhere"][0] == "0.0001 (<0.01x)"
        assert "- sinkhorn, H·W, at 4,608 patches a frame, for time: a step should take 2.12 s" in text
        assert "29 rows of add-ons agree." in text


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]
