"""Videos in and out keep frames, order and rate; a folder of frames is a video too."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino_dist.data.reading.decode import DecodeRules
from dino_dist.errors import UserError
from dino_dist.pictures.media import Medium
from dino_dist.pictures.video import FrameFolder, VideoFile

av = pytest.importorskip("av", reason="PyAV is not installed (extra: video)")

RULES = DecodeRules(max_member_bytes=10**6, max_pixels=10**6)
RATE = Fraction(30000, 1001)


def medium(path: Path) -> Medium:
    return Medium(kind="video", path=path, below=Path(path.name), chosen=True, name=path.stem)


def frame(number: int, height: int = 48, width: int = 64) -> torch.Tensor:
    """Grey, brighter in each frame; codecs keep that."""
    return torch.full((3, height, width), 0.1 + 0.08 * number)


def written(folder: Path, count: int = 10, **size: int) -> Path:
    path = folder / "in.mp4"
    container = av.open(str(path), "w")
    stream = container.add_stream("mpeg4", rate=RATE)
    stream.width, stream.height, stream.pix_fmt = size.get("width", 64), size.get("height", 48), "yuv420p"
    for number in range(count):
        pixels = (frame(number, stream.height, stream.width) * 255).byte().permute(1, 2, 0).numpy()
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
    container.mux(stream.encode())
    container.close()
    return path


def levels(video: Any) -> list[float]:
    return [float(pixels.mean()) / 255 for pixels in video]


def test_frames_come_in_order_as_often_as_asked(tmp_path: Path) -> None:
    video = VideoFile(medium(written(tmp_path)), RULES)
    for _ in range(2):
        assert levels(video) == pytest.approx([0.1 + 0.08 * number for number in range(10)], abs=0.03)
    assert next(iter(video)).shape == (48, 64, 3)


@pytest.mark.parametrize("size", [(48, 64), (47, 65), (3, 5)])
def test_what_is_written_has_the_frames_and_the_rate(tmp_path: Path, size: tuple[int, int]) -> None:
    source = VideoFile(medium(written(tmp_path)), RULES)
    with source.sink(tmp_path, "out") as sink:
        for number in range(10):
            sink.write(frame(number, *size))
    result = VideoFile(medium(tmp_path / "out.mp4"), RULES)
    assert levels(result) == pytest.approx([0.1 + 0.08 * number for number in range(10)], abs=0.03)
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == RATE
        assert stream.width % 2 == stream.height % 2 == 0
        assert stream.width >= size[1]
        assert stream.height >= size[0]


def test_frames_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, name in enumerate(("f1.png", "f2.png", "f2.bmp", "f10.png")):
        Image.fromarray(np.full((8, 9, 3), 10 * number, dtype=np.uint8)).save(folder / name)
    video = FrameFolder(Medium(kind="frames", path=folder, below=Path("in"), chosen=True, name="in"), RULES)
    assert [int(pixels[0, 0, 0]) for pixels in video] == [0, 20, 10, 30]
    with video.sink(tmp_path / "out", "mask") as sink:
        for pixels in video:
            sink.write(torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    files = sorted((tmp_path / "out" / "mask").iterdir())
    assert [file.name for file in files] == ["1-f1.png", "2-f2.png", "3-f2.png", "4-f10.png"]
    assert [int(np.array(Image.open(file))[0, 0, 0]) for file in files] == [0, 20, 10, 30]


def test_what_is_no_video_is_one_line(tmp_path: Path) -> None:
    good = written(tmp_path)
    cut, text, empty = (tmp_path / name for name in ("cut.mp4", "text.mp4", "empty.avi"))
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    text.write_text("no video")
    empty.touch()
    for path in (cut, text, empty):
        with pytest.raises(UserError, match=rf"{path.stem}\.\w+ (cannot be decoded as a|holds no) video") as caught:
            list(VideoFile(medium(path), RULES))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="at most 100 pixels"):
        list(VideoFile(medium(good), DecodeRules(max_member_bytes=10**6, max_pixels=100)))


def test_an_error_while_writing_is_not_hidden(tmp_path: Path) -> None:
    source = VideoFile(medium(written(tmp_path)), RULES)

    def fails() -> None:
        with source.sink(tmp_path, "out") as sink:
            sink.write(frame(0))
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fails()


def test_a_telephone_held_upright_is_shown_upright(tmp_path: Path) -> None:
    """Its file asks, in the matrix of the track header, for a quarter turn to the right."""
    path = tmp_path / "in.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        pixels = np.zeros((48, 64, 3), dtype=np.uint8)
        pixels[:24] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    content[matrix : matrix + 20] = struct.pack(">5i", 0, 1 << 16, 0, -(1 << 16), 0)
    path.write_bytes(content)
    (shown,) = VideoFile(medium(path), RULES)
    assert shown.shape == (64, 48, 3)
    assert shown[:, 30:].mean() > 240
    assert shown[:, :18].mean() < 15
