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
from benchmarks.results import Results, RowId, values_from_json
from benchmarks.suites import add_ons
from benchmarks.tables import section
from benchmarks.weak_spots import weak_spots
from torch import Tensor, nn

import ssync_loss
from benchmark_results import Machine, measured, options
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
        ours = {"SSyncLoss", "BoundaryRefinementLoss", "InteriorDenoisingLoss"}
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


class TestPlan:
    @pytest.mark.parametrize("axis", add_ons.UNITS)
    def test_every_axis_goes_through_one_shape_and_alone_changes(self, axis: Any) -> None:
        shapes = [add_ons.shape_of(axis, size) for size in add_ons.sizes(axis, quick=False)]
        assert add_ons.REFERENCE in shapes
        assert [add_ons.size_of(axis, shape) for shape in shapes] == add_ons.sizes(axis, quick=False)
        assert len(shapes) > 5
        for name in add_ons.REFERENCE.keys() - set(axis.split("*")):
            assert {shape[name] for shape in shapes} == {add_ons.REFERENCE[name]}

    @pytest.mark.parametrize("quick", [False, True])
    def test_everyone_is_measured_beside_ssync_at_every_size(self, quick: bool) -> None:
        chosen = options(suites=SUITE, quick=quick)
        for task in add_ons.plan(chosen):
            axis = task.rows[0].case
            names = ["SSync cpu", *(one.name for one in ADD_ONS if one.axis == axis)]
            assert [row.contender for row in task.rows] == 2 * names
            assert [row.measure for row in task.rows] == ["memory"] * len(names) + ["time"] * len(names)
        cases = [task.rows[0].case for task in add_ons.plan(chosen)]
        assert {cases.count(axis) for axis in add_ons.UNITS} == ({2} if quick else {6, 7, 10})

    def test_a_gpu_does_without_what_it_cannot_have(self) -> None:
        chosen = options(suites=SUITE, device="cuda", backends=("triton", "torch"))
        rows = [row for task in add_ons.plan(chosen) for row in task.rows]
        assert not any("kornia" in row.contender for row in rows)
        assert {row.contender for row in rows} >= {"SSync triton", "StructureAwareLoss, own filters"}

    def test_no_step_longer_than_two_seconds(self, made: Results) -> None:
        rows = made.select(contender="sinkhorn", measure="time")
        status = {add_ons.size_of("H*W", row.id.sizes): (row.status, row.note) for row in rows[1:]}
        assert status[2304] == ("measured", "")
        note = "a step should take 2.12 s after 0.531 s at 2,304 patches a frame; the cap is 2 s"
        assert status[4608] == ("time", note)


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

    def test_the_bound_of_the_semantic_loss_has_a_table(self, made: Results) -> None:
        text = section(made, "abacus", "x.png").split("How the quadratic cost")[1].split("In a few words")[0]
        lines = [cells for cells in map(_cells, text.splitlines()) if len(cells) == 5]
        assert lines[0] == ["patches", "pair by pair", "all pairs at once", "pooled 2x2", "pooled to 144"]
        assert [line[0] for line in lines[2:]] == [f"{size:,}" for size in add_ons.sizes("H*W", quick=False)]
        assert lines[-1][1:] == ["time", "time", "time", "3.69, 0.295"]

    def test_costs_in_a_few_words(self, made: Results) -> None:
        said = costs(made)
        assert set(said) == set(BY_NAME)
        assert said["MaskDiversityLoss"] == "0.0125x SSync, linear in patches a frame (1.00)"
        assert said["TemporalSlotContrastLoss"] == "<0.01x SSync, quadratic in slots (2.00)"
        assert said["SlotCurriculum, elsewhere"] == "<0.01x SSync, constant"

    def test_nothing_is_said_in_steps_of_what_is_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        results = measured(monkeypatch, Machine(wrong="SSync cpu"), quick=True, suites=SUITE)
        assert costs(results) == {}
        table = [_cells(line) for line in section(results, "x", "x.png").splitlines()]
        assert ["slot_error", "0.0576", "0.00461", "H·W"] in [cells[:4] for cells in table]

    def test_what_grows_too_fast_is_a_weak_spot(self, made: Results, monkeypatch: pytest.MonkeyPatch) -> None:
        class Steep(Machine):
            def seconds(self, contender: str, shape: dict[str, int]) -> float:
                usual = super().seconds(contender, shape)
                return usual**1.2 if contender == "slot_error" else usual

            def bytes(self, contender: str, shape: dict[str, int]) -> int:
                usual = super().bytes(contender, shape)
                return round(usual**1.1) if contender == "PrototypeHead" else usual

        assert not any("and should be" in line for line in weak_spots(made))
        lines = weak_spots(measured(monkeypatch, Steep(), suites=SUITE))
        assert [line for line in lines if "and should be" in line] == [
            "slot_error: the slope of time in H·W is 1.20 from 2,304 to 36,864, and should be 1.",
            "PrototypeHead: the slope of memory in Kp is 1.10 from 4,096 to 65,536, and should be 1.",
        ]

    def test_noise_is_named_by_its_axis(self, monkeypatch: pytest.MonkeyPatch) -> None:
        results = measured(monkeypatch, Machine(noise=0.4), quick=True, suites=SUITE)
        line = weak_spots(results)[-1]
        assert "H*W, SSync cpu, 288 patches a frame (40%)" in line
        assert "S, InstanceConsistencyLoss, P=4, 22 slots (40%)" in line

    def test_results_without_the_suite_are_still_read(self) -> None:
        without = Results.load(COMMITTED)
        without.rows = {key: row for key, row in without.rows.items() if not _is_add_on(key)}
        assert "### Add-ons" not in section(without, "cpu", "x.png")
        assert costs(without) == {}


def _is_add_on(key: RowId) -> bool:
    return key.suite == "add_ons" or key.contender in BY_NAME


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]
