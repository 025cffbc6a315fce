"""Which shards a specification names, and what it may not name."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino_dist.data.shards.shard_list import list_shards
from dino_dist.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a/0.tar", "a/1.tar", "a/2.tar", "a/notes.txt", "b/0.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("a", ["a/0.tar", "a/1.tar", "a/2.tar"]),
        ("a/{0..1}.tar", ["a/0.tar", "a/1.tar"]),
        ("{a,b}/0.tar", ["a/0.tar", "b/0.tar"]),
        ("a/{2,0}.tar", ["a/0.tar", "a/2.tar"]),
        ("a/*", ["a/0.tar", "a/1.tar", "a/2.tar"]),
        ("{a,b}/[01].tar", ["a/0.tar", "a/1.tar", "b/0.tar"]),
        ("a/1.tar", ["a/1.tar"]),
    ],
)
def test_names(folder: Path, spec: str, names: list[str]) -> None:
    assert list_shards(f"{folder}/{spec}") == [folder / name for name in names]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("pipe:cat x.tar", "command"),
        ("s3://bucket/{0..9}.tar", "URL"),
        ("", "give a folder"),
        ("FOLDER/missing", "does not exist"),
        ("FOLDER/a/{0..5}.tar", "does not exist"),
        ("FOLDER/a/x*.tar", "nothing matches"),
        ("FOLDER/a/notes.txt", "names no .tar shard"),
        ("FOLDER", "its folders a, b do"),
        ("FOLDER/a/{0,0}.tar", "twice"),
        ("FOLDER/a/{0..", "braces"),
        ("FOLDER/{0..999999999}.tar", "more than"),
        ("FOLDER/{{{0..9999},{0..9999}}}{0..9999}", "more than"),
        ("FOLDER/{0..99999999999999999999999}", "more than"),
        ("{" * 5000, "give a folder"),
        ("FOLDER/" + "{a,b}" * 200, "more than"),
        ("FOLDER/a\0b", "give a folder"),
        ("x" * 300 + "/" + "y" * 300, "cannot be read|does not exist"),
    ],
)
def test_refusals_are_one_line(folder: Path, spec: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        list_shards(spec.replace("FOLDER", str(folder)))
    assert "\n" not in str(caught.value)


def test_compressed_shards_are_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "0.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="compressed"):
        list_shards(str(tmp_path))
