"""Interior denoising: the decoder teaches the encoder inside objects."""

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


def interior_denoising_loss(
    enc_logits: Tensor,
    dec_logits: Tensor,
    *,
    labels: PseudoLabels | None = None,
    merge_threshold: float | None = 0.6,
    max_different: int = 0,
    criterion: Criterion = "mse",
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    kind: KindArgument = "logits",
    grid: Grid = None,
    valid: Tensor | None = None,
    slot_mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Teach the encoder the decoder's labels in interiors.

    ``L_i = mean over interior patches and slots of (softmax_s(enc / temperature) - 1[d])^2`` with d the merged
    hard labels of the decoder. No gradient reaches the decoder's map. Where there is no interior the loss is
    exactly 0, attached to the graph.

    Shape:
        enc_logits, dec_logits: (B, T, S, H, W) or (B, T, S, N). Returns a scalar.

    Args:
        enc_logits: the pupil.
        dec_logits: the teacher.
        labels: pseudo-labels computed before; None computes them. Given ones make the settings of merging and
            of the region idle.
        merge_threshold: see :func:`pseudo_labels`, like the next.
        max_different: differing neighbors allowed in an interior.
        criterion: see :func:`selective_distillation_loss`, like the next two.
        label_smoothing: for ``"cross_entropy"`` only.
        temperature: of the softmax.
        kind: see :func:`pseudo_labels`, like the rest.
        grid: (H, W) of (B, T, S, N) maps.
        valid: patches that count.
        slot_mask: slots that are present.
        backend: what computes, see :class:`SSyncLoss`.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), decoder-to-encoder interior denoising.

    Raises:
        TypeError, ValueError: on wrong shapes, dtypes or settings.

    >>> import torch
    >>> dec = torch.tensor([[2.0, 2.0], [0.0, 0.0]]).view(1, 1, 2, 1, 2)
    >>> enc = torch.zeros(1, 1, 2, 1, 2)  # undecided: (1/2 - 1)^2 and (1/2)^2 average to 1/4
    >>> interior_denoising_loss(enc, dec).item()
    0.25
    """
    check_label_settings(merge_threshold, 1, 1, max_different)
    check_criterion(criterion, label_smoothing, temperature)
    check_backend(backend)
    maps = prepare_maps(enc_logits, dec_logits, kind=kind, grid=grid, valid=valid, slot_mask=slot_mask)
    if labels is None:
        labels = labels_of(
            maps,
            merge_threshold=merge_threshold,
            min_different=1,
            min_same=1,
            max_different=max_different,
            backend=backend,
        )
    else:
        labels = fitting_labels(labels, "dec_labels", "interior", maps)
    return teach(
        maps.enc,
        labels.dec_labels,
        labels.interior,
        maps,
        criterion=criterion,
        label_smoothing=label_smoothing,
        temperature=temperature,
        backend=backend,
    )


class InteriorDenoisingLoss(nn.Module):
    """Module of :func:`interior_denoising_loss`: the decoder's labels teach the encoder in interiors.

    ``forward(enc_logits, dec_logits, *, labels=None, valid=None, slot_mask=None)``; pass one ``PseudoLabels``
    as ``labels`` to this and to :class:`BoundaryRefinementLoss`, and they are computed once.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), decoder-to-encoder interior denoising.

    >>> import torch
    >>> dec = torch.tensor([[2.0, 2.0], [0.0, 0.0]]).view(1, 1, 2, 1, 2)
    >>> InteriorDenoisingLoss()(torch.zeros(1, 1, 2, 1, 2, requires_grad=True), dec).item()
    0.25
    """

    def __init__(
        self,
        *,
        merge_threshold: float | None = 0.6,
        max_different: int = 0,
        criterion: Criterion = "mse",
        label_smoothing: float = 0.0,
        temperature: float = 1.0,
        kind: KindArgument = "logits",
        grid: Grid = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_label_settings(merge_threshold, 1, 1, max_different)
        check_criterion(criterion, label_smoothing, temperature)
        check_kind(kind)
        check_grid(grid)
        check_backend(backend)
        self.merge_threshold = merge_threshold
        self.max_different = max_different
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
        """Return the interior term; see :func:`interior_denoising_loss`."""
        self._warn(self, enc_logits=(enc_logits, "interior"))
        return interior_denoising_loss(
            enc_logits,
            dec_logits,
            labels=labels,
            valid=valid,
            slot_mask=slot_mask,
            **settings_of(self, InteriorDenoisingLoss),
        )

    def extra_repr(self) -> str:
        """Show the settings that differ from the defaults, and the threshold always."""
        return shown_settings(self, InteriorDenoisingLoss)

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
