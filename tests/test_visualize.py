"""Pictures against hand computations, pixel by pixel, and properties of all pictures."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from refusals import refuses
from ssync_loss.functional import pseudo_labels
from ssync_loss.ssync.types import PseudoLabels
from ssync_loss.testing import SSyncCase, poison, ssync_cases
from ssync_loss.visualize import (
    BOTH_TAUGHT,
    DECODER_TAUGHT,
    ENCODER_TAUGHT,
    INVALID,
    NOBODY_TAUGHT,
    PANEL_ROWS,
    ROLE_COLORS,
    filmstrip,
    histogram,
    outline,
    overlay,
    palette,
    panel,
    roles,
)

few = settings(max_examples=20, deadline=None)


def noise_video(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def noise_maps(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def cell(picture: Tensor, line: int, frame: int, *, height: int, width: int, gap: int) -> Tensor:
    """Return one frame of one row of a panel: (B, 3, height, width)."""
    top, left = line * (height + gap), frame * (width + gap)
    return picture[..., top : top + height, left : left + width]


# --- colors ---


def test_every_slot_has_a_distinct_color() -> None:
    colors = palette(256)
    assert colors.dtype == torch.uint8
    assert colors.shape == (256, 3)
    assert len({tuple(color) for color in colors.tolist()}) == 256


@pytest.mark.parametrize(("num_slots", "apart"), [(9, 75), (12, 70), (16, 60), (24, 45)])
def test_colors_of_a_typical_model_are_far_apart(num_slots: int, apart: float) -> None:
    colors = palette(num_slots).double()
    between = torch.cdist(colors, colors)[~torch.eye(num_slots, dtype=torch.bool)]
    assert between.min() >= apart


def test_a_slot_keeps_its_color_when_slots_are_added() -> None:
    for fewer, more in pairwise([1, 2, 7, 12, 13, 24, 256]):
        assert torch.equal(palette(more)[:fewer], palette(fewer))


def test_roles_have_five_clear_colors() -> None:
    colors = torch.tensor(list(ROLE_COLORS.values())).double()
    assert list(ROLE_COLORS.values()) == [ENCODER_TAUGHT, DECODER_TAUGHT, BOTH_TAUGHT, NOBODY_TAUGHT, INVALID]
    assert torch.cdist(colors, colors)[~torch.eye(5, dtype=torch.bool)].min() >= 100


# --- overlay ---


def test_overlay_mixes_video_and_color_by_alpha() -> None:
    labels = torch.tensor([[[[0, 1]]]])
    video = torch.full((1, 1, 3, 1, 2), 100, dtype=torch.uint8)
    assert torch.equal(overlay(video, labels, alpha=0.0), video)
    full = overlay(video, labels, alpha=1.0)
    assert full[0, 0, :, 0].T.tolist() == palette(2).tolist()
    quarter = overlay(video, labels, alpha=0.25)[0, 0, :, 0, 0]
    assert quarter.tolist() == [round(75 + part / 4) for part in palette(1)[0].tolist()]


def test_patches_are_enlarged_by_nearest_neighbor() -> None:
    labels = torch.tensor([[[[0, 1], [2, 3]]]])
    picture = overlay(torch.zeros(1, 1, 3, 4, 5), labels, alpha=1.0)
    # two patches fill five pixels: pixel i shows patch i * 2 // 5
    names = [[0, 0, 0, 1, 1]] * 2 + [[2, 2, 2, 3, 3]] * 2
    assert torch.equal(picture[0, 0].permute(1, 2, 0), palette(4)[torch.tensor(names)])


def test_floating_videos_are_clamped_and_uint8_videos_unchanged() -> None:
    video = torch.tensor([-1.0, 0.0, 0.5, 1.0, 7.0, math.nan, math.inf]).expand(1, 1, 3, 1, 7)
    labels = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    assert overlay(video, labels, alpha=0.0)[0, 0, 0, 0].tolist() == [0, 0, 128, 255, 255, 0, 255]
    everything = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(1, 1, 3, 16, 16)
    assert torch.equal(overlay(everything, labels, alpha=0.0), everything)
    half = noise_video(1, 1, 3, 4, 4).half()
    assert torch.equal(overlay(half, labels), overlay(half.float(), labels))


def test_invalid_patches_are_dark() -> None:
    labels = torch.zeros(1, 2, 1, 2, dtype=torch.int64)
    video = torch.ones(1, 2, 3, 1, 2)
    frames = overlay(video, labels, alpha=1.0, valid=torch.tensor([[True, False]]))
    assert frames[0, 0, :, 0, 0].tolist() == palette(1)[0].tolist()
    assert frames[0, 1, :, 0, 1].tolist() == list(INVALID)


def test_labels_beyond_the_palette_repeat_colors() -> None:
    video = torch.zeros(1, 1, 3, 1, 1)
    first, later = torch.tensor([[[[3]]]]), torch.tensor([[[[259]]]])
    assert torch.equal(overlay(video, first), overlay(video, later))


# --- outlines ---


def test_an_outline_is_the_closed_rim_of_a_region() -> None:
    region = torch.zeros(1, 1, 1, 2, dtype=torch.bool)
    region[..., 0] = True
    picture = outline(torch.zeros(1, 1, 3, 5, 10), region, (9, 8, 7))
    rim = [[9, 9, 9, 9, 9], [9, 0, 0, 0, 9], [9, 0, 0, 0, 9], [9, 0, 0, 0, 9], [9, 9, 9, 9, 9]]
    assert picture[0, 0, 0].tolist() == [line + [0] * 5 for line in rim]
    assert (picture[0, 0, :, 0, 0]).tolist() == [9, 8, 7]
    # a wider line grows inward, and an empty region has no line
    wide = outline(torch.zeros(1, 1, 3, 6, 6), region[..., :1], width=2)[0, 0, 0]
    assert (wide == 255).sum() == 36 - 4
    assert (wide[2:4, 2:4] == 0).all()
    assert not outline(torch.zeros(1, 1, 3, 5, 10), ~region & region).any()


# --- roles ---


def test_roles_show_the_taught_maps() -> None:
    labels = torch.zeros(1, 1, 1, 5, dtype=torch.int64)
    boundary = torch.tensor([[[[False, True, True, False, False]]]])
    interior = torch.tensor([[[[True, False, True, False, False]]]])
    pseudo = PseudoLabels(labels, labels, boundary, interior, torch.zeros(1, 1, dtype=torch.int64))
    valid = torch.tensor([[[[True, True, True, True, False]]]])
    wanted = [ENCODER_TAUGHT, DECODER_TAUGHT, BOTH_TAUGHT, NOBODY_TAUGHT, INVALID]
    assert roles(pseudo, valid=valid)[0, 0, :, 0].T.tolist() == [list(color) for color in wanted]
    assert roles(pseudo)[0, 0, :, 0, 4].tolist() == list(NOBODY_TAUGHT)


# --- strips and panels ---


def test_a_filmstrip_lays_frames_side_by_side() -> None:
    video = noise_video(2, 3, 3, 4, 5)
    strip = filmstrip(video, gap=2)
    assert strip.dtype == torch.uint8
    assert strip.shape == (2, 3, 4, 3 * 5 + 2 * 2)
    assert torch.equal(strip[..., 7:12], (video[:, 1] * 255).round().to(torch.uint8))
    assert (strip[..., 5:7] == 255).all()
    assert filmstrip(video).shape == (2, 3, 4, 15)
    assert torch.equal(filmstrip(video[:, :1], gap=9), filmstrip(video[:, :1]))


def test_a_histogram_has_square_root_bars_and_a_line() -> None:
    picture = histogram(torch.tensor([16, 4, 0, 1], dtype=torch.uint8), at=0.5, height=8, width=2)
    blue, orange = (torch.tensor(one, dtype=torch.uint8)[:, None] for one in (ENCODER_TAUGHT, DECODER_TAUGHT))
    # the line at 0.5 is the first column of the third bin
    assert (picture[:, :, 4] == orange).all()
    filled = (picture == blue.unsqueeze(2)).all(0)
    assert filled.sum(0).tolist() == [8, 8, 4, 4, 0, 0, 2, 2]
    # bars start at the bottom
    assert (filled.int().diff(dim=0) >= 0).all()
    assert (picture[:, ~filled][:, picture[1, ~filled] != DECODER_TAUGHT[1]] == 255).all()
    assert (histogram(torch.zeros(3, dtype=torch.int64)) == 255).all()
    assert (histogram(torch.ones(3, dtype=torch.int64), at=1.0)[:, :, -1] == orange).all()


def test_a_histogram_names_bad_arguments() -> None:
    refuses(TypeError, "`counts` must hold integers; got torch.float32.", histogram, torch.ones(3))
    refuses(ValueError, "`counts` must have N >= 1; got N=0.", histogram, torch.ones(0, dtype=torch.int64))
    refuses(ValueError, "`counts` must be at least 0; got -1", histogram, torch.tensor([-1]))
    refuses(ValueError, "`at` must be within [0.0, 1.0]; got 2.", histogram, torch.tensor([1]), at=2)


def test_a_panel_has_a_row_per_view_and_a_column_per_frame() -> None:
    video, (enc, dec) = noise_video(2, 3, 3, 8, 12), noise_maps(2, 3, 4, 4, 6)
    labels = pseudo_labels(enc, dec, merge_threshold=0.3)
    picture = panel(video, enc, dec, labels=labels, alpha=1.0, gap=1)
    assert picture.dtype == torch.uint8
    assert picture.shape == (2, 3, 5 * 8 + 4, 3 * 12 + 2)
    assert picture.is_contiguous()
    for t in range(3):
        cells = [cell(picture, line, t, height=8, width=12, gap=1) for line in range(len(PANEL_ROWS))]
        frame = video[:, t : t + 1]
        assert torch.equal(cells[0], (frame[:, 0] * 255).round().to(torch.uint8))
        for view, shown in ((enc, cells[1]), (dec, cells[2])):
            assert torch.equal(shown, overlay(frame, view[:, t : t + 1].argmax(2), alpha=1.0)[:, 0])
        merged = overlay(frame, labels.enc_labels[:, t : t + 1], alpha=1.0)
        differs = (labels.enc_labels != labels.dec_labels)[:, t : t + 1]
        assert torch.equal(cells[3], outline(merged, differs)[:, 0])
        taught = roles(labels)[:, t].repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert torch.equal(cells[4], taught)
    # white lines between rows and between columns
    for line in range(1, 5):
        assert (picture[:, :, line * 9 - 1] == 255).all()
    for t in range(1, 3):
        assert (picture[:, :, :, t * 13 - 1] == 255).all()


def test_a_panel_computes_missing_labels() -> None:
    video, (enc, dec) = noise_video(2, 2, 3, 8, 8), noise_maps(2, 2, 5, 4, 4)
    for threshold in (0.2, None):
        labels = pseudo_labels(enc, dec, merge_threshold=threshold)
        assert torch.equal(panel(video, enc, dec, merge_threshold=threshold), panel(video, enc, dec, labels=labels))
    assert not torch.equal(panel(video, enc, dec, merge_threshold=0.2), panel(video, enc, dec, merge_threshold=None))


def test_scale_enlarges_every_pixel_of_the_video() -> None:
    video, maps = noise_video(1, 2, 3, 6, 9), noise_maps(1, 2, 3, 3, 3)
    small, large = panel(video, *maps, gap=0), panel(video, *maps, gap=0, scale=3)
    assert large.shape == (1, 3, 5 * 18, 2 * 27)
    # outlines scale with the frames, like all other pixels
    enlarged = small.repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert torch.equal(large, enlarged)


def test_overlays_have_a_gray_video() -> None:
    video, maps = noise_video(1, 1, 3, 6, 6), noise_maps(1, 1, 3, 3, 3)
    picture = panel(video, *maps, alpha=0.0, gap=0)
    under = cell(picture, 1, 0, height=6, width=6, gap=0)[0]
    assert torch.equal(under[0], under[1])
    assert torch.equal(under[0], under[2])
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    levels = (video[0, 0] * 255).round()
    assert (under[0].float() - (levels * weights).sum(0)).abs().max() <= 0.51


@few
@given(ssync_cases(), st.sampled_from([math.nan, math.inf, 7.0]))
def test_values_of_invalid_cells_do_not_show(case: SSyncCase, value: float) -> None:
    enc, dec, valid, slot_mask = case
    video = noise_video(*enc.shape[:2], 3, *enc.shape[3:])
    hidden = [poison(logits, valid=valid, slot_mask=slot_mask, value=value) for logits in (enc, dec)]
    assert torch.equal(
        panel(video, enc, dec, valid=valid, slot_mask=slot_mask),
        panel(video, *hidden, valid=valid, slot_mask=slot_mask),
    )


def test_a_panel_accepts_flat_maps_probabilities_and_another_decoder_grid() -> None:
    video, (enc, dec) = noise_video(1, 2, 3, 8, 12), noise_maps(1, 2, 3, 4, 6)
    labels = pseudo_labels(enc, dec)
    wanted = panel(video, enc, dec, labels=labels)
    assert torch.equal(panel(video, enc.flatten(3), dec.flatten(3), labels=labels, grid=(4, 6)), wanted)
    assert torch.equal(panel(video, enc.softmax(2), dec.softmax(2), labels=labels, kind="probs"), wanted)
    coarse = torch.nn.functional.avg_pool2d(dec.flatten(0, 1), 2)[None]
    assert panel(video, enc, coarse).shape == wanted.shape
    # frames smaller than the maps, one frame, one slot
    assert panel(video[:, :1, :, :2, :3], enc[:, :1, :1], dec[:, :1, :1], gap=0).shape == (1, 3, 10, 3)


def test_pictures_have_no_graph_and_change_no_input() -> None:
    video, (enc, dec) = noise_video(1, 2, 3, 8, 8).requires_grad_(), noise_maps(1, 2, 3, 4, 4)
    before = [one.detach().clone() for one in (video, enc, dec)]
    picture = panel(video, enc.requires_grad_(), dec.requires_grad_())
    assert not picture.requires_grad
    for one, other in zip((video, enc, dec), before, strict=True):
        assert torch.equal(one, other)


def test_no_tensor_is_read_on_the_host() -> None:
    with FakeTensorMode():
        video, valid = torch.rand(2, 3, 3, 20, 24), torch.rand(2, 3, 5, 6) > 0.2
        enc, dec = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 7, 9)
        assert panel(video, enc, dec, valid=valid, scale=2).shape == (2, 3, 5 * 40 + 8, 3 * 48 + 4)


# --- errors ---

VIDEO, MAPS = torch.zeros(2, 3, 3, 8, 8), torch.zeros(2, 3, 4, 4, 4)
LABELS = torch.zeros(2, 3, 4, 4, dtype=torch.int64)
PSEUDO = PseudoLabels(LABELS, LABELS, LABELS == 0, LABELS == 0, torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("call", "given", "error", "message"),
    [
        (palette, {"num_slots": 257}, ValueError, "`num_slots` must be within [1, 256]; got 257."),
        (palette, {"num_slots": 3.0}, TypeError, "`num_slots` must be an integer; got float."),
        (overlay, {"video": VIDEO.movedim(2, -1)}, ValueError, "`video` must have shape (B, T, C=3, h, w); got"),
        (overlay, {"labels": LABELS[:, :2]}, ValueError, "`labels` must have shape (B=2, T=3, H, W); got"),
        (overlay, {"labels": LABELS[:, :, :0]}, ValueError, "`labels` must have H >= 1; got H=0."),
        (overlay, {"labels": LABELS - 1}, ValueError, "`labels` must be at least 0; got -1."),
        (overlay, {"alpha": 1.5}, ValueError, "`alpha` must be within [0.0, 1.0]; got 1.5."),
        (overlay, {"valid": LABELS[:, :2, 0, 0] == 0}, ValueError, "`valid` must have shape (B=2, T=3); got (2, 2)."),
        (filmstrip, {"video": VIDEO[:, :, :, :0]}, ValueError, "`video` must have h >= 1; got h=0."),
        (filmstrip, {"gap": -1}, ValueError, "`gap` must be at least 0; got -1."),
        (outline, {"color": (1, 2)}, ValueError, "`color` must have three parts: red, green and blue; got (1, 2)."),
        (outline, {"color": (1, 2, 256)}, ValueError, "`color` must be within [0, 255]; got 256."),
        (outline, {"color": None}, TypeError, "`color` must be three integers: red, green and blue; got NoneType."),
        (outline, {"color": "red"}, TypeError, "`color` must be an integer; got str."),
        (outline, {"width": 0}, ValueError, "`width` must be at least 1; got 0."),
        (panel, {"video": VIDEO[:, :2]}, ValueError, "`video` must have shape (B=2, T=3, C=3, h, w); got"),
        (panel, {"scale": 0}, ValueError, "`scale` must be at least 1; got 0."),
    ],
)
def test_errors_name_the_argument(call: Any, given: dict[str, Any], error: type[Exception], message: str) -> None:
    usual: dict[Any, dict[str, Any]] = {
        overlay: {"video": VIDEO, "labels": LABELS},
        outline: {"video": VIDEO, "region": LABELS == 0},
        filmstrip: {"video": VIDEO},
        panel: {"video": VIDEO, "enc_logits": MAPS, "dec_logits": MAPS},
    }
    refuses(error, message, call, **usual.get(call, {}) | given)


def test_labels_and_their_fields_are_named() -> None:
    refuses(TypeError, "`labels` must be PseudoLabels; got Tensor.", roles, LABELS)
    refuses(TypeError, "`labels` must be PseudoLabels; got tuple.", panel, VIDEO, MAPS, MAPS, labels=tuple(PSEUDO))
    small = PSEUDO._replace(interior=torch.ones(2, 3, dtype=torch.bool), dec_labels=LABELS[:, :2])
    refuses(ValueError, "`labels.interior` must have shape (B=2, T=3, H=4, W=4); got (2, 3).", roles, small)
    message = "`labels.dec_labels` must have shape (B=2, T=3, H=4, W=4); got (2, 2, 4, 4)."
    refuses(ValueError, message, panel, VIDEO, MAPS, MAPS, labels=small)
