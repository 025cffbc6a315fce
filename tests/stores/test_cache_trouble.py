"""A cache that fails, is full or belongs to another user: the run reads around it, and says so once."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_dist.data.loading.loader import make_loader
from dino_dist.data.order.order import Order
from dino_dist.data.reading.decode import DecodeRules
from dino_dist.data.reading.remote_bytes import RemoteBytes
from dino_dist.data.reading.shard_bytes import ShardBytes, StoreOptions
from dino_dist.data.reading.shard_cache import BusyError, CacheUnavailableError, RemoteShard, ShardCache
from dino_dist.data.reading.stream import SampleReader
from dino_dist.data.shards.index import DatasetIndex, open_dataset
from dino_dist.data.stores.remote_store import RemoteStore
from dino_dist.data.stores.store_options import Tally
from dino_dist.errors import UserError

FORK = multiprocessing.get_context("fork")
NOBODY = 65534


@pytest.fixture(scope="module")
def shards(make_shards: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of the same size."""
    folder = make_shards(tmp_path_factory.mktemp("trouble") / "shards", [40] * 4)
    open_dataset(str(folder), fallback_dir=folder)
    return folder


@pytest.fixture
def server(shards: Path, serve: Any) -> Any:
    return serve(shards)


@pytest.fixture
def dataset(server: Any, tmp_path: Path) -> DatasetIndex:
    return open_dataset(f"{server.url}/manifest.json", fallback_dir=tmp_path / "index")


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user may write to."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o777)
    yield root
    shutil.rmtree(root)


def places_of(dataset: DatasetIndex, shard: int) -> list[tuple[int, int, int, int]]:
    return [(shard, int(r["offset"]), int(r["size"]), int(r["crc32"])) for r in dataset.records(shard)]


def shard_of(dataset: DatasetIndex, number: int) -> RemoteShard:
    entry = dataset.shards[number]
    return RemoteShard(
        entry.location, entry.row.bytes, entry.row.sha256, partial(dataset.records, number), entry.index_path
    )


def make_cache(folder: Path, **options: Any) -> ShardCache:
    settings, tally = StoreOptions(timeout_s=10.0, max_attempts=3, **options), Tally()
    return ShardCache(folder=folder, options=settings, store=RemoteStore(settings, tally), tally=tally, protect_s=0.0)


def spoil(folder: Path, trouble: str) -> None:
    if trouble == "a file":
        folder.write_bytes(b"no folder")
    elif trouble == "a loop of links":
        folder.symlink_to(folder.name)
    else:
        folder.mkdir()
        (folder / "room.lock").mkdir()


TROUBLES = ("a file", "a loop of links", "a lock that is none")


@pytest.mark.distributed
@pytest.mark.parametrize("trouble", TROUBLES)
def test_the_loader_reads_around_it(dataset: DatasetIndex, tmp_path: Path, trouble: str) -> None:
    spoil(tmp_path / "cache", trouble)
    options = StoreOptions(cache_dir=str(tmp_path / "cache"), prefetch_shards=4)
    reader = SampleReader(
        dataset=dataset,
        rules=DecodeRules(max_member_bytes=2**20, max_pixels=10**4),
        source=ShardBytes(dataset=dataset, options=options),
    )
    loader = make_loader(
        reader=reader,
        order=Order(shard_counts=dataset.shard_counts, seed=5, shards_per_block=2),
        batch_size=16,
        rank=0,
        size=1,
        start_step=0,
        stop_step=10,
        num_workers=3,
        buffer_bytes=2**20,
    )
    ids = torch.cat([batch.sample_ids for step in loader for batch in step])
    assert torch.equal(ids.sort().values, torch.arange(160))


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_hint_survives_it(
    dataset: DatasetIndex, tmp_path: Path, trouble: str, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    died: list[object] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    spoil(tmp_path / "cache", trouble)
    source = RemoteBytes(dataset, StoreOptions(cache_dir=str(tmp_path / "cache")))
    for _ in range(3):
        source.will_need([0, 1, 2, 3])
        for shard in range(4):
            for place in places_of(dataset, shard)[:5]:
                assert source.read(*place)
    source.close()
    assert not died
    assert source.counts().direct_reads == 60
    assert caplog.text.count("for lack of a cache") == 1


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EROFS, errno.ENOTDIR])
def test_every_error_of_the_disk_is_one_of_the_cache(
    dataset: DatasetIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    cache = make_cache(tmp_path / "cache")
    os.close(cache.open(shard_of(dataset, 0)))
    open_before = len(os.listdir("/proc/self/fd"))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "utime", fail)
    os.close(cache.open(shard_of(dataset, 0)))  # that its use is not known harms nothing
    if code == errno.EROFS:
        assert cache.keep(shard_of(dataset, 0))
    else:
        with pytest.raises(CacheUnavailableError, match=os.strerror(code)):
            cache.keep(shard_of(dataset, 0))
    monkeypatch.setattr(os, "fstat", fail)
    with pytest.raises(CacheUnavailableError, match=os.strerror(code)):
        cache.open(shard_of(dataset, 0))
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_disk_that_fails_in_the_middle_is_said_once(
    dataset: DatasetIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = RemoteBytes(dataset, StoreOptions(cache_dir=str(tmp_path / "cache")))
    places = places_of(dataset, 0)
    expected = [source.read(*place) for place in places]

    def fail(fd: int, size: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    assert [source.read(*place) for place in places] == expected
    monkeypatch.undo()
    assert source.counts().direct_reads == len(places)
    assert caplog.text.count("cannot be read (Input/output error)") == 1
    source.close()


def test_a_refusing_store_is_asked_once_for_all_that_wait(server: Any, dataset: DatasetIndex, tmp_path: Path) -> None:
    """With a budget of seconds for each, threads that waited in a row would need minutes to give up."""
    source = RemoteBytes(dataset, StoreOptions(cache_dir=str(tmp_path / "cache"), max_attempts=5))
    server.plan = lambda place, number: "503"
    place = places_of(dataset, 0)[0]
    before = server.requests_of("/0.tar")
    outcomes: list[Exception] = []

    def read() -> None:
        try:
            source.read(*place)
        except UserError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=read) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    source.close()
    assert len(outcomes) == 16
    assert server.requests_of("/0.tar") - before <= 2 * 5  # a thread that comes late asks anew


@pytest.mark.parametrize(("prefetch_shards", "cache_shards", "fetched"), [(3, 2, 2), (1, 4, 1), (9, 9, 4)])
def test_hints_stay_within_the_cache(
    server: Any, dataset: DatasetIndex, tmp_path: Path, prefetch_shards: int, cache_shards: int, fetched: int
) -> None:
    """Else what is fetched ahead pushes out what is needed before it."""
    cache_bytes = cache_shards * dataset.shards[0].row.bytes + 10
    options = StoreOptions(cache_dir=str(tmp_path / "cache"), cache_bytes=cache_bytes, prefetch_shards=prefetch_shards)
    source = RemoteBytes(dataset, options)
    asked_before = [server.requests_of(f"/{shard}.tar") for shard in range(4)]
    source.will_need([3, 1, 0, 2])
    hinted = [3, 1, 0, 2][:fetched]
    for shard in hinted:
        assert source.read(*places_of(dataset, shard)[0])
    assert source.counts().cache_fills == fetched
    source.will_need([3, 1, 0, 2])  # those in use fill a cache that holds no more
    if fetched == cache_shards:
        for shard in hinted:
            assert source.read(*places_of(dataset, shard)[1])
        assert source.counts().cache_fills == fetched
        for shard in {0, 1, 2, 3}.difference(hinted):
            assert server.requests_of(f"/{shard}.tar") == asked_before[shard]
    assert source.counts().cache_evictions == 0
    source.close()


def test_what_is_not_wanted_makes_room_first(server: Any, dataset: DatasetIndex, tmp_path: Path) -> None:
    size = dataset.shards[0].row.bytes
    cache = make_cache(tmp_path / "cache", cache_bytes=3 * size + 10)
    for number, used_s in ((0, 100), (1, 200)):
        os.close(cache.open(shard_of(dataset, number)))
        os.utime(cache.path_of(shard_of(dataset, number)), (used_s, used_s))
    source = RemoteBytes(dataset, StoreOptions(cache_dir=str(tmp_path / "cache"), cache_bytes=3 * size + 10))
    room_was_made = threading.Event()

    def watch(place: str, number: int) -> str:
        if place.startswith("/2.tar ") and not place.endswith("bytes=0-0"):
            room_was_made.set()
        return ""

    server.plan = watch
    source.will_need([3, 2, 0])  # the one used longest ago is wanted after those to fetch
    assert room_was_made.wait(60)
    for shard in (3, 2, 0):
        assert source.read(*places_of(dataset, shard)[0])
    source.close()
    assert source.counts().cache_fills == 2
    assert cache.keep(shard_of(dataset, 0))
    assert not cache.keep(shard_of(dataset, 1))


def test_some_of_the_disk_is_left_free(dataset: DatasetIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = dataset.shards[0].row.bytes
    cache = make_cache(tmp_path / "cache")
    disk = os.statvfs(tmp_path)
    total = disk.f_blocks * disk.f_frsize
    left_free = min(2**30, int(0.02 * total))

    class Disk:
        f_blocks, f_frsize, f_bavail = total, 1, left_free + size

    monkeypatch.setattr(os, "statvfs", lambda path: Disk)
    os.close(cache.open(shard_of(dataset, 0)))
    os.utime(cache.path_of(shard_of(dataset, 0)), (100, 100))
    Disk.f_bavail = left_free
    os.close(cache.open(shard_of(dataset, 1)))  # in the place of the other
    assert not cache.keep(shard_of(dataset, 0))
    Disk.f_bavail = left_free - 2 * size
    with pytest.raises(CacheUnavailableError, match=rf"0 of 0 bytes \(what its disk can spare\), {size} more"):
        cache.open(shard_of(dataset, 2))


def _as_another_user(dataset: DatasetIndex, folder: Path, limit: int, answer: Connection) -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    cache = make_cache(folder, cache_bytes=limit)
    try:
        assert cache.keep(shard_of(dataset, 0))
        for number in (0, 1, 2):
            os.close(cache.open(shard_of(dataset, number)))
        answer.send(cache.tally.read())
    except BaseException as error:
        answer.send(repr(error))
        raise


@pytest.mark.distributed
@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_second_user_shares_the_cache(dataset: DatasetIndex, public_folder: Path, mode: int) -> None:
    folder = public_folder / "cache"
    folder.mkdir()
    folder.chmod(mode)
    os.close(make_cache(folder).open(shard_of(dataset, 0)))
    for number in range(3):
        dataset.records(number)  # the folder of the indexes is this user's alone
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_as_another_user, args=(dataset, folder, 4 * dataset.shards[0].row.bytes, theirs))
    process.start()
    theirs.close()
    counts = ours.recv()
    process.join()
    assert (counts.cache_hits, counts.cache_fills) == (1, 2)
    assert os.stat(folder / "room.lock").st_uid == 0
    cache = make_cache(folder)
    os.close(cache.open(shard_of(dataset, 1)))  # theirs serves us
    assert cache.tally.read().cache_fills == 0


def test_no_link_is_followed_to_a_lock(dataset: DatasetIndex, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "room.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheUnavailableError):
        make_cache(tmp_path / "cache").open(shard_of(dataset, 0))
    assert not (tmp_path / "elsewhere").exists()


def test_what_is_opened_cannot_be_written_to(dataset: DatasetIndex, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    for _ in range(2):  # fetched, then found
        fd = cache.open(shard_of(dataset, 0))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
        os.close(fd)


def test_a_lock_that_others_hold_is_named(dataset: DatasetIndex, tmp_path: Path) -> None:
    settings = StoreOptions(timeout_s=0.1, max_attempts=1)
    (tmp_path / "cache").mkdir()
    with open(tmp_path / "cache" / "room.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tally = Tally()
        store = RemoteStore(StoreOptions(), tally)
        cache = ShardCache(folder=tmp_path / "cache", options=settings, store=store, tally=tally)
        with pytest.raises(CacheUnavailableError, match=r"room\.lock is locked by another process"):
            cache.open(shard_of(dataset, 0))


@pytest.mark.parametrize("busy", ["another process", "this process"])
def test_who_fetches_for_long_is_not_waited_for(dataset: DatasetIndex, tmp_path: Path, busy: str) -> None:
    """A store that stalls for others must fail here too, or give the bytes, before the wait passes for a hang."""
    settings = StoreOptions(timeout_s=0.3, max_attempts=10_000)
    (tmp_path / "cache").mkdir()
    tally = Tally()
    cache = ShardCache(folder=tmp_path / "cache", options=settings, store=RemoteStore(settings, tally), tally=tally)
    with ExitStack() as held:
        if busy == "another process":
            lock = held.enter_context(open(cache.path_of(shard_of(dataset, 0)).with_suffix(".lock"), "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        else:
            while cache.fills.acquire(blocking=False):
                held.callback(cache.fills.release)
        with pytest.raises(BusyError):
            cache.open(shard_of(dataset, 0))
        with pytest.raises(BusyError):
            cache.open(shard_of(dataset, 0), wait=False)
    os.close(cache.open(shard_of(dataset, 0)))
    assert tally.read().cache_fills == 1
