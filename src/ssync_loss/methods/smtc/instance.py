"""Instance consistency: an instance is similar to its match in another frame, and differs from other instances."""

from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from einops import rearrange
from torch import Tensor

from ssync_loss._autocast import at_least_float32, no_autocast
from ssync_loss._autograd import attached_zero, savable
from ssync_loss._checks import check_choice, check_flag, check_number
from ssync_loss._inputs import check_floats, check_mask, widest
from ssync_loss._module import LossModule
from ssync_loss._settings import SHARE, check_by
from ssync_loss._vectors import directions, products
from ssync_loss.methods.smtc._assignment import best_assignment

Metric: TypeAlias = Literal["cosine", "euclidean"]
METRICS = get_args(Metric)

# keeps the mean finite if no instance is valid
EPSILON = 1e-10

_check_thresholds = check_by(p_thr=SHARE, area_thr=SHARE, sim_thr=partial(check_number, low=-1.0, high=1.0))


def _check_settings(*, margin: object, metric: object, same_frame: object) -> None:
    """Check the settings of the loss; the margin is a cosine, or a distance."""
    check_choice("metric", metric, METRICS)
    check_number("margin", margin, *((-1.0, 1.0) if metric == "cosine" else (0.0, 2.0)))
    check_flag("same_frame", same_frame)


@torch.no_grad()
def valid_instances(
    logits: Tensor, slots: Tensor, instances: Tensor, *, p_thr: float = 0.5, area_thr: float = 0.2, sim_thr: float = 0.5
) -> Tensor:
    """Select instances that are similar to their semantic, of semantics that cover enough patches.

    ``valid[s, p] = (share of patches where softmax_S(logits)[s] > p_thr) > area_thr and
    cos(slots[s], instances[s, p]) > sim_thr``. A vector of zeros has cosine 0 with all others. If the slots of a model
    are instances, pass ``slots.unsqueeze(3)`` as instances: then only the area matters.

    Args:
        logits: (B, T, S, H, W), masks of the semantics before the softmax.
        slots: (B, T, S, D), the semantics.
        instances: (B, T, S, P, D), the instances inside each semantic, before any projection.
        p_thr: probability above which a patch belongs to a semantic; 0.3 in the authors' later code.
        area_thr: the share of patches that belong to a semantic must exceed this number.
        sim_thr: the cosine of an instance with its semantic must exceed this number.

    Returns: (B, T, S, P), bool.
    Source: Qian et al., ICCV 2023 (arXiv:2308.09951), instance consistency.
    Raises: TypeError on a wrong dtype, ValueError on wrong shapes or settings.

    >>> logits = torch.tensor([[9.0, 9.0, 0.0], [0.0, 0.0, 9.0]]).view(1, 1, 2, 1, 3)  # two thirds, and one
    >>> slots = torch.ones(1, 1, 2, 2)
    >>> instances = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).expand(1, 1, 2, 2, 2)  # cosines 0.7071 and -0.7071
    >>> valid_instances(logits, slots, instances, area_thr=0.5).tolist()
    [[[[True, False], [False, False]]]]
    """
    _check_thresholds(p_thr=p_thr, area_thr=area_thr, sim_thr=sim_thr)
    size = check_floats("logits", logits, "B T S H W", filled="T S H W")
    given = check_floats("slots", slots, "B T S D", size, filled="D", logits=logits)
    check_floats("instances", instances, "B T S P D", given, filled="P", logits=logits)
    with no_autocast(logits):
        inside = at_least_float32(logits).softmax(2) > p_thr
        # a division, not a mean: a mean may multiply by the inverse, which can round an area above the threshold
        area = inside.sum((3, 4)) / (size["H"] * size["W"])
        kind, _ = directions(at_least_float32(slots))
        found, _ = directions(at_least_float32(instances))
        alike = (kind.unsqueeze(3) * found).sum(4) > sim_thr
        return (area > area_thr).unsqueeze(3) & alike


def instance_consistency_loss(
    embeddings: Tensor,
    teacher_embeddings: Tensor,
    valid: Tensor,
    teacher_valid: Tensor,
    *,
    margin: float = 0.5,
    metric: Metric = "cosine",
    same_frame: bool = True,
) -> Tensor:
    """Pull every instance to the teacher's match in another frame, and push it away from the teacher's other instances.

    Let O be the student's unit vectors and O' the teacher's. For all pairs of frames t, j of a clip and every semantic,
    ``e`` is the one-to-one assignment of its P instances with the largest sum of ``O_t[p] O'_j[e(p)]``, over all
    instances, valid or not. The value of a valid instance is ``(mean over q != e(p) of relu(O_t[p] O'_j[q] - margin)) -
    valid'_j[e(p)] O_t[p] O'_j[e(p)]``, within [-1, 1.5]. The loss is the mean over valid instances; every instance,
    valid or not, adds 1e-10 to the divisor. ``metric="euclidean"`` is the form on the authors' poster, with the sign
    corrected: ``(sum over q != e(p) of relu(margin - |O_t[p] - O'_j[q]|)) + valid'_j[e(p)] |O_t[p] - O'_j[e(p)]|``.

    A slot model without semantics has S = 1, and its slots are the instances. Without a valid instance, or without
    clips, the loss is exactly 0, attached to the graph. For P up to 6 all P! assignments are compared. For larger P
    scipy finds the assignment on the host, which waits for the device and breaks the graph of a compiler.

    Args:
        embeddings: (B, T, S, P, D), the student's instances, already projected and scaled to length 1; the only
            argument that gets a gradient.
        teacher_embeddings: (B, T, S, P, D), the teacher's instances.
        valid: (B, T, S, P), bool, valid instances of the student, from :func:`valid_instances`.
        teacher_valid: (B, T, S, P), bool, the same for the teacher; only valid teacher instances pull.
        margin: other instances push away if their cosine is above it, or their distance below it.
        metric: ``"cosine"`` as in the authors' code, or ``"euclidean"``.
        same_frame: whether to include pairs with t = j; True in the authors' code, False on the poster.

    Returns: a scalar in float32, or float64 if one of the embeddings is.
    Source: Qian et al., ICCV 2023 (arXiv:2308.09951), instance consistency.
    Raises: ImportError if there are more than six instances and scipy is missing; TypeError on a wrong dtype;
        ValueError on wrong shapes or settings.

    >>> embeddings = torch.eye(2).view(1, 1, 1, 2, 2)
    >>> valid = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    >>> teacher_valid = torch.tensor([True, False]).view(1, 1, 1, 2)
    >>> # both instances match exactly, but one match is not valid: (-1 + 0) / 2
    >>> round(instance_consistency_loss(embeddings, embeddings.flip(3), valid, teacher_valid).item(), 4)
    -0.5
    """
    _check_settings(margin=margin, metric=metric, same_frame=same_frame)
    size = check_floats("embeddings", embeddings, "B T S P D", filled="T S P D")
    check_floats("teacher_embeddings", teacher_embeddings, "B T S P D", size, embeddings=embeddings)
    check_mask("valid", valid, "B T S P", size, embeddings=embeddings)
    check_mask("teacher_valid", teacher_valid, "B T S P", size, embeddings=embeddings)
    dtype = widest(embeddings, teacher_embeddings)
    if size["B"] == 0 or (size["T"] == 1 and not same_frame):
        return attached_zero(embeddings).to(dtype)
    with no_autocast(embeddings):
        # all pairs of instances of all frames: (B, S, T P, T P)
        ours, theirs = (
            rearrange(one, "b t s p d -> b s (t p) d").to(dtype) for one in (embeddings, teacher_embeddings.detach())
        )
        theirs, valid, teacher_valid = map(savable, (theirs, valid, teacher_valid))
        cosines = _by_frames(products(ours, theirs), size["P"])
        # the assignment as a boolean matrix
        matched = best_assignment(cosines.detach()).unsqueeze(5) == torch.arange(size["P"], device=cosines.device)
        if metric == "cosine":
            pull, push = -cosines, (cosines - margin).relu()
        else:
            # differences, not products, so that equal vectors have distance 0 and gradient 0
            distances = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")
            pull = _by_frames(distances, size["P"])
            push = (margin - pull).relu()
        apart = torch.where(matched, 0.0, push).sum(5)
        if metric == "cosine":
            apart = apart / max(size["P"] - 1, 1)
        # (B, S, t, j, p, q): valid instances of the teacher, then of the student
        wanted = matched & rearrange(teacher_valid, "b j s q -> b s () j () q")
        costs = apart + torch.where(wanted, pull, 0.0).sum(5)
        counted = rearrange(valid, "b t s p -> b s t () p").expand(costs.shape)
        num_instances, num_others = valid.numel(), size["T"]
        if not same_frame:
            itself = torch.eye(size["T"], dtype=torch.bool, device=valid.device)
            counted, num_others = counted & ~itself.unsqueeze(2), num_others - 1
        number = counted.sum(dtype=dtype) + EPSILON * num_instances * num_others
        return torch.where(counted, costs, 0.0).sum() / number


def _by_frames(pairs: Tensor, num_instances: int) -> Tensor:
    """Reshape (B, S, T P, T P) to (B, S, T, T, P, P)."""
    return rearrange(pairs, "b s (t p) (j q) -> b s t j p q", p=num_instances, q=num_instances)


class InstanceConsistencyLoss(LossModule, check=_check_settings):
    """Module of :func:`instance_consistency_loss`, with the same shapes and errors.

    ``forward(embeddings, teacher_embeddings, valid, teacher_valid)``.

    >>> embeddings, valid = torch.eye(2).view(1, 1, 1, 2, 2), torch.ones(1, 1, 1, 2, dtype=torch.bool)
    >>> round(InstanceConsistencyLoss()(embeddings, embeddings, valid, valid).item(), 4)
    -1.0
    """

    def __init__(self, *, margin: float = 0.5, metric: Metric = "cosine", same_frame: bool = True) -> None:
        self.remember(locals())

    def forward(self, embeddings: Tensor, teacher_embeddings: Tensor, valid: Tensor, teacher_valid: Tensor) -> Tensor:
        """Return the term; see :func:`instance_consistency_loss`."""
        return instance_consistency_loss(embeddings, teacher_embeddings, valid, teacher_valid, **self.settings)
