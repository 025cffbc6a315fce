"""Reading samples by their global id: bytes at an offset of a shard, decoded, with a stand-in for each bad one."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from dino_dist.data.decode import BadSample, DecodeRules, Pixels, decode_image
from dino_dist.data.index import DatasetIndex
from dino_dist.data.recent import Recent
from dino_dist.data.tar_members import printable
from dino_dist.errors import UserError

_OPEN_FILES = 64


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
class SampleReader:
    """Reads samples of a data set by id, in any order.

    A bad sample is replaced by the next of the same shard (after the last comes the first), which is again a function
    of the id alone. Each process opens files of its own, a bounded number at a time.
    """

    dataset: DatasetIndex
    rules: DecodeRules
    max_substitutes: int = 16
    """After this many bad samples in a row the shard is given up, with `UserError`."""
    _files: Recent[int, int] = field(default_factory=lambda: Recent(_OPEN_FILES, os.close), repr=False)

    def read(self, sample_id: int) -> Sample:
        """The sample with this id or its stand-in.

        `UserError` if the shard is gone, has changed since it was indexed, or has too many bad samples in a row.
        """
        shard = self.dataset.locate_one(sample_id)
        first_id = int(self.dataset.first_ids[shard])
        count = int(self.dataset.first_ids[shard + 1]) - first_id
        bad: list[BadRecord] = []
        for step in range(min(count, self.max_substitutes + 1)):
            outcome = self.read_exactly(first_id + (sample_id - first_id + step) % count)
            if isinstance(outcome, Sample):
                return replace(outcome, bad=tuple(bad))
            bad.append(outcome)
        raise UserError(
            f"{self.dataset.shards[shard].path}: {len(bad)} bad samples in a row from key {bad[0].key!r} on "
            f"(first: {bad[0].reason}); replace the shard (`dino-dist shards check` lists all)"
        )

    def read_exactly(self, sample_id: int) -> Sample | BadRecord:
        """This very sample, or why it cannot be used. `UserError` if the shard is gone or has changed."""
        shard = self.dataset.locate_one(sample_id)
        record = self.dataset.records(shard)[sample_id - int(self.dataset.first_ids[shard])]
        try:
            pixels = decode_image(self._bytes(shard, int(record["offset"]), int(record["size"])), self.rules)
        except BadSample as error:
            key = printable(bytes(record["key"]))
            return BadRecord(sample_id=sample_id, shard=self.dataset.shards[shard].name, key=key, reason=str(error))
        return Sample(pixels=pixels, label=int(record["label"]))

    def close(self) -> None:
        """Close the shards that are open; reading opens them again."""
        self._files.clear()

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        if size > self.rules.max_member_bytes:
            raise BadSample(f"{size} bytes; at most {self.rules.max_member_bytes}")
        try:
            data = os.pread(self._files.get(shard, lambda: self._open(shard)), size, offset)
        except OSError:
            # A network file system loses handles when its server restarts: once more, with a new one, then fail. An
            # I/O error must not pass for a bad sample: it would make the stream depend on the moment.
            self._files.drop(shard)
            data = os.pread(self._files.get(shard, lambda: self._open(shard)), size, offset)
        if len(data) != size:
            raise BadSample(f"{len(data)} of {size} bytes: the shard was truncated after it was indexed")
        return data

    def _open(self, shard: int) -> int:
        entry = self.dataset.shards[shard]
        try:
            fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise UserError(f"{entry.path}: {error.strerror}; the data set needs this shard, restore it") from error
        size = os.fstat(fd).st_size
        if size != entry.row.bytes:
            os.close(fd)
            raise UserError(
                f"{entry.path} has {size} bytes but had {entry.row.bytes} when it was indexed; restore it, "
                f"or start again with a new run folder"
            )
        return fd
