"""Dense alignment and the neighboring methods: a step of each on common inputs, and its slow definition."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from math import isqrt
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


@dataclass(frozen=True)
class Entry:
    """A method to measure next to SSync. The first word of its name is its public name.

    Attributes:
        axis: what grows: patches of a frame, slots, prototypes or the weights of a model.
        time, memory: the largest exponents that the method should have along the axis.
        gate: settings for the gate: small chunks and pools, and one iteration, as more cut the gradient.
        twin: the entry that computes the same loss.
        shown: whether the page has a row for it even if no slope is too steep.
    """

    name: str
    make: Callable[..., Step]
    axis: str = "H*W"
    time: int = 1
    memory: int = 1
    gate: Mapping[str, Any] = field(default_factory=dict)
    twin: str = ""
    shown: bool = True


def _dense(inputs: Inputs, *, group_frames: int | None = None, chunk_size: int | None = None) -> Step:
    """Add both terms. Without `group_frames` a window is the whole clip."""
    decoder, encoder, anchors, enc_labels, dec_labels = inputs.features

    def both(first: Any, second: Any, **settings: Any) -> Any:
        loss = first(decoder, anchors, enc_labels, group_frames=group_frames, **settings)
        return loss + second(encoder, anchors, dec_labels, group_frames=group_frames, **settings)

    functions = functional.dense_decoder_alignment_loss, functional.dense_encoder_alignment_loss
    references = srl.reference_dense_decoder_alignment_loss, srl.reference_dense_encoder_alignment_loss
    return Step(lambda: both(*functions, chunk_size=chunk_size), lambda: both(*references), [decoder, encoder])


def _structure(inputs: Inputs, filters: Any) -> Step:
    loss = ssync_loss.StructureAwareLoss(filters=filters)
    reference = slotcurri.reference_structure_aware_loss
    return Step.of(loss, reference, inputs.features.decoder, inputs.features.anchors)


def _reconstruction(inputs: Inputs, num_slots: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    masks = inputs.maps[1].detach()[:, :, :num_slots].softmax(2)
    return inputs.features.decoder.detach(), inputs.features.anchors, masks


def _slot_error(inputs: Inputs) -> Step:
    return Step.of(functional.slot_error, slotcurri.reference_slot_error, *_reconstruction(inputs))


def _curriculum(inputs: Inputs, *, step: int) -> Step:
    """Make both calls of a training step. The milestone doubles the slots."""
    few, many = (inputs.size["S"] + 1) // 2, inputs.size["S"]
    given = _reconstruction(inputs, few)
    schedule = curriculum.SlotCurriculum([few, many], [MILESTONE]).to(inputs.device)
    start = deepcopy(schedule.state_dict())
    placeholders = nn.Parameter(inputs.normal("S", "D"))
    # the schedule draws on the CPU
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
    """Let slots gather the patches of each frame, in one pass over the frames or forth and back."""
    frames, start = inputs.features.anchors.flatten(3), inputs.normal("B", "S", "D")

    def step(state: Tensor, frame: Tensor, _: int | None) -> dict[str, Tensor]:
        weights = (state @ frame).softmax(1)
        return {"state_predicted": state + weights @ frame.mT / frame.shape[2]}

    def forth() -> Tensor:
        states = [start]
        for frame in frames.unbind(1):
            states.append(step(states[-1], frame, None)["state_predicted"])
        return torch.stack(states[1:], 1)

    def expected() -> Tensor:
        return slotcurri.reference_cyclic_scan(step, start.double(), frames.double())["state_predicted"].float()

    if cyclic:
        return Step(lambda: functional.cyclic_scan(step, start, frames)["state_predicted"], expected)
    # both see the last frame once
    return Step(forth, lambda: expected()[:, -1], seen=lambda states: states[:, -1])


def _sinkhorn(inputs: Inputs) -> Step:
    """Transport the patches of one frame to the next."""
    here, there = F.normalize(inputs.features.anchors[:, :2].flatten(3), dim=2).unbind(1)
    costs = 1 - here.mT @ there, here.abs().sum(1), there.abs().sum(1)
    return Step.of(functional.sinkhorn, smtc.reference_sinkhorn, *costs)


def _semantic(inputs: Inputs, *, pool: int = 1, most_patches: int | None = None, chunk_size: int | None = 1) -> Step:
    """Compare the frames of a clip, pooled until at most `most_patches` patches are left."""
    while most_patches is not None and inputs.patches > most_patches * pool**2:
        pool *= 2
    loss = ssync_loss.SemanticConsistencyLoss(pool=pool, chunk_size=chunk_size)
    reference = partial(smtc.reference_semantic_consistency_loss, pool=pool)
    return Step.of(loss, reference, inputs.maps[0], inputs.maps[1].detach(), inputs.features.anchors)


def _mask_diversity(inputs: Inputs) -> Step:
    return Step.of(ssync_loss.MaskDiversityLoss(), smtc.reference_mask_diversity_loss, inputs.maps[0])


def _valid_instances(inputs: Inputs) -> Step:
    slots = inputs.normal("B", "T", "S", "D")
    near = inputs.normal("B", "T", "S", 4, "D", seed=1) + slots.unsqueeze(3)
    # some slots are larger than the threshold, some smaller
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
    features, noise = inputs.features.encoder, inputs.normal("B", "T", "S", num_instances, "D")
    torch.manual_seed(0)
    module = attention.SemanticAwareSlotAttention(
        inputs.size["D"], num_slots=inputs.size["S"], num_instances=num_instances, iters=iters
    ).to(inputs.device)
    weights = dict(module.named_parameters())
    reference = partial(smtc.reference_semantic_aware_slot_attention, features, noise, weights, iters=iters)
    return Step(lambda: module(features, noise), reference, [features, *weights.values()])


def _correlation_fusion(inputs: Inputs) -> Step:
    torch.manual_seed(0)
    grid = min(inputs.size["H"], 24), min(inputs.size["W"], 24)
    module = attention.CorrelationFusion(inputs.size["D"], grid).to(inputs.device)
    weights = module.project.weight, module.project.bias
    return Step.of(lambda keys, *_: module(keys), smtc.reference_correlation_fusion, inputs.features.encoder, *weights)


def _ema_teacher(inputs: Inputs) -> Step:
    """Update a stack of square layers."""
    start, learned = inputs.normal("weights"), inputs.normal("weights", seed=1)
    width = min(WIDTH, isqrt(len(start) // 2))
    layers = [nn.Linear(width, width, bias=False) for _ in range(len(start) // width**2)]
    student = nn.Sequential(*layers).to(inputs.device)
    nn.utils.vector_to_parameters(start, student.parameters())
    teacher = ema.EmaTeacher(student, momentum=0.9)
    nn.utils.vector_to_parameters(learned, student.parameters())

    def after(_: None) -> Tensor:
        return nn.utils.parameters_to_vector(teacher.model.parameters()).detach()

    return Step(lambda: teacher.update(student), lambda: 0.9 * start + 0.1 * learned, seen=after)


def _affinity(inputs: Inputs, *, chunk_size: int | None = None) -> Step:
    def reference(student: Tensor, teacher: Tensor) -> Tensor:
        return ino.reference_affinity_consistency_loss(student.flatten(3).mT, teacher.flatten(3).mT)

    return Step.of(ssync_loss.AffinityConsistencyLoss(chunk_size=chunk_size), reference, *inputs.features[1:3])


def _centered(teacher: Tensor) -> ssync_loss.CenteredCrossEntropy:
    """Return a criterion whose center has moved."""
    criterion = ssync_loss.CenteredCrossEntropy(teacher.shape[-1]).to(teacher.device)
    criterion.update_center(teacher)
    return criterion


def _cross_entropy(inputs: Inputs) -> Step:
    """Take the loss, then move the center."""
    s, t = inputs.leaf("B", "T", 10, "Kp"), inputs.normal("B", "T", 10, "Kp", seed=1)
    criterion = _centered(t)

    def forward() -> Tensor:
        loss: Tensor = criterion(s, t)
        criterion.update_center(t)
        return loss

    rows = s.flatten(0, 2), t.flatten(0, 2)
    return Step(forward, lambda: ino.reference_centered_cross_entropy(*rows, criterion.center.clone()), [s])


def _masked_tokens(inputs: Inputs, *, num_prototypes: int = 256) -> Step:
    axes = "B", "T", inputs.patches, num_prototypes
    s, t = inputs.leaf(*axes), inputs.normal(*axes, seed=1)
    mask = (inputs.normal(inputs.patches, seed=2) > 0.5).expand(s.shape[:3])
    loss, reference = ssync_loss.MaskedTokenLoss(_centered(t)), ino.reference_masked_token_loss
    return Step.of(loss, lambda s, t, mask: reference(s, t, mask, loss.ce_patch.center)[0], s, t, mask)


def _out_generative(inputs: Inputs) -> Step:
    """Compare eight parts of a frame with the whole."""
    whole, parts = inputs.leaf("B", "T", 1, "Kp"), inputs.leaf("B", "T", 8, "Kp", seed=1)
    teacher = inputs.normal("B", "T", 1, "Kp", seed=2)
    loss, reference = ssync_loss.OutGenerativeLoss(_centered(teacher)), ino.reference_out_generative_loss
    return Step.of(loss, lambda a, b, t: reference(a, b, t, loss.ce.center)[0], whole, parts, teacher)


def _head(inputs: Inputs) -> Step:
    torch.manual_seed(0)
    head = ssync_loss.PrototypeHead(inputs.size["D"], Kp=inputs.size["Kp"]).to(inputs.device)
    x, weights = inputs.leaf("B", "T", 10, "D"), dict(head.named_parameters())
    return Step(lambda: head(x), partial(ino.reference_prototype_head, x, weights), [x, *weights.values()])


def _clip_mask(inputs: Inputs) -> Step:
    """Draw the same mask in every call. Its number of patches is defined, its place is not."""
    generator = torch.Generator(inputs.device)
    return Step(
        lambda: functional.clip_mask(inputs.patches, ratio=(0.3, 0.3), prob=1.0, generator=generator),
        lambda: torch.tensor(int(0.3 * inputs.patches), device=inputs.device),
        before=lambda: generator.manual_seed(0),
        seen=lambda mask: mask.sum(),
    )


def _propagation(inputs: Inputs, *, chunk_size: int) -> Step:
    call = partial(functional.propagate_labels, chunk_size=chunk_size)
    given = inputs.features.anchors, inputs.features.dec_labels[:, 0]
    return Step.of(call, ino.reference_propagate_labels, *given)


def _redundancy(inputs: Inputs) -> Step:
    attended = inputs.maps[0].detach().flatten(3).softmax(3).requires_grad_(), inputs.normal("B", "T", "S", "D")
    return Step.of(ssync_loss.SlotRedundancyLoss(), srl.reference_slot_redundancy_loss, *attended)


def _temporal_contrast(inputs: Inputs) -> Step:
    loss, reference = ssync_loss.TemporalSlotContrastLoss(), srl.reference_temporal_slot_contrast_loss
    return Step.of(loss, reference, inputs.leaf("B", "T", "S", "D"))


_quadratic: Any = partial(Entry, time=2, memory=2)
_chunked: Any = partial(Entry, time=2, gate={"chunk_size": 5})
_unshown: Any = partial(Entry, shown=False)
STRUCTURE, PAIRS, AFFINITY = "StructureAwareLoss", "SemanticConsistencyLoss", "AffinityConsistencyLoss"
DENSE = (
    Entry("dense", _dense),
    Entry("dense chunked", partial(_dense, chunk_size=1024), gate={"chunk_size": 5}, twin="dense"),
    Entry("dense in windows of 2", partial(_dense, group_frames=2)),
    _unshown("dense in windows of 4", partial(_dense, group_frames=4)),
)
ADD_ONS = (
    Entry(f"{STRUCTURE}, own filters", partial(_structure, filters="torch")),
    _unshown(f"{STRUCTURE}, kornia's filters", partial(_structure, filters="kornia"), twin=f"{STRUCTURE}, own filters"),
    Entry("slot_error", _slot_error),
    Entry("SlotCurriculum, at a milestone", partial(_curriculum, step=MILESTONE)),
    _unshown("SlotCurriculum, elsewhere", partial(_curriculum, step=0), time=0, memory=0),
    _unshown("a scan of some step", partial(_scan, cyclic=False)),
    Entry("cyclic_scan of the same step", partial(_scan, cyclic=True)),
    _quadratic("sinkhorn", _sinkhorn),
    _quadratic(f"{PAIRS}, pair by pair", _semantic),
    _quadratic(
        f"{PAIRS}, all pairs at once", partial(_semantic, chunk_size=None), twin=f"{PAIRS}, pair by pair", shown=False
    ),
    _quadratic(f"{PAIRS}, pooled 2x2", partial(_semantic, pool=2), shown=False),
    Entry(f"{PAIRS}, pooled to 144", partial(_semantic, most_patches=144), gate={"most_patches": 6}),
    Entry("MaskDiversityLoss", _mask_diversity),
    _unshown("valid_instances", _valid_instances),
    Entry("InstanceConsistencyLoss, P=4", partial(_instances, num_instances=4), "S"),
    _unshown("InstanceConsistencyLoss, P=7, scipy", partial(_instances, num_instances=7), "S"),
    Entry("SemanticAwareSlotAttention", _slot_attention, gate={"iters": 1}),
    Entry("CorrelationFusion", _correlation_fusion),
    Entry("EmaTeacher.update", _ema_teacher, "weights"),
    _quadratic(AFFINITY, _affinity),
    _chunked(f"{AFFINITY}, 128 rows at once", partial(_affinity, chunk_size=128), twin=AFFINITY, shown=False),
    Entry("CenteredCrossEntropy, with its update", _cross_entropy, "Kp"),
    Entry("MaskedTokenLoss, Kp=256", _masked_tokens),
    Entry("OutGenerativeLoss", _out_generative, "Kp"),
    Entry("PrototypeHead", _head, "Kp"),
    _unshown("clip_mask", _clip_mask),
    _chunked("propagate_labels, 64 patches at once", partial(_propagation, chunk_size=64)),
    Entry("SlotRedundancyLoss", _redundancy),
    _quadratic("TemporalSlotContrastLoss", _temporal_contrast, "S"),
)
BY_NAME = {one.name: one for one in (*DENSE, *ADD_ONS)}
