"""Indexes of shards behind URLs: which shards a specification names there, and their index, fetched or made.

A manifest beside the shards is believed as long as sizes agree, and its index files are fetched. Shards without one are
read through once, by ranged reads. Either way the index files lie in a folder of the caller's afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, pairwise
from pathlib import Path
from typing import TypeVar

from dino_dist.data.shards.folder_index import Indexed, IndexJob, home_elsewhere, make_indexes
from dino_dist.data.shards.shard_index import (
    INDEX_SUFFIX,
    ShardIndex,
    index_archive,
    parse_records,
    records_sha256,
    write_atomically,
)
from dino_dist.data.shards.shard_list import MANIFEST_NAME, expand_braces, is_manifest
from dino_dist.data.shards.shard_manifest import (
    MAX_MANIFEST_BYTES,
    ManifestRow,
    add_to_manifest,
    parse_manifest,
    read_manifest,
)
from dino_dist.data.stores.remote_store import RemoteStore
from dino_dist.data.stores.store_errors import redacted
from dino_dist.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

_log = logging.getLogger(__name__)

_BLOCK_BYTES = 8 * 2**20
_INDEX_ROW_BYTES = 1024
"""An index file has fewer bytes a sample, and this much for its header."""


class RemoteArchive:
    """A tar behind a URL, read in large blocks from its start to its end."""

    def __init__(self, store: RemoteStore, url: str, size_bytes: int) -> None:
        self._store = store
        self._url = url
        self._block = b""
        self._block_at = 0
        self.size_bytes = size_bytes

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`; fewer only at the end."""
        size = min(size, self.size_bytes - offset)
        if size <= 0:
            return b""
        start = offset - self._block_at
        if not 0 <= start <= len(self._block) - size:
            count = min(max(size, _BLOCK_BYTES), self.size_bytes - offset)
            self._block, self._block_at, start = self._store.read(self._url, offset, count), offset, 0
        return self._block[start : start + size]


def index_remote(spec: str, *, fallback_dir: Path, store: RemoteStore, job: IndexJob) -> dict[str, Indexed]:
    """Rows and index files of all shards that `spec` names, by URL, sorted.

    `spec` is the URL of a shard, of a manifest, of a folder (where stores can list one, or it has a manifest), or
    several by braces. `UserError` if it names none, one is missing or damaged, or is not what its manifest says.
    """
    job = job._replace(poll=_closing(store, job.poll))
    urls = _list_shards(spec, store)
    sizes = dict(zip(urls, _in_threads(lambda url: _size(store, url), urls, job), strict=True))
    located: dict[str, Indexed] = {}
    try:
        for folder, group in groupby(urls, key=_folder):
            located |= _index_folder(folder, {url: sizes[url] for url in group}, fallback_dir, store, job)
    except OSError as error:
        raise UserError(
            f"{fallback_dir} cannot hold the index of {redacted(spec)} ({error.strerror}); make it writable"
        ) from error
    return dict(sorted(located.items()))


def index_again(url: str, *, size_bytes: int, store: RemoteStore) -> ShardIndex:
    """Read one shard through and index it."""
    return index_archive(RemoteArchive(store, url, size_bytes), redacted(url))


def _closing(store: RemoteStore, poll: Callable[[], None]) -> Callable[[], None]:
    """Whoever interrupts the work closes the store: else its threads would go on to the end of their shards."""

    def closing_poll() -> None:
        try:
            poll()
        except BaseException:
            store.close()
            raise

    return closing_poll


def _list_shards(spec: str, store: RemoteStore) -> list[str]:
    if set("?#*[]") & set(spec) or "\0" in spec:
        raise UserError(
            f"data {redacted(spec)!r}: a URL takes braces as {{000..099}}, and names a folder or manifest.json; no "
            f"* ? # []"
        )
    urls: list[str] = []
    for url in expand_braces(spec):
        if url.endswith(".tar"):
            urls.append(url)
        elif is_manifest(url):
            urls += _in_manifest(url, store)
        else:
            urls += _in_folder(url, store)
    urls.sort()
    for one, other in pairwise(urls):
        if one == other:
            raise UserError(f"data {redacted(spec)!r} names {redacted(one)} twice; name each shard once")
    return urls


def _in_manifest(url: str, store: RemoteStore) -> list[str]:
    rows = _manifest_at(url, store)
    if not rows:
        raise UserError(f"{redacted(url)} is not there or names no shards; index the shards first, or name them")
    return [_folder(url) + name for name in rows]


def _in_folder(url: str, store: RemoteStore) -> list[str]:
    folder = url.rstrip("/") + "/"
    if folder.startswith(("http://", "https://")):
        # A web server cannot be listed.
        rows = _manifest_at(folder + MANIFEST_NAME, store)
        if not rows:
            raise UserError(
                f"{redacted(folder)} has no {MANIFEST_NAME} and cannot be listed; name the shards: {{000..099}}.tar"
            )
        return [folder + name for name in rows]
    shards = [each for each in store.list_folder(folder) if each.endswith(".tar")]
    if not shards:
        raise UserError(f"{redacted(folder)} holds no .tar shards; check the bucket and the path")
    return shards


def _index_folder(
    folder: str, sizes: dict[str, int], fallback_dir: Path, store: RemoteStore, job: IndexJob
) -> dict[str, Indexed]:
    home = home_elsewhere(folder, fallback_dir)
    home.mkdir(parents=True, exist_ok=True)
    theirs = _manifest_at(folder + MANIFEST_NAME, store)
    ours = read_manifest(home / MANIFEST_NAME) if (home / MANIFEST_NAME).exists() else {}
    located: dict[str, Indexed] = {}
    to_fetch: list[tuple[str, ManifestRow]] = []
    for url, size in sizes.items():
        name = url.removeprefix(folder)
        row, own = theirs.get(name), ours.get(name)
        if row is not None and row.bytes != size:
            raise UserError(
                f"{redacted(url)} has {size} bytes but {row.bytes} by its {MANIFEST_NAME}: it changed since it was "
                f"indexed; index it again where it lies"
            )
        index_path = home / (name + INDEX_SUFFIX)
        if own is not None and own.bytes == size and index_path.is_file() and (row is None or row.sha256 == own.sha256):
            located[url] = Indexed(own, index_path)
        elif row is not None:
            to_fetch.append((url, row))
    located |= _fetch_indexes(to_fetch, home, store, job)
    missing = {url: url.removeprefix(folder) for url in sizes if url not in located}
    if missing:
        _log.warning(
            "%s has no index of %d shards: reading them through, into %s", redacted(folder), len(missing), home
        )
        located |= make_indexes(
            missing,
            home,
            job,
            index=lambda url: _index_as_known(url, size_bytes=sizes[url], known=theirs.get(missing[url]), store=store),
            is_there=lambda _name: True,
        )
    return located


def _index_as_known(url: str, *, size_bytes: int, known: ManifestRow | None, store: RemoteStore) -> ShardIndex:
    """Index one shard; `UserError` if its manifest knows another one of the same size."""
    made = index_again(url, size_bytes=size_bytes, store=store)
    if known is not None and records_sha256(made.records) != known.sha256:
        raise UserError(
            f"{redacted(url)} is not the shard that its {MANIFEST_NAME} names (another index at the same size): "
            f"restore it, or index it again where it lies"
        )
    return made


def _fetch_indexes(
    wanted: list[tuple[str, ManifestRow]], home: Path, store: RemoteStore, job: IndexJob
) -> dict[str, Indexed]:
    """Index files from beside their shards; those that are not there are left out."""

    def fetch(pair: tuple[str, ManifestRow]) -> Indexed | None:
        url, row = pair
        content = store.read_file(url + INDEX_SUFFIX, max_bytes=(row.samples + 1) * _INDEX_ROW_BYTES)
        if content is None:
            return None
        if parse_records(content, sha256=row.sha256) is None:
            raise UserError(f"{redacted(url)}{INDEX_SUFFIX} does not match its {MANIFEST_NAME}; index the shards again")
        index_path = home / (row.name + INDEX_SUFFIX)
        write_atomically(index_path, content)
        return Indexed(row, index_path)

    outcomes = zip(wanted, _in_threads(fetch, wanted, job), strict=True)
    fetched = {url: indexed for (url, _), indexed in outcomes if indexed is not None}
    if fetched:
        rows = [indexed.row for indexed in fetched.values()]
        add_to_manifest(home / MANIFEST_NAME, rows, is_there=lambda _name: True)
    return fetched


def _manifest_at(url: str, store: RemoteStore) -> dict[str, ManifestRow]:
    content = store.read_file(url, max_bytes=MAX_MANIFEST_BYTES)
    return {} if content is None else parse_manifest(content, redacted(url))


def _size(store: RemoteStore, url: str) -> int:
    size = store.size_bytes(url)
    if size is None:
        raise UserError(f"{redacted(url)}: HTTP 404 or no such key: there is no such shard; check the URL")
    return size


def _folder(url: str) -> str:
    return url[: url.rindex("/") + 1]


def _in_threads(function: Callable[[T], R], items: Iterable[T], job: IndexJob) -> list[R]:
    """function(item) of each, in order; the first error ends all."""
    threads = ThreadPoolExecutor(max(1, job.num_threads))
    try:
        results = []
        for result in threads.map(function, items):
            results.append(result)
            job.poll()
        return results
    finally:
        threads.shutdown(cancel_futures=True)
