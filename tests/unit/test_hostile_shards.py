"""Mutated tars, images and indexes: each ends in pixels, `UserError` or `BadSample`; nothing else, and no code runs.

Seeds are fixed, so a failure repeats; its message gives the seed of the case.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_dist.data.reading.decode import BadSample, DecodeRules, decode_image
from dino_dist.data.reading.stream import SampleReader
from dino_dist.data.shards.index import open_dataset
from dino_dist.data.shards.shard_index import index_shard
from dino_dist.errors import UserError

RULES = DecodeRules(max_member_bytes=2**20, max_pixels=200_000)


def encoded_images() -> list[bytes]:
    """Small images of every format and of the rarer modes."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (24, 17, 3), dtype=np.uint8))
    wide = Image.fromarray(rng.integers(0, 65536, (9, 11), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    cases: list[tuple[Image.Image, str, dict[str, object]]] = [
        (rgb, "JPEG", {"quality": 80, "exif": exif}),
        (rgb, "JPEG", {"progressive": True}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgb, "PNG", {"exif": exif}),
        (rgb.quantize(8), "PNG", {"transparency": bytes(range(8))}),
        (wide, "PNG", {}),
        (rgb, "WEBP", {"lossless": True}),
        (rgb, "WEBP", {"quality": 70, "save_all": True, "append_images": [rgb.rotate(90)]}),
        (rgb, "BMP", {}),
        (rgb.quantize(8), "BMP", {}),
        (rgb, "PPM", {}),
        (rgb.convert("L"), "PPM", {}),
        (rgb, "TIFF", {}),
        (rgb, "TIFF", {"compression": "tiff_lzw"}),
        (rgb, "TIFF", {"compression": "jpeg"}),
        (rgb.convert("1"), "TIFF", {"compression": "group4"}),
        (wide, "TIFF", {}),
    ]
    result = [b"P3 2 2 255 1 2 3 4 5 6 7 8 9 10 11 12\n", b"Pf 1 1 -1.0\n\0\0\0\0"]
    for image, file_format, options in cases:
        buffer = io.BytesIO()
        image.save(buffer, file_format, **options)
        result.append(buffer.getvalue())
    return result


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four damages: flipped bits, other bytes, cuts, repeats, numbers that are special in some field."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        # Headers decide, so half of the damages fall near the start.
        limit = len(result) if rng.random() < 0.5 else min(len(result), 64)
        at = rng.randrange(max(1, limit))
        kind = rng.randrange(7)
        if kind == 0 and result:
            result[at % len(result)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            result[at : at + 1] = rng.randbytes(1)
        elif kind == 2:
            result[at : at + rng.randint(1, 8)] = rng.choice([b"\xff", b"\x00", b"\x7f", b"\x80"]) * rng.randint(1, 8)
        elif kind == 3:
            del result[at : len(result) if rng.random() < 0.3 else at + rng.randint(1, 64)]
        elif kind == 4:
            result[at:at] = result[at : at + rng.randint(1, 64)]
        elif kind == 5:
            number = rng.choice([0, 1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1])
            result[at : at + 4] = number.to_bytes(4, rng.choice(["big", "little"]))
        else:
            other = rng.randrange(max(1, len(result)))
            result[at : at + 16], result[other : other + 16] = result[other : other + 16], result[at : at + 16]
    return bytes(result)


def check_one_line(error: Exception) -> None:
    assert str(error)
    assert str(error).isprintable()


def decodes(data: bytes) -> bool:
    try:
        pixels = decode_image(data, RULES)
    except BadSample as error:
        check_one_line(error)
        return False
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert 0 < pixels.size <= 3 * RULES.max_pixels
    return True


@pytest.mark.parametrize("seed", range(5))
def test_mutated_images(seed: int) -> None:
    """5 x 1,500 files."""
    images = encoded_images()
    outcomes: Counter[bool] = Counter()
    for case in range(1500):
        rng = random.Random(seed * 1_000_000 + case)
        data = mutated(rng.choice(images), rng)
        try:
            outcomes[decodes(data)] += 1
        except Exception as error:
            pytest.fail(f"case {seed * 1_000_000 + case}: {error!r}")
    assert min(outcomes[True], outcomes[False]) > 150  # damage that never mattered, or always, would test little


def shard_bytes(rng: random.Random) -> bytes:
    """A small valid shard in one of the three dialects of tar."""
    images = [data for data in encoded_images() if len(data) < 2000]
    buffer = io.BytesIO()
    tar_format = rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for number in range(4):
            folder = "folder/" * rng.choice([0, 1, 20 if tar_format != tarfile.USTAR_FORMAT else 1])
            name = f"{folder}{number}{'é' if number == 1 else ''}"
            members = [("jpg", rng.choice(images)), ("cls", b"%d" % number), ("json", b'{"label": 1}')]
            for suffix, data in members:
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()[: -8 * 512]  # most of the padding: damage there would test little


@pytest.mark.parametrize("seed", range(5))
def test_mutated_tars(tmp_path: Path, seed: int) -> None:
    """5 x 500 shards: opened as a data set and read through, or refused in one line."""
    rng = random.Random(seed)
    originals = [shard_bytes(rng) for _ in range(8)]
    outcomes: Counter[str] = Counter()
    path = tmp_path / "0.tar"
    for case in range(500):
        rng = random.Random(seed * 1_000_000 + case)
        data = mutated(rng.choice(originals), rng)
        # Aim at headers too: their checksum would catch nearly all, so make it right again.
        if rng.random() < 0.7:
            data = with_right_checksums(data)
        path.write_bytes(data)
        try:
            outcomes[read_through(path)] += 1
        except Exception as error:
            pytest.fail(f"case {seed * 1_000_000 + case}: {error!r}")
    assert min(outcomes["read"], outcomes["refused"]) > 50


def with_right_checksums(data: bytes) -> bytes:
    """Repair the checksum of every block that looks like a header."""
    result = bytearray(data)
    for at in range(0, len(result) - 511, 512):
        if b"ustar" in result[at + 250 : at + 270]:
            block = result[at : at + 148] + b" " * 8 + result[at + 156 : at + 512]
            result[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return bytes(result)


def read_through(path: Path) -> str:
    for made in path.parent.glob("*.npy"):
        made.unlink()
    (path.parent / "manifest.json").unlink(missing_ok=True)
    try:
        dataset = open_dataset(str(path), fallback_dir=path.parent, num_threads=1)
        reader = SampleReader(dataset=dataset, rules=RULES)
        for sample_id in range(dataset.num_samples):
            reader.read(sample_id)
        reader.close()
    except UserError as error:
        check_one_line(error)
        return "refused"
    return "read"


@pytest.mark.parametrize("seed", range(2))
def test_mutated_manifests_and_indexes(tmp_path: Path, seed: int) -> None:
    """2 x 300 damaged side files, most of them after a valid start."""
    path = tmp_path / "0.tar"
    path.write_bytes(shard_bytes(random.Random(seed)))
    open_dataset(str(path), fallback_dir=tmp_path, num_threads=1)
    side_files = [tmp_path / "manifest.json", tmp_path / "0.tar.index.npy"]
    originals = {file: file.read_bytes() for file in side_files}
    outcomes: Counter[str] = Counter()
    for case in range(300):
        rng = random.Random(seed * 1_000_000 + case)
        for file, data in originals.items():
            file.write_bytes(mutated(data, rng) if rng.random() < 0.6 else data)
        try:
            reader = SampleReader(dataset=open_dataset(str(path), fallback_dir=tmp_path, num_threads=1), rules=RULES)
            reader.read(0)
            outcomes["read"] += 1
        except UserError as error:
            check_one_line(error)
            outcomes["refused"] += 1
        except Exception as error:
            pytest.fail(f"case {seed * 1_000_000 + case}: {error!r}")
    assert min(outcomes["read"], outcomes["refused"]) > 30


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_planted_pickles_are_never_run(tmp_path: Path) -> None:
    """As members with the suffixes that webdataset's own decoder unpickles, and in the place of what is read here."""
    trap = tmp_path / "sprung"
    payload = pickle.dumps(Trap(trap))
    image = encoded_images()[-1]
    suffixes = ["pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "mp", "ten", "cbor", "png.pkl"]
    members = [(f"0.{suffix}", payload) for suffix in suffixes]
    members += [("0.tif", image), ("1.cls", payload), ("1.json", payload), ("1.txt", payload), ("1.jpg", payload)]
    shard = tmp_path / "shards" / "0.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    reader = SampleReader(dataset=open_dataset(str(shard), fallback_dir=tmp_path), rules=RULES)
    assert reader.dataset.num_samples == 2
    assert [record.key for record in reader.read(1).bad] == ["1"]
    assert not trap.exists()
    pickle.loads(payload)
    assert trap.exists()  # the trap works: not to spring it means something


@pytest.mark.parametrize("member", ["0.cls", "0.json"])
def test_large_label_members_are_not_read(tmp_path: Path, member: str) -> None:
    """A sparse file of 2 GiB: reading it would show."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("0.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"jpg"))
    header = tarfile.TarInfo(member)
    header.size = 2**31
    with open(path, "r+b") as file:
        file.seek(1024)
        file.write(header.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 1536 + header.size + 1024)
    assert index_shard(path).records["label"].tolist()[0] < 0


def test_an_empty_file_is_no_shard(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"0\.tar: bad tar at byte 0: .*truncated"):
        open_dataset(str(tmp_path), fallback_dir=tmp_path)
    (tmp_path / "0.tar").write_bytes(bytes(10240))
    with pytest.raises(UserError, match="no images"):
        open_dataset(str(tmp_path), fallback_dir=tmp_path)
