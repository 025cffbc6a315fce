"""The order of a mixture: several data sets share every epoch in exact proportions, at any position of one stream.

Each data set runs through its own endless stream of passes (see `order`), each pass without replacement; the mixture
only says which positions of an epoch are whose. Sample i of the n that a set has in an epoch of E belongs at the time
(i + 1/2) / n of the epoch; all sets' samples are lined up by their times, cut into windows, and which set comes when is
permuted within each window. So every epoch holds exactly n samples of the set, every whole window its share to
within a few, and where each set stands at any position follows from integers alone: nothing is saved or replayed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from dino_dist.data.order.order import MAX_PARTS, Order, StreamIds, first_distinct
from dino_dist.data.order.selection import Selection
from dino_dist.data.recent import Recent
from dino_dist.randomness import Purpose, permutation, substream

Ids = NDArray[np.int64]

WINDOW = 1024
"""Positions within which the sets are shuffled: many batches of a rank, so that no rank sees one set more often."""

_WINDOWS_HELD = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One data set of a mixture: its own stream, and where its samples and shards lie in the joined data set."""

    order: Order
    """Of its samples, or of its selection's slots."""
    selection: Selection | None
    """Which sample stands at each slot; none: slot i is sample i."""
    first_id: int
    """Joined id of its sample 0."""
    shards: Ids
    """Joined number of each shard of `order`, int64 [S]: those that hold no selected sample are left out."""
    epoch_count: int
    """Its samples in each epoch of the mixture, at least 1."""

    def ids(self, start: int, stop: int) -> StreamIds:
        """What stands at its own positions [start, stop), with joined ids."""
        stream = self.order.ids(start, stop)
        if self.selection is None:
            return stream._replace(sample_ids=stream.sample_ids + self.first_id)
        sample_ids, repeats = self.selection.resolve(stream.sample_ids)
        return StreamIds(epochs=stream.epochs, sample_ids=sample_ids + self.first_id, repeats=repeats)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Window:
    """Which part stands at each position of a window, and how far each part had come in the epoch before it."""

    parts: NDArray[np.uint16]
    before: Ids
    """int64 [parts]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MixtureOrder:
    """A `SampleOrder` over several data sets. A mixture of one is the order of its data set."""

    parts: tuple[Part, ...]
    seed: int
    _windows: Recent[tuple[int, int], _Window] = field(
        init=False, default_factory=lambda: Recent(_WINDOWS_HELD), repr=False
    )

    def __post_init__(self) -> None:
        if not 1 <= len(self.parts) <= MAX_PARTS or min(part.epoch_count for part in self.parts) < 1:
            raise ValueError(f"a mixture has 1..{MAX_PARTS} parts, each with a sample an epoch")

    @property
    def samples_per_epoch(self) -> int:
        """E: the sum of the parts' counts."""
        return sum(part.epoch_count for part in self.parts)

    def ids(self, start: int, stop: int) -> StreamIds:
        """What stands at the positions [start, stop); `epochs` counts the passes of each sample's own data set."""
        if not 0 <= start <= stop:
            raise ValueError(f"start={start} and stop={stop} must satisfy 0 <= start <= stop")
        whose = np.concatenate([np.empty(0, dtype=np.uint16), *self._parts_at(start, stop)])
        stream = StreamIds(*(np.empty(stop - start, dtype=np.int64) for _ in StreamIds._fields))
        starts = self._own_positions(start)
        for number in np.unique(whose).tolist():
            (at,) = np.nonzero(whose == number)
            own = self.parts[number].ids(starts[number], starts[number] + len(at))
            for column, values in zip(stream, own, strict=True):
                column[at] = values
        return stream

    def shards_from(self, position: int, count: int) -> list[int]:
        """See `SampleOrder`; the parts' shards interleaved by when, on average, each is first used."""
        starts = self._own_positions(position)
        uses = heapq.merge(*(self._first_uses(part, start) for part, start in zip(self.parts, starts, strict=True)))
        return first_distinct(uses, min(count, sum(len(part.shards) for part in self.parts)))

    def _first_uses(self, part: Part, start: int) -> Iterator[tuple[int, int]]:
        """(positions of the mixture from now on, joined shard) of each shard of a part, when it is first used; a small
        part passes through its shards again and again while a large one comes to its next.
        """
        seen: set[int] = set()
        stride = self.samples_per_epoch / part.epoch_count
        for position, shard in part.order.first_uses(start):
            if shard not in seen:
                seen.add(shard)
                yield int((position - start) * stride), int(part.shards[shard])
            if len(seen) == len(part.shards):
                return

    def _own_positions(self, position: int) -> list[int]:
        """Position of each part in its own stream when the mixture is at `position`: what a resume starts from."""
        epoch, in_epoch = divmod(position, self.samples_per_epoch)
        number, offset = divmod(in_epoch, WINDOW)
        window = self._window(epoch, number)
        inside = np.bincount(window.parts[:offset], minlength=len(self.parts))
        counts = zip(self.parts, window.before.tolist(), inside.tolist(), strict=True)
        return [epoch * part.epoch_count + before + here for part, before, here in counts]

    def _parts_at(self, start: int, stop: int) -> Iterator[NDArray[np.uint16]]:
        """The part of each position, one piece a window."""
        while start < stop:
            epoch, in_epoch = divmod(start, self.samples_per_epoch)
            number, offset = divmod(in_epoch, WINDOW)
            piece = self._window(epoch, number).parts[offset : offset + stop - start]
            start += len(piece)
            yield piece

    def _window(self, epoch: int, number: int) -> _Window:
        def make() -> _Window:
            counts = [part.epoch_count for part in self.parts]
            before = counts_before(number * WINDOW, counts)
            after = counts_before(min((number + 1) * WINDOW, sum(counts)), counts)
            parts = np.repeat(np.arange(len(counts), dtype=np.uint16), after - before)
            shuffle = permutation(len(parts), key=(self.seed, epoch), stream=substream(Purpose.MIXTURE, number))
            return _Window(parts=parts[shuffle], before=before)

        return self._windows.get((epoch, number), make)


def counts_before(position: int, counts: Sequence[int]) -> Ids:
    """How many of the first `position` places of an epoch each part has, before the shuffle: int64 [parts].

    Part k with n of the E places has its i-th at the time (i + 1/2) E / n; places are given out by time, and within one
    unit of time by number of the part. Grows with `position`, sums to it, and lies within
    1/2 + (1 + parts / 2) n / E of position * n / E. Exact: integers of any size.
    """
    total = sum(counts)
    if not 0 <= position <= total:
        raise ValueError(f"position={position} must be 0..{total}")

    def earlier(time: int) -> list[int]:
        # i + 1/2 < n time / E for i = 0 .. m - 1 has the largest m = floor((ceil(2 n time / E) - 1 + 1) / 2).
        return [-(-2 * n * time // total) // 2 for n in counts]

    # The counts at a time differ from it by at most half a place for each part: look no further than that.
    low, high = max(position - len(counts), 0), min(position + len(counts) + 1, total + 1)
    while high - low > 1:  # the last whole time before which no more than `position` places are given out
        middle = (low + high) // 2
        low, high = (middle, high) if sum(earlier(middle)) <= position else (low, middle)
    given = earlier(low)
    left = position - sum(given)
    for k, (now, then) in enumerate(zip(given, earlier(low + 1), strict=True)):
        given[k] += min(left, then - now)
        left -= min(left, then - now)
    return np.array(given, dtype=np.int64)


def apportioned(weights: Sequence[Fraction], total: int) -> list[int]:
    """`total` split into whole numbers in proportion to positive weights, by largest remainders.

    Each part gets its exact quota rounded down; what is left goes, one each, to those with the largest remainders, and
    among equal ones to those that come first.
    """
    total_weight = sum(weights)
    quotas = [total * weight / total_weight for weight in weights]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda k: counts[k] - quotas[k])
    for k in by_remainder[: total - sum(counts)]:
        counts[k] += 1
    return counts
