"""Parts of a model that find semantics in frames, and instances inside each."""

from ssync_loss.methods.smtc.attention.correlation import CorrelationFusion
from ssync_loss.methods.smtc.attention.semantic import SemanticAwareSlotAttention, SemanticSlots

__all__ = ["CorrelationFusion", "SemanticAwareSlotAttention", "SemanticSlots"]
