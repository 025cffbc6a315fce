"""Check shards: read every header, checksum and image, and report what is there and what is bad."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dino_dist.data.loading.worker_process import map_in_processes
from dino_dist.data.reading.decode import DecodeRules
from dino_dist.data.reading.shard_bytes import ShardBytes
from dino_dist.data.reading.stream import BadRecord, SampleReader
from dino_dist.data.shards.index import DatasetIndex, Shard, open_dataset
from dino_dist.data.shards.remote_index import index_again
from dino_dist.data.shards.shard_index import Records, index_shard, record_dtype, records_sha256
from dino_dist.data.shards.tar_members import printable
from dino_dist.data.stores.remote_store import RemoteStore
from dino_dist.data.stores.store_options import StoreOptions, Tally
from dino_dist.errors import UserError

_DUPLICATES_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Smallest, middle and largest of some numbers; zeros if there are none."""

    smallest: int
    median: float
    largest: int


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What is in a data set. `ok` if every image can be used and every index is right."""

    hash: str
    num_shards: int
    num_samples: int
    num_bytes: int
    bad: tuple[BadRecord, ...]
    """Every image that cannot be decoded, or has other bytes than when it was indexed."""
    unreadable: tuple[str, ...]
    """Shards that cannot be indexed or read, or whose index file is damaged, with the reason; the numbers here leave
    out those not indexed."""
    wrong_indexes: tuple[str, ...]
    """Shards whose contents are not what their index says."""
    labels: dict[int, int]
    """Samples of each label; negative labels as in `shard_index`."""
    height_px: Spread
    width_px: Spread
    num_duplicate_keys: int
    """Samples whose key an earlier sample has; harmless for training, a sign of shards that were copied."""
    duplicate_keys: tuple[str, ...]
    """The first of these keys."""

    @property
    def ok(self) -> bool:
        """Nothing is bad; duplicate keys are no fault."""
        return not self.bad and not self.wrong_indexes and not self.unreadable


def check_shards(
    spec: str, *, rules: DecodeRules, fallback_dir: Path, num_workers: int = 1, store: StoreOptions | None = None
) -> CheckReport:
    """Index what is not indexed, then read and decode all that `spec` names (see `index.open_dataset`).

    A damaged shard or index file is reported and does not end the check. `UserError` if there are no shards at all.
    """
    store = StoreOptions() if store is None else store
    unindexed: list[str] = []
    dataset = open_dataset(
        spec, fallback_dir=fallback_dir, store=store, skip=lambda _, error: unindexed.append(str(error))
    )
    tasks = [
        _Task(_only(dataset, shard), int(dataset.first_ids[shard]), rules, store)
        for shard in range(len(dataset.shards))
    ]
    parts = list(map_in_processes(_check_shard, tasks, num_workers=num_workers))
    labels: Counter[int] = sum((part.labels for part in parts), Counter())
    sizes_px = np.concatenate([np.empty((0, 2), dtype=np.int32), *(part.sizes_px for part in parts)])
    digests = np.concatenate([np.empty(0, dtype=np.uint64), *(part.key_digests for part in parts)])
    ids = [task.first_id + np.arange(len(part.key_digests)) for task, part in zip(tasks, parts, strict=True)]
    duplicates = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *ids])[_duplicates(digests)])
    return CheckReport(
        hash=dataset.hash,
        num_shards=len(dataset.shards),
        num_samples=dataset.num_samples,
        num_bytes=sum(shard.row.bytes for shard in dataset.shards),
        bad=tuple(record for part in parts for record in part.bad),
        unreadable=(*unindexed, *(part.unreadable for part in parts if part.unreadable)),
        wrong_indexes=tuple(
            entry.name for entry, part in zip(dataset.shards, parts, strict=True) if not part.index_is_right
        ),
        labels=dict(sorted(labels.items())),
        height_px=_spread(sizes_px[:, 0]),
        width_px=_spread(sizes_px[:, 1]),
        num_duplicate_keys=len(duplicates),
        duplicate_keys=tuple(_key(dataset, sample_id) for sample_id in duplicates[:_DUPLICATES_LISTED].tolist()),
    )


@dataclass(frozen=True)
class _Task:
    dataset: DatasetIndex
    """With one shard."""
    first_id: int
    rules: DecodeRules
    store: StoreOptions


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    bad: list[BadRecord]
    unreadable: str
    """Why the shard could not be read to its end; empty if it could."""
    index_is_right: bool
    labels: Counter[int]
    sizes_px: NDArray[np.int32]
    key_digests: NDArray[np.uint64]


def _only(dataset: DatasetIndex, shard: int) -> DatasetIndex:
    entry = dataset.shards[shard]
    return DatasetIndex(shards=(entry,), first_ids=np.array([0, entry.row.samples]), hash=entry.row.sha256)


def _check_shard(task: _Task) -> _Part:
    records: Records = np.empty(0, dtype=record_dtype(1))
    # Without stand-ins: each sample is to be judged by itself.
    source = ShardBytes(dataset=task.dataset, options=task.store)
    reader = SampleReader(dataset=task.dataset, rules=task.rules, source=source)
    bad: list[BadRecord] = []
    sizes_px: list[tuple[int, ...]] = []
    unreadable, index_is_right = "", True
    try:
        records = task.dataset.records(0)
        for row in range(task.dataset.num_samples):
            outcome = reader.read_exactly(row)
            if isinstance(outcome, BadRecord):
                bad.append(replace(outcome, sample_id=task.first_id + row))
            else:
                sizes_px.append(outcome.pixels.shape[:2])
        index_is_right = _index_is_right(task.dataset.shards[0], task.store)
    except UserError as error:
        unreadable = str(error)
    except OSError as error:
        unreadable = f"{task.dataset.shards[0].location}: {error.strerror or error}"
    finally:
        reader.close()
    digests = [hashlib.blake2b(bytes(key), digest_size=8).digest() for key in records["key"]]
    return _Part(
        bad=bad,
        unreadable=unreadable,
        index_is_right=index_is_right,
        labels=Counter(records["label"].tolist()),
        sizes_px=np.array(sizes_px, dtype=np.int32).reshape(-1, 2),
        key_digests=np.frombuffer(b"".join(digests), dtype=np.uint64),
    )


def _index_is_right(shard: Shard, options: StoreOptions) -> bool:
    if not shard.is_remote:
        return records_sha256(index_shard(Path(shard.location)).records) == shard.row.sha256
    store = RemoteStore(options, Tally())
    try:
        again = index_again(shard.location, size_bytes=shard.row.bytes, store=store)
    finally:
        store.close()
    return records_sha256(again.records) == shard.row.sha256


def _duplicates(digests: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where an earlier digest stands again."""
    order = np.argsort(digests, kind="stable")
    repeats = digests[order][1:] == digests[order][:-1]
    positions: NDArray[np.int64] = order[1:][repeats]
    return positions


def _key(dataset: DatasetIndex, sample_id: int) -> str:
    shard = dataset.locate_one(sample_id)
    return printable(bytes(dataset.records(shard)["key"][sample_id - int(dataset.first_ids[shard])]))


def _spread(values: NDArray[np.int32]) -> Spread:
    if not len(values):
        return Spread(smallest=0, median=0.0, largest=0)
    return Spread(smallest=int(values.min()), median=float(np.median(values)), largest=int(values.max()))
