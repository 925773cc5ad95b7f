"""Your own clips: pictures and videos of all formats have the right brightness, and bad files are skipped."""

import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from examples.clips import load_clips
from examples.data import read_data
from PIL import Image

QUARTER_TURN = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
# channels by the color type of a PNG
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
GRAY = 0.2


def png(color: int, depth: int, *, transparent: bool) -> bytes:
    """Encode a picture of 16 x 16 that is black on the left and `GRAY` on the right, or white without grays."""
    white = 2**depth - 1
    level = white * GRAY if (white * GRAY).is_integer() else white
    left, right = ([value] * CHANNELS[color] for value in (0, int(level)))
    if color in {4, 6}:
        left[-1] = right[-1] = white
    samples = np.array([left] * 8 + [right] * 8, dtype=">u2").ravel()
    if depth == 16:
        line = samples.tobytes()
    else:
        bits = (samples[:, None] >> np.arange(depth)[::-1]) & 1
        line = np.packbits(bits.astype(np.uint8)).tobytes()
    head = struct.pack(">IIBBBBB", 16, 16, depth, color, 0, 0, 0)
    palette = b"".join(bytes([255 * code // white] * 3) for code in range(white + 1)) if color == 3 else b""
    clear = {0: bytes(2), 2: bytes(6), 3: bytes(2**depth)}[color] if transparent else b""
    parts = [(b"IHDR", head), (b"PLTE", palette), (b"tRNS", clear), (b"IDAT", zlib.compress((b"\0" + line) * 16))]
    chunks = [name + data for name, data in parts if data] + [b"IEND"]
    packed = (struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def encoded(values: np.ndarray, *, mode: str = "", kind: str = "TIFF") -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(values)
    (image.convert("P").convert("PA") if mode == "PA" else image.convert(mode) if mode else image).save(file, kind)
    return file.getvalue()


def write_frames(folder: Path, contents: bytes | list[bytes], *, name: str = "{}.png", count: int = 4) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    for i in range(count):
        (folder / name.format(i)).write_bytes(contents if isinstance(contents, bytes) else contents[i])


def gray_frames(count: int) -> list[bytes]:
    """Return frames with brightness 20 n."""
    return [encoded(np.full((20, 16, 3), 20 * n, np.uint8), kind="PNG") for n in range(count)]


def write_video(path: Path, frames: list[av.VideoFrame], codec: Any = "mpeg4", color_range: int = 0) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
        stream.codec_context.color_range = color_range
        for number, frame in enumerate(frames):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def colored(levels: list[float], pixels: str = "yuv420p") -> list[av.VideoFrame]:
    pictures = [np.full((48, 64, 3), round(255 * level), np.uint8) for level in levels]
    return [av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels) for picture in pictures]


class TestClips:
    def test_frames_are_sorted_by_number(self, tmp_path: Path) -> None:
        write_frames(tmp_path / "a", gray_frames(11), name="frame_{}.png", count=11)
        clips = load_clips(tmp_path, num_frames=5, size=8)
        assert clips.sources == ["a", "a"]
        assert clips.video.shape == (2, 5, 3, 8, 8)
        levels = (clips.video[:, :, 0, 0, 0] * 255 / 20).round().int()
        assert levels.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
        strided = load_clips(tmp_path, size=8, stride=2).video[:, :, 0, 0, 0] * 255 / 20
        assert strided.round().tolist() == [[0, 2, 4, 6]]

    def test_the_central_square_is_kept(self, tmp_path: Path) -> None:
        picture = np.zeros((16, 48, 3), dtype=np.uint8)
        picture[:, 16:32] = 255
        write_frames(tmp_path, encoded(picture, kind="PNG"))
        assert load_clips(tmp_path, size=8).video.min() == 1

    def test_matching_videos_are_found_once_at_any_depth(self, tmp_path: Path) -> None:
        levels = [n * 20 / 255 for n in range(10)]
        for name in ("1_video.mp4", "1_colors.mp4"):
            write_video(tmp_path / "deep" / name, colored(levels))
        (tmp_path / "deep" / "loop").symlink_to(tmp_path)
        clips = load_clips(tmp_path, match="*_video.mp4", size=16)
        assert clips.sources == ["deep/1_video.mp4"] * 2
        assert (clips.video.flatten(2).mean(2).flatten() - torch.tensor(levels[:8])).abs().max() < 0.03

    def test_errors(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"`clips` must be a directory; got .*nowhere"):
            load_clips(tmp_path / "nowhere")
        write_frames(tmp_path / "a", gray_frames(4))
        nothing = r"`clips` must hold videos .*\.mp4.* or folders of frames .*named like 'b\*'; found none"
        with pytest.raises(ValueError, match=nothing):
            load_clips(tmp_path, match="b*")
        with pytest.raises(ValueError, match=r"must hold a video of at least 4 frames; .*2 frames at stride 2, a clip"):
            load_clips(tmp_path, stride=2)

    def test_hidden_files_are_reported_in_one_line(self, tmp_path: Path) -> None:
        write_frames(tmp_path / "a", gray_frames(4))
        write_frames(tmp_path / "a", b"Mac OS X", name="._{}.png")
        write_frames(tmp_path / ".b", gray_frames(4))
        clips = load_clips(tmp_path)
        assert clips.sources == ["a"]
        assert len(clips.skipped) == 4
        assert clips.skipped.lines() == ["a/._0.png and 3 more are skipped: hidden"]


class TestPictures:
    """Pictures that are black on the left and `GRAY` or white on the right. Truncated 16 bits would be white."""

    @pytest.mark.parametrize(
        ("color", "depth", "transparent"),
        [
            (color, depth, transparent)
            for color, depths in {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}.items()
            for depth in depths
            for transparent in (False, True)
            if not (transparent and color in {4, 6})
        ],
    )
    def test_every_depth_and_color_of_a_png(self, color: int, depth: int, transparent: bool, tmp_path: Path) -> None:
        write_frames(tmp_path, png(color, depth, transparent=transparent))
        video = load_clips(tmp_path, size=16).video
        assert video[..., :7].abs().max() == 0
        right = 1.0 if depth < 4 else GRAY
        torch.testing.assert_close(video[..., 9:], torch.full_like(video[..., 9:], right))

    @pytest.mark.parametrize(
        "values",
        [
            *((np.full((16, 16), 51, np.uint8), mode, "TIFF") for mode in ("1", "L", "LA", "P", "PA", "CMYK")),
            *((np.full((16, 16), 51, np.uint8), mode, "JPEG") for mode in ("L", "RGB", "CMYK")),
            *((np.full((16, 16), 51, np.uint8), mode, "WEBP") for mode in ("RGB", "RGBA")),
            *((np.full((16, 16), 13107, kind), "", "TIFF") for kind in ("<u2", ">u2", "<i4")),
            *((np.full((16, 16), value, np.float32), "", "TIFF") for value in (0.2, 51.0)),
        ],
        ids=lambda given: f"{given[1] or given[0].dtype.str}-{given[2]}-{given[0].max()}",
    )
    def test_every_mode_and_format(self, values: tuple[np.ndarray, str, str], tmp_path: Path) -> None:
        write_frames(tmp_path, encoded(values[0], mode=values[1], kind=values[2]))
        # one bit is dithered
        tolerance = 0.03 if values[1] == "1" else 0.002
        assert load_clips(tmp_path).video.mean().item() == pytest.approx(GRAY, abs=tolerance)

    @pytest.mark.parametrize("kind", ["jpg", "mp4"])
    def test_rotated_pictures_are_turned_upright(self, kind: str, tmp_path: Path) -> None:
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[:, :32] = 255
        if kind == "jpg":
            exif = Image.Exif()
            exif[0x0112] = 6
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", exif=exif)
            write_frames(tmp_path, file.getvalue(), name="{}.jpg")
        else:
            path = tmp_path / "a.mp4"
            write_video(path, [av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")] * 4)
            data = path.read_bytes()
            matrix = data.index(b"tkhd") + 44
            path.write_bytes(data[:matrix] + QUARTER_TURN + data[matrix + 36 :])
            if not hasattr(av.VideoFrame, "rotation"):
                pytest.skip("this version of PyAV does not read the rotation")
        video = load_clips(tmp_path).video
        assert video[..., :20, :].min() > 0.9
        assert video[..., 28:, :].max() < 0.1


class TestVideos:
    @pytest.mark.parametrize(
        ("codec", "pixels"),
        [
            *(("ffv1", one) for one in ("yuv420p", "yuv420p10le", "yuv422p12le", "yuv444p16le", "yuva420p", "bgra")),
            *(("ffv1", one) for one in ("gray", "gray10le", "gray12le", "gray16le", "ya8", "gbrp10le", "rgb48le")),
            *(("png", one) for one in ("rgb24", "rgba", "gray", "gray16be", "ya16be", "rgb48be", "rgba64be")),
            ("mjpeg", "yuvj420p"),
        ],
    )
    def test_every_depth_and_color(self, codec: str, pixels: str, tmp_path: Path) -> None:
        write_video(tmp_path / ("a.mov" if codec == "png" else "a.mkv"), colored([GRAY] * 4, pixels), codec)
        assert load_clips(tmp_path).video.mean().item() == pytest.approx(GRAY, abs=0.006)

    @pytest.mark.parametrize("pixels", ["yuv420p", "yuv420p10le", "gray", "gray10le"])
    @pytest.mark.parametrize("full", [False, True])
    def test_the_color_range_is_applied(self, pixels: str, full: bool, tmp_path: Path) -> None:
        depth, kind = (10, np.uint16) if "10" in pixels else (8, np.uint8)
        frame = av.VideoFrame(64, 48, pixels)
        level = GRAY * (2**depth - 1) if full else (16 + GRAY * 219) * 2 ** (depth - 8)
        for number, plane in enumerate(frame.planes):
            value = 2 ** (depth - 1) if number else round(level)
            plane.update(np.full(plane.buffer_size // kind().itemsize, value, kind).tobytes())
        write_video(tmp_path / "a.mkv", [frame] * 4, "ffv1", color_range=2 if full else 1)
        assert load_clips(tmp_path).video.mean().item() == pytest.approx(GRAY, abs=0.003)


def _audio(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())


@pytest.mark.parametrize(("num_videos", "kept"), [(1, []), (2, [1]), (4, [3]), (11, [4, 9])])
def test_whole_videos_are_held_out(num_videos: int, kept: list[int], tmp_path: Path) -> None:
    for video in range(num_videos):
        # every video has two clips with different grays
        grays = [np.full((48, 48, 3), 20 * video + clip, np.uint8) for clip in (3, 7) for _ in range(4)]
        write_frames(tmp_path / f"{video:02}", [encoded(gray, kind="PNG") for gray in grays], count=8)
    data = read_data(tmp_path, match="*", stride=1, num_premise=9, num_test=99)
    trained = [video for video in range(num_videos) if video not in kept]
    assert len(data.features) == 2 * len(trained)
    assert data.trained.groups is not None
    assert set(data.trained.groups.tolist()) <= set(trained)
    assert len(data.trained.features) == min(9, 2 * len(trained))
    assert data.test.video[:, 0, 0, 0, 0].mul(255).round().tolist() == [
        20 * one + clip for one in trained for clip in (3, 7)
    ]
    assert (data.fresh is None) == (kept == [])
    if data.fresh is not None:
        assert data.fresh.groups is not None
        assert data.fresh.groups.tolist() == [one for one in kept for _ in range(2)]


def _cut_video(path: Path) -> None:
    write_video(path, colored([0.1, 0.2, 0.3, 0.4]))
    path.write_bytes(path.read_bytes()[:60])


def _damaged(path: Path) -> None:
    data = png(2, 8, transparent=False)
    start = data.index(b"IDAT") + 6
    path.write_bytes(data[:start] + b"oops" + data[start + 4 :])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "._0.png": (lambda path: path.write_bytes(b"Mac OS X"), "hidden"),
    ".0.mp4": (lambda path: path.write_bytes(b""), "hidden"),
    "empty.png": (lambda path: path.touch(), "empty"),
    "empty.mp4": (lambda path: path.touch(), "empty"),
    "text.jpg": (lambda path: path.write_text("no picture"), "no image"),
    "cut.png": (lambda path: path.write_bytes(png(2, 8, transparent=False)[:60]), ".*[Tt]runcated.*"),
    "broken.png": (_damaged, ".*broken.*"),
    "folder.png": (lambda path: path.mkdir(), "a folder without frames"),
    "link.png": (lambda path: path.symlink_to("nowhere"), "no file"),
    "pipe.mp4": (os.mkfifo, "no file"),
    os.fsdecode(b"\xff\n.png"): (lambda path: path.touch(), "empty"),
    "int.png": (lambda path: path.write_bytes(encoded(np.full((9, 9), 70000, np.int32))), "values from 70000 to .*"),
    "nan.png": (lambda path: path.write_bytes(encoded(np.full((9, 9), np.nan, np.float32))), "values from nan to .*"),
    "text.mp4": (lambda path: path.write_text("no video"), "Invalid data found when processing input"),
    "sound.mp4": (_audio, "no video in it"),
    "cut.mp4": (_cut_video, "Invalid data found when processing input"),
    "short.mkv": (lambda path: write_video(path, colored([0.5] * 3)), "3 frames, a clip takes 4"),
}


@pytest.mark.parametrize("name", BAD)
class TestBadFiles:
    def test_a_bad_file_is_skipped_with_one_line(
        self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make, reason = BAD[name]
        write_frames(tmp_path / "a", gray_frames(4), name="{}²0.png")
        alone = load_clips(tmp_path).video
        make(tmp_path / "a" / name)
        data = read_data(tmp_path, match="*", stride=1, num_premise=1, num_test=1)
        assert torch.equal(data.test.video, alone)
        line, summary = capsys.readouterr().out.splitlines()
        assert re.fullmatch(f"a/{re.escape(repr(name)[1:-1])} is skipped: {reason}", line)
        assert summary == f"1 clips of 4 frames from 1 videos in {tmp_path}; 1 skipped"

    def test_a_single_bad_file_is_an_error(self, name: str, tmp_path: Path) -> None:
        make, _ = BAD[name]
        (tmp_path / "a").mkdir()
        make(tmp_path / "a" / name)
        found = "found none in '.*', where 1 of the files cannot be used: a/"
        with pytest.raises(ValueError, match=f"{found}{re.escape(repr(name)[1:-1])} is skipped"):
            load_clips(tmp_path)
