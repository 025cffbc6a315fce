"""Attention as a mask of what is in the picture, and how well it covers what people marked there.

The table of arXiv:2104.14294, section 4.2: keep 60 % of the attention's mass, take each picture's best head, average
the Jaccard index over pictures.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dino_dist.data.reading.decode import DecodeRules
from dino_dist.errors import UserError
from dino_dist.pictures.media import Medium, read_image, shown

_MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
"""Without loss: a JPEG's background is not 0."""
_VOID = 255
"""Colour number of a palette for pixels that count neither as object nor as background (PASCAL VOC's borders)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """What people marked in a picture."""

    object_HW: NDArray[np.bool_]
    counts_HW: NDArray[np.bool_]
    """Pixels that are judged at all."""


def keep_mass(maps: Tensor, share: float) -> Tensor:
    """The fewest patches that hold `share` of each map's sum: [..., h, w] not negative -> bool [..., h, w].

    Of equal patches the earlier is kept. `UserError` unless 0 < share <= 1.
    """
    if not 0.0 < share <= 1.0:
        raise UserError(f"--mass {share:g} must be above 0 and at most 1")
    flat = maps.double().flatten(-2)
    value, order = flat.sort(dim=-1, descending=True, stable=True)
    held_before = (value.cumsum(-1) - value) / value.sum(-1, keepdim=True)
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, order, held_before < share)
    return kept.view(maps.shape)


def jaccard(mask: NDArray[np.bool_], truth: Truth) -> float:
    """Pixels in both over pixels in either, of those that count; 1 if there are none in either."""
    found, marked = mask & truth.counts_HW, truth.object_HW & truth.counts_HW
    either = int(np.count_nonzero(found | marked))
    return int(np.count_nonzero(found & marked)) / either if either else 1.0


def head_scores(kept_Hhw: Tensor, truth: Truth) -> list[float]:
    """The Jaccard index of each patch mask, enlarged to the marked picture's own size by nearest neighbour."""
    height, width = truth.object_HW.shape
    rows, columns = _nearest(kept_Hhw.shape[1], height), _nearest(kept_Hhw.shape[2], width)
    return [jaccard(mask[rows[:, None], columns], truth) for mask in kept_Hhw.cpu().numpy()]


def _nearest(patches: int, pixels: int) -> NDArray[np.int64]:
    """The patch under the middle of each pixel."""
    return ((2 * np.arange(pixels) + 1) * patches) // (2 * pixels)


def find_mask(folder: Path, medium: Medium) -> Path | None:
    """The mask of an image: at the same place below `folder`, or directly in it, under the same name; None: none.

    `UserError` if several files could be it.
    """
    for stem in dict.fromkeys((medium.below.with_suffix(""), Path(medium.below.stem))):
        base = folder / stem
        # Not asked of the path itself, which fails where a name is too long for the file system.
        files = [file for suffix in _MASK_SUFFIXES if os.path.isfile(file := base.with_name(base.name + suffix))]
        if len(files) > 1:
            raise UserError(f"{shown(files[0])} and {files[1].name} could both be the mask of {shown(medium.path)}")
        if files:
            return files[0]
    return None


def read_mask(path: Path, size_px: tuple[int, int], rules: DecodeRules) -> Truth:
    """What is not 0 (black) is object, also among numbers of 16 bits; of a palette's, 255 is neither object nor
    background.

    `size_px`: height and width of the picture. `UserError` if the file is no image or has another size.
    """
    # Read as colours first: this refuses what is damaged or too large, by the rules that pictures are read by.
    colors = read_image(path, rules)
    if colors.shape[:2] != size_px:
        raise UserError(
            f"{shown(path)} is {colors.shape[1]} x {colors.shape[0]} px, its picture {size_px[1]} x {size_px[0]}: "
            "a mask must have the picture's size"
        )
    with Image.open(path) as image:
        # As 8 bits of grey, numbers up to 128 of 65535 would be black.
        one_number_a_pixel = len(image.getbands()) == 1
        values = np.array(image) if one_number_a_pixel else colors.max(axis=2)
        counts_HW = values != _VOID if image.mode == "P" else np.ones(size_px, dtype=np.bool_)
    return Truth(object_HW=(values != 0) & counts_HW, counts_HW=counts_HW)


@dataclass(frozen=True, kw_only=True)
class MaskScores:
    """Jaccard indices of one picture."""

    heads: Sequence[float]
    mean_of_heads: float
    """Of the heads' mean map."""
    everything: float
    """Of a mask that holds the whole picture: what knowing nothing reaches."""

    @property
    def best_head(self) -> int:
        """The first of the best."""
        return max(range(len(self.heads)), key=lambda head: self.heads[head])


def summarise(scores: Sequence[MaskScores]) -> dict[str, object]:
    """Means over pictures, as the paper's table has them; at least one picture."""
    by_head = np.array([score.heads for score in scores])
    return {
        "jaccard_best_head": float(by_head.max(axis=1).mean()),
        "jaccard_mean_of_heads": float(np.mean([score.mean_of_heads for score in scores])),
        "jaccard_each_head": [float(value) for value in by_head.mean(axis=0)],
        "jaccard_everything": float(np.mean([score.everything for score in scores])),
        "masks": len(scores),
    }
