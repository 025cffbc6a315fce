"""Samples of shards behind URLs: from this node's cache if there is one, else by ranged reads, checked either way."""

from __future__ import annotations

import logging
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from dino_dist.data.reading.open_files import OpenFiles
from dino_dist.data.reading.shard_cache import PROTECT_S, CacheUnavailableError, RemoteShard, ShardCache, mark_used
from dino_dist.data.shards.descriptors import share_of_descriptors
from dino_dist.data.shards.index import DatasetIndex
from dino_dist.data.stores.remote_store import RemoteStore, StoreClosed
from dino_dist.data.stores.store_errors import changed_error, index_it_again
from dino_dist.data.stores.store_options import StoreCounts, StoreOptions, Tally
from dino_dist.errors import UserError

_log = logging.getLogger(__name__)

_OPEN_FILES = 256
_MARK_EVERY_S = 1.0
_LEAVE_CACHE_S = 30.0
"""After the cache could not take a shard, how long it is read directly before the cache is asked again."""
_ASK_AGAIN_S = 1.0
"""How often fetching a shard ahead is tried, if another process fetches it or there is no room yet."""
_PREFETCH_THREADS = 2


class RemoteBytes:
    """What one process needs to read shards of stores; for any number of threads."""

    def __init__(
        self, dataset: DatasetIndex, options: StoreOptions, *, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._dataset = dataset
        self._options = options
        self._clock_s = clock_s
        self._tally = Tally()
        self._store = RemoteStore(options, self._tally)
        self._cache = (
            None
            if options.cache_dir is None
            else ShardCache(
                folder=Path(options.cache_dir).absolute(), options=options, store=self._store, tally=self._tally
            )
        )
        self._files = OpenFiles(share_of_descriptors(_OPEN_FILES), self._open_cached)
        self._lock = threading.Lock()
        self._marked_s: dict[int, float] = {}
        self._direct_until_s: dict[int, float] = {}
        self._not_ahead_s: dict[int, float] = {}
        self._right_size: set[int] = set()
        self._said: set[str] = set()
        self._hinted: tuple[int, ...] = ()
        self._prefetch = _Prefetch(self._fetch_ahead)

    def read(self, shard: int, offset: int, size: int, crc32: int) -> bytes:
        """As `shard_bytes.ShardBytes.read`."""
        if self._cache is not None:
            data = self._read_cached(self._cache, shard, offset, size, crc32)
            if data is not None:
                return data
            self._tally.add(direct_reads=1)
        return self._read_directly(shard, offset, size, crc32)

    def will_need(self, shards: Sequence[int]) -> None:
        """Fetch the first of these that are not in use here, in this order, instead of those hinted at before."""
        self._hinted = self._what_fits(shards)
        self._prefetch.replace([shard for shard in self._hinted if shard not in self._files])

    def counts(self) -> StoreCounts:
        """The counts so far."""
        return self._tally.read()

    def close(self) -> None:
        """End the prefetching and the connections, and close the files."""
        self._prefetch.close()
        self._store.close()
        self._files.close()

    def _what_fits(self, shards: Sequence[int]) -> tuple[int, ...]:
        """The next shards that the cache holds beside those in use: more would push out what is needed first."""
        in_use_since_s = self._clock_s() - PROTECT_S
        in_use = {shard for shard, marked_s in list(self._marked_s.items()) if marked_s > in_use_since_s}
        left_bytes = self._options.cache_bytes - sum(self._bytes_of(shard) for shard in in_use.difference(shards))
        left_shards = self._options.prefetch_shards
        fitting: list[int] = []
        for shard in shards:
            left_bytes -= self._bytes_of(shard)
            left_shards -= shard not in self._files
            if left_bytes < 0 or left_shards < 0:
                break
            fitting.append(shard)
        return tuple(fitting)

    def _bytes_of(self, shard: int) -> int:
        return self._dataset.shards[shard].row.bytes

    def _read_directly(self, shard: int, offset: int, size: int, crc32: int) -> bytes:
        entry = self._dataset.shards[shard]
        if shard not in self._right_size:  # once: a shard that was replaced is told from one with a damaged sample
            now = self._store.size_bytes(entry.location)
            if now != entry.row.bytes:
                raise changed_error(entry.location, now_bytes=now, indexed_bytes=entry.row.bytes)
            self._right_size.add(shard)
        return self._store.read(
            entry.location,
            offset,
            size,
            lambda data: zlib.crc32(data) == crc32,
            if_wrong=index_it_again(entry.index_path),
        )

    def _read_cached(self, cache: ShardCache, shard: int, offset: int, size: int, crc32: int) -> bytes | None:
        """The bytes by way of the cache; None if it cannot give them."""
        try:
            with self._files.lease(shard) as fd:
                data = os.pread(fd, size, offset)
                self._mark_used(shard, fd)
        except CacheUnavailableError as error:
            self._say_once("unavailable", f"samples are read from the store one by one, for lack of a cache: {error}")
            return None
        except OSError as error:  # the disk of this node fails; the store does not
            self._say_once("unreadable", f"the cache {cache.folder} cannot be read ({error.strerror}): the store is")
            self._files.drop(shard)
            self._leave_cache(shard)
            return None
        if len(data) == size and zlib.crc32(data) == crc32:
            return data
        # The disk of this node has damaged it since it was fetched.
        self._say_once("damaged", f"a shard in the cache {cache.folder} was damaged there: it is fetched again")
        cache.discard(self._remote_shard(shard))
        self._files.drop(shard)
        return None

    def _open_cached(self, shard: int) -> int:
        assert self._cache is not None
        if self._clock_s() < self._direct_until_s.get(shard, 0.0):
            raise CacheUnavailableError("it could not take this shard a moment ago")
        try:
            fd = self._cache.open(self._remote_shard(shard))
        except CacheUnavailableError:
            self._leave_cache(shard)
            raise
        # A file that made room takes space as long as it is open here.
        idle_since_s = self._clock_s() - PROTECT_S
        self._files.drop_where(lambda key, other: self._marked_s.get(key, 0.0) < idle_since_s and _is_removed(other))
        return fd

    def _leave_cache(self, shard: int) -> None:
        self._direct_until_s[shard] = self._clock_s() + _LEAVE_CACHE_S

    def _fetch_ahead(self, shard: int) -> None:
        assert self._cache is not None
        remote = self._remote_shard(shard)
        now_s = self._clock_s()
        if self._cache.keep(remote) or now_s < max(
            self._not_ahead_s.get(shard, 0.0), self._direct_until_s.get(shard, 0.0)
        ):
            return
        self._not_ahead_s[shard] = now_s + _ASK_AGAIN_S
        for wanted in self._hinted:  # what is not wanted makes room
            self._cache.keep(self._remote_shard(wanted))
        os.close(self._cache.open(remote, wait=False))

    def _remote_shard(self, shard: int) -> RemoteShard:
        entry = self._dataset.shards[shard]
        return RemoteShard(
            entry.location, entry.row.bytes, entry.row.sha256, partial(self._dataset.records, shard), entry.index_path
        )

    def _mark_used(self, shard: int, fd: int) -> None:
        now_s = self._clock_s()
        if now_s - self._marked_s.get(shard, 0.0) > _MARK_EVERY_S:
            self._marked_s[shard] = now_s
            mark_used(fd)

    def _say_once(self, about: str, line: str) -> None:
        with self._lock:
            is_new = about not in self._said
            self._said.add(about)
        if is_new:
            _log.warning(line)


def _is_removed(fd: int) -> bool:
    try:
        return os.fstat(fd).st_nlink == 0
    except OSError:  # its file system has lost it
        return True


class _Prefetch:
    """Threads that work through the newest list of shards."""

    def __init__(self, fetch: Callable[[int], None]) -> None:
        self._fetch = fetch
        self._wanted: deque[int] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads: list[threading.Thread] = []

    def replace(self, shards: Sequence[int]) -> None:
        """Fetch these, and no longer what was wanted before and is not under way."""
        with self._changed:
            self._wanted = deque(shards)
            self._changed.notify_all()
            if shards and not self._threads and not self._closed:
                # Daemons: a process that ends does not wait for a store that stalls.
                self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(_PREFETCH_THREADS)]
                for thread in self._threads:
                    thread.start()

    def close(self) -> None:
        """Begin nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                shard = self._wanted.popleft()
            # Whoever reads the shard meets the same failure, and says so. A shard that another process fetches is
            # left to it: so the ranks of a node fetch different ones.
            with suppress(CacheUnavailableError, UserError, StoreClosed):
                self._fetch(shard)
