"""What the tests of indexes write: tar files of given members, and a folder of three shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest


def _write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _write_shards(folder: Path, counts: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for shard, count in enumerate(counts):
        members = [(f"{shard}-{row}.jpg", f"image {shard} {row}".encode()) for row in range(count)]
        _write_tar(folder / f"{shard:03d}.tar", members)


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, list[tuple[str, bytes]]], None]:
    """`write_tar(path, [(name, data), ...])`."""
    return _write_tar


@pytest.fixture(scope="session")
def write_shards() -> Callable[[Path, list[int]], None]:
    """`write_shards(folder, counts)`: shards of that many samples each, without labels."""
    return _write_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of three, one and four samples."""
    _write_shards(tmp_path / "shards", [3, 1, 4])
    return tmp_path / "shards"


@pytest.fixture
def fallback(tmp_path: Path) -> Path:
    """For indexes of folders that cannot be written to."""
    return tmp_path / "fallback"
