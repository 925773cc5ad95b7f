"""A miniature of the family's training script: ``python -m miniatures.slotcontrast.train CONFIG``.

It prints JSON with the loss of every training step and of every validation. The first validation precedes step 0.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from miniatures.slotcontrast import models


def main(path: str) -> None:
    config: dict[str, Any] = json.loads(Path(path).read_text())
    torch.manual_seed(config["seed"])
    model = models.build(config["model"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    shape = (2, 3, 8, 4, 4) if config["model"]["input_type"] == "video" else (2, 8, 4, 4)
    said: dict[str, Any] = {"train": [], "val": [], "state": sorted(model.state_dict())}
    for step in range(config["max_steps"]):
        if step % 2 == 0:
            with torch.no_grad():
                said["val"].append(model.eval().validation_step({model.input_key: torch.randn(1, *shape[1:])}).item())
        loss = model.train().training_step({model.input_key: torch.randn(shape)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.global_step += 1
        said["train"].append(loss.item())
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1])
