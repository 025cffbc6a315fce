"""The bytes of samples, wherever their shards lie: a file system, an object store, or a copy of it on this node."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from dino_dist.data.reading.decode import BadSample
from dino_dist.data.reading.open_files import OpenFiles
from dino_dist.data.reading.remote_bytes import RemoteBytes
from dino_dist.data.shards.descriptors import share_of_descriptors
from dino_dist.data.shards.index import DatasetIndex
from dino_dist.data.stores.store_options import StoreCounts, StoreOptions
from dino_dist.errors import UserError

__all__ = ["ShardBytes", "StoreCounts", "StoreOptions"]

_OPEN_FILES = 256
_PAUSES_S = (0.0, 1.0, 5.0, 20.0)
"""Between the tries of a local read that fails."""


class _Here:
    """What belongs to one process: descriptors, connections, threads."""

    def __init__(self, dataset: DatasetIndex, options: StoreOptions) -> None:
        self.local = _LocalBytes(dataset)
        self.remote = RemoteBytes(dataset, options)


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardBytes:
    """Reads the bytes of samples, from any number of threads.

    A copy that travels to another process, or is forked into one, opens files and connections of its own.
    """

    dataset: DatasetIndex
    options: StoreOptions = field(default_factory=StoreOptions)
    _here: dict[int, _Here] = field(default_factory=dict, init=False, repr=False)

    def read(self, shard: int, offset: int, size: int, crc32: int) -> bytes:
        """`size` bytes at `offset` of a shard, whose CRC-32 is `crc32` (as the index says).

        `UserError` if the shard is gone, has changed since it was indexed or its store refuses or fails for good;
        `BadSample` if a local shard was cut short or damaged after it was indexed.
        """
        here = self._state()
        if self.dataset.shards[shard].is_remote:
            return here.remote.read(shard, offset, size, crc32)
        return here.local.read(shard, offset, size, crc32)

    def will_need(self, shards: Sequence[int]) -> None:
        """A hint that these shards are read next, in this order: remote ones are fetched into the cache, if any.

        Each call replaces the hints of the one before; of the shards that are not in use here yet, the first
        `prefetch_shards` count. Returns at once.
        """
        remote = [shard for shard in shards if self.dataset.shards[shard].is_remote]
        if remote and self.options.cache_dir is not None:
            self._state().remote.will_need(remote)

    def counts(self) -> StoreCounts:
        """What this process has read from stores so far, for the metrics."""
        here = self._here.get(os.getpid())
        return StoreCounts() if here is None else here.remote.counts()

    def close(self) -> None:
        """Close what is open, and count from zero; reading opens it again. Not while another thread reads."""
        here = self._here.pop(os.getpid(), None)
        if here is not None:
            here.local.close()
            here.remote.close()

    def _state(self) -> _Here:
        pid = os.getpid()
        here = self._here.get(pid)
        # `setdefault` is one step for all threads; a lock could be held by another thread at a fork.
        return here if here is not None else self._here.setdefault(pid, _Here(self.dataset, self.options))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_here": {}}


class _LocalBytes:
    """Shards on a file system."""

    def __init__(self, dataset: DatasetIndex) -> None:
        self._dataset = dataset
        self._files = OpenFiles(share_of_descriptors(_OPEN_FILES), self._open)

    def read(self, shard: int, offset: int, size: int, crc32: int) -> bytes:
        """As `ShardBytes.read`."""
        data = self._pread(shard, offset, size)
        if len(data) == size and zlib.crc32(data) != crc32:
            self._files.drop(shard)
            data = self._pread(shard, offset, size)  # once more: a damaged page or handle must not decide
        if len(data) != size:
            raise BadSample(f"{len(data)} of {size} bytes: the shard was truncated after it was indexed")
        if zlib.crc32(data) != crc32:
            raise BadSample("these bytes are not those that were indexed: the shard was damaged or changed since")
        return data

    def close(self) -> None:
        """Close what is open."""
        self._files.close()

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        for pause_s in (*_PAUSES_S, None):
            try:
                with self._files.lease(shard) as fd:
                    return os.pread(fd, size, offset)
            except OSError as error:
                # A network file system loses handles when its server restarts, and fails while that takes: with a new
                # one then. An I/O error must not pass for a bad sample: the stream would depend on the moment.
                self._files.drop(shard)
                if pause_s is None:
                    raise UserError(
                        f"{self._dataset.shards[shard].location}: {error.strerror or error} (tried "
                        f"{len(_PAUSES_S) + 1} times); see to its file system, then start again",
                        may_pass=True,
                    ) from error
                time.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    def _open(self, shard: int) -> int:
        entry = self._dataset.shards[shard]
        try:
            fd = os.open(entry.location, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise UserError(f"{entry.location}: {error.strerror}; the data set needs this shard, restore it") from error
        try:
            size = os.fstat(fd).st_size
        except OSError:
            os.close(fd)
            raise
        if size != entry.row.bytes:
            os.close(fd)
            raise UserError(
                f"{entry.location} has {size} bytes but had {entry.row.bytes} when it was indexed; restore it, "
                f"or start again with a new run folder"
            )
        return fd
