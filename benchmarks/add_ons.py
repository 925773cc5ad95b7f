"""The neighboring methods: a step of each add-on on common inputs, beside its slow definition."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.inputs import DenseInputs, dense_inputs, moving_blobs
from ssync_loss import (
    AffinityConsistencyLoss,
    CenteredCrossEntropy,
    InstanceConsistencyLoss,
    MaskDiversityLoss,
    MaskedTokenLoss,
    OutGenerativeLoss,
    PrototypeHead,
    SemanticConsistencyLoss,
    SlotRedundancyLoss,
    StructureAwareLoss,
    TemporalSlotContrastLoss,
)
from ssync_loss.attention import CorrelationFusion, SemanticAwareSlotAttention
from ssync_loss.curriculum import SlotCurriculum
from ssync_loss.ema import EmaTeacher
from ssync_loss.functional import clip_mask, cyclic_scan, propagate_labels, sinkhorn, slot_error, valid_instances
from ssync_loss.methods.ino.reference import (
    reference_affinity_consistency_loss,
    reference_centered_cross_entropy,
    reference_masked_token_loss,
    reference_out_generative_loss,
    reference_propagate_masks,
)
from ssync_loss.methods.slotcurri.reference import (
    reference_allot_children,
    reference_place_children,
    reference_slot_error,
    reference_structure_aware_loss,
)
from ssync_loss.methods.smtc.reference import (
    reference_correlation_fusion,
    reference_instance_consistency_loss,
    reference_mask_diversity_loss,
    reference_semantic_consistency_loss,
    reference_sinkhorn,
    reference_slot_attention,
    reference_valid_instances,
)
from ssync_loss.methods.srl.reference import reference_slot_redundancy_loss, reference_temporal_slot_contrast_loss

Outputs: TypeAlias = Tensor | tuple[Tensor, ...]
Axis: TypeAlias = Literal["H*W", "S", "Kp", "weights"]
MILESTONE = 9
WIDTH = 256


class Inputs:
    """What clips of a shape give an add-on; what several ask for is made once.

    Args:
        shape: B, T, S, H, W, channels D, prototypes Kp and weights of a model.
        device: where they live.
        drawn_on: where they are drawn; None for where they live. On the CPU, they are the same for all devices.
    """

    def __init__(self, shape: Mapping[str, int], device: str = "cpu", *, drawn_on: str | None = None) -> None:
        self.size = dict(shape)
        self.device = device
        self.drawn_on = drawn_on or device

    @cached_property
    def maps(self) -> tuple[Tensor, Tensor]:
        """An encoder and a decoder map (B, T, S, H, W), leaves."""
        enc, dec = moving_blobs(self.size, device=self.drawn_on)
        return self._here(enc), self._here(dec)

    @cached_property
    def features(self) -> DenseInputs:
        """Features (B, T, D, H, W), two that are leaves, and anchors; labels."""
        return DenseInputs(*map(self._here, dense_inputs(self.size, dim=self.size["D"], device=self.drawn_on)))

    def normal(self, *axes: str | int, seed: int = 0) -> Tensor:
        """Draw numbers, with axes by name or by length."""
        generator = torch.Generator(self.drawn_on).manual_seed(seed)
        sizes = [self.size[axis] if isinstance(axis, str) else axis for axis in axes]
        return torch.randn(sizes, generator=generator, device=self.drawn_on).to(self.device)

    def leaf(self, *axes: str | int, seed: int = 0) -> Tensor:
        """Draw numbers that get a gradient."""
        return self.normal(*axes, seed=seed).requires_grad_()

    def _here(self, drawn: Tensor) -> Tensor:
        return drawn.detach().to(self.device).requires_grad_(drawn.requires_grad)


@dataclass
class Step:
    """A step of an add-on, and what it should give.

    Attributes:
        forward: the call that is measured.
        expected: what its outputs are by definition; called before it.
        leaves: what gets a gradient; without any, there is no backward.
        incoming: the gradients that come in; 1 for a loss.
        before: what has to be done before each call, and is not measured.
        seen: what of the outputs the definition is about.
    """

    forward: Callable[[], Any]
    expected: Callable[[], Outputs]
    leaves: list[Tensor] = field(default_factory=list)
    incoming: tuple[Tensor, ...] = ()
    before: Callable[[], object] = lambda: None
    seen: Callable[[Any], Outputs] = lambda outputs: outputs


@dataclass(frozen=True)
class AddOn:
    """Something that is measured.

    Attributes:
        name: what it is called in files and tables.
        of: the public name that it is about; empty for what others are compared with.
        make: its step on some inputs.
        axis: along which it grows: patches of a frame, slots, prototypes or the weights of a model.
        time: exponent of the axis with which its time should grow, and no more.
        memory: the same of its memory.
        settings: of ``make``.
        gate_settings: other settings where it is compared with the definition, as that is small.
        gate_shape: other sizes there.
        value: those of equal value compute the same loss.
        cpu_only: whether it cannot be had on a GPU.
    """

    name: str
    of: str
    make: Callable[..., Step]
    axis: Axis = "H*W"
    time: int = 1
    memory: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    gate_settings: Mapping[str, Any] = field(default_factory=dict)
    gate_shape: dict[str, int] = field(default_factory=dict)
    value: str = ""
    cpu_only: bool = False

    def step(self, inputs: Inputs) -> Step:
        """Make a step."""
        return self.make(inputs, **self.settings)


def _structure(inputs: Inputs, *, filters: Any = "torch") -> Step:
    pred, target = inputs.features.decoder_features, inputs.features.anchors
    loss = StructureAwareLoss(filters=filters)
    return Step(lambda: loss(pred, target), lambda: reference_structure_aware_loss(pred, target), [pred])


def _slot_error(inputs: Inputs) -> Step:
    given = _reconstruction(inputs, inputs.size["S"])
    return Step(lambda: slot_error(*given), lambda: reference_slot_error(*given))


def _curriculum(inputs: Inputs, *, step: int) -> Step:
    """Both calls of a training step: at a milestone, where half of the slots are added, or at another one."""
    few, many = (inputs.size["S"] + 1) // 2, inputs.size["S"]
    given = _reconstruction(inputs, few)
    curriculum = SlotCurriculum([few, many], [MILESTONE]).to(inputs.device)
    start = deepcopy(curriculum.state_dict())
    placeholders = nn.Parameter(inputs.normal("S", "D"))
    # as it is where ranks are to draw the same
    generator = torch.Generator()

    def before() -> None:
        curriculum.load_state_dict(start)
        generator.manual_seed(0)

    def forward() -> None:
        curriculum.observe(*given, step)
        curriculum.maybe_expand(placeholders, step, generator=generator)

    def expected() -> Tensor:
        if step != MILESTONE:
            return placeholders.detach().clone()
        before()
        directions = torch.randn(many - few, inputs.size["D"], generator=generator)
        counts = reference_allot_children(reference_slot_error(*given).tolist(), many - few)
        rows = placeholders.detach()[:few]
        return torch.cat([rows, reference_place_children(rows, counts, F.normalize(directions, dim=1))])

    return Step(forward, expected, before=before, seen=lambda _: placeholders.detach())


def _reconstruction(inputs: Inputs, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    masks = inputs.maps[1].detach()[:, :, :num_slots].softmax(2)
    return inputs.features.decoder_features.detach(), inputs.features.anchors, masks


def _scan(inputs: Inputs, *, cyclic: bool) -> Step:
    """Slots that gather the patches of every frame; over the frames once, or forth and back."""
    frames, start = inputs.features.anchors.flatten(3), inputs.normal("B", "S", "D")

    def step(state: Tensor, frame: Tensor, _: int | None) -> dict[str, Tensor]:
        attention = (state @ frame).softmax(1)
        after = state + attention @ frame.mT / frame.shape[2]
        return {"state": after, "state_predicted": after}

    def once() -> Tensor:
        return torch.stack(_walked(step, start, frames.unbind(1)), 1)

    def expected() -> Tensor:
        forth = _walked(step, start.double(), frames.double().unbind(1))
        if not cyclic:
            return torch.stack(forth, 1).float()
        back = _walked(step, forth[-1], frames.double().unbind(1)[-2::-1])
        return torch.stack([*back[::-1], forth[-1]], 1).float()

    return Step((lambda: cyclic_scan(step, start, frames)["state"]) if cyclic else once, expected)


def _walked(step: Callable[..., dict[str, Tensor]], state: Tensor, frames: Any) -> list[Tensor]:
    states = []
    for frame in frames:
        state = step(state, frame, None)["state_predicted"]
        states.append(state)
    return states


def _sinkhorn(inputs: Inputs) -> Step:
    here, there = F.normalize(inputs.features.anchors[:, :2].flatten(3), dim=2).unbind(1)
    mu, nu = (one.abs().sum(1) for one in (here, there))
    cost = 1 - here.mT @ there
    return Step(lambda: sinkhorn(cost, mu, nu), lambda: reference_sinkhorn(cost, mu, nu))


def _semantic(inputs: Inputs, *, pool: int = 1, most_patches: int | None = None, chunk_size: int | None = 1) -> Step:
    """Pooled by as much as it takes, where the patches that may be left are given."""
    logits, teacher = inputs.maps[0], inputs.maps[1].detach()
    patches = inputs.size["H"] * inputs.size["W"]
    while most_patches is not None and patches > most_patches * pool**2:
        pool *= 2
    loss = SemanticConsistencyLoss(pool=pool, chunk_size=chunk_size)
    given = logits, teacher, inputs.features.anchors
    return Step(lambda: loss(*given), lambda: reference_semantic_consistency_loss(*given, pool=pool), [logits])


def _diversity(inputs: Inputs) -> Step:
    logits, loss = inputs.maps[0], MaskDiversityLoss()
    return Step(lambda: loss(logits), lambda: reference_mask_diversity_loss(logits), [logits])


def _valid_instances(inputs: Inputs, *, num_instances: int = 4) -> Step:
    slots = inputs.normal("B", "T", "S", "D")
    near = inputs.normal("B", "T", "S", num_instances, "D", seed=1) + slots.unsqueeze(3)
    given = inputs.maps[1].detach(), slots, near
    # that some of the semantics have
    area = 1 / inputs.size["S"]
    return Step(
        lambda: valid_instances(*given, area_thr=area), lambda: reference_valid_instances(*given, area_thr=area)
    )


def _instances(inputs: Inputs, *, num_instances: int) -> Step:
    axes = "B", "T", "S", num_instances
    ours, theirs = (F.normalize(inputs.normal(*axes, "D", seed=seed), dim=4) for seed in (0, 1))
    valid, teacher_valid = (inputs.normal(*axes, seed=seed) > -1 for seed in (2, 3))
    loss, given = InstanceConsistencyLoss(), (ours.requires_grad_(), theirs, valid, teacher_valid)
    return Step(lambda: loss(*given), lambda: reference_instance_consistency_loss(*given), [ours])


def _slot_attention(inputs: Inputs, *, num_instances: int = 4, iters: int = 3) -> Step:
    features = inputs.features.encoder_features
    torch.manual_seed(0)
    attention = SemanticAwareSlotAttention(
        inputs.size["D"], num_slots=inputs.size["S"], num_instances=num_instances, iters=iters
    ).to(inputs.device)
    noise = inputs.normal("B", "T", "S", num_instances, "D")
    shapes: list[list[str | int]] = [["D"], ["H", "W"], [num_instances, "D"], [num_instances, "H", "W"]]
    incoming = tuple(inputs.normal("B", "T", "S", *axes, seed=seed) for seed, axes in enumerate(shapes))

    def expected() -> tuple[Tensor, ...]:
        weights: dict[str, Tensor] = dict(attention.named_parameters())
        mu, sigma = weights["mu"], weights["log_sigma"].exp()
        found = []
        for frame, draws in zip(features.flatten(0, 1), noise.flatten(0, 1), strict=True):
            patches = frame.flatten(1).mT
            slots, logits = reference_slot_attention(mu, patches, weights, iters=iters)
            within = [
                reference_slot_attention(start, patches, weights, iters=iters, gate=gate)
                for start, gate in zip(mu.unsqueeze(1) + sigma.unsqueeze(1) * draws, logits.softmax(0), strict=True)
            ]
            found.append((slots, logits, *(torch.stack(one) for one in zip(*within, strict=True))))
        stacked = (torch.stack(one) for one in zip(*found, strict=True))
        return tuple(one.view(like.shape) for one, like in zip(stacked, incoming, strict=True))

    return Step(
        lambda: attention(features, noise),
        expected,
        [features, *attention.parameters()],
        incoming,
        seen=tuple,
    )


def _fusion(inputs: Inputs, *, grid: tuple[int, int]) -> Step:
    keys = inputs.features.encoder_features
    torch.manual_seed(0)
    fusion = CorrelationFusion(inputs.size["D"], grid).to(inputs.device)
    weights = fusion.project.weight, fusion.project.bias
    incoming = inputs.normal("B", "T", "D", "H", "W")
    return Step(
        lambda: fusion(keys), lambda: reference_correlation_fusion(keys, *weights), [keys, *weights], (incoming,)
    )


def _teacher(inputs: Inputs, *, width: int = WIDTH) -> Step:
    """Square layers of so many weights together."""
    torch.manual_seed(0)
    layers = [nn.Linear(width, width, bias=False) for _ in range(inputs.size["weights"] // width**2)]
    student = nn.Sequential(*layers).to(inputs.device)
    teacher = EmaTeacher(student, momentum=0.9)
    with torch.no_grad():
        for seed, one in enumerate(student.parameters()):
            one.add_(inputs.normal(*one.shape, seed=seed))

    def weights(model: nn.Module) -> Tensor:
        return torch.stack([one.detach() for one in model.parameters()])

    def expected() -> Tensor:
        return 0.9 * weights(teacher.model) + 0.1 * weights(student)

    return Step(lambda: teacher.update(student), expected, seen=lambda _: weights(teacher.model))


def _affinity(inputs: Inputs, *, chunk_size: int | None = None) -> Step:
    s, t = inputs.features.encoder_features, inputs.features.anchors
    loss = AffinityConsistencyLoss(chunk_size=chunk_size)
    lists = [one.flatten(3).mT for one in (s, t)]
    return Step(lambda: loss(s, t), lambda: reference_affinity_consistency_loss(*lists), [s])


def _centered(inputs: Inputs, num_prototypes: int) -> CenteredCrossEntropy:
    criterion = CenteredCrossEntropy(num_prototypes).to(inputs.device)
    criterion.center.copy_(0.1 * inputs.normal(num_prototypes, seed=9))
    return criterion


def _cross_entropy(inputs: Inputs, *, num_views: int = 10) -> Step:
    """The loss, and the move of the center after it."""
    axes = "B", "T", num_views, "Kp"
    s, t = inputs.leaf(*axes), inputs.normal(*axes, seed=1)
    criterion = _centered(inputs, inputs.size["Kp"])

    def forward() -> Tensor:
        loss: Tensor = criterion(s, t)
        criterion.update_center(t)
        return loss

    def expected() -> Tensor:
        return reference_centered_cross_entropy(s.flatten(0, 2), t.flatten(0, 2), criterion.center.clone())

    return Step(forward, expected, [s])


def _masked_tokens(inputs: Inputs, *, num_prototypes: int = 256) -> Step:
    patches = inputs.size["H"] * inputs.size["W"]
    axes = "B", "T", patches, num_prototypes
    s, t = inputs.leaf(*axes), inputs.normal(*axes, seed=1)
    mask = (inputs.normal(patches, seed=2) > 0.5).expand(s.shape[:3])
    loss = MaskedTokenLoss(_centered(inputs, num_prototypes))
    center = loss.ce_patch.center
    return Step(lambda: loss(s, t, mask), lambda: reference_masked_token_loss(s, t, mask, center)[0], [s])


def _out_generative(inputs: Inputs, *, num_local: int = 8) -> Step:
    loss = OutGenerativeLoss(_centered(inputs, inputs.size["Kp"]))
    s_glob, s_loc = inputs.leaf("B", "T", 1, "Kp"), inputs.leaf("B", "T", num_local, "Kp", seed=1)
    given = s_glob, s_loc, inputs.normal("B", "T", 1, "Kp", seed=2)
    return Step(lambda: loss(*given), lambda: reference_out_generative_loss(*given, loss.ce.center)[0], [s_glob, s_loc])


def _head(inputs: Inputs, *, num_tokens: int = 10, hidden: int = 2048, bottleneck: int = 256) -> Step:
    torch.manual_seed(0)
    head = PrototypeHead(inputs.size["D"], Kp=inputs.size["Kp"], hidden=hidden, bottleneck=bottleneck)
    head = head.to(inputs.device)
    x = inputs.leaf("B", "T", num_tokens, "D")
    incoming = inputs.normal("B", "T", num_tokens, "Kp", seed=1)

    def expected() -> Tensor:
        wide = {name: one.double() for name, one in head.mlp.named_parameters()}
        tokens = torch.func.functional_call(head.mlp, wide, x.double())
        return (F.normalize(tokens, dim=-1) @ F.normalize(head.prototypes.double(), dim=1).mT).float()

    return Step(lambda: head(x), expected, [x, *head.parameters()], (incoming,))


def _clip_mask(inputs: Inputs) -> Step:
    """Without a gradient, and the same draw in every call; which patches it is does not matter."""
    patches = inputs.size["H"] * inputs.size["W"]
    generator = torch.Generator(inputs.device)
    return Step(
        lambda: clip_mask(patches, ratio=(0.3, 0.3), prob=1.0, generator=generator),
        lambda: torch.tensor(int(0.3 * patches), device=inputs.device),
        before=lambda: generator.manual_seed(0),
        seen=lambda mask: mask.sum(),
    )


def _propagation(inputs: Inputs, *, chunk_size: int | None = None) -> Step:
    features, labels = inputs.features.anchors, inputs.features.dec_labels[:, 0]

    def expected() -> Tensor:
        shown = F.one_hot(labels, inputs.size["S"]).movedim(3, 1)
        masks = reference_propagate_masks(features, shown.double())
        low, high = masks.amin((3, 4), keepdim=True), masks.amax((3, 4), keepdim=True)
        stretched = torch.where(high > low, (masks - low) / (high - low), masks)
        carried = stretched.masked_fill((shown.sum((2, 3)) == 0)[:, None, :, None, None], float("-inf")).argmax(2)
        return torch.cat([labels.unsqueeze(1), carried[:, 1:]], 1)

    return Step(lambda: propagate_labels(features, labels, chunk_size=chunk_size), expected)


def _redundancy(inputs: Inputs) -> Step:
    attention = inputs.maps[0].detach().flatten(3).softmax(3).requires_grad_()
    slots, loss = inputs.normal("B", "T", "S", "D"), SlotRedundancyLoss()
    return Step(lambda: loss(attention, slots), lambda: reference_slot_redundancy_loss(attention, slots), [attention])


def _contrast(inputs: Inputs) -> Step:
    slots, loss = inputs.leaf("B", "T", "S", "D"), TemporalSlotContrastLoss()
    return Step(lambda: loss(slots), lambda: reference_temporal_slot_contrast_loss(slots), [slots])


ADD_ONS = (
    AddOn(
        "StructureAwareLoss, own filters",
        "StructureAwareLoss",
        _structure,
        gate_shape={"T": 3, "D": 2},
        value="structure",
    ),
    AddOn(
        "StructureAwareLoss, kornia's filters",
        "StructureAwareLoss",
        _structure,
        settings={"filters": "kornia"},
        gate_shape={"T": 3, "D": 2},
        value="structure",
        cpu_only=True,
    ),
    AddOn("slot_error", "slot_error", _slot_error),
    AddOn("SlotCurriculum, at a milestone", "SlotCurriculum", _curriculum, settings={"step": MILESTONE}),
    AddOn("SlotCurriculum, elsewhere", "SlotCurriculum", _curriculum, time=0, memory=0, settings={"step": 0}),
    AddOn("a scan of some step", "", _scan, settings={"cyclic": False}),
    AddOn("cyclic_scan of the same step", "cyclic_scan", _scan, settings={"cyclic": True}),
    AddOn("sinkhorn", "sinkhorn", _sinkhorn, time=2, memory=2),
    AddOn(
        "SemanticConsistencyLoss, pair by pair",
        "SemanticConsistencyLoss",
        _semantic,
        time=2,
        memory=2,
        gate_shape={"T": 3, "H": 2},
        value="semantic",
    ),
    AddOn(
        "SemanticConsistencyLoss, all pairs at once",
        "SemanticConsistencyLoss",
        _semantic,
        time=2,
        memory=2,
        settings={"chunk_size": None},
        gate_shape={"T": 3, "H": 2},
        value="semantic",
    ),
    AddOn(
        "SemanticConsistencyLoss, pooled 2x2",
        "SemanticConsistencyLoss",
        _semantic,
        time=2,
        memory=2,
        settings={"pool": 2},
    ),
    AddOn(
        "SemanticConsistencyLoss, pooled to 144",
        "SemanticConsistencyLoss",
        _semantic,
        settings={"most_patches": 144},
        gate_settings={"most_patches": 6},
    ),
    AddOn("MaskDiversityLoss", "MaskDiversityLoss", _diversity),
    AddOn("valid_instances", "valid_instances", _valid_instances),
    AddOn(
        "InstanceConsistencyLoss, P=4",
        "InstanceConsistencyLoss",
        _instances,
        axis="S",
        settings={"num_instances": 4},
        gate_settings={"num_instances": 3},
    ),
    AddOn(
        "InstanceConsistencyLoss, P=8, scipy",
        "InstanceConsistencyLoss",
        _instances,
        axis="S",
        settings={"num_instances": 8},
        # the definition compares all orders
        gate_settings={"num_instances": 7},
        gate_shape={"B": 1, "T": 2, "S": 1},
    ),
    AddOn(
        "SemanticAwareSlotAttention",
        "SemanticAwareSlotAttention",
        _slot_attention,
        # of several, the last alone gets a gradient
        gate_settings={"iters": 1, "num_instances": 2},
    ),
    AddOn(
        "CorrelationFusion",
        "CorrelationFusion",
        _fusion,
        settings={"grid": (24, 24)},
        gate_settings={"grid": (4, 6)},
    ),
    AddOn("EmaTeacher.update", "EmaTeacher", _teacher, axis="weights", gate_settings={"width": 4}),
    AddOn(
        "AffinityConsistencyLoss",
        "AffinityConsistencyLoss",
        _affinity,
        time=2,
        memory=2,
        gate_shape={"T": 3, "H": 2},
        value="affinity",
    ),
    AddOn(
        "AffinityConsistencyLoss, 128 rows at once",
        "AffinityConsistencyLoss",
        _affinity,
        time=2,
        settings={"chunk_size": 128},
        gate_settings={"chunk_size": 5},
        gate_shape={"T": 3, "H": 2},
        value="affinity",
    ),
    AddOn("CenteredCrossEntropy, with its update", "CenteredCrossEntropy", _cross_entropy, axis="Kp"),
    AddOn("MaskedTokenLoss, Kp=256", "MaskedTokenLoss", _masked_tokens, gate_settings={"num_prototypes": 5}),
    AddOn("OutGenerativeLoss", "OutGenerativeLoss", _out_generative, axis="Kp"),
    AddOn("PrototypeHead", "PrototypeHead", _head, axis="Kp", gate_settings={"hidden": 8, "bottleneck": 4}),
    AddOn("clip_mask", "clip_mask", _clip_mask),
    AddOn(
        "propagate_labels, 64 patches at once",
        "propagate_labels",
        _propagation,
        time=2,
        settings={"chunk_size": 64},
        gate_settings={"chunk_size": 5},
    ),
    AddOn("SlotRedundancyLoss", "SlotRedundancyLoss", _redundancy),
    AddOn("TemporalSlotContrastLoss", "TemporalSlotContrastLoss", _contrast, axis="S", time=2, memory=2),
)
BY_NAME = {one.name: one for one in ADD_ONS}
