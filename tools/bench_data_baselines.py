"""Multi-crop as it is done elsewhere, to measure against: PIL, torchvision v2 on uint8 tensors, kornia on batches.

Each is built from the same view recipes and reads the same files. `open_*` gives a function from a number of worker
processes (0: none) to an endless stream, which yields the number of images of each batch once its views are there.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench_data_process import Stream
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from dino_dist.data.crops.crop_parameters import ViewRecipe
from dino_dist.data.crops.render_rules import RenderRules
from dino_dist.errors import UserError

_BLUR_TAPS = 9
_BICUBIC = v1.InterpolationMode.BICUBIC
_SOLARIZE_FROM = 128


@dataclass(frozen=True, kw_only=True)
class FilePlace:
    """Where the bytes of one image lie."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes of the image file."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            return os.pread(fd, self.size, self.offset)
        finally:
            os.close(fd)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What a baseline reads and makes."""

    places: tuple[FilePlace, ...]
    recipes: tuple[ViewRecipe, ...]
    rules: RenderRules
    batch_size: int


def open_published_pil(baseline: Baseline) -> Stream:
    """The published pipeline: PIL pictures, torchvision's first transforms crop by crop, in DataLoader workers."""
    crops = [_pil_crop(recipe, baseline.rules) for recipe in baseline.recipes]

    def make(data: bytes) -> list[Tensor]:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB")
        return [crop(image) for crop in crops]

    return _views_from_workers(baseline, make)


def open_torchvision_v2(baseline: Baseline) -> Stream:
    """torchvision's second transforms on uint8 tensors, crop by crop, in DataLoader workers."""
    crops = [_tensor_crop(recipe, baseline.rules) for recipe in baseline.recipes]

    def make(data: bytes) -> list[Tensor]:
        image = _decoded(data)
        return [crop(image) for crop in crops]

    return _views_from_workers(baseline, make)


def open_kornia(baseline: Baseline) -> Stream:
    """Decoding in DataLoader workers, then kornia's transforms on the whole batch, view by view, in this process.

    `UserError` without kornia. Images of several sizes make no batch: that is one too, when the stream meets them.
    """
    try:
        from kornia import augmentation
    except ImportError as error:
        raise UserError("needs kornia: pip install kornia") from error
    views = [_kornia_view(augmentation, recipe, baseline.rules) for recipe in baseline.recipes]

    def stream(num_workers: int) -> Generator[int, None, None]:
        for images in _batches(baseline, _decoded, _stack_or_sizes, num_workers):
            if not isinstance(images, Tensor):
                raise UserError(f"kornia needs images of one size, and these are of several: {images}")
            levels = images.float() / 255
            made = [view(levels) for view in views]
            yield len(made[0])

    return stream


def _views_from_workers(baseline: Baseline, make: Callable[[bytes], list[Tensor]]) -> Stream:
    def stream(num_workers: int) -> Generator[int, None, None]:
        for views in _batches(baseline, make, torch.utils.data.default_collate, num_workers):
            yield len(views[0])

    return stream


def _pil_crop(recipe: ViewRecipe, rules: RenderRules) -> v1.Compose:
    size, strengths = recipe.size_px, (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    blur = PilBlur(recipe.blur_sigma_px) if rules.blur == "box3" else v1.GaussianBlur(_BLUR_TAPS, recipe.blur_sigma_px)
    return v1.Compose(
        [
            v1.RandomResizedCrop(size, scale=recipe.scale, ratio=recipe.ratio, interpolation=_BICUBIC),
            v1.RandomHorizontalFlip(recipe.flip_p),
            v1.RandomApply([v1.ColorJitter(*strengths)], p=recipe.jitter_p),
            v1.RandomGrayscale(recipe.gray_p),
            v1.RandomApply([blur], p=recipe.blur_p),
            v1.RandomApply([v1.Lambda(ImageOps.solarize)], p=recipe.solarize_p),
            v1.ToTensor(),
            v1.Normalize(rules.mean, rules.std),
        ]
    )


def _tensor_crop(recipe: ViewRecipe, rules: RenderRules) -> v2.Compose:
    size, strengths = recipe.size_px, (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, recipe.scale, recipe.ratio, interpolation=_BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(recipe.flip_p),
            v2.RandomApply([v2.ColorJitter(*strengths)], p=recipe.jitter_p),
            v2.RandomGrayscale(recipe.gray_p),
            v2.RandomApply([v2.GaussianBlur(_BLUR_TAPS, recipe.blur_sigma_px)], p=recipe.blur_p),
            v2.RandomSolarize(_SOLARIZE_FROM, p=recipe.solarize_p),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(rules.mean), list(rules.std)),
        ]
    )


def _kornia_view(kornia: Any, recipe: ViewRecipe, rules: RenderRules) -> nn.Sequential:
    side = (recipe.size_px, recipe.size_px)
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    stages = [
        kornia.RandomResizedCrop(side, recipe.scale, recipe.ratio, resample="bicubic", align_corners=False),
        kornia.RandomHorizontalFlip(p=recipe.flip_p),
        kornia.ColorJitter(*strengths, p=recipe.jitter_p),
        kornia.RandomGrayscale(p=recipe.gray_p),
    ]
    if recipe.blur_p > 0:
        stages.append(kornia.RandomGaussianBlur(_BLUR_TAPS, recipe.blur_sigma_px, p=recipe.blur_p))
    if recipe.solarize_p > 0:
        threshold = _SOLARIZE_FROM / 255
        stages.append(kornia.RandomSolarize((threshold, threshold), (0.0, 0.0), p=recipe.solarize_p))
    return nn.Sequential(*stages, kornia.Normalize(rules.mean, rules.std))


class PilBlur:
    """Pillow's GaussianBlur with a radius drawn for each picture."""

    def __init__(self, radius_px: tuple[float, float]) -> None:
        self._radius_px = radius_px

    def __call__(self, image: Image.Image) -> Image.Image:
        """The picture blurred."""
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self._radius_px)))


def _decoded(data: bytes) -> Tensor:
    """uint8 [3, H, W]."""
    image: Tensor = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return image


def _stack_or_sizes(images: list[Tensor]) -> Tensor | str:
    sizes = sorted({(image.shape[2], image.shape[1]) for image in images})
    return torch.stack(images) if len(sizes) == 1 else ", ".join(f"{width} x {height}" for width, height in sizes[:3])


class _MadeFiles(Dataset[Any]):
    """dataset[i]: what `make` makes of the i-th file."""

    def __init__(self, places: Sequence[FilePlace], make: Callable[[bytes], Any]) -> None:
        self._places = places
        self._make = make

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Any:
        return self._make(self._places[index].read())


def _batches(
    baseline: Baseline, make: Callable[[bytes], Any], collate: Callable[[list[Any]], Any], num_workers: int
) -> Iterator[Any]:
    """Endless: one DataLoader over random batches of the files, so that no epoch's end shows in the figures."""
    generator = torch.Generator().manual_seed(0)
    count, size = len(baseline.places), baseline.batch_size

    def endless() -> Iterator[list[int]]:
        while True:
            yield torch.randint(count, (size,), generator=generator).tolist()

    yield from DataLoader(
        _MadeFiles(baseline.places, make),
        batch_sampler=endless(),
        num_workers=num_workers,
        collate_fn=collate,
        multiprocessing_context="fork" if num_workers else None,
    )
