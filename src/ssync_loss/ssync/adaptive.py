"""SSync that chooses its form during training."""

import warnings
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssync_loss._autocast import no_autocast
from ssync_loss._axes import FEATURES, parse
from ssync_loss._checks import check_int, check_number, check_same_device, check_type, has_ranks
from ssync_loss._compilers import is_recomputing
from ssync_loss._module import LossModule
from ssync_loss._settings import COUNT, NOT_NEGATIVE, check_by, optional
from ssync_loss.ssync.engines import resolve
from ssync_loss.ssync.engines.contract import Engine
from ssync_loss.ssync.fit import explained_shares, place_features
from ssync_loss.ssync.maps import Maps, bind_maps, prepare_maps
from ssync_loss.ssync.modules import SSyncLoss
from ssync_loss.ssync.settings import Settings
from ssync_loss.ssync.types import SlotLabels

# the forms of the loss, from none of it to all of it; `_level` uses the numbers of the last three
LEVELS = ("listening", "interior", "unmerged", "full")
_INTERIOR, _UNMERGED, _FULL = 1, 2, 3
_CHANGED = ("merge_threshold", "boundary_weight", "interior_weight")
_KEPT = tuple(one.name for one in fields(Settings) if one.name not in _CHANGED)


def _check_momentum(name: str, value: object) -> None:
    check_number(name, value, 0.0, 1.0)
    if value == 1:
        raise ValueError(f"`{name}` must be below 1; got 1, with which no question changes the means.")


def _check_axes(_: str, axes: object) -> None:
    parse(axes, FEATURES)


_check_settings = check_by(
    momentum=_check_momentum,
    warmup=lambda name, value: check_int(name, value, 0),
    dead_zone=NOT_NEGATIVE,
    every=COUNT,
    features_axes=optional(_check_axes),
)


class AdaptiveSSyncLoss(LossModule, check=_check_settings):
    """SSync in one of four forms. Two margins, measured on the training batches, choose the form.

    Let features x be centered over the valid patches of a clip. Hard labels l explain the share
    ``R(l) = sum_s a_s |mean_s x|^2 / sum_p |x_p|^2`` of their variance (slot s has a_s patches). Let e and d be the
    labels of encoder and decoder before merging, and m the encoder's merged labels. The margins of a clip are
    ``u = R(e) - R(d)`` and ``g = R(m) - R(d)``. A *question* measures the margins of a batch and updates their running
    means, ``U <- momentum U + (1 - momentum) mean u``, and G likewise. After n questions both are divided by
    ``1 - momentum^n``, which removes their bias to 0. The running means choose the loss:

    ============= =========================== =======================================================================
    level         when                        loss
    ============= =========================== =======================================================================
    ``listening`` ``n < warmup``              0
    ``full``      ``G > dead_zone``           the criterion's loss
    ``unmerged``  else, ``U > dead_zone``     both terms, nothing merged
    ``interior``  else                        the interior term alone, nothing merged: the decoder teaches the encoder
    ============= =========================== =======================================================================

    The rule is opt-in and in no paper: it comes from trials on small models. ``examples/study.py`` repeats these trials
    and adds settings that had no part in the rule. The study also trained a ``dead_zone`` of 0.01. On composites of
    other photographs it saved 0.01 FG-ARI. On moving objects with 12 slots G rises slowly, and it cost a third of the
    gain. In two runs with 160 clips the unmerged form cost 0.01 to 0.02 with U between 0.016 and 0.046. A ``dead_zone``
    above 0.046 would also forbid the full form where it helps. So the default is 0. Runs with
    ``every=5, warmup=10, momentum=0.9`` took the same levels and ended within 0.011.

    Every step from the criterion's ``start_step`` on, or every k-th step, asks a question, in training mode with
    gradients enabled. In eval mode, or without gradients, the loss has the current level and the means do not change.
    If an activation checkpoint computes the loss again, it asks no second question, unless the loss is compiled. The
    second computation takes the level of that moment, so call ``backward`` before the next forward. A reentrant
    checkpoint first computes without gradients, so the loss in it never asks, and a warning says so.

    A question leaves out clips with constant features or without a valid patch. It does not count if no clip is left,
    or if the mean is not finite. The question of a step comes before its loss. A ramp of the criterion begins at
    ``start_step``, not after the warmup.

    With an initialized process group a question is one all-reduce of three numbers. All ranks must call it, so that all
    have one level; each rank still computes its own loss. Levels are tensors: nothing is read on the host, and the loss
    compiles to one graph (with ``every`` above 1, one graph with a question and one without).

    The state is two buffers, ``margins`` and ``levels``, which checkpoints hold. A checkpoint from training with
    ``SSyncLoss`` lacks them: a strict load names the missing keys, and with ``strict=False`` the warmup begins.

    Args:
        criterion: the ``SSyncLoss`` with maps, masks, settings and schedule; its weights still multiply the terms.
        momentum: momentum of the running means, within [0, 1).
        warmup: number of the first question that chooses a form; before it the loss is 0.
        dead_zone: a margin must exceed this number, which is at least 0.
        every: ask at every k-th step; momentum and warmup then count questions, and ``step`` must be given.
        features_axes: layout of the features in einops' notation, b, t, d, h and w: (B, T, N, D) is ``"b t (h w) d"``.

    Shape: enc_logits, dec_logits: as the criterion's. features: (B, T, D, H, W) on the encoder's grid, floating point,
        or as ``features_axes`` says. Returns a float32 scalar (float64 for float64 maps).

    Raises: TypeError, ValueError on a wrong setting or argument, even before ``start_step``.

    >>> features = torch.tensor([0.0, 0.0, 4.0, 4.0]).view(1, 1, 1, 1, 4)
    >>> enc = torch.tensor([[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]]).view(1, 1, 2, 1, 4).requires_grad_()
    >>> dec = torch.tensor([[9.0, 9.0, 9.0, 0.0], [0.0, 0.0, 0.0, 9.0]]).view(1, 1, 2, 1, 4).requires_grad_()
    >>> criterion = AdaptiveSSyncLoss(SSyncLoss(), warmup=2)
    >>> [criterion(enc, dec, features).item() > 0 for _ in range(2)]
    [False, True]
    >>> criterion.describe()["level"], round(criterion.describe()["margin"], 4)  # 16/16 explained, less 16/3 of 16
    ('full', 0.6667)
    """

    margins: Tensor
    levels: Tensor
    # whether a checkpoint has already computed this loss again
    _recomputed = False

    def __init__(
        self,
        criterion: SSyncLoss,
        *,
        momentum: float = 0.98,
        warmup: int = 50,
        dead_zone: float = 0.0,
        every: int = 1,
        features_axes: str | None = None,
    ) -> None:
        self.remember(locals())
        check_type("criterion", criterion, SSyncLoss)
        self.criterion = criterion
        # buffers made in inference mode could never be written
        with torch.inference_mode(False):
            # running means of u and g with a bias to their start, 0, which `_debiased` removes
            self.register_buffer("margins", torch.zeros(2))
            # number of questions that ended at each level; the sum is n
            self.register_buffer("levels", torch.zeros(len(LEVELS), dtype=torch.int64))

    def forward(
        self,
        enc_logits: Tensor,
        dec_logits: Tensor,
        features: Tensor,
        *,
        step: int | None = None,
        valid: Tensor | None = None,
        slot_mask: Tensor | None = None,
        num_frames: int | None = None,
    ) -> Tensor:
        """Ask a question if one is due, and return the loss; other arguments are those of the criterion."""
        criterion = self.criterion
        masks: dict[str, Any] = {"valid": valid, "slot_mask": slot_mask, "num_frames": num_frames}
        asks = self._asks(step)
        if not criterion.is_on(step):
            bound = bind_maps(enc_logits, dec_logits, grid=criterion.grid, axes=criterion.axes, **masks)
            self._place(features, bound.enc)
            return criterion(enc_logits, dec_logits, step=step, **masks)
        criterion.look_at(enc_logits, dec_logits)
        maps = prepare_maps(enc_logits, dec_logits, **criterion.reading, **masks)
        features = self._place(features, maps.enc)
        settings = criterion.settings_at(step, maps.enc)
        with no_autocast(maps.enc):
            engine = resolve(criterion.backend, maps.enc, maps.dec)
            found = None
            if asks:
                found, level = self._ask(engine, maps, features, settings)
            else:
                level = self._level(self.margins, self.levels.sum())
            return engine.loss(maps, self._allowed(settings, maps, level), found)

    def describe(self) -> dict[str, Any]:
        """Return the state for a log; this reads the tensors.

        Returns: ``margin`` and ``merged_margin``, U and G (0 before the first question); ``level``, its name;
        ``questions``, n; and under the name of each level the share of questions that chose it.
        """
        number = self.levels.sum()
        plain, merged = self._debiased(self.margins, number).tolist()
        shares = (self.levels / number.clamp_min(1)).tolist()
        level = LEVELS[int(self._level(self.margins, number))]
        told = {"margin": plain, "merged_margin": merged, "level": level, "questions": int(number)}
        return told | dict(zip(LEVELS, shares, strict=True))

    def _place(self, features: Tensor, enc: Tensor) -> Tensor:
        check_same_device("enc_logits", enc, margins=self.margins)
        return place_features(features, self.features_axes, enc)

    def _asks(self, step: int | None) -> bool:
        if self.every > 1 and step is None:
            raise ValueError(f"`step` must be given with every={self.every}; got None.")
        if not self.criterion.is_on(step):
            return False
        if self.every > 1 and step is not None and (step - self.criterion.start_step) % self.every:
            return False
        if not (self.training and torch.is_grad_enabled()):
            return False
        if not is_recomputing():
            return True
        if not self._recomputed:
            self._recomputed = True
            if not self.levels.any():
                warnings.warn(
                    "A checkpoint computes AdaptiveSSyncLoss again, and it has asked no question before: with "
                    "use_reentrant=True it never asks, and its level never changes. Set use_reentrant=False, or call "
                    "the loss outside of the checkpoint. (Said once.)",
                    stacklevel=2,
                )
        return False

    @torch.no_grad()
    def _ask(self, engine: Engine, maps: Maps, features: Tensor, settings: Settings) -> tuple[SlotLabels, Tensor]:
        """Update the running means with a batch. Return labels with the representatives of the level, and the level."""
        found = engine.slot_labels(maps, settings)
        num_slots = maps.enc.shape[2]
        enc, dec = found.hard[0], found.hard[1]
        shares, variance = explained_shares(features, enc, dec, num_slots, maps.counted, found.representative)
        counted = variance != 0
        margins = torch.where(counted, torch.stack([shares[0], shares[2]]) - shares[1], 0.0)
        # maps with NaN have labels, too, but no margin
        margins = torch.where(found.clean, margins, torch.nan)
        sums = torch.cat([margins.sum(1), counted.sum().to(margins).unsqueeze(0)])
        if has_ranks():
            dist.all_reduce(sums)
        means, number = sums[:2] / sums[2].clamp_min(1), sums[2]
        moves = (number > 0) & means.isfinite().all()
        if self.margins.dtype not in (torch.float32, torch.float64):
            # the module was cast to half precision
            self.margins = self.margins.float()
        moved = self.momentum * self.margins + (1 - self.momentum) * means.to(self.margins.dtype)
        moved = torch.where(moves, moved, self.margins)
        level = self._level(moved, self.levels.sum() + moves)
        self.margins.copy_(moved)
        self.levels.add_(moves & (torch.arange(len(LEVELS), device=level.device) == level))
        itself = torch.arange(num_slots, device=level.device).to(found.representative)
        allowed = torch.where(level == _FULL, found.representative, itself)
        return SlotLabels(found.hard, allowed, found.clean), level

    def _debiased(self, margins: Tensor, number: Tensor) -> Tensor:
        # float32 may round the power to 1, and the divisor would be 0
        return margins / torch.where(number > 0, 1 - self.momentum ** number.double(), 1.0)

    def _level(self, margins: Tensor, number: Tensor) -> Tensor:
        plain, merged = (self._debiased(margins, number) > self.dead_zone).unbind()
        allowed = torch.where(merged, _FULL, torch.where(plain, _UNMERGED, _INTERIOR))
        return torch.where(number < self.warmup, 0, allowed)

    def _allowed(self, settings: Settings, maps: Maps, level: Tensor) -> Settings:
        """Return the settings of a level: it multiplies weights by 0 or 1, and may make the threshold infinite."""
        threshold = float("inf") if settings.merge_threshold is None else settings.merge_threshold
        if not isinstance(threshold, Tensor):
            threshold = torch.full((), threshold, dtype=maps.dtype, device=level.device)
        kept = {name: getattr(settings, name) for name in _KEPT}
        return Settings(
            **kept,
            merge_threshold=torch.where(level == _FULL, threshold, float("inf")),
            boundary_weight=(level >= _UNMERGED).to(maps.dtype) * settings.boundary_weight,
            interior_weight=(level >= _INTERIOR).to(maps.dtype) * settings.interior_weight,
        )
