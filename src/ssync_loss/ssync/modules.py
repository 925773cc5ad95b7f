"""The three modules of SSync. Each keeps settings and calls the functions."""

from contextlib import suppress
from dataclasses import fields
from operator import index
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ssync_loss._autocast import no_autocast
from ssync_loss._autograd import attached_zero
from ssync_loss._axes import Axes, check_axes
from ssync_loss._checks import check_choice, check_int
from ssync_loss._inputs import widest
from ssync_loss._module import DetachedWarning, LossModule
from ssync_loss.ssync.doubts import FirstLook
from ssync_loss.ssync.engines import Backend, check_backend, resolve
from ssync_loss.ssync.engines.contract import weigh
from ssync_loss.ssync.functions import term
from ssync_loss.ssync.maps import Grid, KindArgument, bind_maps, check_grid, check_kind, prepare_maps
from ssync_loss.ssync.settings import Criterion, Settings
from ssync_loss.ssync.types import PseudoLabels, SSyncTerms

if TYPE_CHECKING:
    from typing_extensions import Self

# all settings but the last two, the weights of the terms
_UNWEIGHTED = [one.name for one in fields(Settings)][:-2]

# merge thresholds of the published configurations
PRESETS: dict[str, float] = {"movi_c": 0.7, "movi_e": 0.65, "ytvis": 0.6, "coco": 0.9}


class _SSyncModule(LossModule):
    """Base of the three modules: it checks the settings and warns of likely mistakes."""

    def remember(self, arguments: dict[str, Any]) -> None:
        """Keep the settings, and prepare the warnings."""
        super().remember(arguments)
        self._warn, self._look = DetachedWarning(), FirstLook()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load a pickle; pickles of version 0.1.0 lack ``_look``."""
        super().__setstate__({"_look": FirstLook(), **state})

    @property
    def reading(self) -> dict[str, Any]:
        """Arguments of ``prepare_maps``; :class:`FirstLook` warns once of a wrong ``kind`` and an inverted mask."""
        return {"kind": self.kind, "grid": self.grid, "axes": self.axes, "look": self._look}

    @staticmethod
    def check_settings(
        *,
        kind: object,
        grid: object,
        axes: object,
        backend: object,
        start_step: object = 0,
        ramp_steps: object = 0,
        **settings: Any,
    ) -> None:
        """Check the arguments of a constructor."""
        Settings(**settings).check()
        check_kind(kind)
        check_grid(grid)
        if axes is not None:
            check_axes(axes)
        check_int("start_step", start_step, 0)
        check_int("ramp_steps", ramp_steps, 0)
        check_backend(backend)


class _OneTermLoss(_SSyncModule):
    """Base of the two modules that compute one term."""

    _student: ClassVar[str]
    _term: ClassVar[str]

    def forward(
        self,
        enc_logits: Tensor,
        dec_logits: Tensor,
        *,
        labels: PseudoLabels | None = None,
        valid: Tensor | None = None,
        slot_mask: Tensor | None = None,
        num_frames: int | None = None,
    ) -> Tensor:
        """Return the term; the function of the same name explains the arguments."""
        _check_two(enc_logits, dec_logits)
        student = enc_logits if self._student == "enc_logits" else dec_logits
        self._warn(self, **{self._student: (student, self._term)})
        masks: dict[str, Any] = {"valid": valid, "slot_mask": slot_mask, "num_frames": num_frames}
        settings = Settings(**{name: value for name, value in self.settings.items() if name in _UNWEIGHTED})
        return term(self._term, enc_logits, dec_logits, labels, settings, self.backend, {**self.reading, **masks})


class BoundaryRefinementLoss(_OneTermLoss):
    """Module of :func:`boundary_refinement_loss`, with the same shapes and errors.

    The encoder's labels teach the decoder at boundaries. To compute the labels once, pass the same ``PseudoLabels`` as
    ``labels`` to this module and to :class:`InteriorDenoisingLoss`.
    ``forward(enc_logits, dec_logits, *, labels=None, valid=None, slot_mask=None, num_frames=None)``.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), encoder-to-decoder boundary refinement.

    >>> enc = torch.tensor([[2.0, 0.0], [0.0, 2.0]]).view(1, 1, 2, 1, 2)
    >>> BoundaryRefinementLoss()(enc, torch.zeros(1, 1, 2, 1, 2, requires_grad=True)).item()
    0.25
    """

    _student, _term = "dec_logits", "boundary"

    def __init__(
        self,
        *,
        merge_threshold: float | Tensor | None = 0.6,
        min_different: int = 1,
        min_same: int = 1,
        criterion: Criterion = "mse",
        label_smoothing: float = 0.0,
        temperature: float = 1.0,
        kind: KindArgument = "logits",
        grid: Grid = None,
        axes: Axes = None,
        backend: Backend = "auto",
    ) -> None:
        self.remember(locals())


class InteriorDenoisingLoss(_OneTermLoss):
    """Module of :func:`interior_denoising_loss`, with the same shapes and errors.

    The decoder's labels teach the encoder in interiors. ``forward`` is that of :class:`BoundaryRefinementLoss`.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), decoder-to-encoder interior denoising.

    >>> dec = torch.tensor([[2.0, 2.0], [0.0, 0.0]]).view(1, 1, 2, 1, 2)
    >>> InteriorDenoisingLoss()(torch.zeros(1, 1, 2, 1, 2, requires_grad=True), dec).item()
    0.25
    """

    _student, _term = "enc_logits", "interior"

    def __init__(
        self,
        *,
        merge_threshold: float | Tensor | None = 0.6,
        max_different: int = 0,
        criterion: Criterion = "mse",
        label_smoothing: float = 0.0,
        temperature: float = 1.0,
        kind: KindArgument = "logits",
        grid: Grid = None,
        axes: Axes = None,
        backend: Backend = "auto",
    ) -> None:
        self.remember(locals())


class SSyncLoss(_SSyncModule):
    """Selective synergistic learning: one loss line for a slot model that already trains.

    ``loss = ramp * (boundary_weight * L_b + interior_weight * L_i)``. Redundant slots are merged transitively
    (:func:`pseudo_labels`). Then the encoder's labels teach the decoder at boundaries
    (:func:`boundary_refinement_loss`), and the decoder's labels teach the encoder in interiors
    (:func:`interior_denoising_loss`). Time and memory are linear in the number of patches. No gradient crosses between
    the maps.

    The module has no parameters and no buffers, so old checkpoints load strictly. It calls no collectives;
    :func:`ssync_loss.distributed.global_mean` computes a mean over all ranks.

    Args:
        merge_threshold: overlap above which slots are merged, within [0, 1]; None turns merging off. The loss is most
            sensitive to this setting: see :meth:`from_preset` for the published values. The threshold and the weights
            may be scalar tensors on the maps' device.
        boundary_weight: weight of the boundary term, at least 0.
        interior_weight: weight of the interior term, at least 0.
        criterion: ``"mse"`` (published) or ``"cross_entropy"``.
        label_smoothing: within [0, 1], spread over present slots, for ``"cross_entropy"`` only.
        temperature: temperature of the softmax over slots, at least the smallest normal float32, 1.2e-38.
        min_different: least number of differing neighbors, of ten, at a boundary; 0 to 10.
        min_same: least number of agreeing neighbors at a boundary; a patch with fewer is noise; 0 to 10.
        max_different: greatest number of differing neighbors in an interior; 0 to 10.
        kind: ``"logits"`` or ``"probs"`` for both maps, or a pair for encoder and decoder. With an encoder's
            probabilities merging follows another rule, see :func:`pseudo_labels`.
        grid: (H, W) of (B, T, S, N) maps, or ((H, W), (H_d, W_d)). None takes the other map's grid if both maps have
            the same number of patches, else a square.
        axes: layout of the maps in einops' notation, one for both or a pair (encoder, decoder): b, t, s, h and w in any
            order, separate or merged. b or t may be missing if its size is 1. An image is ``"b s h w"``, slots in the
            last axis are ``"b t (h w) s"``, frames in the batch ``"(b t) s h w"``. Sizes that one map does not show
            come from the other map, ``grid`` and ``num_frames``. None reads (B, T, S, H, W) and (B, T, S, N). Without
            ``grid``, None refuses two (B, T, S, N) maps that could be images: N is a square, and neither of S and N is
            more than twice the other.
        start_step: first step with the loss on. The published start is 30 % of training.
        ramp_steps: number of steps over which the loss grows linearly, from 0 at ``start_step`` to full weight at
            ``start_step + ramp_steps``.
        backend: the engine; the value does not depend on it. ``"torch"`` runs anywhere. ``"cpu"`` is a C library for
            CPU maps of up to 64 slots. It is compiled at first use and kept in the user's cache folder, or in the
            folder that the variable SSYNC_LOSS_CACHE names. ``"triton"`` is CUDA kernels for float16, bfloat16 and
            float32 maps of up to 64 slots. ``"reference"`` is slow loops, for checking. ``"auto"`` takes ``"cpu"`` or
            ``"triton"`` if that engine is available and agrees with torch on a small case, else ``"torch"``. Naming an
            engine that is not available is an error.

    Shape: enc_logits, dec_logits: (B, T, S, H, W) or (B, T, S, N), or as ``axes`` says, float16, bfloat16, float32 or
        float64. Returns a float32 scalar (float64 for float64 maps).

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527).
    Raises: TypeError, ValueError on a wrong setting or maps that do not fit, even before ``start_step``.

    >>> sharp = torch.tensor([[2.0, 2.0, 0.0], [0.0, 0.0, 2.0]]).view(1, 1, 2, 1, 3)
    >>> blurred = torch.zeros(1, 1, 2, 1, 3, requires_grad=True)  # undecided: (1/2 - 1)^2 = (1/2)^2 = 1/4
    >>> SSyncLoss(interior_weight=0.0)(sharp, blurred).item()
    0.25
    >>> SSyncLoss(interior_weight=0.0, axes="b s h w")(sharp[:, 0], blurred[:, 0]).item()  # as images
    0.25
    """

    def __init__(
        self,
        *,
        merge_threshold: float | Tensor | None = 0.6,
        boundary_weight: float | Tensor = 1.0,
        interior_weight: float | Tensor = 1.0,
        criterion: Criterion = "mse",
        label_smoothing: float = 0.0,
        temperature: float = 1.0,
        min_different: int = 1,
        min_same: int = 1,
        max_different: int = 0,
        kind: KindArgument = "logits",
        grid: Grid = None,
        axes: Axes = None,
        start_step: int = 0,
        ramp_steps: int = 0,
        backend: Backend = "auto",
    ) -> None:
        self.remember(locals())

    @classmethod
    def from_preset(cls, name: str, **settings: Any) -> "Self":
        """Build the loss with the merge threshold published for a data set.

        The name is ``"movi_c"`` (0.7), ``"movi_e"`` (0.65), ``"ytvis"`` (0.6) or ``"coco"`` (0.9). ``settings`` are
        arguments of the constructor and override the preset.

        Raises: ValueError if the name is unknown.

        >>> SSyncLoss.from_preset("movi_e").merge_threshold
        0.65
        """
        check_choice("name", name, tuple(PRESETS))
        return cls(**{"merge_threshold": PRESETS[name], **settings})

    def forward(
        self,
        enc_logits: Tensor,
        dec_logits: Tensor,
        *,
        step: int | None = None,
        valid: Tensor | None = None,
        slot_mask: Tensor | None = None,
        num_frames: int | None = None,
    ) -> Tensor:
        """Return the loss, to be added to the model's own loss.

        Before ``start_step`` the loss is exactly 0, attached to the graph, and nothing is computed. In training mode
        the module warns once of a student without a gradient, such as detached attention. Outside of compiled code it
        also warns once of probabilities passed as logits and of an inverted ``slot_mask``. It checks the maps of the
        first computed step. Maps on a CUDA device are copied without waiting, and a later call warns.

        Args:
            enc_logits: slot-attention logits of the last iteration of every frame, before the softmax.
            dec_logits: alpha logits of the decoder, before the softmax over slots.
            step: the training step, a Python integer, or NumPy's outside of compiled code; needed with ``start_step``
                or ``ramp_steps``. A CUDA graph freezes the ramp at the step of capture: capture after the ramp.
            valid: (B, T) or (B, T, H, W) bool, valid patches on the encoder's grid.
            slot_mask: (B, S) bool, present slots.
            num_frames: T; needed if ``axes`` merges t with another axis and neither map shows T.
        """
        masks: dict[str, Any] = {"valid": valid, "slot_mask": slot_mask, "num_frames": num_frames}
        self.look_at(enc_logits, dec_logits)
        if not self.is_on(step):
            bound = bind_maps(enc_logits, dec_logits, grid=self.grid, axes=self.axes, **masks)
            if self.backend != "auto":
                # a missing engine is an error now, not at `start_step`
                resolve(self.backend, bound.enc, bound.dec)
            return attached_zero(bound.enc, bound.dec)
        maps = prepare_maps(enc_logits, dec_logits, **self.reading, **masks)
        with no_autocast(maps.enc):
            return resolve(self.backend, maps.enc, maps.dec).loss(maps, self.settings_at(step, maps.enc))

    def terms(
        self,
        enc_logits: Tensor,
        dec_logits: Tensor,
        *,
        step: int | None = None,
        valid: Tensor | None = None,
        slot_mask: Tensor | None = None,
        num_frames: int | None = None,
    ) -> SSyncTerms:
        """Return the loss, its terms and the labels, for logging and pictures; arguments as in ``forward``.

        Before ``start_step`` ``total`` is 0, but the other values are computed.
        """
        is_on = self.is_on(step)
        masks: dict[str, Any] = {"valid": valid, "slot_mask": slot_mask, "num_frames": num_frames}
        self.look_at(enc_logits, dec_logits)
        maps = prepare_maps(enc_logits, dec_logits, **self.reading, **masks)
        settings = self.settings_at(step if is_on else None, maps.enc)
        with no_autocast(maps.enc):
            terms = resolve(self.backend, maps.enc, maps.dec).terms(maps, settings)
        return terms if is_on else terms._replace(total=attached_zero(enc_logits, dec_logits))

    def is_on(self, step: int | None) -> bool:
        """Check the step, and tell whether the loss has started.

        Raises: TypeError if the step is no integer; ValueError if a schedule needs a step and it is None.
        """
        if step is None:
            if self.start_step > 0 or self.ramp_steps > 0:
                schedule = f"(start_step={self.start_step}, ramp_steps={self.ramp_steps})"
                raise ValueError(f"`step` must be given with a schedule {schedule}; got None.")
            return True
        start_step: int = self.start_step
        return as_step(step) >= start_step

    def weigh(self, boundary: Tensor, interior: Tensor, step: int | None = None) -> Tensor:
        """Return the weighted sum of both terms, with the ramp of a step from ``start_step`` on."""
        return weigh(boundary, interior, self.settings_at(step, boundary))

    def settings_at(self, step: int | None, like: Tensor) -> Settings:
        """Return the settings of a step; its ramp multiplies the weights."""
        weights = self.boundary_weight, self.interior_weight
        if step is not None and self.ramp_steps > 0:
            # with a number instead of a tensor, torch.compile would compile every step of the ramp anew
            progress = torch.full((), as_step(step) - self.start_step, device=like.device, dtype=widest(like))
            ramp = (progress / self.ramp_steps).clamp_max(1.0)
            weights = ramp * weights[0], ramp * weights[1]
        settings = {name: getattr(self, name) for name in _UNWEIGHTED}
        return Settings(**settings, boundary_weight=weights[0], interior_weight=weights[1])

    def look_at(self, enc_logits: Tensor, dec_logits: Tensor) -> None:
        """Refuse one tensor as both maps; warn once of a student without a gradient."""
        _check_two(enc_logits, dec_logits)
        taught = {}
        # a weight that is a tensor counts as positive: reading it would wait for its device
        if isinstance(self.boundary_weight, Tensor) or self.boundary_weight > 0:
            taught["dec_logits"] = (dec_logits, "boundary")
        if isinstance(self.interior_weight, Tensor) or self.interior_weight > 0:
            taught["enc_logits"] = (enc_logits, "interior")
        self._warn(self, **taught)


def _check_two(enc_logits: Tensor, dec_logits: Tensor) -> None:
    """Refuse to train one tensor as both maps."""
    if enc_logits is dec_logits and isinstance(enc_logits, Tensor) and enc_logits.requires_grad:
        raise ValueError("`dec_logits` must be the decoder's own map; got the tensor that is `enc_logits`.")


def as_step(step: object) -> int:
    """Return a step as a Python int; NumPy's integers are steps, too."""
    if isinstance(step, int) and not isinstance(step, bool):
        return step
    # reading a tensor would wait for its device; older versions of NumPy accept a bool as an integer
    if not isinstance(step, (bool, np.bool_, Tensor)):
        with suppress(TypeError):
            return index(step)  # type: ignore[arg-type]
    raise TypeError(f"`step` must be a Python int; got {type(step).__name__}.")
