"""The same through s3fs and a real S3 server, with and without trouble on the way to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from dino_dist.data.reading.shard_bytes import ShardBytes, StoreOptions
from dino_dist.data.shards.index import open_dataset
from dino_dist.errors import UserError

pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")

QUICK = StoreOptions(timeout_s=10.0, max_attempts=2)


@pytest.fixture(scope="module")
def shards(make_shards: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with their index beside them."""
    folder = make_shards(tmp_path_factory.mktemp("s3") / "shards", [60, 60, 60])
    open_dataset(str(folder), fallback_dir=folder)
    return folder


@pytest.fixture(scope="module")
def moto_url(shards: Path) -> Iterator[str]:
    """An S3 server with three folders in a bucket: `full`, `bare` (no index) and `empty`."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    system = fsspec.filesystem("s3", skip_instance_cache=True, **_settings(url))
    system.makedirs("photographs", exist_ok=True)  # its buckets are the process's, whatever the server
    for path in shards.iterdir():
        system.pipe(f"photographs/full/{path.name}", path.read_bytes())
        if path.suffix == ".tar":
            system.pipe(f"photographs/bare/{path.name}", path.read_bytes())
    system.pipe("photographs/empty/notes.txt", b"no shards")
    yield url
    server.stop()


@pytest.fixture
def endpoint(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`endpoint(url)` is where s3:// leads, set as a user's fsspec configuration file would."""

    def set_endpoint(url: str) -> None:
        monkeypatch.setitem(fsspec.config.conf, "s3", _settings(url))

    set_endpoint(moto_url)
    return set_endpoint


def _settings(url: str) -> dict[str, Any]:
    return {"endpoint_url": url, "key": "x", "secret": "x", "client_kwargs": {"region_name": "eu-west-1"}}


@pytest.mark.parametrize(
    "spec",
    [
        "s3://photographs/full",
        "s3://photographs/full/",
        "s3://photographs/full/{0..2}.tar",
        "s3://photographs/full/manifest.json",
        "s3://photographs/bare",
    ],
)
def test_every_way_to_name_them_gives_the_local_data_set(
    shards: Path, endpoint: Any, tmp_path: Path, spec: str
) -> None:
    local = open_dataset(str(shards), fallback_dir=shards)
    dataset = open_dataset(spec, fallback_dir=tmp_path, store=QUICK)
    assert dataset.hash == local.hash
    assert [shard.name for shard in dataset.shards] == ["0.tar", "1.tar", "2.tar"]
    assert all(shard.is_remote for shard in dataset.shards)
    again = open_dataset(spec, fallback_dir=tmp_path, store=QUICK)
    assert [shard.index_path for shard in again.shards] == [shard.index_path for shard in dataset.shards]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("s3://photographs/full/{0..5}.tar", r"full/3\.tar: .*no such shard"),
        ("s3://photographs/empty", "holds no .tar shards"),
        ("s3://photographs/nothing", "no such object; check the path"),
        ("s3://no-such-bucket/full", "no such object; check the path"),
        ("s3://no-such-bucket/0.tar", "no such shard"),
        ("s3://photographs/full/other.json", "not there"),
    ],
)
def test_what_is_not_there_is_one_line(endpoint: Any, tmp_path: Path, spec: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        open_dataset(spec, fallback_dir=tmp_path, store=QUICK)
    assert "s3://" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refusal_is_one_line(shards: Path, endpoint: Any, serve: Any, tmp_path: Path, moto_url: str) -> None:
    dataset = open_dataset("s3://photographs/full", fallback_dir=tmp_path, store=QUICK)
    server = serve(moto_url)
    server.plan = lambda place, number: "403"
    endpoint(server.url)
    source = ShardBytes(dataset=dataset, options=StoreOptions(timeout_s=5.0, max_attempts=5))
    with pytest.raises(UserError, match=r"^s3://photographs/full/0\.tar: .*the store refuses this user"):
        source.read(0, 512, 10, 0)
    assert sum(server.asked.values()) == 1
    source.close()


@pytest.mark.parametrize("cached", [False, True])
def test_no_wrong_byte_through_faults(
    shards: Path, endpoint: Any, serve: Any, seeded_plan: Any, tmp_path: Path, moto_url: str, cached: bool
) -> None:
    server = serve(moto_url)
    endpoint(server.url)
    dataset = open_dataset("s3://photographs/full", fallback_dir=tmp_path, store=QUICK)
    server.plan = seeded_plan(11, ("reset", "cut", "500", "503", "stall", "wrong", "whole"), 2)
    cache_dir = str(tmp_path / "cache") if cached else None
    source = ShardBytes(dataset=dataset, options=StoreOptions(timeout_s=1.0, max_attempts=12, cache_dir=cache_dir))
    local = ShardBytes(dataset=open_dataset(str(shards), fallback_dir=shards))
    places = [
        (shard, int(r["offset"]), int(r["size"]), int(r["crc32"]))
        for shard in range(len(dataset.shards))
        for r in dataset.records(shard)
    ]
    with ThreadPoolExecutor(16) as threads:
        read = list(threads.map(lambda place: source.read(*place), places))
    assert read == [local.read(*place) for place in places]
    assert sum(server.injected.values()) > (1 if cached else 100)
    assert source.counts().retries >= sum(server.injected.values())
    assert source.counts().cache_fills == (3 if cached else 0)
    source.close()


@pytest.mark.e2e
def test_the_command_line_takes_the_users_own_configuration(shards: Path, moto_url: str, tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "s3.json").write_text(json.dumps({"s3": _settings(moto_url)}))
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-m", "launch.cli", "shards", "index", "s3://photographs/bare", "--json"],
        cwd=tmp_path,
        env={**os.environ, "FSSPEC_CONFIG_DIR": str(tmp_path / "conf"), "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["hash"] == open_dataset(str(shards), fallback_dir=shards).hash
    assert "reading them through" in result.stderr
