"""The cache of a node: each shard fetched once, never wrong, within its bytes, whoever is killed."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dino_dist.data.reading.remote_bytes import RemoteBytes
from dino_dist.data.reading.shard_bytes import ShardBytes, StoreOptions
from dino_dist.data.reading.shard_cache import CacheUnavailableError, RemoteShard, ShardCache
from dino_dist.data.shards.index import DatasetIndex, open_dataset
from dino_dist.data.stores.remote_store import RemoteStore
from dino_dist.data.stores.store_options import Tally

KINDS = ("reset", "cut", "500", "stall", "wrong", "whole", "elsewhere")
BLOCK_BYTES = 2**15
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def shards(make_shards: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of the same size."""
    folder = make_shards(tmp_path_factory.mktemp("cache") / "shards", [150] * 4)
    open_dataset(str(folder), fallback_dir=folder)
    return folder


@pytest.fixture
def server(shards: Path, serve: Any) -> Any:
    return serve(shards)


@pytest.fixture
def dataset(server: Any, tmp_path: Path) -> DatasetIndex:
    return open_dataset(f"{server.url}/manifest.json", fallback_dir=tmp_path / "index")


def make_cache(folder: Path, *, protect_s: float = 0.0, **options: Any) -> ShardCache:
    settings = StoreOptions(**{"timeout_s": 10.0, "max_attempts": 3, **options})
    tally = Tally()
    return ShardCache(
        folder=folder,
        options=settings,
        store=RemoteStore(settings, tally),
        tally=tally,
        protect_s=protect_s,
        block_bytes=BLOCK_BYTES,
    )


def shard_of(dataset: DatasetIndex, number: int) -> RemoteShard:
    entry = dataset.shards[number]
    return RemoteShard(
        entry.location, entry.row.bytes, entry.row.sha256, partial(dataset.records, number), entry.index_path
    )


def places_of(dataset: DatasetIndex, shard: int) -> list[tuple[int, int, int, int]]:
    return [(shard, int(r["offset"]), int(r["size"]), int(r["crc32"])) for r in dataset.records(shard)]


def whole_of(fd: int) -> bytes:
    data = os.pread(fd, 2**30, 0)
    os.close(fd)
    return data


def files_in(folder: Path, suffix: str) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == suffix)


def test_a_shard_is_fetched_once_in_blocks(shards: Path, server: Any, dataset: DatasetIndex, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    asked_before = server.requests_of("/1.tar")
    with ThreadPoolExecutor(8) as threads:
        fds = list(threads.map(lambda _: cache.open(shard_of(dataset, 1)), range(8)))
    assert {whole_of(fd) for fd in fds} == {(shards / "1.tar").read_bytes()}
    blocks = -(-dataset.shards[1].row.bytes // BLOCK_BYTES)
    assert blocks > 5
    assert server.requests_of("/1.tar") - asked_before == blocks + 1  # one for its size
    assert cache.tally.read().cache_fills == 1
    assert cache.tally.read().cache_hits == 7
    assert not files_in(tmp_path / "cache", ".part")


def test_no_wrong_byte_through_faults(
    shards: Path, server: Any, dataset: DatasetIndex, seeded_plan: Any, tmp_path: Path
) -> None:
    server.plan = seeded_plan(1, KINDS, 3)
    cache = make_cache(tmp_path / "cache", timeout_s=0.5, max_attempts=12)
    for number in range(4):
        # Bytes between the samples have no checksum, and nobody reads them.
        data = whole_of(cache.open(shard_of(dataset, number)))
        original = (shards / f"{number}.tar").read_bytes()
        for _, offset, size, _ in places_of(dataset, number):
            assert data[offset : offset + size] == original[offset : offset + size]
    assert sum(server.injected.values()) > 40
    assert server.injected["wrong"] > 3


def _fill(dataset: DatasetIndex, folder: Path, answer: Any) -> None:
    cache = make_cache(folder)
    answer.send([whole_of(cache.open(shard_of(dataset, number))) for number in range(4)])
    answer.send(cache.tally.read().cache_fills)


@pytest.mark.distributed
def test_two_processes_fetch_each_shard_once(shards: Path, server: Any, dataset: DatasetIndex, tmp_path: Path) -> None:
    before = sum(server.asked.values())
    pipes = [FORK.Pipe() for _ in range(2)]
    processes = [FORK.Process(target=_fill, args=(dataset, tmp_path / "cache", pipe[1])) for pipe in pipes]
    for process in processes:
        process.start()
    originals = [(shards / f"{number}.tar").read_bytes() for number in range(4)]
    for ours, _ in pipes:
        assert ours.recv() == originals
    assert sum(ours.recv() for ours, _ in pipes) == 4
    for process in processes:
        process.join()
    blocks = sum(-(-len(data) // BLOCK_BYTES) for data in originals)
    assert sum(server.asked.values()) - before == blocks + 4


def _open_at_random(dataset: DatasetIndex, folder: Path, seed: int, limit: int, answer: Any) -> None:
    rng = random.Random(seed)
    cache = make_cache(folder, cache_bytes=limit)
    wrong, most, refused = 0, 0, 0
    for _ in range(60):
        number = rng.randrange(4)
        try:
            fd = cache.open(shard_of(dataset, number), wait=rng.random() < 0.8)
        except CacheUnavailableError:  # busy, or both places taken by downloads of the others
            refused += 1
            continue
        with open(folder / "room.lock") as lock:  # under which nothing comes or goes
            fcntl.flock(lock, fcntl.LOCK_EX)
            most = max(most, sum(path.stat().st_size for path in folder.glob("*.tar")) + _preallocated(folder))
        for _, offset, size, crc32 in rng.sample(places_of(dataset, number), 5):
            wrong += zlib.crc32(os.pread(fd, size, offset)) != crc32
        os.close(fd)
    answer.send((wrong, most, refused, cache.tally.read().cache_evictions))


def _preallocated(folder: Path) -> int:
    """Bytes of downloads under way; one that fails removes its file at any time."""
    total = 0
    for path in folder.glob("*.part"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.mark.distributed
def test_three_jobs_in_a_cache_for_two_shards(dataset: DatasetIndex, tmp_path: Path) -> None:
    """They push each other's shards out all the time, and still read right bytes within the limit."""
    limit = 2 * dataset.shards[0].row.bytes + 10
    pipes = [FORK.Pipe() for _ in range(3)]
    processes = [
        FORK.Process(target=_open_at_random, args=(dataset, tmp_path / "cache", seed, limit, pipe[1]))
        for seed, pipe in enumerate(pipes)
    ]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()
    outcomes = [ours.recv() for ours, _ in pipes]
    for process in processes:
        process.join()
    for wrong, most, refused, _ in outcomes:
        assert wrong == 0
        assert 0 < most <= limit
        assert refused < 50
    assert sum(outcome[3] for outcome in outcomes) > 5
    assert not files_in(tmp_path / "cache", ".part")


def _fill_one(dataset: DatasetIndex, folder: Path) -> None:
    os.close(make_cache(folder, timeout_s=60.0).open(shard_of(dataset, 0)))


@pytest.mark.distributed
def test_a_killed_download_leaves_no_wrong_file(
    shards: Path, server: Any, dataset: DatasetIndex, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    in_the_middle = threading.Event()
    asked: list[str] = []

    def stall_in_the_middle(place: str, number: int) -> str:
        asked.append(place)
        if len(asked) < 6:
            return ""
        in_the_middle.set()
        return "stall"

    server.plan = stall_in_the_middle
    process = FORK.Process(target=_fill_one, args=(dataset, folder))
    process.start()
    assert in_the_middle.wait(60)
    cache = make_cache(folder, cache_bytes=dataset.shards[0].row.bytes)
    with pytest.raises(CacheUnavailableError, match="another"):
        cache.open(shard_of(dataset, 0), wait=False)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(files_in(folder, ".part")) == 1
    assert not files_in(folder, ".tar")
    server.plan = lambda place, number: ""
    # There is room for one shard only, so what was left must go first.
    assert whole_of(cache.open(shard_of(dataset, 0))) == (shards / "0.tar").read_bytes()
    assert not files_in(folder, ".part")
    assert cache.tally.read().cache_evictions == 0


def test_the_shard_used_longest_ago_makes_room(shards: Path, dataset: DatasetIndex, tmp_path: Path) -> None:
    size = dataset.shards[0].row.bytes
    cache = make_cache(tmp_path / "cache", cache_bytes=2 * size + 10)
    paths = [cache.path_of(shard_of(dataset, number)) for number in range(4)]
    reader = cache.open(shard_of(dataset, 0))
    os.close(cache.open(shard_of(dataset, 1)))
    for path, used_s in ((paths[0], 100), (paths[1], 200)):
        os.utime(path, (used_s, used_s))
    os.close(cache.open(shard_of(dataset, 2)))
    assert [path.exists() for path in paths] == [False, True, True, False]
    assert whole_of(reader) == (shards / "0.tar").read_bytes()  # who has it open keeps it
    os.close(cache.open(shard_of(dataset, 1)))  # used again
    os.utime(paths[2], (300, 300))
    os.close(cache.open(shard_of(dataset, 3)))
    assert [path.exists() for path in paths] == [False, True, False, True]
    assert cache.tally.read().cache_evictions == 2
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 2 * size + 10


def test_shards_in_use_do_not_make_room_for_each_other(dataset: DatasetIndex, tmp_path: Path) -> None:
    size = dataset.shards[0].row.bytes
    cache = make_cache(tmp_path / "cache", cache_bytes=2 * size + 10, protect_s=3600.0)
    assert not cache.keep(shard_of(dataset, 0))
    for number in (0, 1):
        os.close(cache.open(shard_of(dataset, number)))
    with pytest.raises(CacheUnavailableError, match="full of shards in use"):
        cache.open(shard_of(dataset, 2))
    assert cache.tally.read().cache_evictions == 0
    for number in (0, 1):
        os.utime(cache.path_of(shard_of(dataset, number)), (100, 100))
    assert cache.keep(shard_of(dataset, 0))  # soon to be used
    os.close(cache.open(shard_of(dataset, 2)))
    assert [cache.path_of(shard_of(dataset, number)).exists() for number in range(3)] == [True, False, True]


def test_damage_on_the_disk_of_the_node_is_noticed(
    shards: Path, dataset: DatasetIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = StoreOptions(cache_dir=str(tmp_path / "cache"))
    places = places_of(dataset, 0)
    source = ShardBytes(dataset=dataset, options=options)
    expected = [source.read(*place) for place in places]
    (file,) = files_in(tmp_path / "cache", ".tar")
    source.close()
    os.truncate(file, 1000)  # cut: seen when it is opened
    assert [source.read(*place) for place in places] == expected
    (file,) = files_in(tmp_path / "cache", ".tar")
    with open(file, "r+b") as damaged:
        damaged.seek(places[3][1])
        damaged.write(b"?")
    assert [source.read(*place) for place in places] == expected
    assert "was damaged" in caplog.text
    assert source.counts().cache_fills == 2
    assert source.counts().direct_reads == 1
    source.close()


def _read_with_small_files(dataset: DatasetIndex, folder: Path, answer: Any) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dino_dist").addHandler(handler)
    if folder.exists():
        # As on a disk that fills up: the system refuses to write more.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    source = ShardBytes(dataset=dataset, options=StoreOptions(cache_dir=str(folder)))
    data = [source.read(*place) for place in places_of(dataset, 0)[:40]]
    answer.send((data, lines, source.counts()))


@pytest.mark.distributed
@pytest.mark.parametrize("trouble", ["full disk", "no folder"])
def test_a_cache_that_cannot_be_written_is_said_once(dataset: DatasetIndex, tmp_path: Path, trouble: str) -> None:
    folder = tmp_path / "cache"
    if trouble == "full disk":
        folder.mkdir()
    else:
        (tmp_path / "file").write_bytes(b"")
        folder = tmp_path / "file" / "cache"
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_read_with_small_files, args=(dataset, folder, theirs))
    process.start()
    data, lines, counts = ours.recv()
    process.join()
    places = places_of(dataset, 0)[:40]
    assert data == [ShardBytes(dataset=dataset).read(*place) for place in places]
    assert len(lines) == 1
    assert "one by one" in lines[0]
    assert str(folder) in lines[0]
    assert counts.direct_reads == len(places)
    assert not folder.exists() or not files_in(folder, ".part")


def test_a_cache_smaller_than_a_shard_is_said_once(
    dataset: DatasetIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = StoreOptions(cache_dir=str(tmp_path / "cache"), cache_bytes=1000)
    source = ShardBytes(dataset=dataset, options=options)
    for shard in (0, 1):
        for place in places_of(dataset, shard)[:10]:
            source.read(*place)
    assert caplog.text.count("(1000 bytes) is less than one shard") == 1
    assert source.counts().direct_reads == 20
    source.close()


def test_a_cache_that_was_of_no_use_is_asked_again_later(dataset: DatasetIndex, tmp_path: Path) -> None:
    now = [1000.0]
    (tmp_path / "cache").write_bytes(b"no folder")
    options = StoreOptions(cache_dir=str(tmp_path / "cache"))
    source = RemoteBytes(dataset, options, clock_s=lambda: now[0])
    places = places_of(dataset, 0)
    source.read(*places[0])
    (tmp_path / "cache").unlink()
    for now[0] in (1010.0, 1020.0, 1029.0):
        source.read(*places[1])
    assert (source.counts().direct_reads, source.counts().cache_fills) == (4, 0)
    now[0] = 1031.0
    source.read(*places[2])
    assert (source.counts().direct_reads, source.counts().cache_fills) == (4, 1)
    source.close()


def test_a_file_that_made_room_is_let_go_once_it_is_idle(dataset: DatasetIndex, tmp_path: Path) -> None:
    """As long as it is open, its space is not free."""
    now = [1000.0]
    source = RemoteBytes(dataset, StoreOptions(cache_dir=str(tmp_path / "cache")), clock_s=lambda: now[0])
    source.read(*places_of(dataset, 0)[0])
    now[0] = 1005.0
    source.read(*places_of(dataset, 1)[0])
    for file in files_in(tmp_path / "cache", ".tar"):
        file.unlink()
    now[0] = 1012.0
    source.read(*places_of(dataset, 2)[0])
    gone = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)]
    assert len([target for target in gone if str(tmp_path) in target and target.endswith("(deleted)")]) == 1
    source.close()


def _is_link(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")


@pytest.fixture
def small_disk(tmp_path: Path, dataset: DatasetIndex) -> Iterator[Path]:
    """A file system that holds two shards and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = dataset.shards[0].row.bytes * 5 // 2
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False)
    if mount.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_smaller_than_the_cache(
    shards: Path, dataset: DatasetIndex, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = make_cache(small_disk)
    for number in range(4):
        assert whole_of(cache.open(shard_of(dataset, number))) == (shards / f"{number}.tar").read_bytes()
    assert cache.tally.read().cache_evictions == 2
    # Shards in use make no room: they are as good as a disk full of another's files.
    source = ShardBytes(dataset=dataset, options=StoreOptions(cache_dir=str(small_disk)))
    for number in range(4):
        for place in places_of(dataset, number)[:20]:
            source.read(*place)
    assert caplog.text.count("for lack of a cache") == 1
    assert source.counts().direct_reads == 40
    assert not files_in(small_disk, ".part")
    source.close()


def test_prefetching_fetches_the_next_shards_and_no_more(server: Any, dataset: DatasetIndex, tmp_path: Path) -> None:
    both = threading.Semaphore(0)
    first_blocks = set()

    def watch(place: str, number: int) -> str:
        if place.endswith("bytes=0-0"):
            return ""
        first_blocks.add(place.split(" ")[0])
        both.release()
        return ""

    server.plan = watch
    source = ShardBytes(dataset=dataset, options=StoreOptions(cache_dir=str(tmp_path / "cache"), prefetch_shards=2))
    source.will_need([2, 0, 3, 1])
    for _ in range(2):  # each shard is one block of the usual size
        assert both.acquire(timeout=60)
    for shard in (2, 0):
        for place in places_of(dataset, shard):
            source.read(*place)
    assert first_blocks == {"/0.tar", "/2.tar"}
    assert source.counts().cache_fills == 2
    assert source.counts().direct_reads == 0
    source.will_need([2, 0, 3, 1])  # the first two are in use by now
    for _ in range(2):
        assert both.acquire(timeout=60)
    for shard in (3, 1):
        for place in places_of(dataset, shard):
            source.read(*place)
    assert source.counts().cache_fills == 4
    source.close()


@pytest.mark.distributed
def test_a_fork_reads_on_with_connections_of_its_own(dataset: DatasetIndex, tmp_path: Path) -> None:
    source = ShardBytes(dataset=dataset, options=StoreOptions(cache_dir=str(tmp_path / "cache")))
    direct = ShardBytes(dataset=dataset)
    places = places_of(dataset, 0) + places_of(dataset, 1)
    expected = [direct.read(*place) for place in places]
    source.will_need([0])
    assert source.read(*places[0]) == expected[0]
    ours, theirs = FORK.Pipe()

    def child() -> None:
        theirs.send([[each.read(*place) for place in places] for each in (source, direct)])

    process = FORK.Process(target=child)
    process.start()
    assert ours.recv() == [expected, expected]
    process.join()
    source.close()
    direct.close()
