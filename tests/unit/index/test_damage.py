"""A damaged, hostile or outdated index or manifest is one line, and nothing in it is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dino_dist.data.shards.index import open_dataset
from dino_dist.data.shards.shard_index import parse_records
from dino_dist.errors import UserError


def test_an_index_of_another_version_is_one_line(folder: Path, fallback: Path) -> None:
    open_dataset(str(folder), fallback_dir=fallback)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"version": 2', '"version": 1'))
    with pytest.raises(UserError, match=r"manifest\.json is a shard manifest of version 1, .* reads 2; delete it"):
        open_dataset(str(folder), fallback_dir=fallback)
    (folder / "manifest.json").unlink()
    assert open_dataset(str(folder), fallback_dir=fallback).num_samples == 8


@pytest.mark.parametrize("where", [0, 20, 100, -40, -1])
def test_a_damaged_index_is_noticed(folder: Path, fallback: Path, where: int) -> None:
    open_dataset(str(folder), fallback_dir=fallback)
    path = folder / "000.tar.index.npy"
    data = bytearray(path.read_bytes())
    data[where] ^= 0x40
    path.write_bytes(data)
    dataset = open_dataset(str(folder), fallback_dir=fallback)
    with pytest.raises(UserError, match=r"^[^\n]*000\.tar\.index\.npy[^\n]*$"):
        dataset.records(0)


class _Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_a_pickle_in_the_place_of_an_index_is_not_run(folder: Path, fallback: Path) -> None:
    open_dataset(str(folder), fallback_dir=fallback)
    trap = folder / "sprung"
    payload = np.empty(3, dtype=object)
    payload[:] = [_Trap(str(trap))] * 3
    np.save(folder / "000.tar.index.npy", payload, allow_pickle=True)
    with pytest.raises(UserError, match="no shard index"):
        open_dataset(str(folder), fallback_dir=fallback).records(0)
    (folder / "000.tar.index.npy").write_bytes(pickle.dumps(_Trap(str(trap))))
    with pytest.raises(UserError, match="no shard index"):
        open_dataset(str(folder), fallback_dir=fallback).records(0)
    assert not trap.exists()


def _zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, records=np.frombuffer(data, dtype=np.uint8))
    return buffer.getvalue()


def _header(data: bytes, old: bytes, new: bytes) -> bytes:
    """With another text in the header, which keeps its length."""
    assert old in data
    return data.replace(old + b" " * max(0, len(new) - len(old)), new.ljust(len(old)), 1)


@pytest.mark.parametrize(
    "spoil",
    [
        _zipped,
        lambda data: b"PK\x03\x04" + data,
        lambda data: _header(data, b"(3,), }", b"(%d,), }" % 10**15),
        lambda data: _header(data, b"(3,), }", b"(%d,), }" % 10**30),
        lambda data: _header(data, b"(3,), }", b"(-3,), }"),
        lambda data: _header(data, b"(3,), }", b"(2,), }"),
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:9],
        lambda data: b"",
        lambda data: data[:6] + b"\3\0" + data[8:],
    ],
    ids=["npz", "zip", "huge", "huger", "negative", "fewer", "cut", "longer", "magic", "empty", "version"],
)
def test_a_hostile_index_is_one_line(folder: Path, fallback: Path, spoil: Callable[[bytes], bytes]) -> None:
    open_dataset(str(folder), fallback_dir=fallback)
    path = folder / "000.tar.index.npy"
    spoilt = spoil(path.read_bytes())
    path.write_bytes(spoilt)
    with pytest.raises(UserError, match=r"^[^\n]*000\.tar\.index\.npy is no shard index[^\n]*delete it[^\n]*$"):
        open_dataset(str(folder), fallback_dir=fallback).records(0)
    assert parse_records(spoilt, sha256="") is None


def test_an_index_that_cannot_be_opened_is_no_damage(folder: Path, fallback: Path) -> None:
    dataset = open_dataset(str(folder), fallback_dir=fallback)
    (folder / "000.tar.index.npy").unlink()
    with pytest.raises(UserError, match=r"000\.tar\.index\.npy: No such file") as caught:
        dataset.records(0)
    assert "delete" not in str(caught.value)
    (folder / "001.tar.index.npy").unlink()
    (folder / "001.tar.index.npy").symlink_to("001.tar.index.npy")
    with pytest.raises(UserError, match="Too many levels of symbolic links"):
        dataset.records(1)


def allow_descriptors(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """As the system would say; really allowing no more would depend on what else this process has open."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (count, count))


def test_a_file_is_checked_once_and_again_if_it_is_another(
    write_shards: Callable[[Path, list[int]], None], folder: Path, fallback: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More shards than stay mapped: mapping one again reads its header only, unless the file was written to."""
    allow_descriptors(monkeypatch, 256)
    write_shards(folder, [1] * 70)
    dataset = open_dataset(str(folder), fallback_dir=fallback)
    before = len(os.listdir("/proc/self/fd"))
    first = [dataset.records(shard).copy() for shard in range(70)]
    assert len(os.listdir("/proc/self/fd")) <= before + 64
    path = folder / "000.tar.index.npy"
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # looks like the one that was checked
    assert dataset.records(0)["key"][0] != first[0]["key"][0]
    os.utime(folder / "001.tar.index.npy")
    assert np.array_equal(dataset.records(1), first[1])
    for shard in range(2, 70):
        assert np.array_equal(dataset.records(shard), first[shard])
    os.utime(path)
    with pytest.raises(UserError, match="does not match its manifest"):
        dataset.records(0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": "2", "shards": []}',
        '{"version": 2}',
        '{"version": 2, "shards": 5}',
        '{"version": 2, "shards": [5]}',
        '{"version": 2, "shards": [{"name": "000.tar"}]}',
        "[" * 100_000,
        "\ud800",
    ],
)
def test_a_damaged_manifest_is_one_line(folder: Path, fallback: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="no shard manifest") as caught:
        open_dataset(str(folder), fallback_dir=fallback)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../000.tar"),
        ("name", "/etc/000.tar"),
        ("name", "\ud800.tar"),
        ("name", 5),
        ("bytes", -1),
        ("bytes", True),
        ("samples", 10**18),
        ("samples", 0),
        ("samples", 1.5),
        ("sha256", "abc"),
        ("sha256", None),
        ("mtime_ns", "now"),
        ("other", 1),
    ],
)
def test_impossible_rows_are_refused(folder: Path, fallback: Path, field: str, value: object) -> None:
    open_dataset(str(folder), fallback_dir=fallback)
    manifest = folder / "manifest.json"
    document = json.loads(manifest.read_text())
    document["shards"][0][field] = value
    manifest.write_text(json.dumps(document))
    for spec in (str(folder), str(manifest)):
        with pytest.raises(UserError, match="no shard manifest"):
            open_dataset(spec, fallback_dir=fallback)
