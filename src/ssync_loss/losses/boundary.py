"""Boundary refinement: the encoder teaches the decoder where objects meet."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ssync_loss._backends import Backend, check_backend
from ssync_loss._criteria import Criterion
from ssync_loss._maps import Grid, KindArgument, check_grid, check_kind, prepare_maps
from ssync_loss._types import PseudoLabels
from ssync_loss.distillation import check_criterion
from ssync_loss.losses._modules import DetachedWarning, settings_of, shown_settings
from ssync_loss.losses._teaching import fitting_labels, teach
from ssync_loss.pseudo_labels import check_label_settings, labels_of


def boundary_refinement_loss(
    enc_logits: Tensor,
    dec_logits: Tensor,
    *,
    labels: PseudoLabels | None = None,
    merge_threshold: float | None = 0.6,
    min_different: int = 1,
    min_same: int = 1,
    criterion: Criterion = "mse",
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    kind: KindArgument = "logits",
    grid: Grid = None,
    valid: Tensor | None = None,
    slot_mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Teach the decoder the encoder's labels at boundaries.

    ``L_b = mean over boundary patches and slots of (softmax_s(dec / temperature) - 1[e])^2`` with e the merged
    hard labels of the encoder. No gradient reaches the encoder's map. Where there is no boundary the loss is
    exactly 0, attached to the graph.

    Shape:
        enc_logits, dec_logits: (B, T, S, H, W) or (B, T, S, N). Returns a scalar.

    Args:
        enc_logits: the teacher.
        dec_logits: the pupil.
        labels: pseudo-labels computed before; None computes them. Given ones make the settings of merging and
            of the region idle.
        merge_threshold: see :func:`pseudo_labels`, like the next two.
        min_different: differing neighbors that make a boundary.
        min_same: agreeing neighbors without which a patch is noise.
        criterion: see :func:`selective_distillation_loss`, like the next two.
        label_smoothing: for ``"cross_entropy"`` only.
        temperature: of the softmax.
        kind: see :func:`pseudo_labels`, like the rest.
        grid: (H, W) of (B, T, S, N) maps.
        valid: patches that count.
        slot_mask: slots that are present.
        backend: what computes, see :class:`SSyncLoss`.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), encoder-to-decoder boundary refinement.

    Raises:
        TypeError, ValueError: on wrong shapes, dtypes or settings.

    >>> import torch
    >>> enc = torch.tensor([[2.0, 0.0], [0.0, 2.0]]).view(1, 1, 2, 1, 2)
    >>> dec = torch.zeros(1, 1, 2, 1, 2)  # undecided: (1/2 - 1)^2 and (1/2)^2 average to 1/4
    >>> boundary_refinement_loss(enc, dec).item()
    0.25
    """
    check_label_settings(merge_threshold, min_different, min_same, 0)
    check_criterion(criterion, label_smoothing, temperature)
    check_backend(backend)
    maps = prepare_maps(enc_logits, dec_logits, kind=kind, grid=grid, valid=valid, slot_mask=slot_mask)
    if labels is None:
        labels = labels_of(
            maps,
            merge_threshold=merge_threshold,
            min_different=min_different,
            min_same=min_same,
            max_different=0,
            backend=backend,
        )
    else:
        labels = fitting_labels(labels, "enc_labels", "boundary", maps)
    return teach(
        maps.dec,
        labels.enc_labels,
        labels.boundary,
        maps,
        criterion=criterion,
        label_smoothing=label_smoothing,
        temperature=temperature,
        backend=backend,
    )


class BoundaryRefinementLoss(nn.Module):
    """Module of :func:`boundary_refinement_loss`: the encoder's labels teach the decoder at boundaries.

    ``forward(enc_logits, dec_logits, *, labels=None, valid=None, slot_mask=None)``; pass one ``PseudoLabels``
    as ``labels`` to this and to :class:`InteriorDenoisingLoss`, and they are computed once.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), encoder-to-decoder boundary refinement.

    >>> import torch
    >>> enc = torch.tensor([[2.0, 0.0], [0.0, 2.0]]).view(1, 1, 2, 1, 2)
    >>> BoundaryRefinementLoss()(enc, torch.zeros(1, 1, 2, 1, 2, requires_grad=True)).item()
    0.25
    """

    def __init__(
        self,
        *,
        merge_threshold: float | None = 0.6,
        min_different: int = 1,
        min_same: int = 1,
        criterion: Criterion = "mse",
        label_smoothing: float = 0.0,
        temperature: float = 1.0,
        kind: KindArgument = "logits",
        grid: Grid = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_label_settings(merge_threshold, min_different, min_same, 0)
        check_criterion(criterion, label_smoothing, temperature)
        check_kind(kind)
        check_grid(grid)
        check_backend(backend)
        self.merge_threshold = merge_threshold
        self.min_different = min_different
        self.min_same = min_same
        self.criterion = criterion
        self.label_smoothing = label_smoothing
        self.temperature = temperature
        self.kind = kind
        self.grid = grid
        self.backend = backend
        self._warn = DetachedWarning()

    def forward(
        self,
        enc_logits: Tensor,
        dec_logits: Tensor,
        *,
        labels: PseudoLabels | None = None,
        valid: Tensor | None = None,
        slot_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the boundary term; see :func:`boundary_refinement_loss`."""
        self._warn(self, dec_logits=(dec_logits, "boundary"))
        return boundary_refinement_loss(
            enc_logits,
            dec_logits,
            labels=labels,
            valid=valid,
            slot_mask=slot_mask,
            **settings_of(self, BoundaryRefinementLoss),
        )

    def extra_repr(self) -> str:
        """Show the settings that differ from the defaults, and the threshold always."""
        return shown_settings(self, BoundaryRefinementLoss)

    # nn.Module.__call__ is typed Any
    if TYPE_CHECKING:

        def __call__(
            self,
            enc_logits: Tensor,
            dec_logits: Tensor,
            *,
            labels: PseudoLabels | None = None,
            valid: Tensor | None = None,
            slot_mask: Tensor | None = None,
        ) -> Tensor:
            """Run ``forward``."""
