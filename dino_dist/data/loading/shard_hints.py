"""Telling a store ahead of time which shards the stream reads next."""

from __future__ import annotations

import math

from dino_dist.data.order.step_plan import StepPlan
from dino_dist.data.reading.stream import SampleReader

_SHARDS_AHEAD = 64
"""How far ahead shards are named to the source of bytes, which takes of them what it has room for."""


class ShardHints:
    """Names the next shards about once for each shard that is used up; never, where all shards are local."""

    def __init__(self, reader: SampleReader, plan: StepPlan) -> None:
        self._reader = reader
        self._plan = plan
        shards = reader.dataset.shards
        self._shard_samples = max(1, reader.dataset.num_samples // len(shards))
        self._next_position: float = -1 if any(shard.is_remote for shard in shards) else math.inf

    def before(self, step: int) -> None:
        """To be called before the samples of each step are read."""
        position = step * self._plan.batch_size
        if position >= self._next_position:
            self._reader.will_need(self._plan.order.shards_from(position, _SHARDS_AHEAD))
            self._next_position = position + self._shard_samples
