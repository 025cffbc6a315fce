"""Unusual images decode to the right pixels; what is no image, damaged or too large is bad, with a reason."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dino_dist.data.decode import BadSample, DecodeRules, decode_image, image_format
from dino_dist.errors import UserError

RULES = DecodeRules(max_member_bytes=64 * 2**20, max_pixels=1_000_000)
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (7, 5, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (7, 5, 1), dtype=np.uint8)
GREY = RNG.integers(0, 256, (7, 5), dtype=np.uint8)


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def grey_as_rgb(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(grey[:, :, None], 3, axis=2)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "PPM", "BMP", "TIFF"])
def test_lossless_formats_give_the_very_pixels(file_format: str) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {}
    pixels = decode_image(encode(Image.fromarray(RGB), file_format, **options), RULES)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert np.array_equal(pixels, RGB)


def test_jpeg_is_pillows() -> None:
    smooth = Image.fromarray(RGB).resize((64, 48))
    data = encode(smooth, "JPEG", quality=90)
    assert np.array_equal(decode_image(data, RULES), np.asarray(Image.open(io.BytesIO(data))))


def test_alpha_is_dropped() -> None:
    assert np.array_equal(decode_image(encode(Image.fromarray(np.concatenate([RGB, ALPHA], 2)), "PNG"), RULES), RGB)
    grey_alpha = Image.fromarray(np.concatenate([GREY[:, :, None], ALPHA], 2), "LA")
    assert np.array_equal(decode_image(encode(grey_alpha, "PNG"), RULES), grey_as_rgb(GREY))


def test_grey_and_one_bit() -> None:
    for file_format in ("PNG", "PPM", "BMP", "TIFF"):
        assert np.array_equal(decode_image(encode(Image.fromarray(GREY), file_format), RULES), grey_as_rgb(GREY))
    bits = Image.fromarray(GREY > 127)
    assert np.array_equal(decode_image(encode(bits, "PNG"), RULES), grey_as_rgb((GREY > 127).astype(np.uint8) * 255))


def test_palette_with_and_without_transparency() -> None:
    palette = Image.fromarray(RGB).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert np.array_equal(decode_image(encode(palette, "PNG"), RULES), expected)
    assert np.array_equal(decode_image(encode(palette, "PNG", transparency=bytes(range(16))), RULES), expected)


def test_cmyk() -> None:
    cmyk = Image.fromarray(RGB).convert("CMYK")
    assert np.array_equal(decode_image(encode(cmyk, "TIFF"), RULES), RGB)
    jpeg = encode(cmyk.resize((64, 64)), "JPEG")
    assert np.array_equal(decode_image(jpeg, RULES), np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(file_format: str) -> None:
    wide = np.array([[0, 127, 128, 129, 257], [32768, 65278, 65406, 65407, 65535]], dtype=np.uint16)
    expected = np.round(wide.astype(np.float64) * 255 / 65535).astype(np.uint8)
    assert np.array_equal(decode_image(encode(Image.fromarray(wide), file_format), RULES), grey_as_rgb(expected))


def test_16_bit_colour_is_read() -> None:
    """Pillow keeps the high byte of each: within one level of the scaled value."""
    wide = RNG.integers(0, 65536, (4, 6, 3), dtype=np.uint16)
    header = b"P6 6 4 65535\n" + wide.astype(">u2").tobytes()
    difference = decode_image(header, RULES).astype(np.float64) - wide * (255 / 65535)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1)])
def test_extreme_shapes(shape: tuple[int, int]) -> None:
    pixels = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(encode(Image.fromarray(pixels), "PNG"), RULES), pixels)


def test_exif_rotation_only_on_request() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    data = encode(Image.fromarray(RGB), "PNG", exif=exif)
    assert np.array_equal(decode_image(data, RULES), RGB)
    turning = DecodeRules(max_member_bytes=2**20, max_pixels=10**6, exif_transpose=True)
    assert np.array_equal(decode_image(data, turning), np.rot90(RGB, -1))


def test_animations_and_pages_give_the_first_frame() -> None:
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    for file_format, options in [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})]:
        data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(decode_image(data, RULES), RGB)


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "size", [(1001, 1000), (10_000, 10_000), (13_000, 13_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)]
)
def test_bombs_are_refused_by_their_header(size: tuple[int, int]) -> None:
    with warnings.catch_warnings(action="error"), pytest.raises(BadSample) as caught:
        decode_image(png_that_claims(*size), RULES)
    assert "\n" not in str(caught.value)


def test_a_run_length_bmp_cannot_ask_for_rows_of_any_length() -> None:
    """One four-byte code skips up to 255 rows: with rows of 10^8 pixels that would be 25 GB."""
    header = struct.pack("<IiiHHIIiiII", 40, 10**8, 1, 1, 8, 1, 2**20, 0, 0, 1, 0)
    data = b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 4) + header + bytes(4) + b"\x00\x02\xff\xff" * 100
    with pytest.raises(BadSample, match="a side"):
        decode_image(data, DecodeRules(max_member_bytes=2**26, max_pixels=100_000_000))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"\x80\x04\x95",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        encode(Image.fromarray(RGB), "GIF"),
        encode(Image.fromarray(RGB), "ICO"),
        encode(Image.fromarray(RGB.astype(np.float32)[:, :, 0]), "TIFF"),
        encode(Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32)), "TIFF"),
        encode(Image.fromarray(np.full((2, 2), -1, dtype=np.int32)), "TIFF"),
        b"P6 0 5 255\n",
    ],
    ids=lambda data: repr(data[:8]),
)
def test_what_is_no_usable_image(data: bytes) -> None:
    with pytest.raises(BadSample) as caught:
        decode_image(data, RULES)
    assert "\n" not in str(caught.value)
    assert " 0x" not in str(caught.value)  # a memory address would differ between ranks


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_truncated_files_are_bad(file_format: str) -> None:
    data = encode(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), file_format)
    for length in range(0, len(data) * 9 // 10, max(1, len(data) // 40)):
        with pytest.raises(BadSample):
            decode_image(data[:length], RULES)


def test_member_bytes_are_bounded() -> None:
    data = encode(Image.fromarray(RGB), "PNG")
    with pytest.raises(BadSample, match="at most 10"):
        decode_image(data, DecodeRules(max_member_bytes=10, max_pixels=100))


def test_formats_are_told_by_content() -> None:
    for file_format in ("JPEG", "PNG", "WEBP", "PPM", "BMP", "TIFF"):
        assert image_format(encode(Image.fromarray(RGB), file_format)) == file_format
    with pytest.raises(BadSample):
        image_format(b"x")


def test_limits_that_cannot_be_kept_are_refused() -> None:
    for max_pixels in (0, 200_000_000):
        with pytest.raises(UserError, match="max_image_mpx"):
            DecodeRules(max_member_bytes=1, max_pixels=max_pixels)
    with pytest.raises(UserError, match="max_member_mib"):
        DecodeRules(max_member_bytes=0, max_pixels=1)
    largest = DecodeRules(max_member_bytes=2**20, max_pixels=178_000_000)
    with pytest.raises(BadSample, match="truncated"):  # the claimed size itself is within the bounds
        decode_image(png_that_claims(13_000, 13_000), largest)
