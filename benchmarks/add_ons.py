"""The contenders beside SSync: dense alignment and the neighboring methods, and how each of them should grow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from examples.inputs import Step
from examples.neighbors import steps

CHANNELS = 64


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


_quadratic: Any = partial(Entry, time=2, memory=2)
_chunked: Any = partial(Entry, time=2, gate={"chunk_size": 5})
_unshown: Any = partial(Entry, shown=False)
STRUCTURE, PAIRS, AFFINITY = "StructureAwareLoss", "SemanticConsistencyLoss", "AffinityConsistencyLoss"
DENSE = (
    Entry("dense", steps.dense_alignment),
    Entry("dense chunked", partial(steps.dense_alignment, chunk_size=1024), gate={"chunk_size": 5}, twin="dense"),
    Entry("dense in windows of 2", partial(steps.dense_alignment, group_frames=2)),
    _unshown("dense in windows of 4", partial(steps.dense_alignment, group_frames=4)),
)
ADD_ONS = (
    Entry(f"{STRUCTURE}, own filters", partial(steps.structure_aware, filters="torch")),
    _unshown(
        f"{STRUCTURE}, kornia's filters",
        partial(steps.structure_aware, filters="kornia"),
        twin=f"{STRUCTURE}, own filters",
    ),
    Entry("slot_error", steps.slot_error),
    Entry("SlotCurriculum, at a milestone", partial(steps.slot_curriculum, step=steps.MILESTONE)),
    _unshown("SlotCurriculum, elsewhere", partial(steps.slot_curriculum, step=0), time=0, memory=0),
    _unshown("a scan of some step", partial(steps.scan, cyclic=False)),
    Entry("cyclic_scan of the same step", partial(steps.scan, cyclic=True)),
    _quadratic("sinkhorn", steps.sinkhorn),
    _quadratic(f"{PAIRS}, pair by pair", steps.semantic_consistency),
    _quadratic(
        f"{PAIRS}, all pairs at once",
        partial(steps.semantic_consistency, chunk_size=None),
        twin=f"{PAIRS}, pair by pair",
        shown=False,
    ),
    _quadratic(f"{PAIRS}, pooled 2x2", partial(steps.semantic_consistency, pool=2), shown=False),
    Entry(f"{PAIRS}, pooled to 144", partial(steps.semantic_consistency, most_patches=144), gate={"most_patches": 6}),
    Entry("MaskDiversityLoss", steps.mask_diversity),
    _unshown("valid_instances", steps.valid_instances),
    Entry("InstanceConsistencyLoss, P=4", partial(steps.instance_consistency, num_instances=4), "S"),
    _unshown("InstanceConsistencyLoss, P=7, scipy", partial(steps.instance_consistency, num_instances=7), "S"),
    Entry("SemanticAwareSlotAttention", steps.semantic_aware_slot_attention, gate={"iters": 1}),
    Entry("CorrelationFusion", steps.correlation_fusion),
    Entry("EmaTeacher.update", steps.ema_teacher, "weights"),
    _quadratic(AFFINITY, steps.affinity_consistency),
    _chunked(
        f"{AFFINITY}, 128 rows at once", partial(steps.affinity_consistency, chunk_size=128), twin=AFFINITY, shown=False
    ),
    Entry("CenteredCrossEntropy, with its update", steps.centered_cross_entropy, "Kp"),
    Entry("MaskedTokenLoss, Kp=256", steps.masked_token),
    Entry("OutGenerativeLoss", steps.out_generative, "Kp"),
    Entry("PrototypeHead", steps.prototype_head, "Kp"),
    _unshown("clip_mask", steps.clip_mask),
    _chunked("propagate_labels, 64 patches at once", partial(steps.propagate_labels, chunk_size=64)),
    Entry("SlotRedundancyLoss", steps.slot_redundancy),
    _quadratic("TemporalSlotContrastLoss", steps.temporal_slot_contrast, "S"),
)
BY_NAME = {one.name: one for one in (*DENSE, *ADD_ONS)}
