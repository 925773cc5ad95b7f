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


@dataclass(frozen=True)
class Entry:
    """Something that is measured beside SSync; the first word of the name is the public one that it is about.

    Attributes:
        axis: along which it grows: patches of a frame, slots, prototypes or the weights of a model.
        time, memory: exponents of the axis with which they should grow, and no more.
        gate, shape: other settings and sizes where it is compared with the definition, as that is small.
        value: those of equal value compute the same loss.
    """

    name: str
    make: Callable[..., Step]
    axis: str = "H*W"
    time: int = 1
    memory: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=dict)
    shape: Mapping[str, int] = field(default_factory=dict)
    value: str = ""
    cpu_only: bool = False

    @property
    def of(self) -> str:
        """The public name that it is about."""
        return self.name.replace(".", " ").replace(",", " ").split()[0]


BY_NAME: dict[str, Entry] = {}


def entry(name: str, **more: Any) -> Callable[[Callable[..., Step]], Callable[..., Step]]:
    """Register a function that makes a step, with an entry's attributes."""

    def register(make: Callable[..., Step]) -> Callable[..., Step]:
        BY_NAME[name] = Entry(name, make, **more)
        return make

    return register


@entry("dense in windows of 4", settings={"group_frames": 4}, shape={"H": 2})
@entry("dense in windows of 2", settings={"group_frames": 2}, shape={"H": 2})
@entry("dense chunked", settings={"chunk_size": 1024}, gate={"chunk_size": 5}, shape={"H": 2}, value="dense")
@entry("dense", shape={"H": 2}, value="dense")
def _dense(inputs: Inputs, *, group_frames: int | None = None, chunk_size: int | None = None) -> Step:
    """Both terms; without windows, the clip is one."""
    decoder, encoder, anchors, enc_labels, dec_labels = inputs.features
    functions = functional.dense_decoder_alignment_loss, functional.dense_encoder_alignment_loss
    references = srl.reference_dense_decoder_alignment_loss, srl.reference_dense_encoder_alignment_loss

    def both(functions: Any, **settings: Any) -> Tensor:
        first: Tensor = functions[0](decoder, anchors, enc_labels, group_frames=group_frames, **settings)
        second: Tensor = functions[1](encoder, anchors, dec_labels, group_frames=group_frames, **settings)
        return first + second

    return Step(partial(both, functions, chunk_size=chunk_size), partial(both, references), [decoder, encoder])


DENSE = list(BY_NAME)


@entry(
    "StructureAwareLoss, kornia's filters",
    settings={"filters": "kornia"},
    shape={"T": 3, "D": 2},
    value="structure",
    cpu_only=True,
)
@entry("StructureAwareLoss, own filters", shape={"T": 3, "D": 2}, value="structure")
def _structure(inputs: Inputs, *, filters: Any = "torch") -> Step:
    pred, target = inputs.features.decoder, inputs.features.anchors
    return Step.of(
        ssync_loss.StructureAwareLoss(filters=filters), slotcurri.reference_structure_aware_loss, pred, target
    )


@entry("slot_error")
def _slot_error(inputs: Inputs) -> Step:
    return Step.of(functional.slot_error, slotcurri.reference_slot_error, *_reconstruction(inputs, inputs.size["S"]))


@entry("SlotCurriculum, elsewhere", time=0, memory=0, settings={"step": 0})
@entry("SlotCurriculum, at a milestone", settings={"step": MILESTONE})
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

    def forward() -> None:
        schedule.observe(*given, step)
        schedule.maybe_expand(placeholders, step, generator=generator)

    def expected() -> Tensor:
        if step != MILESTONE:
            return placeholders.detach().clone()
        before()
        directions = torch.randn(many - few, inputs.size["D"], generator=generator)
        counts = slotcurri.reference_allot_children(slotcurri.reference_slot_error(*given).tolist(), many - few)
        rows = placeholders.detach()[:few]
        return torch.cat([rows, slotcurri.reference_place_children(rows, counts, F.normalize(directions, dim=1))])

    return Step(forward, expected, before=before, seen=lambda _: placeholders.detach())


def _reconstruction(inputs: Inputs, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    masks = inputs.maps[1].detach()[:, :, :num_slots].softmax(2)
    return inputs.features.decoder.detach(), inputs.features.anchors, masks


@entry("cyclic_scan of the same step", settings={"cyclic": True})
@entry("a scan of some step", settings={"cyclic": False})
def _scan(inputs: Inputs, *, cyclic: bool) -> Step:
    """Slots that gather the patches of every frame; over the frames once, or forth and back."""
    frames, start = inputs.features.anchors.flatten(3), inputs.normal("B", "S", "D")

    def step(state: Tensor, frame: Tensor, _: int | None) -> dict[str, Tensor]:
        weights = (state @ frame).softmax(1)
        after = state + weights @ frame.mT / frame.shape[2]
        return {"state": after, "state_predicted": after}

    def once() -> Tensor:
        return torch.stack(_walked(step, start, frames.unbind(1)), 1)

    def expected() -> Tensor:
        forth = _walked(step, start.double(), frames.double().unbind(1))
        if not cyclic:
            return torch.stack(forth, 1).float()
        back = _walked(step, forth[-1], frames.double().unbind(1)[-2::-1])
        return torch.stack([*back[::-1], forth[-1]], 1).float()

    return Step((lambda: functional.cyclic_scan(step, start, frames)["state"]) if cyclic else once, expected)


def _walked(step: Callable[..., dict[str, Tensor]], state: Tensor, frames: Any) -> list[Tensor]:
    states = []
    for frame in frames:
        state = step(state, frame, None)["state_predicted"]
        states.append(state)
    return states


@entry("sinkhorn", time=2, memory=2)
def _sinkhorn(inputs: Inputs) -> Step:
    here, there = F.normalize(inputs.features.anchors[:, :2].flatten(3), dim=2).unbind(1)
    mu, nu = (one.abs().sum(1) for one in (here, there))
    return Step.of(functional.sinkhorn, smtc.reference_sinkhorn, 1 - here.mT @ there, mu, nu)


@entry("SemanticConsistencyLoss, pooled to 144", settings={"most_patches": 144}, gate={"most_patches": 6})
@entry("SemanticConsistencyLoss, pooled 2x2", time=2, memory=2, settings={"pool": 2})
@entry(
    "SemanticConsistencyLoss, all pairs at once",
    time=2,
    memory=2,
    settings={"chunk_size": None},
    shape={"T": 3, "H": 2},
    value="semantic",
)
@entry("SemanticConsistencyLoss, pair by pair", time=2, memory=2, shape={"T": 3, "H": 2}, value="semantic")
def _semantic(inputs: Inputs, *, pool: int = 1, most_patches: int | None = None, chunk_size: int | None = 1) -> Step:
    """Pooled by as much as it takes, where the patches that may be left are given."""
    logits, teacher = inputs.maps[0], inputs.maps[1].detach()
    patches = inputs.size["H"] * inputs.size["W"]
    while most_patches is not None and patches > most_patches * pool**2:
        pool *= 2
    loss = ssync_loss.SemanticConsistencyLoss(pool=pool, chunk_size=chunk_size)
    reference = partial(smtc.reference_semantic_consistency_loss, pool=pool)
    return Step.of(loss, reference, logits, teacher, inputs.features.anchors)


@entry("MaskDiversityLoss")
def _diversity(inputs: Inputs) -> Step:
    return Step.of(ssync_loss.MaskDiversityLoss(), smtc.reference_mask_diversity_loss, inputs.maps[0])


@entry("valid_instances")
def _valid_instances(inputs: Inputs, *, num_instances: int = 4) -> Step:
    slots = inputs.normal("B", "T", "S", "D")
    near = inputs.normal("B", "T", "S", num_instances, "D", seed=1) + slots.unsqueeze(3)
    # that some of the semantics have
    area = 1 / inputs.size["S"]
    call, reference = (
        partial(one, area_thr=area) for one in (functional.valid_instances, smtc.reference_valid_instances)
    )
    return Step.of(call, reference, inputs.maps[1].detach(), slots, near)


# the definition compares all orders
@entry(
    "InstanceConsistencyLoss, P=8, scipy",
    axis="S",
    settings={"num_instances": 8},
    gate={"num_instances": 7},
    shape={"B": 1, "T": 2, "S": 1},
)
@entry("InstanceConsistencyLoss, P=4", axis="S", settings={"num_instances": 4}, gate={"num_instances": 3})
def _instances(inputs: Inputs, *, num_instances: int) -> Step:
    axes = "B", "T", "S", num_instances
    ours, theirs = (F.normalize(inputs.normal(*axes, "D", seed=seed), dim=4) for seed in (0, 1))
    valid, teacher_valid = (inputs.normal(*axes, seed=seed) > -1 for seed in (2, 3))
    given = ours.requires_grad_(), theirs, valid, teacher_valid
    return Step.of(ssync_loss.InstanceConsistencyLoss(), smtc.reference_instance_consistency_loss, *given)


# of several iterations, the last alone gets a gradient
@entry("SemanticAwareSlotAttention", gate={"iters": 1, "num_instances": 2})
def _slot_attention(inputs: Inputs, *, num_instances: int = 4, iters: int = 3) -> Step:
    features = inputs.features.encoder
    torch.manual_seed(0)
    slot_attention = attention.SemanticAwareSlotAttention(
        inputs.size["D"], num_slots=inputs.size["S"], num_instances=num_instances, iters=iters
    ).to(inputs.device)
    noise = inputs.normal("B", "T", "S", num_instances, "D")
    shapes: list[list[str | int]] = [["D"], ["H", "W"], [num_instances, "D"], [num_instances, "H", "W"]]
    incoming = tuple(inputs.normal("B", "T", "S", *axes, seed=seed) for seed, axes in enumerate(shapes))

    def expected() -> tuple[Tensor, ...]:
        weights: dict[str, Tensor] = dict(slot_attention.named_parameters())
        mu, sigma = weights["mu"], weights["log_sigma"].exp()
        found = []
        for frame, draws in zip(features.flatten(0, 1), noise.flatten(0, 1), strict=True):
            patches = frame.flatten(1).mT
            slots, logits = smtc.reference_slot_attention(mu, patches, weights, iters=iters)
            within = [
                smtc.reference_slot_attention(start, patches, weights, iters=iters, gate=gate)
                for start, gate in zip(mu.unsqueeze(1) + sigma.unsqueeze(1) * draws, logits.softmax(0), strict=True)
            ]
            found.append((slots, logits, *(torch.stack(one) for one in zip(*within, strict=True))))
        stacked = (torch.stack(one) for one in zip(*found, strict=True))
        return tuple(one.view(like.shape) for one, like in zip(stacked, incoming, strict=True))

    return Step(
        lambda: slot_attention(features, noise),
        expected,
        [features, *slot_attention.parameters()],
        incoming,
        seen=tuple,
    )


@entry("CorrelationFusion", settings={"grid": (24, 24)}, gate={"grid": (4, 6)})
def _fusion(inputs: Inputs, *, grid: tuple[int, int]) -> Step:
    keys = inputs.features.encoder
    torch.manual_seed(0)
    fusion = attention.CorrelationFusion(inputs.size["D"], grid).to(inputs.device)
    weights = fusion.project.weight, fusion.project.bias
    incoming = inputs.normal("B", "T", "D", "H", "W")
    return Step(
        lambda: fusion(keys), lambda: smtc.reference_correlation_fusion(keys, *weights), [keys, *weights], (incoming,)
    )


@entry("EmaTeacher.update", axis="weights", gate={"width": 4})
def _teacher(inputs: Inputs, *, width: int = WIDTH) -> Step:
    """Square layers of so many weights together."""
    torch.manual_seed(0)
    layers = [nn.Linear(width, width, bias=False) for _ in range(inputs.size["weights"] // width**2)]
    student = nn.Sequential(*layers).to(inputs.device)
    teacher = ema.EmaTeacher(student, momentum=0.9)
    with torch.no_grad():
        for seed, one in enumerate(student.parameters()):
            one.add_(inputs.normal(*one.shape, seed=seed))

    def weights(model: nn.Module) -> Tensor:
        return torch.stack([one.detach() for one in model.parameters()])

    def expected() -> Tensor:
        return 0.9 * weights(teacher.model) + 0.1 * weights(student)

    return Step(lambda: teacher.update(student), expected, seen=lambda _: weights(teacher.model))


@entry(
    "AffinityConsistencyLoss, 128 rows at once",
    time=2,
    settings={"chunk_size": 128},
    gate={"chunk_size": 5},
    shape={"T": 3, "H": 2},
    value="affinity",
)
@entry("AffinityConsistencyLoss", time=2, memory=2, shape={"T": 3, "H": 2}, value="affinity")
def _affinity(inputs: Inputs, *, chunk_size: int | None = None) -> Step:
    s, t = inputs.features.encoder, inputs.features.anchors
    loss = ssync_loss.AffinityConsistencyLoss(chunk_size=chunk_size)
    return Step.of(
        loss, lambda *maps: ino.reference_affinity_consistency_loss(*(one.flatten(3).mT for one in maps)), s, t
    )


def _centered(inputs: Inputs, num_prototypes: int) -> ssync_loss.CenteredCrossEntropy:
    criterion = ssync_loss.CenteredCrossEntropy(num_prototypes).to(inputs.device)
    criterion.center.copy_(0.1 * inputs.normal(num_prototypes, seed=9))
    return criterion


@entry("CenteredCrossEntropy, with its update", axis="Kp")
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
        return ino.reference_centered_cross_entropy(s.flatten(0, 2), t.flatten(0, 2), criterion.center.clone())

    return Step(forward, expected, [s])


@entry("MaskedTokenLoss, Kp=256", gate={"num_prototypes": 5})
def _masked_tokens(inputs: Inputs, *, num_prototypes: int = 256) -> Step:
    patches = inputs.size["H"] * inputs.size["W"]
    axes = "B", "T", patches, num_prototypes
    s, t = inputs.leaf(*axes), inputs.normal(*axes, seed=1)
    mask = (inputs.normal(patches, seed=2) > 0.5).expand(s.shape[:3])
    loss = ssync_loss.MaskedTokenLoss(_centered(inputs, num_prototypes))
    return Step.of(
        loss, lambda s, t, mask: ino.reference_masked_token_loss(s, t, mask, loss.ce_patch.center)[0], s, t, mask
    )


@entry("OutGenerativeLoss", axis="Kp")
def _out_generative(inputs: Inputs, *, num_local: int = 8) -> Step:
    loss = ssync_loss.OutGenerativeLoss(_centered(inputs, inputs.size["Kp"]))
    given = inputs.leaf("B", "T", 1, "Kp"), inputs.leaf("B", "T", num_local, "Kp", seed=1)
    teacher = inputs.normal("B", "T", 1, "Kp", seed=2)
    reference: Any = ino.reference_out_generative_loss
    return Step.of(loss, lambda *given: reference(*given, loss.ce.center)[0], *given, teacher)


@entry("PrototypeHead", axis="Kp", gate={"hidden": 8, "bottleneck": 4})
def _head(inputs: Inputs, *, num_tokens: int = 10, hidden: int = 2048, bottleneck: int = 256) -> Step:
    torch.manual_seed(0)
    head = ssync_loss.PrototypeHead(inputs.size["D"], Kp=inputs.size["Kp"], hidden=hidden, bottleneck=bottleneck)
    head = head.to(inputs.device)
    x = inputs.leaf("B", "T", num_tokens, "D")
    incoming = inputs.normal("B", "T", num_tokens, "Kp", seed=1)

    def expected() -> Tensor:
        wide = {name: one.double() for name, one in head.mlp.named_parameters()}
        tokens = torch.func.functional_call(head.mlp, wide, x.double())
        return (F.normalize(tokens, dim=-1) @ F.normalize(head.prototypes.double(), dim=1).mT).float()

    return Step(lambda: head(x), expected, [x, *head.parameters()], (incoming,))


@entry("clip_mask")
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


@entry("propagate_labels, 64 patches at once", time=2, settings={"chunk_size": 64}, gate={"chunk_size": 5})
def _propagation(inputs: Inputs, *, chunk_size: int | None = None) -> Step:
    features, labels = inputs.features.anchors, inputs.features.dec_labels[:, 0]

    def expected() -> Tensor:
        shown = F.one_hot(labels, inputs.size["S"]).movedim(3, 1)
        masks = ino.reference_propagate_masks(features, shown.double())
        low, high = masks.amin((3, 4), keepdim=True), masks.amax((3, 4), keepdim=True)
        stretched = torch.where(high > low, (masks - low) / (high - low), masks)
        carried = stretched.masked_fill((shown.sum((2, 3)) == 0)[:, None, :, None, None], float("-inf")).argmax(2)
        return torch.cat([labels.unsqueeze(1), carried[:, 1:]], 1)

    return Step(lambda: functional.propagate_labels(features, labels, chunk_size=chunk_size), expected)


@entry("SlotRedundancyLoss")
def _redundancy(inputs: Inputs) -> Step:
    maps = inputs.maps[0].detach().flatten(3).softmax(3).requires_grad_()
    slots = inputs.normal("B", "T", "S", "D")
    return Step.of(ssync_loss.SlotRedundancyLoss(), srl.reference_slot_redundancy_loss, maps, slots)


@entry("TemporalSlotContrastLoss", axis="S", time=2, memory=2)
def _contrast(inputs: Inputs) -> Step:
    return Step.of(
        ssync_loss.TemporalSlotContrastLoss(),
        srl.reference_temporal_slot_contrast_loss,
        inputs.leaf("B", "T", "S", "D"),
    )


ADD_ONS = [one for name, one in BY_NAME.items() if name not in DENSE]
