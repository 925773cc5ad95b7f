"""The public functions of SSync: check the arguments, choose an engine, and call it."""

from typing import Any

from torch import Tensor, no_grad

from ssync_loss._autocast import no_autocast
from ssync_loss._axes import Axes
from ssync_loss._checks import as_index, check_choice, check_label_range, check_labels_present, check_type
from ssync_loss._inputs import check_floats, check_labels, check_mask
from ssync_loss.ssync.engines import Backend, check_backend, resolve
from ssync_loss.ssync.engines.contract import one_term
from ssync_loss.ssync.maps import Grid, KindArgument, Maps, check_slot_mask, prepare_maps
from ssync_loss.ssync.settings import REDUCTIONS, Criterion, Reduction, Settings
from ssync_loss.ssync.types import PseudoLabels


def pseudo_labels(
    enc_logits: Tensor,
    dec_logits: Tensor,
    *,
    merge_threshold: float | Tensor | None = 0.6,
    min_different: int = 1,
    min_same: int = 1,
    max_different: int = 0,
    kind: KindArgument = "logits",
    grid: Grid = None,
    axes: Axes = None,
    valid: Tensor | None = None,
    slot_mask: Tensor | None = None,
    num_frames: int | None = None,
    backend: Backend = "auto",
) -> PseudoLabels:
    """Compute the targets and regions of both SSync losses, in time linear in the number of patches.

    ``e = argmax_s enc``, ``d = argmax_s dec`` (first index on ties). Slots that overlap by more than
    ``merge_threshold`` are merged transitively (:func:`slot_overlap`, :func:`merge_slots` with areas from ``e``), and
    their representatives replace them in both label maps. ``boundary`` comes from the merged ``e``, ``interior`` from
    the merged ``d`` (:func:`boundary_region`, :func:`interior_region`).

    Shape: enc_logits: (B, T, S, H, W) or (B, T, S, N), or as ``axes`` says. dec_logits: the same, on any grid.

    Settings are those of :class:`ssync_loss.SSyncLoss`; maps, ``valid``, ``slot_mask`` and ``num_frames`` are those of
    its ``forward``. If the encoder's map holds probabilities p, merging compares log p with its mean. This rule is
    *different* and needs another threshold.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), pseudo-labeling and transitive merging.
    Raises: TypeError, ValueError on wrong shapes, dtypes or settings; the message names the argument.

    >>> import torch
    >>> maps = torch.tensor([[3.0, 3.0, 0.0, 0.0], [0.0, 0.0, 3.0, 3.0]]).view(1, 1, 2, 1, 4)
    >>> labels = pseudo_labels(maps, maps)
    >>> labels.enc_labels.flatten().tolist(), labels.boundary.flatten().tolist()
    ([0, 0, 1, 1], [False, True, True, False])
    """
    settings = Settings(merge_threshold, min_different, min_same, max_different)
    settings.check()
    check_backend(backend)
    given: dict[str, Any] = {"valid": valid, "slot_mask": slot_mask, "num_frames": num_frames}
    with no_grad():
        maps = prepare_maps(enc_logits, dec_logits, kind=kind, grid=grid, axes=axes, **given)
        return labels_of(maps, settings, backend)


def selective_distillation_loss(
    logits: Tensor,
    target: Tensor,
    region: Tensor,
    *,
    criterion: Criterion = "mse",
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    slot_mask: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Compare a map's slot probabilities with hard labels on the patches of a region.

    With ``P = softmax_s(logits / temperature)`` and y the label, the value of a selected patch is
    ``(1/S) sum_s (P_s - 1[s = y])^2`` for ``"mse"`` and ``-log P_y`` for ``"cross_entropy"`` (with smoothing e,
    ``-(1 - e) log P_y - (e/S) sum_s log P_s``). ``reduction="mean"`` divides by the number of selected patches in the
    whole batch. If no patch is selected, the loss is exactly 0, attached to the graph. Unselected patches may hold
    anything, NaN included, and get no gradient.

    With a slot mask the sums run over the S_b present slots of clip b, and S_b replaces S. The mean of the squared
    criterion is then ``(sum over selected patches and slots) / sum_b M_b S_b`` with M_b selected patches in clip b.

    Two limits are conventions. A selected patch with all slots at -inf has uniform P and gets no gradient. In the
    cross-entropy another logit of -inf has the log-probability of the smallest normal float32, -87.3, and no gradient.

    Shape: logits: (B, T, S, H, W). target: (B, T, H, W) integers within [0, S). region: (B, T, H, W) bool. slot_mask:
        (B, S) bool. Returns a scalar, or (B, T, H, W) with ``reduction="none"``, in float32 (float64 for float64
        logits).

    ``logits`` is the student's map, and only it gets a gradient. ``target`` names the slot of every patch, and
    ``region`` selects patches. The softmax leaves out absent slots. ``reduction`` is ``"none"`` (0 where unselected),
    ``"sum"`` or ``"mean"``. Settings are those of :class:`ssync_loss.SSyncLoss`.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), boundary refinement and interior denoising.
    Raises: TypeError on a wrong dtype; ValueError on wrong shapes or settings. Labels out of range are an error on a
        CPU outside compilation, where reading them waits for no device.

    >>> import torch
    >>> logits = torch.tensor([3.0, 1.0]).log().view(1, 1, 2, 1, 1)  # P = (3/4, 1/4)
    >>> target, region = torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    >>> round(selective_distillation_loss(logits, target, region).item(), 6)  # (1/16 + 1/16) / 2
    0.0625
    """
    size = check_floats("logits", logits, "B T S H W", filled="T S H W")
    check_labels("target", target, "B T H W", size, logits=logits)
    target = as_index("target", target)
    check_mask("region", region, "B T H W", size, logits=logits)
    check_slot_mask(slot_mask, size, logits=logits)
    settings = Settings(criterion=criterion, label_smoothing=label_smoothing, temperature=temperature)
    settings.check()
    check_choice("reduction", reduction, REDUCTIONS)
    check_label_range("target", target, size["S"])
    check_backend(backend)
    if slot_mask is not None:
        check_labels_present("target", target, region, slot_mask)
    with no_autocast(logits):
        return resolve(backend, logits).distill(logits, target, region, slot_mask, settings, reduction)


def boundary_refinement_loss(
    enc_logits: Tensor,
    dec_logits: Tensor,
    *,
    labels: PseudoLabels | None = None,
    merge_threshold: float | Tensor | None = 0.6,
    min_different: int = 1,
    min_same: int = 1,
    criterion: Criterion = "mse",
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    kind: KindArgument = "logits",
    grid: Grid = None,
    axes: Axes = None,
    valid: Tensor | None = None,
    slot_mask: Tensor | None = None,
    num_frames: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Teach the decoder the encoder's labels at boundaries.

    ``L_b = mean over boundary patches and slots of (softmax_s(dec / temperature) - 1[e])^2`` with e the merged
    hard labels of the encoder. No gradient reaches the encoder's map. Without a boundary patch the loss is exactly 0,
    attached to the graph.

    Shape: enc_logits, dec_logits: (B, T, S, H, W) or (B, T, S, N), or as ``axes`` says. Returns a scalar.

    ``labels`` are a result of :func:`pseudo_labels`; settings of merging and of the region then have no effect. None
    computes the labels. Other arguments are those of :func:`pseudo_labels` and :func:`selective_distillation_loss`.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), encoder-to-decoder boundary refinement.
    Raises: TypeError, ValueError on wrong shapes, dtypes or settings.

    >>> import torch
    >>> enc = torch.tensor([[2.0, 0.0], [0.0, 2.0]]).view(1, 1, 2, 1, 2)
    >>> dec = torch.zeros(1, 1, 2, 1, 2)  # undecided: (1/2 - 1)^2 and (1/2)^2 average to 1/4
    >>> boundary_refinement_loss(enc, dec).item()
    0.25
    """
    settings = Settings(merge_threshold, min_different, min_same, 0, criterion, label_smoothing, temperature)
    given = {"kind": kind, "grid": grid, "axes": axes, "valid": valid, "slot_mask": slot_mask, "num_frames": num_frames}
    return term("boundary", enc_logits, dec_logits, labels, settings, backend, given)


def interior_denoising_loss(
    enc_logits: Tensor,
    dec_logits: Tensor,
    *,
    labels: PseudoLabels | None = None,
    merge_threshold: float | Tensor | None = 0.6,
    max_different: int = 0,
    criterion: Criterion = "mse",
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    kind: KindArgument = "logits",
    grid: Grid = None,
    axes: Axes = None,
    valid: Tensor | None = None,
    slot_mask: Tensor | None = None,
    num_frames: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Teach the encoder the decoder's labels in interiors.

    ``L_i = mean over interior patches and slots of (softmax_s(enc / temperature) - 1[d])^2`` with d the merged
    hard labels of the decoder. No gradient reaches the decoder's map. Without an interior patch the loss is exactly 0,
    attached to the graph.

    Arguments, shapes and errors are those of :func:`boundary_refinement_loss`, with ``max_different`` as in
    :func:`pseudo_labels`.

    Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527), decoder-to-encoder interior denoising.

    >>> import torch
    >>> dec = torch.tensor([[2.0, 2.0], [0.0, 0.0]]).view(1, 1, 2, 1, 2)
    >>> enc = torch.zeros(1, 1, 2, 1, 2)  # undecided: (1/2 - 1)^2 and (1/2)^2 average to 1/4
    >>> interior_denoising_loss(enc, dec).item()
    0.25
    """
    settings = Settings(merge_threshold, 1, 1, max_different, criterion, label_smoothing, temperature)
    given = {"kind": kind, "grid": grid, "axes": axes, "valid": valid, "slot_mask": slot_mask, "num_frames": num_frames}
    return term("interior", enc_logits, dec_logits, labels, settings, backend, given)


def term(
    name: str,
    enc_logits: Tensor,
    dec_logits: Tensor,
    labels: PseudoLabels | None,
    settings: Settings,
    backend: Backend,
    given: dict[str, Any],
) -> Tensor:
    """Compute the boundary or the interior term, with given labels or new ones."""
    settings.check()
    check_backend(backend)
    maps = prepare_maps(enc_logits, dec_logits, **given)
    student, teacher = (maps.dec, "enc_labels") if name == "boundary" else (maps.enc, "dec_labels")
    computed = labels_of(maps, settings, backend) if labels is None else labels
    check_type("labels", computed, PseudoLabels)
    target, region = getattr(computed, teacher), getattr(computed, name)
    if labels is not None:
        size = dict(zip("BTSHW", maps.enc.shape, strict=True))
        check_labels(f"labels.{teacher}", target, "B T H W", size, enc_logits=maps.enc)
        target = as_index(f"labels.{teacher}", target)
        check_label_range(f"labels.{teacher}", target, size["S"])
        check_mask(f"labels.{name}", region, "B T H W", size, enc_logits=maps.enc)
        # the labels may come from a call with other masks
        region = region if maps.counted is None else region & maps.counted
        if maps.slot_mask is not None:
            check_labels_present(f"labels.{teacher}", target, region, maps.slot_mask)
    with no_autocast(student):
        return one_term(resolve(backend, maps.enc, maps.dec), student, target, region, maps, settings)


def labels_of(maps: Maps, settings: Settings, backend: Backend) -> PseudoLabels:
    """Compute :func:`pseudo_labels` of prepared maps."""
    with no_autocast(maps.enc):
        return resolve(backend, maps.enc, maps.dec).pseudo_labels(maps, settings)
