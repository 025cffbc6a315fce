"""What is written about one video: videos of its attention, its heads side by side, its mask, its patches' colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_dist.pictures.draw import heat_over, mask_over
from dino_dist.pictures.masks import keep_mass
from dino_dist.pictures.media import Medium
from dino_dist.pictures.observer import Observer
from dino_dist.pictures.patch_colors import PatchColors, PatchSample
from dino_dist.pictures.picture_results import fitted, shown_picture, sizes
from dino_dist.pictures.sight import Sight, resize_picture
from dino_dist.pictures.video import FrameFolder, VideoFile

_BATCH = 8
"""Frames that the network gets at once."""
_MAX_WIDTH_PX = 1920
_GAP_PX = 4
_COLOR_FRAMES = 64
"""At most so many frames enter the analysis of patch colours, evenly spaced."""

Video = FrameFolder | VideoFile


def write_video(
    folder: Path,
    medium: Medium,
    video: Video,
    observer: Observer,
    *,
    mass: float,
    smooth: bool,
    sample: PatchSample | None,
    done: Callable[[], None],
) -> dict[str, Any]:
    """Fill a folder, which is made; `done` is called after each frame. Sizes and number of frames, for the summary.

    All frames are looked at in the size of the first.
    """
    folder.mkdir()
    said: dict[str, Any] = {}
    frames = 0
    picked = _EvenlySpaced(_COLOR_FRAMES)
    with ExitStack() as stack:
        attention, heads, mask = (
            stack.enter_context(video.sink(folder, what)) for what in ("attention", "heads", "mask")
        )
        for picture, sight in seen_frames(medium, video, observer, said):
            each_Hhw = sight.attention_NHhw[0]
            mean_hw = each_Hhw.mean(0)
            attention.write(_beside([picture, heat_over(picture, mean_hw, smooth=smooth)], 2))
            mask.write(mask_over(picture, keep_mass(mean_hw, mass)))
            columns = math.ceil(math.sqrt(len(each_Hhw)))
            heads.write(_beside([heat_over(picture, one, smooth=smooth) for one in each_Hhw], columns))
            if sample is not None:
                picked.add((sight.patches_NhwD[0], mean_hw))
            frames += 1
            done()
    for patches_hwD, mean_hw in picked.kept if sample is not None else []:
        assert sample is not None
        sample.add(patches_hwD, mean_hw)
    return {**said, "frames": frames}


def write_video_colors(
    folder: Path, medium: Medium, video: Video, observer: Observer, colors: PatchColors, done: Callable[[], None]
) -> None:
    """`pca` beside the other results: the frame and the colours of its patches."""
    with video.sink(folder, "pca") as sink:
        for picture, sight in seen_frames(medium, video, observer, {}):
            drawn = F.interpolate(colors(sight.patches_NhwD[0])[None], size=picture.shape[1:], mode="nearest")
            sink.write(_beside([picture, drawn[0]], 2))
            done()


def seen_frames(
    medium: Medium, video: Video, observer: Observer, said: dict[str, Any]
) -> Iterator[tuple[Tensor, Sight]]:
    """Each frame to draw over, and what the network made of it (N = 1); the first frame's sizes go to `said`."""
    frames = iter(video)
    size: tuple[int, int] | None = None
    while batch := list(islice(frames, _BATCH)):
        if size is None:
            first = fitted(observer, medium, batch[0])
            size = (first.shape[1], first.shape[2])
            said.update(sizes(batch[0], first))
        pictures = [resize_picture(pixels, size) for pixels in batch]
        sight = observer.look(pictures)
        for number, (pixels, picture) in enumerate(zip(batch, pictures, strict=True)):
            one = slice(number, number + 1)
            yield (
                shown_picture(pixels, picture),
                Sight(
                    attention_NHhw=sight.attention_NHhw[one],
                    patches_NhwD=sight.patches_NhwD[one],
                    cls_ND=sight.cls_ND[one],
                ),
            )


class _EvenlySpaced:
    """Keeps at most `limit` of any number of things, each n-th, without knowing how many will come."""

    def __init__(self, limit: int) -> None:
        self.kept: list[tuple[Tensor, Tensor]] = []
        self._limit = limit
        self._every = 1
        self._seen = 0

    def add(self, thing: tuple[Tensor, Tensor]) -> None:
        if self._seen % self._every == 0:
            self.kept.append(thing)
        self._seen += 1
        if len(self.kept) > self._limit:
            self.kept, self._every = self.kept[::2], 2 * self._every


def _beside(pictures: list[Tensor], columns: int) -> Tensor:
    """Pictures of one size in rows, no wider than a screen; what is left of the last row is black."""
    _, height, width = pictures[0].shape
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    canvas = torch.zeros(3, rows * (height + _GAP_PX) - _GAP_PX, columns * (width + _GAP_PX) - _GAP_PX)
    for number, picture in enumerate(pictures):
        top, left = number // columns * (height + _GAP_PX), number % columns * (width + _GAP_PX)
        canvas[:, top : top + height, left : left + width] = picture
    if canvas.shape[2] <= _MAX_WIDTH_PX:
        return canvas
    size = (max(1, round(canvas.shape[1] * _MAX_WIDTH_PX / canvas.shape[2])), _MAX_WIDTH_PX)
    return F.interpolate(canvas[None], size=size, mode="area")[0]
