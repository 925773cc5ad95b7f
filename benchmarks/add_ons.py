"""Dense alignment and the neighboring methods: a step of each on common inputs, beside its slow definition."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ssync_loss
from benchmarks.inputs import Inputs, Step
from ssync_loss import attention, curriculum, ema, functional
from ssync_loss.methods.ino import reference as ino
from ssync_loss.methods.slotcurri import reference as slotcurri
from ssync_loss.methods.smtc import reference as smtc
from ssync_loss.methods.srl import reference as srl

MILESTONE = 9
CHANNELS, WIDTH = 64, 256
# kornia needs three of each axis
CUBE = {"T": 3, "H": 3, "D": 2}


@dataclass(frozen=True)
class Entry:
    """Something that is measured beside SSync; the first word of the name is the public one that it is about.

    Attributes:
        axis: along which it grows: patches of a frame, slots, prototypes or the weights of a model.
        time, memory: exponents of the axis with which they should grow, and no more.
        gate, shape: other settings and sizes where it is compared with the definition, as that is small.
        twin: whether it computes the same loss as the one before.
    """

    name: str
    make: Callable[..., Step]
    axis: str = "H*W"
    time: int = 1
    memory: int = 1
    gate: Mapping[str, Any] = field(default_factory=dict)
    shape: Mapping[str, int] = field(default_factory=dict)
    twin: bool = False


def _alike(function: Any, reference: Any, given: Callable[[Inputs], Any], **settings: Any) -> Callable[..., Step]:
    """Make the steps of a function, or of a module by its class, whose definition takes the same arguments."""

    def make(inputs: Inputs, **gate: Any) -> Step:
        known = settings | gate
        call = function(**known) if isinstance(function, type) else partial(function, **known)
        return Step.of(call, reference, *given(inputs))

    return make


def _dense(inputs: Inputs, *, group_frames: int | None = None, chunk_size: int | None = None) -> Step:
    """Both terms; without windows, the clip is one."""
    decoder, encoder, anchors, enc_labels, dec_labels = inputs.features

    def both(first: Any, second: Any, **settings: Any) -> Any:
        loss = first(decoder, anchors, enc_labels, group_frames=group_frames, **settings)
        return loss + second(encoder, anchors, dec_labels, group_frames=group_frames, **settings)

    functions = functional.dense_decoder_alignment_loss, functional.dense_encoder_alignment_loss
    references = srl.reference_dense_decoder_alignment_loss, srl.reference_dense_encoder_alignment_loss
    return Step(lambda: both(*functions, chunk_size=chunk_size), lambda: both(*references), [decoder, encoder])


def _reconstruction(inputs: Inputs, num_slots: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    masks = inputs.maps[1].detach()[:, :, :num_slots].softmax(2)
    return inputs.features.decoder.detach(), inputs.features.anchors, masks


def _curriculum(inputs: Inputs, *, step: int) -> Step:
    """Both calls of a training step: at a milestone, where half of the slots are added, or at another one."""
    few, many = (inputs.size["S"] + 1) // 2, inputs.size["S"]
    given = _reconstruction(inputs, few)
    schedule = curriculum.SlotCurriculum([few, many], [MILESTONE]).to(inputs.device)
    start = deepcopy(schedule.state_dict())
    placeholders = nn.Parameter(inputs.normal("S", "D"))
    # as it is where ranks are to draw the same
    generator = torch.Generator()

    def before() -> None:
        schedule.load_state_dict(start)
        generator.manual_seed(0)

    def forward() -> Tensor:
        schedule.observe(*given, step)
        schedule.maybe_expand(placeholders, step, generator=generator)
        return placeholders.detach()

    def expected() -> Tensor:
        if step != MILESTONE:
            return placeholders.detach()
        directions = torch.randn(many - few, inputs.size["D"], generator=generator.manual_seed(0))
        counts = slotcurri.reference_allot_children(slotcurri.reference_slot_error(*given).tolist(), many - few)
        rows = placeholders.detach()[:few]
        return torch.cat([rows, slotcurri.reference_place_children(rows, counts, F.normalize(directions, dim=1))])

    return Step(forward, expected, before=before)


def _scan(inputs: Inputs, *, cyclic: bool) -> Step:
    """Slots that gather the patches of every frame; over the frames once, or forth and back."""
    frames, start = inputs.features.anchors.flatten(3), inputs.normal("B", "S", "D")

    def step(state: Tensor, frame: Tensor, _: int | None) -> dict[str, Tensor]:
        weights = (state @ frame).softmax(1)
        after = state + weights @ frame.mT / frame.shape[2]
        return {"state": after, "state_predicted": after}

    def walk(state: Tensor, frames: Any) -> list[Tensor]:
        states = [state]
        for frame in frames:
            states.append(step(states[-1], frame, None)["state"])
        return states[1:]

    def expected() -> Tensor:
        forth = walk(start.double(), frames.double().unbind(1))
        back = walk(forth[-1], frames.double().unbind(1)[-2::-1]) if cyclic else forth[-2::-1]
        return torch.stack([*back[::-1], forth[-1]], 1).float()

    if cyclic:
        return Step(lambda: functional.cyclic_scan(step, start, frames)["state"], expected)
    return Step(lambda: torch.stack(walk(start, frames.unbind(1)), 1), expected)


def _transport(inputs: Inputs) -> tuple[Tensor, ...]:
    """Return the costs between two frames, and the weights of their patches."""
    here, there = F.normalize(inputs.features.anchors[:, :2].flatten(3), dim=2).unbind(1)
    return 1 - here.mT @ there, here.abs().sum(1), there.abs().sum(1)


def _semantic(inputs: Inputs, *, pool: int = 1, most_patches: int | None = None, chunk_size: int | None = 1) -> Step:
    """Pooled by as much as it takes, where the patches that may be left are given."""
    patches = inputs.size["H"] * inputs.size["W"]
    while most_patches is not None and patches > most_patches * pool**2:
        pool *= 2
    loss = ssync_loss.SemanticConsistencyLoss(pool=pool, chunk_size=chunk_size)
    reference = partial(smtc.reference_semantic_consistency_loss, pool=pool)
    return Step.of(loss, reference, inputs.maps[0], inputs.maps[1].detach(), inputs.features.anchors)


def _valid_instances(inputs: Inputs) -> Step:
    slots = inputs.normal("B", "T", "S", "D")
    near = inputs.normal("B", "T", "S", 4, "D", seed=1) + slots.unsqueeze(3)
    # that some of the semantics have
    area = 1 / inputs.size["S"]
    functions = functional.valid_instances, smtc.reference_valid_instances
    return Step.of(*(partial(one, area_thr=area) for one in functions), inputs.maps[1].detach(), slots, near)


def _instances(inputs: Inputs, *, num_instances: int) -> Step:
    axes = "B", "T", "S", num_instances
    ours, theirs = (F.normalize(inputs.normal(*axes, "D", seed=seed), dim=4) for seed in (0, 1))
    valid = [inputs.normal(*axes, seed=seed) > -1 for seed in (2, 3)]
    reference = smtc.reference_instance_consistency_loss
    return Step.of(ssync_loss.InstanceConsistencyLoss(), reference, ours.requires_grad_(), theirs, *valid)


def _slot_attention(inputs: Inputs, *, num_instances: int = 4, iters: int = 3) -> Step:
    """Of several iterations, the last alone gets a gradient; the definition is of one frame after another."""
    features, noise = inputs.features.encoder, inputs.normal("B", "T", "S", num_instances, "D")
    torch.manual_seed(0)
    module = attention.SemanticAwareSlotAttention(
        inputs.size["D"], num_slots=inputs.size["S"], num_instances=num_instances, iters=iters
    ).to(inputs.device)

    def expected() -> tuple[Tensor, ...]:
        weights: dict[str, Tensor] = dict(module.named_parameters())
        mu, sigma = weights["mu"].unsqueeze(1), weights["log_sigma"].exp().unsqueeze(1)
        frames, grid = [], features.shape[3:]
        for frame, draws in zip(features.flatten(0, 1), noise.flatten(0, 1), strict=True):
            patches = frame.flatten(1).mT
            attend = partial(smtc.reference_slot_attention, features=patches, weights=weights, iters=iters)
            slots, logits = attend(weights["mu"])
            starts = mu + sigma * draws
            within = [attend(one, gate=gate) for one, gate in zip(starts, logits.softmax(0), strict=True)]
            inner, inner_logits = (torch.stack(one) for one in zip(*within, strict=True))
            frames.append((slots, logits.unflatten(-1, grid), inner, inner_logits.unflatten(-1, grid)))
        return tuple(torch.stack(one).unflatten(0, features.shape[:2]) for one in zip(*frames, strict=True))

    return Step(lambda: module(features, noise), expected, [features, *module.parameters()])


def _correlation_fusion(inputs: Inputs, *, grid: tuple[int, int] = (24, 24)) -> Step:
    torch.manual_seed(0)
    module = attention.CorrelationFusion(inputs.size["D"], grid).to(inputs.device)
    weights = module.project.weight, module.project.bias
    reference = smtc.reference_correlation_fusion
    return Step.of(lambda keys, *_: module(keys), reference, inputs.features.encoder, *weights)


def _ema_teacher(inputs: Inputs, *, width: int = WIDTH) -> Step:
    """Square layers of so many weights together."""
    start, learned = inputs.normal("weights"), inputs.normal("weights", seed=1)
    layers = [nn.Linear(width, width, bias=False) for _ in range(len(start) // width**2)]
    student = nn.Sequential(*layers).to(inputs.device)
    nn.utils.vector_to_parameters(start, student.parameters())
    teacher = ema.EmaTeacher(student, momentum=0.9)
    nn.utils.vector_to_parameters(learned, student.parameters())

    def after(_: None) -> Tensor:
        return nn.utils.parameters_to_vector(teacher.model.parameters()).detach()

    return Step(lambda: teacher.update(student), lambda: 0.9 * start + 0.1 * learned, seen=after)


def _centered(teacher: Tensor) -> ssync_loss.CenteredCrossEntropy:
    """Return a criterion whose center has moved."""
    criterion = ssync_loss.CenteredCrossEntropy(teacher.shape[-1]).to(teacher.device)
    criterion.update_center(teacher)
    return criterion


def _cross_entropy(inputs: Inputs) -> Step:
    """The loss, and the move of the center after it."""
    s, t = inputs.leaf("B", "T", 10, "Kp"), inputs.normal("B", "T", 10, "Kp", seed=1)
    criterion = _centered(t)

    def forward() -> Tensor:
        loss: Tensor = criterion(s, t)
        criterion.update_center(t)
        return loss

    rows = s.flatten(0, 2), t.flatten(0, 2)
    return Step(forward, lambda: ino.reference_centered_cross_entropy(*rows, criterion.center.clone()), [s])


def _masked_tokens(inputs: Inputs, *, num_prototypes: int = 256) -> Step:
    patches = inputs.size["H"] * inputs.size["W"]
    s, t = inputs.leaf("B", "T", patches, num_prototypes), inputs.normal("B", "T", patches, num_prototypes, seed=1)
    mask = (inputs.normal(patches, seed=2) > 0.5).expand(s.shape[:3])
    loss, reference = ssync_loss.MaskedTokenLoss(_centered(t)), ino.reference_masked_token_loss
    return Step.of(loss, lambda s, t, mask: reference(s, t, mask, loss.ce_patch.center)[0], s, t, mask)


def _out_generative(inputs: Inputs) -> Step:
    """A token of the whole frame, and eight of its parts."""
    whole, parts = inputs.leaf("B", "T", 1, "Kp"), inputs.leaf("B", "T", 8, "Kp", seed=1)
    teacher = inputs.normal("B", "T", 1, "Kp", seed=2)
    loss, reference = ssync_loss.OutGenerativeLoss(_centered(teacher)), ino.reference_out_generative_loss
    return Step.of(loss, lambda a, b, t: reference(a, b, t, loss.ce.center)[0], whole, parts, teacher)


def _head(inputs: Inputs, **sizes: int) -> Step:
    torch.manual_seed(0)
    head = ssync_loss.PrototypeHead(inputs.size["D"], Kp=inputs.size["Kp"], **sizes).to(inputs.device)
    x = inputs.leaf("B", "T", 10, "D")

    def expected() -> Tensor:
        wide = {name: one.double() for name, one in head.mlp.named_parameters()}
        tokens = torch.func.functional_call(head.mlp, wide, x.double())
        return (F.normalize(tokens, dim=-1) @ F.normalize(head.prototypes.double(), dim=1).mT).float()

    return Step(lambda: head(x), expected, [x, *head.parameters()])


def _clip_mask(inputs: Inputs) -> Step:
    """Without a gradient, and the same draw in every call; which patches it is does not matter."""
    patches = inputs.size["H"] * inputs.size["W"]
    generator = torch.Generator(inputs.device)
    return Step(
        lambda: functional.clip_mask(patches, ratio=(0.3, 0.3), prob=1.0, generator=generator),
        lambda: torch.tensor(int(0.3 * patches), device=inputs.device),
        before=lambda: generator.manual_seed(0),
        seen=lambda mask: mask.sum(),
    )


def _propagation(features: Tensor, labels: Tensor) -> Tensor:
    """Carry labels from the first frame on, by the slow definition of how masks are carried."""
    shown = F.one_hot(labels).movedim(3, 1)
    masks = ino.reference_propagate_masks(features, shown.double())
    low, high = masks.amin((3, 4), keepdim=True), masks.amax((3, 4), keepdim=True)
    stretched = torch.where(high > low, (masks - low) / (high - low), masks)
    carried = stretched.masked_fill((shown.sum((2, 3)) == 0)[:, None, :, None, None], float("-inf")).argmax(2)
    return torch.cat([labels.unsqueeze(1), carried[:, 1:]], 1)


def _attended(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs.maps[0].detach().flatten(3).softmax(3).requires_grad_(), inputs.normal("B", "T", "S", "D")


def _affinity(s: Tensor, t: Tensor) -> Tensor:
    return ino.reference_affinity_consistency_loss(s.flatten(3).mT, t.flatten(3).mT)


_structure = partial(
    _alike,
    ssync_loss.StructureAwareLoss,
    slotcurri.reference_structure_aware_loss,
    lambda one: (one.features.decoder, one.features.anchors),
)
_affinities = partial(_alike, ssync_loss.AffinityConsistencyLoss, _affinity, lambda one: one.features[1:3])
_quadratic: Any = partial(Entry, time=2, memory=2)
DENSE = (
    Entry("dense", _dense),
    Entry("dense chunked", partial(_dense, chunk_size=1024), gate={"chunk_size": 5}, twin=True),
    Entry("dense in windows of 2", partial(_dense, group_frames=2)),
    Entry("dense in windows of 4", partial(_dense, group_frames=4)),
)
ADD_ONS = (
    Entry("StructureAwareLoss, own filters", _structure(filters="torch")),
    Entry("StructureAwareLoss, kornia's filters", _structure(filters="kornia"), shape=CUBE, twin=True),
    Entry("slot_error", _alike(functional.slot_error, slotcurri.reference_slot_error, _reconstruction)),
    Entry("SlotCurriculum, at a milestone", partial(_curriculum, step=MILESTONE)),
    Entry("SlotCurriculum, elsewhere", partial(_curriculum, step=0), time=0, memory=0),
    Entry("a scan of some step", partial(_scan, cyclic=False)),
    Entry("cyclic_scan of the same step", partial(_scan, cyclic=True)),
    _quadratic("sinkhorn", _alike(functional.sinkhorn, smtc.reference_sinkhorn, _transport)),
    _quadratic("SemanticConsistencyLoss, pair by pair", _semantic),
    _quadratic("SemanticConsistencyLoss, all pairs at once", partial(_semantic, chunk_size=None), twin=True),
    _quadratic("SemanticConsistencyLoss, pooled 2x2", partial(_semantic, pool=2)),
    Entry("SemanticConsistencyLoss, pooled to 144", partial(_semantic, most_patches=144), gate={"most_patches": 3}),
    Entry(
        "MaskDiversityLoss",
        _alike(ssync_loss.MaskDiversityLoss, smtc.reference_mask_diversity_loss, lambda one: one.maps[:1]),
    ),
    Entry("valid_instances", _valid_instances),
    Entry("InstanceConsistencyLoss, P=4", partial(_instances, num_instances=4), "S", gate={"num_instances": 3}),
    Entry(
        "InstanceConsistencyLoss, P=8, scipy",
        partial(_instances, num_instances=8),
        "S",
        # the definition compares all orders
        gate={"num_instances": 7},
        shape={"B": 1, "T": 2, "S": 1},
    ),
    Entry("SemanticAwareSlotAttention", _slot_attention, gate={"iters": 1}),
    Entry("CorrelationFusion", _correlation_fusion, gate={"grid": (4, 6)}, shape={"H": 4}),
    Entry("EmaTeacher.update", _ema_teacher, "weights", gate={"width": 4}),
    _quadratic("AffinityConsistencyLoss", _affinities()),
    Entry(
        "AffinityConsistencyLoss, 128 rows at once",
        _affinities(chunk_size=128),
        time=2,
        gate={"chunk_size": 5},
        twin=True,
    ),
    Entry("CenteredCrossEntropy, with its update", _cross_entropy, "Kp"),
    Entry("MaskedTokenLoss, Kp=256", _masked_tokens, gate={"num_prototypes": 5}),
    Entry("OutGenerativeLoss", _out_generative, "Kp"),
    Entry("PrototypeHead", _head, "Kp", gate={"hidden": 8, "bottleneck": 4}),
    Entry("clip_mask", _clip_mask),
    Entry(
        "propagate_labels, 64 patches at once",
        _alike(
            functional.propagate_labels,
            _propagation,
            lambda one: (one.features.anchors, one.features.dec_labels[:, 0]),
            chunk_size=64,
        ),
        time=2,
        gate={"chunk_size": 5},
        shape={"H": 4},
    ),
    Entry("SlotRedundancyLoss", _alike(ssync_loss.SlotRedundancyLoss, srl.reference_slot_redundancy_loss, _attended)),
    _quadratic(
        "TemporalSlotContrastLoss",
        _alike(
            ssync_loss.TemporalSlotContrastLoss,
            srl.reference_temporal_slot_contrast_loss,
            lambda one: [one.leaf("B", "T", "S", "D")],
        ),
        "S",
    ),
)
BY_NAME = {one.name: one for one in (*DENSE, *ADD_ONS)}
