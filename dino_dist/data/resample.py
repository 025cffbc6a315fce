"""Crop, antialiased bicubic resize and mirror of images of any size, as two products with weight matrices.

Each image is resampled at its own exact size (no padding), and every operation whose rounding could depend on a
tensor's shape sees one image only: a sample's pixels cannot depend on its neighbours in the batch. Memory is bounded by
the largest image. Letters: n images, R output rows of all views together, [H, W] an image, C = 3, S a view's side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 2**24
"""Weights that are built at once, at most, unless one image needs more: 64 MiB in float32."""


@dataclass(frozen=True, kw_only=True)
class AxisRows:
    """For one axis, where each output row (or column) takes its pixels from; float32 [n, R] on the images' device."""

    start: Tensor
    """First source pixel of the crop box."""
    length: Tensor
    """Source pixels in the crop box; nothing outside is ever read."""
    scale: Tensor
    """Source pixels per output pixel."""
    output: Tensor
    """Index of the row in its resized view; a mirrored view counts backwards."""

    def __getitem__(self, images: slice) -> AxisRows:
        """The rows of some of the images."""
        return AxisRows(
            start=self.start[images], length=self.length[images], scale=self.scale[images], output=self.output[images]
        )


def crop_resize(
    pixels: Tensor,
    sizes: Sequence[tuple[int, int]],
    vertical: AxisRows,
    horizontal: AxisRows,
    groups: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """Resample every image once per view; grey levels in [0, 255], float32, not rounded.

    `pixels` is uint8 [sum of H*W*3], the images one after the other, each [H, W, 3]; `sizes` their (H, W). `groups`
    lists (views, side in px) for consecutive views of one side: R is the sum of views * side. Returns one tensor
    [views, n, S, 3, S] (row, channel, column) per group. Antialiasing, kernel (a = -1/2) and the renormalised borders
    are those of PIL and of torch's `interpolate(mode="bicubic", antialias=True)` on the crop; bicubic overshoot is cut.
    """
    needed = sum(3 * height * width for height, width in sizes)
    if pixels.dtype != torch.uint8 or pixels.numel() != needed:
        raise ValueError(f"pixels must be {needed} uint8 for these sizes, got {pixels.numel()} {pixels.dtype}")
    num_rows = sum(views * side for views, side in groups)
    resized = [
        torch.empty((views, len(sizes), side, 3, side), dtype=torch.float32, device=pixels.device)
        for views, side in groups
    ]
    offset = 0
    for chunk in _chunks(sizes, num_rows):
        # Elementwise, hence safe to build for images of several sizes at once; weights past an image's end are zero.
        weights_y = _bicubic_weights(vertical[chunk], max(height for height, _ in sizes[chunk]))
        weights_x = _bicubic_weights(horizontal[chunk], max(width for _, width in sizes[chunk]))
        for position, (height, width) in enumerate(sizes[chunk]):
            count = 3 * height * width
            image_HWC = pixels[offset : offset + count].view(height, width, 3)
            offset += count
            views = _resample_one(
                image_HWC,
                _normalized(weights_y[position, :, :height]),
                _normalized(weights_x[position, :, :width]),
                groups,
            )
            for target, view in zip(resized, views, strict=True):
                target[:, chunk.start + position] = view
    return [view.clamp_(0.0, 255.0) for view in resized]


def _resample_one(
    image_HWC: Tensor, weights_RH: Tensor, weights_RW: Tensor, groups: Sequence[tuple[int, int]]
) -> Iterator[Tensor]:
    """Vertical first, with the image as [H, 3, W]: the second product then needs no transpose."""
    height, width, _ = image_HWC.shape
    image_HCW = image_HWC.permute(0, 2, 1).to(torch.float32, memory_format=torch.contiguous_format)
    rows_R_CW = weights_RH @ image_HCW.view(height, 3 * width)
    first = 0
    for views, side in groups:
        last = first + views * side
        view = torch.bmm(
            rows_R_CW[first:last].view(views, side * 3, width),
            weights_RW[first:last].view(views, side, width).transpose(1, 2),
        )
        yield view.view(views, side, 3, side)
        first = last


def _bicubic_weights(rows: AxisRows, num_pixels: int) -> Tensor:
    """Kernel values [n, R, num_pixels] before normalisation, zero outside the box.

    The value for source pixel p of the box is f((p + 1/2 - (output + 1/2) * scale) / max(scale, 1)); coordinates are
    relative to the box, so that float32 keeps a small crop of a large image exact.
    """
    pixel = torch.arange(num_pixels, dtype=torch.float32, device=rows.start.device) - rows.start.unsqueeze(-1)
    outside = (pixel < 0) | (pixel >= rows.length.unsqueeze(-1))
    center = (rows.output + 0.5) * rows.scale - 0.5
    x = pixel.sub_(center.unsqueeze(-1)).div_(rows.scale.clamp(min=1.0).unsqueeze(-1)).abs_()
    x = x.masked_fill_(outside, 2.0).clamp_(max=2.0)  # the kernel is exactly zero at 2
    near = ((1.5 * x - 2.5) * x).mul_(x).add_(1.0)
    far = (((-0.5 * x + 2.5).mul_(x)).sub_(4.0).mul_(x)).add_(2.0)
    return torch.where(x < 1.0, near, far)


def _normalized(weights: Tensor) -> Tensor:
    return weights / weights.sum(dim=-1, keepdim=True)


def _chunks(sizes: Sequence[tuple[int, int]], num_rows: int) -> Iterator[slice]:
    """Consecutive images whose weights, padded to the longest, stay below the limit; one image at least."""
    start, longest = 0, 0
    for index, (height, width) in enumerate(sizes):
        longest = max(longest, height, width)
        if index > start and (index + 1 - start) * num_rows * longest > _CHUNK_ELEMENTS:
            yield slice(start, index)
            start, longest = index, max(height, width)
    if start < len(sizes):
        yield slice(start, len(sizes))
