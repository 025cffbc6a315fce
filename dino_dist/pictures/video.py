"""Videos in and out: files through PyAV (an extra), and folders of frames, which need nothing.

A file's frames are shown at its mean rate, turned as it asks; sound is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from dino_dist.data.reading.decode import DecodeRules, Pixels
from dino_dist.errors import UserError
from dino_dist.pictures.draw import to_image
from dino_dist.pictures.media import Medium, frame_files, read_image, shown

if TYPE_CHECKING:
    from types import ModuleType

_CODECS = (("libx264", {"crf": "18", "preset": "medium"}), ("mpeg4", {"qscale": "3"}))
"""The first that this PyAV has; the second is in all."""
_USUAL_RATE = Fraction(25)
"""Of a file that does not tell its own."""
_SMALLEST_SIDE_PX = 16
"""Encoders refuse less."""


class Sink(AbstractContextManager["Sink"], Protocol):
    """Takes the pictures of a video, one after the other, all of one size."""

    def write(self, picture: Tensor) -> None:
        """[3, height, width] in [0, 1]."""


class FrameFolder:
    """A folder of images as a video, and its results as folders of PNGs of the same names."""

    def __init__(self, medium: Medium, rules: DecodeRules) -> None:
        self._files = frame_files(medium.path)
        self._rules = rules

    def __iter__(self) -> Iterator[Pixels]:
        return (read_image(file, self._rules) for file in self._files)

    def sink(self, folder: Path, what: str) -> Sink:
        """Where the pictures called `what` go: `folder/what/<frame>.png`."""
        # Numbers before names: two frames may differ by their suffix alone.
        digits = len(str(len(self._files)))
        names = [f"{number:0{digits}d}-{file.stem[:60]}.png" for number, file in enumerate(self._files, 1)]
        return _PngSink(folder / what, names)


class VideoFile:
    """A video file, and its results as mp4."""

    def __init__(self, medium: Medium, rules: DecodeRules) -> None:
        """`UserError` if PyAV is missing or the file holds no video."""
        self._av = _pyav(medium.path)
        self._path, self._rules = medium.path, rules
        try:
            with self._av.open(str(self._path)) as container:
                if not container.streams.video:
                    raise UserError(f"{shown(self._path)} holds no video: give another file")
                self._rate = container.streams.video[0].average_rate or _USUAL_RATE
        except (self._av.FFmpegError, OSError) as error:
            raise self._unreadable(error) from None

    def __iter__(self) -> Iterator[Pixels]:
        number = 0
        try:
            with self._av.open(str(self._path)) as container:
                container.streams.video[0].thread_type = "AUTO"
                for frame in container.decode(video=0):
                    if frame.width * frame.height > self._rules.max_pixels:
                        raise UserError(
                            f"{shown(self._path)}: frames of {frame.width} x {frame.height} px; "
                            f"at most {self._rules.max_pixels} pixels"
                        )
                    number += 1
                    yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
        except (self._av.FFmpegError, OSError) as error:
            raise self._unreadable(error, f" after {number} frames") from None
        if not number:
            raise UserError(f"{shown(self._path)} holds no frame: give another file")

    def sink(self, folder: Path, what: str) -> Sink:
        """Where the pictures called `what` go: `folder/what.mp4`."""
        return _Mp4Sink(self._av, folder / f"{what}.mp4", self._rate)

    def _unreadable(self, error: Exception, when: str = "") -> UserError:
        reason = getattr(error, "strerror", None) or type(error).__name__
        return UserError(f"{shown(self._path)} cannot be decoded as a video{when} ({reason}): give another file")


class _PngSink:
    def __init__(self, folder: Path, names: list[str]) -> None:
        self._folder = folder
        self._names = iter(names)

    def __enter__(self) -> _PngSink:
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, picture: Tensor) -> None:
        to_image(picture).save(self._folder / next(self._names))


class _Mp4Sink:
    """Opened at the first picture, whose size all have."""

    def __init__(self, av: ModuleType, path: Path, rate: Fraction) -> None:
        self._av, self._path, self._rate = av, path, rate
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> _Mp4Sink:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._container is None:
            return
        if kind is None:
            self._container.mux(self._stream.encode())
            self._container.close()
            return
        with suppress(self._av.FFmpegError, OSError):  # an error is on its way already
            self._container.close()

    def write(self, picture: Tensor) -> None:
        picture = _encodable(picture)
        if self._container is None:
            self._open(*picture.shape[1:])
        frame = self._av.VideoFrame.from_image(to_image(picture))
        self._container.mux(self._stream.encode(frame))

    def _open(self, height: int, width: int) -> None:
        codec, options = next((codec, options) for codec, options in _CODECS if codec in self._av.codecs_available)
        self._container = self._av.open(str(self._path), "w")
        # Mean rates such as 10000000/333667 are finer than mpeg4's clock.
        rate = self._rate.limit_denominator(1001)
        self._stream = self._container.add_stream(codec, rate=rate, options=dict(options))
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"


def _encodable(picture: Tensor) -> Tensor:
    """Even sides, as its colours are stored for 2 x 2 pixels; the border is repeated."""
    height, width = picture.shape[1:]
    down, right = (max(side + side % 2, _SMALLEST_SIDE_PX) - side for side in (height, width))
    return F.pad(picture[None], (0, right, 0, down), mode="replicate")[0] if down or right else picture


def open_video(medium: Medium, rules: DecodeRules) -> FrameFolder | VideoFile:
    """A medium of kind `video` or `frames`."""
    return FrameFolder(medium, rules) if medium.kind == "frames" else VideoFile(medium, rules)


def _pyav(path: Path) -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"{shown(path)}: videos need PyAV ({error}): pip install 'dino-dist[video]', "
            "or take the frames out and give their folder with --frames"
        ) from None
    return av
