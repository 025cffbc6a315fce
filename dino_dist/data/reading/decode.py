"""From the bytes of an image file to RGB pixels, within bounds, or `BadSample` with the reason.

Colour as in the published code (Pillow's `convert("RGB")`): alpha is dropped, no colour profile is applied, and an EXIF
rotation is not, unless asked for. 16-bit grey is scaled to 8 bits, where a plain convert would clip it.

Pillow is the reference: of the pixels, and of what is bad. JPEG goes through simplejpeg, which gives the same pixels in
less time; whatever it refuses or warns about, and all other formats, go to Pillow. Any number of threads may decode.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass, field

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from dino_dist.errors import UserError

Pixels = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "PPM", "BMP", "TIFF")
"""Pillow's names of what may be decoded; everything else is refused whatever its name says."""
_MAX_SIDE_PX = 65535  # JPEG's own bound; in a BMP one code can ask for 255 rows at once, so rows stay short
_PILLOW_MAX_PIXELS = 2 * 89_478_485  # above it, Pillow raises on its own (Image.MAX_IMAGE_PIXELS, not to be changed)
_JPEG_START = b"\xff\xd8\xff"
_SIMPLEJPEG_COLORS = frozenset({"YCbCr", "Gray", "RGB"})  # it does not convert CMYK to RGB
_DCT_SCALES = (8, 4, 2)
_MIN_DCT_SCALED_PX = 16  # below it, rounding could make two scales look alike
_QUIET_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\b"), 0)
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
    dct_scale_min_px: int | None = None
    """Decode JPEGs at 1/2, 1/4 or 1/8 of their size as long as the short side keeps this many px (16 at least): sizes
    are then the decoded ones. Other pixels than those of a resize, and the bounds hold for the full size. None: never.
    """

    def __post_init__(self) -> None:
        if not 0 < self.max_pixels <= _PILLOW_MAX_PIXELS:
            allowed = f"above 0 and at most {_PILLOW_MAX_PIXELS / 1e6:.0f} megapixels, the decoder's own limit"
            raise UserError(f"data.max_image_mpx={self.max_pixels / 1e6:g} must be {allowed}")
        if self.max_member_bytes <= 0:
            raise UserError(f"data.max_member_mib={self.max_member_bytes / 2**20:g} must be above 0")
        if self.dct_scale_min_px is not None and self.dct_scale_min_px < 1:
            raise UserError(f"data.dct_scale_min_px={self.dct_scale_min_px} must be at least 1, or null")


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedImage:
    """An image file whose header was read and keeps the rules; what it takes to decode its pixels."""

    height: int
    """Of the pixels that it decodes to."""
    width: int
    data: bytes
    rules: DecodeRules
    dct_scale: int = 1
    """The full size over this one."""
    picture: Image.Image | None = field(default=None, repr=False)
    """Opened by Pillow, which decodes it when asked to; None: a JPEG for simplejpeg."""
    pixels: Pixels | None = field(default=None, repr=False)
    """Decoded already, where the header does not tell the size."""

    def decode(self) -> Pixels:
        """RGB, uint8 [height, width, 3]; `BadSample` if the file is damaged. Only once."""
        pixels = np.empty((self.height, self.width, 3), dtype=np.uint8)
        self.decode_into(pixels)
        return pixels

    def decode_into(self, out: Pixels) -> None:
        """The same into an array of that shape (C order), whose contents are undefined after `BadSample`."""
        if self.picture is None and self.pixels is None and self._decode_fast(out):
            return
        pixels = self.pixels
        if pixels is None:
            picture = self.picture or _open_with_pillow(self.data, self.rules)
            pixels = _pillow_pixels(picture, self.rules)
        if pixels.shape != out.shape:
            raise BadSample(f"decodes to {pixels.shape[1]} x {pixels.shape[0]} px, not to {self.width} x {self.height}")
        out[...] = pixels

    def _decode_fast(self, out: Pixels) -> bool:
        # Least sizes are given only to reduce an image: those of a few px look alike at several scales.
        smallest = {"min_height": self.height, "min_width": self.width} if self.dct_scale > 1 else {}
        try:
            decoded = simplejpeg.decode_jpeg(self.data, "RGB", buffer=out, **smallest)
        except ValueError:  # damaged, or it merely warns: Pillow decides
            return False
        return bool(decoded.shape == out.shape)


def open_image(data: bytes, rules: DecodeRules) -> OpenedImage:
    """Read the header of an image file; `BadSample` if there is none of `FORMATS`, or it is over a limit.

    Animations and multi-page files are their first frame.
    """
    if len(data) > rules.max_member_bytes:
        raise BadSample(f"{len(data)} bytes; at most {rules.max_member_bytes}")
    if not data:
        raise BadSample("empty file")
    if data.startswith(_JPEG_START) and not rules.exif_transpose:
        fast = _open_fast(data, rules)
        if fast is not None:
            return fast
    picture = _open_with_pillow(data, rules)
    if rules.exif_transpose:  # some formats keep the orientation behind the pixels
        pixels = _pillow_pixels(picture, rules)
        return OpenedImage(height=pixels.shape[0], width=pixels.shape[1], data=data, rules=rules, pixels=pixels)
    return OpenedImage(height=picture.height, width=picture.width, data=data, rules=rules, picture=picture)


def decode_image(data: bytes, rules: DecodeRules) -> Pixels:
    """RGB pixels uint8 [height, width, 3] of an image file; `BadSample` if it is not one, damaged or over a limit."""
    return open_image(data, rules).decode()


def image_format(data: bytes) -> str:
    """Which of `FORMATS` the bytes claim to be (by their header alone); `BadSample` if none."""
    _hush_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return "JPEG" if image.format == "MPO" else str(image.format)
    except MemoryError:
        raise
    except Exception as error:  # as in `_pillow_pixels`
        raise BadSample(_reason(error)) from error


def _open_fast(data: bytes, rules: DecodeRules) -> OpenedImage | None:
    """For simplejpeg; None if it cannot decode this one."""
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size((int(width), int(height)), rules.max_pixels)
    if color not in _SIMPLEJPEG_COLORS:
        return None
    scale = _dct_scale((int(width), int(height)), rules)
    return OpenedImage(
        height=-(-int(height) // scale), width=-(-int(width) // scale), data=data, rules=rules, dct_scale=scale
    )


def _dct_scale(size_px: tuple[int, int], rules: DecodeRules) -> int:
    """1, 2, 4 or 8: by how much an image of this size is reduced while it is decoded."""
    if rules.dct_scale_min_px is None:
        return 1
    smallest = max(rules.dct_scale_min_px, _MIN_DCT_SCALED_PX)
    return next((scale for scale in _DCT_SCALES if -(-min(size_px) // scale) >= smallest), 1)


def _open_with_pillow(data: bytes, rules: DecodeRules) -> Image.Image:
    _hush_pillow()
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(picture.size, rules.max_pixels)
        scale = _dct_scale(picture.size, rules)
        if scale > 1:
            picture.draft(None, (picture.width // scale, picture.height // scale))  # only JPEG obeys
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # as in `_pillow_pixels`
        raise BadSample(_reason(error)) from error
    return picture


def _pillow_pixels(picture: Image.Image, rules: DecodeRules) -> Pixels:
    try:
        with picture:
            picture.load()
            return _to_rgb(ImageOps.exif_transpose(picture) if rules.exif_transpose else picture)
    except (BadSample, MemoryError):
        raise
    except Exception as error:
        # Decoders raise whatever a damaged field leads them to (struct.error, KeyError, ZeroDivisionError...): each
        # means that these bytes are bad, and nothing else can fail in here.
        raise BadSample(_reason(error)) from error


def _hush_pillow() -> None:
    """Silence its warnings, which are about metadata, or about sizes that are checked here.

    The filters are the process's, so that setting them around a call would not be safe with threads: they stay.
    """
    if tuple(warnings.filters[:1]) != (_QUIET_PILLOW,):
        warnings.filterwarnings("ignore", module=_QUIET_PILLOW[3].pattern)


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
