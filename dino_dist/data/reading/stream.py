"""Reading samples by their global id: bytes at an offset of a shard, decoded, with a stand-in for each bad one."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dino_dist.data.reading.decode import BadSample, DecodeRules, OpenedImage, Pixels, open_image
from dino_dist.data.reading.shard_bytes import ShardBytes
from dino_dist.data.shards.index import DatasetIndex
from dino_dist.data.shards.tar_members import printable
from dino_dist.data.stores.store_errors import redacted
from dino_dist.data.stores.store_options import StoreCounts
from dino_dist.errors import UserError

_NEAR, _FAR = 16, 64
"""So many of the next samples of a shard are looked at for a stand-in, then so many all over it."""
_GOLDEN = 40503
"""Of 2^16 the golden section: its multiples, modulo one, lie as evenly as can be however many there are."""


class ByteSource(Protocol):
    """Where the bytes of samples come from; for several threads at once, and picklable."""

    def read(self, shard: int, offset: int, size: int, crc32: int) -> bytes:
        """`size` bytes at `offset` of a shard with this CRC-32.

        `UserError` if the shard is gone or has changed, `BadSample` if it was cut short or damaged.
        """
        ...

    def will_need(self, shards: Sequence[int]) -> None:
        """A hint that these shards are read next, in this order."""
        ...

    def counts(self) -> StoreCounts:
        """What this process has asked of stores so far; zeros without any."""
        ...

    def close(self) -> None:
        """Let go of files and connections; reading takes new ones."""
        ...


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A sample that could not be used, for the count, the list and the ledger."""

    sample_id: int
    shard: str
    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What was read for one id."""

    pixels: Pixels
    """RGB, uint8 [height, width, 3]."""
    label: int
    """Negative: none (see `shard_index`)."""
    bad: tuple[BadRecord, ...] = ()
    """The samples in whose place this one stands: the one asked for first, if any."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedSample:
    """What was read for one id, up to the header of its image."""

    asked_id: int
    """Whose place it takes."""
    own_id: int
    image: OpenedImage
    label: int
    bad: tuple[BadRecord, ...] = ()
    """As in `Sample`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleReader:
    """Reads samples of a data set by id, in any order and from any number of threads.

    A bad sample is replaced by the next of the same shard (after the last comes the first), which is again a function
    of the id alone; where `members` is given, by the next of those. Where many in a row are bad the search goes further
    off in the shard, then to the shards after it. To decode an image where its pixels are wanted, `open` it, then
    `decode_into`; `read` does both.
    """

    dataset: DatasetIndex
    rules: DecodeRules
    source: ByteSource | None = None
    """None: the shards where the data set says they are, with the usual options."""
    members: Callable[[int], NDArray[np.int64]] | None = None
    """Ids of a shard's samples that may stand in for others, ascending; picklable. None: all."""
    max_substitutes: int = 256
    """After this many bad ones the search for a stand-in is given up, with `UserError`."""
    _source: ByteSource = field(init=False, repr=False)
    _first_ids: list[int] = field(init=False, repr=False)
    """Those of the data set: looking one id up in an array would cost more than reading its bytes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_source", self.source or ShardBytes(dataset=self.dataset))
        object.__setattr__(self, "_first_ids", self.dataset.first_ids.tolist())

    def read(self, sample_id: int) -> Sample:
        """The sample with this id or its stand-in.

        `UserError` if the shard is gone, has changed since it was indexed, or no stand-in is found.
        """
        return self.decode(self.open(sample_id))

    def open(self, sample_id: int, bad: tuple[BadRecord, ...] = ()) -> OpenedSample:
        """The first sample that has a good header, from this id on and after those known to be `bad`; as `read`."""
        for own_id in islice(self._candidates(sample_id), len(bad), self.max_substitutes + 1):
            opened = self._open_exactly(own_id, sample_id, bad)
            if isinstance(opened, OpenedSample):
                return opened
            bad = (*bad, opened)
        where = redacted(self.dataset.shards[self._shard_of(sample_id)].location)
        raise UserError(
            f"{where}: the sample with key {bad[0].key!r} is bad ({bad[0].reason}), and so are {len(bad) - 1} that "
            f"could stand in for it; replace them (of shards, `dino-dist shards check` lists all)"
        )

    def _candidates(self, sample_id: int) -> Iterator[int]:
        """The sample itself and what to try in its place, in this order: a function of its id alone."""
        yield sample_id
        own_shard, num_shards = self._shard_of(sample_id), len(self.dataset.shards)
        for number in range(num_shards):
            shard = (own_shard + number) % num_shards
            first_id, end_id = self._first_ids[shard], self._first_ids[shard + 1]
            ids = range(first_id, end_id) if self.members is None else self.members(shard)
            if not len(ids):
                continue
            place = bisect_left(ids, sample_id) if number == 0 else sample_id % len(ids)
            yield from (int(ids[(place + hop) % len(ids)]) for hop in _hops(len(ids)) if hop or number)

    def decode(self, opened: OpenedSample) -> Sample:
        """The pixels of a sample that was opened, or of the next good one if they are damaged; errors as `read`."""
        while True:
            try:
                return Sample(pixels=opened.image.decode(), label=opened.label, bad=opened.bad)
            except BadSample as error:
                opened = self.open_instead(opened, error)

    def decode_into(self, opened: OpenedSample, out: Pixels) -> Sample:
        """The same into an array that has the shape its image promised; `pixels` is another one for another shape."""
        try:
            opened.image.decode_into(out)
        except BadSample as error:
            sample = self.decode(self.open_instead(opened, error))
            if sample.pixels.shape != out.shape:
                return sample
            out[...] = sample.pixels
            return replace(sample, pixels=out)
        return Sample(pixels=out, label=opened.label, bad=opened.bad)

    def open_instead(self, opened: OpenedSample, error: BadSample) -> OpenedSample:
        """What stands in for a sample whose header was good but whose pixels are not; errors as `read`."""
        record = self._bad_record(opened.own_id, error)
        return self.open(opened.asked_id, (*opened.bad, record))

    def read_exactly(self, sample_id: int) -> Sample | BadRecord:
        """This very sample, or why it cannot be used. `UserError` if the shard is gone or has changed."""
        opened = self._open_exactly(sample_id, sample_id, ())
        if isinstance(opened, BadRecord):
            return opened
        try:
            return Sample(pixels=opened.image.decode(), label=opened.label)
        except BadSample as error:
            return self._bad_record(sample_id, error)

    def store_counts(self) -> StoreCounts:
        """What this process has asked of stores so far; zeros where all shards are local."""
        return self._source.counts()

    def will_need(self, shards: Sequence[int]) -> None:
        """A hint that samples of these shards are read next, soonest first."""
        self._source.will_need(shards)

    def close(self) -> None:
        """Let go of what is open; reading opens it again."""
        self._source.close()

    def _shard_of(self, sample_id: int) -> int:
        if not 0 <= sample_id < self._first_ids[-1]:
            raise ValueError(f"sample_id={sample_id} must be 0..{self._first_ids[-1] - 1}")
        return bisect_right(self._first_ids, sample_id) - 1

    def _open_exactly(self, sample_id: int, asked_id: int, bad: tuple[BadRecord, ...]) -> OpenedSample | BadRecord:
        shard = self._shard_of(sample_id)
        record = self.dataset.records(shard)[sample_id - self._first_ids[shard]]
        size = int(record["size"])
        try:
            if size > self.rules.max_member_bytes:
                raise BadSample(f"{size} bytes; at most {self.rules.max_member_bytes}")
            data = self._source.read(shard, int(record["offset"]), size, int(record["crc32"]))
            image = open_image(data, self.rules)
        except BadSample as error:
            return self._bad_record(sample_id, error)
        return OpenedSample(asked_id=asked_id, own_id=sample_id, image=image, label=int(record["label"]), bad=bad)

    def _bad_record(self, sample_id: int, error: BadSample) -> BadRecord:
        shard = self._shard_of(sample_id)
        record = self.dataset.records(shard)[sample_id - self._first_ids[shard]]
        key = printable(bytes(record["key"]))
        return BadRecord(sample_id=sample_id, shard=self.dataset.shards[shard].name, key=key, reason=str(error))


def _hops(count: int) -> list[int]:
    """How far off to look among `count` samples: at each of the next, then, since damage has length, all over them."""
    spread = (count * (turn * _GOLDEN % 2**16) >> 16 for turn in range(1, _FAR + 1))
    return list(dict.fromkeys((*range(min(count, _NEAR + 1)), *spread)))
