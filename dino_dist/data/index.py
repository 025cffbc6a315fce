"""A data set of tar shards: its manifest, its global sample ids and where each sample lies.

Beside the shards stand `NAME.tar.index.npy` for each and one `manifest.json` with a row for each; where the folder
cannot be written to, they stand in a folder of the caller's. A shard is indexed again when its size or modification
time is another than its row says. Ids number the samples of all shards in the order of the shards' names.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_dist.data.recent import Recent
from dino_dist.data.shard_index import (
    INDEX_SUFFIX,
    Records,
    index_shard,
    read_records,
    records_sha256,
    write_atomically,
    write_records,
)
from dino_dist.data.shard_list import MANIFEST_NAME, is_manifest, list_shards
from dino_dist.errors import UserError

Ids = NDArray[np.int64]

_MANIFEST_VERSION = 1
_MAX_MANIFEST_BYTES = 2**30
_MAPPED_INDEXES = 64
_UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


@dataclass(frozen=True, kw_only=True)
class ManifestRow:
    """What a manifest says of one shard."""

    name: str
    bytes: int
    mtime_ns: int
    """When it was indexed; tells that it changed, and is no part of any hash (copies have other times)."""
    samples: int
    sha256: str
    """Of the index (`shard_index.records_sha256`)."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard of a data set."""

    path: Path
    name: str
    """Its path below the folder that all shards of the data set share."""
    row: ManifestRow
    index_path: Path


@dataclass(frozen=True, kw_only=True, eq=False)
class DatasetIndex:
    """Shards in the order of their names; sample ids run through them without a gap.

    Small (a few hundred bytes a shard), so it travels to workers; the indexes are mapped where they are used.
    """

    shards: tuple[Shard, ...]
    first_ids: Ids
    """int64 [S + 1]: shard s holds the ids first_ids[s] .. first_ids[s + 1] - 1."""
    hash: str
    """Digest of the shards' names, sizes and indexes: equal if and only if ids mean the same samples."""
    _mapped: Recent[int, Records] = field(default_factory=lambda: Recent(_MAPPED_INDEXES), repr=False)

    @property
    def num_samples(self) -> int:
        """N: ids are 0..N-1."""
        return int(self.first_ids[-1])

    @property
    def shard_counts(self) -> Ids:
        """Samples of each shard, int64 [S]."""
        return np.diff(self.first_ids)

    def locate(self, ids: Ids) -> tuple[Ids, Ids]:
        """Shard and row in the shard of each id, int64 [n] each. `ValueError` for an id outside 0..N-1."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not (0 <= ids.min() and ids.max() < self.num_samples):
            raise ValueError(f"sample ids must be 0..{self.num_samples - 1}, got {ids.min()}..{ids.max()}")
        shards = np.searchsorted(self.first_ids, ids, side="right") - 1
        return shards, ids - self.first_ids[shards]

    def locate_one(self, sample_id: int) -> int:
        """The shard of one id. `ValueError` if it is outside 0..N-1."""
        return int(self.locate(np.array([sample_id], dtype=np.int64))[0][0])

    def records(self, shard: int) -> Records:
        """The index of one shard, mapped; `UserError` if the file is missing or not the one of the manifest."""

        def load() -> Records:
            entry = self.shards[shard]
            records = read_records(entry.index_path, sha256=entry.row.sha256)
            inside = int(records["offset"].max(initial=0)) < entry.row.bytes  # else the sum below could wrap
            ends = records["offset"] + records["size"]
            if len(records) != entry.row.samples or not inside or int(ends.max()) > entry.row.bytes:
                raise UserError(f"{entry.index_path} points outside its shard; delete it and its manifest.json")
            return records

        return self._mapped.get(shard, load)

    def labels(self) -> Ids:
        """The label of every sample, int64 [N]; negative where there is none (see `shard_index`)."""
        if not self.shards:
            return np.empty(0, dtype=np.int64)
        return np.concatenate([self.records(shard)["label"].astype(np.int64) for shard in range(len(self.shards))])


def _nothing_to_poll() -> None:
    """For callers whom nothing interrupts."""


def open_dataset(
    spec: str, *, fallback_dir: Path, num_threads: int = 8, poll: Callable[[], None] = _nothing_to_poll
) -> DatasetIndex:
    """The data set that `spec` names (folder, brace or glob pattern, manifest), indexing what is new or has changed.

    Index files go beside the shards, or below `fallback_dir` where that folder cannot be written to. Several processes
    may do this at once, though it is wasted work: they write the same bytes, each file at once.
    `poll` is called after each shard that was indexed and may raise; what was indexed until then is kept.
    `UserError` if there are no shards, one is missing or damaged, or a manifest is unreadable.
    """
    if is_manifest(spec):
        manifest = Path(spec).absolute()
        paths = sorted(manifest.parent / name for name in _read_manifest(manifest))
        missing = [path for path in paths if not path.is_file()]
        if missing or not paths:
            what = f"names {missing[0].name}, which is not beside it" if missing else "names no shards"
            raise UserError(f"{manifest} {what}; restore the shards, or delete the manifest and name the folder")
    else:
        paths = list_shards(spec)
    located: dict[Path, tuple[ManifestRow, Path]] = {}
    for folder, group in groupby(paths, key=lambda path: path.parent):
        located |= _index_folder(folder, list(group), fallback_dir, num_threads, poll)
    common = Path(os.path.commonpath([path.parent for path in paths]))
    shards = tuple(
        Shard(path=path, name=path.relative_to(common).as_posix(), row=located[path][0], index_path=located[path][1])
        for path in paths
    )
    counts = [0, *(shard.row.samples for shard in shards)]
    return DatasetIndex(
        shards=shards,
        first_ids=np.cumsum(counts, dtype=np.int64),
        hash=_hash((shard.name, shard.row) for shard in shards),
    )


def _index_folder(
    folder: Path, paths: list[Path], fallback_dir: Path, num_threads: int, poll: Callable[[], None]
) -> dict[Path, tuple[ManifestRow, Path]]:
    """Rows and index files of some shards of one folder, indexed where no manifest knows them as they are now."""
    elsewhere = fallback_dir.absolute() / f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
    located: dict[Path, tuple[ManifestRow, Path]] = {}
    for home in (folder, elsewhere):
        rows = _read_manifest(home / MANIFEST_NAME) if (home / MANIFEST_NAME).exists() else {}
        for path in paths:
            index_path = home / (path.name + INDEX_SUFFIX)
            row = rows.get(path.name)
            if path not in located and row is not None and _is_current(row, path) and index_path.is_file():
                located[path] = row, index_path
    stale = [path for path in paths if path not in located]
    if stale:
        try:
            located |= _make_indexes(stale, folder, folder, num_threads, poll)
        except OSError as error:
            if error.errno not in _UNWRITABLE:
                raise UserError(f"cannot index {folder}: {error.strerror}; check its disk") from error
            located |= _make_indexes_elsewhere(stale, folder, elsewhere, num_threads, poll)
    return located


def _make_indexes_elsewhere(
    paths: list[Path], folder: Path, home: Path, num_threads: int, poll: Callable[[], None]
) -> dict[Path, tuple[ManifestRow, Path]]:
    try:
        home.mkdir(parents=True, exist_ok=True)
        return _make_indexes(paths, folder, home, num_threads, poll)
    except OSError as error:
        raise UserError(
            f"neither {folder} nor {home} can hold the index of the shards ({error.strerror}); make one writable"
        ) from error


def _make_indexes(
    paths: list[Path], folder: Path, home: Path, num_threads: int, poll: Callable[[], None]
) -> dict[Path, tuple[ManifestRow, Path]]:
    """Index shards into the folder `home` and add their rows to its manifest."""
    _probe(home)

    def make(path: Path) -> tuple[ManifestRow, Path]:
        index = index_shard(path)
        index_path = home / (path.name + INDEX_SUFFIX)
        write_records(index_path, index.records)
        row = ManifestRow(
            name=path.name,
            bytes=index.bytes,
            mtime_ns=index.mtime_ns,
            samples=len(index.records),
            sha256=records_sha256(index.records),
        )
        return row, index_path

    made: dict[Path, tuple[ManifestRow, Path]] = {}
    threads = ThreadPoolExecutor(max(1, num_threads))  # reading headers mostly waits for the file system
    try:
        for path, row in zip(paths, threads.map(make, paths), strict=True):
            made[path] = row
            poll()
    finally:
        threads.shutdown(cancel_futures=True)
        if made:  # an interrupted indexing goes on from here
            _add_to_manifest(home / MANIFEST_NAME, folder, [row for row, _ in made.values()])
    return made


def _add_to_manifest(manifest: Path, folder: Path, new: list[ManifestRow]) -> None:
    # Other shards of the folder may belong to another data set (train beside test): keep their rows.
    rows = _read_manifest(manifest) if manifest.exists() else {}
    rows = {name: row for name, row in rows.items() if (folder / name).is_file()}
    rows |= {row.name: row for row in new}
    ordered = [rows[name] for name in sorted(rows)]
    document = {
        "version": _MANIFEST_VERSION,
        "hash": _hash((row.name, row) for row in ordered),
        "samples": sum(row.samples for row in ordered),
        "shards": [asdict(row) for row in ordered],
    }
    write_atomically(manifest, (json.dumps(document, indent=1) + "\n").encode())


def _probe(home: Path) -> None:
    """Find out before the long work, not after it, that a folder cannot be written to (`OSError`)."""
    write_atomically(home / ".index-probe", b"")
    (home / ".index-probe").unlink(missing_ok=True)


def _is_current(row: ManifestRow, path: Path) -> bool:
    stat = path.stat()
    return (stat.st_size, stat.st_mtime_ns) == (row.bytes, row.mtime_ns)


def _hash(rows: Iterable[tuple[str, ManifestRow]]) -> str:
    digest = hashlib.sha256(b"dino_dist data set 1\n")
    for name, row in rows:
        digest.update(f"{row.bytes} {row.samples} {row.sha256} {name}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _read_manifest(path: Path) -> dict[str, ManifestRow]:
    """The rows of a manifest by shard name; `UserError` if it is anything but a manifest of this version."""
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise ValueError("too large")
        document: Any = json.loads(path.read_bytes())
        if not isinstance(document, dict) or document.get("version") != _MANIFEST_VERSION:
            raise ValueError(f"version {_MANIFEST_VERSION} is understood")
        rows = [_checked_row(row) for row in document["shards"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path} is no shard manifest ({reason}); delete it and it is made again") from error
    return {row.name: row for row in rows}


def _checked_row(fields: Any) -> ManifestRow:
    """A row as written by `_make_indexes`; names stay in their folder, counts stay possible. `ValueError` otherwise."""
    if not all(isinstance(fields[key], str) for key in ("name", "sha256")):
        raise ValueError("a name or digest is no text")
    row = ManifestRow(**fields)
    bare = row.name.endswith(".tar") and not set(b"/\0\n") & set(os.fsencode(row.name))
    numbers = all(type(value) is int and 0 <= value < 2**63 for value in (row.bytes, row.mtime_ns, row.samples))
    # A sample needs a header and a block.
    if not (bare and numbers and len(row.sha256) == 64 and 1 <= row.samples <= max(1, row.bytes // 512)):
        raise ValueError(f"row {str(fields)[:80]}")
    return row
