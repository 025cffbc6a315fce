"""Multi-crop on an accelerator: whole batches as a few products and pointwise passes of fixed shapes, no waiting.

Two kinds of work, both on fixed numbers of images: a chunk of one bucket (see `buckets`) is read from the flat pixels
and resampled; colours change in chunks of `FULL_CHUNK` images of any size, in the order of the batch. So a sample's
bits depend on its own size and parameters alone, and with `compile` there is one graph a bucket and one for colours.
The host plans from the image sizes, which it knows, sends one small table, and never reads from the device. It runs on
a CPU too, for its tests: slowly, for most weights are zero.

Memory, apart from the batch's own bytes (held twice) and the views: float32 levels of all views of the batch (2.1 MB an
image for 2 x 224 and 8 x 96 px), and in passing, for these views and without `compile`, at most 0.6 GB for a chunk of
listed buckets; with jitter before the crop 1.2 GB, and 2.3 GB for a single image of 4096 x 4096. Beyond that it grows
with the image, by 15 bytes a padded pixel, or 140 with jitter before the crop.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from dino_dist.data.crops import blur, color
from dino_dist.data.crops.buckets import FULL_CHUNK, Bucket, Chunk, plan_chunks
from dino_dist.data.crops.crop_parameters import Column, ViewRecipe
from dino_dist.data.crops.render_rules import Rendered, RenderRules
from dino_dist.data.crops.resample import (
    MIDDLE_LEVEL,
    Slots,
    check_pixels,
    read_windows,
    resize_views,
    to_row_planar,
    view_weights,
    with_slack,
)
from dino_dist.errors import UserError

Backend = str | Callable[..., Any]
"""What torch.compile takes as its backend."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
_JITTER_FIELDS = ("brightness", "contrast", "saturation", "hue")  # numbered as in `color`

_ChunkFunction = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
_ColorFunction = Callable[[list[Tensor], Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class _Jitter:
    """Constants of jitter and grayscale for some views: an operation no view can ask for is left out."""

    ops: tuple[int, ...]
    sequences: Tensor
    gray: bool

    def __call__(self, x: Tensor, rows: Tensor, *, quantize: bool, inside: Tensor | None = None) -> Tensor:
        """Levels [N, H, 3, W] by parameters [N, columns]; for `inside` see `color.jitter`."""
        if self.ops:
            order = rows[:, Column.JITTER_ORDER].long()
            factors = rows[:, Column.BRIGHTNESS : Column.HUE + 1]
            x = color.jitter(x, order, factors, self.sequences, self.ops, inside=inside, quantize=quantize)
        if self.gray:
            x = color.to_gray(x, rows[:, Column.GRAY] > 0.5, quantize=quantize)
        return x


@dataclass(frozen=True, kw_only=True)
class _Side:
    """Consecutive views of one side: which stages any of them needs, and the constants of those stages."""

    first_view: int
    num_views: int
    side_px: int
    jitter: _Jitter
    blur_plan: blur.BlurPlan | None
    solarize: bool

    @property
    def views(self) -> slice:
        return slice(self.first_view, self.first_view + self.num_views)


class ProductRenderer:
    """Renders all views of a batch. A stage that no recipe of a side asks for is left out, whatever the data."""

    def __init__(
        self,
        recipes: Sequence[ViewRecipe],
        *,
        rules: RenderRules,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        operand_dtype: torch.dtype | None = None,
        compile: bool = False,
        backend: Backend = "inductor",
    ) -> None:
        """Views come out in `dtype` on `device`.

        `operand_dtype` of the resampling products: float16 moves a level by up to about 0.15, a tenth of that on
        average, and float32 by nothing at several times the cost; None: float16 on CUDA, float32 elsewhere. `compile`
        fuses the pointwise passes with torch.compile's `backend`, one graph for each bucket when first met (see
        `warm_up`); buckets longer than the list run as they are. Raises UserError for recipes that cannot be rendered.
        """
        if not recipes:
            raise UserError("multi-crop needs at least one view, got none")
        self.device = device
        self._dtype = dtype
        if operand_dtype is None:
            operand_dtype = torch.float16 if device.type == "cuda" else torch.float32
        self._operand_dtype = operand_dtype
        self._rules = rules
        self._quantize = rules.quantize is not None
        self._num_views = len(recipes)
        self._sides = _make_sides(recipes, rules, device)
        if rules.plain_views > self._sides[0].num_views:
            raise UserError(
                f"plain_views={rules.plain_views} must be views of one size: the first {self._sides[0].num_views} are"
            )
        self._whole_image = _make_jitter(recipes if rules.jitter_before_crop else (), device)
        self._mean = 255.0 * torch.tensor(rules.mean, device=device).view(1, 3, 1, 1)
        self._std = 255.0 * torch.tensor(rules.std, device=device).view(1, 3, 1, 1)
        self._backend = backend if compile else None
        self._chunk_functions: dict[Bucket, _ChunkFunction] = {}
        self._color_function: _ColorFunction = self._compiled(self._change_colors)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, sizes: Tensor, params: Tensor) -> Rendered:
        """All views of n images; see `Rendered`.

        `pixels` uint8 [bytes] on the renderer's device, images [H, W, 3] one after the other; `sizes` int [n, 2] (H, W)
        on the CPU; `params` float [views, n, columns] as drawn (pinned or already on the device, else the copy waits).
        """
        if sizes.device.type != "cpu" or sizes.ndim != 2 or sizes.shape[1] != 2:
            raise ValueError(f"sizes must be [n, 2] on the CPU, got {tuple(sizes.shape)} on {sizes.device}")
        image_sizes = [(height, width) for height, width in sizes.tolist()]
        check_pixels(pixels, image_sizes)
        if params.shape != (self._num_views, len(image_sizes), len(Column)):
            expected = (self._num_views, len(image_sizes), len(Column))
            raise ValueError(f"params must have shape {expected}, got {tuple(params.shape)}")
        with torch.autocast(self.device.type, enabled=False):
            rows = params.to(self.device, non_blocking=True).float().transpose(0, 1).contiguous()
            levels = self._resample(pixels, image_sizes, rows)
            return self._finish(levels, rows)

    def warm_up(self, buckets: Iterable[Bucket]) -> None:
        """Render a black image in each bucket, so that nothing is compiled later for batches of these buckets."""
        for bucket in buckets:
            params = torch.zeros(self._num_views, 1, len(Column), device=self.device)
            params[..., Column.HEIGHT], params[..., Column.WIDTH] = bucket
            pixels = torch.zeros(3 * bucket.height_px * bucket.width_px, dtype=torch.uint8, device=self.device)
            self(pixels, torch.tensor([bucket]), params)

    def _resample(self, pixels: Tensor, sizes: list[tuple[int, int]], rows: Tensor) -> list[Tensor]:
        """Levels [n, views, S, 3, S] of each side, filled up with zeros to whole chunks of `FULL_CHUNK`."""
        num = len(sizes)
        whole_chunks = -(-num // FULL_CHUNK) * FULL_CHUNK
        shapes = [(side.num_views, side.side_px) for side in self._sides]
        levels = [
            torch.empty((whole_chunks, views, side, 3, side), dtype=torch.float32, device=self.device)
            for views, side in shapes
        ]
        chunks = list(plan_chunks(sizes))
        if not chunks:
            return levels
        for target in levels:
            target[num:].zero_()
        table = self._send(_slot_table(chunks, sizes))
        slot_rows = rows[table[:, 0]]
        padded = with_slack(pixels, [chunk.bucket for chunk in chunks])
        first = 0
        for bucket, images in chunks:
            slots = slice(first, first + bucket.chunk_images)
            place = table[slots, 1:]
            window = read_windows(padded, Slots(*place.unbind(1)), bucket)
            results = self._chunk_function(bucket)(window, place, slot_rows[slots])
            members = table[first : first + len(images), 0]
            for target, result in zip(levels, results, strict=True):
                target.index_copy_(0, members, result[: len(images)])
            first = slots.stop
        return levels

    def _finish(self, levels: list[Tensor], rows: Tensor) -> Rendered:
        num, plain = len(rows), self._rules.plain_views
        shapes = [(side.num_views, num, 3, side.side_px, side.side_px) for side in self._sides]
        if plain:
            shapes.append((plain, *shapes[0][1:]))
        results = [torch.empty(shape, dtype=self._dtype, device=self.device) for shape in shapes]
        for first in range(0, num, FULL_CHUNK):
            last = min(first + FULL_CHUNK, num)
            chunk_rows = rows[first:last]
            if last - first < FULL_CHUNK:
                chunk_rows = torch.cat([chunk_rows, chunk_rows[:1].expand(FULL_CHUNK + first - last, -1, -1)])
            views = self._color_function([level[first : first + FULL_CHUNK] for level in levels], chunk_rows)
            for target, view in zip(results, views, strict=True):
                target[:, first:last] = view.transpose(0, 1)[:, : last - first]
        flat = [result.flatten(0, 1) for result in results]
        return Rendered(views=flat[: len(self._sides)], plain=flat[-1] if plain else None)

    def _chunk_function(self, bucket: Bucket) -> _ChunkFunction:
        if bucket not in self._chunk_functions:

            def resample_chunk(window: Tensor, place: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
                return self._resample_chunk(bucket, window, place, rows)

            self._chunk_functions[bucket] = self._compiled(resample_chunk) if bucket.is_listed else resample_chunk
        return self._chunk_functions[bucket]

    def _resample_chunk(self, bucket: Bucket, window: Tensor, place: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """Levels [c, views, S, 3, S] of each side from windows uint8 [c, H, 3 W], (offset, height, width) int64 [c, 3]
        and parameters [c, views, columns].
        """
        if not self._rules.jitter_before_crop:
            source = to_row_planar(window, self._operand_dtype).sub_(MIDDLE_LEVEL)
        else:
            image = to_row_planar(window, torch.float32)
            inside = _inside(place, bucket)
            image = self._whole_image(image, rows[:, 0], quantize=self._quantize, inside=inside)
            source = image.sub_(MIDDLE_LEVEL).to(self._operand_dtype)
        results = []
        for side in self._sides:
            boxes = rows[:, side.views, : Column.FLIP + 1]
            vertical, horizontal = view_weights(boxes, side.side_px, bucket, self._operand_dtype)
            results.append(self._views(source, vertical, horizontal))
        return tuple(results)

    def _views(self, source: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
        levels = resize_views(source, vertical, horizontal)
        levels = levels.round_() if self._quantize else levels
        return levels.view(source.shape[0], -1, *levels.shape[1:])

    def _change_colors(self, levels: list[Tensor], rows: Tensor) -> tuple[Tensor, ...]:
        """Normalised views [n, views, 3, S, S] of each side, then plain ones, from levels [n, views, S, 3, S] and
        parameters [n, views, columns].
        """
        results = []
        for side, x in zip(self._sides, levels, strict=True):
            changed = self._change_side(side, x.flatten(0, 1), rows[:, side.views].flatten(0, 1))
            results.append(self._normalized(changed, len(rows)))
        if self._rules.plain_views:
            plain = levels[0][:, : self._rules.plain_views]
            results.append(self._normalized(plain.flatten(0, 1), len(rows)))
        return tuple(results)

    def _change_side(self, side: _Side, x: Tensor, rows: Tensor) -> Tensor:
        x = side.jitter(x, rows, quantize=self._quantize)
        if side.blur_plan is not None:
            x = blur.blur(x, rows[:, Column.BLUR_SIGMA], side.blur_plan)
            x = x.round() if self._quantize else x
        return color.solarize(x, rows[:, Column.SOLARIZE] > 0.5) if side.solarize else x

    def _normalized(self, x: Tensor, num: int) -> Tensor:
        views = color.normalize(x, self._mean, self._std, self._dtype)
        return views.view(num, -1, *views.shape[1:])

    def _compiled(self, function: Callable[_P, _T]) -> Callable[_P, _T]:
        if self._backend is None:
            return function
        # A count of its own for each function: torch gives up on one that is compiled for too many shapes.
        compiled: Callable[_P, _T] = torch.compile(  # type: ignore[call-overload]  # its overloads lack the last one
            function, fullgraph=True, dynamic=False, backend=self._backend, isolate_recompiles=True
        )
        return compiled

    def _send(self, table: Tensor) -> Tensor:
        if self.device.type == "cuda":
            table = table.pin_memory()
        return table.to(self.device, non_blocking=True)


def _slot_table(chunks: Sequence[Chunk], sizes: Sequence[tuple[int, int]]) -> Tensor:
    """For each place in each chunk, one after the other: image, offset of its first byte, height, width; int64 [s, 4].

    A place that is left over holds the chunk's first image once more, so that all of it are real numbers.
    """
    ends = itertools.accumulate(3 * height * width for height, width in sizes)
    offsets = [0, *ends]
    places = []
    for bucket, images in chunks:
        for image in images + images[:1] * (bucket.chunk_images - len(images)):
            places.append((image, offsets[image], *sizes[image]))
    return torch.tensor(places, dtype=torch.int64)


def _inside(place: Tensor, bucket: Bucket) -> Tensor:
    """Which padded pixels belong to their image, bool [c, H, 1, W], from (offset, height, width) [c, 3]."""
    height, width = place[:, 1].view(-1, 1, 1, 1), place[:, 2].view(-1, 1, 1, 1)
    row = torch.arange(bucket.height_px, device=place.device).view(-1, 1, 1)
    column = torch.arange(bucket.width_px, device=place.device)
    return (row < height) & (column < width)


def _make_sides(recipes: Sequence[ViewRecipe], rules: RenderRules, device: torch.device) -> tuple[_Side, ...]:
    sides = []
    first_view = 0
    for side_px, members in itertools.groupby(recipes, key=lambda recipe: recipe.size_px):
        views = list(members)
        sigmas = [view.blur_sigma_px[1] for view in views if view.blur_p > 0]
        sides.append(
            _Side(
                first_view=first_view,
                num_views=len(views),
                side_px=side_px,
                jitter=_make_jitter(() if rules.jitter_before_crop else views, device),
                blur_plan=blur.make_plan(rules.blur, side_px, max(sigmas), device) if sigmas else None,
                solarize=any(view.solarize_p > 0 for view in views),
            )
        )
        first_view += len(views)
    return tuple(sides)


def _make_jitter(views: Sequence[ViewRecipe], device: torch.device) -> _Jitter:
    jittered = [view for view in views if view.jitter_p > 0]
    ops = tuple(op for op, name in enumerate(_JITTER_FIELDS) if any(getattr(view, name) > 0 for view in jittered))
    return _Jitter(ops=ops, sequences=color.jitter_sequences(ops, device), gray=any(view.gray_p > 0 for view in views))
