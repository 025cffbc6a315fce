"""The renderer equals torchvision's float operations given the same parameters, and its own blur's definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dino_dist.data.crops.augment import MultiCropRenderer, resize_for_eval
from dino_dist.data.crops.crop_parameters import Column, ViewRecipe
from dino_dist.data.crops.render_rules import RenderRules
from dino_dist.errors import UserError

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ODD_SIZES = [(1, 1), (1, 300), (300, 1), (2, 3), (8, 8), (37, 53), (211, 130), (375, 500), (97, 1)]


def renderer(recipes: Sequence[ViewRecipe], **changes: Any) -> MultiCropRenderer:
    """Without normalisation unless asked for: views in [0, 1]."""
    dtype = changes.pop("dtype", torch.float32)
    rules = RenderRules(**{"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), **changes})
    return MultiCropRenderer(recipes, rules=rules, device=CPU, dtype=dtype)


def test_crop_resize_flip_equals_torchvision(pictures: Any, torchvision: Any, plain_recipe: ViewRecipe) -> None:
    recipes = [replace(plain_recipe, size_px=side, scale=(0.05, 1.0), flip_p=0.5) for side in (33, 8)]
    batch = pictures.random(ODD_SIZES * 4)
    params = batch.drawn(recipes)
    views, _ = renderer(recipes)(batch.pixels, batch.sizes, params)
    for view, recipe in enumerate(recipes):
        for index, image in enumerate(batch.images):
            expected = torchvision.cropped(image.permute(2, 0, 1).float(), params[view, index], recipe.size_px)
            difference = (views[view][index] * 255 - expected).abs().max()
            assert difference <= 0.02, f"{tuple(image.shape)} -> {recipe.size_px}: {difference:.4f} grey levels"


def test_large_reduction_of_a_small_box_far_from_the_origin(
    pictures: Any, torchvision: Any, plain_recipe: ViewRecipe
) -> None:
    """Float32 coordinates must not lose the sub-pixel position in a large image."""
    batch = pictures.random([(3, 20_000)])
    params = batch.untouched()
    params[0, 0, Column.LEFT], params[0, 0, Column.WIDTH] = 19_001, 997
    (view,), _ = renderer([plain_recipe])(batch.pixels, batch.sizes, params)
    expected = torchvision.cropped(batch.images[0].permute(2, 0, 1).float(), params[0, 0], 32)
    assert (view[0] * 255 - expected).abs().max() <= 0.02


def test_jitter_in_all_24_orders_equals_torchvision(pictures: Any, torchvision: Any, plain_recipe: ViewRecipe) -> None:
    """A full-size crop at scale 1 is the image itself, so only colours differ."""
    recipe = replace(plain_recipe, size_px=24, jitter_p=1.0)
    images = pictures.random([(24, 24)] * 24).images
    images[5][:] = 77  # no hue, no contrast
    batch = pictures(images)
    params = batch.untouched()
    generator = torch.Generator().manual_seed(1)
    factors = torch.tensor([0.6, 0.6, 0.8, -0.1]) + torch.rand(24, 4, generator=generator) * torch.tensor(
        [0.8, 0.8, 0.4, 0.2]
    )
    params[0, :, Column.JITTER_ORDER] = torch.arange(24)
    params[0, :, Column.BRIGHTNESS : Column.HUE + 1] = factors.double()
    (views,), _ = renderer([recipe])(batch.pixels, batch.sizes, params)
    for order, (view, image) in enumerate(zip(views, batch.images, strict=True)):
        expected = torchvision.colored(image.permute(2, 0, 1) / 255, params[0, order])
        assert (view - expected).abs().max() <= 1e-5, f"order {order}"


@pytest.mark.parametrize("active", [("brightness", "contrast"), ("hue",), ("saturation", "hue"), ("contrast",)])
def test_a_strength_of_zero_leaves_its_operation_out(
    pictures: Any, plain_recipe: ViewRecipe, active: tuple[str, ...]
) -> None:
    """The sequence of the remaining operations is that of the full one with neutral factors."""
    neutral = {name: 0.0 for name in ("brightness", "contrast", "saturation", "hue") if name not in active}
    some, everything = replace(plain_recipe, jitter_p=1.0, **neutral), replace(plain_recipe, jitter_p=1.0)  # type: ignore[arg-type]
    batch = pictures.random([(40, 30)] * 24)
    params = batch.drawn([some])
    (fast,), _ = renderer([some])(batch.pixels, batch.sizes, params)
    (slow,), _ = renderer([everything])(batch.pixels, batch.sizes, params)
    assert (fast - slow).abs().max() <= 1e-6


def test_gray_and_solarize_equal_torchvision(pictures: Any, plain_recipe: ViewRecipe) -> None:
    recipe = replace(plain_recipe, size_px=16, gray_p=0.5, solarize_p=0.5)
    image = torch.arange(256, dtype=torch.uint8).repeat(3)[: 16 * 16 * 3].view(16, 16, 3).contiguous()
    batch = pictures([image] * 4)
    params = batch.untouched()
    params[0, 1::2, Column.GRAY] = 1.0
    params[0, 2:, Column.SOLARIZE] = 1.0
    (views,), _ = renderer([recipe])(batch.pixels, batch.sizes, params)
    picture = image.permute(2, 0, 1) / 255
    gray = tv.rgb_to_grayscale(picture, num_output_channels=3)
    expected = torch.stack([picture, gray, tv.solarize(picture, 128 / 255), tv.solarize(gray, 128 / 255)])
    assert (views - expected).abs().max() <= 1e-5
    assert {127, 128} <= set(image.flatten().tolist()), "the threshold itself is tried"


def extended_box_pass(line: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """One box along the last axis, from its definition: sum over the window, borders repeated."""
    length = np.sqrt(12.0 * sigma**2 / 3.0 + 1.0)
    inner = int((length - 1.0) // 2)
    total_variance = sigma**2 / 3.0
    edge = (2 * inner + 1) * (inner * (inner + 1) - 3 * total_variance)
    edge /= 6.0 * (total_variance - (inner + 1) ** 2)
    reach = inner + 1
    wide = np.pad(line, [(0, 0)] * (line.ndim - 1) + [(reach, reach)], mode="edge")
    size = line.shape[-1]
    result = edge * (wide[..., :size] + wide[..., 2 * reach : 2 * reach + size])
    for shift in range(1, 2 * reach):
        result += wide[..., shift : shift + size]
    return result / (2 * inner + 1 + 2 * edge)


SIGMAS = [0.0, 0.1, 0.3, 0.7, 1.0, 1.3, 1.41, 1.42, 1.7, 1.99, 2.0]


@pytest.mark.parametrize("side", [5, 33])
def test_blur_equals_its_definition_and_is_near_pil(pictures: Any, plain_recipe: ViewRecipe, side: int) -> None:
    recipe = replace(plain_recipe, size_px=side, blur_p=0.5)
    batch = pictures.random([(side, side)] * len(SIGMAS))
    params = batch.untouched()
    params[0, :, Column.BLUR_SIGMA] = torch.tensor(SIGMAS)
    (views,), _ = renderer([recipe])(batch.pixels, batch.sizes, params)
    (sharp,), _ = renderer([recipe])(batch.pixels, batch.sizes, batch.untouched())
    for view, untouched, image, sigma in zip(views, sharp, batch.images, SIGMAS, strict=True):
        expected = image.permute(2, 0, 1).numpy() / 255.0
        if sigma == 0.0:
            assert torch.equal(view, untouched), "no blur must change no bit"
            continue
        for _ in range(3):
            expected = extended_box_pass(expected, sigma)
        for _ in range(3):
            expected = extended_box_pass(expected.swapaxes(1, 2), sigma).swapaxes(1, 2)
        assert np.abs(view.numpy() - expected).max() <= 1e-4, f"sigma {sigma}"
        pil = Image.fromarray(image.numpy()).filter(ImageFilter.GaussianBlur(sigma))
        levels = np.abs(view.permute(1, 2, 0).numpy() * 255.0 - np.asarray(pil)).max()
        assert levels <= 3.0, f"sigma {sigma}: {levels:.2f} levels from PIL"


def test_blur_keeps_sum_and_widens_by_its_sigma(pictures: Any, plain_recipe: ViewRecipe) -> None:
    side = 41
    image = torch.zeros(side, side, 3, dtype=torch.uint8)
    image[side // 2, side // 2] = 255
    batch = pictures([image] * 3)
    params = batch.untouched()
    params[0, :, Column.BLUR_SIGMA] = torch.tensor([0.5, 1.0, 2.0])
    (views,), _ = renderer([replace(plain_recipe, size_px=side, blur_p=1.0)])(batch.pixels, batch.sizes, params)
    profile = views[:, 0].sum(1)
    distance_2 = (torch.arange(side) - side // 2).square().float()
    assert torch.allclose(profile.sum(1), torch.ones(3), atol=1e-5)
    assert torch.allclose((profile * distance_2).sum(1).sqrt(), torch.tensor([0.5, 1.0, 2.0]), atol=1e-3)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_sample_renders_to_the_same_bits_in_any_batch(
    pictures: Any,
    threads: Callable[[int], AbstractContextManager[None]],
    full_recipe: ViewRecipe,
    num_threads: int,
) -> None:
    small = replace(full_recipe, size_px=16)
    recipes = [full_recipe, full_recipe, replace(small, scale=(0.05, 0.4)), small]
    batch = pictures.random([*ODD_SIZES, (64, 64), (8, 8), (33, 200)], seed=2)
    n = len(batch.images)
    render = renderer(recipes, mean=MEAN, std=STD)
    with threads(num_threads):
        views = render(batch.pixels, batch.sizes, batch.drawn(recipes)).views
        whole = [torch.unflatten(group, 0, (2, n)) for group in views]
        subsets = [[index] for index in range(n)] + [[7, 3], [11, 0, 5, 9, 2], list(range(n - 1, -1, -1))]
        for subset in subsets:
            some = batch.chosen(subset)
            part, _ = render(some.pixels, some.sizes, some.drawn(recipes))
            for group, expected in zip(part, whole, strict=True):
                assert torch.equal(torch.unflatten(group, 0, (2, len(subset))), expected[:, subset]), f"batch {subset}"


def test_very_long_images_have_the_same_bits_alone(pictures: Any, plain_recipe: ViewRecipe) -> None:
    recipes = [replace(plain_recipe, size_px=300)] * 2
    batch = pictures.random([(2, 20_000), (3, 5), (1, 40_000), (4, 4)])
    (whole,), _ = renderer(recipes)(batch.pixels, batch.sizes, batch.drawn(recipes))
    for index in range(4):
        one = batch.chosen([index])
        (alone,), _ = renderer(recipes)(one.pixels, one.sizes, one.drawn(recipes))
        assert torch.equal(alone, torch.unflatten(whole, 0, (2, 4))[:, index])


def test_views_come_crop_major_one_tensor_per_side(pictures: Any, plain_recipe: ViewRecipe) -> None:
    recipes = [plain_recipe] * 2 + [replace(plain_recipe, size_px=8)] * 3
    gray_levels = [10, 20, 30, 40]
    batch = pictures([torch.full((9, 7, 3), level, dtype=torch.uint8) for level in gray_levels])
    params = batch.drawn(recipes)
    (globals_, locals_), _ = renderer(recipes)(batch.pixels, batch.sizes, params)
    assert globals_.shape == (8, 3, 32, 32)
    assert locals_.shape == (12, 3, 8, 8)
    assert globals_.is_contiguous()
    assert renderer(recipes, dtype=torch.bfloat16)(batch.pixels, batch.sizes, params).views[1].is_contiguous()
    for views, count in ((globals_, 2), (locals_, 3)):
        expected = torch.tensor(gray_levels * count).view(-1, 1, 1, 1).expand_as(views)
        assert torch.allclose(views * 255, expected.float(), atol=1e-3)


def test_each_view_follows_its_own_parameters(pictures: Any, plain_recipe: ViewRecipe) -> None:
    """In a group with different recipes, only the views asked for are solarized."""
    recipes = [plain_recipe, replace(plain_recipe, solarize_p=1.0)]
    white = torch.full((6, 6, 3), 255, dtype=torch.uint8)
    batch = pictures([white, white])
    (views,), _ = renderer(recipes)(batch.pixels, batch.sizes, batch.drawn(recipes))
    assert views.mean(dim=(1, 2, 3)).tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0], abs=1e-5)


def test_normalisation_and_dtype(pictures: Any, full_recipe: ViewRecipe) -> None:
    batch, recipes = pictures.random([(20, 30)] * 3), [full_recipe]
    params = batch.drawn(recipes)
    (plain,), _ = renderer(recipes)(batch.pixels, batch.sizes, params)
    (normalised,), _ = renderer(recipes, mean=MEAN, std=STD)(batch.pixels, batch.sizes, params)
    assert torch.allclose(normalised, tv.normalize(plain, list(MEAN), list(STD)), atol=1e-6)
    (half,), _ = renderer(recipes, mean=MEAN, std=STD, dtype=torch.bfloat16)(batch.pixels, batch.sizes, params)
    assert torch.equal(half, normalised.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (inside,), _ = renderer(recipes, mean=MEAN, std=STD)(batch.pixels, batch.sizes, params)
    assert torch.equal(inside, normalised), "autocast must not reach the pixels"


@pytest.mark.parametrize(("resize_px", "crop_px"), [(32, 28), (17, 17), (40, 9), (8, 8)])
def test_eval_view_equals_torchvision(pictures: Any, resize_px: int, crop_px: int) -> None:
    batch = pictures.random([*ODD_SIZES, (8, 8), (32, 32), (50, 75)])
    views = resize_for_eval(batch.pixels, batch.sizes, resize_px=resize_px, crop_px=crop_px, mean=MEAN, std=STD)
    assert views.shape == (len(batch.images), 3, crop_px, crop_px)
    for view, image in zip(views, batch.images, strict=True):
        resized = tv.resize(image.permute(2, 0, 1).float(), [resize_px], InterpolationMode.BICUBIC, antialias=True)
        expected = tv.normalize(tv.center_crop(resized.clamp(0, 255), [crop_px]) / 255, list(MEAN), list(STD))
        levels = ((view - expected).abs() * torch.tensor(STD).view(3, 1, 1)).max() * 255
        assert levels <= 0.02, f"{tuple(image.shape)}: {levels:.4f} grey levels"


def test_wrong_arguments_are_refused(pictures: Any, full_recipe: ViewRecipe) -> None:
    batch = pictures.random([(4, 5)])
    params = batch.drawn([full_recipe])
    with pytest.raises(ValueError, match="pixels must be 60"):
        renderer([full_recipe])(batch.pixels[:-1], batch.sizes, params)
    with pytest.raises(ValueError, match="params must have shape"):
        renderer([full_recipe] * 2)(batch.pixels, batch.sizes, params)
    with pytest.raises(UserError, match="crop_px=9"):
        resize_for_eval(batch.pixels, batch.sizes, resize_px=8, crop_px=9, mean=MEAN, std=STD)
    with pytest.raises(UserError, match="std"):
        renderer([full_recipe], std=(1.0, 0.0, 1.0))
    with pytest.raises(UserError, match="at least one view"):
        renderer([])
