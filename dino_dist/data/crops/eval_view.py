"""Evaluation's view of a batch: short side resized, center crop, normalised. Nothing is drawn, colours stay."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dino_dist.data.crops.bands import Bands, BicubicPlanner, Scratch, multiply_both, padded_px
from dino_dist.data.crops.color import MAX_LEVEL
from dino_dist.data.crops.render_cpu import split_images
from dino_dist.data.crops.resample import center_crops
from dino_dist.errors import UserError


@torch.no_grad()
def resize_for_eval(
    pixels: Tensor,
    sizes: Tensor,
    *,
    resize_px: int,
    crop_px: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The view of evaluation: short side to `resize_px` (bicubic, antialiased), center crop, normalise; [n, 3, C, C].

    `pixels` and `sizes` as for the renderer; the result is on the pixels' device. Sizes and the crop's place round as
    torchvision's Resize and CenterCrop do; only the window is computed, and an image's view depends on nothing else.
    Waits for the device: not for the training step.
    """
    if not 1 <= crop_px <= resize_px:
        raise UserError(f"evaluation crop_px={crop_px} must be from 1 to resize_px={resize_px}")
    if any(value <= 0 for value in std):
        raise UserError(f"data.std={std} must be three positive numbers")
    device = pixels.device
    with torch.autocast(device.type, enabled=False):
        if device.type == "cpu":
            levels = _center_crops(pixels, sizes, resize_px, crop_px)
        else:
            levels = center_crops(pixels, sizes.tolist(), resize_px=resize_px, crop_px=crop_px).transpose(1, 2)
        offsets = torch.tensor(mean, device=device).view(3, 1, 1) * MAX_LEVEL
        scales = torch.tensor(std, device=device).view(3, 1, 1) * MAX_LEVEL
        return (levels - offsets).div_(scales).to(dtype, memory_format=torch.contiguous_format).contiguous()


def _center_crops(pixels: Tensor, sizes: Tensor, resize_px: int, crop_px: int) -> Tensor:
    """As `resample.center_crops`, on the CPU and image by image: levels [n, 3, C, C]."""
    images = list(split_images(pixels, sizes))
    planner = BicubicPlanner([crop_px, crop_px])
    levels = torch.empty((len(images), 3, crop_px, crop_px))
    padded = torch.empty((3, crop_px, padded_px(crop_px)))
    source, rows, blocks = (Scratch(pixels.device) for _ in range(3))
    for image, view in zip(images, levels.unbind(0), strict=True):
        height, width, _ = image.shape
        vertical, horizontal = _window_bands(planner, (height, width), resize_px, crop_px)
        before, after = max(0, -vertical.first) * width, max(0, vertical.end - height) * width
        count = 3 * height * width
        planes = source.take(before + count + after)[before : before + count].view(3, height, width)
        planes.copy_(image.permute(2, 0, 1))
        multiply_both(vertical, horizontal, planes, rows=rows, blocks=blocks, out=padded)
        view.copy_(padded[:, :, :crop_px])
    return levels


def _window_bands(planner: BicubicPlanner, size: tuple[int, int], resize_px: int, crop_px: int) -> tuple[Bands, Bands]:
    """The matrices of both axes, for the window of the center crop alone."""
    short = min(size)
    resized = [resize_px if length == short else int(resize_px * length / short) for length in size]
    lengths = np.array(size, dtype=np.float64)
    first = np.array([round((length - crop_px) / 2.0) for length in resized], dtype=np.float64)
    vertical, horizontal = planner(lengths, lengths / np.array(resized), first)
    return vertical, horizontal
