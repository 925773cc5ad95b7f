"""Engine ``"cpu"``: one C file, compiled at first use."""

import warnings

from torch import Tensor

from ssync_loss._compilers import constant
from ssync_loss.ssync.engines.contract import Engine, weigh
from ssync_loss.ssync.engines.cpu import operators
from ssync_loss.ssync.engines.cpu.calls import KINDS, MAX_SLOTS
from ssync_loss.ssync.engines.cpu.library import BrokenError, UnavailableError, load
from ssync_loss.ssync.maps import Maps
from ssync_loss.ssync.settings import Settings
from ssync_loss.ssync.types import SlotLabels, SSyncTerms

__all__ = ["CpuEngine"]


class CpuEngine(Engine):
    """The C library; :mod:`.operators` registers its functions as operators of torch."""

    def missing(self, *maps: Tensor) -> str | None:
        """Return a requirement of the library that is not met, or None."""
        for one in maps:
            if one.device.type != "cpu":
                return f"CPU tensors; got {one.device.type}"
            if one.dtype not in KINDS:
                return f"16, 32 or 64 bits; got {one.dtype}"
            if one.shape[2] > MAX_SLOTS:
                return f"S <= {MAX_SLOTS}; got S={one.shape[2]}"
        return missing_library()

    pseudo_labels = staticmethod(operators.pseudo_labels)
    distill = staticmethod(operators.distill)
    slot_labels = staticmethod(operators.find_slots)

    def loss(self, maps: Maps, settings: Settings, found: SlotLabels | None = None) -> Tensor:
        """Compute the weighted sum of both terms; the library multiplies by the weights."""
        weights = settings.boundary_weight, settings.interior_weight
        # the gradient of a weight needs both terms
        learned = any(isinstance(one, Tensor) and one.requires_grad for one in weights)
        boundary, interior, _ = operators.step(maps, settings, found, summed=not learned)
        return weigh(boundary, interior, settings) if learned else boundary

    def terms(self, maps: Maps, settings: Settings) -> SSyncTerms:
        """Compute the sum, both terms and the labels."""
        boundary, interior, counts = operators.step(maps, settings, summed=False)
        labels = self.pseudo_labels(maps, settings)
        num_boundary, num_interior = counts.unbind()
        return SSyncTerms(weigh(boundary, interior, settings), boundary, interior, num_boundary, num_interior, labels)


@constant
def missing_library() -> str | None:
    """Return the reason why there is no library, or None, from the first call; warn if the compiler is broken."""
    if not _reasons:
        try:
            load()
            _reasons.append(None)
        except UnavailableError as error:
            _reasons.append(str(error))
        except BrokenError as error:
            _reasons.append(f"a C compiler that works: {error}")
            warnings.warn(
                f"ssync_loss could not compile its CPU engine and uses plain torch: {error} (Said once.)",
                stacklevel=2,
            )
    return _reasons[0]


# empty before the first call, then the answer
_reasons: list[str | None] = []
