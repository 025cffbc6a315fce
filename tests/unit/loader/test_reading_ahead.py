"""How far ahead is read: no further than the buffer has room, and shards of a store are named in time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dino_dist.data.loading.loader import Batch
from dino_dist.data.reading.shard_bytes import ShardBytes
from dino_dist.data.reading.stream import SampleReader
from dino_dist.data.stores.store_options import StoreCounts


@dataclass(frozen=True, kw_only=True)
class WrittenDown:
    """Reads as its source does, and notes in files how much was read, and which shards would be needed."""

    source: ShardBytes
    folder: Path

    def read(self, shard: int, offset: int, size: int, crc32: int) -> bytes:
        with open(self.folder / "reads", "ab") as file:
            file.write(b".")
        return self.source.read(shard, offset, size, crc32)

    def will_need(self, shards: Sequence[int]) -> None:
        with open(self.folder / "hints", "a", encoding="utf-8") as file:
            file.write(" ".join(map(str, shards)) + "\n")

    def counts(self) -> StoreCounts:
        return StoreCounts(direct_reads=1)

    def close(self) -> None:
        (self.folder / "closed").touch()


@pytest.mark.distributed
def test_reading_ahead_is_bounded_by_the_buffer(
    shards: Path,
    open_parts: Callable[[Path], dict[str, Any]],
    load: Callable[..., Generator[list[Batch]]],
    tmp_path: Path,
) -> None:
    parts = open_parts(shards)
    dataset, rules = parts["reader"].dataset, parts["reader"].rules
    source = WrittenDown(source=ShardBytes(dataset=dataset), folder=tmp_path)
    parts["reader"] = SampleReader(dataset=dataset, rules=rules, source=source)
    room = 3
    loader = load(parts, batch_size=1, stop_step=400, num_workers=2, buffer_bytes=room * 320)  # 3 of the largest
    smallest = 2 * 5 * 3
    for taken, _ in enumerate(loader, start=1):
        in_the_ring = room * 320 // max(64, smallest)
        beyond = 2  # one whose files are read, and one that waits for room
        substitutes = taken // 19 + 2
        assert (tmp_path / "reads").stat().st_size <= taken + in_the_ring + beyond + substitutes
    assert (tmp_path / "closed").exists()
    assert not (tmp_path / "hints").exists()  # local shards need none


@pytest.mark.distributed
@pytest.mark.parametrize("num_workers", [0, 1])
def test_shards_of_a_store_are_named_before_they_are_read(
    shards: Path,
    open_parts: Callable[[Path], dict[str, Any]],
    load: Callable[..., Generator[list[Batch]]],
    tmp_path: Path,
    num_workers: int,
) -> None:
    parts = open_parts(shards)
    local = parts["reader"].dataset
    remote = replace(local, shards=tuple(replace(s, location=f"http://localhost:1/{s.name}") for s in local.shards))
    source = WrittenDown(source=ShardBytes(dataset=local), folder=tmp_path)
    parts["reader"] = SampleReader(dataset=remote, rules=parts["reader"].rules, source=source)
    for (batch,) in load(parts, batch_size=2, stop_step=20, num_workers=num_workers):
        assert batch.store == StoreCounts(direct_reads=1)
    hints = [[int(shard) for shard in line.split()] for line in (tmp_path / "hints").read_text().splitlines()]
    assert hints[0] == parts["order"].shards_from(0, 4)
    assert 5 <= len(hints) <= 10  # 40 positions, shards of about 5
    assert all(sorted(hint) == [0, 1, 2, 3] for hint in hints)
