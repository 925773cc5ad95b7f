"""Parts of a model that decompose frames into semantics, and semantics into instances."""

from ssync_loss.methods.smtc.attention.correlation import CorrelationFusion
from ssync_loss.methods.smtc.attention.semantic import SemanticAwareSlotAttention, SemanticSlots

__all__ = ["CorrelationFusion", "SemanticAwareSlotAttention", "SemanticSlots"]
