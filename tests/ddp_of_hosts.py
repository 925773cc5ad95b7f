"""Trains a miniature on this rank's clips in each precision: torchrun starts ``ddp_of_hosts.py FOLDER``."""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script imports only from its own folder

from examples.hosts import ddp

from miniatures import genera1z

PRECISIONS = ("amp", "float64")

Batches = list[list[Tensor]]


def scene(precision: str) -> tuple[nn.Module, Batches]:
    """Return the model and two steps, each with two parts of four clips."""
    torch.manual_seed(0)
    dtype = torch.float64 if precision == "float64" else torch.float32
    model = genera1z.build(genera1z.BroadcastMLPDecoder).to(dtype)
    return model, [[torch.randn(4, 3, 8, 3, 4, dtype=dtype) for _ in range(2)] for _ in range(2)]


def host_loss(model: nn.Module, video: Tensor) -> Tensor:
    output = model(batch={"video": video, "smask": None})
    loss: Tensor = (output["recon"] - output["feature"]).square().mean()
    return loss


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = dist.get_rank(), dist.get_world_size()
    trained = {}
    for precision in PRECISIONS:
        model, batches = scene(precision)
        mine: Any = [[part.chunk(size)[rank] for part in parts] for parts in batches]
        trained[precision] = ddp.train(model, mine, host_loss, amp=precision == "amp").state_dict()
    torch.save(trained, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
