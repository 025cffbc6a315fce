"""With quantize="uint8" pixels are those of torchvision's operations on uint8 pictures, rounded where it rounds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dino_dist.data.crops import color
from dino_dist.data.crops.crop_parameters import Column, ViewRecipe, draw
from dino_dist.data.crops.render_cpu import CpuRenderer
from dino_dist.data.crops.render_rules import RenderRules

CPU = torch.device("cpu")
RULES = RenderRules(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255), blur="taps9", quantize="uint8")
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


def random_images(sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """uint8 [H, W, 3], half noise and half smooth."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for height, width in sizes:
        noise = torch.rand(height, width, 3, generator=generator)
        ramp = torch.linspace(0, 1, height)[:, None, None] * torch.linspace(1, 0, width)[None, :, None]
        mask = torch.arange(width)[None, :, None] < width // 2
        images.append((torch.where(mask, noise, ramp) * 255.99).to(torch.uint8))
    return images


def jittered(picture: Tensor, row: Tensor) -> Tensor:
    """torchvision's jitter and grayscale of a uint8 picture; a jitter that is gated off is not applied at all."""
    factors = [float(factor) for factor in row[Column.BRIGHTNESS : Column.HUE + 1]]
    if factors != [1.0, 1.0, 1.0, 0.0]:
        for op in list(itertools.permutations(range(4)))[int(row[Column.JITTER_ORDER])]:
            picture = OPERATIONS[op](picture, factors[op])
    return tv.rgb_to_grayscale(picture, num_output_channels=3) if row[Column.GRAY] else picture


def by_torchvision(image: Tensor, row: Tensor, side_px: int, whole_first: bool) -> Tensor:
    picture = jittered(image.permute(2, 0, 1), row) if whole_first else image.permute(2, 0, 1)
    top, left, height, width, flip = (int(value) for value in row[: Column.FLIP + 1])
    side = [side_px, side_px]
    picture = tv.resized_crop(picture, top, left, height, width, side, InterpolationMode.BICUBIC, antialias=True)
    picture = tv.horizontal_flip(picture) if flip else picture
    picture = picture if whole_first else jittered(picture, row)
    sigma = float(row[Column.BLUR_SIGMA])
    picture = tv.gaussian_blur(picture, [9, 9], [sigma, sigma]) if sigma else picture
    return tv.solarize(picture, 128.0) if row[Column.SOLARIZE] else picture


@pytest.mark.parametrize("whole_first", [False, True])
def test_the_cpus_views_are_torchvisions(whole_first: bool) -> None:
    images = random_images([(37, 53), (64, 64), (211, 130), (9, 140), (32, 32)] * 6)
    sizes = torch.tensor([image.shape[:2] for image in images])
    ids = np.arange(len(images), dtype=np.int64)
    recipes = [FULL, replace(FULL, size_px=12, scale=(0.05, 0.4))]
    rows = draw(
        recipes,
        seed=4,
        epochs=ids * 0,
        sample_ids=ids,
        repeats=ids * 0,
        sizes=sizes.numpy(),
        share_jitter=whole_first,
    )
    params = torch.from_numpy(rows).float()
    renderer = CpuRenderer(recipes, rules=replace(RULES, jitter_before_crop=whole_first))
    views, _ = renderer(torch.cat([image.flatten() for image in images]), sizes, params)
    for view, index in itertools.product(range(2), range(len(images))):
        expected = by_torchvision(images[index], params[view, index], recipes[view].size_px, whole_first)
        assert (views[view][index] - expected).abs().max() <= 1e-3, f"view {view} of image {index}"


def test_box_blur_rounds_once_and_stays_near_pil() -> None:
    """PIL rounds after each of six passes, so it is up to three levels away."""
    (image,) = random_images([(32, 32)])
    params = torch.zeros(1, 1, len(Column))
    params[..., Column.HEIGHT] = params[..., Column.WIDTH] = 32
    params[..., Column.BRIGHTNESS : Column.SATURATION + 1] = 1.0
    params[..., Column.BLUR_SIGMA] = 1.3
    recipe = replace(FULL, blur_p=1.0)
    size = torch.tensor([[32, 32]])
    (view,), _ = CpuRenderer([recipe], rules=replace(RULES, blur="box3"))(image.flatten(), size, params)
    (smooth,), _ = CpuRenderer([recipe], rules=replace(RULES, blur="box3", quantize=None))(
        image.flatten(), size, params
    )
    assert (view - smooth.round()).abs().max() <= 1e-3
    pil = np.asarray(Image.fromarray(image.numpy()).filter(ImageFilter.GaussianBlur(1.3)))
    assert np.abs(view[0].permute(1, 2, 0).numpy() - pil).max() <= 3.01


@pytest.mark.parametrize("padded", [False, True])
def test_jitter_of_a_batch_is_torchvisions_within_a_level(padded: bool) -> None:
    """Batched, branch-free, in all 24 orders; and in padded pictures, whose padding must not reach contrast's mean."""
    generator = torch.Generator().manual_seed(1)
    low, span = torch.tensor([0.6, 0.6, 0.8, -0.1]), torch.tensor([0.8, 0.8, 0.4, 0.2])
    factors = low + torch.rand(24, 4, generator=generator) * span
    images = [image.permute(2, 0, 1) for image in random_images([(20, 28)] * 24)]
    height, width = (32, 40) if padded else (20, 28)
    levels = torch.full((24, height, 3, width), 200.0)
    levels[:, :20, :, :28] = torch.stack(images).permute(0, 2, 1, 3).float()
    inside = torch.zeros(24, height, 1, width, dtype=torch.bool)
    inside[:, :20, :, :28] = True
    sequences = color.jitter_sequences(range(4), CPU)
    for quantize in (True, False):
        changed = color.jitter(
            levels, torch.arange(24), factors, sequences, range(4), inside=inside if padded else None, quantize=quantize
        )[:, :20, :, :28].permute(0, 2, 1, 3)
        differences = []
        for index, order in enumerate(itertools.permutations(range(4))):
            expected = images[index] if quantize else images[index] / 255
            for op in order:
                expected = OPERATIONS[op](expected, float(factors[index, op]))
            expected = expected.float() if quantize else expected * 255
            differences.append((changed[index] - expected).abs())
        difference = torch.stack(differences)
        assert difference.max() <= (1.0 if quantize else 1e-5 * 255)
        assert difference.mean() <= (0.001 if quantize else 1e-5 * 255)


def test_gray_and_solarize_of_a_batch_are_torchvisions() -> None:
    (image,) = random_images([(24, 24)])
    picture = image.permute(2, 0, 1)
    levels = torch.stack([picture, picture]).permute(0, 2, 1, 3).float()
    chosen = torch.tensor([True, False])
    gray = color.to_gray(levels, chosen, quantize=True).permute(0, 2, 1, 3)
    assert torch.equal(gray, torch.stack([tv.rgb_to_grayscale(picture, num_output_channels=3), picture]).float())
    solarized = color.solarize(levels, chosen).permute(0, 2, 1, 3)
    assert torch.equal(solarized, torch.stack([tv.solarize(picture, 128.0), picture]).float())
