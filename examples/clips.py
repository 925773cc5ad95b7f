"""Your own clips: video files and folders of frames, cut to the length and size the example trains on."""

import re
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"}
FRAME_SUFFIXES = {".png", ".jpg", ".jpeg"}


class Clips(NamedTuple):
    """Clips of one length and size.

    Shape:
        video: (B, T, 3, H, W), float32 in [0, 1].
        sources: B names, the file or folder that each clip was cut from.
    """

    video: Tensor
    sources: list[str]


def load_clips(
    directory: str | Path, *, match: str = "*", num_frames: int = 4, size: int = 48, stride: int = 1
) -> Clips:
    """Read every video below a directory and cut it into clips of consecutive frames.

    A video is a file (mp4, m4v, mov, mkv, webm, avi; needs PyAV) or a folder that holds frames (png, jpg), in
    the order of the numbers in their names. Each frame is cropped to its central square and resized to
    size x size. What is left at the end of a video, shorter than a clip, is dropped.

    Args:
        directory: where to look, at any depth.
        match: pattern that the name of a video file or of a folder of frames must match.
        num_frames: T.
        size: H = W.
        stride: take every stride-th frame.

    Raises:
        ValueError: if there is no such directory, no video in it, or none long enough for a clip.
        ImportError: if a video file is found and PyAV is missing.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"`clips` must be a directory; got {str(root)!r}.")
    videos = [path for path in _find_videos(root) if fnmatch(path.name, match)]
    if not videos:
        raise ValueError(
            f"`clips` must hold videos ({', '.join(sorted(VIDEO_SUFFIXES))}) or folders of frames "
            f"({', '.join(sorted(FRAME_SUFFIXES))}) named like {match!r}; found none in {str(root)!r}."
        )
    chunks, sources = [], []
    for path in videos:
        frames = _read_video(path, size, stride) if path.is_file() else _read_folder(path, size, stride)
        count = len(frames) // num_frames
        if count == 0:
            warnings.warn(f"{path} is skipped: {len(frames)} frames, a clip takes {num_frames}.", stacklevel=2)
            continue
        chunks.append(rearrange(frames[: count * num_frames], "(b t) c h w -> b t c h w", t=num_frames))
        sources += [str(path.relative_to(root))] * count
    if not chunks:
        raise ValueError(f"`clips` must hold a video of at least {num_frames} frames; found none in {str(root)!r}.")
    return Clips(torch.cat(chunks), sources)


def _find_videos(root: Path) -> list[Path]:
    """List video files and folders of frames, the root itself included."""
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    with_frames = [folder for folder in folders if any(_frames_in(folder))]
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES]
    return sorted([*files, *with_frames], key=_by_number)


def _frames_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in FRAME_SUFFIXES)


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Sort key by which frame_2 comes before frame_10."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _read_folder(folder: Path, size: int, stride: int) -> Tensor:
    from PIL import Image

    frames = []
    for path in sorted(_frames_in(folder), key=_by_number)[::stride]:
        with Image.open(path) as image:
            frames.append(_fit(np.asarray(image.convert("RGB")), size))
    return torch.stack(frames)


def _read_video(path: Path, size: int, stride: int) -> Tensor:
    try:
        import av
    except ImportError as error:
        raise ImportError(f"reading {path} needs PyAV: pip install 'ssync-loss[examples]'.") from error

    frames = []
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            # resized at once: a long video in full size would not fit the memory
            if number % stride == 0:
                frames.append(_fit(frame.to_ndarray(format="rgb24"), size))
    return torch.stack(frames) if frames else torch.empty(0, 3, size, size)


def _fit(picture: np.ndarray, size: int) -> Tensor:
    """Crop (H, W, 3) bytes to the central square and resize it to (3, size, size) in [0, 1]."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = torch.tensor(picture[top : top + side, left : left + side]).movedim(-1, 0).float() / 255
    return F.interpolate(square[None], size=(size, size), mode="bilinear", antialias=True)[0].clamp(0, 1)
