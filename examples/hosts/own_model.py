"""A model that `attach` does not know: a `Host` entry names the modules that compute its two maps.

The entry has a name, the attributes that identify the model, and a function that finds the maps. The model does not
change. `ssync_loss.adapters.hosts` has the entries of known models.
"""

import torch
from torch import Tensor, nn

from ssync_loss import SSyncLoss
from ssync_loss.adapters import attach
from ssync_loss.adapters.hosts import Dots, Found, Host, Output


class Model(nn.Module):
    """Slot attention and a decoder. The model does not return its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.scale = nn.Linear(8, 8), nn.Linear(8, 8), 8**-0.5
        self.alpha = nn.Linear(8, 16)
        self.slots = nn.Parameter(torch.randn(5, 8))

    def forward(self, video: Tensor) -> Tensor:
        """Turn patches (B, T, N, C) into masks (B, T, S, N)."""
        frames = []
        for frame in video.unbind(1):
            keys, slots = self.to_k(frame), self.slots.expand(len(frame), -1, -1)
            for _ in range(3):
                attention = (self.scale * self.to_q(slots) @ keys.mT).softmax(1)
                slots = slots + attention @ frame / frame.shape[1]
            frames.append(slots)
        masks: Tensor = self.alpha(torch.stack(frames, 1)).softmax(2)
        return masks


def find(model: Model) -> Found:
    """Name the projections of slots and patches, their scale, and the module that is called once per clip."""
    return Found(Dots(model.to_q, model.to_k, model.scale, covers=model), Output(model.alpha, covers=model))


if __name__ == "__main__":
    model = Model()
    maps = attach(model, host=Host("mine", ("to_q", "to_k", "alpha"), find))
    loss = model(torch.randn(2, 4, 16, 8)).square().mean()
    loss = loss + SSyncLoss(merge_threshold=0.6)(**maps())  # the line
    loss.backward()
    print(maps.describe())
