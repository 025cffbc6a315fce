"""The report on a data set finds what was planted."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from dino_dist.data.prepare.check import Spread, check_shards
from dino_dist.data.reading.decode import DecodeRules

RULES = DecodeRules(max_member_bytes=2**20, max_pixels=10**6)


def png(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width), 7, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_counts_sizes_labels_bad_and_duplicates(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "0.tar",
        [("a.png", png(2, 9)), ("a.cls", b"4"), ("b.png", b"bad"), ("b.cls", b"4"), ("c.png", png(4, 5))],
    )
    write_tar(tmp_path / "1.tar", [("c.png", png(10, 7)), ("d.png", b""), ("d.cls", b"x")])
    report = check_shards(str(tmp_path), rules=RULES, fallback_dir=tmp_path)
    assert (report.num_shards, report.num_samples) == (2, 5)
    assert [(bad.sample_id, bad.shard, bad.key) for bad in report.bad] == [(1, "0.tar", "b"), (4, "1.tar", "d")]
    assert report.labels == {-2: 1, -1: 2, 4: 2}
    assert report.height_px == Spread(smallest=2, median=4.0, largest=10)
    assert report.width_px == Spread(smallest=5, median=7.0, largest=9)
    assert (report.num_duplicate_keys, report.duplicate_keys) == (1, ("c",))
    assert report.num_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert report.wrong_indexes == ()
    assert not report.ok


def test_an_index_that_no_longer_fits_is_found(tmp_path: Path) -> None:
    """Same size and time, other contents: opening trusts them, checking does not."""
    path = tmp_path / "0.tar"
    write_tar(path, [("a.png", png(2, 2)), ("a.cls", b"1")])
    assert check_shards(str(tmp_path), rules=RULES, fallback_dir=tmp_path).ok
    stat = path.stat()
    write_tar(path, [("a.png", png(2, 2)), ("a.cls", b"2")])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    report = check_shards(str(tmp_path), rules=RULES, fallback_dir=tmp_path)
    assert report.wrong_indexes == ("0.tar",)
    assert not report.ok


def test_damage_since_indexing_is_found(tmp_path: Path) -> None:
    """Another image of the same size and time: it decodes, but its checksum is another."""
    path = tmp_path / "0.tar"
    write_tar(path, [("a.png", png(2, 2)), ("b.png", png(3, 3))])
    assert check_shards(str(tmp_path), rules=RULES, fallback_dir=tmp_path).ok
    stat = path.stat()
    data = path.read_bytes()
    path.write_bytes(data.replace(png(3, 3), png(3, 3)[:-1] + b"!"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    report = check_shards(str(tmp_path), rules=RULES, fallback_dir=tmp_path)
    assert [(bad.sample_id, bad.key) for bad in report.bad] == [(1, "b")]
    assert "not those that were indexed" in report.bad[0].reason
    assert report.wrong_indexes == ("0.tar",)


def test_a_shard_that_cannot_be_indexed_does_not_end_the_check(tmp_path: Path) -> None:
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", [("a.png", png(2, 2)), (f"b{number}.png", b"bad")])
    os.truncate(tmp_path / "1.tar", 1100)
    (tmp_path / "3.tar").write_bytes(b"")
    report = check_shards(str(tmp_path), rules=RULES, fallback_dir=tmp_path)
    assert [line.split(": ")[0] for line in report.unreadable] == [str(tmp_path / f"{number}.tar") for number in (1, 3)]
    assert (report.num_shards, report.num_samples) == (2, 4)
    assert [(bad.sample_id, bad.shard) for bad in report.bad] == [(1, "0.tar"), (3, "2.tar")]
    assert not report.ok
    for number in (0, 2):
        (tmp_path / f"{number}.tar").unlink()
    report = check_shards(str(tmp_path), rules=RULES, fallback_dir=tmp_path)
    assert (report.num_shards, report.num_samples, len(report.unreadable)) == (0, 0, 2)


def test_a_damaged_index_file_does_not_end_the_check(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", [("a.png", png(2, 2)), (f"b{number}.png", b"bad")])
    check_shards(str(tmp_path), rules=RULES, fallback_dir=tmp_path)
    index = tmp_path / "1.tar.index.npy"
    index.write_bytes(index.read_bytes()[:-1] + b"!")
    report = check_shards(str(tmp_path), rules=RULES, fallback_dir=tmp_path)
    assert report.unreadable == (f"{index} does not match its manifest.json; delete both and they are made again",)
    assert [(bad.sample_id, bad.shard) for bad in report.bad] == [(1, "0.tar"), (5, "2.tar")]
    assert (report.num_shards, report.num_samples, report.labels) == (3, 6, {-1: 4})
    assert (report.num_duplicate_keys, report.duplicate_keys) == (1, ("a",))
    assert not report.ok
