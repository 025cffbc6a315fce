"""A data set of tar shards: its global sample ids and where each sample lies.

Beside the shards stand `NAME.tar.index.npy` for each and one `manifest.json` with a row for each; where the folder
cannot be written to, they stand in a folder of the caller's. A shard is indexed again when its size or modification
time is another than its row says. Ids number the samples of all shards in the order of the shards' names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from dino_dist.data.recent import Recent
from dino_dist.data.shards.descriptors import share_of_descriptors
from dino_dist.data.shards.folder_index import Indexed, IndexJob, index_folder
from dino_dist.data.shards.remote_index import index_remote
from dino_dist.data.shards.shard_index import FileIdentity, Records, check_records, map_records
from dino_dist.data.shards.shard_list import is_manifest, is_url, list_shards
from dino_dist.data.shards.shard_manifest import ManifestRow, dataset_hash, read_manifest
from dino_dist.data.stores.remote_store import RemoteStore
from dino_dist.data.stores.store_options import StoreOptions, Tally
from dino_dist.errors import UserError
from dino_dist.polling import Poll, nothing_to_poll

Ids = NDArray[np.int64]

_MAPPED_INDEXES = 512


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard of a data set."""

    location: str
    """Absolute path or URL."""
    name: str
    """Its path below the folder that all shards of the data set share."""
    row: ManifestRow
    index_path: Path

    @property
    def is_remote(self) -> bool:
        """Whether it lies behind a URL."""
        return is_url(self.location)


@dataclass(frozen=True, kw_only=True, eq=False)
class DatasetIndex:
    """Shards in the order of their names; sample ids run through them without a gap.

    Small (a few hundred bytes a shard), so it travels to workers; the indexes are mapped where they are used.
    """

    shards: tuple[Shard, ...]
    first_ids: Ids
    """int64 [S + 1]: shard s holds the ids first_ids[s] .. first_ids[s + 1] - 1."""
    hash: str
    """Digest of the shards' names, sizes and indexes: equal if and only if ids mean the same samples."""
    _mapped: Recent[int, Records] = field(
        default_factory=lambda: Recent(share_of_descriptors(_MAPPED_INDEXES)), init=False, repr=False
    )
    _checked: dict[int, FileIdentity] = field(default_factory=dict, init=False, repr=False)
    """The files whose contents were found right: mapping one again is no reason to read all of it again."""
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    @property
    def num_samples(self) -> int:
        """N: ids are 0..N-1."""
        return int(self.first_ids[-1])

    @property
    def shard_counts(self) -> Ids:
        """Samples of each shard, int64 [S]."""
        return np.diff(self.first_ids)

    def locate(self, ids: Ids) -> tuple[Ids, Ids]:
        """Shard and row in the shard of each id, int64 [n] each. `ValueError` for an id outside 0..N-1."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not (0 <= ids.min() and ids.max() < self.num_samples):
            raise ValueError(f"sample ids must be 0..{self.num_samples - 1}, got {ids.min()}..{ids.max()}")
        shards = np.searchsorted(self.first_ids, ids, side="right") - 1
        return shards, ids - self.first_ids[shards]

    def locate_one(self, sample_id: int) -> int:
        """The shard of one id. `ValueError` if it is outside 0..N-1."""
        return int(self.locate(np.array([sample_id], dtype=np.int64))[0][0])

    def records(self, shard: int) -> Records:
        """The index of one shard, mapped; `UserError` if the file is missing or not the one of the manifest."""

        def load() -> Records:
            entry = self.shards[shard]
            records, identity = map_records(entry.index_path)
            if self._checked.get(shard) == identity:
                return records
            check_records(records, entry.index_path, sha256=entry.row.sha256)
            inside = int(records["offset"].max(initial=0)) < entry.row.bytes  # else the sum below could wrap
            ends = records["offset"] + records["size"]
            if len(records) != entry.row.samples or not inside or int(ends.max()) > entry.row.bytes:
                raise UserError(f"{entry.index_path} points outside its shard; delete it and its manifest.json")
            self._checked[shard] = identity
            return records

        with self._lock:
            return self._mapped.get(shard, load)

    def __getstate__(self) -> dict[str, object]:
        return {**{name: value for name, value in self.__dict__.items() if name != "_lock"}, "_checked": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=Lock())

    def labels(self) -> Ids:
        """The label of every sample, int64 [N]; negative where there is none (see `shard_index`)."""
        if not self.shards:
            return np.empty(0, dtype=np.int64)
        return np.concatenate([self.records(shard)["label"].astype(np.int64) for shard in range(len(self.shards))])


def open_dataset(
    spec: str,
    *,
    fallback_dir: Path,
    num_threads: int = 8,
    poll: Poll = nothing_to_poll,
    store: StoreOptions | None = None,
    skip: Callable[[str, UserError], None] | None = None,
) -> DatasetIndex:
    """The data set that `spec` names (folder, brace or glob pattern, manifest; or URLs), indexing what is not indexed.

    Index files go beside the shards, or below `fallback_dir` where that folder cannot be written to or lies behind a
    URL (read as `store` says). Several processes may do this at once, though it is wasted work: they write the same
    bytes, each file at once. `poll` is called after each shard that was indexed and may raise; what was indexed until
    then is kept. `skip` is told of each shard that cannot be indexed, which is then left out.
    `UserError` if there are no shards, one is missing or damaged (without `skip`), or a manifest is unreadable.
    """
    job = IndexJob(num_threads, poll, skip)
    if is_url(spec):
        remote = RemoteStore(StoreOptions() if store is None else store, Tally())
        try:
            located = index_remote(spec, fallback_dir=fallback_dir, store=remote, job=job)
        finally:
            remote.close()
    else:
        paths = _in_manifest(Path(spec).absolute()) if is_manifest(spec) else list_shards(spec)
        located = {}
        for folder, group in groupby(paths, key=lambda path: path.parent):
            located |= index_folder(folder, list(group), fallback_dir, job)
    return _joined(sorted(located.items(), key=lambda item: item[0].split("/")))


def _in_manifest(manifest: Path) -> list[Path]:
    paths = sorted(manifest.parent / name for name in read_manifest(manifest))
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        what = f"names {missing[0].name}, which is not beside it" if missing else "names no shards"
        raise UserError(f"{manifest} {what}; restore the shards, or delete the manifest and name the folder")
    return paths


def _joined(located: list[tuple[str, Indexed]]) -> DatasetIndex:
    folders = [location.split("/")[:-1] for location, _ in located]
    # What all have in common is what the first and the last in order have in common.
    pairs = zip(min(folders, default=[]), max(folders, default=[]), strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    shards = tuple(
        Shard(
            location=location,
            name="/".join(location.split("/")[common:]),
            row=indexed.row,
            index_path=indexed.index_path,
        )
        for location, indexed in located
    )
    counts = [0, *(shard.row.samples for shard in shards)]
    return DatasetIndex(
        shards=shards,
        first_ids=np.cumsum(counts, dtype=np.int64),
        hash=dataset_hash((shard.name, shard.row) for shard in shards),
    )
