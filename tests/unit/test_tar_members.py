"""Strict tar reading agrees with Python's tarfile on good archives and refuses every cut of one."""

from __future__ import annotations

import io
import os
import random
import tarfile
from pathlib import Path

import pytest

from dino_dist.data.shards.tar_members import FileArchive, Member, read_members
from dino_dist.errors import UserError


def write_tar(path: Path, entries: list[tarfile.TarInfo | tuple[str, bytes]], tar_format: int) -> None:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                tar.addfile(info, io.BytesIO(entry[1]))


def members_of(path: Path) -> list[Member]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return list(read_members(FileArchive(fd), path.name))
    finally:
        os.close(fd)


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_agrees_with_tarfile(tmp_path: Path, tar_format: int) -> None:
    rng = random.Random(tar_format)
    entries: list[tarfile.TarInfo | tuple[str, bytes]] = [special("folder", tarfile.DIRTYPE)]
    for number in range(60):
        depth = rng.choice([0, 1, 12]) if tar_format != tarfile.USTAR_FORMAT else rng.choice([0, 1, 5])
        name = "/".join(["a-long-folder-name"] * depth + [f"{number:04d}-é.jpg"])
        entries.append((name, rng.randbytes(rng.choice([0, 1, 511, 512, 513, 9000]))))
    path = tmp_path / "good.tar"
    write_tar(path, entries, tar_format)
    with tarfile.open(path) as tar:
        expected = [Member(m.name.encode(), m.offset_data, m.size) for m in tar if m.isfile()]
    assert members_of(path) == expected


def test_sizes_beyond_octal_and_dotted_names(tmp_path: Path) -> None:
    path = tmp_path / "big.tar"
    info = tarfile.TarInfo("./x.jpg")
    info.size = 9 * 2**30  # needs base 256 in GNU's format
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 512 + info.size + 1024)  # sparse: costs no space
    assert members_of(path) == [Member(b"x.jpg", 512, info.size)]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_every_cut_is_refused(tmp_path: Path, tar_format: int) -> None:
    whole = tmp_path / "whole.tar"
    write_tar(whole, [("0.jpg", b"x" * 700), ("é" * 40 + ".png", b"y" * 100), ("1.cls", b"3")], tar_format)
    data = whole.read_bytes()
    members = members_of(whole)
    end = members[-1].offset_bytes + 512  # where the zero blocks start
    cut = tmp_path / "cut.tar"
    for length in [*range(0, end, 37), *range(end, end + 512, 37)]:
        cut.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"^cut\.tar: bad tar at byte \d+: .*$"):
            members_of(cut)
    cut.write_bytes(data[: end + 512])
    assert members_of(cut) == members


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (("../evil.jpg", b"x"), r"'\.\.'"),
        (("a/../../evil.jpg", b"x"), r"'\.\.'"),
        (("/etc/evil.jpg", b"x"), "absolute"),
        (special("a.jpg", tarfile.SYMTYPE, "/etc/passwd"), "symbolic link"),
        (special("a.jpg", tarfile.LNKTYPE, "b.jpg"), "hard link"),
        (special("a.jpg", tarfile.CHRTYPE), "character device"),
        (special("a.jpg", tarfile.BLKTYPE), "block device"),
        (special("a.jpg", tarfile.FIFOTYPE), "FIFO"),
        (special("a.jpg", tarfile.GNUTYPE_SPARSE), "sparse"),
        (special("a.jpg", b"Z"), "unknown type"),
    ],
)
def test_what_a_shard_may_not_hold(tmp_path: Path, entry: tarfile.TarInfo | tuple[str, bytes], says: str) -> None:
    path = tmp_path / "bad.tar"
    write_tar(path, [("ok.jpg", b"x"), entry], tarfile.USTAR_FORMAT)
    with pytest.raises(UserError, match=rf"^bad\.tar: bad tar at byte 1024: .*{says}"):
        members_of(path)


def test_a_wrong_checksum_gzip_and_joined_archives(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, [("0.jpg", b"x" * 700)], tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    path.write_bytes(data + data)
    with pytest.raises(UserError, match="data follows"):
        members_of(path)
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="checksum"):
        members_of(path)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.jpg"))
    with pytest.raises(UserError, match="gzip"):
        members_of(path)


@pytest.mark.parametrize("declared", [2**20, 2**40, 2**87])
def test_a_huge_declared_size_is_refused_at_once(tmp_path: Path, declared: int) -> None:
    info = tarfile.TarInfo("0.jpg")
    info.size = declared
    path = tmp_path / "x.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match="truncated"):
        members_of(path)
