"""What a sample of a shard is: members of one key, its image's checksum, and its label."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dino_dist.data.shards.shard_index import NO_LABEL, UNREADABLE_LABEL, index_shard
from dino_dist.errors import UserError


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
def test_labels(
    write_tar: Callable[[Path, list[tuple[str, bytes]]], None],
    tmp_path: Path,
    members: list[tuple[str, bytes]],
    label: int,
    image_first: bool,
) -> None:
    image = [("0.jpg", b"image")]
    write_tar(tmp_path / "x.tar", image + members if image_first else members + image)
    assert index_shard(tmp_path / "x.tar").records["label"].tolist() == [label]


def test_samples_are_members_with_one_key(
    write_tar: Callable[[Path, list[tuple[str, bytes]]], None], tmp_path: Path
) -> None:
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
def test_ambiguous_samples_are_refused(
    write_tar: Callable[[Path, list[tuple[str, bytes]]], None],
    tmp_path: Path,
    members: list[tuple[str, bytes]],
    says: str,
) -> None:
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=says):
        index_shard(tmp_path / "x.tar")


@pytest.mark.parametrize("size", [0, 1, 511, 2**20, 2**20 + 1, 3 * 2**20])
def test_the_checksum_is_that_of_the_image(
    write_tar: Callable[[Path, list[tuple[str, bytes]]], None], tmp_path: Path, size: int
) -> None:
    data = np.random.default_rng(size).bytes(size)
    write_tar(tmp_path / "x.tar", [("a.cls", b"1"), ("a.jpg", data), ("b.jpg", b"other")])
    assert index_shard(tmp_path / "x.tar").records["crc32"].tolist() == [zlib.crc32(data), zlib.crc32(b"other")]
