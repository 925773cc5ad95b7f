"""How each neighboring method is called, and the slow definition that it agrees with.

    inputs = Inputs({"B": 2, "T": 4, "S": 7, "H": 8, "W": 12, "D": 16})
    loss, gradient = mask_diversity(inputs).once()

Every function makes a `Step` on drawn `Inputs`. The benchmarks compare it with its definition, and then time it.
"""

from copy import deepcopy
from functools import partial
from math import isqrt
from typing import Any

import torch
from examples.inputs import Inputs, Step
from torch import Tensor, nn
from torch.nn import functional as F

import ssync_loss
from ssync_loss import attention, curriculum, ema, functional
from ssync_loss.methods.ino import reference as ino
from ssync_loss.methods.slotcurri import reference as slotcurri
from ssync_loss.methods.smtc import reference as smtc
from ssync_loss.methods.srl import reference as srl

MILESTONE = 9


def dense_alignment(inputs: Inputs, *, group_frames: int | None = None, chunk_size: int | None = None) -> Step:
    """Add both terms of SRL. Without `group_frames` a window is the whole clip."""
    decoder, encoder, anchors, enc_labels, dec_labels = inputs.features

    def both(first: Any, second: Any, **settings: Any) -> Any:
        loss = first(decoder, anchors, enc_labels, group_frames=group_frames, **settings)
        return loss + second(encoder, anchors, dec_labels, group_frames=group_frames, **settings)

    functions = functional.dense_decoder_alignment_loss, functional.dense_encoder_alignment_loss
    references = srl.reference_dense_decoder_alignment_loss, srl.reference_dense_encoder_alignment_loss
    return Step(lambda: both(*functions, chunk_size=chunk_size), lambda: both(*references), [decoder, encoder])


def slot_redundancy(inputs: Inputs) -> Step:
    """Penalize redundant slots by their attention over patches (SRL)."""
    attended = inputs.maps[0].detach().flatten(3).softmax(3).requires_grad_(), inputs.normal("B", "T", "S", "D")
    return Step.of(ssync_loss.SlotRedundancyLoss(), srl.reference_slot_redundancy_loss, *attended)


def temporal_slot_contrast(inputs: Inputs) -> Step:
    """Contrast the slots of a frame with those of the next (SlotContrast)."""
    loss, reference = ssync_loss.TemporalSlotContrastLoss(), srl.reference_temporal_slot_contrast_loss
    return Step.of(loss, reference, inputs.leaf("B", "T", "S", "D"))


def structure_aware(inputs: Inputs, filters: Any) -> Step:
    """Compare reconstructed features with true ones, by own filters or by kornia's (SlotCurri)."""
    loss, reference = ssync_loss.StructureAwareLoss(filters=filters), slotcurri.reference_structure_aware_loss
    return Step.of(loss, reference, inputs.features.decoder, inputs.features.anchors)


def _reconstruction(inputs: Inputs, num_slots: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    masks = inputs.maps[1].detach()[:, :, :num_slots].softmax(2)
    return inputs.features.decoder.detach(), inputs.features.anchors, masks


def slot_error(inputs: Inputs) -> Step:
    """Measure the reconstruction error of each slot (SlotCurri)."""
    return Step.of(functional.slot_error, slotcurri.reference_slot_error, *_reconstruction(inputs))


def slot_curriculum(inputs: Inputs, *, step: int) -> Step:
    """Make both calls of a training step (SlotCurri). The milestone doubles the slots."""
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


def scan(inputs: Inputs, *, cyclic: bool) -> Step:
    """Let slots gather the patches of each frame, in one pass over the frames or forth and back (SlotCurri)."""
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


def sinkhorn(inputs: Inputs) -> Step:
    """Transport the patches of one frame to the next (SMTC)."""
    here, there = F.normalize(inputs.features.anchors[:, :2].flatten(3), dim=2).unbind(1)
    costs = 1 - here.mT @ there, here.abs().sum(1), there.abs().sum(1)
    return Step.of(functional.sinkhorn, smtc.reference_sinkhorn, *costs)


def semantic_consistency(
    inputs: Inputs, *, pool: int = 1, most_patches: int | None = None, chunk_size: int | None = 1
) -> Step:
    """Compare the frames of a clip, pooled until at most `most_patches` patches are left (SMTC)."""
    while most_patches is not None and inputs.patches > most_patches * pool**2:
        pool *= 2
    loss = ssync_loss.SemanticConsistencyLoss(pool=pool, chunk_size=chunk_size)
    reference = partial(smtc.reference_semantic_consistency_loss, pool=pool)
    return Step.of(loss, reference, inputs.maps[0], inputs.maps[1].detach(), inputs.features.anchors)


def mask_diversity(inputs: Inputs) -> Step:
    """Keep the masks of two slots apart (SMTC)."""
    return Step.of(ssync_loss.MaskDiversityLoss(), smtc.reference_mask_diversity_loss, inputs.maps[0])


def valid_instances(inputs: Inputs) -> Step:
    """Find the instances of large semantics that are near them (SMTC)."""
    slots = inputs.normal("B", "T", "S", "D")
    near = inputs.normal("B", "T", "S", 4, "D", seed=1) + slots.unsqueeze(3)
    # some slots are larger than the threshold, some smaller
    area = 1 / inputs.size["S"]
    functions = functional.valid_instances, smtc.reference_valid_instances
    return Step.of(*(partial(one, area_thr=area) for one in functions), inputs.maps[1].detach(), slots, near)


def instance_consistency(inputs: Inputs, *, num_instances: int) -> Step:
    """Match the instances of a student and a teacher (SMTC)."""
    axes = "B", "T", "S", num_instances
    ours, theirs = (F.normalize(inputs.normal(*axes, "D", seed=seed), dim=4) for seed in (0, 1))
    valid = [inputs.normal(*axes, seed=seed) > -1 for seed in (2, 3)]
    reference = smtc.reference_instance_consistency_loss
    return Step.of(ssync_loss.InstanceConsistencyLoss(), reference, ours.requires_grad_(), theirs, *valid)


def semantic_aware_slot_attention(inputs: Inputs, *, num_instances: int = 4, iters: int = 3) -> Step:
    """Attend to the patches of each frame in two stages, semantics and instances (SMTC)."""
    features, noise = inputs.features.encoder, inputs.normal("B", "T", "S", num_instances, "D")
    torch.manual_seed(0)
    module = attention.SemanticAwareSlotAttention(
        inputs.size["D"], num_slots=inputs.size["S"], num_instances=num_instances, iters=iters
    ).to(inputs.device)
    weights = dict(module.named_parameters())
    reference = partial(smtc.reference_semantic_aware_slot_attention, features, noise, weights, iters=iters)
    return Step(lambda: module(features, noise), reference, [features, *weights.values()])


def correlation_fusion(inputs: Inputs) -> Step:
    """Add correlations with the frame before to features (SMTC)."""
    torch.manual_seed(0)
    grid = min(inputs.size["H"], 24), min(inputs.size["W"], 24)
    module = attention.CorrelationFusion(inputs.size["D"], grid).to(inputs.device)
    weights = module.project.weight, module.project.bias
    return Step.of(lambda keys, *_: module(keys), smtc.reference_correlation_fusion, inputs.features.encoder, *weights)


def ema_teacher(inputs: Inputs, *, width: int = 256) -> Step:
    """Update the teacher of a stack of square layers (SMTC, INO)."""
    start, learned = inputs.normal("weights"), inputs.normal("weights", seed=1)
    width = min(width, isqrt(len(start) // 2))
    layers = [nn.Linear(width, width, bias=False) for _ in range(len(start) // width**2)]
    student = nn.Sequential(*layers).to(inputs.device)
    nn.utils.vector_to_parameters(start, student.parameters())
    teacher = ema.EmaTeacher(student, momentum=0.9)
    nn.utils.vector_to_parameters(learned, student.parameters())

    def after(_: None) -> Tensor:
        return nn.utils.parameters_to_vector(teacher.model.parameters()).detach()

    return Step(lambda: teacher.update(student), lambda: 0.9 * start + 0.1 * learned, seen=after)


def affinity_consistency(inputs: Inputs, *, chunk_size: int | None = None) -> Step:
    """Compare the affinities of a student's patches with those of a teacher's (INO)."""

    def reference(student: Tensor, teacher: Tensor) -> Tensor:
        return ino.reference_affinity_consistency_loss(student.flatten(3).mT, teacher.flatten(3).mT)

    return Step.of(ssync_loss.AffinityConsistencyLoss(chunk_size=chunk_size), reference, *inputs.features[1:3])


def _centered(teacher: Tensor) -> ssync_loss.CenteredCrossEntropy:
    """Return a criterion whose center has moved."""
    criterion = ssync_loss.CenteredCrossEntropy(teacher.shape[-1]).to(teacher.device)
    criterion.update_center(teacher)
    return criterion


def centered_cross_entropy(inputs: Inputs) -> Step:
    """Take the loss of ten tokens of a frame, then move the center (INO)."""
    s, t = inputs.leaf("B", "T", 10, "Kp"), inputs.normal("B", "T", 10, "Kp", seed=1)
    criterion = _centered(t)

    def forward() -> Tensor:
        loss: Tensor = criterion(s, t)
        criterion.update_center(t)
        return loss

    rows = s.flatten(0, 2), t.flatten(0, 2)
    return Step(forward, lambda: ino.reference_centered_cross_entropy(*rows, criterion.center.clone()), [s])


def masked_token(inputs: Inputs, *, num_prototypes: int = 256) -> Step:
    """Predict the scores of masked patches (INO)."""
    axes = "B", "T", inputs.patches, num_prototypes
    s, t = inputs.leaf(*axes), inputs.normal(*axes, seed=1)
    mask = (inputs.normal(inputs.patches, seed=2) > 0.5).expand(s.shape[:3])
    loss, reference = ssync_loss.MaskedTokenLoss(_centered(t)), ino.reference_masked_token_loss
    return Step.of(loss, lambda s, t, mask: reference(s, t, mask, loss.ce_patch.center)[0], s, t, mask)


def out_generative(inputs: Inputs) -> Step:
    """Compare eight crops of a frame with the whole (INO)."""
    whole, crops = inputs.leaf("B", "T", 1, "Kp"), inputs.leaf("B", "T", 8, "Kp", seed=1)
    teacher = inputs.normal("B", "T", 1, "Kp", seed=2)
    loss, reference = ssync_loss.OutGenerativeLoss(_centered(teacher)), ino.reference_out_generative_loss
    return Step.of(loss, lambda a, b, t: reference(a, b, t, loss.ce.center)[0], whole, crops, teacher)


def prototype_head(inputs: Inputs) -> Step:
    """Score ten tokens of a frame by prototypes (INO)."""
    torch.manual_seed(0)
    head = ssync_loss.PrototypeHead(inputs.size["D"], Kp=inputs.size["Kp"]).to(inputs.device)
    x, weights = inputs.leaf("B", "T", 10, "D"), dict(head.named_parameters())
    return Step(lambda: head(x), partial(ino.reference_prototype_head, x, weights), [x, *weights.values()])


def clip_mask(inputs: Inputs) -> Step:
    """Draw the same mask in every call (INO). Its number of patches is defined, its place is not."""
    generator = torch.Generator(inputs.device)
    return Step(
        lambda: functional.clip_mask(inputs.patches, ratio=(0.3, 0.3), prob=1.0, generator=generator),
        lambda: torch.tensor(int(0.3 * inputs.patches), device=inputs.device),
        before=lambda: generator.manual_seed(0),
        seen=lambda mask: mask.sum(),
    )


def propagate_labels(inputs: Inputs, *, chunk_size: int) -> Step:
    """Carry the labels of the first frame through a clip (INO)."""
    call = partial(functional.propagate_labels, chunk_size=chunk_size)
    given = inputs.features.anchors, inputs.features.dec_labels[:, 0]
    return Step.of(call, ino.reference_propagate_labels, *given)
