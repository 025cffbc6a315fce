"""How remote shards are read, and the counts of what reading them took."""

from __future__ import annotations

from dataclasses import dataclass, fields
from threading import Lock

from dino_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """How shards behind a URL are read; none of it matters for local ones."""

    cache_dir: str | None = None
    """Folder on this node for whole shards, shared by its ranks and by other jobs; null reads each sample by itself."""
    cache_bytes: int = 200 * 10**9
    """How much the cache may hold; the shards used longest ago make room. It stops earlier where the disk would be left
    with less than 2 % or 1 GiB free, whichever is less."""
    max_attempts: int = 8
    """Requests that may fail, for one piece of a shard, before the run ends."""
    timeout_s: float = 30.0
    """How long one request may take; a store that stalls is asked again after it."""
    prefetch_shards: int = 16
    """How many shards that are not in use yet are fetched ahead into the cache. A block of the order is read from all
    its shards at once, so fewer than `shards_per_block` make it wait. Never more than the cache holds beside what is
    in use."""

    def __post_init__(self) -> None:
        if self.cache_bytes < 1:
            raise UserError(f"data.cache_gib={self.cache_bytes / 2**30:g} must be above 0")
        if self.max_attempts < 1:
            raise UserError(f"data.store_attempts={self.max_attempts} must be at least 1")
        if not 0 < self.timeout_s <= 3600:
            raise UserError(f"data.store_timeout_s={self.timeout_s:g} must be above 0 and at most 3600")
        if self.prefetch_shards < 0:
            raise UserError(f"data.cache_ahead_shards={self.prefetch_shards} must be at least 0")


@dataclass(frozen=True, kw_only=True)
class StoreCounts:
    """What reading shards took since the start, in one process; add those of several."""

    requests: int = 0
    """Answered ranged requests."""
    retries: int = 0
    """Requests that failed, stalled or gave wrong bytes, and were made again."""
    bytes_received: int = 0
    cache_hits: int = 0
    """Shards found in the cache."""
    cache_fills: int = 0
    """Shards downloaded into the cache."""
    cache_evictions: int = 0
    """Shards that made room for others."""
    direct_reads: int = 0
    """Samples read from the store by themselves because the cache could not take their shard."""

    def __add__(self, other: StoreCounts) -> StoreCounts:
        sums = {each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)}
        return StoreCounts(**sums)


class Tally:
    """Counts that several threads add to."""

    def __init__(self) -> None:
        self._counts = StoreCounts()
        self._lock = Lock()

    def add(self, **more: int) -> None:
        """Add to the counts of these names."""
        with self._lock:
            self._counts += StoreCounts(**more)

    def read(self) -> StoreCounts:
        """The counts so far."""
        return self._counts
