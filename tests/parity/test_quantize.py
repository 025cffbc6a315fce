"""With quantize="uint8" pixels are those of torchvision's operations on uint8 pictures, rounded where it rounds."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dino_dist.data.crops import color
from dino_dist.data.crops.crop_parameters import Column, ViewRecipe
from dino_dist.data.crops.render_cpu import CpuRenderer
from dino_dist.data.crops.render_rules import RenderRules

CPU = torch.device("cpu")
RULES = RenderRules(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255), blur="taps9", quantize="uint8")


def by_torchvision(torchvision: Any, image: Tensor, row: Tensor, side_px: int, whole_first: bool) -> Tensor:
    """All operations on uint8, the resize among them."""
    picture: Tensor = torchvision.colored(image.permute(2, 0, 1), row) if whole_first else image.permute(2, 0, 1)
    top, left, height, width, flip = (int(value) for value in row[: Column.FLIP + 1])
    side = [side_px, side_px]
    picture = tv.resized_crop(picture, top, left, height, width, side, InterpolationMode.BICUBIC, antialias=True)
    picture = tv.horizontal_flip(picture) if flip else picture
    picture = picture if whole_first else torchvision.colored(picture, row)
    sigma = float(row[Column.BLUR_SIGMA])
    picture = tv.gaussian_blur(picture, [9, 9], [sigma, sigma]) if sigma else picture
    return tv.solarize(picture, 128.0) if row[Column.SOLARIZE] else picture


@pytest.mark.parametrize("whole_first", [False, True])
def test_the_cpus_views_are_torchvisions(
    pictures: Any, torchvision: Any, full_recipe: ViewRecipe, whole_first: bool
) -> None:
    batch = pictures.random([(37, 53), (64, 64), (211, 130), (9, 140), (32, 32)] * 6)
    recipes = [full_recipe, replace(full_recipe, size_px=12, scale=(0.05, 0.4))]
    params = batch.drawn(recipes, seed=4, share_jitter=whole_first).float()
    renderer = CpuRenderer(recipes, rules=replace(RULES, jitter_before_crop=whole_first))
    views, _ = renderer(batch.pixels, batch.sizes, params)
    for view, index in itertools.product(range(2), range(len(batch.images))):
        row, side_px = params[view, index], recipes[view].size_px
        expected = by_torchvision(torchvision, batch.images[index], row, side_px, whole_first)
        assert (views[view][index] - expected).abs().max() <= 1e-3, f"view {view} of image {index}"


def test_box_blur_rounds_once_and_stays_near_pil(pictures: Any, full_recipe: ViewRecipe) -> None:
    """PIL rounds after each of six passes, so it is up to three levels away."""
    batch, recipes = pictures.random([(32, 32)]), [replace(full_recipe, blur_p=1.0)]
    params = batch.untouched().float()
    params[..., Column.BLUR_SIGMA] = 1.3
    rounded, exact = replace(RULES, blur="box3"), replace(RULES, blur="box3", quantize=None)
    (view,), _ = CpuRenderer(recipes, rules=rounded)(batch.pixels, batch.sizes, params)
    (smooth,), _ = CpuRenderer(recipes, rules=exact)(batch.pixels, batch.sizes, params)
    assert (view - smooth.round()).abs().max() <= 1e-3
    pil = np.asarray(Image.fromarray(batch.images[0].numpy()).filter(ImageFilter.GaussianBlur(1.3)))
    assert np.abs(view[0].permute(1, 2, 0).numpy() - pil).max() <= 3.01


@pytest.mark.parametrize("padded", [False, True])
def test_jitter_of_a_batch_is_torchvisions_within_a_level(pictures: Any, torchvision: Any, padded: bool) -> None:
    """Batched, branch-free, in all 24 orders; and in padded pictures, whose padding must not reach contrast's mean."""
    generator = torch.Generator().manual_seed(1)
    low, span = torch.tensor([0.6, 0.6, 0.8, -0.1]), torch.tensor([0.8, 0.8, 0.4, 0.2])
    factors = low + torch.rand(24, 4, generator=generator) * span
    images = [image.permute(2, 0, 1) for image in pictures.random([(20, 28)] * 24).images]
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
        for index, image in enumerate(images):
            expected = torchvision.adjusted(image if quantize else image / 255, index, factors[index].tolist())
            expected = expected.float() if quantize else expected * 255
            differences.append((changed[index] - expected).abs())
        difference = torch.stack(differences)
        assert difference.max() <= (1.0 if quantize else 1e-5 * 255)
        assert difference.mean() <= (0.001 if quantize else 1e-5 * 255)


def test_gray_and_solarize_of_a_batch_are_torchvisions(pictures: Any) -> None:
    (image,) = pictures.random([(24, 24)]).images
    picture = image.permute(2, 0, 1)
    levels = torch.stack([picture, picture]).permute(0, 2, 1, 3).float()
    chosen = torch.tensor([True, False])
    gray = color.to_gray(levels, chosen, quantize=True).permute(0, 2, 1, 3)
    assert torch.equal(gray, torch.stack([tv.rgb_to_grayscale(picture, num_output_channels=3), picture]).float())
    solarized = color.solarize(levels, chosen).permute(0, 2, 1, 3)
    assert torch.equal(solarized, torch.stack([tv.solarize(picture, 128.0), picture]).float())
