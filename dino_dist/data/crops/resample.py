"""Crop, antialiased bicubic resize and mirror of images of any size, as two products with weight matrices.

Antialiasing, kernel (a = -1/2) and the renormalised borders are those of PIL and of torch's `interpolate(
mode="bicubic", antialias=True)` on the crop; bicubic overshoot is cut. Letters: c images of one bucket, padded to
[H, W]; v views of an image, of side S. Images are laid out row-planar, [H, 3, W]: with the vertical product first, its
result is already what the horizontal one multiplies. Whatever stands in the padding is multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dino_dist.data.crops.buckets import Bucket, plan_chunks

MIDDLE_LEVEL = 128.0
"""Subtracted from levels before they are multiplied, so that float16 holds products of small numbers."""

_FAR = 1e9
"""Distance from the kernel's center, in its own units, of what it must not see."""


class Slots(NamedTuple):
    """Where the images of a chunk lie; int64 [c] each, on the pixels' device."""

    offset: Tensor
    """First byte of the image in the flat pixels."""
    height: Tensor
    width: Tensor


def check_pixels(pixels: Tensor, sizes: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError unless `pixels` are uint8 of these (H, W), images [H, W, 3] one after the other."""
    needed = sum(3 * height * width for height, width in sizes)
    if pixels.dtype != torch.uint8 or pixels.shape != (needed,):
        raise ValueError(f"pixels must be {needed} uint8 for these sizes, got {tuple(pixels.shape)} {pixels.dtype}")


def with_slack(pixels: Tensor, buckets: Sequence[Bucket]) -> Tensor:
    """The pixels and one padded row more, so that a window may reach past the last image."""
    slack = 3 * max(bucket.width_px for bucket in buckets)
    return torch.cat([pixels, pixels.new_zeros(slack)])


def read_windows(pixels: Tensor, slots: Slots, bucket: Bucket) -> Tensor:
    """uint8 [c, H, 3 W]: each padded row is what lies in memory from the start of the image's row on.

    So the padding holds the bytes that follow; below the image its last row repeats. One gather of whole rows from the
    flat `pixels` (with slack): only the rows' starts are computed.
    """
    row = torch.arange(bucket.height_px, device=pixels.device)
    row = torch.minimum(row, slots.height.unsqueeze(-1) - 1)
    start = torch.addcmul(slots.offset.unsqueeze(-1), row, slots.width.unsqueeze(-1), value=3)
    return pixels.unfold(0, 3 * bucket.width_px, 1)[start]


def to_row_planar(window: Tensor, dtype: torch.dtype) -> Tensor:
    """Windows uint8 [c, H, 3 W] as levels [c, H, 3, W] in `dtype`, each of which float16 holds exactly."""
    num, height, _ = window.shape
    channels_last = window.view(num, height, -1, 3)
    return channels_last.transpose(2, 3).to(dtype, memory_format=torch.contiguous_format)


def bicubic_weights(start: Tensor, length: Tensor, scale: Tensor, output: Tensor, num_pixels: int) -> Tensor:
    """Weights [..., S, num_pixels] of source pixels for output pixels, float32; zero outside the box, rows sum to 1.

    `start` and `length` of the box in source pixels and `scale` in source per output pixels are float32 [...]; `output`
    [..., S] numbers the output pixels in the resized box (a mirrored view counts backwards).

    The weight of source pixel p of the box is f((p + 1/2 - (output + 1/2) scale) / max(scale, 1)). Coordinates are
    relative to the box, so that float32 keeps a small crop of a large image exact. With u = max(2 - |x|, 0) and
    v = max(1 - |x|, 0) the kernel is f(x) = u^2 (u - 1) / 2 + v^2 (1 - 2 v).
    """
    start, length, scale = start.unsqueeze(-1), length.unsqueeze(-1), scale.unsqueeze(-1)
    inverse = 1.0 / scale.clamp(min=1.0)
    pixel = torch.arange(num_pixels, dtype=torch.float32, device=start.device) - start
    pixel = torch.where((pixel >= 0) & (pixel < length), pixel * inverse, _FAR)
    center = ((output + 0.5) * scale - 0.5) * inverse
    u = (pixel.unsqueeze(-2) - center.unsqueeze(-1)).abs_().neg_().add_(2.0).clamp_(min=0.0)
    weights = u - 1.0
    v = weights.clamp(min=0.0)
    weights.mul_(u).mul_(u).mul_(0.5)
    del u  # these tensors are the largest of all
    weights.add_((v * -2.0).add_(1.0).mul_(v).mul_(v))
    return weights.div_(weights.sum(dim=-1, keepdim=True))


def view_weights(boxes: Tensor, side_px: int, bucket: Bucket, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Vertical [c, v S, H] and horizontal [c v, S, W] weights of `boxes` [c, v, (top, left, height, width, flip)].

    Both axes are built at once, as long as the longer one: half as many launches, and most buckets are square.
    """
    start, length = boxes[..., 0:2].movedim(-1, 0), boxes[..., 2:4].movedim(-1, 0)
    output = torch.arange(side_px, dtype=torch.float32, device=boxes.device)
    flip = boxes[..., 4:5]
    mirrored = torch.where(flip > 0.5, side_px - 1.0 - output, output)
    outputs = torch.stack([output.expand_as(mirrored), mirrored])
    weights = bicubic_weights(start, length, length / side_px, outputs, max(bucket)).to(dtype)
    vertical, horizontal = weights[..., : bucket.height_px], weights[..., : bucket.width_px]
    return vertical[0].flatten(1, 2), horizontal[1].flatten(0, 1)


def resize_views(centered_HCW: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """Levels [c v, S, 3, S], float32 in [0, 255], not rounded, from levels - 128 [c, H, 3, W] and `view_weights`.

    Sums are float32 whatever the dtype of the operands, as far as the library keeps them (CUDA may reduce split sums of
    fp16 in fp16); what passes from the first product to the second has theirs.
    """
    num, height, channels, width = centered_HCW.shape
    views, side, _ = horizontal.shape
    rows = _product(vertical, centered_HCW.view(num, height, channels * width), centered_HCW.dtype)
    levels = _product(rows.view(views, side * channels, width), horizontal.transpose(1, 2), torch.float32)
    return levels.view(views, side, channels, side).add_(MIDDLE_LEVEL).clamp_(0.0, 255.0)


def _product(left: Tensor, right: Tensor, result: torch.dtype) -> Tensor:
    if left.dtype == result:
        # A CPU multiplies float16 slowly and adds it up in ways of its own.
        slow = left.dtype == torch.float16 and left.device.type == "cpu"
        return torch.bmm(left.float(), right.float()).to(result) if slow else torch.bmm(left, right)
    if left.device.type == "cpu":
        return torch.bmm(left.to(result), right.to(result))
    return torch.bmm(left, right, out_dtype=result)


def center_crops(pixels: Tensor, sizes: Sequence[tuple[int, int]], *, resize_px: int, crop_px: int) -> Tensor:
    """Short side to `resize_px`, then the central square of `crop_px`: levels [n, S, 3, S] in float32, not rounded.

    Sizes and the crop's place round as torchvision's Resize and CenterCrop do. On any device; images are taken in
    chunks of one bucket, and only the pixels of the crop are computed. Waits for the device.
    """
    check_pixels(pixels, sizes)
    levels = torch.empty((len(sizes), crop_px, 3, crop_px), device=pixels.device)
    chunks = list(plan_chunks(sizes))
    if not chunks:
        return levels
    padded = with_slack(pixels, [chunk.bucket for chunk in chunks])
    ends = torch.tensor([3 * height * width for height, width in sizes]).cumsum(0).tolist()
    for bucket, images in chunks:
        # A CPU gains nothing from a full chunk of copies.
        fill = bucket.chunk_images - len(images) if pixels.device.type == "cuda" else 0
        members = images + images[:1] * fill
        slots = [(ends[i] - 3 * sizes[i][0] * sizes[i][1], *sizes[i]) for i in members]
        places = [_eval_places(*sizes[i], resize_px, crop_px) for i in members]
        window = read_windows(padded, Slots(*torch.tensor(slots, device=pixels.device).unbind(1)), bucket)
        length, scale, first = torch.tensor(places, dtype=torch.float32, device=pixels.device).permute(2, 1, 0)
        output = first.unsqueeze(-1) + torch.arange(crop_px, device=pixels.device)
        weights = bicubic_weights(torch.zeros_like(length), length, scale, output, max(bucket))
        vertical, horizontal = weights[0, ..., : bucket.height_px], weights[1, ..., : bucket.width_px]
        centered = to_row_planar(window, torch.float32).sub_(MIDDLE_LEVEL)
        levels[images] = resize_views(centered, vertical, horizontal)[: len(images)]
    return levels


def _eval_places(height: int, width: int, resize_px: int, crop_px: int) -> list[tuple[float, float, float]]:
    """Of both axes: source pixels, source pixels per output pixel, first output pixel inside the center crop."""
    short = min(height, width)
    places = []
    for length in (height, width):
        resized = resize_px if length == short else int(resize_px * length / short)
        places.append((float(length), length / resized, float(round((resized - crop_px) / 2.0))))
    return places
