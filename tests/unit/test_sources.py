"""Images found in folders, lists and tars: names, labels, and what is ambiguous."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from dino_dist.data.prepare.sources import find_sources
from dino_dist.errors import UserError


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    put(tmp_path, "dog/b.JPG", "cat/x/deep.png", "cat/a.jpeg", "dog/notes.txt", "dog/.hidden.jpg", "empty/readme.md")
    found = find_sources(str(tmp_path))
    assert found.classes == ("cat", "dog")
    assert [(source.name, source.label) for source in found.sources] == [
        ("cat/a.jpeg", 0),
        ("cat/x/deep.png", 0),
        ("dog/b.JPG", 1),
    ]
    assert found.sources[2].size_bytes == len("dog/b.JPG")


def test_a_flat_folder_has_no_labels_and_links_are_followed_once(tmp_path: Path) -> None:
    put(tmp_path / "flat", "2.png", "1.png")
    found = find_sources(str(tmp_path / "flat"))
    assert [(source.name, source.label) for source in found.sources] == [("1.png", -1), ("2.png", -1)]
    assert found.classes == ()
    (tmp_path / "farm").mkdir()
    (tmp_path / "farm" / "a").symlink_to(tmp_path / "flat")
    (tmp_path / "flat" / "loop").symlink_to(tmp_path / "farm")
    assert [source.name for source in find_sources(str(tmp_path / "farm")).sources] == ["a/1.png", "a/2.png"]


def test_a_list_of_files(tmp_path: Path) -> None:
    put(tmp_path, "x/1.png", "x/2.png")
    (tmp_path / "list.txt").write_text(f"x/1.png\t4\n\n{tmp_path}/x/2.png\n")
    assert [(source.path, source.label) for source in find_sources(str(tmp_path / "list.txt")).sources] == [
        (f"{tmp_path}/x/1.png", 4),
        (f"{tmp_path}/x/2.png", -1),
    ]


def test_members_of_tars(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("k.jpg", b"image"), ("k.cls", b"3")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for spec in (tmp_path, tmp_path / "a.tar", tmp_path / "*.tar"):
        (source,) = find_sources(str(spec)).sources
        assert (source.name, source.label, source.size_bytes) == ("a.tar/k", 3, 5)
        assert Path(source.path).read_bytes()[source.offset_bytes :][:5] == b"image"
    assert sorted(os.listdir(tmp_path)) == ["a.tar"]  # nothing is written beside it


@pytest.mark.parametrize(
    ("line", "says"),
    [("1.png\tdog", "line 1: label 'dog'"), ("1.png\t-1", "label '-1'"), ("no.png", "line 1: 'no.png' cannot be read")],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, says: str) -> None:
    put(tmp_path, "1.png")
    (tmp_path / "list.txt").write_text(line + "\n")
    with pytest.raises(UserError, match=says) as caught:
        find_sources(str(tmp_path / "list.txt"))
    assert "\n" not in str(caught.value)


def test_ambiguous_and_empty_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images"):
        find_sources(str(tmp_path))
    put(tmp_path, "1.png", "a/2.png")
    with pytest.raises(UserError, match="both directly"):
        find_sources(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        find_sources(str(tmp_path / "missing"))
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        find_sources(str(tmp_path / "list.txt"))


def test_a_dangling_link_is_named(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png")
    (tmp_path / "a" / "x.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=rf"^{tmp_path}/a/x\.png: No such file or directory; see to it, or remove it$"):
        find_sources(str(tmp_path))


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path: Path) -> None:
    """One with a path too long for the system: that stops root as well."""
    put(tmp_path, "a/1.png")
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(17):
        os.mkdir("b" * 250, dir_fd=fd)
        outer, fd = fd, os.open("b" * 250, os.O_RDONLY, dir_fd=fd)
        os.close(outer)
    os.close(fd)
    with pytest.raises(UserError, match=r": File name too long; see to it, or remove it$"):
        find_sources(str(tmp_path))


def test_the_fingerprint_notices_changes(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "b/2.png")
    before = find_sources(str(tmp_path)).fingerprint
    assert find_sources(str(tmp_path)).fingerprint == before
    os.utime(tmp_path / "a" / "1.png", ns=(1, 1))
    touched = find_sources(str(tmp_path)).fingerprint
    assert touched != before
    (tmp_path / "b").rename(tmp_path / "c")
    assert find_sources(str(tmp_path)).fingerprint != touched
