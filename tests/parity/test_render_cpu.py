"""The CPU's renderer equals torchvision's float operations, view by view, on any shape, batch and number of threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dino_dist.data.crops.crop_parameters import Column, ViewRecipe, draw
from dino_dist.data.crops.render_cpu import CpuRenderer
from dino_dist.data.crops.render_rules import RenderRules
from dino_dist.errors import UserError

AS_LEVELS = RenderRules(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
"""Without normalisation: views are grey levels."""
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
OPERATIONS: list[Callable[[Tensor, float], Tensor]] = [
    tv.adjust_brightness,
    tv.adjust_contrast,
    tv.adjust_saturation,
    tv.adjust_hue,
]


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


def drawn(recipes: Sequence[ViewRecipe], images: Sequence[Tensor], *, share_jitter: bool = False) -> Tensor:
    ids = np.arange(len(images), dtype=np.int64)
    rows = draw(
        recipes,
        seed=3,
        epochs=np.zeros_like(ids),
        sample_ids=ids,
        repeats=np.zeros_like(ids),
        sizes=packed(images)[1].numpy(),
        share_jitter=share_jitter,
    )
    return torch.from_numpy(rows).float()


def boxes(*rows: tuple[int, int, int, int, int]) -> Tensor:
    """One view of each image, cut at (top, left, height, width), mirrored or not, and changed in nothing."""
    params = torch.zeros(1, len(rows), len(Column))
    params[0, :, : Column.FLIP + 1] = torch.tensor(rows)
    params[..., Column.BRIGHTNESS : Column.SATURATION + 1] = 1.0
    return params


def cropped(levels: Tensor, row: Tensor, side_px: int) -> Tensor:
    """torchvision's crop, resize and flip of float levels [3, H, W]."""
    top, left, height, width, flip = (int(value) for value in row[: Column.FLIP + 1])
    side = [side_px, side_px]
    cut = tv.resized_crop(levels, top, left, height, width, side, InterpolationMode.BICUBIC, antialias=True)
    cut = cut.clamp(0, 255)
    return tv.horizontal_flip(cut) if flip else cut


def jittered(picture: Tensor, row: Tensor) -> Tensor:
    """torchvision's jitter and grayscale of a float picture in [0, 1]."""
    for op in list(itertools.permutations(range(4)))[int(row[Column.JITTER_ORDER])]:
        picture = OPERATIONS[op](picture, float(row[Column.BRIGHTNESS + op]))
    return tv.rgb_to_grayscale(picture, num_output_channels=3) if row[Column.GRAY] else picture


def finished(picture: Tensor, row: Tensor) -> Tensor:
    """torchvision's blur and solarize."""
    sigma = float(row[Column.BLUR_SIGMA])
    picture = tv.gaussian_blur(picture, [9, 9], [sigma, sigma]) if sigma else picture
    return tv.solarize(picture, 128 / 255) if row[Column.SOLARIZE] else picture


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    size: tuple[int, int], box: tuple[int, int, int, int, int], side_px: int
) -> None:
    images = random_images([size])
    params = boxes(box)
    (view,), _ = CpuRenderer([replace(PLAIN, size_px=side_px)], rules=AS_LEVELS)(*packed(images), params)
    expected = cropped(images[0].permute(2, 0, 1).float(), params[0, 0], side_px)
    assert (view[0] - expected).abs().max() <= 0.02


def test_a_box_of_the_views_size_is_copied() -> None:
    images = random_images([(40, 50)] * 2)
    views, _ = CpuRenderer([PLAIN], rules=AS_LEVELS)(*packed(images), boxes((3, 11, 32, 32, 0), (8, 18, 32, 32, 1)))
    expected = torch.stack([images[0][3:35, 11:43], images[1][8:40, 18:50].flip(1)]).permute(0, 3, 1, 2)
    assert (views[0] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("share_jitter", [False, True])
def test_whole_recipe_equals_torchvision(share_jitter: bool) -> None:
    """Each picture is compared with the one torchvision makes from the same crop, which may differ by 0.02 levels."""
    rules = replace(AS_LEVELS, blur="taps9", jitter_before_crop=share_jitter, plain_views=1)
    recipes = [replace(FULL, solarize_p=0.0), FULL, replace(FULL, size_px=17, scale=(0.05, 0.4))]
    images = random_images([(37, 53), (64, 64), (211, 130), (9, 140)] * 4)
    params = drawn(recipes, images, share_jitter=share_jitter)
    rendered = CpuRenderer(recipes, rules=rules)(*packed(images), params)
    groups = [rendered.views[0].unflatten(0, (2, len(images))), rendered.views[1].unflatten(0, (1, len(images)))]
    views = [*groups[0], *groups[1]]
    assert rendered.plain is not None
    for index, image in enumerate(images):
        levels = image.permute(2, 0, 1).float()
        for view, recipe in enumerate(recipes):
            row = params[view, index]
            if share_jitter:
                picture = cropped(jittered(levels / 255, params[0, index]) * 255, row, recipe.size_px) / 255
            else:
                picture = jittered(cropped(levels, row, recipe.size_px) / 255, row)
            expected = finished(picture, row) * 255
            # Near its threshold solarize may invert in one and not in the other.
            same = (views[view][index] - expected).abs() <= 0.05
            inverted = (views[view][index] + expected - 255).abs() <= 0.05
            assert bool((same | inverted & bool(row[Column.SOLARIZE])).all())
            assert float(same.double().mean()) >= 0.999
        seen = jittered(levels / 255, params[0, index]) * 255 if share_jitter else levels
        assert (rendered.plain[index] - cropped(seen, params[0, index], 32)).abs().max() <= 0.03


@pytest.mark.parametrize("turns", [-0.5, -0.4, -1 / 6, -0.1, 0.01, 1 / 3, 0.5])
def test_hue_of_any_color_by_any_angle(turns: float) -> None:
    """All mixtures of a few levels: grays, ties of two channels, each order of the channels."""
    levels = torch.tensor([0, 1, 127, 128, 254, 255], dtype=torch.uint8)
    colors = torch.cartesian_prod(levels, levels, levels)[:196].view(14, 14, 3)
    params = boxes((0, 0, 14, 14, 0))
    params[0, 0, Column.HUE] = turns
    (views,), _ = CpuRenderer([replace(PLAIN, size_px=14)], rules=AS_LEVELS)(*packed([colors]), params)
    expected = tv.adjust_hue(colors.permute(2, 0, 1) / 255, float(params[0, 0, Column.HUE]))
    assert (views[0] / 255 - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("side_px", [5, 8, 9, 33, 96])
def test_nine_taps_equal_torchvision(side_px: int) -> None:
    sigmas = [0.1, 0.3, 0.8, 1.5, 2.0]
    images = random_images([(side_px, side_px)] * len(sigmas))
    params = boxes(*[(0, 0, side_px, side_px, 0)] * len(sigmas))
    params[0, :, Column.BLUR_SIGMA] = torch.tensor(sigmas)
    recipe = replace(PLAIN, size_px=side_px, blur_p=1.0)
    (views,), _ = CpuRenderer([recipe], rules=replace(AS_LEVELS, blur="taps9"))(*packed(images), params)
    for view, image, sigma in zip(views, images, sigmas, strict=True):
        expected = tv.gaussian_blur(image.permute(2, 0, 1) / 255, [9, 9], [sigma, sigma])
        assert (view / 255 - expected).abs().max() <= 1e-4


def test_a_view_too_small_for_nine_taps_is_refused() -> None:
    taps9 = replace(AS_LEVELS, blur="taps9")
    small = replace(PLAIN, size_px=4, blur_p=0.5)
    for rules in (taps9, replace(taps9, quantize="uint8")):
        with pytest.raises(UserError, match="size_px=4"):
            CpuRenderer([FULL, small], rules=rules)
        CpuRenderer([FULL, replace(small, blur_p=0.0)], rules=rules)
    CpuRenderer([FULL, small], rules=AS_LEVELS)


@pytest.mark.parametrize(
    "rules",
    [
        AS_LEVELS,
        replace(AS_LEVELS, blur="taps9", jitter_before_crop=True),
        replace(AS_LEVELS, blur="taps9", quantize="uint8"),
        replace(AS_LEVELS, quantize="uint8", jitter_before_crop=True),
    ],
)
def test_the_number_of_threads_changes_no_bit(rules: RenderRules) -> None:
    """Pictures are large enough that torch splits its operations on them."""
    recipes = [replace(FULL, size_px=224, hue=0.5), replace(FULL, size_px=96, scale=(0.05, 0.4))]
    images = random_images([(375, 500), (333, 257), (2, 9000)])
    params = drawn(recipes, images, share_jitter=rules.jitter_before_crop)
    params[..., Column.BLUR_SIGMA] = torch.tensor([0.7, 1.9, 0.0])
    renderer = CpuRenderer(recipes, rules=rules)
    with threads(1):
        expected = renderer(*packed(images), params).views
    for count in (2, 3):
        with threads(count):
            views = renderer(*packed(images), params).views
        assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True)), f"{count} threads"


def test_what_was_rendered_before_leaves_no_trace() -> None:
    """Memory is used again: a large bright image first must not shine through."""
    recipes = [FULL, replace(FULL, size_px=18)]
    small = random_images([(5, 7), (3, 30), (40, 2)])
    bright = [torch.full((200, 260, 3), 255, dtype=torch.uint8)]
    params = drawn(recipes, small)
    params[..., Column.BLUR_SIGMA] = 1.9
    fresh = CpuRenderer(recipes, rules=AS_LEVELS)(*packed(small), params).views
    used = CpuRenderer(recipes, rules=AS_LEVELS)
    used(*packed(bright), drawn(recipes, bright))
    again = used(*packed(small), params).views
    assert all(torch.equal(a, b) for a, b in zip(again, fresh, strict=True))


def test_views_are_float32_pixels_in_any_dtype_and_ordinary_tensors() -> None:
    rules = RenderRules(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), plain_views=1)
    images = random_images([(40, 60)] * 2)
    params = drawn([FULL, FULL], images)
    single = CpuRenderer([FULL, FULL], rules=rules)(*packed(images), params)
    double = CpuRenderer([FULL, FULL], rules=rules, dtype=torch.float64)(*packed(images), params)
    assert double.plain is not None
    assert single.plain is not None
    assert torch.equal(double.views[0], single.views[0].double())
    assert torch.equal(double.plain, single.plain.double())
    weight = torch.ones(3, requires_grad=True)
    (single.views[0] * weight.view(3, 1, 1)).sum().backward()
    assert weight.grad is not None


def test_plain_views_must_be_of_one_side() -> None:
    with pytest.raises(UserError, match="plain_views=2"):
        CpuRenderer([FULL, replace(FULL, size_px=8)], rules=replace(AS_LEVELS, plain_views=2))


def test_a_batch_of_no_image() -> None:
    nothing = torch.empty(0, dtype=torch.uint8), torch.empty((0, 2), dtype=torch.int64)
    rendered = CpuRenderer([FULL], rules=AS_LEVELS)(*nothing, torch.empty(1, 0, len(Column)))
    assert rendered.views[0].shape == (0, 3, 32, 32)
