"""A miniature of ``slot-attention`` by lucidrains, with a user's decoder.

It keeps these quirks. The model does not return its attention. Only the pattern of ``split_heads`` has the number of
heads. Each head has its own softmax. Every call draws new slots, so the frames of a video are images. The only addition
is ``attention``, the attention of the last iteration, for comparison.
"""

import torch
from einops import einsum, rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn


class SlotAttention(nn.Module):
    """One head."""

    attention: Tensor

    def __init__(self, num_slots: int, dim: int, iters: int = 3) -> None:
        super().__init__()
        self.num_slots, self.dim, self.iters, self.scale = num_slots, dim, iters, dim**-0.5
        self.slots_mu = nn.Parameter(torch.randn(1, 1, dim))
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.gru = nn.GRUCell(dim, dim)

    def forward(self, inputs: Tensor) -> Tensor:
        slots = self.slots_mu + torch.randn(len(inputs), self.num_slots, self.dim)
        k, v = self.to_k(inputs), self.to_v(inputs)
        for _ in range(self.iters):
            attn = (einsum(self.to_q(slots), k, "b i d, b j d -> b i j") * self.scale).softmax(1)
            updates = attn / attn.sum(-1, keepdim=True) @ v
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        self.attention = attn.detach()
        return slots


class MultiHeadSlotAttention(nn.Module):
    attention: Tensor

    def __init__(self, num_slots: int, dim: int, heads: int = 4, dim_head: int = 3, iters: int = 3) -> None:
        super().__init__()
        self.num_slots, self.dim, self.iters, self.scale = num_slots, dim, iters, dim_head**-0.5
        self.slots_mu = nn.Parameter(torch.randn(1, 1, dim))
        self.split_heads = Rearrange("b n (h d) -> b h n d", h=heads)
        self.merge_heads = Rearrange("b h n d -> b n (h d)")
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim_head * heads) for _ in range(3))
        self.combine_heads = nn.Linear(dim_head * heads, dim)
        self.gru = nn.GRUCell(dim, dim)

    def forward(self, inputs: Tensor) -> Tensor:
        slots = self.slots_mu + torch.randn(len(inputs), self.num_slots, self.dim)
        k, v = self.split_heads(self.to_k(inputs)), self.split_heads(self.to_v(inputs))
        for _ in range(self.iters):
            q = self.split_heads(self.to_q(slots))
            attn = (einsum(q, k, "b h i d, b h j d -> b h i j") * self.scale).softmax(-2)
            updates = self.combine_heads(self.merge_heads(attn / attn.sum(-1, keepdim=True) @ v))
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        self.attention = attn.detach().mean(1)
        return slots


class AdaptiveSlotWrapper(nn.Module):
    """Draws the slots to keep after slot attention has run on all of them."""

    def __init__(self, slot_attn: SlotAttention | MultiHeadSlotAttention) -> None:
        super().__init__()
        self.slot_attn = slot_attn
        self.pred_keep_slot = nn.Linear(slot_attn.dim, 2, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.slot_attn(x)
        return slots, nn.functional.gumbel_softmax(self.pred_keep_slot(slots), hard=True)[..., -1]


class UsersModel(nn.Module):
    """Slot attention with a user's decoder, whose last channel is alpha."""

    def __init__(self, slot_attn: nn.Module, dim: int = 8, num_patches: int = 16) -> None:
        super().__init__()
        self.slot_attn = slot_attn
        self.positions = nn.Parameter(torch.randn(num_patches, dim))
        self.decoder = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim + 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction's error, and alpha after the softmax, (B, S, N)."""
        tokens = rearrange(images, "b c h w -> b (h w) c")
        slots = self.slot_attn(tokens)
        slots = slots[0] * slots[1][..., None] if isinstance(slots, tuple) else slots
        decoded = self.decoder(slots[:, :, None] + self.positions)
        alpha = decoded[..., -1].softmax(1)
        return ((decoded[..., :-1] * alpha[..., None]).sum(1) - tokens).square().mean(), alpha
