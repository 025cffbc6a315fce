"""Everything that is named is found once, in order, under names that cannot collide on any file system."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_dist.data.reading.decode import DecodeRules
from dino_dist.errors import UserError
from dino_dist.pictures.media import find_media, frame_files, read_image, unique_names

RULES = DecodeRules(max_member_bytes=1000, max_pixels=1000)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_files_and_folders_in_order(tmp_path: Path) -> None:
    touch(
        *(tmp_path / name for name in ("a/y.JPG", "a/b/x.png", "a/clip.mp4", "a/.hidden.png", "a/notes.txt", "z.gif"))
    )
    media = find_media([tmp_path / "z.gif", tmp_path / "a"])
    assert [(medium.kind, medium.name, medium.chosen) for medium in media] == [
        ("video", "z", True),
        ("video", "clip", False),
        ("image", "y", False),
        ("image", "b_x", False),
    ]


def test_names_that_look_alike_get_numbers(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("cat.png", "Cat.jpg", "cat-2.png", "c/cat.png", "c/cat.bmp", "../../x y.png")))
    files = [tmp_path / name for name in ("cat.png", "Cat.jpg", "cat-2.png", "c/cat.png", "c/cat.bmp")]
    assert [medium.name for medium in find_media(files)] == ["cat", "Cat-2", "cat-2-2", "cat-3", "cat-4"]


@given(st.lists(st.text(max_size=90), max_size=20))
def test_names_are_safe_and_distinct(texts: list[str]) -> None:
    names = unique_names(texts)
    assert len({name.casefold() for name in names}) == len(texts)
    for name in names:
        assert name
        assert not set(name) & set("/\\.:\0\n ")
        assert len(name.encode()) <= 255


def test_many_of_one_name_are_numbered_in_order() -> None:
    assert unique_names(["a"] * 4000)[-1] == "a-4000"


def test_frames_are_in_natural_order(tmp_path: Path) -> None:
    touch(*(tmp_path / f"f{number}.png" for number in (10, 2, 1)), tmp_path / "readme.txt")
    assert [file.name for file in frame_files(tmp_path)] == ["f1.png", "f2.png", "f10.png"]
    (medium,) = find_media([tmp_path], frames=True)
    assert medium.kind == "frames"


def test_nothing_to_look_at(tmp_path: Path) -> None:
    touch(tmp_path / "notes.txt")
    for paths, words in (([tmp_path], "holds nothing to look at"), ([tmp_path / "gone.png"], "does not exist")):
        with pytest.raises(UserError, match=words):
            find_media(paths)
    with pytest.raises(UserError, match="holds no images to be frames"):
        frame_files(tmp_path)


def test_bad_files_are_one_line_whatever_their_name(tmp_path: Path) -> None:
    file = tmp_path / "two\nlines.png"
    for content in (b"", b"no picture", b"x" * 1001):
        file.write_bytes(content)
        with pytest.raises(UserError, match="no image that can be read") as caught:
            read_image(file, RULES)
        assert "\n" not in str(caught.value)
