"""Masks of objects as PNG files: each pixel holds the number of its object, as in DAVIS and Pascal VOC."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_dist.errors import UserError

VOID = 255
"""Pixels that belong to no one, and are not judged."""
_MODES = ("P", "L", "1")

IndexMask = NDArray[np.uint8]
"""[height, width]; 0 is the background."""


def read_index_mask(path: Path, *, max_pixels: int) -> IndexMask:
    """The numbers of an indexed or grey PNG as they are in the file; `UserError` if it is none, damaged or too large.

    A grey one of nothing but 0 and 255 is one object, number 1.
    """
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            if picture.mode not in _MODES:
                raise UserError(
                    f"{path} is a mask of colours (mode {picture.mode}): give an indexed or grey PNG that holds the "
                    "number of each pixel's object"
                )
            if picture.width * picture.height > max_pixels:
                raise UserError(f"{path} has {picture.width} x {picture.height} px; at most {max_pixels} pixels")
            numbers: IndexMask = np.array(picture.convert("L") if picture.mode == "1" else picture, dtype=np.uint8)
            is_grey = picture.mode != "P"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no mask that can be read ({' '.join(str(error).split())}): give a PNG") from None
    if is_grey and not np.any((numbers != 0) & (numbers != VOID)):
        numbers = (numbers == VOID).astype(np.uint8)
    return numbers


def write_index_mask(path: Path, mask: IndexMask) -> None:
    """An indexed PNG whose colours tell the objects apart, in the order of Pascal VOC's."""
    picture = Image.fromarray(mask, mode="L")
    picture.putpalette(object_colors().tobytes())
    picture.save(path, format="PNG")


def object_colors() -> NDArray[np.uint8]:
    """Pascal VOC's color of each number, uint8 [256, 3]: its bits in threes, from each channel's highest bit down."""
    numbers = np.arange(256)
    colors = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= ((numbers >> (3 * bit + channel)) & 1).astype(np.uint8) << (7 - bit)
    return colors
