"""The order of samples: a pure function of (seed, epoch), read at any position of one endless stream.

Epoch e permutes the shards, cuts them into blocks of `shards_per_block` and permutes the samples within each block, so
that reading stays close to sequential and memory bounded. Position p of the stream lies in epoch p // N; nothing is
dropped at an epoch's end. Ranks, workers and accumulation only cut the stream into slices: they never change it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dino_dist.data.recent import Recent
from dino_dist.randomness import Purpose, permutation, substream

Ids = NDArray[np.int64]

_BLOCKS_HELD = 4
_EPOCHS_HELD = 2


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
    _epochs: Recent[int, _EpochPlan] = field(default_factory=lambda: Recent(_EPOCHS_HELD), repr=False)
    _blocks: Recent[tuple[int, int], Ids] = field(default_factory=lambda: Recent(_BLOCKS_HELD), repr=False)

    def __post_init__(self) -> None:
        if self.shards_per_block < 1:
            raise ValueError(f"shards_per_block={self.shards_per_block} must be at least 1")
        if not len(self.shard_counts) or int(self.shard_counts.min()) < 1:
            raise ValueError("every shard must hold a sample, and there must be a shard")

    @property
    def samples_per_epoch(self) -> int:
        """N."""
        return int(self.shard_counts.sum())

    def ids(self, start: int, stop: int) -> tuple[Ids, Ids]:
        """Epochs and sample ids at the positions [start, stop) of the stream, int64 [stop - start] each."""
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
        return epochs, np.concatenate(parts)

    def _ids_in_block(self, epoch: int, start: int, count: int) -> Ids:
        """At most `count` ids from `start` of an epoch on, up to the end of the block that it lies in."""
        plan = self._epochs.get(epoch, lambda: self._plan(epoch))
        block = int(np.searchsorted(plan.block_starts, start, side="right")) - 1
        ids = self._blocks.get((epoch, block), lambda: self._block_ids(plan, epoch, block))
        offset = start - int(plan.block_starts[block])
        return ids[offset : offset + count]

    def _plan(self, epoch: int) -> _EpochPlan:
        num_shards = len(self.shard_counts)
        shards = permutation(num_shards, key=(self.seed, epoch), stream=substream(Purpose.ORDER_SHARDS))
        shard_ends = np.cumsum(self.shard_counts[shards])
        lasts = np.arange(self.shards_per_block, num_shards + self.shards_per_block, self.shards_per_block) - 1
        block_ends = shard_ends[np.minimum(lasts, num_shards - 1)]
        return _EpochPlan(shards=shards, block_starts=np.concatenate([[0], block_ends]).astype(np.int64))

    def _block_ids(self, plan: _EpochPlan, epoch: int, block: int) -> Ids:
        shards = plan.shards[block * self.shards_per_block : (block + 1) * self.shards_per_block]
        first_ids = np.cumsum(self.shard_counts) - self.shard_counts
        ids = np.concatenate([np.arange(self.shard_counts[s], dtype=np.int64) + first_ids[s] for s in shards])
        return ids[permutation(len(ids), key=(self.seed, epoch), stream=substream(Purpose.ORDER_SAMPLES, block))]


def rank_slice(start: int, stop: int, rank: int, size: int) -> tuple[int, int]:
    """The part of [start, stop) that is `rank`'s: parts differ by at most one and join to the whole, in rank order."""
    if not 0 <= rank < size:
        raise ValueError(f"rank={rank} must be 0..{size - 1}")
    count = stop - start
    return start + count * rank // size, start + count * (rank + 1) // size


def micro_slices(count: int, accumulate: int) -> list[tuple[int, int]]:
    """[0, count) cut into `accumulate` consecutive parts that differ by at most one."""
    return [rank_slice(0, count, rank=part, size=accumulate) for part in range(accumulate)]
