"""Slot attention in two stages with the same weights: semantics, then the instances inside each semantic."""

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from einops import rearrange
from torch import Tensor, nn

from ssync_loss._autocast import at_least_float32, no_autocast
from ssync_loss._autograd import savable
from ssync_loss._checks import check_choice, check_flag, check_int, check_number
from ssync_loss._inputs import check_floats
from ssync_loss._vectors import directions

Gate: TypeAlias = Literal["soft", "prob", "logit"]
GATES = get_args(Gate)

# least attention of every slot to every patch
EPSILON = 1e-8
# least sum of attention over patches; the gradient of its inverse fits into float32
LEAST_ATTENTION = 1e-30


class SemanticSlots(NamedTuple):
    """The result of two stages of slot attention for each frame.

    Attributes:
        slots: (B, T, S, D), the semantics.
        logits: (B, T, S, H, W), their masks before the softmax over S.
        instances: (B, T, S, P, D), the instances inside each semantic.
        instance_logits: (B, T, S, P, H, W), their masks before the softmax over P.

    Raises: nothing; fields are not checked.

    >>> found = SemanticSlots(*(torch.zeros(1, 1, 2, *rest) for rest in ((3,), (5, 5), (4, 3), (4, 5, 5))))
    >>> found.masks().unique().tolist()  # two semantics with four instances each
    [0.125]
    """

    slots: Tensor
    logits: Tensor
    instances: Tensor
    instance_logits: Tensor

    def masks(self) -> Tensor:
        """Return the share of every instance in every patch, (B, T, S, P, H, W), with sum 1 over S and P."""
        return self.logits.softmax(2).unsqueeze(3) * self.instance_logits.softmax(3)

    def scores(self) -> Tensor:
        """Return the cosines of instances with their semantics, (B, T, S, P); the paper keeps instances from 1/2 on."""
        (units, _), (kind, _) = (directions(at_least_float32(one)) for one in (self.instances, self.slots))
        return (units * kind.unsqueeze(3)).sum(4)


class SemanticAwareSlotAttention(nn.Module):
    """Decompose frames into semantics that compete for patches, and each semantic into instances.

    A step updates slots s with features F, without positions or a recurrent unit: ``q = W_q LN(s)``,
    ``Z = q (W_k LN(F))^T / sqrt(D)``, ``A = (softmax of Z over the competing slots + 1e-8) G``,
    ``s = s + (A / sum_patches A) W_v LN(F)``, ``s = s + MLP(LN(s))``. Both stages take ``iters`` steps with the same
    weights. Stage 1 starts at s = mu; all S slots compete, and G = 1. Stage 2 starts at s = mu + sigma xi, with P draws
    for every semantic and frame; the P slots of a semantic compete, and G is the semantic's mask of stage 1. Only the
    last step has a gradient, which also reaches the initial slots.

    A semantic has the same index in all frames and clips. Frames are computed independently, in float32 or float64,
    except for layers in half precision.

    ``forward(features, noise=None, *, iters=None)`` takes features (B, T, D, H, W) and xi (B, T, S, P, D), which None
    draws at random, and returns :class:`SemanticSlots`.

    Args:
        dim: D.
        num_slots: S.
        num_instances: P.
        iters: steps of each stage. Published: 3 in training, 5 (in ``forward``) in evaluation.
        hidden: width of the MLP; None for max(D, 128).
        gate: G of stage 2. ``"soft"``: the semantic's probability, as in the authors' first code. ``"prob"``: 1 where
            the probability exceeds ``gate_thr``, else 0. ``"logit"``: 1 where the *logit* exceeds it, as in the
            authors' later code. The last two have no gradient.
        gate_thr: see ``gate``.
        reparam: whether mu and sigma get gradients through the draws; in the authors' code they do not.

    Source: Qian et al., ICCV 2023 (arXiv:2308.09951), semantic-aware masked slot attention.
    Raises: TypeError on a wrong dtype, ValueError on wrong shapes or settings.

    >>> attention = SemanticAwareSlotAttention(8, num_slots=3, num_instances=2)
    >>> found = attention(torch.randn(1, 2, 8, 4, 4))
    >>> tuple(found.instances.shape)
    (1, 2, 3, 2, 8)
    >>> masks = found.masks().sum((2, 3))
    >>> round(masks.min().item(), 4), round(masks.max().item(), 4)
    (1.0, 1.0)
    """

    def __init__(
        self,
        dim: int,
        *,
        num_slots: int = 16,
        num_instances: int = 4,
        iters: int = 3,
        hidden: int | None = None,
        gate: Gate = "soft",
        gate_thr: float = 0.3,
        reparam: bool = True,
    ) -> None:
        super().__init__()
        check_int("dim", dim, 1)
        hidden = max(dim, 128) if hidden is None else hidden
        counts = {"num_slots": num_slots, "num_instances": num_instances, "iters": iters, "hidden": hidden}
        for name, value in counts.items():
            check_int(name, value, 1)
        check_choice("gate", gate, GATES)
        check_flag("reparam", reparam)
        check_number("gate_thr", gate_thr, float("-inf") if gate == "logit" else 0.0)
        self.dim, self.num_slots, self.num_instances, self.iters = dim, num_slots, num_instances, iters
        self.gate: Gate = gate
        self.gate_thr, self.reparam = gate_thr, reparam
        self.mu = nn.Parameter(torch.randn(num_slots, dim))
        # Xavier's bound for a tensor (1, S, D): sigma is about 1
        bound = (6 / (dim * (num_slots + 1))) ** 0.5
        self.log_sigma = nn.Parameter(torch.empty(num_slots, dim).uniform_(-bound, bound))
        self.norm_features, self.norm_slots, self.norm_mlp = (nn.LayerNorm(dim) for _ in range(3))
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, features: Tensor, noise: Tensor | None = None, *, iters: int | None = None) -> SemanticSlots:
        """Return semantics and instances; ``iters`` replaces the setting in this call."""
        iters = self.iters if iters is None else iters
        check_int("iters", iters, 1)
        size = check_floats("features", features, "B T D H W", {"D": self.dim}, filled="T H W", mu=self.mu)
        wanted = {"B": size["B"], "T": size["T"], "S": self.num_slots, "P": self.num_instances, "D": self.dim}
        mu, log_sigma = at_least_float32(self.mu), at_least_float32(self.log_sigma)
        if noise is None:
            noise = torch.randn(*wanted.values(), dtype=mu.dtype, device=mu.device)
        check_floats("noise", noise, "B T S P D", wanted, features=features)
        # autocast would cache its casts of weights from the steps without gradient, and the last step would have none
        with no_autocast(features):
            frames = self.norm_features(rearrange(savable(features), "b t d h w -> (b t) (h w) d").to(self.mu.dtype))
            keys, values = at_least_float32(self.to_k(frames)), at_least_float32(self.to_v(frames))
            # stage 1 has one group of S slots, stage 2 has S groups of P slots
            start = mu.expand(len(frames), 1, -1, -1)
            slots, logits = self._iterate(start, keys, values, None, iters)
            draws = mu.unsqueeze(1) + log_sigma.exp().unsqueeze(1) * savable(noise).flatten(0, 1).to(mu.dtype)
            draws = draws if self.reparam else draws.detach()
            instances, instance_logits = self._iterate(draws, keys, values, self._gate(logits), iters)
        clips, grid = (size["B"], size["T"]), (size["H"], size["W"])
        return SemanticSlots(
            slots.squeeze(1).unflatten(0, clips),
            logits.squeeze(1).unflatten(0, clips).unflatten(-1, grid),
            instances.unflatten(0, clips),
            instance_logits.unflatten(0, clips).unflatten(-1, grid),
        )

    def _gate(self, logits: Tensor) -> Tensor:
        """Turn logits (M, 1, S, N) into the gate of each semantic, (M, S, 1, N)."""
        logits = logits.transpose(1, 2)
        gate = logits if self.gate == "logit" else logits.softmax(1)
        return gate if self.gate == "soft" else (gate > self.gate_thr).to(gate.dtype)

    def _iterate(
        self, start: Tensor, keys: Tensor, values: Tensor, gate: Tensor | None, iters: int
    ) -> tuple[Tensor, Tensor]:
        """Return slots (M, G, P, D) after some steps, and the logits (M, G, P, N) of the last step."""
        slots = start
        with torch.no_grad():
            for _ in range(iters - 1):
                slots, _ = self._step(slots, keys, values, gate)
        # the value of the current slots, with the gradient of the initial slots
        return self._step(slots.detach() + (start - start.detach()), keys, values, gate)

    def _step(self, slots: Tensor, keys: Tensor, values: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = self.mu.dtype
        queries = at_least_float32(self.to_q(self.norm_slots(slots.to(dtype)))) * self.dim**-0.5
        logits = (queries.flatten(1, 2) @ keys.mT).unflatten(1, slots.shape[1:3])
        attention = logits.softmax(2) + EPSILON
        if gate is not None:
            attention = attention * gate
        total = attention.sum(3, keepdim=True)
        # a hard gate may be 0 everywhere, as in the authors' code; a soft gate is 0 only if it underflows
        hard = gate is not None and self.gate != "soft"
        attention = attention / (total + EPSILON if hard else total.clamp_min(LEAST_ATTENTION))
        slots = slots + (attention.flatten(1, 2) @ values).unflatten(1, slots.shape[1:3])
        return slots + self.mlp(self.norm_mlp(slots.to(dtype))), logits

    def extra_repr(self) -> str:
        """Show the settings."""
        names = ("dim", "num_slots", "num_instances", "iters", "gate", "gate_thr", "reparam")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
