"""A miniature of STEVE: one call for the keys of a clip, and an autoregressive decoder on half of the encoder's grid.

It keeps these quirks. The decoder's projections see all frames in the batch axis. Patches are queries, slots are keys,
and each head has its own softmax. The forward pass returns attention blended into the picture, and no decoder map.
Generation calls the decoder once per patch, with a growing number of patches.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class SlotAttentionVideo(nn.Module):
    def __init__(self, num_iterations: int, num_slots: int, slot_size: int) -> None:
        super().__init__()
        self.num_iterations, self.num_slots, self.slot_size = num_iterations, num_slots, slot_size
        self.slot_mu = nn.Parameter(torch.randn(1, 1, slot_size))
        self.norm_inputs, self.norm_slots = nn.LayerNorm(slot_size), nn.LayerNorm(slot_size)
        self.project_q, self.project_k, self.project_v = (nn.Linear(slot_size, slot_size, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(slot_size, slot_size)
        self.predictor = nn.Linear(slot_size, slot_size)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        B, T = inputs.shape[:2]
        slots = self.slot_mu + torch.randn(B, self.num_slots, self.slot_size)
        inputs = self.norm_inputs(inputs)
        k, v = self.project_k(inputs) * self.slot_size**-0.5, self.project_v(inputs)
        collected, attns = [], []
        for t in range(T):
            for _ in range(self.num_iterations):
                q = self.project_q(self.norm_slots(slots))
                attn = torch.bmm(k[:, t], q.mT).softmax(-1)
                updates = (attn / (attn.sum(-2, keepdim=True) + 1e-8)).mT @ v[:, t]
                slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            collected.append(slots)
            attns.append(attn)
            slots = self.predictor(slots)
        return torch.stack(collected, 1), torch.stack(attns, 1)


class STEVEEncoder(nn.Module):
    def __init__(self, d_model: int, num_slots: int) -> None:
        super().__init__()
        self.cnn = nn.Conv2d(3, d_model, 2, stride=2)
        self.savi = SlotAttentionVideo(2, num_slots, d_model)
        self.slot_proj = nn.Linear(d_model, d_model, bias=False)


class MultiHeadAttention(nn.Module):
    def __init__(self, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.d_model, self.num_heads = d_model, num_heads
        self.attn_dropout = nn.Dropout(dropout)
        self.proj_q, self.proj_k, self.proj_v, self.proj_o = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        def heads(one: Tensor) -> Tensor:
            return rearrange(one, "b n (h d) -> b h n d", h=self.num_heads)

        q, k, v = heads(self.proj_q(q)), heads(self.proj_k(k)), heads(self.proj_v(v))
        attn = (q * q.shape[-1] ** -0.5) @ k.mT
        attn = attn if mask is None else attn.masked_fill(mask, -torch.inf)
        made: Tensor = self.proj_o(rearrange(self.attn_dropout(attn.softmax(-1)) @ v, "b h n d -> b n (h d)"))
        return made


class TransformerDecoderBlock(nn.Module):
    def __init__(self, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = MultiHeadAttention(d_model, num_heads, dropout)
        self.encoder_decoder_attn = MultiHeadAttention(d_model, num_heads, dropout)

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = x + self.self_attn(x, x, x, later)
        made: Tensor = x + self.encoder_decoder_attn(x, slots, slots)
        return made


class TransformerDecoder(nn.Module):
    def __init__(self, num_blocks: int, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TransformerDecoderBlock(d_model, num_heads, dropout) for _ in range(num_blocks))

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, slots)
        return x


class STEVEDecoder(nn.Module):
    def __init__(self, d_model: int, num_patches: int, vocab_size: int, dropout: float) -> None:
        super().__init__()
        self.dict = nn.Embedding(vocab_size, d_model)
        self.bos = nn.Parameter(torch.randn(1, 1, d_model))
        self.pos = nn.Parameter(torch.randn(1, 1 + num_patches, d_model))
        self.tf = TransformerDecoder(2, d_model, 2, dropout)
        self.head = nn.Linear(d_model, vocab_size, bias=False)


class STEVE(nn.Module):
    def __init__(self, image_size: int = 16, num_slots: int = 4, d_model: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.image_size, self.num_slots, self.vocab_size = image_size, num_slots, 5
        self.dvae = nn.Conv2d(3, self.vocab_size, 4, stride=4)
        self.steve_encoder = STEVEEncoder(d_model, num_slots)
        self.steve_decoder = STEVEDecoder(d_model, (image_size // 4) ** 2, self.vocab_size, dropout)

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross entropy, and the picture of every slot, (B, T, S, C, H, W)."""
        tokens = rearrange(self.dvae(video.flatten(0, 1)).argmax(1), "b h w -> b (h w)")
        slots, blended, _ = self.encode(video)
        seen = torch.cat([self.steve_decoder.bos.expand(len(tokens), -1, -1), self.steve_decoder.dict(tokens)], 1)
        seen = (seen + self.steve_decoder.pos)[:, :-1]
        decoded = self.steve_decoder.tf(seen, self.steve_encoder.slot_proj(slots).flatten(0, 1))
        return F.cross_entropy(self.steve_decoder.head(decoded).mT, tokens), blended

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return slots, the blended picture and attention at the size of the picture."""
        emb = rearrange(self.steve_encoder.cnn(video.flatten(0, 1)), "(b t) c h w -> b t (h w) c", b=len(video))
        slots, attns = self.steve_encoder.savi(emb)
        attns = rearrange(attns, "b t (h w) s -> b t s 1 h w", h=self.image_size // 2)
        attns = attns.repeat_interleave(2, -2).repeat_interleave(2, -1)
        return slots, video.unsqueeze(2) * attns + (1 - attns), attns

    def reconstruct_autoregressive(self, video: Tensor) -> Tensor:
        """Generate the tokens of every frame one by one, (B*T, N)."""
        slots = self.steve_encoder.slot_proj(self.encode(video)[0]).flatten(0, 1)
        seen, tokens = self.steve_decoder.bos.expand(len(slots), 1, -1), []
        for _ in range((self.image_size // 4) ** 2):
            decoded = self.steve_decoder.tf(seen + self.steve_decoder.pos[:, : seen.shape[1]], slots)
            tokens.append(self.steve_decoder.head(decoded)[:, -1].argmax(-1))
            seen = torch.cat([seen, self.steve_decoder.dict(tokens[-1])[:, None]], 1)
        return torch.stack(tokens, 1)
