"""The share of the variance of features that a partition into slots explains."""

import torch
from torch import Tensor

from ssync_loss._autocast import no_autocast
from ssync_loss._axes import FEATURES, place, solve
from ssync_loss._forks import take_one_thread_if_forked
from ssync_loss._inputs import check_floats, widest

# channels of a block: intermediate values stay in a processor's cache
_CHANNELS = 64


def place_features(features: Tensor, axes: str | None, enc: Tensor) -> Tensor:
    """View features of layout ``axes`` as (B, T, D, H, W), on the grid of the encoder's map (B, T, S, H, W)."""
    # whichever engine computes the loss, torch sums the features
    take_one_thread_if_forked(enc.device.type)
    B, T, _, H, W = enc.shape
    if axes is not None:
        shown = solve("features", features, axes, {"b": B, "t": T, "h": H, "w": W}, FEATURES)
        features = place("features", features, axes, shown, FEATURES)
    elif isinstance(features, Tensor) and features.dim() == 4:
        raise ValueError(
            f"`features` must have shape (B={B}, T={T}, D, H={H}, W={W}), or another that `features_axes` tells, "
            f"such as 'b t (h w) d'; got {tuple(features.shape)}."
        )
    check_floats("features", features, "B T D H W", {"B": B, "T": T, "H": H, "W": W}, filled="D", enc_logits=enc)
    return features


@torch.no_grad()
def explained_shares(
    features: Tensor,
    labels: Tensor,
    others: Tensor,
    num_slots: int,
    valid: Tensor | None,
    representative: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the share of the variance that each of three partitions explains, and the variance.

    The partitions are ``labels``, ``others``, and ``labels`` merged by ``representative`` (B, S). With ``x_p`` a
    patch's features minus their mean over the clip, ``R = sum_s a_s |mean_s x|^2 / sum_p |x_p|^2``. Labels are
    (B, T, H, W) int64, ``valid`` is (B, T, H, W) bool or None. Returns (3, B) and ``sum_p |x_p|^2`` (B,) in float64. A
    share is 0 if features are constant, NaN if they are not finite.

    Features are read once. Products are in float32 (float64 for float64 features), sums over frames in float64.
    """
    slots = torch.arange(num_slots, device=features.device)
    first, second = (one.flatten(2).unsqueeze(3) == slots for one in (labels, others))
    counted = None if valid is None else valid.flatten(2)
    num_patches = torch.full_like(slots[:1], first.shape[1] * first.shape[2])
    if counted is not None:
        first, second = (one & counted.unsqueeze(3) for one in (first, second))
        num_patches = counted.flatten(1).sum(1)
    first, second = first.to(widest(features)), second.to(widest(features))
    area = torch.stack([first, second], 1).sum((2, 3), dtype=torch.float64)
    # through sums and differences, equal partitions get bitwise equal shares, and swapped partitions swapped shares
    sums, total = _slot_sums(features, torch.cat([first + second, first - second], 3), counted)
    both, apart = sums.chunk(2, 2)
    joined = (representative.unsqueeze(2) == slots).double()
    sums = torch.stack([both + apart, both - apart], 1) / 2
    sums, area = torch.cat([sums, sums[:, :1] @ joined.unsqueeze(1)], 1), torch.cat([area, area[:, :1] @ joined], 1)
    # features are relative to a patch, so their mean is small, and little cancels in these differences
    of_mean = sums[:, 0].sum(2).square().sum(1) / num_patches.clamp_min(1)
    total = total - of_mean
    between = (sums.square().sum(2) / area.clamp_min(1)).sum(2) - of_mean.unsqueeze(1)
    # one slot explains exactly 0; rounding may leave another number
    between = between.masked_fill((area > 0).sum(2) < 2, 0.0)
    shares = between / torch.where(total == 0, 1.0, total).unsqueeze(1)
    shares = torch.where(total.isfinite().unsqueeze(1), shares, torch.nan)
    return shares.clamp(0.0, 1.0).mT, total


def _slot_sums(features: Tensor, member: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum features (B, T, D, H, W) over members (B, T, N, K), and sum their squares: (B, D, K) and (B,), in float64.

    One counted patch is subtracted from all patches, so that constant features become exactly 0. ``counted`` is
    (B, T, N), or None. Products are in the type of ``member``.
    """
    patches = features.flatten(3)
    origin = patches[:, 0, :, 0]
    if counted is not None:
        chosen = counted.flatten(1).to(torch.uint8).argmax(1)
        frame, cell = chosen // counted.shape[2], chosen % counted.shape[2]
        origin = patches[torch.arange(patches.shape[0], device=chosen.device), frame, :, cell]
    parts, squares = [], features.new_zeros(features.shape[0], dtype=torch.float64)
    with no_autocast(features):
        for block, start in zip(patches.split(_CHANNELS, 2), origin.split(_CHANNELS, 1), strict=True):
            values = block.to(member.dtype) - start[:, None, :, None].to(member.dtype)
            if counted is not None:
                values = values.masked_fill_(~counted.unsqueeze(2), 0.0)
            parts.append((values @ member).double().sum(1))
            squares = squares + values.double().square_().sum((1, 2, 3))
    return torch.cat(parts, 1), squares
