"""Dense contrastive alignment: all patches of a window against all others, in time quadratic in their number."""

from typing import Any

from torch import Tensor

from ssync_loss._inputs import check_floats, check_labels
from ssync_loss._module import LossModule
from ssync_loss._settings import COUNT, OPTIONAL_COUNT, POSITIVE, check_by
from ssync_loss.methods.srl._dense import align

_check_settings = check_by(
    group_frames=OPTIONAL_COUNT, top_k=COUNT, temperature=POSITIVE, base_temperature=POSITIVE, chunk_size=OPTIONAL_COUNT
)


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
    """Align the decoder's features of a patch with the anchors of all patches that have its label in the encoder.

    Let x and y be features and anchors at length 1, in a window of ``group_frames`` frames with M patches. Then
    ``P_i = softmax_j(x_i y_j / temperature)`` and ``loss = (temperature / base_temperature) * mean over i of
    -(mean over j with i's label of log P_ij + log P_ii) / 2``. The mean over j includes i.

    Time is quadratic in M. The forward also computes the gradient. Memory is a map of M x M scores of all windows, or
    of ``chunk_size`` x M with the same value and gradient. A zero vector has cosine 0 with all others and gets no
    gradient. Without clips the loss is exactly 0, attached to the graph.

    Args:
        features: (B, T, D, H, W), reconstructed features; the only argument that gets a gradient.
        anchors: (B, T, D, H, W), features of the backbone.
        enc_labels: (B, T, H, W), hard labels of the encoder's map, any integers.
        group_frames: frames of a window, a divisor of T; None for the whole clip. Images need 1 or None.
        temperature: temperature of the softmax, above 0.
        base_temperature: divisor of the loss, above 0.
        chunk_size: rows of scores at a time, over all windows; None for all.

    Returns: a scalar in float32, or float64 if the features or the anchors are.
    Source: Seong, Moon & Heo, ICLR 2026 (arXiv:2602.03390), the decoder's deblurring.
    Raises: TypeError on a wrong dtype, ValueError on wrong shapes or settings.

    >>> import torch
    >>> features, labels = torch.eye(2).view(1, 1, 2, 1, 2), torch.zeros(1, 1, 1, 2, dtype=torch.int64)
    >>> # P_ii = e / (e + 1) = 0.7311, P_ij = 0.2689: -(3/4 log P_ii + 1/4 log P_ij) = 0.3133 + 1/4
    >>> loss = dense_decoder_alignment_loss(
    ...     features, features, labels, group_frames=1, temperature=1.0, base_temperature=1.0
    ... )
    >>> round(loss.item(), 4)
    0.5633
    """
    knobs: dict[str, Any] = {"temperature": temperature, "base_temperature": base_temperature, "chunk_size": chunk_size}
    _check_settings(group_frames=group_frames, **knobs)
    size = check_floats("features", features, "B T D H W", filled="T D H W")
    check_floats("anchors", anchors, "B T D H W", size, features=features)
    check_labels("enc_labels", enc_labels, "B T H W", size, features=features)
    frames = _frames_of_a_window(group_frames, size["T"])
    return align(features, anchors, enc_labels, num_neighbors=None, group_frames=frames, **knobs)


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
    """Align the encoder's features of patches with similar anchors or with the same label in the decoder.

    Let x be the features at length 1, in a window of ``group_frames`` frames with M patches. Then
    ``P_i = softmax_{j != i}(x_i x_j / temperature)`` and ``loss = (temperature / base_temperature) * mean over i of
    -(mean over i's neighbors of log P_ij + mean over j != i with i's label of log P_ij) / 2``. The neighbors of i are
    the ``top_k * group_frames`` patches whose anchors have the largest cosines with the anchor of i, and all ties with
    the last of these, but not i. An empty mean is 0. Cost and edge cases are those of
    :func:`dense_decoder_alignment_loss`, but memory is two maps.

    Args:
        features: (B, T, D, H, W), projected features of the encoder; the only argument that gets a gradient.
        anchors: (B, T, C, H, W), features of the backbone, which define the neighbors.
        dec_labels: (B, T, H, W), hard labels of the decoder's map, any integers.
        group_frames: as in :func:`dense_decoder_alignment_loss`, like the last three.
        top_k: number of neighbors per frame of the window, including the patch itself.
        temperature: temperature of the softmax.
        base_temperature: divisor of the loss.
        chunk_size: rows of scores at a time.

    Returns: a scalar in float32, or float64 if the features or the anchors are.
    Source: Seong, Moon & Heo, ICLR 2026 (arXiv:2602.03390), the encoder's denoising.
    Raises: TypeError on a wrong dtype; ValueError on wrong shapes or settings, or more neighbors than patches.

    >>> import torch
    >>> features = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).view(1, 1, 2, 1, 3)
    >>> labels = torch.arange(3).view(1, 1, 1, 3)  # all labels differ
    >>> # patches 0 and 1 are neighbors: -log(e / (e + 1)) / 2 = 0.1566; for patch 2 they tie: log 2 / 2 = 0.3466
    >>> loss = dense_encoder_alignment_loss(
    ...     features, features, labels, group_frames=1, top_k=2, temperature=1.0, base_temperature=1.0
    ... )
    >>> round(loss.item(), 4)  # (0.1566 + 0.1566 + 0.3466) / 3
    0.2199
    """
    knobs: dict[str, Any] = {"temperature": temperature, "base_temperature": base_temperature, "chunk_size": chunk_size}
    _check_settings(group_frames=group_frames, top_k=top_k, **knobs)
    size = check_floats("features", features, "B T D H W", filled="T D H W")
    check_floats("anchors", anchors, "B T C H W", size, features=features)
    check_labels("dec_labels", dec_labels, "B T H W", size, features=features)
    frames = _frames_of_a_window(group_frames, size["T"])
    per_frame = size["H"] * size["W"]
    if top_k > per_frame:
        raise ValueError(
            f"`top_k` must be at most {per_frame}, the patches of a frame; got {top_k}, "
            f"which asks for {top_k * frames} neighbors among the {frames * per_frame} patches of a window."
        )
    return align(features, anchors, dec_labels, num_neighbors=top_k * frames, group_frames=frames, **knobs)


class DenseDecoderAlignmentLoss(LossModule, check=_check_settings):
    """Module of :func:`dense_decoder_alignment_loss`, with the same shapes and errors.

    ``forward(features, anchors, enc_labels)``.

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
        self.remember(locals())

    def forward(self, features: Tensor, anchors: Tensor, enc_labels: Tensor) -> Tensor:
        """Return the decoder's term; see :func:`dense_decoder_alignment_loss`."""
        return dense_decoder_alignment_loss(features, anchors, enc_labels, **self.settings)


class DenseEncoderAlignmentLoss(LossModule, check=_check_settings):
    """Module of :func:`dense_encoder_alignment_loss`, with the same shapes and errors.

    ``forward(features, anchors, dec_labels)``.

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
        self.remember(locals())

    def forward(self, features: Tensor, anchors: Tensor, dec_labels: Tensor) -> Tensor:
        """Return the encoder's term; see :func:`dense_encoder_alignment_loss`."""
        return dense_encoder_alignment_loss(features, anchors, dec_labels, **self.settings)


def _frames_of_a_window(group_frames: int | None, num_frames: int) -> int:
    if group_frames is None:
        return num_frames
    if num_frames % group_frames:
        raise ValueError(
            f"`group_frames` must divide the frames of a clip, T={num_frames}; got {group_frames}. "
            "group_frames=None takes the whole clip as one window."
        )
    return group_frames
