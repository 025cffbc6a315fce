"""Drawings show the value where the patch is, and sheets hold every tile and label."""

from __future__ import annotations

import pytest
import torch

from dino_dist.pictures import draw


def picture(height: int, width: int) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("smooth", [False, True])
def test_heat_lies_on_the_patch_with_most_attention(smooth: bool) -> None:
    attention = torch.zeros(4, 6)
    attention[1, 4] = 1.0
    for drawn in (
        draw.heat_over(torch.zeros(3, 64, 96), attention, smooth=smooth),
        draw.heat_picture(attention, (64, 96), smooth=smooth),
    ):
        assert drawn.shape == (3, 64, 96)
        assert 0.0 <= float(drawn.min()) <= float(drawn.max()) <= 1.0
        row, column = divmod(int(drawn.sum(0).argmax()), 96)
        assert (row // 16, column // 16) == (1, 4)


def test_an_outlier_does_not_hide_the_rest() -> None:
    attention = torch.rand(20, 20, generator=torch.Generator().manual_seed(0))
    plain = draw.heat_picture(attention, (20, 20), smooth=False)
    attention[3, 3] = 1000.0
    with_outlier = draw.heat_picture(attention, (20, 20), smooth=False)
    assert (plain - with_outlier).abs().mean() < 0.02


def test_masks_keep_pixels_and_darken_the_rest() -> None:
    seen = picture(240, 240) * 0.5 + 0.5
    kept = torch.zeros(2, 2, dtype=torch.bool)
    kept[0, 1] = True
    drawn = draw.mask_over(seen, kept)
    assert torch.equal(drawn[:, 10:110, 130:230], seen[:, 10:110, 130:230])
    assert drawn[:, 120:].max() < 0.3
    assert draw.mask_picture(kept, (6, 4))[0].tolist() == [[0, 0, 1, 1]] * 3 + [[0] * 4] * 3
    assert torch.equal(draw.mask_over(seen, torch.ones(2, 2, dtype=torch.bool)), seen), "no border is a border of all"


@pytest.mark.parametrize(
    ("own", "seen", "shown"),
    [((480, 640), (480, 640), (480, 640)), ((1000, 2000), (32, 64), (480, 960)), ((8, 8), (16, 16), (16, 16))],
)
def test_people_get_more_detail_than_the_network(
    own: tuple[int, int], seen: tuple[int, int], shown: tuple[int, int]
) -> None:
    assert draw.shown_size(own, seen) == shown


def test_small_pictures_are_enlarged_by_a_whole_factor() -> None:
    small = picture(100, 120)
    large = draw.enlarged(small)
    assert large.shape == (3, 300, 360)
    assert torch.equal(large[:, ::3, ::3], small)
    assert draw.enlarged(large) is large


def test_a_sheet_holds_rows_of_any_length_and_size() -> None:
    label = "a very long name of a file, with a \n newline, \udcff and 猫, that cannot be drawn in the width of a tile"
    rows = [[draw.Tile(picture(30, 40), label)], [draw.Tile(picture(300, 20), "x"), draw.Tile(picture(1, 900), "")]]
    sheet = draw.sheet(rows)
    assert sheet.mode == "RGB"
    assert sheet.width < 1500
    assert sheet.height < 1500
