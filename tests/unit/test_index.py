"""Indexes of shards and data sets: what a sample is, when an index is stale, what the hash stands for."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from dino_dist.data.shards.folder_index import IndexJob, index_folder
from dino_dist.data.shards.index import open_dataset
from dino_dist.data.shards.shard_index import NO_LABEL, UNREADABLE_LABEL, index_shard, parse_records
from dino_dist.errors import StopAsked, UserError


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_shards(folder: Path, counts: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for shard, count in enumerate(counts):
        members = [(f"{shard}-{row}.jpg", f"image {shard} {row}".encode()) for row in range(count)]
        write_tar(folder / f"{shard:03d}.tar", members)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", [3, 1, 4])
    return tmp_path / "shards"


@pytest.fixture
def fallback(tmp_path: Path) -> Path:
    return tmp_path / "fallback"


@pytest.mark.parametrize(
    ("members", "label"),
    [
        ([("0.cls", b"7")], 7),
        ([("0.cls", b" 7\n")], 7),
        ([("0.json", b'{"label": 3, "cls": 4}')], 3),
        ([("0.json", b'{"cls": 4}')], 4),
        ([("0.cls", b"7"), ("0.json", b'{"label": 3}')], 7),
        ([("0.txt", b"7")], NO_LABEL),
        ([("0.json", b'{"caption": "a dog"}')], NO_LABEL),
        ([("0.json", b"[1, 2]")], NO_LABEL),
        ([("0.json", b"[" * 100_000)], NO_LABEL),
        ([("0.json", b"\xff{")], NO_LABEL),
        ([("0.json", b'{"label": ' + b"9" * 10_000 + b"}")], NO_LABEL),
        ([("0.cls", b"n01440764")], UNREADABLE_LABEL),
        ([("0.cls", b"-1")], UNREADABLE_LABEL),
        ([("0.cls", b"9" * 30)], UNREADABLE_LABEL),
        ([("0.cls", b"1" * 100_000)], UNREADABLE_LABEL),
        ([("0.json", b'{"label": true}')], UNREADABLE_LABEL),
        ([("0.json", b'{"label": "dog"}')], UNREADABLE_LABEL),
    ],
)
@pytest.mark.parametrize("image_first", [True, False])
def test_labels(tmp_path: Path, members: list[tuple[str, bytes]], label: int, image_first: bool) -> None:
    image = [("0.jpg", b"image")]
    write_tar(tmp_path / "x.tar", image + members if image_first else members + image)
    assert index_shard(tmp_path / "x.tar").records["label"].tolist() == [label]


def test_samples_are_members_with_one_key(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(
        path,
        [
            ("a/1.JPG", b"one"),
            ("a/2.png", b"two!"),
            ("a/2.seg.png", b"a mask, not the image"),
            ("b/1.webp", b"three"),
            ("a/1.cls", b"5"),  # the other members may stand anywhere
            ("a.b/1.tiff", b"a dot in the folder"),
            ("lonely.cls", b"9"),
            (".hidden.jpg", b"no key"),
            ("README", b"no suffix"),
        ],
    )
    index = index_shard(path)
    data = path.read_bytes()
    samples = [
        (bytes(r["key"]), data[int(r["offset"]) : int(r["offset"]) + int(r["size"])], int(r["label"]))
        for r in index.records
    ]
    assert samples == [
        (b"a/1", b"one", 5),
        (b"a/2", b"two!", -1),
        (b"b/1", b"three", -1),
        (b"a.b/1", b"a dot in the folder", -1),
    ]


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("1.jpg", b"x"), ("1.png", b"y")], "'1' has two image members"),
        ([("1.jpg", b"x"), ("2.jpg", b"y"), ("1.jpg", b"x")], "'1' has two image members"),
        ([("1.jpg", b"x"), ("1.cls", b"1"), ("1.cls", b"2")], "'1' has two cls members"),
        ([("1.cls", b"1")], "no images"),
        ([("k" * 600 + ".jpg", b"1")], "600 bytes; at most 512"),
    ],
)
def test_ambiguous_samples_are_refused(tmp_path: Path, members: list[tuple[str, bytes]], says: str) -> None:
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=says):
        index_shard(tmp_path / "x.tar")


@pytest.mark.parametrize("size", [0, 1, 511, 2**20, 2**20 + 1, 3 * 2**20])
def test_the_checksum_is_that_of_the_image(tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    write_tar(tmp_path / "x.tar", [("a.cls", b"1"), ("a.jpg", data), ("b.jpg", b"other")])
    assert index_shard(tmp_path / "x.tar").records["crc32"].tolist() == [zlib.crc32(data), zlib.crc32(b"other")]


def test_an_index_of_another_version_is_one_line(folder: Path, fallback: Path) -> None:
    open_dataset(str(folder), fallback_dir=fallback)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"version": 2', '"version": 1'))
    with pytest.raises(UserError, match=r"manifest\.json is a shard manifest of version 1, .* reads 2; delete it"):
        open_dataset(str(folder), fallback_dir=fallback)
    (folder / "manifest.json").unlink()
    assert open_dataset(str(folder), fallback_dir=fallback).num_samples == 8


def test_ids_run_through_the_shards(folder: Path, fallback: Path) -> None:
    dataset = open_dataset(str(folder), fallback_dir=fallback)
    assert dataset.shard_counts.tolist() == [3, 1, 4]
    shards, rows = dataset.locate(np.arange(8))
    assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == [
        (s, r) for s, n in enumerate([3, 1, 4]) for r in range(n)
    ]
    assert dataset.locate(np.empty(0, dtype=np.int64))[0].shape == (0,)
    for outside in (-1, 8):
        with pytest.raises(ValueError, match=r"0\.\.7"):
            dataset.locate(np.array([0, outside]))
    assert dataset.labels().tolist() == [-1] * 8
    assert bytes(dataset.records(2)["key"][1]) == b"2-1"
    assert not fallback.exists()


def test_every_way_to_name_the_shards_gives_one_data_set(folder: Path, fallback: Path) -> None:
    specs = [str(folder), f"{folder}/{{000..002}}.tar", f"{folder}/*.tar", f"{folder}/manifest.json"]
    datasets = [open_dataset(spec, fallback_dir=fallback) for spec in specs]
    assert len({dataset.hash for dataset in datasets}) == 1
    assert datasets[0].hash == json.loads((folder / "manifest.json").read_text())["hash"]
    part = open_dataset(f"{folder}/{{000,002}}.tar", fallback_dir=fallback)
    assert part.num_samples == 7
    assert part.hash != datasets[0].hash
    assert (
        open_dataset(f"{folder}/manifest.json", fallback_dir=fallback).num_samples == 8
    )  # rows of the others are kept


def test_shards_of_two_folders(tmp_path: Path, fallback: Path) -> None:
    write_shards(tmp_path / "a", [2])
    write_shards(tmp_path / "b", [2])
    dataset = open_dataset(f"{tmp_path}/{{a,b}}/000.tar", fallback_dir=fallback)
    assert [shard.name for shard in dataset.shards] == ["a/000.tar", "b/000.tar"]
    assert dataset.num_samples == 4


def test_the_hash_is_that_of_the_contents(folder: Path, fallback: Path, tmp_path: Path) -> None:
    original = open_dataset(str(folder), fallback_dir=fallback).hash
    copy = tmp_path / "elsewhere" / "copy"
    copy.mkdir(parents=True)
    for tar in folder.glob("*.tar"):
        shutil.copyfile(tar, copy / tar.name)  # new times, and indexed anew
    assert open_dataset(str(copy), fallback_dir=fallback).hash == original
    write_tar(copy / "001.tar", [("1-0.jpg", b"image 1 0"), ("1-0.cls", b"5")])
    assert open_dataset(str(copy), fallback_dir=fallback).hash != original
    (copy / "001.tar").rename(copy / "009.tar")
    assert open_dataset(str(copy), fallback_dir=fallback).hash != original


def test_only_changed_shards_are_indexed_again(folder: Path, fallback: Path) -> None:
    open_dataset(str(folder), fallback_dir=fallback)
    before = {path.name: path.stat().st_ino for path in folder.glob("*.npy")}
    open_dataset(str(folder), fallback_dir=fallback)
    assert {path.name: path.stat().st_ino for path in folder.glob("*.npy")} == before
    write_tar(folder / "001.tar", [("new.jpg", b"new"), ("new2.jpg", b"new")])
    dataset = open_dataset(str(folder), fallback_dir=fallback)
    assert dataset.shard_counts.tolist() == [3, 2, 4]
    after = {path.name: path.stat().st_ino for path in folder.glob("*.npy")}
    assert [name for name in before if before[name] != after[name]] == ["001.tar.index.npy"]
    os.utime(folder / "000.tar", ns=(1, 1))  # same size, other time
    open_dataset(str(folder), fallback_dir=fallback)
    assert (folder / "000.tar.index.npy").stat().st_ino != before["000.tar.index.npy"]
    # Indexing one shard by itself forgets nothing of the others.
    write_tar(folder / "001.tar", [("new.jpg", b"newer!"), ("new2.jpg", b"new")])
    open_dataset(str(folder / "001.tar"), fallback_dir=fallback)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [row["name"] for row in manifest["shards"]] == ["000.tar", "001.tar", "002.tar"]
    (folder / "002.tar.index.npy").unlink()
    assert open_dataset(str(folder), fallback_dir=fallback).num_samples == 9
    assert not list(folder.glob("*tmp*"))


def test_a_copy_in_another_process_reads_the_same(folder: Path, fallback: Path) -> None:
    dataset = open_dataset(str(folder), fallback_dir=fallback)
    dataset.records(0)
    size = len(pickle.dumps(dataset))
    copy = pickle.loads(pickle.dumps(dataset))
    assert size < 4000
    assert np.array_equal(copy.records(1), dataset.records(1))


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder below the temporary one that every user may enter."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    yield root
    shutil.rmtree(root)


def _open_as_another_user(spec: str, fallback: Path, answer: Connection) -> None:
    if os.geteuid() == 0:  # for whom no folder is read-only
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        dataset = open_dataset(spec, fallback_dir=fallback)
        answer.send((dataset.hash, len(dataset.records(0))))
    except UserError as error:
        answer.send(str(error))


@pytest.mark.distributed
def test_a_read_only_folder_is_indexed_elsewhere(public_folder: Path) -> None:
    shards, writable = public_folder / "shards", public_folder / "writable"
    write_shards(shards, [2, 3])
    writable.mkdir()
    writable.chmod(0o777)
    shards.chmod(0o555)
    context = multiprocessing.get_context("fork")
    answers = []
    for fallback in (writable, writable, shards):
        ours, theirs = context.Pipe()
        process = context.Process(target=_open_as_another_user, args=(str(shards), fallback, theirs))
        process.start()
        answers.append(ours.recv())
        process.join()
    assert not (shards / "manifest.json").exists()
    assert answers[0] == answers[1]
    assert answers[0][1] == 2
    assert "make one writable" in answers[2]
    shards.chmod(0o755)
    assert open_dataset(str(shards), fallback_dir=writable).hash == answers[0][0]


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


def allow_descriptors(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """As the system would say; really allowing no more would depend on what else this process has open."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (count, count))


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


def test_a_file_is_checked_once_and_again_if_it_is_another(
    folder: Path, fallback: Path, monkeypatch: pytest.MonkeyPatch
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


class _Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


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


def test_missing_things_are_named(folder: Path, fallback: Path) -> None:
    open_dataset(str(folder), fallback_dir=fallback)
    (folder / "001.tar").unlink()
    with pytest.raises(UserError, match=r"001\.tar, which is not beside it"):
        open_dataset(f"{folder}/manifest.json", fallback_dir=fallback)
    with pytest.raises(UserError, match=r"nothing\.json: No such file or directory; check the path"):
        open_dataset(f"{folder}/nothing.json", fallback_dir=fallback)


def test_an_interrupted_indexing_goes_on_where_it_was(folder: Path, fallback: Path) -> None:
    def stop_after(number: int) -> Callable[[], None]:
        left = iter(range(number))

        def poll() -> None:
            if next(left, None) is None:
                raise StopAsked(1)

        return poll

    with pytest.raises(StopAsked):
        open_dataset(str(folder), fallback_dir=fallback, poll=stop_after(1), num_threads=1)
    kept = json.loads((folder / "manifest.json").read_text())["shards"]
    assert [row["name"] for row in kept] == ["000.tar", "001.tar"]
    # Two of three are done, so one poll is all that is left.
    assert open_dataset(str(folder), fallback_dir=fallback, poll=stop_after(1)).num_samples == 8


def _index_and_die(folder: Path, after: int, save_every_s: float) -> None:
    left = iter(range(after - 1))

    def poll() -> None:
        if next(left, None) is None:
            os._exit(9)

    paths = sorted(folder.glob("*.tar"))
    index_folder(folder, paths, folder, IndexJob(1, poll, save_every_s=save_every_s))


@pytest.mark.distributed
@pytest.mark.parametrize(("save_every_s", "kept"), [(0.0, 2), (3600.0, 0)])
def test_a_process_that_dies_keeps_what_it_saved(folder: Path, fallback: Path, save_every_s: float, kept: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=_index_and_die, args=(folder, 2, save_every_s))
    process.start()
    process.join()
    assert process.exitcode == 9
    polls: list[None] = []
    dataset = open_dataset(str(folder), fallback_dir=fallback, poll=lambda: polls.append(None))
    assert dataset.num_samples == 8
    assert len(polls) == 3 - kept
