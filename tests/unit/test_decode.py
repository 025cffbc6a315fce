"""Unusual images decode to the right pixels; what is no image, damaged or too large is bad, with a reason."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dino_dist.data.reading.decode import BadSample, DecodeRules, decode_image, image_format, open_image
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


def by_pillow(data: bytes, scale: int = 1) -> NDArray[np.uint8]:
    """The reference."""
    picture = Image.open(io.BytesIO(data))
    if scale > 1:
        picture.draft(None, (picture.width // scale, picture.height // scale))
    return np.asarray(picture.convert("RGB"))


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with edges and some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.integers(-9, 10, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))


def without_segment(data: bytes, marker: int) -> bytes:
    """A JPEG less its first segment of this marker."""
    at = data.index(bytes([0xFF, marker]))
    (length,) = struct.unpack(">H", data[at + 2 : at + 4])
    return data[:at] + data[at + 2 + length :]


def with_adobe(data: bytes, transform: int) -> bytes:
    """A JPEG whose colours are declared by an Adobe segment instead of a JFIF one."""
    segment = b"\xff\xee" + struct.pack(">H", 14) + b"Adobe" + struct.pack(">HHHB", 100, 0, 0, transform)
    return data[:2] + segment + without_segment(data, 0xE0)[2:]


JPEG_OPTIONS: dict[str, dict[str, object]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "4:1:1": {"subsampling": "4:1:1"},
    "progressive": {"progressive": True},
    "progressive 4:4:4": {"progressive": True, "subsampling": 0},
    "restart markers": {"restart_marker_blocks": 3},
    "own Huffman tables": {"optimize": True},
    "RGB": {"keep_rgb": True},
    "coarse": {"quality": 5},
    "fine": {"quality": 100},
}
ODD_SIZES = [(1, 1), (1, 7), (8, 8), (9, 17), (33, 31), (100, 3), (64, 75), (127, 128)]


@pytest.mark.parametrize("options", JPEG_OPTIONS.values(), ids=JPEG_OPTIONS.keys())
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_pixels_are_pillows_bit_for_bit(options: dict[str, object], mode: str) -> None:
    for number, size in enumerate(ODD_SIZES):
        image = photograph(*size, seed=number).convert(mode)
        data = encode(image, "JPEG", **{"quality": 90, **options})
        opened = open_image(data, RULES)
        assert opened.picture is None  # by simplejpeg, that is
        assert np.array_equal(opened.decode(), by_pillow(data))


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_dct_scaled_pixels_are_pillows_bit_for_bit(scale: int) -> None:
    for number, (width, height) in enumerate([(400, 300), (257, 403), (1000, 131)]):
        data = encode(photograph(width, height, seed=number), "JPEG", quality=90)
        rules = replace(RULES, dct_scale_min_px=-(-min(width, height) // scale))
        opened = open_image(data, rules)
        assert (opened.height, opened.width) == (-(-height // scale), -(-width // scale))
        pixels = opened.decode()
        assert np.array_equal(pixels, by_pillow(data, scale))
        reduced = np.asarray(Image.fromarray(by_pillow(data)).resize((opened.width, opened.height), Image.BOX))
        assert np.abs(pixels.astype(float) - reduced).mean() < 10  # the same picture
        cmyk = encode(photograph(width, height, seed=number).convert("CMYK"), "JPEG")
        assert decode_image(cmyk, rules).shape == pixels.shape
        one_more = replace(RULES, dct_scale_min_px=-(-min(width, height) // scale) + 1)
        assert decode_image(data, one_more).shape[0] == -(-height // (scale // 2 or 1))
        png = encode(photograph(width, height), "PNG")
        assert decode_image(png, rules).shape == (height, width, 3)


def test_dct_scaling_keeps_the_bounds_and_small_images() -> None:
    data = encode(photograph(60, 40), "JPEG")
    for smallest in (1, 16, 30):
        rules = replace(RULES, dct_scale_min_px=smallest)
        assert min(decode_image(data, rules).shape[:2]) >= max(16, smallest)
        for size in ODD_SIZES:
            small = encode(photograph(*size), "JPEG")
            assert min(decode_image(small, rules).shape[:2]) >= min(*size, 16)
    with pytest.raises(BadSample, match="60 x 40 px; at most 2399"):
        decode_image(data, DecodeRules(max_member_bytes=2**20, max_pixels=2399, dct_scale_min_px=1))
    with pytest.raises(UserError, match="dct_scale_min_px=0"):
        replace(RULES, dct_scale_min_px=0)


def test_adobe_oddities_are_pillows() -> None:
    rgb = encode(photograph(40, 30), "JPEG", quality=90)
    as_rgb = encode(photograph(40, 30), "JPEG", quality=90, keep_rgb=True)
    inverted = encode(photograph(40, 30).convert("CMYK"), "JPEG", quality=90)
    ycck = inverted.replace(b"Adobe\x00d\x00\x00\x00\x00\x00", b"Adobe\x00d\x00\x00\x00\x00\x02")
    assert ycck != inverted
    for data in (
        with_adobe(rgb, 0),
        with_adobe(rgb, 1),
        as_rgb,
        without_segment(as_rgb, 0xEE),
        without_segment(rgb, 0xE0),
        inverted,
        ycck,
    ):
        assert np.array_equal(decode_image(data, RULES), by_pillow(data))
    assert not np.array_equal(by_pillow(with_adobe(rgb, 0)), by_pillow(rgb))
    assert open_image(ycck, RULES).picture is not None  # simplejpeg does not convert these


def test_trailing_bytes_and_exif_do_not_matter() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photograph(40, 30), "JPEG", exif=exif)
    pixels = by_pillow(data)
    assert pixels.shape == (30, 40, 3)
    assert np.array_equal(decode_image(data, RULES), pixels)
    assert np.array_equal(decode_image(data + b"more" * 9, RULES), pixels)
    turned = decode_image(data, replace(RULES, exif_transpose=True))
    assert np.array_equal(turned, np.rot90(pixels, -1))


def outcome(data: bytes, decode: Callable[[bytes], NDArray[np.uint8]]) -> NDArray[np.uint8] | None:
    try:
        return decode(data)
    except BadSample:
        return None


def test_damaged_jpegs_are_bad_exactly_when_they_are_for_pillow() -> None:
    """Bytes flipped, cut out, put in, or missing at the end: the same verdict, and where it is good the same pixels."""
    rng = np.random.default_rng(5)
    by_pillow_alone = replace(RULES, exif_transpose=True)  # these images have no orientation
    options = [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 4}, {"keep_rgb": True}]
    good = [encode(photograph(45, 37, seed), "JPEG", **options[seed % 5]) for seed in range(10)]
    good += [encode(photograph(45, 37, seed).convert(mode), "JPEG") for seed, mode in enumerate(["L", "CMYK"])]
    verdicts = []
    for number in range(3000):
        data = bytearray(good[number % len(good)])
        at = int(rng.integers(len(data)))
        kind = number // len(good) % 5
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            data[int(rng.integers(300))] = int(rng.integers(256))  # in the header
        elif kind == 3:
            del data[at : at + int(rng.integers(1, 40))]
        else:
            data[at:at] = rng.bytes(7)
        ours = outcome(bytes(data), lambda data: decode_image(data, RULES))
        reference = outcome(bytes(data), lambda data: decode_image(data, by_pillow_alone))
        assert (ours is None) == (reference is None)
        assert ours is None or np.array_equal(ours, reference)
        verdicts.append(ours is None)
    assert 0.2 < np.mean(verdicts) < 0.8


def test_threads_decode_as_one_does() -> None:
    images = [encode(photograph(50, 40, seed), "JPEG", quality=80) for seed in range(20)]
    images += [encode(photograph(50, 40, seed), "PNG") for seed in range(10)]
    images += [encode(photograph(9, 9).convert("P"), "PNG", transparency=bytes(9)), images[0][:200], b"x"]  # warnings
    alone = [outcome(data, lambda data: decode_image(data, RULES)) for data in images]
    with warnings.catch_warnings(action="error"), ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda data: outcome(data, lambda data: decode_image(data, RULES)), images * 10))
    for number, pixels in enumerate(together):
        expected = alone[number % len(images)]
        assert (pixels is None) == (expected is None)
        assert pixels is None or np.array_equal(pixels, expected)


def test_the_place_may_be_given() -> None:
    for file_format in ("JPEG", "PNG"):
        data = encode(photograph(31, 17), file_format)
        memory = np.zeros(31 * 17 * 3 + 20, dtype=np.uint8)
        opened = open_image(data, RULES)
        assert (opened.height, opened.width) == (17, 31)
        opened.decode_into(memory[7:-13].reshape(17, 31, 3))
        assert np.array_equal(memory[7:-13].reshape(17, 31, 3), by_pillow(data))
        assert not memory[:7].any()
        assert not memory[-13:].any()


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
