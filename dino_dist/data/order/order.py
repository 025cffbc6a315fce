"""The order of samples: a pure function of (seed, epoch), read at any position of one endless stream.

Epoch e permutes the shards, cuts them into blocks of `shards_per_block` and permutes the samples within each block, so
that reading stays close to sequential and memory bounded. Position p of the stream lies in epoch p // N; nothing is
dropped at an epoch's end. Ranks, workers and accumulation only cut the stream into slices: they never change it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dino_dist.data.recent import Recent
from dino_dist.randomness import Purpose, permutation, substream

Ids = NDArray[np.int64]

MAX_PARTS = 2**16
"""Data sets of one mixture: their numbers have 16 bits in the streams of the permutations."""

_BLOCKS_HELD = 4
_EPOCHS_HELD = 2


class StreamIds(NamedTuple):
    """What stands at n consecutive positions of a stream, int64 [n] each; together they key all that is random."""

    epochs: Ids
    """Which pass through its data set each sample belongs to."""
    sample_ids: Ids
    """Global ids in the (joined) data set."""
    repeats: Ids
    """Which repeat of the sample in its pass this is: 0 but for samples that a selection repeats."""


class SampleOrder(Protocol):
    """An endless stream of samples, a pure function of the position: what a loader needs to know of it."""

    @property
    def samples_per_epoch(self) -> int:
        """Positions of one epoch, the unit in which training counts."""
        ...

    def ids(self, start: int, stop: int) -> StreamIds:
        """What stands at the positions [start, stop)."""
        ...

    def shards_from(self, position: int, count: int) -> list[int]:
        """The next `count` distinct shards (numbers in the joined data set) read from a position on, soonest first.

        Fewer if the stream reads fewer in all. A hint for reading ahead: of shards first used almost together, such as
        those of one block, the order is not promised.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class _EpochPlan:
    """The shards of one epoch in their order, and where each block of them starts."""

    shards: Ids
    block_starts: Ids
    """Position in the epoch at which each block starts, and N: int64 [blocks + 1]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """The endless stream of (epoch, sample id) over shards that hold `shard_counts` samples each.

    Holds the permutations of a few blocks (8 bytes a sample) and makes others when they are asked for.
    """

    shard_counts: Ids
    """Samples of each shard, int64 [S], all of them positive; ids number the samples through the shards."""
    seed: int
    shards_per_block: int
    """Samples mix within this many shards: larger is more random, smaller reads less at random."""
    part: int = 0
    """Number of the data set in a mixture, below 2^16: sets of equal sizes are shuffled differently."""
    _epochs: Recent[int, _EpochPlan] = field(init=False, default_factory=lambda: Recent(_EPOCHS_HELD), repr=False)
    _blocks: Recent[tuple[int, int], Ids] = field(init=False, default_factory=lambda: Recent(_BLOCKS_HELD), repr=False)

    def __post_init__(self) -> None:
        if self.shards_per_block < 1:
            raise ValueError(f"shards_per_block={self.shards_per_block} must be at least 1")
        if not len(self.shard_counts) or int(self.shard_counts.min()) < 1:
            raise ValueError("every shard must hold a sample, and there must be a shard")
        if not 0 <= self.part < MAX_PARTS:
            raise ValueError(f"part={self.part} must be 0..{MAX_PARTS - 1}")

    @property
    def samples_per_epoch(self) -> int:
        """N."""
        return int(self.shard_counts.sum())

    def ids(self, start: int, stop: int) -> StreamIds:
        """What stands at the positions [start, stop) of the stream; no repeats."""
        if not 0 <= start <= stop:
            raise ValueError(f"start={start} and stop={stop} must satisfy 0 <= start <= stop")
        epochs = np.arange(start, stop, dtype=np.int64) // self.samples_per_epoch
        parts = [np.empty(0, dtype=np.int64)]
        position = start
        while position < stop:
            epoch, in_epoch = divmod(position, self.samples_per_epoch)
            part = self._ids_in_block(epoch, in_epoch, stop - position)
            parts.append(part)
            position += len(part)
        return StreamIds(epochs=epochs, sample_ids=np.concatenate(parts), repeats=np.zeros_like(epochs))

    def shards_from(self, position: int, count: int) -> list[int]:
        """See `SampleOrder`."""
        return first_distinct(self.first_uses(position), min(count, len(self.shard_counts)))

    def first_uses(self, position: int) -> Iterator[tuple[int, int]]:
        """Endless (position, shard) pairs: from where on each block needs each of its shards, in order of position.

        Exact for the block that `position` lies in; for later ones the start of the block stands for all its shards,
        which spares making their permutations: all are first used within its first few samples.
        """
        epoch, in_epoch = divmod(position, self.samples_per_epoch)
        plan = self._epochs.get(epoch, lambda: self._plan(epoch))
        block = int(np.searchsorted(plan.block_starts, in_epoch, side="right")) - 1
        rest = self._ids_in_block(epoch, in_epoch, self.samples_per_epoch)
        shard_ends = np.cumsum(self.shard_counts)
        shards, offsets = np.unique(np.searchsorted(shard_ends, rest, side="right"), return_index=True)
        for index in np.argsort(offsets):
            yield position + int(offsets[index]), int(shards[index])
        while True:
            block += 1
            if block == len(plan.block_starts) - 1:
                epoch, block = epoch + 1, 0
                plan = self._plan(epoch)
            start = epoch * self.samples_per_epoch + int(plan.block_starts[block])
            for shard in self._shards_of(plan, block):
                yield start, int(shard)

    def _ids_in_block(self, epoch: int, start: int, count: int) -> Ids:
        """At most `count` ids from `start` of an epoch on, up to the end of the block that it lies in."""
        plan = self._epochs.get(epoch, lambda: self._plan(epoch))
        block = int(np.searchsorted(plan.block_starts, start, side="right")) - 1
        ids = self._blocks.get((epoch, block), lambda: self._block_ids(plan, epoch, block))
        offset = start - int(plan.block_starts[block])
        return ids[offset : offset + count]

    def _plan(self, epoch: int) -> _EpochPlan:
        num_shards = len(self.shard_counts)
        shards = permutation(num_shards, key=(self.seed, epoch), stream=self._stream(Purpose.ORDER_SHARDS, 0))
        shard_ends = np.cumsum(self.shard_counts[shards])
        lasts = np.arange(self.shards_per_block, num_shards + self.shards_per_block, self.shards_per_block) - 1
        block_ends = shard_ends[np.minimum(lasts, num_shards - 1)]
        return _EpochPlan(shards=shards, block_starts=np.concatenate([[0], block_ends]).astype(np.int64))

    def _block_ids(self, plan: _EpochPlan, epoch: int, block: int) -> Ids:
        first_ids = np.cumsum(self.shard_counts) - self.shard_counts
        shards = self._shards_of(plan, block)
        ids = np.concatenate([np.arange(self.shard_counts[s], dtype=np.int64) + first_ids[s] for s in shards])
        stream = self._stream(Purpose.ORDER_SAMPLES, block)
        return ids[permutation(len(ids), key=(self.seed, epoch), stream=stream)]

    def _shards_of(self, plan: _EpochPlan, block: int) -> Ids:
        return plan.shards[block * self.shards_per_block : (block + 1) * self.shards_per_block]

    def _stream(self, purpose: Purpose, index: int) -> int:
        # A purpose takes 16 of the 32 bits below the index: the part lies beside both.
        return substream(purpose, index) | self.part << 16


def first_distinct(uses: Iterator[tuple[int, int]], count: int) -> list[int]:
    """The first `count` distinct shards of endless (position, shard) pairs, which must hold that many."""
    found: dict[int, None] = {}
    while len(found) < count:
        found.setdefault(next(uses)[1])
    return list(found)


def rank_slice(start: int, stop: int, rank: int, size: int) -> tuple[int, int]:
    """The part of [start, stop) that is `rank`'s: parts differ by at most one and join to the whole, in rank order."""
    if not 0 <= rank < size:
        raise ValueError(f"rank={rank} must be 0..{size - 1}")
    count = stop - start
    return start + count * rank // size, start + count * (rank + 1) // size


def micro_slices(count: int, accumulate: int) -> list[tuple[int, int]]:
    """[0, count) cut into `accumulate` consecutive parts that differ by at most one."""
    return [rank_slice(0, count, rank=part, size=accumulate) for part in range(accumulate)]
