"""Whole shards of a store on this node, fetched once for all ranks and jobs that share the folder.

A shard appears in the folder under the name of its URL and its index, complete, durable and checked against the
checksums of its index, or not at all. Locks are those of the system, so a killed process holds none: what it left
half written is known by its free lock, and removed. Files that no one has used lately make room for new ones; a reader
that has one of them open keeps it. Of the disk, 2 % or 1 GiB (whichever is less) are left free for others.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dino_dist.data.reading.file_locks import is_locked_now, lock_file, removed_if_abandoned
from dino_dist.data.shards.shard_index import Records
from dino_dist.data.stores.remote_store import RemoteStore, StoreClosed
from dino_dist.data.stores.store_errors import changed_error, index_it_again, redacted
from dino_dist.data.stores.store_options import StoreOptions, Tally
from dino_dist.errors import UserError

_BLOCK_BYTES = 4 * 2**20
_STREAMS = 4
_FILLS_AT_ONCE = 4
_POLL_S = 0.02
PROTECT_S = 10.0
"""Files used in this time are not removed: they would only be fetched again."""
_WHOLE, _PART, _LOCK = ".tar", ".part", ".lock"
_LEFT_FREE_BYTES = 2**30
_LEFT_FREE_FRACTION = 0.02
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_OURS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_NO_PREALLOCATION = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})


class CacheUnavailableError(Exception):
    """The cache cannot take or give this shard now; the message is the reason."""


class BusyError(CacheUnavailableError):
    """Another process or thread is fetching this shard."""


class RemoteShard(NamedTuple):
    """A shard as its index knows it."""

    url: str
    bytes: int
    sha256: str
    """Of its index."""
    records: Callable[[], Records]
    index_path: Path
    """Where its index lies here."""


class _Entry(NamedTuple):
    path: Path
    bytes: int
    used_s: float


@dataclass(frozen=True, kw_only=True)
class ShardCache:
    """One process's view of the folder."""

    folder: Path
    """Made if need be when the first shard is fetched."""
    options: StoreOptions
    store: RemoteStore
    tally: Tally
    protect_s: float = PROTECT_S
    block_bytes: int = _BLOCK_BYTES
    """What one request fetches."""
    fills: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(_FILLS_AT_ONCE))
    """Bounds the shards that this process fetches at once, and so its memory."""

    def open(self, shard: RemoteShard, *, wait: bool = True) -> int:
        """A read-only descriptor of the whole shard, fetched if it is not here.

        If another fetches it, waits for that as long as one request may take (without `wait`, not at all), then raises
        `BusyError`. `CacheUnavailableError` if there is no room or the folder cannot be used; `UserError` if the store
        refuses or the shard is not what its index says.
        """
        path = self.path_of(shard)
        try:
            fd = self._opened(path, shard)
            if fd is not None:
                return fd
            self.folder.mkdir(parents=True, exist_ok=True)
            # Not longer: a store that stalls for others is to fail here too before this passes for a hang.
            wait_s = self.options.timeout_s if wait else 0.0
            with self._filling(wait_s), self._locked(path.with_suffix(_LOCK), wait_s):
                fd = self._opened(path, shard)  # another has fetched it meanwhile
                if fd is None:
                    fd = self._fetch(shard, path)
                    self.tally.add(cache_fills=1)
                return fd
        except OSError as error:
            raise self._unusable(error) from error

    def keep(self, shard: RemoteShard) -> bool:
        """Whether the shard is here; then it counts as used now, and others make room first.

        `CacheUnavailableError` if the folder cannot be used.
        """
        path = self.path_of(shard)
        try:
            try:
                os.utime(path)
            except OSError as error:
                if error.errno not in _NOT_OURS:
                    raise
                path.stat()  # another user's, or nobody can write here: it is of use all the same
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._unusable(error) from error
        return True

    def discard(self, shard: RemoteShard) -> None:
        """Remove a file whose bytes turned out to be wrong."""
        with suppress(OSError):
            self.path_of(shard).unlink()

    def path_of(self, shard: RemoteShard) -> Path:
        """Where the shard lies once it is here."""
        digest = hashlib.sha256(f"{shard.bytes} {shard.sha256} {shard.url}".encode()).hexdigest()[:32]
        return self.folder / f"{digest}{_WHOLE}"

    def _unusable(self, error: OSError) -> CacheUnavailableError:
        return CacheUnavailableError(f"{self.folder}: {error.strerror or error}")

    def _opened(self, path: Path, shard: RemoteShard) -> int | None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            is_whole = os.fstat(fd).st_size == shard.bytes
            if is_whole:
                mark_used(fd)
            else:
                path.unlink(missing_ok=True)
        except BaseException:
            os.close(fd)
            raise
        if not is_whole:
            os.close(fd)
            return None
        self.tally.add(cache_hits=1)
        return fd

    def _fetch(self, shard: RemoteShard, path: Path) -> int:
        """Fetch a shard under its lock; it appears at `path`, open at the descriptor returned."""
        size = self.store.size_bytes(shard.url)
        if size != shard.bytes:
            raise changed_error(shard.url, now_bytes=size, indexed_bytes=shard.bytes)
        part, fd = self._reserved(path, shard.bytes)
        try:
            self._download(shard, fd)
            os.fsync(fd)
            readable = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
            try:
                with self._room_locked():  # else who counts the files might count neither name
                    os.replace(part, path)
            except BaseException:
                os.close(readable)
                raise
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)  # which gives the lock back
        return readable

    def _download(self, shard: RemoteShard, fd: int) -> None:
        records = shard.records()
        todo = list(range(0, shard.bytes, self.block_bytes))
        for _ in range(self.options.max_attempts):
            self._download_blocks(shard, fd, todo)
            wrong = _wrong_blocks(fd, records, self.block_bytes)
            if not wrong:
                return
            self.tally.add(retries=len(wrong))
            todo = sorted(wrong)
        raise UserError(
            f"{redacted(shard.url)}: the bytes at {todo[0]} and {len(todo) - 1} other places are not those that were "
            f"indexed (checksums, tried {self.options.max_attempts} times); {index_it_again(shard.index_path)}"
        )

    def _download_blocks(self, shard: RemoteShard, fd: int, starts: list[int]) -> None:
        left = iter(starts)
        failures: list[Exception] = []
        done: list[int] = []

        def stream() -> None:
            # `next` of a list's iterator is one step for the interpreter: no block goes to two threads.
            while not failures and (start := next(left, None)) is not None:
                try:
                    size = min(self.block_bytes, shard.bytes - start)
                    _write_all(fd, self.store.read(shard.url, start, size), start)
                except (UserError, StoreClosed, OSError) as error:
                    failures.append(error)
                    return
                done.append(start)

        # Daemons: a process that ends does not wait for a store that stalls.
        threads = [threading.Thread(target=stream, daemon=True) for _ in range(min(_STREAMS, len(starts)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        if len(done) != len(starts):
            raise RuntimeError(f"a thread that fetched {redacted(shard.url)} died; its own traceback says why")

    def _reserved(self, path: Path, size: int) -> tuple[Path, int]:
        """An empty file of this size, locked by this process, for which room was made."""
        part = path.with_name(f"{path.stem}-{uuid.uuid4().hex}{_PART}")
        with self._room_locked():
            used = self._make_room(size)
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                try:
                    _preallocate(fd, size)
                except OSError as error:
                    if error.errno not in _DISK_FULL or not used:
                        raise
                    # The disk holds less than the cache may: what is here already makes room.
                    os.ftruncate(fd, 0)
                    self._make_room(size, used)
                    _preallocate(fd, size)
            except BaseException:
                os.close(fd)
                part.unlink(missing_ok=True)
                raise
        return part, fd

    def _make_room(self, size: int, disk_bytes: int | None = None) -> int:
        """Remove the files used longest ago until `size` more bytes fit; the bytes that are left.

        `disk_bytes`: what the disk turned out to hold of the cache; None reckons with what it says is free.
        """
        allowed = self.options.cache_bytes
        if size > allowed:
            raise CacheUnavailableError(
                f"{self.folder}: data.cache_gib={allowed / 2**30:g} ({allowed} bytes) is less than one shard of {size} "
                f"bytes"
            )
        whole = sorted(self._entries(_WHOLE), key=lambda entry: entry.used_s)
        used = sum(entry.bytes for entry in whole)
        used += sum(entry.bytes for entry in self._entries(_PART) if not removed_if_abandoned(entry.path))
        if disk_bytes is None:
            disk_bytes = used + self._spare_bytes()
        limit = min(allowed, disk_bytes)
        now_s = time.time()  # that of the files, which several processes share
        for entry in whole:
            if used + size <= limit or abs(now_s - entry.used_s) < self.protect_s:
                break
            entry.path.unlink(missing_ok=True)
            self.tally.add(cache_evictions=1)
            used -= entry.bytes
        if used + size > limit:
            full, helps = (
                (f"data.cache_gib={allowed / 2**30:g}", "a larger data.cache_gib")
                if limit == allowed
                else ("what its disk can spare", "a larger or emptier disk")
            )
            raise CacheUnavailableError(
                f"{self.folder} is full of shards in use: {used} of {max(limit, 0)} bytes ({full}), {size} more are "
                f"needed; {helps} helps"
            )
        return used

    def _spare_bytes(self) -> int:
        """What may still be written to this disk; negative if others have filled it already."""
        disk = os.statvfs(self.folder)
        left_free = min(_LEFT_FREE_BYTES, int(_LEFT_FREE_FRACTION * disk.f_blocks * disk.f_frsize))
        return disk.f_bavail * disk.f_frsize - left_free

    def _entries(self, suffix: str) -> Iterator[_Entry]:
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(suffix):
                    with suppress(FileNotFoundError):  # renamed or removed meanwhile
                        stat = entry.stat(follow_symlinks=False)
                        yield _Entry(Path(entry.path), stat.st_size, stat.st_mtime)

    def _room_locked(self) -> AbstractContextManager[None]:
        """Hold the lock under which files come, go and are counted."""
        return self._locked(self.folder / f"room{_LOCK}", self.options.timeout_s)

    @contextmanager
    def _filling(self, wait_s: float) -> Iterator[None]:
        """Be one of the threads of this process that fetch; `BusyError` if others are at it all this time."""
        if not self.fills.acquire(timeout=wait_s):
            raise BusyError(f"{self.folder}: {_FILLS_AT_ONCE} other shards are being fetched")
        try:
            yield
        finally:
            self.fills.release()

    @contextmanager
    def _locked(self, path: Path, wait_s: float) -> Iterator[None]:
        """Hold a lock file; `BusyError` if another holds it all this time."""
        deadline_s = time.monotonic() + wait_s
        fd = lock_file(path)
        try:
            while not is_locked_now(fd):
                if time.monotonic() >= deadline_s:
                    raise BusyError(f"{path} is locked by another process")
                time.sleep(_POLL_S)
            yield
        finally:
            os.close(fd)  # which gives the lock back


def mark_used(fd: int) -> None:
    """Say that a file of the cache is in use; where it cannot take it (another user's, say), others do not know."""
    with suppress(OSError):
        os.utime(fd)


def _preallocate(fd: int, size: int) -> None:
    """Take the space now: a full disk is found before the work, and others count it."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in _NO_PREALLOCATION:
            raise
        os.ftruncate(fd, size)


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _wrong_blocks(fd: int, records: Records, block_bytes: int) -> set[int]:
    """Starts of the blocks that hold a sample whose checksum is wrong."""
    wrong: set[int] = set()
    for offset, size, crc32 in zip(
        records["offset"].tolist(), records["size"].tolist(), records["crc32"].tolist(), strict=True
    ):
        if zlib.crc32(os.pread(fd, size, offset)) != crc32:
            wrong.update(range(offset // block_bytes * block_bytes, offset + max(size, 1), block_bytes))
    return wrong
