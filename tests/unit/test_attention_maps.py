"""Attention maps are the CLS row of the attention, and the pictures show them where they belong."""

from __future__ import annotations

import pytest
import torch

from dino_dist.eval import attention_maps


def attention(num_images: int, heads: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_images, heads, tokens, tokens, generator=generator).softmax(-1)


@pytest.mark.parametrize("prefix", [1, 5])
def test_maps_are_the_cls_row_without_the_prefix_in_row_order(prefix: int) -> None:
    probabilities = attention(2, 3, prefix + 6)
    maps = attention_maps.cls_attention_maps(probabilities, grid=(2, 3), num_prefix_tokens=prefix)
    assert maps.shape == (2, 3, 2, 3)
    assert maps[1, 2, 1, 0] == probabilities[1, 2, 0, prefix + 3]
    torch.testing.assert_close(maps.sum((-2, -1)), 1 - probabilities[:, :, 0, :prefix].sum(-1))


def test_a_grid_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="7 tokens, expected 1 prefix tokens and 3 x 3 patches"):
        attention_maps.cls_attention_maps(attention(1, 1, 7), grid=(3, 3))


def test_normalisation_is_undone() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    pixels = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    normalised = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(attention_maps.to_unit_range(normalised, mean=mean, std=std), pixels)


def test_heat_rises_in_luminance_from_black_to_nearly_white() -> None:
    colors = attention_maps.heat(torch.linspace(0, 1, 100).view(1, 100))
    luminance = (torch.tensor([0.2126, 0.7152, 0.0722]).view(3, 1, 1) * colors).sum(0).flatten()
    assert colors.shape == (3, 1, 100)
    assert luminance[0] == 0.0
    assert luminance[-1] > 0.95
    assert (luminance.diff() > 0).all()


def test_a_flat_map_has_no_hot_spot_and_no_nan() -> None:
    assert attention_maps.stretch(torch.full((1, 2, 2), 0.25)).tolist() == [[[0.0, 0.0], [0.0, 0.0]]]
    assert attention_maps.stretch(torch.tensor([[[0.1, 0.3]]])).tolist() == [[[0.0, 1.0]]]


@pytest.mark.parametrize("smooth", [False, True])
def test_the_hottest_pixels_of_an_overlay_lie_in_the_patch_with_most_attention(smooth: bool) -> None:
    maps = torch.zeros(1, 4, 4)
    maps[0, 2, 1] = 1.0
    picture = attention_maps.overlay(torch.zeros(1, 3, 32, 32), maps, smooth=smooth)
    assert picture.dtype == torch.uint8
    brightness = picture.float().sum(1)[0]
    row, column = divmod(int(brightness.argmax()), 32)
    assert (row // 8, column // 8) == (2, 1)
    assert brightness[:8].max() == brightness.min()


@pytest.mark.parametrize("size", [(16, 16), (40, 56), (224, 224)])
def test_a_sheet_has_a_row_an_image_and_a_tile_a_head(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))
    maps = attention_maps.cls_attention_maps(attention(2, 6, 5), grid=(2, 2))
    sheet = attention_maps.attention_sheet(images, maps)
    factor = max(1, 96 // min(size))
    height, width = size[0] * factor, size[1] * factor
    assert sheet.dtype == torch.uint8
    assert sheet.shape == (3, 2 * (height + 2) + 2, 8 * (width + 2) + 2)
    first = sheet[:, 2 : 2 + height : factor, 2 : 2 + width : factor]
    assert torch.equal(first, images[0].mul(255).round().byte())
    # The gap between tiles is white, whatever the number type that torchvision pads with.
    assert (sheet[:, 0] == 255).all()
