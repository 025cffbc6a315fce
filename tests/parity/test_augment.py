"""The renderer equals torchvision's float operations given the same parameters, and its own blur's definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dino_dist.data.crops.augment import MultiCropRenderer, resize_for_eval
from dino_dist.data.crops.crop_parameters import Column, ViewRecipe, draw
from dino_dist.data.crops.render_rules import RenderRules
from dino_dist.errors import UserError

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FULL = ViewRecipe(
    size_px=32,
    scale=(0.4, 1.0),
    ratio=(3 / 4, 4 / 3),
    flip_p=0.5,
    jitter_p=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    gray_p=0.2,
    blur_p=0.5,
    blur_sigma_px=(0.1, 2.0),
    solarize_p=0.2,
)
PLAIN = replace(FULL, flip_p=0.0, jitter_p=0.0, gray_p=0.0, blur_p=0.0, solarize_p=0.0)
ODD_SIZES = [(1, 1), (1, 300), (300, 1), (2, 3), (8, 8), (37, 53), (211, 130), (375, 500), (97, 1)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Several threads for pictures this small only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_images(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Tensor]:
    """uint8 [H, W, 3], half noise and half smooth, so that both overshoot and flat regions occur."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for height, width in sizes:
        noise = torch.rand(height, width, 3, generator=generator)
        ramp = torch.linspace(0, 1, height)[:, None, None] * torch.linspace(1, 0, width)[None, :, None]
        mask = torch.arange(width)[None, :, None] < width // 2
        images.append((torch.where(mask, noise, ramp) * 255.99).to(torch.uint8))
    return images


def packed(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([image.flatten() for image in images]), torch.tensor([image.shape[:2] for image in images])


def renderer(recipes: Sequence[ViewRecipe], **changes: Any) -> MultiCropRenderer:
    """Without normalisation unless asked for: views in [0, 1]."""
    dtype = changes.pop("dtype", torch.float32)
    rules = RenderRules(**{"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), **changes})
    return MultiCropRenderer(recipes, rules=rules, device=CPU, dtype=dtype)


def whole_image_params(num: int, side: int) -> Tensor:
    """One view of `num` images of side `side`, cut nowhere and changed in nothing; float64 [1, num, columns]."""
    params = torch.zeros(1, num, len(Column), dtype=torch.float64)
    params[..., Column.HEIGHT] = params[..., Column.WIDTH] = side
    params[..., Column.BRIGHTNESS : Column.SATURATION + 1] = 1.0
    return params


def drawn(recipes: Sequence[ViewRecipe], sizes: Tensor, ids: Sequence[int], seed: int = 3) -> Tensor:
    sample_ids = np.array(ids, dtype=np.int64)
    return torch.from_numpy(
        draw(
            recipes,
            seed=seed,
            epochs=np.zeros_like(sample_ids),
            sample_ids=sample_ids,
            repeats=np.zeros_like(sample_ids),
            sizes=sizes.numpy(),
        )
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_crop_resize_flip_equals_torchvision() -> None:
    recipes = [replace(PLAIN, size_px=side, scale=(0.05, 1.0), flip_p=0.5) for side in (33, 8)]
    images = random_images(ODD_SIZES * 4)
    pixels, sizes = packed(images)
    params = drawn(recipes, sizes, range(len(images)))
    views, _ = renderer(recipes)(pixels, sizes, params)
    for view, recipe in enumerate(recipes):
        for index, image in enumerate(images):
            top, left, height, width, flip = (int(value) for value in params[view, index, : Column.FLIP + 1])
            side = [recipe.size_px, recipe.size_px]
            expected = tv.resized_crop(
                image.permute(2, 0, 1).float(),
                top,
                left,
                height,
                width,
                side,
                InterpolationMode.BICUBIC,
                antialias=True,
            ).clamp(0, 255)
            expected = tv.horizontal_flip(expected) if flip else expected
            difference = (views[view][index] * 255 - expected).abs().max()
            assert difference <= 0.02, f"{tuple(image.shape)} -> {recipe.size_px}: {difference:.4f} grey levels"


def test_large_reduction_of_a_small_box_far_from_the_origin() -> None:
    """Float32 coordinates must not lose the sub-pixel position in a large image."""
    (image,) = random_images([(3, 20_000)])
    params = whole_image_params(1, 3)
    params[0, 0, Column.LEFT], params[0, 0, Column.WIDTH] = 19_001, 997
    pixels, sizes = packed([image])
    (view,), _ = renderer([PLAIN])(pixels, sizes, params)
    expected = tv.resized_crop(
        image.permute(2, 0, 1).float(), 0, 19_001, 3, 997, [32, 32], InterpolationMode.BICUBIC, antialias=True
    ).clamp(0, 255)
    assert (view[0] * 255 - expected).abs().max() <= 0.02


def test_jitter_in_all_24_orders_equals_torchvision() -> None:
    """A full-size crop at scale 1 is the image itself, so only colours differ."""
    recipe = replace(PLAIN, size_px=24, jitter_p=1.0)
    images = random_images([(24, 24)] * 24)
    images[5][:] = 77  # no hue, no contrast
    pixels, sizes = packed(images)
    params = whole_image_params(24, 24)
    generator = torch.Generator().manual_seed(1)
    factors = torch.tensor([0.6, 0.6, 0.8, -0.1]) + torch.rand(24, 4, generator=generator) * torch.tensor(
        [0.8, 0.8, 0.4, 0.2]
    )
    params[0, :, Column.JITTER_ORDER] = torch.arange(24)
    params[0, :, Column.BRIGHTNESS : Column.HUE + 1] = factors.double()
    (views,), _ = renderer([recipe])(pixels, sizes, params)
    operations: list[Callable[[Tensor, float], Tensor]] = [
        tv.adjust_brightness,
        tv.adjust_contrast,
        tv.adjust_saturation,
        tv.adjust_hue,
    ]
    for index, order in enumerate(itertools.permutations(range(4))):
        expected = images[index].permute(2, 0, 1) / 255
        for op in order:
            expected = operations[op](expected, float(factors[index, op]))
        assert (views[index] - expected).abs().max() <= 1e-5, f"order {order}"


@pytest.mark.parametrize("active", [("brightness", "contrast"), ("hue",), ("saturation", "hue"), ("contrast",)])
def test_a_strength_of_zero_leaves_its_operation_out(active: tuple[str, ...]) -> None:
    """The sequence of the remaining operations is that of the full one with neutral factors."""
    neutral = {name: 0.0 for name in ("brightness", "contrast", "saturation", "hue") if name not in active}
    some, everything = replace(PLAIN, jitter_p=1.0, **neutral), replace(PLAIN, jitter_p=1.0)
    pixels, sizes = packed(random_images([(40, 30)] * 24))
    params = drawn([some], sizes, range(24))
    ((fast,), _), ((slow,), _) = renderer([some])(pixels, sizes, params), renderer([everything])(pixels, sizes, params)
    assert (fast - slow).abs().max() <= 1e-6


def test_gray_and_solarize_equal_torchvision() -> None:
    recipe = replace(PLAIN, size_px=16, gray_p=0.5, solarize_p=0.5)
    image = torch.arange(256, dtype=torch.uint8).repeat(3)[: 16 * 16 * 3].view(16, 16, 3).contiguous()
    pixels, sizes = packed([image] * 4)
    params = whole_image_params(4, 16)
    params[0, 1::2, Column.GRAY] = 1.0
    params[0, 2:, Column.SOLARIZE] = 1.0
    (views,), _ = renderer([recipe])(pixels, sizes, params)
    picture = image.permute(2, 0, 1) / 255
    gray = tv.rgb_to_grayscale(picture, num_output_channels=3)
    expected = torch.stack([picture, gray, tv.solarize(picture, 128 / 255), tv.solarize(gray, 128 / 255)])
    assert (views - expected).abs().max() <= 1e-5
    assert {127, 128} <= set(image.unique().tolist()), "the threshold itself is tried"


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
def test_blur_equals_its_definition_and_is_near_pil(side: int) -> None:
    recipe = replace(PLAIN, size_px=side, blur_p=0.5)
    images = random_images([(side, side)] * len(SIGMAS))
    pixels, sizes = packed(images)
    params = whole_image_params(len(SIGMAS), side)
    params[0, :, Column.BLUR_SIGMA] = torch.tensor(SIGMAS)
    (views,), _ = renderer([recipe])(pixels, sizes, params)
    (sharp,), _ = renderer([recipe])(pixels, sizes, whole_image_params(len(SIGMAS), side))
    for view, untouched, image, sigma in zip(views, sharp, images, SIGMAS, strict=True):
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


def test_blur_keeps_sum_and_widens_by_its_sigma() -> None:
    side = 41
    image = torch.zeros(side, side, 3, dtype=torch.uint8)
    image[side // 2, side // 2] = 255
    pixels, sizes = packed([image] * 3)
    params = whole_image_params(3, side)
    params[0, :, Column.BLUR_SIGMA] = torch.tensor([0.5, 1.0, 2.0])
    (views,), _ = renderer([replace(PLAIN, size_px=side, blur_p=1.0)])(pixels, sizes, params)
    profile = views[:, 0].sum(1)
    distance_2 = (torch.arange(side) - side // 2).square().float()
    assert torch.allclose(profile.sum(1), torch.ones(3), atol=1e-5)
    assert torch.allclose((profile * distance_2).sum(1).sqrt(), torch.tensor([0.5, 1.0, 2.0]), atol=1e-3)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_sample_renders_to_the_same_bits_in_any_batch(num_threads: int) -> None:
    recipes = [FULL, FULL, replace(FULL, size_px=16, scale=(0.05, 0.4)), replace(FULL, size_px=16)]
    images = random_images([*ODD_SIZES, (64, 64), (8, 8), (33, 200)], seed=2)
    n = len(images)
    pixels, sizes = packed(images)
    render = renderer(recipes, mean=MEAN, std=STD)
    with threads(num_threads):
        whole = [group.unflatten(0, (2, n)) for group in render(pixels, sizes, drawn(recipes, sizes, range(n))).views]
        subsets = [[index] for index in range(n)] + [[7, 3], [11, 0, 5, 9, 2], list(range(n - 1, -1, -1))]
        for subset in subsets:
            some_pixels, some_sizes = packed([images[index] for index in subset])
            part, _ = render(some_pixels, some_sizes, drawn(recipes, some_sizes, subset))
            for group, expected in zip(part, whole, strict=True):
                assert torch.equal(group.unflatten(0, (2, len(subset))), expected[:, subset]), f"batch {subset}"


def test_very_long_images_have_the_same_bits_alone() -> None:
    recipe = replace(PLAIN, size_px=300)
    images = random_images([(2, 20_000), (3, 5), (1, 40_000), (4, 4)])
    pixels, sizes = packed(images)
    (whole,), _ = renderer([recipe] * 2)(pixels, sizes, drawn([recipe] * 2, sizes, range(4)))
    for index, image in enumerate(images):
        one_pixels, one_size = packed([image])
        (alone,), _ = renderer([recipe] * 2)(one_pixels, one_size, drawn([recipe] * 2, one_size, [index]))
        assert torch.equal(alone, whole.unflatten(0, (2, 4))[:, index])


def test_views_come_crop_major_one_tensor_per_side() -> None:
    recipes = [PLAIN, PLAIN, replace(PLAIN, size_px=8), replace(PLAIN, size_px=8), replace(PLAIN, size_px=8)]
    gray_levels = [10, 20, 30, 40]
    pixels, sizes = packed([torch.full((9, 7, 3), level, dtype=torch.uint8) for level in gray_levels])
    (globals_, locals_), _ = renderer(recipes)(pixels, sizes, drawn(recipes, sizes, range(4)))
    assert globals_.shape == (8, 3, 32, 32)
    assert locals_.shape == (12, 3, 8, 8)
    assert globals_.is_contiguous()
    assert (
        renderer(recipes, dtype=torch.bfloat16)(pixels, sizes, drawn(recipes, sizes, range(4))).views[1].is_contiguous()
    )
    for views, count in ((globals_, 2), (locals_, 3)):
        expected = torch.tensor(gray_levels * count).view(-1, 1, 1, 1).expand_as(views)
        assert torch.allclose(views * 255, expected.float(), atol=1e-3)


def test_each_view_follows_its_own_parameters() -> None:
    """In a group with different recipes, only the views asked for are solarized."""
    recipes = [PLAIN, replace(PLAIN, solarize_p=1.0)]
    white = torch.full((6, 6, 3), 255, dtype=torch.uint8)
    pixels, sizes = packed([white, white])
    (views,), _ = renderer(recipes)(pixels, sizes, drawn(recipes, sizes, [0, 1]))
    assert views.mean(dim=(1, 2, 3)).tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0], abs=1e-5)


def test_normalisation_and_dtype() -> None:
    pixels, sizes = packed(random_images([(20, 30)] * 3))
    params = drawn([FULL], sizes, range(3))
    (plain,), _ = renderer([FULL])(pixels, sizes, params)
    (normalised,), _ = renderer([FULL], mean=MEAN, std=STD)(pixels, sizes, params)
    assert torch.allclose(normalised, tv.normalize(plain, list(MEAN), list(STD)), atol=1e-6)
    (half,), _ = renderer([FULL], mean=MEAN, std=STD, dtype=torch.bfloat16)(pixels, sizes, params)
    assert torch.equal(half, normalised.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (inside,), _ = renderer([FULL], mean=MEAN, std=STD)(pixels, sizes, params)
    assert torch.equal(inside, normalised), "autocast must not reach the pixels"


@pytest.mark.parametrize(("resize_px", "crop_px"), [(32, 28), (17, 17), (40, 9), (8, 8)])
def test_eval_view_equals_torchvision(resize_px: int, crop_px: int) -> None:
    images = random_images([*ODD_SIZES, (8, 8), (32, 32), (50, 75)])
    pixels, sizes = packed(images)
    views = resize_for_eval(pixels, sizes, resize_px=resize_px, crop_px=crop_px, mean=MEAN, std=STD)
    assert views.shape == (len(images), 3, crop_px, crop_px)
    for view, image in zip(views, images, strict=True):
        resized = tv.resize(image.permute(2, 0, 1).float(), [resize_px], InterpolationMode.BICUBIC, antialias=True)
        expected = tv.normalize(tv.center_crop(resized.clamp(0, 255), [crop_px]) / 255, list(MEAN), list(STD))
        levels = ((view - expected).abs() * torch.tensor(STD).view(3, 1, 1)).max() * 255
        assert levels <= 0.02, f"{tuple(image.shape)}: {levels:.4f} grey levels"


def test_wrong_arguments_are_refused() -> None:
    pixels, sizes = packed(random_images([(4, 5)]))
    params = drawn([FULL], sizes, [0])
    with pytest.raises(ValueError, match="pixels must be 60"):
        renderer([FULL])(pixels[:-1], sizes, params)
    with pytest.raises(ValueError, match="params must have shape"):
        renderer([FULL, FULL])(pixels, sizes, params)
    with pytest.raises(UserError, match="crop_px=9"):
        resize_for_eval(pixels, sizes, resize_px=8, crop_px=9, mean=MEAN, std=STD)
    with pytest.raises(UserError, match="std"):
        renderer([FULL], std=(1.0, 0.0, 1.0))
    with pytest.raises(UserError, match="at least one view"):
        renderer([])
