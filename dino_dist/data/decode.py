"""From the bytes of an image file to RGB pixels, within bounds, or `BadSample` with the reason.

Colour as in the published code (Pillow's `convert("RGB")`): alpha is dropped, no colour profile is applied, and an EXIF
rotation is not, unless asked for. 16-bit grey is scaled to 8 bits, where a plain convert would clip it.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from dino_dist.errors import UserError

Pixels = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "PPM", "BMP", "TIFF")
"""Pillow's names of what may be decoded; everything else is refused whatever its name says."""
_MAX_SIDE_PX = 65535  # JPEG's own bound; in a BMP one code can ask for 255 rows at once, so rows stay short
_PILLOW_MAX_PIXELS = 2 * 89_478_485  # above it, Pillow raises on its own (Image.MAX_IMAGE_PIXELS, not to be changed)
_GREY_16_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I"})


class BadSample(Exception):
    """These bytes are no image that may be used; the message is the reason, in one line."""


@dataclass(frozen=True, kw_only=True)
class DecodeRules:
    """What a member and its image may measure, and how it is turned into pixels."""

    max_member_bytes: int
    """Larger files are bad, and not read."""
    max_pixels: int
    """Images of more pixels (width * height, as their header says) are bad, and not decoded."""
    exif_transpose: bool = False
    """Turn images as their EXIF orientation asks; the published code does not."""

    def __post_init__(self) -> None:
        if not 0 < self.max_pixels <= _PILLOW_MAX_PIXELS:
            allowed = f"above 0 and at most {_PILLOW_MAX_PIXELS / 1e6:.0f} megapixels, the decoder's own limit"
            raise UserError(f"data.max_image_mpx={self.max_pixels / 1e6:g} must be {allowed}")
        if self.max_member_bytes <= 0:
            raise UserError(f"data.max_member_mib={self.max_member_bytes / 2**20:g} must be above 0")


def decode_image(data: bytes, rules: DecodeRules) -> Pixels:
    """RGB pixels uint8 [height, width, 3] of an image file; `BadSample` if it is not one, damaged or over a limit.

    Animations and multi-page files give their first frame. Not for several threads at once (Python's warning filters
    are the process's).
    """
    if len(data) > rules.max_member_bytes:
        raise BadSample(f"{len(data)} bytes; at most {rules.max_member_bytes}")
    if not data:
        raise BadSample("empty file")
    try:
        # Warnings are about metadata, or about sizes that are checked below.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.size, rules.max_pixels)
            image.load()
            pixels = _to_rgb(ImageOps.exif_transpose(image) if rules.exif_transpose else image)
    except BadSample:
        raise
    except Exception as error:
        # Decoders raise whatever a damaged field leads them to (struct.error, KeyError, ZeroDivisionError...): each
        # means that these bytes are bad, and nothing else can fail in here.
        raise BadSample(_reason(error)) from error
    return pixels


def image_format(data: bytes) -> str:
    """Which of `FORMATS` the bytes claim to be (by their header alone); `BadSample` if none."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return "JPEG" if image.format == "MPO" else str(image.format)
    except Exception as error:  # as in `decode_image`
        raise BadSample(_reason(error)) from error


def _check_size(size_px: tuple[int, int], max_pixels: int) -> None:
    width, height = size_px
    if width < 1 or height < 1:
        raise BadSample(f"{width} x {height} px")
    if width * height > max_pixels or max(width, height) > _MAX_SIDE_PX:
        raise BadSample(f"{width} x {height} px; at most {max_pixels} pixels and {_MAX_SIDE_PX} a side")


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode in _GREY_16_MODES:
        return _grey_16_to_rgb(np.asarray(image))
    if image.mode == "F":
        raise BadSample("floating-point pixels, whose range is unknown")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"), dtype=np.uint8)


def _grey_16_to_rgb(grey: NDArray[np.generic]) -> Pixels:
    """round(v * 255 / 65535) in the three channels; in integers, so that it is the same everywhere."""
    wide = grey.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise BadSample("grey values outside 0..65535, whose range is unknown")
    narrow = ((wide + 128) // 257).astype(np.uint8)
    return np.repeat(narrow[:, :, None], 3, axis=2)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).encode("unicode_escape").decode("ascii")
    if isinstance(error, UnidentifiedImageError):
        text = f"not one of {', '.join(FORMATS)}"  # the original names a memory address
    return f"{type(error).__name__}: {text[:200]}"
