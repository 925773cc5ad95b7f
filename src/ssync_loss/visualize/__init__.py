"""Pictures of both maps and of the student on every patch, as uint8 tensors.

:func:`overlay` and :func:`outline` take and return videos (B, T, 3, h, w), so that one can be drawn over the other.
:func:`filmstrip` puts frames side by side. :func:`panel` draws a complete picture::

    picture = panel(video, enc_logits, dec_logits)  # (B, 3, height, width), uint8

    writer.add_images("ssync", picture, step)  # TensorBoard
    writer.add_video("ssync/merged", overlay(video, labels.enc_labels), step)
    run.log({"ssync": wandb.Image(picture[0].permute(1, 2, 0).numpy())})  # W&B
    PIL.Image.fromarray(picture[0].permute(1, 2, 0).numpy()).save("ssync.png")
    plt.imsave("ssync.png", picture[0].permute(1, 2, 0).numpy())

Call ``.cpu()`` first if the picture is on an accelerator.

``ROLE_COLORS`` is the legend of :func:`roles`, and ``PANEL_ROWS`` names the rows of a panel. A color is (red, green,
blue):

>>> ENCODER_TAUGHT, DECODER_TAUGHT, BOTH_TAUGHT, NOBODY_TAUGHT, INVALID
((58, 134, 255), (255, 146, 20), (214, 70, 196), (150, 150, 150), (24, 24, 24))
"""

from ssync_loss.visualize.colors import (
    BOTH_TAUGHT,
    DECODER_TAUGHT,
    ENCODER_TAUGHT,
    INVALID,
    NOBODY_TAUGHT,
    ROLE_COLORS,
    palette,
)
from ssync_loss.visualize.composition import PANEL_ROWS, panel
from ssync_loss.visualize.pictures import filmstrip, histogram, outline, overlay, roles

__all__ = [
    "BOTH_TAUGHT",
    "DECODER_TAUGHT",
    "ENCODER_TAUGHT",
    "INVALID",
    "NOBODY_TAUGHT",
    "PANEL_ROWS",
    "ROLE_COLORS",
    "filmstrip",
    "histogram",
    "outline",
    "overlay",
    "palette",
    "panel",
    "roles",
]
