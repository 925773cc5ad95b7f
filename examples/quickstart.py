"""Train a ten-line slot model with SSync for seconds on a CPU: python examples/quickstart.py."""

import torch
from torch import Tensor, nn

from ssync_loss import SSyncLoss


class SlotModel(nn.Module):
    """Slots compete for patches (B, T, N, 5), three colors and two coordinates. A decoder paints each slot."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Linear(5, 16), nn.Parameter(torch.randn(5, 16))
        self.from_slot, self.from_place, self.paint = nn.Linear(16, 32), nn.Linear(2, 32), nn.Linear(32, 4)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the painted colors, (B, T, N, 3), and both maps, (B, T, S, N)."""
        keys, slots = self.embed(patches), self.first
        for _ in range(3):
            enc_logits = 2 * slots @ keys.mT - slots.square().sum(-1, keepdim=True)
            slots = nn.functional.normalize(enc_logits.softmax(2), p=1, dim=3) @ keys
        hidden = self.from_slot(slots)[:, :, :, None] + self.from_place(patches[..., 3:])[:, :, None]
        colors, dec_logits = self.paint(hidden.relu()).split((3, 1), dim=-1)
        return (dec_logits.softmax(2) * colors).sum(2), enc_logits, dec_logits.squeeze(-1)


torch.manual_seed(0)
patches = torch.rand(16, 1, 1, 1, 5).repeat(1, 4, 12, 12, 1)  # 16 clips of 4 frames with a plain background
color = torch.rand(16, 1, 1, 3)
for frame in range(4):  # a square moves to the right
    patches[:, frame, 3:8, frame + 2 : frame + 7, :3] = color
patches[..., 3:] = torch.cartesian_prod(torch.linspace(-1, 1, 12), torch.linspace(-1, 1, 12)).view(12, 12, 2)
patches = patches.flatten(2, 3)
model, criterion = SlotModel(), SSyncLoss(merge_threshold=0.6, start_step=60)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for step in range(200):
    painted, enc_logits, dec_logits = model(patches)
    own = (painted - patches[..., :3]).square().mean()
    loss = own + criterion(enc_logits, dec_logits, step=step)  # <- the line
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 19:
        print(f"step {step + 1:3}: own loss {own.item():.4f}, SSync {loss.item() - own.item():.4f}")
