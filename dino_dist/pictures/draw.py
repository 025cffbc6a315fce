"""Maps and masks drawn over pictures, and labelled sheets of tiles. Pictures are [3, height, width] in [0, 1], CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dino_dist.eval.attention_maps import heat, stretch, to_uint8

_GREY = (0.299, 0.587, 0.114)
_DIMMED = 0.45
"""Of the brightness of what is not attended: dark enough for the heat to stand out, light enough to be recognised."""
_OUTSIDE_DIMMED = 0.25
_BRIGHTEST = 0.99
"""Quantile of a map from which on its patches are drawn as the greatest."""
_OUTLINE = (1.0, 0.82, 0.2)
_TILE_PX = 208
"""Short side of a sheet's tiles."""
_SHOWN_PX = 480
"""Short side up to which pictures are shown in more detail than the network got."""
_MIN_SHOWN_PX = 240
"""Single pictures with a smaller side are enlarged, by a whole factor: 64 px would be a stamp on the screen."""
_GAP_PX = 8
_TEXT_PX = 15
_LABEL_PX = 24
_PAPER, _INK = (250, 250, 248), (40, 40, 44)


class Tile(NamedTuple):
    """One picture of a sheet and what stands below it."""

    picture: Tensor
    label: str


def enlarge(maps: Tensor, size_px: tuple[int, int], *, smooth: bool) -> Tensor:
    """[..., h, w] -> [..., height, width]: squares of one value a patch, or a smooth surface."""
    flat = maps.float().reshape(1, -1, *maps.shape[-2:])
    mode = "bicubic" if smooth else "nearest-exact"
    return F.interpolate(flat, size=size_px, mode=mode).view(*maps.shape[:-2], *size_px)


def heat_picture(map_hw: Tensor, size_px: tuple[int, int], *, smooth: bool) -> Tensor:
    """The map alone, from its least value (black) to its greatest (nearly white)."""
    return heat(enlarge(_robust(map_hw), size_px, smooth=smooth))


def heat_over(picture: Tensor, map_hw: Tensor, *, smooth: bool) -> Tensor:
    """The map as heat over the dimmed, grey picture: the more attention, the more colour."""
    size_px = (picture.shape[1], picture.shape[2])
    strength = enlarge(_robust(map_hw), size_px, smooth=smooth).clamp(0.0, 1.0)
    grey = (picture * torch.tensor(_GREY).view(3, 1, 1)).sum(0, keepdim=True) * _DIMMED
    # Little attention shows as a tint already, or only the peaks would be seen.
    opacity = strength.sqrt()
    return torch.lerp(grey.expand(3, -1, -1), heat(0.25 + 0.75 * strength), opacity)


def _robust(map_hw: Tensor) -> Tensor:
    """Stretched to 0 ... 1, the greatest hundredth of the patches being 1: some networks have a few far outliers."""
    high = map_hw.float().flatten().quantile(_BRIGHTEST)
    return stretch(map_hw.float().clamp(max=high))


def mask_picture(kept_hw: Tensor, size_px: tuple[int, int]) -> Tensor:
    """The mask alone: white is kept."""
    return enlarge(kept_hw, size_px, smooth=False).expand(3, -1, -1)


def mask_over(picture: Tensor, kept_hw: Tensor) -> Tensor:
    """What the mask keeps as it is, with an outline; the rest nearly dark and grey."""
    size_px = (picture.shape[1], picture.shape[2])
    kept = enlarge(kept_hw, size_px, smooth=False)
    grey = (picture * torch.tensor(_GREY).view(3, 1, 1)).sum(0, keepdim=True) * _OUTSIDE_DIMMED
    drawn = torch.where(kept > 0, picture, grey)
    reach = max(1, min(size_px) // 200)
    inner = -F.max_pool2d(-kept[None, None], 2 * reach + 1, stride=1, padding=reach)[0, 0]
    return torch.where((kept > 0) & (inner == 0), torch.tensor(_OUTLINE).view(3, 1, 1), drawn)


def shown_size(own_px: tuple[int, int], seen_px: tuple[int, int]) -> tuple[int, int]:
    """Height and width to show a picture in: as the network got it, or larger where the file has more to show."""
    scale = max(1.0, min(_SHOWN_PX, min(own_px)) / min(seen_px))
    return round(seen_px[0] * scale), round(seen_px[1] * scale)


def enlarged(picture: Tensor) -> Tensor:
    """A small picture enlarged by a whole factor, its pixels as squares; others as they are."""
    factor = -(-_MIN_SHOWN_PX // min(picture.shape[1:])) if min(picture.shape[1:]) < _MIN_SHOWN_PX else 1
    return picture.repeat_interleave(factor, 1).repeat_interleave(factor, 2) if factor > 1 else picture


def to_image(picture: Tensor) -> Image.Image:
    """For saving."""
    return Image.fromarray(to_uint8(picture).permute(1, 2, 0).contiguous().numpy())


def sheet(rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """Tiles in rows, each with its label below; short sides alike, nothing cut off."""
    font = ImageFont.load_default(_TEXT_PX)
    drawn = [[(_tile(tile.picture), tile.label) for tile in row] for row in rows]
    heights = [max(image.height for image, _ in row) for row in drawn]
    width = max(sum(image.width + _GAP_PX for image, _ in row) for row in drawn) + _GAP_PX
    size = (width, sum(heights) + (_GAP_PX + _LABEL_PX) * len(rows) + _GAP_PX)
    paper = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(paper)
    top = _GAP_PX
    for row, height in zip(drawn, heights, strict=True):
        left = _GAP_PX
        for image, label in row:
            paper.paste(image, (left, top))
            draw.text((left, top + image.height + 3), _fitting(label, image.width, font), fill=_INK, font=font)
            left += image.width + _GAP_PX
        top += height + _LABEL_PX + _GAP_PX
    return paper


def _tile(picture: Tensor) -> Image.Image:
    height, width = picture.shape[1:]
    factor = _TILE_PX / min(height, width)
    # A panorama must not make the sheet as long as itself.
    factor = min(factor, 3 * _TILE_PX / max(height, width))
    how = Image.Resampling.NEAREST if factor > 2 else Image.Resampling.LANCZOS
    return to_image(picture).resize((max(1, round(width * factor)), max(1, round(height * factor))), how)


def _fitting(label: str, width_px: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The label, or as much of its end as fits: ends of file names tell more than their beginnings."""
    text = "".join(letter if letter.isprintable() else "?" for letter in label)
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength("..." + text) > width_px:
        text = text[1:]
    return "..." + text
