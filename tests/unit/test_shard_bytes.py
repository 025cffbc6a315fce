"""Bytes of local shards: from many threads, with few files open, and what damage and loss look like."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import random
import resource
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest

from dino_dist.data.loading.decode_process import Refused
from dino_dist.data.reading import shard_bytes
from dino_dist.data.reading.decode import BadSample
from dino_dist.data.reading.open_files import OpenFiles
from dino_dist.data.reading.shard_bytes import ShardBytes, StoreCounts, StoreOptions
from dino_dist.data.shards.index import DatasetIndex, open_dataset
from dino_dist.errors import UserError


@pytest.fixture
def dataset(make_shards: Callable[..., Path], tmp_path: Path) -> DatasetIndex:
    folder = make_shards(tmp_path / "shards", [3] * 100)
    return open_dataset(str(folder), fallback_dir=folder)


def places_of(dataset: DatasetIndex, shard: int) -> list[tuple[int, int, int, int]]:
    return [(shard, int(r["offset"]), int(r["size"]), int(r["crc32"])) for r in dataset.records(shard)]


def test_threads_read_the_right_bytes_of_many_shards(dataset: DatasetIndex) -> None:
    """More shards than files may be open, so files are closed while others read."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, allowed[1]))
    source = ShardBytes(dataset=dataset)
    places = [place for shard in range(100) for place in places_of(dataset, shard)] * 5
    random.Random(0).shuffle(places)
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(16) as threads:
        read = list(threads.map(lambda place: source.read(*place), places))
    resource.setrlimit(resource.RLIMIT_NOFILE, allowed)
    for place, data in zip(places, read, strict=True):
        whole = Path(dataset.shards[place[0]].location).read_bytes()
        assert data == whole[place[1] : place[1] + place[2]]
    assert len(os.listdir("/proc/self/fd")) <= before + 64
    source.close()
    assert len(os.listdir("/proc/self/fd")) <= before
    assert source.read(*places[0]) == read[0]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(*places[1]) == read[1]
    assert copy.counts() == StoreCounts()
    source.close()
    copy.close()


def test_damage_is_a_bad_sample_and_loss_is_an_error(dataset: DatasetIndex) -> None:
    source = ShardBytes(dataset=dataset)
    place = places_of(dataset, 0)[1]
    path = Path(dataset.shards[0].location)
    data = bytearray(path.read_bytes())
    data[place[1] + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadSample, match="not those that were indexed"):
        source.read(*place)
    assert source.read(*places_of(dataset, 0)[0])
    os.truncate(dataset.shards[1].location, 700)
    with pytest.raises(UserError, match=r"/1\.tar has 700 bytes but had \d+ when it was indexed"):
        source.read(*places_of(dataset, 1)[0])
    os.unlink(dataset.shards[2].location)
    with pytest.raises(UserError, match=r"/10\.tar: No such file .* restore it"):
        source.read(*places_of(dataset, 2)[0])
    source.close()


def test_a_handle_that_was_lost_is_opened_again(dataset: DatasetIndex) -> None:
    source = ShardBytes(dataset=dataset)
    place = places_of(dataset, 0)[0]
    expected = source.read(*place)
    targets = {fd: os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    (opened,) = [fd for fd, target in targets.items() if target == os.path.realpath(dataset.shards[0].location)]
    # What reading by a lost handle gives: an error of the system (here that of a descriptor of another kind).
    read_end, write_end = os.pipe()
    os.dup2(write_end, int(opened))
    assert source.read(*place) == expected
    source.close()
    os.close(read_end)
    os.close(write_end)


def test_a_file_that_is_read_is_not_closed(tmp_path: Path) -> None:
    for key in range(3):
        (tmp_path / str(key)).write_bytes(b"%d" % key)
    files = OpenFiles(1, lambda key: os.open(tmp_path / str(key), os.O_RDONLY))
    with files.lease(0) as fd:
        with files.lease(1) as other:
            assert os.pread(other, 1, 0) == b"1"
        files.close()
        assert os.pread(fd, 1, 0) == b"0"
    with pytest.raises(OSError, match="Bad file"):
        os.pread(fd, 1, 0)


def test_threads_that_want_one_file_open_it_once(tmp_path: Path) -> None:
    (tmp_path / "0").write_bytes(b"0")
    opened: list[int] = []

    def open_file(key: int) -> int:
        opened.append(key)
        deadline_s = time.monotonic() + 10
        while _threads_waiting_for_a_file() < 7 and time.monotonic() < deadline_s:
            threading.Event().wait(0.001)
        if len(opened) == 1:
            raise PermissionError("the first time")
        return os.open(tmp_path / "0", os.O_RDONLY)

    files = OpenFiles(4, open_file)

    def read(_: int) -> bytes:
        try:
            with files.lease(0) as fd:
                return os.pread(fd, 1, 0)
        except PermissionError as error:
            return str(error).encode()

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read, range(8))) == [b"the first time"] * 8  # who waited does not try again
        assert opened == [0]
        assert list(threads.map(read, range(8))) == [b"0"] * 8
    assert opened == [0, 0]
    files.close()


def _threads_waiting_for_a_file() -> int:
    count = 0
    for frame in sys._current_frames().values():
        names = set()
        at: FrameType | None = frame
        while at is not None:
            names.add(at.f_code.co_name)
            at = at.f_back
        count += {"lease", "wait_for"} <= names
    return count


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_bytes, "_PAUSES_S", (0.0, 0.0, 0.0))


def test_a_file_system_that_fails_for_a_while_is_waited_for(
    dataset: DatasetIndex, no_pauses: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, place, pread = ShardBytes(dataset=dataset), places_of(dataset, 0)[0], os.pread
    expected = source.read(*place)
    failures = iter([errno.ESTALE, errno.EIO, errno.EIO])

    def fail_first(fd: int, size: int, offset: int) -> bytes:
        code = next(failures, None)
        if code is not None:
            raise OSError(code, os.strerror(code))
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", fail_first)
    assert source.read(*place) == expected
    assert next(failures, None) is None
    source.close()


def test_an_error_of_the_file_system_names_the_shard(dataset: DatasetIndex, no_pauses: None) -> None:
    source = ShardBytes(dataset=dataset)
    location = Path(dataset.shards[0].location)
    location.rename(location.with_suffix(".kept"))
    location.symlink_to(location.name)
    with pytest.raises(
        UserError, match=rf"^{location}: Too many levels of symbolic links .*; see to its file"
    ) as caught:
        source.read(*places_of(dataset, 0)[0])
    assert caught.value.may_pass
    assert pickle.loads(pickle.dumps(Refused(caught.value))).error.may_pass, "the rank hears of it from a process"
    source.close()


def test_a_copy_with_changes_shares_nothing(dataset: DatasetIndex) -> None:
    source = ShardBytes(dataset=dataset)
    source.read(*places_of(dataset, 0)[0])
    other = replace(source, dataset=replace(dataset, shards=dataset.shards[1:], first_ids=dataset.first_ids[1:] - 3))
    assert other.read(*places_of(other.dataset, 0)[0]) == source.read(*places_of(dataset, 1)[0])
    source.close()
    other.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [("cache_bytes", 0), ("max_attempts", 0), ("timeout_s", 0.0), ("timeout_s", 1e9), ("prefetch_shards", -1)],
)
def test_impossible_options_are_named_as_users_know_them(field: str, value: float) -> None:
    known_as = {
        "cache_bytes": "cache_gib",
        "max_attempts": "store_attempts",
        "timeout_s": "store_timeout_s",
        "prefetch_shards": "cache_ahead_shards",
    }
    with pytest.raises(UserError, match=rf"^data\.{known_as[field]}=.* must be"):
        StoreOptions(**{field: value})  # type: ignore[arg-type]


def test_counts_of_processes_add_up() -> None:
    total = StoreCounts(retries=2, bytes_received=10) + StoreCounts(retries=1, cache_hits=4)
    assert total == StoreCounts(retries=3, bytes_received=10, cache_hits=4)


def test_files_of_an_owner_that_was_dropped_are_closed(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / str(number)).touch()
    files = OpenFiles(5, lambda key: os.open(tmp_path / str(key), os.O_RDONLY))
    opened = []
    for number in range(5):
        with files.lease(number) as fd:
            opened.append(fd)
    del files
    gc.collect()
    for fd in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
