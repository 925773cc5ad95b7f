"""Dense contrastive alignment: all patches of a window against all others, quadratic in their number."""

from typing import Any

from torch import Tensor, nn

from ssync_loss._checks import (
    check_floating,
    check_int,
    check_integer,
    check_not_empty,
    check_number,
    check_same_device,
    check_shape,
)
from ssync_loss.methods.srl._dense import align, decoder_term, encoder_term


def dense_decoder_alignment_loss(
    features: Tensor,
    anchors: Tensor,
    enc_labels: Tensor,
    *,
    group_frames: int | None = 2,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
    chunk_size: int | None = None,
) -> Tensor:
    """Draw what the decoder reconstructs at a patch to the anchors of the patches that the encoder groups with it.

    Within a window of ``group_frames`` frames, M patches, with x and y the features and anchors at length 1:
    ``P_i = softmax_j(x_i y_j / temperature)`` and ``loss = (temperature / base_temperature) * mean over i of
    -(mean over j with i's label of log P_ij + log P_ii) / 2``. The patch itself is one of its label's.

    Time is quadratic in M: a product of M x M x D numbers, and a second one for the gradient, which is formed in
    the forward. Memory is the M x M scores of all windows, or ``chunk_size`` x M scores with the same value and
    gradient. A zero vector has cosine 0 with everything and gets no gradient. No clips give exactly 0, attached
    to the graph.

    Shape:
        features, anchors: (B, T, D, H, W). enc_labels: (B, T, H, W), any integers. Returns a scalar in float32, or
        float64 if the features or the anchors are.

    Args:
        features: reconstructed features; the only argument that gets a gradient.
        anchors: features of the backbone.
        enc_labels: hard labels of the encoder's map.
        group_frames: frames of a window, which divide T; None for the whole clip. Images need 1 or None.
        temperature: of the softmax, above 0.
        base_temperature: what the loss is scaled by, above 0.
        chunk_size: rows of scores that are held at once, over all windows; None for all.

    Source: Seong, Moon & Heo, ICLR 2026 (arXiv:2602.03390), the decoder's deblurring.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on wrong shapes or settings.

    >>> import torch
    >>> features, labels = torch.eye(2).view(1, 1, 2, 1, 2), torch.zeros(1, 1, 1, 2, dtype=torch.int64)
    >>> # P_ii = e / (e + 1) = 0.7311, P_ij = 0.2689: -(3/4 log P_ii + 1/4 log P_ij) = 0.3133 + 1/4
    >>> loss = dense_decoder_alignment_loss(
    ...     features, features, labels, group_frames=1, temperature=1.0, base_temperature=1.0
    ... )
    >>> round(loss.item(), 4)
    0.5633
    """
    _check_settings(group_frames, 1, temperature, base_temperature, chunk_size)
    size = _check_features(features)
    check_shape("anchors", anchors, "B T D H W", **size)
    frames = _check_rest(features, anchors, "enc_labels", enc_labels, group_frames)
    return align(
        features,
        anchors,
        enc_labels,
        decoder_term(temperature=temperature),
        group_frames=frames,
        scale=temperature / base_temperature,
        chunk_size=chunk_size,
    )


def dense_encoder_alignment_loss(
    features: Tensor,
    anchors: Tensor,
    dec_labels: Tensor,
    *,
    group_frames: int | None = 2,
    top_k: int = 8,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
    chunk_size: int | None = None,
) -> Tensor:
    """Draw the encoder's features of patches together that look alike or that the decoder groups.

    Within a window of ``group_frames`` frames, M patches, with x the features at length 1:
    ``P_i = softmax_{j != i}(x_i x_j / temperature)`` and ``loss = (temperature / base_temperature) * mean over i of
    -(mean over i's neighbors of log P_ij + mean over j != i with i's label of log P_ij) / 2``. Neighbors are the
    ``top_k * group_frames`` patches whose anchors have the largest cosines with i's, all that tie with the last
    one included, and i itself, which is among them, taken out. A mean over nothing is 0.

    Time is quadratic in M: two products of M x M x D numbers and two more for the gradient, which is formed in
    the forward. Memory is two maps of M x M scores of all windows, or of ``chunk_size`` x M with the same value
    and gradient. A zero vector has cosine 0 with everything and gets no gradient. No clips, and windows of one
    patch, give exactly 0, attached to the graph.

    Shape:
        features: (B, T, D, H, W). anchors: (B, T, C, H, W); the backbone need not have the features' channels.
        dec_labels: (B, T, H, W), any integers. Returns a scalar in float32, or float64 if the features or the
        anchors are.

    Args:
        features: the encoder's features, projected; the only argument that gets a gradient.
        anchors: features of the backbone, for finding neighbors.
        dec_labels: hard labels of the decoder's map.
        group_frames: frames of a window, which divide T; None for the whole clip. Images need 1 or None.
        top_k: neighbors per frame of the window, the patch itself among them.
        temperature: of the softmax, above 0.
        base_temperature: what the loss is scaled by, above 0.
        chunk_size: rows of scores that are held at once, over all windows; None for all.

    Source: Seong, Moon & Heo, ICLR 2026 (arXiv:2602.03390), the encoder's denoising.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on wrong shapes or settings, or more neighbors than patches.

    >>> import torch
    >>> features = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).view(1, 1, 2, 1, 3)
    >>> labels = torch.arange(3).view(1, 1, 1, 3)  # no two patches share one
    >>> # two alike, each the other's neighbor: -log(e / (e + 1)) / 2 = 0.1566; the third's tie: log 2 / 2 = 0.3466
    >>> loss = dense_encoder_alignment_loss(
    ...     features, features, labels, group_frames=1, top_k=2, temperature=1.0, base_temperature=1.0
    ... )
    >>> round(loss.item(), 4)  # (0.1566 + 0.1566 + 0.3466) / 3
    0.2199
    """
    _check_settings(group_frames, top_k, temperature, base_temperature, chunk_size)
    size = _check_features(features)
    check_shape("anchors", anchors, "B T C H W", **{axis: size[axis] for axis in "BTHW"})
    frames = _check_rest(features, anchors, "dec_labels", dec_labels, group_frames)
    num_patches = frames * size["H"] * size["W"]
    if top_k * frames > num_patches:
        raise ValueError(
            f"`top_k` must be at most {num_patches // frames}, the patches of a frame; got {top_k}, "
            f"which asks for {top_k * frames} neighbors among the {num_patches} patches of a window."
        )
    return align(
        features,
        anchors,
        dec_labels,
        encoder_term(temperature=temperature, num_neighbors=top_k * frames),
        group_frames=frames,
        scale=temperature / base_temperature,
        chunk_size=chunk_size,
    )


class DenseDecoderAlignmentLoss(nn.Module):
    """Module of :func:`dense_decoder_alignment_loss`: the encoder's labels align what the decoder reconstructs.

    ``forward(features, anchors, enc_labels)``.

    Source: Seong, Moon & Heo, ICLR 2026 (arXiv:2602.03390), the decoder's deblurring.

    >>> import torch
    >>> features, labels = torch.eye(2).view(1, 1, 2, 1, 2), torch.zeros(1, 1, 1, 2, dtype=torch.int64)
    >>> criterion = DenseDecoderAlignmentLoss(group_frames=None, temperature=1.0, base_temperature=1.0)
    >>> round(criterion(features, features, labels).item(), 4)
    0.5633
    """

    def __init__(
        self,
        *,
        group_frames: int | None = 2,
        temperature: float = 0.1,
        base_temperature: float = 0.07,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        _check_settings(group_frames, 1, temperature, base_temperature, chunk_size)
        self.settings: dict[str, Any] = {
            "group_frames": group_frames,
            "temperature": temperature,
            "base_temperature": base_temperature,
            "chunk_size": chunk_size,
        }

    def forward(self, features: Tensor, anchors: Tensor, enc_labels: Tensor) -> Tensor:
        """Return the decoder's term; see :func:`dense_decoder_alignment_loss`."""
        return dense_decoder_alignment_loss(features, anchors, enc_labels, **self.settings)

    def extra_repr(self) -> str:
        """Show the settings."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class DenseEncoderAlignmentLoss(nn.Module):
    """Module of :func:`dense_encoder_alignment_loss`: likeness and the decoder's labels align the encoder's features.

    ``forward(features, anchors, dec_labels)``.

    Source: Seong, Moon & Heo, ICLR 2026 (arXiv:2602.03390), the encoder's denoising.

    >>> import torch
    >>> features = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).view(1, 1, 2, 1, 3)
    >>> criterion = DenseEncoderAlignmentLoss(group_frames=None, top_k=2, temperature=1.0, base_temperature=1.0)
    >>> round(criterion(features, features, torch.arange(3).view(1, 1, 1, 3)).item(), 4)
    0.2199
    """

    def __init__(
        self,
        *,
        group_frames: int | None = 2,
        top_k: int = 8,
        temperature: float = 0.1,
        base_temperature: float = 0.07,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        _check_settings(group_frames, top_k, temperature, base_temperature, chunk_size)
        self.settings: dict[str, Any] = {
            "group_frames": group_frames,
            "top_k": top_k,
            "temperature": temperature,
            "base_temperature": base_temperature,
            "chunk_size": chunk_size,
        }

    def forward(self, features: Tensor, anchors: Tensor, dec_labels: Tensor) -> Tensor:
        """Return the encoder's term; see :func:`dense_encoder_alignment_loss`."""
        return dense_encoder_alignment_loss(features, anchors, dec_labels, **self.settings)

    def extra_repr(self) -> str:
        """Show the settings."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def _check_settings(
    group_frames: object, top_k: object, temperature: object, base_temperature: object, chunk_size: object
) -> None:
    if group_frames is not None:
        check_int("group_frames", group_frames, 1)
    check_int("top_k", top_k, 1)
    check_number("temperature", temperature, 0.0, open_low=True)
    check_number("base_temperature", base_temperature, 0.0, open_low=True)
    if chunk_size is not None:
        check_int("chunk_size", chunk_size, 1)


def _check_features(features: Tensor) -> dict[str, int]:
    size = check_shape("features", features, "B T D H W")
    check_not_empty("features", size, "T D H W")
    check_floating("features", features)
    return size


def _check_rest(features: Tensor, anchors: Tensor, name: str, labels: Tensor, group_frames: int | None) -> int:
    """Check the anchors' type, the labels and the windows; return the frames of a window."""
    check_floating("anchors", anchors)
    check_same_device("anchors", anchors, features=features)
    num_clips, num_frames, _, height, width = features.shape
    check_shape(name, labels, "B T H W", B=num_clips, T=num_frames, H=height, W=width)
    check_integer(name, labels)
    check_same_device(name, labels, features=features)
    if group_frames is None:
        return num_frames
    if num_frames % group_frames:
        raise ValueError(
            f"`group_frames` must divide the frames of a clip, T={num_frames}; got {group_frames}. "
            "group_frames=None takes the whole clip as one window."
        )
    return group_frames
