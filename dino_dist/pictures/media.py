"""What a user wants to look at: image files, videos, and folders of either, found and given a name each on disk."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dino_dist.data.reading.decode import BadSample, DecodeRules, Pixels, decode_image
from dino_dist.data.shards.image_names import is_image_name, natural_order
from dino_dist.data.shards.shard_index import IMAGE_SUFFIXES
from dino_dist.data.shards.tar_members import printable
from dino_dist.errors import UserError, reading

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".gif"})
_MAX_NAME = 60  # letters of up to 4 bytes: file systems allow 255 bytes
_NOT_IN_NAMES = re.compile(r"[^\w-]+")

Kind = Literal["image", "video", "frames"]


@dataclass(frozen=True, kw_only=True)
class Medium:
    """One thing to look at."""

    kind: Kind
    """`frames`: a folder whose images are one video, in the order of their names."""
    path: Path
    below: Path
    """The path below the folder that the user named; the file's name alone if the user named the file."""
    chosen: bool
    """The user named this very file: then it must be good, while a bad one in a folder is left out."""
    name: str = ""
    """What its results are called; no two alike, on file systems that fold case neither."""


def find_media(paths: Sequence[Path], *, frames: bool = False) -> tuple[Medium, ...]:
    """All that `paths` name, in order, folders in the order of names below them.

    `frames`: each folder is one video. `UserError` for a path that does not exist and for a folder without pictures.
    """
    media: list[Medium] = []
    for path in paths:
        try:
            media += _found_at(path, frames=frames)
        except OSError as error:
            raise UserError(f"{shown(path)} cannot be read ({error.strerror}): look at its permissions") from None
    return _named(media)


def frame_files(folder: Path) -> tuple[Path, ...]:
    """The images of a folder as frames: 2.png before 10.png. `UserError` if there are none."""
    with reading(str(folder)):
        files = [entry for entry in folder.iterdir() if entry.is_file() and is_image_name(entry.name)]
    if not files:
        raise UserError(f"{shown(folder)} holds no images to be frames: {_allowed()}")
    return tuple(sorted(files, key=lambda file: natural_order(file.name)))


def read_image(path: Path, rules: DecodeRules) -> Pixels:
    """RGB uint8 [H, W, 3]; `UserError` that names the file if it is no image, damaged or over the limits."""
    try:
        if path.stat().st_size > rules.max_member_bytes:
            raise BadSample(f"{path.stat().st_size} bytes; at most {rules.max_member_bytes}")
        return decode_image(path.read_bytes(), rules)
    except BadSample as error:
        raise UserError(f"{shown(path)} is no image that can be read ({error}): give another file") from None
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read ({error.strerror}): give another file") from None


def shown(path: Path | str) -> str:
    """A path for a message: one line, whatever its name."""
    text = str(path)
    return text if text.isprintable() else printable(os.fsencode(text))


def unique_names(wanted: Iterable[str]) -> list[str]:
    """A name for a folder for each text: letters, digits, `_` and `-`, no two alike even where case is folded.

    The first of several alike keeps the plain name, the others end in `-2`, `-3` and so on.
    """
    taken: set[str] = set()
    last: dict[str, int] = {}
    names: list[str] = []
    for text in wanted:
        plain = _NOT_IN_NAMES.sub("_", unicodedata.normalize("NFC", text)).strip("_")[:_MAX_NAME] or "picture"
        name, number = plain, last.get(_folded(plain), 1)
        while _folded(name) in taken:
            number += 1
            name = f"{plain}-{number}"
        taken.add(_folded(name))
        last[_folded(plain)] = number
        names.append(name)
    return names


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _named(media: Sequence[Medium]) -> tuple[Medium, ...]:
    names = unique_names(str(medium.below.with_suffix("")) for medium in media)
    return tuple(
        Medium(kind=medium.kind, path=medium.path, below=medium.below, chosen=medium.chosen, name=name)
        for medium, name in zip(media, names, strict=True)
    )


def _found_at(path: Path, *, frames: bool) -> list[Medium]:
    if path.is_dir():
        if not frames:
            return _in_folder(path)
        return [Medium(kind="frames", path=path, below=Path(path.resolve().name), chosen=True)]
    if not path.is_file():
        raise UserError(f"{shown(path)} does not exist: give images, videos or folders of them")
    return [Medium(kind=_kind(path), path=path, below=Path(path.name), chosen=True)]


def _in_folder(root: Path) -> list[Medium]:
    found: list[Medium] = []
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        subfolders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and (is_image_name(name) or path.suffix.lower() in VIDEO_SUFFIXES):
                found.append(Medium(kind=_kind(path), path=path, below=path.relative_to(root), chosen=False))
    if not found:
        raise UserError(f"{shown(root)} holds nothing to look at: {_allowed()}")
    return found


def _raise(error: OSError) -> None:
    raise error


def _kind(path: Path) -> Kind:
    return "video" if path.suffix.lower() in VIDEO_SUFFIXES else "image"


def _allowed() -> str:
    images = ", ".join(sorted(suffix.decode() for suffix in IMAGE_SUFFIXES))
    return f"images end in {images}, videos in {', '.join(sorted(suffix[1:] for suffix in VIDEO_SUFFIXES))}"
