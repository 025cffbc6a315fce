"""Image files of a file system as a data set that is read where it lies, without tar shards around them.

To whatever reads samples by their place the files pose as one shard, in which they lie one after the other. The list of
them is an index file like a shard's, in a folder of the caller's; paths are its keys.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dino_dist.data.prepare.sources import LIST_SUFFIXES, SourceSet, find_sources, holds_images
from dino_dist.data.reading.decode import BadSample
from dino_dist.data.shards.index import DatasetIndex, Shard
from dino_dist.data.shards.shard_index import (
    INDEX_SUFFIX,
    record_dtype,
    records_sha256,
    write_records,
)
from dino_dist.data.shards.shard_manifest import ManifestRow, dataset_hash
from dino_dist.data.stores.store_options import StoreCounts
from dino_dist.errors import UserError, reading

_MOST_BYTES = 2**32 - 1
"""An index keeps sizes in 32 bits; no limit of a config lets such a file through."""
_MAX_BUILD_JSON_BYTES = 2**26


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageFiles(DatasetIndex):
    """One shard that is a list of files: `offset` runs through their bytes, `key` is a path, `crc32` is not known."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FileBytes:
    """Reads image files as if they were samples of a shard, from any number of threads."""

    dataset: ImageFiles

    def read(self, shard: int, offset: int, size: int, crc32: int) -> bytes:
        """The file at `offset`; `UserError` if it cannot be read, `BadSample` if it has another size by now."""
        records = self.dataset.records(shard)
        # Not np.searchsorted: it would copy the whole column for each image.
        row = bisect_left(records["offset"], offset, key=int)
        path = os.fsdecode(bytes(records["key"][row]))
        try:
            with open(path, "rb") as file:
                data = file.read(size + 1)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}; see to the file, or remove it") from error
        if len(data) != size:
            raise BadSample(f"no longer the {size} bytes that it had when the folder was listed")
        return data

    def will_need(self, shards: Sequence[int]) -> None:
        """Nothing is fetched ahead."""

    def counts(self) -> StoreCounts:
        """Zeros: no store is asked."""
        return StoreCounts()

    def close(self) -> None:
        """No file stays open."""


def find_image_files(spec: str) -> SourceSet | None:
    """The images that `spec` names without shards: a folder whose sub-folders are classes, or a text file that lists
    paths and labels (see `find_sources`). None if it names something else; `UserError` if it is ambiguous
    or cannot be read.
    """
    path = Path(spec)
    with reading(spec):
        if path.is_dir():
            if any(entry.suffix == ".tar" for entry in path.iterdir()) or not holds_images(path):
                return None
        elif path.suffix not in LIST_SUFFIXES:
            return None
        return find_sources(spec)


def open_image_files(found: SourceSet, spec: str, numbers: Mapping[str, int], home: Path) -> ImageFiles:
    """The data set of these files, its list below `home`; `numbers` are the labels of the names of classes.

    Several processes may do this at once: they write the same bytes. `UserError` if nothing can be written there.
    """
    keys = [os.fsencode(source.path) for source in found.sources]
    records = np.empty(len(keys), dtype=record_dtype(max(len(key) for key in keys)))
    sizes = np.array([min(source.size_bytes, _MOST_BYTES) for source in found.sources], dtype=np.uint64)
    # An empty file takes a byte, so that every file has a place of its own.
    ends = np.cumsum(np.maximum(sizes, 1), dtype=np.uint64)
    labels = np.array([source.label for source in found.sources], dtype=np.int64)
    if found.classes:
        labels = np.array([numbers[name] for name in found.classes], dtype=np.int64)[labels]
    records["offset"], records["size"], records["crc32"] = ends - np.maximum(sizes, 1), sizes, 0
    records["label"], records["key"] = labels, keys
    digest = records_sha256(records)
    index_path = home.absolute() / f"images-{digest[:16]}{INDEX_SUFFIX}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        write_records(index_path, records)
    except OSError as error:
        raise UserError(f"{home}: cannot write the list of images there ({error.strerror})") from error
    row = ManifestRow(name=Path(spec).name, bytes=int(ends[-1]), mtime_ns=0, samples=len(records), sha256=digest)
    shard = Shard(location=str(Path(spec).absolute()), name=row.name, row=row, index_path=index_path)
    return ImageFiles(
        shards=(shard,), first_ids=np.array([0, len(records)], dtype=np.int64), hash=dataset_hash([(row.name, row)])
    )


def class_numbers(sets: Sequence[SourceSet | None], specs: Sequence[str]) -> dict[str, int]:
    """One number for each name of a class, for all `specs` together: what is a cat in one must be so in the other.

    `sets` are their image files (None: shards). Shards built from a folder of classes have its numbers already;
    others tell no names, and cannot go with a folder that has: `UserError`.
    """
    if not any(found is not None and found.classes for found in sets):
        return {}
    numbers: dict[str, int] = {}
    for found, spec in zip(sets, specs, strict=True):
        if found is not None and (found.classes or all(source.label < 0 for source in found.sources)):
            continue
        names = _built_classes(Path(spec)) if found is None else ()
        if not names or numbers not in ({}, {name: number for number, name in enumerate(names)}):
            raise UserError(
                f"{spec} has labels that are bare numbers, which cannot be compared with the folder names of "
                f"{next(other for other in specs if other != spec)}: give both as folders of images, or both as shards"
            )
        numbers = {name: number for number, name in enumerate(names)}
    for name in sorted({name for found in sets if found is not None for name in found.classes}):
        numbers.setdefault(name, len(numbers))
    return numbers


def _built_classes(folder: Path) -> tuple[str, ...]:
    """The class names that a folder of shards was built from; none if that is not known."""
    try:
        with open(folder / "build.json", "rb") as file:
            names = json.loads(file.read(_MAX_BUILD_JSON_BYTES))["classes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()
