"""SMTC in loops, see :mod:`ssync_loss.methods._slow`: one pair of frames, one patch, one instance at a time.

Source: Qian et al., ICCV 2023 (arXiv:2308.09951).
"""

import math
from collections.abc import Mapping
from functools import partial
from itertools import permutations

import torch
from torch import Tensor
from torch.nn import functional as F

from ssync_loss.methods._slow import mean, unit, widened


def reference_sinkhorn(cost: Tensor, mu: Tensor, nu: Tensor, *, eps: float = 0.05, iters: int = 3) -> Tensor:
    """Rescale rows and columns of ``exp(-cost / eps)`` in turn, without logarithms."""
    plans = [_plan(*given, eps, iters) for given in zip(cost.double(), mu.double(), nu.double(), strict=True)]
    return widened(torch.stack(plans) if plans else cost, cost, mu, nu)


def reference_semantic_consistency_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    feats: Tensor,
    *,
    eps: float = 0.05,
    iters: int = 3,
    marginals: str = "l1",
    pool: int = 1,
) -> Tensor:
    """Compare the semantics of every patch with those of its transport targets, for every pair of frames."""
    values = []
    for clip, teacher, keys in zip(logits, teacher_logits.detach(), feats.detach(), strict=True):
        student_patches, teacher_patches = (
            [_patches(frame.double().softmax(0), pool) for frame in one] for one in (clip, teacher)
        )
        units = [[unit(patch) for patch in _patches(frame.double(), pool)] for frame in keys]
        for t, j in permutations(range(len(units)), 2):
            ours, theirs = student_patches[t], teacher_patches[j]
            mu, nu = (
                torch.stack([u.abs().sum() if marginals == "l1" else torch.ones_like(u[0]) for u in units[one]])
                for one in (t, j)
            )
            cost = torch.stack([torch.stack([1 - u @ v for v in units[j]]) for u in units[t]])
            value = ours[0].sum() * 0
            # a frame without weight is not transported
            if mu.sum() > 0 and nu.sum() > 0:
                for row, patch in zip(_plan(cost, mu, nu, eps, iters), ours, strict=True):
                    for share, other in zip(row, theirs, strict=True):
                        value = value - share * (other * (patch + 1e-8).log()).sum()
            values.append(value)
    return widened(mean(values, logits), logits, teacher_logits, feats)


def reference_mask_diversity_loss(logits: Tensor) -> Tensor:
    """Average the cosines of the masks of each frame, pair by pair."""
    values = []
    for clip in logits.double():
        for frame in clip:
            for one, other in permutations([mask + 1e-8 for mask in frame.softmax(0)], 2):
                values.append((one * other).sum() / (one.square().sum() * other.square().sum()).sqrt())
    return widened(mean(values, logits), logits)


def reference_valid_instances(
    logits: Tensor, slots: Tensor, instances: Tensor, *, p_thr: float = 0.5, area_thr: float = 0.2, sim_thr: float = 0.5
) -> Tensor:
    """Count the patches of every semantic, and compare every instance with it."""
    logits, slots, instances = (one.detach().double() for one in (logits, slots, instances))
    valid = torch.zeros(instances.shape[:4], dtype=torch.bool)
    for b, t, s, p in torch.ones_like(valid).nonzero().tolist():
        mask = logits[b, t].softmax(0)[s].flatten()
        area = sum(float(one) > p_thr for one in mask) / len(mask)
        similarity = float(unit(slots[b, t, s]) @ unit(instances[b, t, s, p]))
        valid[b, t, s, p] = area > area_thr and similarity > sim_thr
    return valid.to(instances.device)


def reference_instance_consistency_loss(
    embeddings: Tensor,
    teacher_embeddings: Tensor,
    valid: Tensor,
    teacher_valid: Tensor,
    *,
    margin: float = 0.5,
    metric: str = "cosine",
    same_frame: bool = True,
) -> Tensor:
    """Try every assignment of the instances of two frames, and apply pull and push with the best assignment."""
    num_clips, num_frames, num_slots, _, _ = embeddings.shape
    total, number = embeddings.flatten()[:0].sum().double(), 0.0
    pairs = [(t, j) for t in range(num_frames) for j in range(num_frames) if same_frame or t != j]
    for b, s in ((b, s) for b in range(num_clips) for s in range(num_slots)):
        for t, j in pairs:
            ours, theirs = embeddings[b, t, s].double(), teacher_embeddings[b, j, s].detach().double()
            cosines = [[float(one @ other) for other in theirs] for one in ours.detach()]
            partner = _best_order(cosines)
            for p, one in enumerate(ours):
                number += bool(valid[b, t, s, p]) + 1e-10
                if not valid[b, t, s, p]:
                    continue
                if metric == "cosine":
                    pull, push = -one @ theirs[partner[p]], [(one @ other - margin).relu() for other in theirs]
                else:
                    pull, push = _length(one - theirs[partner[p]]), [(margin - _length(one - x)).relu() for x in theirs]
                del push[partner[p]]
                apart = sum(push, torch.zeros_like(pull))
                total = total + (apart / max(len(push), 1) if metric == "cosine" else apart)
                if teacher_valid[b, j, s, partner[p]]:
                    total = total + pull
    return widened(total / max(number, 1e-300), embeddings, teacher_embeddings)


def reference_correlation_fusion(keys: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Correlate every patch with every patch of the previous frame, and add a linear map (C, H * W) of the result.

    >>> keys = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1, 1)
    >>> reference_correlation_fusion(keys, torch.full((1, 1), 2.0), torch.zeros(1)).flatten().tolist()
    [7.0, 9.0]
    """
    weight, bias = weight.double(), bias.double()
    frames = []
    for clip in keys.double().flatten(3):
        for t, now in enumerate(clip):
            # the last frame precedes the first
            correlation = clip[t - 1].mT @ now
            frames.append(now + weight @ correlation + bias.unsqueeze(1))
    return widened(torch.stack(frames).view(keys.shape), keys)


def reference_slot_attention(
    slots: Tensor, features: Tensor, weights: Mapping[str, Tensor], *, iters: int = 3, gate: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Let slots (K, D) compete for the patches (N, D) of one frame, with a gate (N,); all steps have a gradient.

    Returns the slots and the logits (K, N) of the last step.
    """
    known = {name: one.double() for name, one in weights.items()}

    def layer(name: str, vector: Tensor) -> Tensor:
        return F.linear(vector, known[f"{name}.weight"], known[f"{name}.bias"])

    def normal(name: str, vector: Tensor) -> Tensor:
        return F.layer_norm(vector, vector.shape, known[f"{name}.weight"], known[f"{name}.bias"])

    patches = [normal("norm_features", one) for one in features.double()]
    keys, values = ([layer(name, one) for one in patches] for name in ("to_k", "to_v"))
    current = list(slots.double())
    logits = torch.empty(0)
    for _ in range(iters):
        queries = [layer("to_q", normal("norm_slots", one)) for one in current]
        logits = torch.stack([torch.stack([q @ k / math.sqrt(len(q)) for k in keys]) for q in queries])
        attention = logits.softmax(0) + 1e-8
        if gate is not None:
            attention = attention * gate.double()
        after = []
        for slot, weight in zip(current, attention, strict=True):
            moved = slot + (weight / weight.sum()) @ torch.stack(values)
            after.append(moved + layer("mlp.2", layer("mlp.0", normal("norm_mlp", moved)).relu()))
        current = after
    return widened(torch.stack(current), slots), widened(logits, slots)


def reference_semantic_aware_slot_attention(
    features: Tensor,
    noise: Tensor,
    weights: Mapping[str, Tensor],
    *,
    iters: int = 3,
    gate: str = "soft",
    gate_thr: float = 0.3,
) -> tuple[Tensor, ...]:
    """Attend frame by frame: semantics (S, C), then P instances of each semantic, with the whole gradient.

    Returns slots, logits, instances and their logits, as the module with these weights does.

    >>> from ssync_loss.attention import SemanticAwareSlotAttention
    >>> module = SemanticAwareSlotAttention(1, num_slots=1, num_instances=1)
    >>> weights = {name: torch.zeros_like(one) for name, one in module.named_parameters()}

    The semantic starts at 1, its instance at 1 + 2, and all values are 5:

    >>> weights["mu"] += 1
    >>> weights["to_v.bias"] += 5
    >>> patch, noise = torch.zeros(1, 1, 1, 1, 1), torch.full((1, 1, 1, 1, 1), 2.0)
    >>> slots, _, instances, _ = reference_semantic_aware_slot_attention(patch, noise, weights, iters=1)
    >>> slots.item(), instances.item()
    (6.0, 8.0)
    """
    frames, grid = [], features.shape[3:]
    for frame, draws in zip(features.flatten(0, 1), noise.flatten(0, 1), strict=True):
        attend = partial(reference_slot_attention, features=frame.flatten(1).mT, weights=weights, iters=iters)
        slots, logits = attend(weights["mu"])
        score = logits if gate == "logit" else logits.softmax(0)
        gates = score if gate == "soft" else (score > gate_thr).double()
        starts = weights["mu"].unsqueeze(1) + weights["log_sigma"].exp().unsqueeze(1) * draws
        within = [attend(start, gate=one) for start, one in zip(starts, gates, strict=True)]
        instances, instance_logits = (torch.stack(one) for one in zip(*within, strict=True))
        frames.append((slots, logits.unflatten(-1, grid), instances, instance_logits.unflatten(-1, grid)))
    return tuple(torch.stack(one).unflatten(0, features.shape[:2]) for one in zip(*frames, strict=True))


def _best_order(scores: list[list[float]]) -> tuple[int, ...]:
    """Return the columns of the rows whose scores have the largest sum."""
    return max(permutations(range(len(scores))), key=lambda order: sum(scores[p][q] for p, q in enumerate(order)))


def _plan(cost: Tensor, mu: Tensor, nu: Tensor, eps: float, iters: int) -> Tensor:
    kernel, mu, nu = (-cost / eps).exp(), mu / mu.sum(), nu / nu.sum()
    b = torch.ones_like(nu)
    for _ in range(iters):
        a = mu / (kernel @ b)
        b = nu / (a @ kernel)
    return a.unsqueeze(1) * kernel * b


def _patches(frame: Tensor, pool: int) -> list[Tensor]:
    """Return the means over squares of cells, row by row: (C, H, W) -> (C,) each."""
    return list(F.avg_pool2d(frame, pool).flatten(1).unbind(1))


def _length(vector: Tensor) -> Tensor:
    """Return the length; a zero vector gets no gradient."""
    return vector.square().sum().sqrt() if vector.any() else vector.sum() * 0
