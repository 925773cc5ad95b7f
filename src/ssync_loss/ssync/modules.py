"""SSync: each of two maps teaches the other where it is the reliable one."""

from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ssync_loss._backends import Backend, check_backend, resolve_backend
from ssync_loss._checks import check_choice, check_int, check_number
from ssync_loss._criteria import Criterion
from ssync_loss._maps import Grid, KindArgument, Maps, bind_maps, check_grid, check_kind, prepare_maps
from ssync_loss._types import PseudoLabels, Terms
from ssync_loss.distillation import check_criterion
from ssync_loss.losses._modules import DetachedWarning, shown_settings
from ssync_loss.losses._step import Settings, terms_of, weigh
from ssync_loss.losses._teaching import attached_zero
from ssync_loss.pseudo_labels import check_label_settings

# merge thresholds of the published configurations
PRESETS: dict[str, float] = {"movi_c": 0.7, "movi_e": 0.65, "ytvis": 0.6, "coco": 0.9}


class SSyncTerms(NamedTuple):
    """What :meth:`SSyncLoss.terms` returns: tensors only, so that logging decides when to wait for a device.

    Attributes:
        total: weighted, ramped sum; what ``forward`` returns.
        boundary: unweighted mean of the boundary term, which teaches the decoder.
        interior: unweighted mean of the interior term, which teaches the encoder.
        num_boundary: number of boundary patches in the batch, int64.
        num_interior: number of interior patches in the batch, int64.
        labels: the merged labels and the regions behind them.
    """

    total: Tensor
    boundary: Tensor
    interior: Tensor
    num_boundary: Tensor
    num_interior: Tensor
    labels: PseudoLabels


class SSyncLoss(nn.Module):
    """Selective synergistic learning: one loss line for a slot model that already trains.

    ``loss = ramp * (boundary_weight * L_b + interior_weight * L_i)``: the encoder's labels teach the decoder at
    boundaries (:func:`boundary_refinement_loss`), the decoder's labels teach the encoder in interiors
    (:func:`interior_denoising_loss`), after redundant slots are merged transitively
    (:func:`pseudo_labels`). Time and memory are linear in the patches; no gradient crosses between the maps.

    The module has no parameters and no buffers, so old checkpoints load strictly, and calls no collectives:
    see :func:`ssync_loss.distributed.global_mean` for a mean over all ranks.

    Args:
        merge_threshold: overlap above which slots are merged, within [0, 1]; None turns merging off. The
            sensitive knob: see :meth:`from_preset` for the published values.
        boundary_weight: weight of the boundary term, at least 0.
        interior_weight: weight of the interior term, at least 0.
        criterion: ``"mse"`` (published) or ``"cross_entropy"``.
        label_smoothing: within [0, 1], for ``"cross_entropy"`` only.
        temperature: of the softmax over slots, above 0.
        min_different: differing neighbors, of ten, that make a boundary; 0 to 10.
        min_same: agreeing neighbors without which a patch is noise; 0 to 10.
        max_different: differing neighbors allowed in an interior; 0 to 10.
        kind: what the maps hold: ``"logits"``, ``"probs"``, or a pair for encoder and decoder. With an
            encoder's probabilities merging follows another rule, see :func:`pseudo_labels`.
        grid: (H, W) of (B, T, S, N) maps, or ((H, W), (H_d, W_d)); None takes the grid of
            the other map where that has as many patches, and else N for a square.
        start_step: step from which the loss is on. The published start is 30 % of training.
        ramp_steps: steps over which the loss then grows linearly, from 0 at ``start_step`` to full weight at
            ``start_step + ramp_steps``.
        backend: what computes; the value does not depend on it. ``"auto"`` takes ``"triton"`` for float16,
            bfloat16 and float32 maps of up to 64 slots on a CUDA device where Triton is installed, and
            ``"torch"`` else. ``"reference"`` is slow loops, for checking. What is asked for and cannot be had is
            an error.

    Shape:
        enc_logits, dec_logits: (B, T, S, H, W) or (B, T, S, N), float16, bfloat16, float32 or float64.
        Returns a float32 scalar (float64 for float64 maps).

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527).

    Raises:
        TypeError, ValueError: on a wrong setting, or maps that do not fit, already before ``start_step``.

    >>> sharp = torch.tensor([[2.0, 2.0, 0.0], [0.0, 0.0, 2.0]]).view(1, 1, 2, 1, 3)
    >>> blurred = torch.zeros(1, 1, 2, 1, 3, requires_grad=True)  # undecided: (1/2 - 1)^2 = (1/2)^2 = 1/4
    >>> SSyncLoss(interior_weight=0.0)(sharp, blurred).item()
    0.25
    """

    def __init__(
        self,
        *,
        merge_threshold: float | None = 0.6,
        boundary_weight: float = 1.0,
        interior_weight: float = 1.0,
        criterion: Criterion = "mse",
        label_smoothing: float = 0.0,
        temperature: float = 1.0,
        min_different: int = 1,
        min_same: int = 1,
        max_different: int = 0,
        kind: KindArgument = "logits",
        grid: Grid = None,
        start_step: int = 0,
        ramp_steps: int = 0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_label_settings(merge_threshold, min_different, min_same, max_different)
        check_criterion(criterion, label_smoothing, temperature)
        check_number("boundary_weight", boundary_weight, 0.0)
        check_number("interior_weight", interior_weight, 0.0)
        check_kind(kind)
        check_grid(grid)
        check_int("start_step", start_step, 0)
        check_int("ramp_steps", ramp_steps, 0)
        check_backend(backend)
        self.merge_threshold = merge_threshold
        self.boundary_weight = boundary_weight
        self.interior_weight = interior_weight
        self.criterion = criterion
        self.label_smoothing = label_smoothing
        self.temperature = temperature
        self.min_different = min_different
        self.min_same = min_same
        self.max_different = max_different
        self.kind = kind
        self.grid = grid
        self.start_step = start_step
        self.ramp_steps = ramp_steps
        self.backend = backend
        self._warn = DetachedWarning()

    @classmethod
    def from_preset(cls, name: str, **settings: Any) -> Self:
        """Build the loss with the merge threshold published for a data set.

        Args:
            name: ``"movi_c"`` (0.7), ``"movi_e"`` (0.65), ``"ytvis"`` (0.6) or ``"coco"`` (0.9).
            **settings: any argument of the constructor; they win over the preset.

        Raises:
            ValueError: if the name is unknown.

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
    ) -> Tensor:
        """Return the loss to add to a model's own.

        Before ``start_step`` it is exactly 0, attached to the graph, and nothing is computed. In training mode,
        a map that should be taught and carries no gradient (a host that hands out detached attention, say) is
        warned about once.

        Args:
            enc_logits: slot-attention logits of the last iteration of every frame, before the softmax.
            dec_logits: alpha logits of the decoder, before the softmax over slots.
            step: the training step, a Python int; needed with ``start_step`` or ``ramp_steps``. Capturing a
                step as a CUDA graph freezes the ramp at the step of capture: capture once it has ended.
            valid: (B, T) or (B, T, H, W) bool, patches that count, on the encoder's grid.
            slot_mask: (B, S) bool, slots that are present.
        """
        self._warn_if_detached(enc_logits, dec_logits)
        if not self.is_on(step):
            bound = bind_maps(enc_logits, dec_logits, grid=self.grid, valid=valid, slot_mask=slot_mask)
            # what cannot be had is said now, and not when the loss starts
            resolve_backend(self.backend, bound.enc, bound.dec)
            return attached_zero(bound.enc, bound.dec)
        maps = prepare_maps(enc_logits, dec_logits, kind=self.kind, grid=self.grid, valid=valid, slot_mask=slot_mask)
        return self._terms_of(maps, step, with_labels=False).total

    def terms(
        self,
        enc_logits: Tensor,
        dec_logits: Tensor,
        *,
        step: int | None = None,
        valid: Tensor | None = None,
        slot_mask: Tensor | None = None,
    ) -> SSyncTerms:
        """Return the loss with its parts and labels, for logging and pictures; arguments as in ``forward``.

        Before ``start_step`` all but ``total``, which is 0, are what they would be: NaN for maps with NaN, too.
        """
        is_on = self.is_on(step)
        maps = prepare_maps(enc_logits, dec_logits, kind=self.kind, grid=self.grid, valid=valid, slot_mask=slot_mask)
        self._warn_if_detached(enc_logits, dec_logits)
        terms = self._terms_of(maps, step if is_on else None, with_labels=True)
        assert terms.labels is not None
        total = terms.total if is_on else attached_zero(enc_logits, dec_logits)
        return SSyncTerms(total, *terms[1:5], terms.labels)

    def _terms_of(self, maps: Maps, step: int | None, *, with_labels: bool) -> Terms:
        return terms_of(
            maps,
            Settings(**{name: getattr(self, name) for name in Settings._fields}),
            (self.boundary_weight, self.interior_weight),
            self._ramp(step, maps.enc),
            backend=self.backend,
            with_labels=with_labels,
        )

    def is_on(self, step: int | None) -> bool:
        """Tell whether the loss has started at a step.

        Raises:
            TypeError: if the step is no Python int.
            ValueError: if there is a schedule and no step.
        """
        if step is None:
            if self.start_step > 0 or self.ramp_steps > 0:
                raise ValueError(
                    "`step` must be given with a schedule "
                    f"(start_step={self.start_step}, ramp_steps={self.ramp_steps}); got None."
                )
            return True
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"`step` must be a Python int; got {type(step).__name__}.")
        return step >= self.start_step

    def weigh(self, boundary: Tensor, interior: Tensor, step: int | None = None) -> Tensor:
        """Add both terms with their weights and the ramp of a step that is not before the start."""
        weights = self.boundary_weight, self.interior_weight
        return weigh(boundary, interior, weights, self._ramp(step, boundary))

    def _ramp(self, step: int | None, like: Tensor) -> Tensor | float:
        if step is None or self.ramp_steps == 0:
            return 1.0
        progress = step - self.start_step
        if torch.compiler.is_compiling():
            # as a tensor the step enters one graph; as a number every step of the ramp would be a graph
            dtype = torch.promote_types(like.dtype, torch.float32)
            done = torch.full((), progress, device=like.device, dtype=dtype)
            return (done / self.ramp_steps).clamp_max(1.0)
        return min(progress / self.ramp_steps, 1.0)

    def _warn_if_detached(self, enc_logits: Tensor, dec_logits: Tensor) -> None:
        taught = {}
        if self.boundary_weight > 0:
            taught["dec_logits"] = (dec_logits, "boundary")
        if self.interior_weight > 0:
            taught["enc_logits"] = (enc_logits, "interior")
        self._warn(self, **taught)

    def extra_repr(self) -> str:
        """Show the settings that differ from the defaults, and the threshold always."""
        return shown_settings(self, SSyncLoss)

    # nn.Module.__call__ is typed Any
    if TYPE_CHECKING:

        def __call__(
            self,
            enc_logits: Tensor,
            dec_logits: Tensor,
            *,
            step: int | None = None,
            valid: Tensor | None = None,
            slot_mask: Tensor | None = None,
        ) -> Tensor:
            """Run ``forward``."""
