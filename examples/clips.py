"""Your own clips: video files and folders of frames, cut to the length and size of the training clips."""

import os
import re
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
# color range in which black is 16 of 255 and white is 235
LIMITED = 1


class Clips(NamedTuple):
    """Clips of one length and size.

    Shape:
        video: (B, T, 3, H, W), float32 in [0, 1].
        sources: B names, the file or folder that each clip was cut from.
        skipped: the files that were skipped, with reasons.
    """

    video: Tensor
    sources: list[str]
    skipped: "Skipped"


class Skipped:
    """Skipped files, by folder and reason."""

    def __init__(self, root: Path) -> None:
        self.root, self.files = root, dict[tuple[Path, str], list[Path]]()

    def add(self, path: Path, reason: str) -> None:
        """Add a file."""
        self.files.setdefault((path.parent, reason), []).append(path)

    def __len__(self) -> int:
        """Return the number of files."""
        return sum(map(len, self.files.values()))

    def lines(self) -> list[str]:
        """Return a line per folder and reason, with the first file and the number of others."""
        lines = []
        for (_, reason), (first, *others) in self.files.items():
            who = f"{shown(first.relative_to(self.root))} {f'and {len(others)} more are' if others else 'is'} skipped"
            lines.append(f"{who}: {reason}")
        return lines


def shown(path: Path) -> str:
    r"""Format a path in one line, even if its name has a line break.

    >>> shown(Path("a") / "b\n.png")
    'a/b\\n.png'
    """
    return repr(path.as_posix())[1:-1]


def load_clips(
    directory: str | Path, *, match: str = "*", num_frames: int = 4, size: int = 48, stride: int = 1
) -> Clips:
    """Read every video below a directory and cut it into clips of consecutive frames.

    A video is a file (mp4, m4v, mov, mkv, webm, avi; needs PyAV) or a folder that holds frames (png, jpg), in
    the order of the numbers in their names. Each frame is turned upright, cropped to its central square and resized to
    size x size. Gray becomes color, 16 bits keep their brightness, and transparency is ignored. The end of a video is
    dropped if it is shorter than a clip. Hidden files and files that cannot be read are skipped.

    Args:
        directory: folder to search, at any depth.
        match: pattern that the name of a video file or of a folder of frames must match.
        num_frames: T.
        size: H = W.
        stride: take every stride-th frame.

    Raises:
        ValueError: if there is no such directory, no video in it, or none that can be read and is long enough for a
            clip.
        ImportError: if a video file is found and PyAV is missing.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"`clips` must be a directory; got {str(root)!r}.")
    skipped = Skipped(root)
    videos = _find_videos(root, match, stride, skipped)
    if not videos:
        raise ValueError(
            f"`clips` must hold videos ({', '.join(sorted(VIDEO_SUFFIXES))}) or folders of frames "
            f"({', '.join(sorted(FRAME_SUFFIXES))}) named like {match!r}; found none in {_nothing_but(skipped)}."
        )
    chunks, sources = [], []
    for video, files in videos.items():
        frames: list[Tensor] = []
        num_skipped = len(skipped)
        for file in files:
            try:
                frames += [_fit(picture, size) for picture in _pictures(file, stride)]
            except ImportError:
                raise
            except Exception as error:
                # decoders may raise anything on damaged bytes
                skipped.add(file, _reason(error))
        count = len(frames) // num_frames
        if count:
            whole = torch.stack(frames[: count * num_frames])
            chunks.append(rearrange(whole, "(b t) c h w -> b t c h w", t=num_frames))
            sources += [str(video.relative_to(root))] * count
        elif frames or len(skipped) == num_skipped:
            strided = f" at stride {stride}" if stride > 1 else ""
            skipped.add(video, f"{len(frames)} frames{strided}, a clip takes {num_frames}")
    if not chunks:
        raise ValueError(
            f"`clips` must hold a video of at least {num_frames} frames; found none in {_nothing_but(skipped)}."
        )
    return Clips(torch.cat(chunks), sources, skipped)


def _nothing_but(skipped: Skipped) -> str:
    """Describe the directory and the files that were skipped in it."""
    lines = skipped.lines()
    where = repr(str(skipped.root))
    return f"{where}, where {len(skipped)} of the files cannot be used: {lines[0]}" if lines else where


def _find_videos(root: Path, match: str, stride: int, skipped: Skipped) -> dict[Path, list[Path]]:
    """Find the videos and their files, in the order of the numbers in their names.

    Links are followed, and every folder is visited once.
    """
    videos: dict[Path, list[Path]] = {}
    seen = set()

    def closed(error: OSError) -> None:
        skipped.add(Path(error.filename), _reason(error))

    for name, folders, names in os.walk(root, onerror=closed, followlinks=True):
        folder = Path(name)
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = [one for one in folders if not one.startswith(".")]
        frames = []
        for path in sorted(map(folder.joinpath, names), key=_by_number):
            suffix = path.suffix.lower()
            is_frame = suffix in FRAME_SUFFIXES and fnmatch(folder.name, match)
            if not is_frame and not (suffix in VIDEO_SUFFIXES and fnmatch(path.name, match)):
                continue
            if path.name.startswith("."):
                skipped.add(path, "hidden")
            elif not path.is_file():
                skipped.add(path, "no file")
            elif is_frame:
                frames.append(path)
            else:
                videos[path] = [path]
        if frames:
            videos[folder] = frames[::stride]
        elif not folders and folder.suffix.lower() in FRAME_SUFFIXES | VIDEO_SUFFIXES:
            skipped.add(folder, "a folder without frames")
    return dict(sorted(videos.items(), key=lambda item: _by_number(item[0])))


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Return the sort key that puts frame_2 before frame_10."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _reason(error: Exception) -> str:
    """Describe in a few words what is wrong with a file, without its name."""
    # its message begins with the whole path
    if type(error).__name__ == "UnidentifiedImageError":
        return "no image"
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(said.split())


def _pictures(path: Path, stride: int) -> Iterator[np.ndarray]:
    """Decode a picture or a video: (H, W) or (H, W, 3), of 8 bits, 16 bits or float32 in [0, 1]."""
    if path.stat().st_size == 0:
        raise ValueError("empty")
    if path.suffix.lower() in FRAME_SUFFIXES:
        yield _read_image(path)
    else:
        yield from _read_video(path, stride)


def _read_image(path: Path) -> np.ndarray:
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith(("I", "F")):
        # convert would clip values up to 65,535 at 255
        return _gray(np.asarray(image))
    if image.mode in {"P", "PA"}:
        # a palette with transparency must become RGBA before it becomes RGB
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def _gray(values: np.ndarray) -> np.ndarray:
    """Scale a picture with one channel of more than 8 bits to [0, 1].

    White is 65,535 in integers, the largest value of 16 bits. In floats it is 1, or 255 if a value exceeds 1.
    """
    largest = 65535 if values.dtype.kind in "iu" else 1 if values.max() <= 1 else 255
    if not (values.min() >= 0 and values.max() <= largest):
        raise ValueError(f"values from {values.min()} to {values.max()}, of which none is known to be white")
    return (values / largest).astype(np.float32)


def _read_video(path: Path, stride: int) -> Iterator[np.ndarray]:
    try:
        import av
    except ImportError as error:
        raise ImportError(f"reading {path} needs PyAV: pip install 'ssync-loss[examples]'.") from error

    # an absolute path is never read as a URL, and the whitelist keeps a file's content from opening one
    with av.open(str(path.absolute()), options={"protocol_whitelist": "file"}) as container:
        if not container.streams.video:
            raise ValueError("no video in it")
        # frames are resized one by one, as a long video in full size would not fit the memory
        for number, frame in enumerate(container.decode(video=0)):
            if frame.is_corrupt:
                raise ValueError(f"frame {number} is damaged")
            if number % stride == 0:
                deep = any(component.bits > 8 for component in frame.format.components)
                # older versions of PyAV ignore the color range
                picture = frame.to_ndarray(format="rgb48le" if deep else "rgb24", src_color_range=frame.color_range)
                if frame.format.name.startswith(("gray", "ya")) and frame.color_range == LIMITED:
                    # FFmpeg ignores the range of gray videos
                    values = picture / (65535 if deep else 255)
                    picture = ((values * 255 - 16) / 219).clip(0, 1)
                yield np.rot90(picture, round(getattr(frame, "rotation", 0) / 90))


def _fit(picture: np.ndarray, size: int) -> Tensor:
    """Crop a picture to the central square and resize it to (3, size, size) in [0, 1]."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = picture[top : top + side, left : left + side]
    white = np.iinfo(square.dtype).max if square.dtype.kind == "u" else 1
    colors = torch.from_numpy(square.astype(np.float32)) / white
    channels = colors.movedim(-1, 0) if colors.ndim == 3 else colors.expand(3, -1, -1)
    return F.interpolate(channels[None], size=(size, size), mode="bilinear", antialias=True)[0].clamp(0, 1)
