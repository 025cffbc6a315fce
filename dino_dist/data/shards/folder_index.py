"""Indexes of shards in a folder of a file system: found where they are current, made where they are not."""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from dino_dist.data.shards.shard_index import (
    INDEX_SUFFIX,
    ShardIndex,
    index_shard,
    records_sha256,
    write_atomically,
    write_records,
)
from dino_dist.data.shards.shard_list import MANIFEST_NAME
from dino_dist.data.shards.shard_manifest import ManifestRow, add_to_manifest, read_manifest
from dino_dist.data.stores.store_errors import redacted
from dino_dist.errors import UserError

_SAVE_EVERY_S = 30.0
_SAVE_SHARE = 0.05
"""Of the time, at most, goes into writing the manifest again: it may have a million rows."""
_UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class Indexed(NamedTuple):
    """A shard's row and its index file."""

    row: ManifestRow
    index_path: Path


class IndexJob(NamedTuple):
    """How missing indexes are made."""

    num_threads: int
    poll: Callable[[], None]
    """Called after each shard; may raise, and what was indexed until then is kept."""
    skip: Callable[[str, UserError], None] | None = None
    """Told of a shard that cannot be indexed, which is then left out; None: its error ends the work."""
    save_every_s: float = _SAVE_EVERY_S
    """How often what was indexed is added to the manifest, so that a killed process has not worked in vain."""


def home_elsewhere(folder: str, fallback_dir: Path) -> Path:
    """Where the index files of a folder (or URL) go that cannot hold them itself."""
    folder = redacted(folder)
    name = folder.rstrip("/").rpartition("/")[2].removeprefix("***@")
    return fallback_dir.absolute() / f"{name}-{hashlib.sha256(folder.encode()).hexdigest()[:12]}"


def index_folder(folder: Path, paths: list[Path], fallback_dir: Path, job: IndexJob) -> dict[str, Indexed]:
    """Rows and index files of some shards of one folder, by path."""
    elsewhere = home_elsewhere(str(folder), fallback_dir)
    located: dict[str, Indexed] = {}
    for home in (folder, elsewhere):
        rows = read_manifest(home / MANIFEST_NAME) if (home / MANIFEST_NAME).exists() else {}
        for path in paths:
            index_path = home / (path.name + INDEX_SUFFIX)
            row = rows.get(path.name)
            if str(path) not in located and row is not None and _is_current(row, path) and index_path.is_file():
                located[str(path)] = Indexed(row, index_path)
    stale = [path for path in paths if str(path) not in located]
    if stale:
        try:
            located |= _make_indexes(stale, folder, folder, job)
        except OSError as error:
            if error.errno not in _UNWRITABLE:
                raise UserError(f"cannot index {folder}: {error.strerror}; check its disk") from error
            located |= _make_indexes_elsewhere(stale, folder, elsewhere, job)
    return located


def make_indexes(
    names: dict[str, str],
    home: Path,
    job: IndexJob,
    *,
    index: Callable[[str], ShardIndex],
    is_there: Callable[[str], bool],
) -> dict[str, Indexed]:
    """Index shards (location -> name) into the folder `home` and add their rows to its manifest, from time to time.

    `OSError` if `home` cannot be written to, found out before the long work.
    """
    _probe(home)

    def make(location: str) -> Indexed | UserError:
        try:
            made = index(location)
        except UserError as error:
            return error
        index_path = home / (names[location] + INDEX_SUFFIX)
        write_records(index_path, made.records)
        row = ManifestRow(
            name=names[location],
            bytes=made.bytes,
            mtime_ns=made.mtime_ns,
            samples=len(made.records),
            sha256=records_sha256(made.records),
        )
        return Indexed(row, index_path)

    made: dict[str, Indexed] = {}
    unsaved: list[ManifestRow] = []

    def save() -> float:
        """Add rows to the manifest; when to do so again."""
        began_s = time.monotonic()
        if unsaved:
            add_to_manifest(home / MANIFEST_NAME, unsaved, is_there=is_there)
            unsaved.clear()
        now_s = time.monotonic()
        return now_s + max(job.save_every_s, (now_s - began_s) / _SAVE_SHARE if job.save_every_s else 0.0)

    save_at_s = save()
    threads = ThreadPoolExecutor(max(1, job.num_threads))  # reading mostly waits for the file system
    try:
        for location, outcome in zip(names, threads.map(make, names), strict=True):
            if isinstance(outcome, Indexed):
                made[location] = outcome
                unsaved.append(outcome.row)
            elif job.skip is None:
                raise outcome
            else:
                job.skip(location, outcome)
            if time.monotonic() >= save_at_s:
                save_at_s = save()
            job.poll()
    finally:
        threads.shutdown(cancel_futures=True)
        save()  # an interrupted indexing goes on from here
    return made


def _make_indexes(paths: Iterable[Path], folder: Path, home: Path, job: IndexJob) -> dict[str, Indexed]:
    names = {str(path): path.name for path in paths}
    return make_indexes(
        names,
        home,
        job,
        index=lambda location: index_shard(Path(location)),
        is_there=lambda name: (folder / name).is_file(),
    )


def _make_indexes_elsewhere(paths: list[Path], folder: Path, home: Path, job: IndexJob) -> dict[str, Indexed]:
    try:
        home.mkdir(parents=True, exist_ok=True)
        return _make_indexes(paths, folder, home, job)
    except OSError as error:
        raise UserError(
            f"neither {folder} nor {home} can hold the index of the shards ({error.strerror}); make one writable"
        ) from error


def _probe(home: Path) -> None:
    write_atomically(home / ".index-probe", b"")
    (home / ".index-probe").unlink(missing_ok=True)


def _is_current(row: ManifestRow, path: Path) -> bool:
    stat = path.stat()
    return (stat.st_size, stat.st_mtime_ns) == (row.bytes, row.mtime_ns)
