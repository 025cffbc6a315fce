"""Where the images of a new data set come from: a folder, a list of files, or the members of existing tars."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from dino_dist.data.shards.image_names import is_image_name
from dino_dist.data.shards.shard_index import IMAGE_SUFFIXES, NO_LABEL, index_shard
from dino_dist.data.shards.shard_list import list_shards
from dino_dist.data.shards.tar_members import printable
from dino_dist.errors import UserError, reading

LIST_SUFFIXES = (".txt", ".tsv")
"""Of text files that list images."""


class Source(NamedTuple):
    """One image file: `size_bytes` bytes at `offset_bytes` of `path`."""

    path: str
    offset_bytes: int
    size_bytes: int
    label: int
    """Negative: none."""
    name: str
    """For people: the path below the source, or SHARD/KEY."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceSet:
    """All images to build from, in an order that depends on their names alone."""

    sources: tuple[Source, ...]
    classes: tuple[str, ...]
    """Name of each label, where the labels come from the names of folders."""
    fingerprint: str
    """Digest of names, labels, sizes and modification times: tells whether a restart has the same input."""


def find_sources(src: str) -> SourceSet:
    """The images that `src` names: a folder of images (its sub-folders are the classes), a text file (one path a line,
    relative to the file, and optionally a tab and an integer label), or tars (folder, pattern or one file).

    `UserError` if there are none, one of them or a folder cannot be read, or the input is ambiguous.
    """
    with reading(src):
        path = Path(src)
        classes: tuple[str, ...] = ()
        if path.is_dir() and not any(entry.suffix == ".tar" for entry in path.iterdir()):
            sources, classes = _from_folder(path)
        elif path.suffix in LIST_SUFFIXES:
            sources = _from_list(path)
        else:
            sources = [source for shard in list_shards(src) for source in _from_tar(shard)]
        if not sources:
            suffixes = ", ".join(sorted(suffix.decode() for suffix in IMAGE_SUFFIXES))
            raise UserError(f"{src} holds no images; files must end in one of {suffixes}")
        return SourceSet(sources=tuple(sources), classes=classes, fingerprint=_fingerprint(sources))


def holds_images(folder: Path) -> bool:
    """Whether there is an image file somewhere below a folder; looks no further than the first.

    `OSError` if a folder on the way cannot be read.
    """
    return next(walk_images(folder), None) is not None


def _from_folder(root: Path) -> tuple[list[Source], tuple[str, ...]]:
    by_class: dict[str, list[Path]] = {}
    for file in walk_images(root):
        parts = file.relative_to(root).parts
        by_class.setdefault(parts[0] if len(parts) > 1 else "", []).append(file)
    loose = by_class.get("", [])
    if loose and len(by_class) > 1:
        raise UserError(
            f"{root} holds images both directly (such as {loose[0].name}) and in folders (such as "
            f"{max(by_class)}); use folders for classes, or none"
        )
    classes = () if loose else tuple(sorted(by_class))
    labels = {name: label for label, name in enumerate(classes)}
    sources = [
        _file_source(file, labels.get(name, NO_LABEL), str(file.relative_to(root)))
        for name in sorted(by_class)
        for file in sorted(by_class[name])
    ]
    return sources, classes


def walk_images(root: Path) -> Iterator[Path]:
    """Image files below a folder; links to folders are followed (many data sets are farms of links), loops are not.

    `OSError` if a folder on the way cannot be read.
    """

    def fail(error: OSError) -> NoReturn:
        raise error  # else a folder that cannot be read would be left out

    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        yield from (Path(folder, name) for name in names if is_image_name(name))


def _from_list(path: Path) -> list[Source]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}); give one image path a line") from error
    sources: list[Source] = []
    for number, line in enumerate(lines, start=1):
        name, tab, label_text = line.partition("\t")
        if not line.strip():
            continue
        if tab and not (label_text.strip().isascii() and label_text.strip().isdigit()):
            raise UserError(f"{path} line {number}: label {label_text!r} is no integer from 0; write PATH<tab>LABEL")
        label = int(label_text) if tab else NO_LABEL
        if label >= 2**31:
            raise UserError(f"{path} line {number}: label {label} is too large; at most 2147483647")
        try:
            sources.append(_file_source(path.parent / name, label, name))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} line {number}: {name!r} cannot be read ({error}); fix or remove the line"
            ) from error
    return sources


def _from_tar(path: Path) -> list[Source]:
    return [
        Source(
            path=str(path),
            offset_bytes=int(record["offset"]),
            size_bytes=int(record["size"]),
            label=int(record["label"]),
            name=f"{path.name}/{printable(bytes(record['key']))}",
        )
        for record in index_shard(path).records
    ]


def _file_source(file: Path, label: int, name: str) -> Source:
    return Source(path=str(file.absolute()), offset_bytes=0, size_bytes=file.stat().st_size, label=label, name=name)


def _fingerprint(sources: list[Source]) -> str:
    digest = hashlib.sha256()
    mtimes_ns: dict[str, int] = {}
    for source in sources:
        if source.path not in mtimes_ns:
            mtimes_ns[source.path] = os.stat(source.path).st_mtime_ns
        place = f"{mtimes_ns[source.path]} {source.offset_bytes} {source.size_bytes} {source.label} {source.name}\n"
        digest.update(place.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
