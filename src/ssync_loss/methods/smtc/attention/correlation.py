"""Fusion of a frame's features with their correlation with the previous frame."""

from torch import Tensor, nn
from torch.nn import functional as F

from ssync_loss._autocast import no_autocast
from ssync_loss._autograd import savable
from ssync_loss._axes import square
from ssync_loss._checks import check_int
from ssync_loss._inputs import check_floats, widest


class CorrelationFusion(nn.Module):
    """Add to the features of a frame a linear map of their correlation with the previous frame.

    With K_t the features (C, N) of frame t and K'_t those of the previous frame, resized to ``n_ref`` cells:
    ``fused_t = K_t + W (K'_t^T K_t) + b``, W (C, n_ref). The last frame precedes the first; an image precedes itself.
    The order ``(W K'_t^T) K_t`` takes C^2 (n_ref + N) operations, in float32 or float64, without autocast. The result
    is for slot attention; :func:`ssync_loss.functional.semantic_consistency_loss` takes the features before the fusion.

    ``forward(keys)`` keeps shape (B, T, C, H, W) and type.

    Args:
        dim: C.
        n_ref: the grid (h, w) to which the previous frame is resized (bilinear), such as the grid of training, or the
            number of cells of a square grid.

    Source: Qian et al., ICCV 2023 (arXiv:2308.09951), fusion of features and correlation.
    Raises: TypeError on a wrong dtype; ValueError on wrong shapes, or a number of cells that is no square.

    >>> import torch
    >>> fusion = CorrelationFusion(1, (1, 1))
    >>> _ = nn.init.constant_(fusion.project.weight, 2.0), nn.init.zeros_(fusion.project.bias)
    >>> keys = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1, 1)  # the correlation of the frames is 3
    >>> fusion(keys).flatten().tolist()
    [7.0, 9.0]
    """

    def __init__(self, dim: int, n_ref: int | tuple[int, int]) -> None:
        super().__init__()
        check_int("dim", dim, 1)
        self.dim = dim
        self.grid = _grid(n_ref)
        self.project = nn.Linear(self.grid[0] * self.grid[1], dim)

    def forward(self, keys: Tensor) -> Tensor:
        """Return the fused features."""
        check_floats("keys", keys, "B T C H W", {"C": self.dim}, filled="T H W", weight=self.project.weight)
        dtype = widest(keys, self.project.weight)
        with no_autocast(keys):
            weight, bias, now = (one.to(dtype) for one in (self.project.weight, self.project.bias, savable(keys)))
            before = now.roll(1, 1)
            if keys.shape[3:] != self.grid:
                frames = F.interpolate(before.flatten(0, 1), self.grid, mode="bilinear", align_corners=False)
                before = frames.unflatten(0, keys.shape[:2])
            now = now.flatten(3)
            fused = now + (weight @ before.flatten(3).mT) @ now + bias.unsqueeze(1)
            return fused.view(keys.shape).to(keys.dtype)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"dim={self.dim}, n_ref={self.grid}"


def _grid(n_ref: int | tuple[int, int]) -> tuple[int, int]:
    sizes = n_ref if isinstance(n_ref, tuple) else (n_ref,)
    for one in sizes:
        check_int("n_ref", one, 1)
    if isinstance(n_ref, tuple):
        if len(n_ref) != 2:
            raise ValueError(f"`n_ref` must be (height, width) or a number of cells; got {n_ref}.")
        return n_ref
    size = square(n_ref)
    if size is None:
        raise ValueError(f"`n_ref` must be (height, width) or the number of cells of a square; got {n_ref}.")
    return size
