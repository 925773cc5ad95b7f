"""Features on a grid, and lists of tokens."""

from einops import rearrange
from torch import Tensor

from ssync_loss._inputs import check_floats, check_mask


def check_tokens(name: str, tokens: Tensor, channels: str, **sizes: int) -> dict[str, int]:
    """Check a list of tokens (B, T, N, D), or features (B, T, D, H, W), and return their sizes.

    A known size N requires a list, a known size H requires features. The list and the batch may be empty.
    """
    is_list = "N" in sizes or ("H" not in sizes and isinstance(tokens, Tensor) and tokens.ndim == 4)
    axes, filled = ("N {}", "{}") if is_list else ("{} H W", "{} H W")
    return check_floats(name, tokens, f"B T {axes.format(channels)}", sizes, filled=f"T {filled.format(channels)}")


def positions_of(size: dict[str, int]) -> dict[str, int]:
    """Return the sizes of all axes but the channels."""
    return {axis: size[axis] for axis in ("B", "T", "N", "H", "W") if axis in size}


def check_kept(name: str, mask: Tensor, size: dict[str, int], **beside: Tensor) -> None:
    """Check the mask of kept positions, (B, T, N) or (B, T, H, W)."""
    places = positions_of(size)
    check_mask(name, mask, " ".join(places), places, **beside)


def as_list(tokens: Tensor) -> Tensor:
    """Return features (B, T, D, H, W) as tokens (B, T, H * W, D), and a list unchanged."""
    return rearrange(tokens, "b t d h w -> b t (h w) d") if tokens.ndim == 5 else tokens
