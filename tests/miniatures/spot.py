"""A miniature of SPOT, an image model that returns both maps and whose decoder permutes the patches.

It keeps these quirks. The forward pass returns (loss, encoder map, decoder map, slots, reconstruction, dots). Maps are
(B, S, H, W), dots are (B, heads, N, S) after a ``squeeze`` that also removes B = 1. The softmax runs jointly over slots
and heads. In training, the cross-attention sees the patches in a random order, and dropout follows it.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from miniatures.steve import MultiHeadAttention


class SlotAttention(nn.Module):
    def __init__(self, num_iter: int, slot_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_iter, self.slot_size, self.num_heads = num_iter, slot_size, num_heads
        self.norm_inputs, self.norm_slots = nn.LayerNorm(slot_size), nn.LayerNorm(slot_size)
        self.project_q, self.project_k, self.project_v = (nn.Linear(slot_size, slot_size, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(slot_size, slot_size)

    def forward(self, inputs: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def heads(one: Tensor) -> Tensor:
            return rearrange(one, "b n (h d) -> b h n d", h=self.num_heads)

        inputs = self.norm_inputs(inputs)
        k = heads(self.project_k(inputs)) * (self.slot_size // self.num_heads) ** -0.5
        v = heads(self.project_v(inputs))
        for _ in range(self.num_iter):
            attn_logits = k @ heads(self.project_q(self.norm_slots(slots))).mT
            joint = rearrange(attn_logits, "b h n s -> b n (h s)").softmax(-1)
            attn = rearrange(joint, "b n (h s) -> b h n s", h=self.num_heads)
            updates = (attn / (attn.sum(-2, keepdim=True) + 1e-8)).mT @ v
            updates = rearrange(updates, "b h s d -> (b s) (h d)")
            slots = self.gru(updates, slots.flatten(0, 1)).view_as(slots)
        return slots, attn.sum(1), attn_logits


class SlotAttentionEncoder(nn.Module):
    def __init__(self, num_slots: int, slot_size: int, num_heads: int) -> None:
        super().__init__()
        self.slots_init = nn.Embedding(num_slots, slot_size)
        self.mlp = nn.Linear(slot_size, slot_size)
        self.slot_attention = SlotAttention(3, slot_size, num_heads)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        init = self.slots_init.weight.expand(len(x), -1, -1)
        slots, attn, attn_logits = self.slot_attention(self.mlp(x), init)
        return slots, attn, init, attn_logits


class TransformerDecoderBlock(nn.Module):
    def __init__(self, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.encoder_decoder_attn = MultiHeadAttention(d_model, num_heads, dropout)

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        made: Tensor = x + self.encoder_decoder_attn(x, slots, slots)
        return made


class TransformerDecoder(nn.Module):
    def __init__(self, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([TransformerDecoderBlock(d_model, num_heads, dropout)])

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, slots)
        return x


class SPOT(nn.Module):
    def __init__(self, num_slots: int = 4, d_model: int = 8, num_heads: int = 1, grid: int = 4) -> None:
        super().__init__()
        self.num_slots, self.d_model, self.grid = num_slots, d_model, grid
        self.encoder = nn.Conv2d(3, d_model, 1)
        self.slot_attn = SlotAttentionEncoder(num_slots, d_model, num_heads)
        self.bos_tokens = nn.Parameter(torch.randn(1, 1, d_model))
        self.dec = TransformerDecoder(d_model, 2, 0.1)
        self.dec_slots_attns: list[Tensor] = []
        attention = self.dec.blocks[-1].encoder_decoder_attn
        assert isinstance(attention, MultiHeadAttention)
        attention.attn_dropout.register_forward_pre_hook(lambda _module, given: self.dec_slots_attns.append(given[0]))

    def forward_decoder(self, slots: Tensor, emb_target: Tensor) -> tuple[Tensor, Tensor]:
        N = emb_target.shape[1]
        order = torch.randperm(N) if self.training else torch.arange(N)
        bos = self.bos_tokens.expand(len(slots), -1, -1)
        output = self.dec(torch.cat([bos, emb_target[:, order][:, :-1]], 1), slots)
        attention = self.dec_slots_attns.pop().sum(1)
        attention = attention / attention.sum(2, keepdim=True)
        return output[:, order.argsort()], attention[:, order.argsort()]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        emb = rearrange(self.encoder(image), "b c h w -> b (h w) c")
        target = emb.detach()
        slots, slots_attns, _, attn_logits = self.slot_attn(emb)
        recon, dec_slots_attns = self.forward_decoder(slots, target)
        loss = (target - recon).square().mean()
        on_grid = (rearrange(one, "b (h w) s -> b s h w", h=self.grid) for one in (slots_attns, dec_slots_attns))
        return (loss, *on_grid, slots, recon, attn_logits.squeeze())
