"""The method in one figure: ``python examples/method_figure.py`` writes examples/method.svg.

It shows the middle frame of a synthetic clip. Two slots share the disc. The encoder's map is noisy. The decoder's map
is blurred. The library computes labels, merging and regions. The figure has a white background, also in dark mode.
"""

from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ssync_loss.functional import pseudo_labels
from ssync_loss.visualize import BOTH_TAUGHT, DECODER_TAUGHT, ENCODER_TAUGHT, NOBODY_TAUGHT

HEIGHT, WIDTH = 14, 27
# background, the disc twice, the box
SLOT_COLORS = torch.tensor([[205, 212, 222], [38, 166, 118], [243, 205, 60], [160, 92, 214]])
# index: 1 if the encoder is taught, plus 2 if the decoder is taught
ROLES = [
    (NOBODY_TAUGHT, "nobody"),
    (ENCODER_TAUGHT, "decoder teaches encoder"),
    (DECODER_TAUGHT, "encoder teaches decoder"),
    (BOTH_TAUGHT, "both"),
]
ROLE_COLORS = torch.tensor([color for color, _ in ROLES])
# in pixels; a phone is 360 pixels wide
CELL, MARGIN, ROW = 6, 12, 110
LEFT, RIGHT = MARGIN, 360 - MARGIN - CELL * WIDTH


def maps() -> tuple[Tensor, Tensor]:
    """Make the logits of both maps: (1, 3, S, H, W)."""
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    disc = ((y - 6.5).square() + (x - 6.5).square() < 25).float()
    box = (((y - 7).abs() <= 3) & ((x - 19).abs() <= 3)).float()
    inside = torch.stack([1 - disc - box, disc, disc, box])

    enc = 4 * inside + 0.3 * torch.rand(3, *inside.shape, generator=torch.Generator().manual_seed(0))
    # one slot leans toward the lower half of the disc, the other toward the upper half
    tilt = 0.1 * disc * (y - 6.0)
    enc += torch.stack([0 * tilt, tilt, -tilt, 0 * tilt])
    # single patches get a wrong slot
    for slot, row, column in ((0, 6, 6), (3, 2, 24), (0, 7, 19)):
        enc[1, slot, row, column] += 6

    # the decoder's masks are blurred
    brush = torch.tensor([1.0, 2.0, 3.0, 4.0, 3.0, 2.0, 1.0]) / 16
    around = F.pad(inside[:, None], (3, 3, 3, 3), mode="replicate")
    blurred = F.conv2d(F.conv2d(around, brush.view(1, 1, 1, 7)), brush.view(1, 1, 7, 1))[:, 0]
    dec = 6 * blurred + torch.tensor([-0.9, 0.0, -0.5, 0.0])[:, None, None]
    return enc[None], dec.expand(1, 3, -1, -1, -1)


def patches(colors: Tensor, x: int, y: int) -> str:
    """Draw colors (H, W, 3) as squares, with one path per color."""
    paths: dict[tuple[int, ...], str] = {}
    for row, line in enumerate(colors.tolist()):
        column = 0
        for color, run in groupby(map(tuple, line)):
            length = len(list(run))
            strip = f"M{x + CELL * column} {y + CELL * row}h{CELL * length}v{CELL}h-{CELL * length}z"
            paths[color] = paths.get(color, "") + strip
            column += length
    return "\n".join(f'<path fill="rgb{color}" d="{path}"/>' for color, path in paths.items())


def text(x: int, y: int, words: str, *, weight: str = "normal") -> str:
    """Write words below y."""
    return f'<text x="{x}" y="{y + 10}" font-weight="{weight}">{words}</text>'


def figure() -> str:
    """Draw the figure as SVG."""
    enc, dec = maps()
    unmerged = pseudo_labels(enc, dec, merge_threshold=None)
    labels = pseudo_labels(enc, dec, merge_threshold=0.6)

    def mixed(logits: Tensor) -> Tensor:
        colors = torch.einsum("shw,sc->hwc", logits[0, 1].softmax(0), SLOT_COLORS.float())
        # fewer colors make a smaller file
        return colors.long() // 6 * 6

    def slots(one: Tensor) -> Tensor:
        return SLOT_COLORS[one[0, 1]]

    def region(where: Tensor, one: Tensor, role: int) -> Tensor:
        pale = 255 - (255 - slots(one)) // 3
        return torch.where(where[0, 1, :, :, None], ROLE_COLORS[role], pale)

    rows = [
        ("Two maps: encoder", mixed(enc), "decoder", mixed(dec)),
        ("1. Labels: e", slots(unmerged.enc_labels), "d", slots(unmerged.dec_labels)),
        ("2. Merged: e", slots(labels.enc_labels), "d", slots(labels.dec_labels)),
        (
            "3. Regions: boundary of e",
            region(labels.boundary, labels.enc_labels, 2),
            "interior of d",
            region(labels.interior, labels.dec_labels, 1),
        ),
    ]
    drawn = []
    y = MARGIN
    for left, of_encoder, right, of_decoder in rows:
        drawn += [text(LEFT, y, left, weight="bold"), text(RIGHT, y, right)]
        drawn += [patches(of_encoder, LEFT, y + 16), patches(of_decoder, RIGHT, y + 16)]
        y += ROW
    taught = labels.interior[0, 1].long() + 2 * labels.boundary[0, 1].long()
    drawn += [text(LEFT, y, "4. Who teaches whom", weight="bold"), patches(ROLE_COLORS[taught], LEFT, y + 16)]
    for line, (color, words) in enumerate(ROLES):
        top = y + 16 + 18 * line
        drawn += [
            f'<rect x="{RIGHT}" y="{top}" width="12" height="12" fill="rgb{color}"/>',
            text(RIGHT + 18, top, words),
        ]
    size, font = f"0 0 360 {y + ROW}", 'font-family="sans-serif" font-size="12"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" {font}>',
            "<title>Who teaches whom, from two maps in four steps</title>",
            '<rect width="100%" height="100%" rx="8" fill="white"/>',
            '<g fill="#1f2328" shape-rendering="crispEdges">',
            *drawn,
            "</g>",
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("method.svg").write_text(figure(), encoding="utf-8")
