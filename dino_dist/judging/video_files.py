"""Which files make a video to segment: frames, the first mask, and the masks that it is judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dino_dist.data.shards.image_names import is_image_name, natural_order
from dino_dist.errors import UserError, reading

_FRAMES, _MASKS, _SPLITS = "JPEGImages/480p", "Annotations/480p", "ImageSets/2017"


@dataclass(frozen=True, kw_only=True)
class Video:
    """Files of one video; frame 0 has a mask."""

    name: str
    frames: tuple[Path, ...]
    masks: Mapping[int, Path]
    """By number of the frame; only the first is shown to the method."""

    @property
    def judged(self) -> frozenset[int]:
        """Frames that are judged: those with a mask, but neither the first nor the last, as the benchmark has it."""
        return frozenset(self.masks) - {0, len(self.frames) - 1}


def chosen_videos(data: Path, masks: Path | None, *, split: str, names: Sequence[str]) -> list[Video]:
    """Those of a DAVIS folder, or the one whose frames `data` holds, with its `masks`; `UserError` if neither."""
    with reading(str(data)):
        return _chosen(data, masks, split, names)


def _chosen(data: Path, masks: Path | None, split: str, names: Sequence[str]) -> list[Video]:
    if is_davis(data):
        if masks is not None:
            raise UserError(f"{data} is a DAVIS folder, which holds the masks: leave --masks out")
        return davis_videos(data, split=split, names=names)
    if names:
        raise UserError(f"{data} is no DAVIS folder, so it has no video {names[0]}: leave --video out")
    if masks is None:
        raise UserError(
            f"{data} is no DAVIS folder ({_FRAMES} and {_MASKS}): give one, or a folder of frames with --masks, the "
            "first frame's mask"
        )
    return [own_video(data, masks)]


def davis_videos(root: Path, *, split: str = "val", names: Sequence[str] = ()) -> list[Video]:
    """Videos of a DAVIS 2017 folder: those of a split, or those of `names`; `UserError` for what is missing."""
    if not names:
        file = root / _SPLITS / f"{split}.txt"
        try:
            names = file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError):
            raise UserError(f"{file} cannot be read: give another --split, or names with --video") from None
    if not names:
        raise UserError(f"{root / _SPLITS / split}.txt names no video")
    odd = next((name for name in names if Path(name).name != name or name in (".", "..")), None)
    if odd is not None:
        raise UserError(f"{odd!r} is no name of a video: give that of a folder in {root / _FRAMES}")
    return [own_video(root / _FRAMES / name, root / _MASKS / name) for name in dict.fromkeys(names)]


def is_davis(root: Path) -> bool:
    """Whether a folder is laid out as DAVIS 2017 is."""
    return (root / _FRAMES).is_dir() and (root / _MASKS).is_dir()


def own_video(folder: Path, masks: Path) -> Video:
    """Frames in a folder, 2.png before 10.png, with the first one's mask, or masks of frames by their name."""
    frames = _frames(folder)
    stems = [frame.stem for frame in frames]
    if len(set(stems)) != len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise UserError(f"{folder} has two frames named {twice}: their masks would have one name")
    if masks.is_file():
        found = {0: masks}
    elif masks.is_dir():
        found = {number: masks / f"{stem}.png" for number, stem in enumerate(stems)}
        found = {number: file for number, file in found.items() if file.is_file()}
    else:
        raise UserError(
            f"{masks} does not exist: give the first frame's mask, or a folder of masks named as the frames"
        )
    if 0 not in found:
        raise UserError(f"{masks} has no {stems[0]}.png: the first frame needs a mask")
    return Video(name=folder.resolve().name, frames=tuple(frames), masks=found)


def _frames(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of frames")
    images = (file for file in folder.iterdir() if is_image_name(file.name) and file.is_file())
    frames = sorted(images, key=lambda file: natural_order(file.name))
    if len(frames) < 2:
        raise UserError(f"{folder} has {len(frames)} frames: a video needs at least two")
    return frames
