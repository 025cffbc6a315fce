"""What is written about one image: its heads' maps, overlays and masks, and a sheet that shows them together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_dist.data.reading.decode import Pixels
from dino_dist.errors import UserError
from dino_dist.pictures.draw import (
    Tile,
    enlarged,
    heat_over,
    heat_picture,
    mask_over,
    mask_picture,
    sheet,
    shown_size,
    to_image,
)
from dino_dist.pictures.masks import MaskScores, Truth, find_mask, head_scores, keep_mass, read_mask
from dino_dist.pictures.media import Medium, read_image, shown
from dino_dist.pictures.observer import Observer
from dino_dist.pictures.sight import resize_picture

_COLUMNS = 6


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """One image and what the network made of it; CPU."""

    medium: Medium
    pixels: Pixels
    """As the file has them."""
    picture: Tensor
    """As the network got it, in [0, 1]: [3, height, width]."""
    attention_Hhw: Tensor
    patches_hwD: Tensor

    @property
    def mean_hw(self) -> Tensor:
        """Over heads."""
        return self.attention_Hhw.mean(0)

    def shown(self) -> Tensor:
        """The picture to draw over: [3, height, width] in [0, 1]."""
        return shown_picture(self.pixels, self.picture)

    def sizes(self) -> dict[str, Any]:
        """For the summary."""
        return sizes(self.pixels, self.picture)


def shown_picture(pixels: Pixels, seen: Tensor) -> Tensor:
    """A picture to draw over: the network may have got too few pixels for people."""
    own_px, seen_px = (pixels.shape[0], pixels.shape[1]), (seen.shape[1], seen.shape[2])
    size_px = shown_size(own_px, seen_px)
    return enlarged(seen if size_px == seen_px else resize_picture(pixels, size_px))


def sizes(pixels: Pixels, picture: Tensor) -> dict[str, Any]:
    """A picture's own size and the one that the network got, for the summary."""
    return {
        "width_px": pixels.shape[1],
        "height_px": pixels.shape[0],
        "seen_width_px": picture.shape[2],
        "seen_height_px": picture.shape[1],
    }


def prepare(observer: Observer, medium: Medium) -> tuple[Pixels, Tensor]:
    """An image as it is and as the network gets it; `UserError` that names the file."""
    pixels = read_image(medium.path, observer.rules)
    return pixels, fitted(observer, medium, pixels)


def fitted(observer: Observer, medium: Medium, pixels: Pixels) -> Tensor:
    """Resized to what the network gets; `UserError` that names the file."""
    try:
        return resize_picture(pixels, observer.seen_size((pixels.shape[0], pixels.shape[1])))
    except UserError as error:
        raise UserError(f"{shown(medium.path)}: {error}") from None


def look_at_image(observer: Observer, medium: Medium) -> Look:
    """`UserError` that names the file, if it is damaged, too small or too large."""
    pixels, picture = prepare(observer, medium)
    sight = observer.look([picture])
    return Look(
        medium=medium,
        pixels=pixels,
        picture=picture,
        attention_Hhw=sight.attention_NHhw[0],
        patches_hwD=sight.patches_NhwD[0],
    )


def write_look(folder: Path, look: Look, *, mass: float, smooth: bool) -> None:
    """Fill a folder, which is made: pictures, `attention.npy` [heads, h, w] and `sheet.png`.

    `seen.png` is what the network got; masks have the image's own size; maps and overlays are drawn large enough.
    """
    folder.mkdir()
    own_size = (look.pixels.shape[0], look.pixels.shape[1])
    picture = look.shown()
    size = (picture.shape[1], picture.shape[2])
    np.save(folder / "attention.npy", look.attention_Hhw.numpy())
    to_image(look.picture).save(folder / "seen.png")
    over, masked = [], []
    heads = [(f"head-{head:02d}", f"head {head}", one) for head, one in enumerate(look.attention_Hhw)]
    maps = [("mean", "mean of heads", look.mean_hw), *heads]
    for name, label, map_hw in maps:
        kept = keep_mass(map_hw, mass)
        over.append(Tile(heat_over(picture, map_hw, smooth=smooth), label))
        masked.append(Tile(mask_over(picture, kept), f"{label}, {mass:.0%}"))
        to_image(over[-1].picture).save(folder / f"{name}-overlay.png")
        to_image(heat_picture(map_hw, size, smooth=smooth)).save(folder / f"{name}.png")
        to_image(mask_picture(kept, own_size)).convert("L").save(folder / f"{name}-mask.png")
    rows = [[Tile(picture, look.medium.path.name), over[0], masked[0]]]
    for first in range(1, len(maps), _COLUMNS):
        rows += [over[first : first + _COLUMNS], masked[first : first + _COLUMNS]]
    sheet(rows).save(folder / "sheet.png")


def overview_row(look: Look, *, mass: float, smooth: bool) -> list[Tile]:
    """One image in the sheet of all."""
    picture = look.shown()
    return [
        Tile(picture, look.medium.path.name),
        Tile(heat_over(picture, look.mean_hw, smooth=smooth), "mean of heads"),
        Tile(mask_over(picture, keep_mass(look.mean_hw, mass)), f"mean of heads, {mass:.0%}"),
    ]


def mask_scores(look: Look, masks: Path, observer: Observer, *, mass: float) -> MaskScores | None:
    """How well each head covers what people marked; None if there is no mask for this image."""
    file = find_mask(masks, look.medium)
    if file is None:
        return None
    truth = read_mask(file, (look.pixels.shape[0], look.pixels.shape[1]), observer.rules)
    return score(look.attention_Hhw, truth, mass=mass)


def score(attention_Hhw: Tensor, truth: Truth, *, mass: float) -> MaskScores:
    """Of all heads, of their mean, and of the whole picture."""
    heads = head_scores(keep_mass(attention_Hhw, mass), truth)
    whole = torch.ones(1, 1, 1, dtype=torch.bool)
    (of_mean,) = head_scores(keep_mass(attention_Hhw.mean(0, keepdim=True), mass), truth)
    (everything,) = head_scores(whole, truth)
    return MaskScores(heads=heads, mean_of_heads=of_mean, everything=everything)
