"""What the tests of renderers share: torchvision's operations by a row of parameters, and numbers of threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dino_dist.data.crops.crop_parameters import Column, ViewRecipe

ORDERS = list(itertools.permutations(range(4)))
OPERATIONS: list[Callable[[Tensor, float], Tensor]] = [
    tv.adjust_brightness,
    tv.adjust_contrast,
    tv.adjust_saturation,
    tv.adjust_hue,
]
NEUTRAL = (1.0, 1.0, 1.0, 0.0)


class Torchvision:
    """torchvision's operations with the parameters of a row."""

    @staticmethod
    def cropped(levels: Tensor, row: Tensor, side_px: int) -> Tensor:
        """Crop, antialiased resize and flip of float levels [3, H, W], overshoot cut."""
        top, left, height, width, flip = (int(value) for value in row[: Column.FLIP + 1])
        side = [side_px, side_px]
        view: Tensor = tv.resized_crop(
            levels, top, left, height, width, side, InterpolationMode.BICUBIC, antialias=True
        )
        view = view.clamp(0, 255)
        return tv.horizontal_flip(view) if flip else view

    @staticmethod
    def adjusted(picture: Tensor, order: int, factors: Sequence[float]) -> Tensor:
        """Jitter in the order of that number of float in [0, 1] or uint8; a neutral factor is not applied at all."""
        for op in ORDERS[order]:
            picture = picture if factors[op] == NEUTRAL[op] else OPERATIONS[op](picture, factors[op])
        return picture

    @staticmethod
    def colored(picture: Tensor, row: Tensor) -> Tensor:
        """Jitter and grayscale of float in [0, 1] or uint8."""
        factors = row[Column.BRIGHTNESS : Column.HUE + 1].float().tolist()
        picture = Torchvision.adjusted(picture, int(row[Column.JITTER_ORDER]), factors)
        return tv.rgb_to_grayscale(picture, num_output_channels=3) if row[Column.GRAY] else picture


@pytest.fixture(scope="session")
def torchvision() -> type[Torchvision]:
    """See `Torchvision`."""
    return Torchvision


@pytest.fixture(scope="session")
def plain_recipe(full_recipe: ViewRecipe) -> ViewRecipe:
    """Only crop and resize."""
    return replace(full_recipe, flip_p=0.0, jitter_p=0.0, gray_p=0.0, blur_p=0.0, solarize_p=0.0)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def threads() -> Callable[[int], AbstractContextManager[None]]:
    """`with threads(count):` torch has that many, and as many as before afterwards."""
    return _threads
