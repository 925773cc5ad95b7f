"""SSync that asks, while it trains, which of its forms it may use."""

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

# what the loss may be, from nothing to all of it; the last three by their numbers in `_level`
LEVELS = ("listening", "interior", "unmerged", "full")
_INTERIOR, _UNMERGED, _FULL = 1, 2, 3
_CHANGED = ("merge_threshold", "boundary_weight", "interior_weight")
_KEPT = tuple(one.name for one in fields(Settings) if one.name not in _CHANGED)


def _check_momentum(name: str, value: object) -> None:
    check_number(name, value, 0.0, 1.0)
    if value == 1:
        raise ValueError(f"`{name}` must be below 1; got 1: no question would move the means.")


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
    """SSync in the form that two margins, measured on the training batches themselves, allow.

    Of features x that are centered over the valid patches of a clip, hard labels l explain the share
    ``R(l) = sum_s a_s |mean_s x|^2 / sum_p |x_p|^2`` (slot s has a_s patches). With e and d the labels of encoder and
    decoder before merging, and m the encoder's merged ones, a question takes ``u = R(e) - R(d)`` and
    ``g = R(m) - R(d)`` of every clip into running means, debiased: ``U <- momentum U + (1 - momentum) mean u``, divided
    by ``1 - momentum^n`` after n questions, and G likewise. Then the loss is one of four:

    ============= =========================== =======================================================================
    level         when                        loss
    ============= =========================== =======================================================================
    ``listening`` ``n < warmup``              0
    ``full``      ``G > dead_zone``           that of the criterion
    ``unmerged``  else, ``U > dead_zone``     both terms, nothing merged
    ``interior``  else                        the interior term alone, nothing merged: the decoder teaches the encoder
    ============= =========================== =======================================================================

    Not in any paper: the rule comes from trials on small models. ``examples/study.py`` repeats them, beside settings
    that had no part in the rule. It is opt-in. The study also trained a ``dead_zone`` of 0.01. On composites of other
    photographs it saved 0.01 FG-ARI. On moving objects with 12 slots, where G rises slowly, it cost a third of the
    gain. In two runs with 160 clips the unmerged form cost 0.01 to 0.02 with U between 0.016 and 0.046. A ``dead_zone``
    above that would also forbid the full form where it helps. So it stays 0. Asking at every 5th step, with
    ``warmup=10, momentum=0.9``, took the same levels, and ended within 0.011.

    When it asks: at every step from the criterion's ``start_step`` on, or every k-th, in training mode, where gradients
    are enabled. In eval mode, or without gradients, the loss is that of the present level, and nothing is learned.
    What an activation checkpoint computes again is not asked again, unless the loss in it is compiled. It takes the
    level of that moment, so that ``backward`` must be called before the next forward. Within a reentrant checkpoint,
    which computes first without gradients, nothing is ever asked, and a warning says so.

    A question leaves out a clip with constant features or without a valid patch. One that has no other clip does not
    count, nor does one whose mean is not finite. A question comes before the loss of its own step. The criterion's
    schedule goes on meanwhile: a ramp begins at ``start_step``, not when listening ends.

    With an initialized process group a question is one all-reduce of three numbers, which all ranks must make, so that
    all are at one level; the loss remains that of each rank. Levels are tensors: nothing is read on the host, and all
    of it is one graph (with ``every`` above 1 there is one with and one without a question).

    The state is two buffers, ``margins`` and ``levels``, and so in the checkpoint. One of a host that had plain SSync
    lacks these keys: a strict load names them, and with ``strict=False`` it begins to listen.

    Args:
        criterion: the loss whose maps, masks, settings and schedule are taken; its weights still multiply the terms.
        momentum: of the running means, within [0, 1).
        warmup: number of the first question that decides; those before only listen.
        dead_zone: at least 0, what a margin must exceed.
        every: ask at every k-th step; momentum and warmup then count questions, and ``step`` must be given.
        features_axes: layout of the features in einops' words, b, t, d, h and w: (B, T, N, D) is ``"b t (h w) d"``.

    Shape: enc_logits, dec_logits: as the criterion's. features: (B, T, D, H, W) on the encoder's grid, floating point,
        or what ``features_axes`` says. Returns a float32 scalar (float64 for float64 maps).

    Raises: TypeError, ValueError on a wrong setting or argument, already before ``start_step``.

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
    # whether a checkpoint was seen to compute it again
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
        # in inference mode they could never be written to
        with torch.inference_mode(False):
            # running means of u and g that began at 0; `_debiased` divides that out
            self.register_buffer("margins", torch.zeros(2))
            # how many questions ended at each level; in sum n
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
        """Ask if it is time to, and return the loss of the level; other arguments are those of the criterion."""
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
        """Say, for a log, where it stands; this reads the tensors.

        Returns: ``margin`` and ``merged_margin``, U and G (0 before the first question); ``level``, by name;
        ``questions``, n; and by the name of each level the share of questions after which it was taken.
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
                    "AdaptiveSSyncLoss has asked no question before it is computed again: in a checkpoint with "
                    "use_reentrant=True it never asks, and its level stays. Set use_reentrant=False, or call the loss "
                    "outside of the checkpoint. (Said once.)",
                    stacklevel=2,
                )
        return False

    @torch.no_grad()
    def _ask(self, engine: Engine, maps: Maps, features: Tensor, settings: Settings) -> tuple[SlotLabels, Tensor]:
        """Take the margins of a batch into the means. Return the labels, merged as the level allows, and the level."""
        found = engine.slot_labels(maps, settings)
        num_slots = maps.enc.shape[2]
        enc, dec = found.hard[0], found.hard[1]
        shares, variance = explained_shares(features, enc, dec, num_slots, maps.counted, found.representative)
        counted = variance != 0
        margins = torch.where(counted, torch.stack([shares[0], shares[2]]) - shares[1], 0.0)
        # maps with NaN have labels all the same
        margins = torch.where(found.clean, margins, torch.nan)
        sums = torch.cat([margins.sum(1), counted.sum().to(margins).unsqueeze(0)])
        if has_ranks():
            dist.all_reduce(sums)
        means, number = sums[:2] / sums[2].clamp_min(1), sums[2]
        moves = (number > 0) & means.isfinite().all()
        if self.margins.dtype not in (torch.float32, torch.float64):
            # of a module that was cast down
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
        # in float32 a momentum near 1 is 1, and nothing would be left to divide by
        return margins / torch.where(number > 0, 1 - self.momentum ** number.double(), 1.0)

    def _level(self, margins: Tensor, number: Tensor) -> Tensor:
        plain, merged = (self._debiased(margins, number) > self.dead_zone).unbind()
        allowed = torch.where(merged, _FULL, torch.where(plain, _UNMERGED, _INTERIOR))
        return torch.where(number < self.warmup, 0, allowed)

    def _allowed(self, settings: Settings, maps: Maps, level: Tensor) -> Settings:
        """Return the settings of a level: weights times 0 or 1, and a threshold or infinity."""
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
