"""All losses together: one backward pass, training, and a curriculum with a teacher."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssync_loss import (
    AffinityConsistencyLoss,
    CenteredCrossEntropy,
    DenseDecoderAlignmentLoss,
    DenseEncoderAlignmentLoss,
    InstanceConsistencyLoss,
    MaskDiversityLoss,
    MaskedTokenLoss,
    OutGenerativeLoss,
    PrototypeHead,
    SemanticConsistencyLoss,
    SlotRedundancyLoss,
    SSyncLoss,
    StructureAwareLoss,
    TemporalSlotContrastLoss,
    losses,
)
from ssync_loss.attention import CorrelationFusion, SemanticAwareSlotAttention
from ssync_loss.curriculum import SlotCurriculum
from ssync_loss.ema import EmaTeacher
from ssync_loss.functional import clip_mask, cyclic_scan, propagate_labels, valid_instances
from ssync_loss.metrics import fragmentation, masks_to_labels

CLIPS, FRAMES, CHANNELS, WIDTH, SIDE = 2, 4, 5, 6, 4
SLOTS, INSTANCES, PROTOTYPES = 3, 2, 7


class Views(NamedTuple):
    """The outputs of a model, named like the arguments of the losses."""

    features: Tensor
    recon: Tensor
    enc_logits: Tensor
    dec_logits: Tensor
    slots: Tensor
    instances: Tensor
    embeddings: Tensor
    tokens: Tensor
    global_tokens: Tensor


class Host(nn.Module):
    """A model with all modules of the library and a decoder of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(CHANNELS, 1, 1))
        self.encoder = nn.Conv2d(CHANNELS, WIDTH, 1)
        self.fusion = CorrelationFusion(WIDTH, (SIDE, SIDE))
        self.attention = SemanticAwareSlotAttention(
            WIDTH, num_slots=SLOTS, num_instances=INSTANCES, iters=2, hidden=WIDTH
        )
        self.alpha = nn.Linear(WIDTH, SIDE * SIDE)
        self.colors = nn.Linear(WIDTH, CHANNELS)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.head = PrototypeHead(WIDTH, Kp=PROTOTYPES, hidden=8, bottleneck=4)

    def forward(self, video: Tensor, noise: Tensor, mask: Tensor | None = None) -> Views:
        if mask is not None:
            video = torch.where(mask.unsqueeze(2), self.mask_token, video)
        features = self.encoder(video.flatten(0, 1)).unflatten(0, video.shape[:2])
        found = self.attention(self.fusion(features), noise)
        dec_logits = self.alpha(found.slots).unflatten(3, (SIDE, SIDE))
        recon = torch.einsum("btshw,btsc->btchw", dec_logits.softmax(2), self.colors(found.slots))
        return Views(
            features,
            recon,
            found.logits,
            dec_logits,
            found.slots,
            found.instances,
            F.normalize(self.project(found.instances), dim=-1),
            self.head(features.movedim(2, -1)).movedim(-1, 2),
            self.head(features.mean((3, 4))).unsqueeze(2),
        )


class Scene(NamedTuple):
    """A batch, a student, its teacher, and their outputs."""

    student: Host
    teacher: EmaTeacher
    video: Tensor
    mask: Tensor
    ours: Views
    theirs: Views

    def again(self) -> "Scene":
        """Return a copy with its own graph."""
        return self._replace(ours=self.student(self.video, noise(self.video.dtype), self.mask))


def noise(dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(CLIPS, FRAMES, SLOTS, INSTANCES, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def scene(dtype: torch.dtype = torch.float64) -> Scene:
    torch.manual_seed(0)
    student = Host().to(dtype)
    teacher = EmaTeacher(student, momentum=0.5)
    with torch.no_grad():
        for one in student.parameters():
            one.add_(torch.randn_like(one) / 5)
    video = torch.randn(CLIPS, FRAMES, CHANNELS, SIDE, SIDE, dtype=dtype)
    mask = clip_mask(SIDE * SIDE, ratio=(0.5, 0.5), prob=1.0).view(SIDE, SIDE).expand(CLIPS, FRAMES, SIDE, SIDE)
    ours = student(video, noise(dtype), mask)
    return Scene(student, teacher, video, mask, ours, teacher(video, noise(dtype, 1)))


def validity(views: Views) -> Tensor:
    settings: dict[str, float] = {"p_thr": 0.3, "area_thr": 0.0, "sim_thr": -0.5}
    return valid_instances(views.enc_logits, views.slots, views.instances, **settings)


Given = Callable[[Views, Views, Tensor, Tensor], tuple[Tensor, ...]]

# every criterion, and a function that selects its arguments
LOSSES: dict[str, tuple[nn.Module, Given]] = {
    "ssync": (SSyncLoss(merge_threshold=0.6), lambda ours, theirs, video, mask: (ours.enc_logits, ours.dec_logits)),
    "structure": (StructureAwareLoss(), lambda ours, theirs, video, mask: (ours.recon, video)),
    "semantic": (
        SemanticConsistencyLoss(),
        lambda ours, theirs, video, mask: (ours.enc_logits, theirs.enc_logits, theirs.features),
    ),
    "diversity": (MaskDiversityLoss(), lambda ours, theirs, video, mask: (ours.enc_logits,)),
    "instance": (
        InstanceConsistencyLoss(),
        lambda ours, theirs, video, mask: (ours.embeddings, theirs.embeddings, validity(ours), validity(theirs)),
    ),
    "affinity": (AffinityConsistencyLoss(), lambda ours, theirs, video, mask: (ours.tokens, theirs.tokens)),
    "masked tokens": (
        MaskedTokenLoss(CenteredCrossEntropy(PROTOTYPES)),
        lambda ours, theirs, video, mask: (ours.tokens, theirs.tokens, mask),
    ),
    "out-generative": (
        OutGenerativeLoss(CenteredCrossEntropy(PROTOTYPES)),
        lambda ours, theirs, video, mask: (ours.global_tokens, ours.tokens[..., :2, 0].mT, theirs.global_tokens),
    ),
    "dense decoder": (
        DenseDecoderAlignmentLoss(),
        lambda ours, theirs, video, mask: (ours.recon, video, ours.enc_logits.argmax(2)),
    ),
    "dense encoder": (
        DenseEncoderAlignmentLoss(top_k=2),
        lambda ours, theirs, video, mask: (ours.features, video, ours.dec_logits.argmax(2)),
    ),
    "redundancy": (
        SlotRedundancyLoss(num_picked=1),
        lambda ours, theirs, video, mask: (ours.enc_logits.flatten(3).softmax(3), ours.slots),
    ),
    "temporal": (TemporalSlotContrastLoss(), lambda ours, theirs, video, mask: (ours.slots,)),
}


def loss_of(name: str, case: Scene) -> Tensor:
    criterion, given = LOSSES[name]
    loss: Tensor = criterion(*given(case.ours, case.theirs, case.video, case.mask))
    return loss


def total_of(case: Scene, names: Iterable[str] = LOSSES) -> Tensor:
    return torch.stack([loss_of(name, case) for name in names]).sum()


def gradients(case: Scene, *names: str) -> list[Tensor]:
    """Return the gradients of the sum of some losses at all parameters of the student."""
    case = case.again()
    weights = list(case.student.parameters())
    found = torch.autograd.grad(total_of(case, names), weights, allow_unused=True, materialize_grads=True)
    assert all(one.isfinite().all() for one in found)
    return list(found)


# --- one backward ---


def test_every_loss_is_tested() -> None:
    named = {name for name in losses.__all__ if name.endswith("Loss")}
    # terms and variants of SSync
    ours = {"BoundaryRefinementLoss", "InteriorDenoisingLoss", "AdaptiveSSyncLoss"}
    assert {type(criterion).__name__ for criterion, _ in LOSSES.values()} == named - ours


def test_gradients_of_all_losses_add_up() -> None:
    case = scene()
    together = gradients(case, *LOSSES)
    parts = [gradients(case, name) for name in LOSSES]
    assert all(any(one.any() for one in part) for part in parts)
    for one, *others in zip(together, *parts, strict=True):
        torch.testing.assert_close(one, torch.stack(others).sum(0), rtol=1e-9, atol=1e-11)
    # every parameter has a gradient
    assert all(one.any() for one in together)


# --- training ---


def test_a_student_learns_from_all_losses() -> None:
    case = scene(torch.float32)
    optimizer = torch.optim.Adam(case.student.parameters(), lr=0.01)
    patches, views = CenteredCrossEntropy(PROTOTYPES), CenteredCrossEntropy(PROTOTYPES)
    kinds = {"masked tokens": MaskedTokenLoss(patches), "out-generative": OutGenerativeLoss(views)}
    found = []
    for _ in range(12):
        case = case.again()._replace(theirs=case.teacher(case.video, noise(torch.float32, 1)))
        given = (case.ours, case.theirs, case.video, case.mask)
        parts = [kinds.get(name, criterion)(*arguments(*given)) for name, (criterion, arguments) in LOSSES.items()]
        loss = torch.stack(parts).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        case.teacher.update(case.student)
        patches.update_center(case.theirs.tokens.movedim(2, -1), mask=case.mask)
        views.update_center(case.theirs.global_tokens)
        found.append(loss.item())
    assert all(math.isfinite(one) for one in found)
    assert found[-1] < 0.9 * found[0]
    assert patches.center.any()
    assert views.center.any()
    assert case.teacher.num_updates == 12


# --- a curriculum ---


class Painter(nn.Module):
    """A model with the slots of a curriculum, slot attention of one step and a decoder of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(5, WIDTH))
        self.to_k, self.alpha = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, SIDE * SIDE)
        self.colors = nn.Linear(WIDTH, CHANNELS)
        self.curriculum = SlotCurriculum([2, 3, 5], [3, 6])

    def step(self, state: Tensor, frame: Tensor, t: int | None) -> dict[str, Tensor]:
        keys = self.to_k(frame.flatten(2).mT)
        logits = state @ keys.mT
        share = logits.softmax(1) / logits.softmax(1).sum(2, keepdim=True)
        slots = state + share @ keys
        return {"logits": logits.unflatten(2, (SIDE, SIDE)), "slots": slots, "state_predicted": slots}

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = self.curriculum.take(self.slots).expand(len(video), -1, -1)
        found = cyclic_scan(self.step, state, video)
        dec_logits = self.alpha(found["slots"]).unflatten(3, (SIDE, SIDE))
        return found["logits"], dec_logits, self.colors(found["slots"])


def test_ssync_and_a_teacher_follow_a_curriculum() -> None:
    torch.manual_seed(0)
    model = Painter()
    teacher = EmaTeacher(model, momentum=0.9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    model.curriculum.hold_unborn(model.slots, optimizer)
    criterion, structure, semantic = SSyncLoss(merge_threshold=0.6), StructureAwareLoss(), SemanticConsistencyLoss()
    video = torch.randn(CLIPS, FRAMES, CHANNELS, SIDE, SIDE)
    counts = []
    for step in range(9):
        enc_logits, dec_logits, colors = model(video)
        masks = dec_logits.softmax(2)
        recon = torch.einsum("btshw,btsc->btchw", masks, colors)
        wanted, _, _ = teacher(video)
        counts.append((enc_logits.shape[2], wanted.shape[2]))
        loss = (recon - video).square().mean() + criterion(enc_logits, dec_logits) + 0.05 * structure(recon, video)
        loss = loss + semantic(enc_logits, wanted, video)
        model.curriculum.observe(recon, video, masks, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(model)
        if model.curriculum.maybe_expand(model.slots, step, optimizer):
            # the documented way to give the teacher the new slots
            teacher.model.load_state_dict(model.state_dict())
        assert loss.isfinite()
    assert counts == [(2, 2)] * 4 + [(3, 3)] * 3 + [(5, 5)] * 2
    assert teacher(video)[0].shape == (CLIPS, FRAMES, 5, SIDE, SIDE)
    # labels can be scored and propagated
    with torch.no_grad():
        found = masks_to_labels(model(video)[1], (SIDE, SIDE))
    assert (fragmentation(found, torch.zeros_like(found), background=None) >= 1).all()
    assert propagate_labels(video, found[:, 0]).shape == found.shape
