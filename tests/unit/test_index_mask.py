"""Masks of objects keep their numbers on disk, and look as Pascal VOC's do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_dist.data.reading.index_mask import object_colors, read_index_mask, write_index_mask
from dino_dist.errors import UserError

PIXELS = 10**6


def test_numbers_survive(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).integers(0, 256, (17, 23), dtype=np.uint8)
    write_index_mask(tmp_path / "mask.png", mask)
    assert np.array_equal(read_index_mask(tmp_path / "mask.png", max_pixels=PIXELS), mask)
    with Image.open(tmp_path / "mask.png") as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.array(picture.convert("RGB")), object_colors()[mask])


def test_colors_are_pascal_vocs() -> None:
    colors = object_colors().tolist()
    assert colors[:5] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert colors[15] == [192, 128, 128]  # a person
    assert colors[255] == [224, 224, 192]  # what is not judged
    assert len({tuple(color) for color in colors}) == 256


def test_black_and_white_is_one_object(tmp_path: Path) -> None:
    mask = np.array([[0, 255], [255, 0]], dtype=np.uint8)
    Image.fromarray(mask).save(tmp_path / "grey.png")
    Image.fromarray(mask).convert("1").save(tmp_path / "bits.png")
    for name in ("grey.png", "bits.png"):
        assert read_index_mask(tmp_path / name, max_pixels=PIXELS).tolist() == [[0, 1], [1, 0]]
    Image.fromarray(np.array([[0, 255, 2]], dtype=np.uint8)).save(tmp_path / "numbers.png")
    assert read_index_mask(tmp_path / "numbers.png", max_pixels=PIXELS).tolist() == [[0, 255, 2]]
    write_index_mask(tmp_path / "indexed.png", mask)
    assert read_index_mask(tmp_path / "indexed.png", max_pixels=PIXELS).tolist() == mask.tolist(), "255 is void there"


def test_other_files_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "colors.png")
    Image.new("L", (40, 40)).save(tmp_path / "large.png")
    Image.new("L", (4, 4)).save(tmp_path / "a.jpg")
    cut = (tmp_path / "large.png").read_bytes()[:-20]
    (tmp_path / "cut.png").write_bytes(cut)
    for name, said in (
        ("colors.png", "mask of colours"),
        ("large.png", "at most 100 pixels"),
        ("a.jpg", "no mask that can be read"),
        ("absent.png", "no mask that can be read"),
    ):
        with pytest.raises(UserError, match=said):
            read_index_mask(tmp_path / name, max_pixels=100)
    with pytest.raises(UserError, match="no mask that can be read"):
        read_index_mask(tmp_path / "cut.png", max_pixels=PIXELS)
