"""A web server that fails a thousand times: no wrong byte, no sample lost or repeated; what is final is one line."""

from __future__ import annotations

import pickle
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_dist.data.prepare.check import check_shards
from dino_dist.data.reading.decode import DecodeRules
from dino_dist.data.reading.shard_bytes import ShardBytes, StoreOptions
from dino_dist.data.reading.stream import SampleReader
from dino_dist.data.shards.index import DatasetIndex, open_dataset
from dino_dist.data.stores.remote_store import RemoteStore, StoreClosed
from dino_dist.data.stores.store_options import Tally
from dino_dist.errors import UserError
from dino_dist.randomness import Purpose, permutation, substream

KINDS = ("reset", "cut", "500", "503", "429", "stall", "wrong", "whole", "elsewhere")
RULES = DecodeRules(max_member_bytes=2**20, max_pixels=10**4)
PATIENT = StoreOptions(timeout_s=0.5, max_attempts=12)
QUICK = StoreOptions(timeout_s=2.0, max_attempts=2)


@pytest.fixture(scope="module")
def shards(make_shards: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("faults") / "shards", [200, 200, 200, 200])


@pytest.fixture(scope="module")
def local(shards: Path) -> DatasetIndex:
    return open_dataset(str(shards), fallback_dir=shards)


def read_epoch(reader: SampleReader, num_samples: int) -> dict[int, bytes]:
    """Every id of one epoch once, in a shuffled order, by many threads."""
    ids = permutation(num_samples, key=(3, 1), stream=substream(Purpose.ORDER_SAMPLES)).tolist()
    with ThreadPoolExecutor(24) as threads:
        samples = list(threads.map(reader.read, ids))
    assert not any(sample.bad for sample in samples)
    pairs = [(i, sample.pixels.tobytes() + bytes([sample.label])) for i, sample in zip(ids, samples, strict=True)]
    assert len(dict(pairs)) == len(pairs) == num_samples
    return dict(pairs)


@pytest.mark.slow
def test_a_thousand_faults(shards: Path, local: DatasetIndex, serve: Any, seeded_plan: Any, tmp_path: Path) -> None:
    server = serve(shards)
    dataset = open_dataset(f"{server.url}/{{0..3}}.tar", fallback_dir=tmp_path, store=QUICK)
    assert dataset.hash == local.hash
    server.plan = seeded_plan(7, KINDS, 3)
    source = ShardBytes(dataset=dataset, options=PATIENT)
    read = read_epoch(SampleReader(dataset=dataset, rules=RULES, source=source), dataset.num_samples)
    assert read == read_epoch(SampleReader(dataset=local, rules=RULES), dataset.num_samples)
    assert sum(server.injected.values()) >= 1000
    assert min(server.injected[kind] for kind in KINDS) > 50
    assert source.counts().retries >= sum(server.injected.values())
    source.close()


def test_indexing_survives_faults(
    shards: Path, local: DatasetIndex, serve: Any, seeded_plan: Any, tmp_path: Path
) -> None:
    """Except wrong bytes, of which nobody can know before there is an index."""
    server = serve(shards)
    server.plan = seeded_plan(5, [kind for kind in KINDS if kind != "wrong"], 2)
    by_manifest = open_dataset(f"{server.url}/manifest.json", fallback_dir=tmp_path / "a", store=PATIENT)
    (shards / "manifest.json").rename(tmp_path / "manifest.json")
    anew = open_dataset(f"{server.url}/{{0..3}}.tar", fallback_dir=tmp_path / "b", store=PATIENT)
    (tmp_path / "manifest.json").rename(shards / "manifest.json")
    assert by_manifest.hash == anew.hash == local.hash
    assert sum(server.injected.values()) > 10
    for shard in range(4):
        assert np.array_equal(anew.records(shard), local.records(shard))
        assert np.array_equal(by_manifest.records(shard), local.records(shard))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("403", r"HTTP 403 \(Forbidden\): the store refuses this user; check the credentials"),
        ("401", r"HTTP 401 \(Unauthorized\): the store wants credentials"),
        ("404", r"is gone \(HTTP 404 or no such key\) but had \d+ bytes"),
        ("400", r"HTTP 400 \(Bad Request\)"),
    ],
)
def test_what_is_final_fails_at_once(
    shards: Path, local: DatasetIndex, serve: Any, tmp_path: Path, fault: str, says: str
) -> None:
    server = serve(shards)
    dataset = open_dataset(f"{server.url}/manifest.json", fallback_dir=tmp_path, store=QUICK)
    server.plan = lambda place, number: fault
    source = ShardBytes(dataset=dataset, options=StoreOptions())
    record = dataset.records(1)[0]
    before = server.requests_of("/1.tar")
    with pytest.raises(UserError, match=rf"^{server.url}/1\.tar.*{says}") as caught:
        source.read(1, int(record["offset"]), int(record["size"]), int(record["crc32"]))
    assert "\n" not in str(caught.value)
    assert server.requests_of("/1.tar") == before + 1
    with pytest.raises(UserError, match=rf"^{server.url}/0\.tar: .*HTTP {fault}"):
        open_dataset(f"{server.url}/0.tar", fallback_dir=tmp_path / "other", store=StoreOptions())


@pytest.mark.parametrize("fault", KINDS)
def test_a_lasting_fault_ends_in_one_line(shards: Path, serve: Any, tmp_path: Path, fault: str) -> None:
    server = serve(shards)
    dataset = open_dataset(f"{server.url}/manifest.json", fallback_dir=tmp_path, store=QUICK)
    server.plan = lambda place, number: "" if place.endswith("bytes=0-0") else fault
    timeout_s = 1.0 if fault == "stall" else 10.0  # a slow machine alone is no fault
    source = ShardBytes(dataset=dataset, options=StoreOptions(timeout_s=timeout_s, max_attempts=3))
    record = dataset.records(0)[5]
    with pytest.raises(UserError, match=r"^http://[^\n]*0\.tar: [^\n]*: tried 3 times; [^\n]*$"):
        source.read(0, int(record["offset"]), int(record["size"]), int(record["crc32"]))
    assert source.counts().retries == 2


def test_an_unreachable_store_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/0.tar"
        with pytest.raises(UserError, match=rf"^{url}: .*connect.*tried 2 times") as caught:
            open_dataset(url, fallback_dir=tmp_path, store=QUICK)
    assert caught.value.may_pass


def test_a_large_answer_to_a_small_range_is_not_read(serve: Any, tmp_path: Path) -> None:
    """A server that ignores ranges would send all of a large shard for each sample."""
    (tmp_path / "large").write_bytes(bytes(64 * 2**20))
    server = serve(tmp_path)
    server.plan = lambda place, number: "whole"
    tally = Tally()
    store = RemoteStore(StoreOptions(timeout_s=5.0, max_attempts=3), tally)
    with pytest.raises(UserError, match="ignores byte ranges"):
        store.read(f"{server.url}/large", 100, 10)
    assert tally.read().bytes_received == 0
    store.close()


def test_no_more_is_read_than_was_asked_for(serve: Any, tmp_path: Path) -> None:
    """A server that names the right range and sends far more would fill the memory."""
    (tmp_path / "large").write_bytes(bytes(64 * 2**20))
    server = serve(tmp_path)
    server.plan = lambda place, number: "endless"
    tally = Tally()
    store = RemoteStore(StoreOptions(max_attempts=2), tally)
    with pytest.raises(UserError, match=r"11 of 10 bytes came: tried 2 times"):
        store.read(f"{server.url}/large", 100, 10)
    assert tally.read().bytes_received == 22
    store.close()


def test_a_shard_that_changed_since_it_was_indexed(
    make_shards: Callable[..., Path], serve: Any, tmp_path: Path
) -> None:
    shards = make_shards(tmp_path / "shards", [5, 5, 5])
    server = serve(shards)
    open_dataset(str(shards), fallback_dir=shards)
    dataset = open_dataset(f"{server.url}/{{0..2}}.tar", fallback_dir=tmp_path / "a", store=QUICK)
    other = make_shards(tmp_path / "other", [5, 9, 5], seed=3)
    (shards / "1.tar").write_bytes((other / "1.tar").read_bytes() + bytes(10240))  # another size
    damaged = bytearray((shards / "2.tar").read_bytes())
    record = dataset.records(2)[0]
    damaged[int(record["offset"]) + 3] ^= 1  # the same size
    (shards / "2.tar").write_bytes(damaged)
    for cache_dir in (None, str(tmp_path / "cache")):
        source = ShardBytes(dataset=dataset, options=StoreOptions(max_attempts=2, cache_dir=cache_dir))
        with pytest.raises(UserError, match=r"1\.tar has \d+ bytes but had \d+ bytes when it was indexed"):
            source.read(1, 512, 10, 0)
        with pytest.raises(
            UserError, match=r"2\.tar.*checksum.*tried 2 times.*; restore the object; or index it again \(delete"
        ) as caught:
            source.read(2, int(record["offset"]), int(record["size"]), int(record["crc32"]))
        assert f" {dataset.shards[2].index_path} " in str(caught.value)
        assert not caught.value.may_pass
        source.close()
    with pytest.raises(UserError, match=r"1\.tar has \d+ bytes but \d+ by its manifest\.json: it changed"):
        open_dataset(f"{server.url}/manifest.json", fallback_dir=tmp_path / "b", store=QUICK)


def test_an_index_of_another_version_is_one_line(shards: Path, local: DatasetIndex, serve: Any, tmp_path: Path) -> None:
    server = serve(tmp_path)
    text = (shards / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"version": 2', '"version": 1'))
    with pytest.raises(UserError, match=r"^http://.*/manifest\.json is a shard manifest of version 1, .* reads 2"):
        open_dataset(f"{server.url}/manifest.json", fallback_dir=tmp_path, store=QUICK)


def test_a_copy_works_in_another_process_and_from_threads(
    shards: Path, local: DatasetIndex, serve: Any, tmp_path: Path
) -> None:
    server = serve(shards)
    dataset = open_dataset(f"{server.url}/manifest.json", fallback_dir=tmp_path, store=QUICK)
    source = ShardBytes(dataset=dataset, options=QUICK)
    records = dataset.records(0)[:20]
    places = [(0, int(r["offset"]), int(r["size"]), int(r["crc32"])) for r in records]
    expected = [ShardBytes(dataset=local).read(*place) for place in places]
    copy = pickle.loads(pickle.dumps(source))
    for each in (source, copy):
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(lambda place, each=each: each.read(*place), places)) == expected
        assert each.counts().requests == 20
        each.close()
        assert each.read(*places[0]) == expected[0]  # closing is no end
        each.close()


def test_closing_ends_the_waits_of_other_threads(shards: Path, local: DatasetIndex, serve: Any, tmp_path: Path) -> None:
    """A thread that asks a store again and again does not hold up the end of a run."""
    server = serve(shards)
    dataset = open_dataset(f"{server.url}/manifest.json", fallback_dir=tmp_path, store=QUICK)
    asked = threading.Event()

    def refuse(place: str, number: int) -> str:
        asked.set()
        return "503"

    server.plan = refuse
    source = ShardBytes(dataset=dataset, options=StoreOptions(max_attempts=1000))
    outcome: list[Exception] = []

    def read() -> None:
        try:
            source.read(0, 512, 10, 0)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    assert asked.wait(30)
    source.close()
    thread.join(60)
    assert not thread.is_alive()
    assert [type(error) for error in outcome] == [StoreClosed]


def test_checking_goes_on_after_a_shard_that_changed(
    make_shards: Callable[..., Path], serve: Any, tmp_path: Path
) -> None:
    shards = make_shards(tmp_path / "shards", [4, 4, 4], bad=[b"no image"])
    server = serve(shards)
    spec, options = f"{server.url}/{{0..2}}.tar", {"rules": RULES, "fallback_dir": tmp_path / "index", "store": QUICK}
    assert [bad.key for bad in check_shards(spec, **options).bad] == ["00011"]
    data = bytearray((shards / "1.tar").read_bytes())
    data[600] ^= 1
    (shards / "1.tar").write_bytes(data)
    (shards / "0.tar").write_bytes((shards / "0.tar").read_bytes()[:1000])
    report = check_shards(spec, **options)
    assert report.num_shards == 2
    assert [line.split(": ")[0] for line in report.unreadable] == [f"{server.url}/{number}.tar" for number in (0, 1)]
    assert "truncated" in report.unreadable[0]
    assert "checksum" in report.unreadable[1]


def test_a_shard_that_its_manifest_does_not_know_is_refused(
    make_shards: Callable[..., Path], serve: Any, tmp_path: Path
) -> None:
    """Without its index file it is indexed here, which must not hide that it is another of the same size."""
    shards = make_shards(tmp_path / "shards", [4, 4])
    dataset = open_dataset(str(shards), fallback_dir=shards)
    spec = f"{serve(shards).url}/manifest.json"
    first = int(dataset.records(1)[0]["offset"])
    (shards / "1.tar.index.npy").unlink()
    assert open_dataset(spec, fallback_dir=tmp_path / "a", store=QUICK).hash == dataset.hash
    data = bytearray((shards / "1.tar").read_bytes())
    data[first + 3] ^= 1
    (shards / "1.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"/1\.tar is not the shard that its manifest\.json names"):
        open_dataset(spec, fallback_dir=tmp_path / "b", store=QUICK)


def test_no_password_is_shown(
    make_shards: Callable[..., Path], serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = make_shards(tmp_path / "shards", [4, 4, 4])
    server = serve(shards)
    url = server.url.replace("://", "://jane:secret@")
    dataset = open_dataset(f"{url}/{{0..2}}.tar", fallback_dir=tmp_path / "index", store=QUICK)
    assert "reading them through" in caplog.text
    for cache_dir in (None, str(tmp_path / "cache")):
        source = ShardBytes(dataset=dataset, options=StoreOptions(max_attempts=1, timeout_s=5.0, cache_dir=cache_dir))
        for fault in ("403", "404", "500", "cut", "wrong"):
            server.plan = lambda place, number, fault=fault: "" if place.endswith("0-0") and fault != "404" else fault
            with pytest.raises(UserError, match=r"http://\*\*\*@127") as caught:
                source.read(0, 512, 10, 0)
            assert "jane" not in str(caught.value)
            assert "secret" not in str(caught.value)
        source.close()
    server.plan = lambda place, number: ""
    for spec in ("", "nothing.json", "{0,0}.tar", "9.tar", "*.tar", "{0.."):
        with pytest.raises(UserError) as caught:
            open_dataset(f"{url}/{spec}", fallback_dir=tmp_path / "index", store=QUICK)
        assert "secret" not in str(caught.value)
    assert "secret" not in caplog.text
