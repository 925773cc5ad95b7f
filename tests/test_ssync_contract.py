"""The contract of every loss, for the three modules of SSync, with plain torch and with the C library."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from contract import NAN, Case, LossContract
from ssync_loss import BoundaryRefinementLoss, InteriorDenoisingLoss, SSyncLoss
from ssync_loss.functional import boundary_refinement_loss, interior_denoising_loss

# the contract uses masks without any present slot
pytestmark = pytest.mark.filterwarnings("ignore:.*`slot_mask` leaves")

# values of settings that differ from those of the case
LABELS: dict[str, Any] = {"merge_threshold": 0.2}
BOUNDARY: dict[str, Any] = {"min_different": 4, "min_same": 4}
INTERIOR: dict[str, Any] = {"max_different": 6}
CRITERIA: dict[str, Any] = {"criterion": "mse", "label_smoothing": 0.1, "temperature": 0.5, "kind": "probs"}
SCHEDULE: dict[str, Any] = {"boundary_weight": 2.0, "interior_weight": 0.5, "start_step": 5, "ramp_steps": 9}
# compiling takes half a minute
COMPILED_BEFORE = {"default_compiler": "TestSSync covers it"}
ONE_TERM = COMPILED_BEFORE | {"compile": "TestSSync and test_compile.py cover it"}


class SSyncContract(LossContract):
    """The contract with positive maps, which are valid logits and probabilities, and with masks."""

    backend: ClassVar[str] = "torch"
    twice_differentiable: ClassVar = True
    knobs: ClassVar = {"criterion": "cross_entropy"}
    inert: ClassVar = {"grid": (3, 4), "axes": "b t s h w", "backend": "auto"}
    # `taught` arguments get gradients; `more` are arguments besides maps and masks
    taught: ClassVar[tuple[str, ...]]
    more: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.knobs = cls.knobs | {"backend": cls.backend}

    def maps(self) -> dict[str, Tensor]:
        return {name: torch.randn(2, 2, 3, 3, 4).exp() for name in ("enc_logits", "dec_logits")}

    def masks(self) -> dict[str, Tensor]:
        valid = torch.rand(2, 2, 3, 4) < 0.8
        return {"valid": valid, "slot_mask": torch.tensor([[True, True, True], [True, False, True]])}

    def case(self) -> Case:
        maps = self.maps()
        inputs = {name: maps.pop(name) for name in self.taught}
        return Case(self.make(), inputs, maps | self.masks() | self.more)

    def empty_cases(self, case: Case) -> dict[str, Case]:
        cases = {f"no {name}": case.replaced(**{name: mask & False}) for name, mask in self.masks().items()}
        return {**cases, **super().empty_cases(case)}

    def unselected(self, case: Case) -> dict[str, Tensor]:
        hidden = ~(case.others["valid"].unsqueeze(2) & case.others["slot_mask"][:, None, :, None, None])
        return {"enc_logits": hidden, "dec_logits": hidden}


class TestSSync(SSyncContract):
    loss = SSyncLoss
    knobs: ClassVar = SSyncContract.knobs | {"max_different": 4}
    settings: ClassVar = LABELS | BOUNDARY | INTERIOR | CRITERIA | SCHEDULE
    refused: ClassVar = [
        ({"boundary_weight": torch.ones(1)}, ValueError, "`boundary_weight` must be .* without axes"),
        ({"merge_threshold": torch.tensor(NAN)}, ValueError, r"`merge_threshold` must be at least 0.0; got nan"),
        ({"temperature": 10**400}, ValueError, r"`temperature` must be finite and above 0.0; got 1000"),
    ]
    taught = ("enc_logits", "dec_logits")
    more: ClassVar = {"step": 3}


class TestBoundary(SSyncContract):
    loss = BoundaryRefinementLoss
    function = staticmethod(boundary_refinement_loss)
    not_applicable: ClassVar = ONE_TERM
    settings: ClassVar = LABELS | BOUNDARY | CRITERIA
    taught = ("dec_logits",)


class TestInterior(SSyncContract):
    loss = InteriorDenoisingLoss
    function = staticmethod(interior_denoising_loss)
    not_applicable: ClassVar = ONE_TERM
    knobs: ClassVar = SSyncContract.knobs | {"max_different": 4}
    settings: ClassVar = LABELS | INTERIOR | CRITERIA
    taught = ("enc_logits",)


class TestProbabilitiesOnTwoGrids(TestSSync):
    """The contract with mse, probabilities and another decoder grid, without masks."""

    knobs: ClassVar = {"max_different": 4, "kind": "probs"}
    not_applicable: ClassVar = {
        "poison": "every patch of every slot counts",
        **dict.fromkeys(("settings", "settings_by_name", "repr"), "label smoothing needs the other criterion"),
    }

    def maps(self) -> dict[str, Tensor]:
        return {"enc_logits": torch.rand(2, 2, 3, 3, 4) + 0.1, "dec_logits": torch.rand(2, 2, 3, 5, 3) + 0.1}

    def masks(self) -> dict[str, Tensor]:
        return {}


class TestSSyncInC(TestSSync):
    backend = "cpu"
    twice_differentiable: ClassVar = False


class TestBoundaryInC(TestBoundary):
    backend = "cpu"
    twice_differentiable: ClassVar = False


class TestInteriorInC(TestInterior):
    backend = "cpu"
    twice_differentiable: ClassVar = False


class TestProbabilitiesOnTwoGridsInC(TestProbabilitiesOnTwoGrids):
    backend = "cpu"
    not_applicable: ClassVar = TestProbabilitiesOnTwoGrids.not_applicable | COMPILED_BEFORE
    twice_differentiable: ClassVar = False
