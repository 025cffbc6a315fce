"""Renders multi-crop views on the CPU, image by image and view by view: only what each view's parameters ask for.

A sample's pixels depend neither on the batch around it nor on the number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dino_dist.data.crops.color import MAX_LEVEL
from dino_dist.data.crops.crop_parameters import Column, ViewRecipe
from dino_dist.data.crops.float_pictures import FloatPictures, Row
from dino_dist.data.crops.render_rules import Rendered, RenderRules
from dino_dist.data.crops.uint8_pictures import Uint8Pictures
from dino_dist.errors import UserError


class CpuRenderer:
    """The views of a batch on the CPU; not for several threads at once, since its memory is used again."""

    def __init__(
        self, recipes: Sequence[ViewRecipe], *, rules: RenderRules, dtype: torch.dtype = torch.float32
    ) -> None:
        """Views come out in `dtype`; pixels are computed in float32 whatever it is."""
        if not recipes:
            raise UserError("multi-crop needs at least one view, got none")
        self._sides = [(side, len(list(views))) for side, views in itertools.groupby(view.size_px for view in recipes)]
        if rules.plain_views > self._sides[0][1]:
            raise UserError(
                f"plain_views={rules.plain_views} must be views of one size: the first {self._sides[0][1]} are"
            )
        self._num_views = len(recipes)
        self._rules = rules
        self._dtype = dtype
        self._pictures = (Uint8Pictures if rules.quantize == "uint8" else FloatPictures)(recipes, rules.blur)
        self._gains = [1.0 / (std * MAX_LEVEL) for std in rules.std]
        self._offsets = [torch.tensor(-mean / std) for mean, std in zip(rules.mean, rules.std, strict=True)]

    def __call__(self, pixels: Tensor, sizes: Tensor, params: Tensor) -> Rendered:
        """As `augment.MultiCropRenderer`."""
        images = list(split_images(pixels, sizes))
        num = len(images)
        if params.shape != (self._num_views, num, len(Column)):
            expected = (self._num_views, num, len(Column))
            raise ValueError(f"params must have shape {expected}, got {tuple(params.shape)}")
        views = [torch.empty((count, num, 3, side, side), dtype=self._dtype) for side, count in self._sides]
        plain_views, side = self._rules.plain_views, self._sides[0][0]
        plain = torch.empty((plain_views, num, 3, side, side), dtype=self._dtype) if plain_views else None
        targets = list(itertools.chain.from_iterable(group.unbind(0) for group in views))
        rows_of_images = params.float().transpose(0, 1).tolist()  # float32, as on any other device
        # The views are made outside: autograd refuses tensors that were made in inference mode.
        with torch.inference_mode(), torch.autocast("cpu", enabled=False), _one_thread():
            for index, (image, rows) in enumerate(zip(images, rows_of_images, strict=True)):
                self._render(
                    image,
                    rows,
                    [target[index] for target in targets],
                    [] if plain is None else list(plain[:, index].unbind(0)),
                )
        return Rendered([group.flatten(0, 1) for group in views], None if plain is None else plain.flatten(0, 1))

    def _render(self, image: Tensor, rows: list[Row], targets: list[Tensor], plain: list[Tensor]) -> None:
        """All views of one image: `targets` one [3, S, S] a view, `plain` one for each plain view."""
        pictures, image_first = self._pictures, self._rules.jitter_before_crop
        pictures.open(image, rows)
        if image_first:
            pictures.recolor_image(rows[0])
        for view, (row, target) in enumerate(zip(rows, targets, strict=True)):
            picture = pictures.crop(view)
            if view < len(plain):
                self._write(picture, plain[view])
            if not image_first:
                picture = pictures.recolor(picture, row)
            picture = pictures.blur(picture, view)
            if row[Column.SOLARIZE]:
                picture = pictures.solarize(picture)
            self._write(picture, target)

    def _write(self, picture: Tensor, target: Tensor) -> None:
        """Levels to normalised values."""
        planes = zip(picture.unbind(0), target.unbind(0), self._offsets, self._gains, strict=True)
        for levels, plane, offset, gain in planes:
            torch.add(offset, levels, alpha=gain, out=plane)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Pictures are small: threads that share an operation wait for each other longer than it takes."""
    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before > 1:
            torch.set_num_threads(before)


def split_images(pixels: Tensor, sizes: Tensor) -> Iterator[Tensor]:
    """The images [H, W, 3] of a batch: `pixels` uint8 [bytes], one after the other; `sizes` int [n, 2] on the CPU."""
    if sizes.device.type != "cpu" or sizes.ndim != 2 or sizes.shape[1] != 2:
        raise ValueError(f"sizes must be [n, 2] on the CPU, got {tuple(sizes.shape)} on {sizes.device}")
    shapes = [(height, width, 3) for height, width in sizes.tolist()]
    counts = [height * width * 3 for height, width, _ in shapes]
    if pixels.dtype != torch.uint8 or pixels.numel() != sum(counts):
        raise ValueError(f"pixels must be {sum(counts)} uint8 for these sizes, got {pixels.numel()} {pixels.dtype}")
    for flat, shape in zip(torch.split(pixels, counts), shapes, strict=True):
        yield flat.view(shape)
