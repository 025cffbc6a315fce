"""Where the CLS token looks: maps out of the last layer's attention, and pictures of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

_HEAT = (
    (0.00, 0.00, 0.00),
    (0.13, 0.05, 0.35),
    (0.45, 0.08, 0.48),
    (0.80, 0.22, 0.30),
    (0.97, 0.52, 0.08),
    (0.99, 0.82, 0.30),
    (1.00, 1.00, 0.92),
)
"""Colours at equal distances from 0 to 1; their luminance rises steadily, so the picture survives printing in grey."""
_MIN_TILE_PX = 96
"""Smaller pictures are enlarged to this, by a whole factor: an 8 px crop would be a dot on the page."""


def cls_attention_maps(attention: Tensor, *, grid: tuple[int, int], num_prefix_tokens: int = 1) -> Tensor:
    """How much the CLS token attends to each patch: [N, heads, T, T] probabilities -> [N, heads, h, w].

    Token 0 is the CLS token; the `num_prefix_tokens` first ones (CLS and registers) are no patches. A map sums to
    1 minus what CLS gives to those. `grid` is (rows, columns) of patches; `ValueError` if T does not fit it.
    """
    height, width = grid
    num_images, num_heads, tokens, _ = attention.shape
    if tokens != num_prefix_tokens + height * width:
        raise ValueError(
            f"attention has {tokens} tokens, expected {num_prefix_tokens} prefix tokens and {height} x {width} patches"
        )
    return attention[:, :, 0, num_prefix_tokens:].reshape(num_images, num_heads, height, width)


def to_unit_range(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo (x - mean) / std of images [N, 3, h, w] and clamp to [0, 1]; fp32 on the CPU."""
    pixels = images.detach().float().cpu()
    return (pixels * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)).clamp(0.0, 1.0)


def heat(values: Tensor) -> Tensor:
    """Colours of values in [0, 1]: [..., h, w] -> [..., 3, h, w] in [0, 1], black to white through red and yellow."""
    anchors = torch.tensor(_HEAT, device=values.device)
    position = values.float().clamp(0.0, 1.0) * (len(_HEAT) - 1)
    below = position.floor().long().clamp(max=len(_HEAT) - 2)
    color = torch.lerp(anchors[below], anchors[below + 1], (position - below).unsqueeze(-1))
    return color.movedim(-1, -3)


def stretch(maps: Tensor) -> Tensor:
    """Each map [..., h, w] scaled so that its least value is 0 and its greatest 1; a flat map becomes 0."""
    low = maps.amin((-2, -1), keepdim=True)
    span = maps.amax((-2, -1), keepdim=True) - low
    return torch.where(span > 0, (maps - low) / span.clamp_min(torch.finfo(maps.dtype).tiny), 0.0)


def overlay(images: Tensor, maps: Tensor, *, opacity: float = 0.6, smooth: bool = False) -> Tensor:
    """Heat of `maps` [N, h, w] over `images` [N, 3, H, W] in [0, 1]; uint8 [N, 3, H, W].

    Each map is stretched to its own range. `smooth` interpolates between patches; without it a patch is a square.
    """
    enlarged = F.interpolate(
        stretch(maps.detach().float()).unsqueeze(1),
        size=images.shape[-2:],
        mode="bilinear" if smooth else "nearest-exact",
    ).squeeze(1)
    return to_uint8(torch.lerp(images.float(), heat(enlarged), opacity))


def attention_sheet(images: Tensor, maps: Tensor) -> Tensor:
    """One row an image: the image, the mean of the heads laid over it, each head's map. uint8 [3, rows, columns].

    `images` [N, 3, H, W] in [0, 1], `maps` [N, heads, h, w]; both on any device.
    """
    pixels = images.detach().float().cpu()
    maps = maps.detach().float().cpu()
    num_images, num_heads = maps.shape[:2]
    size = pixels.shape[-2:]
    enlarged = F.interpolate(stretch(maps), size=size, mode="nearest-exact")
    tiles = torch.cat(
        [
            to_uint8(pixels).unsqueeze(1),
            overlay(pixels, maps.mean(1)).unsqueeze(1),
            to_uint8(heat(enlarged)),
        ],
        dim=1,
    )
    return picture_sheet(tiles.view(num_images * (2 + num_heads), 3, *size), columns=2 + num_heads)


def picture_sheet(images: Tensor, *, columns: int) -> Tensor:
    """Pictures [N, 3, h, w] (uint8, or floats in [0, 1]) as one sheet, row by row; uint8 [3, rows, columns]."""
    tiles = images.detach().cpu() if images.dtype == torch.uint8 else to_uint8(images.detach().cpu())
    factor = max(1, _MIN_TILE_PX // min(tiles.shape[-2:]))
    tiles = tiles.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
    sheet: Tensor = make_grid(tiles, nrow=columns, padding=2, pad_value=255.0)
    return sheet


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] -> 0 ... 255, rounded."""
    return images.clamp(0.0, 1.0).mul(255.0).round().byte()
