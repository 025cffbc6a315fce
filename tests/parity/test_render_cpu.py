"""The CPU's renderer equals torchvision's float operations, view by view, on any shape, batch and number of threads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from dino_dist.data.crops.crop_parameters import Column, ViewRecipe
from dino_dist.data.crops.render_cpu import CpuRenderer
from dino_dist.data.crops.render_rules import RenderRules
from dino_dist.errors import UserError

AS_LEVELS = RenderRules(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
"""Without normalisation: views are grey levels."""


def boxes(batch: Any, *rows: tuple[int, int, int, int, int]) -> Tensor:
    """One view of each image, cut at (top, left, height, width), mirrored or not, and changed in nothing."""
    params: Tensor = batch.untouched().float()
    params[0, :, : Column.FLIP + 1] = torch.tensor(rows)
    return params


def finished(picture: Tensor, row: Tensor) -> Tensor:
    """torchvision's blur and solarize."""
    sigma = float(row[Column.BLUR_SIGMA])
    picture = tv.gaussian_blur(picture, [9, 9], [sigma, sigma]) if sigma else picture
    return tv.solarize(picture, 128 / 255) if row[Column.SOLARIZE] else picture


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((300, 4000), (0, 1800, 300, 400, 1)),
        ((4000, 300), (1500, 0, 400, 300, 0)),
        ((300, 4000), (0, 0, 300, 4000, 1)),
        ((4000, 300), (0, 0, 4000, 300, 0)),
        ((1, 1), (0, 0, 1, 1, 1)),
        ((1, 300), (0, 7, 1, 293, 0)),
        ((300, 1), (9, 0, 291, 1, 1)),
        ((97, 31), (40, 30, 1, 1, 0)),
        ((60, 98), (3, 0, 32, 98, 0)),
        ((98, 60), (0, 5, 98, 32, 1)),
        ((98, 98), (17, 5, 33, 31, 1)),
    ],
)
@pytest.mark.parametrize("side_px", [32, 7, 98])
def test_any_box_of_any_image_equals_torchvision(
    pictures: Any,
    torchvision: Any,
    plain_recipe: ViewRecipe,
    size: tuple[int, int],
    box: tuple[int, int, int, int, int],
    side_px: int,
) -> None:
    batch = pictures.random([size])
    params = boxes(batch, box)
    (view,), _ = CpuRenderer([replace(plain_recipe, size_px=side_px)], rules=AS_LEVELS)(
        batch.pixels, batch.sizes, params
    )
    expected = torchvision.cropped(batch.images[0].permute(2, 0, 1).float(), params[0, 0], side_px)
    assert (view[0] - expected).abs().max() <= 0.02


def test_a_box_of_the_views_size_is_copied(pictures: Any, plain_recipe: ViewRecipe) -> None:
    batch = pictures.random([(40, 50)] * 2)
    params = boxes(batch, (3, 11, 32, 32, 0), (8, 18, 32, 32, 1))
    views, _ = CpuRenderer([plain_recipe], rules=AS_LEVELS)(batch.pixels, batch.sizes, params)
    images = batch.images
    expected = torch.stack([images[0][3:35, 11:43], images[1][8:40, 18:50].flip(1)]).permute(0, 3, 1, 2)
    assert (views[0] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("share_jitter", [False, True])
def test_whole_recipe_equals_torchvision(
    pictures: Any, torchvision: Any, full_recipe: ViewRecipe, share_jitter: bool
) -> None:
    """Each picture is compared with the one torchvision makes from the same crop, which may differ by 0.02 levels."""
    rules = replace(AS_LEVELS, blur="taps9", jitter_before_crop=share_jitter, plain_views=1)
    recipes = [replace(full_recipe, solarize_p=0.0), full_recipe, replace(full_recipe, size_px=17, scale=(0.05, 0.4))]
    batch = pictures.random([(37, 53), (64, 64), (211, 130), (9, 140)] * 4)
    params = batch.drawn(recipes, share_jitter=share_jitter).float()
    rendered = CpuRenderer(recipes, rules=rules)(batch.pixels, batch.sizes, params)
    views = [*torch.unflatten(rendered.views[0], 0, (2, -1)), rendered.views[1]]
    assert rendered.plain is not None
    for index, image in enumerate(batch.images):
        levels = image.permute(2, 0, 1).float()
        for view, recipe in enumerate(recipes):
            row = params[view, index]
            if share_jitter:
                seen = torchvision.colored(levels / 255, params[0, index]) * 255
                picture = torchvision.cropped(seen, row, recipe.size_px) / 255
            else:
                picture = torchvision.colored(torchvision.cropped(levels, row, recipe.size_px) / 255, row)
            expected = finished(picture, row) * 255
            # Near its threshold solarize may invert in one and not in the other.
            same = (views[view][index] - expected).abs() <= 0.05
            inverted = (views[view][index] + expected - 255).abs() <= 0.05
            assert bool((same | inverted & bool(row[Column.SOLARIZE])).all())
            assert float(same.double().mean()) >= 0.999
        seen = torchvision.colored(levels / 255, params[0, index]) * 255 if share_jitter else levels
        assert (rendered.plain[index] - torchvision.cropped(seen, params[0, index], 32)).abs().max() <= 0.03


@pytest.mark.parametrize("turns", [-0.5, -0.4, -1 / 6, -0.1, 0.01, 1 / 3, 0.5])
def test_hue_of_any_color_by_any_angle(pictures: Any, plain_recipe: ViewRecipe, turns: float) -> None:
    """All mixtures of a few levels: grays, ties of two channels, each order of the channels."""
    levels = torch.tensor([0, 1, 127, 128, 254, 255], dtype=torch.uint8)
    colors = torch.cartesian_prod(levels, levels, levels)[:196].view(14, 14, 3)
    batch = pictures([colors])
    params = batch.untouched().float()
    params[0, 0, Column.HUE] = turns
    (views,), _ = CpuRenderer([replace(plain_recipe, size_px=14)], rules=AS_LEVELS)(batch.pixels, batch.sizes, params)
    expected = tv.adjust_hue(colors.permute(2, 0, 1) / 255, float(params[0, 0, Column.HUE]))
    assert (views[0] / 255 - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("side_px", [5, 8, 9, 33, 96])
def test_nine_taps_equal_torchvision(pictures: Any, plain_recipe: ViewRecipe, side_px: int) -> None:
    sigmas = [0.1, 0.3, 0.8, 1.5, 2.0]
    batch = pictures.random([(side_px, side_px)] * len(sigmas))
    params = batch.untouched().float()
    params[0, :, Column.BLUR_SIGMA] = torch.tensor(sigmas)
    recipe = replace(plain_recipe, size_px=side_px, blur_p=1.0)
    (views,), _ = CpuRenderer([recipe], rules=replace(AS_LEVELS, blur="taps9"))(batch.pixels, batch.sizes, params)
    for view, image, sigma in zip(views, batch.images, sigmas, strict=True):
        expected = tv.gaussian_blur(image.permute(2, 0, 1) / 255, [9, 9], [sigma, sigma])
        assert (view / 255 - expected).abs().max() <= 1e-4


def test_a_view_too_small_for_nine_taps_is_refused(full_recipe: ViewRecipe, plain_recipe: ViewRecipe) -> None:
    taps9 = replace(AS_LEVELS, blur="taps9")
    small = replace(plain_recipe, size_px=4, blur_p=0.5)
    for rules in (taps9, replace(taps9, quantize="uint8")):
        with pytest.raises(UserError, match="size_px=4"):
            CpuRenderer([full_recipe, small], rules=rules)
        CpuRenderer([full_recipe, replace(small, blur_p=0.0)], rules=rules)
    CpuRenderer([full_recipe, small], rules=AS_LEVELS)


@pytest.mark.parametrize(
    "rules",
    [
        AS_LEVELS,
        replace(AS_LEVELS, blur="taps9", jitter_before_crop=True),
        replace(AS_LEVELS, blur="taps9", quantize="uint8"),
        replace(AS_LEVELS, quantize="uint8", jitter_before_crop=True),
    ],
)
def test_the_number_of_threads_changes_no_bit(
    pictures: Any,
    threads: Callable[[int], AbstractContextManager[None]],
    full_recipe: ViewRecipe,
    rules: RenderRules,
) -> None:
    """Pictures are large enough that torch splits its operations on them."""
    recipes = [replace(full_recipe, size_px=224, hue=0.5), replace(full_recipe, size_px=96, scale=(0.05, 0.4))]
    batch = pictures.random([(375, 500), (333, 257), (2, 9000)])
    params = batch.drawn(recipes, share_jitter=rules.jitter_before_crop).float()
    params[..., Column.BLUR_SIGMA] = torch.tensor([0.7, 1.9, 0.0])
    renderer = CpuRenderer(recipes, rules=rules)
    with threads(1):
        expected = renderer(batch.pixels, batch.sizes, params).views
    for count in (2, 3):
        with threads(count):
            views = renderer(batch.pixels, batch.sizes, params).views
        assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True)), f"{count} threads"


def test_what_was_rendered_before_leaves_no_trace(pictures: Any, full_recipe: ViewRecipe) -> None:
    """Memory is used again: a large bright image first must not shine through."""
    recipes = [full_recipe, replace(full_recipe, size_px=18)]
    small = pictures.random([(5, 7), (3, 30), (40, 2)])
    bright = pictures([torch.full((200, 260, 3), 255, dtype=torch.uint8)])
    params = small.drawn(recipes).float()
    params[..., Column.BLUR_SIGMA] = 1.9
    fresh = CpuRenderer(recipes, rules=AS_LEVELS)(small.pixels, small.sizes, params).views
    used = CpuRenderer(recipes, rules=AS_LEVELS)
    used(bright.pixels, bright.sizes, bright.drawn(recipes).float())
    again = used(small.pixels, small.sizes, params).views
    assert all(torch.equal(a, b) for a, b in zip(again, fresh, strict=True))


def test_views_are_float32_pixels_in_any_dtype_and_ordinary_tensors(pictures: Any, full_recipe: ViewRecipe) -> None:
    rules = RenderRules(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), plain_views=1)
    batch, recipes = pictures.random([(40, 60)] * 2), [full_recipe] * 2
    params = batch.drawn(recipes).float()
    single = CpuRenderer(recipes, rules=rules)(batch.pixels, batch.sizes, params)
    double = CpuRenderer(recipes, rules=rules, dtype=torch.float64)(batch.pixels, batch.sizes, params)
    assert double.plain is not None
    assert single.plain is not None
    assert torch.equal(double.views[0], single.views[0].double())
    assert torch.equal(double.plain, single.plain.double())
    weight = torch.ones(3, requires_grad=True)
    (single.views[0] * weight.view(3, 1, 1)).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None


def test_plain_views_must_be_of_one_side(full_recipe: ViewRecipe) -> None:
    with pytest.raises(UserError, match="plain_views=2"):
        CpuRenderer([full_recipe, replace(full_recipe, size_px=8)], rules=replace(AS_LEVELS, plain_views=2))


def test_a_batch_of_no_image(full_recipe: ViewRecipe) -> None:
    nothing = torch.empty(0, dtype=torch.uint8), torch.empty((0, 2), dtype=torch.int64)
    rendered = CpuRenderer([full_recipe], rules=AS_LEVELS)(*nothing, torch.empty(1, 0, len(Column)))
    assert rendered.views[0].shape == (0, 3, 32, 32)
