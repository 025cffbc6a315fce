"""Samples damaged in every way: replaced in the same way whoever reads, counted, listed, and told from good ones."""

from __future__ import annotations

import io
import multiprocessing
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_dist.data.loading.batch import Batch
from dino_dist.data.loading.loader import make_loader
from dino_dist.data.order.order import Order
from dino_dist.data.reading.decode import DecodeRules, decode_image
from dino_dist.data.reading.stream import SampleReader
from dino_dist.data.shards.index import open_dataset

RULES = DecodeRules(max_member_bytes=2**20, max_pixels=10**6)
RNG = np.random.default_rng(7)
PER_SHARD = 120
SHARDS = 5


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def photograph(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    size = (20 + number % 17, 20 + number % 23)
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def png_of(width: int, height: int, color: int = 2) -> bytes:
    """A header that claims this size, and no pixels to speak of."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


JPEG = encoded(photograph(1), "JPEG", quality=90)
SCAN = JPEG.index(b"\xff\xda")
PNG = encoded(photograph(2), "PNG")

BAD: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\xff",
    "text": b"<html>404 Not Found</html>",
    "zeros": bytes(500),
    "JPEG cut in the header": JPEG[: SCAN // 2],
    "JPEG cut at the scan": JPEG[:SCAN],
    "JPEG cut in the scan": JPEG[: SCAN + (len(JPEG) - SCAN) // 2],
    "JPEG without its end": JPEG[:-2],
    "JPEG, frame header gone": JPEG.replace(b"\xff\xc0", b"\xff\x02", 1),
    "JPEG of no size": JPEG.replace(
        b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", 21, 21), b"\xff\xc0\x00\x11\x08\0\0\0\0"
    ),
    "JPEG of huge size": JPEG.replace(
        b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", 21, 21), b"\xff\xc0\x00\x11\x08\xff\xff\xff\xff"
    ),
    "PNG cut": PNG[: len(PNG) // 2],
    "PNG with a wrong checksum": flipped(PNG, len(PNG) // 2),
    "PNG of huge size": png_of(100_000, 100_000),
    "PNG of no size": png_of(0, 10),
    "PNG over the limit": png_of(1001, 1000),
    "GIF": encoded(photograph(3), "GIF"),
    "float TIFF": encoded(Image.fromarray(np.ones((3, 4), dtype=np.float32)), "TIFF"),
    "wide grey": encoded(Image.fromarray(np.full((3, 4), 70_000, dtype=np.int32)), "TIFF"),
    "larger than allowed": encoded(Image.fromarray(RNG.integers(0, 256, (600, 700, 3), dtype=np.uint8)), "PNG"),
}
UNUSUAL: dict[str, bytes] = {
    "CMYK": encoded(photograph(4).convert("CMYK"), "JPEG"),
    "16 bit": encoded(Image.fromarray(RNG.integers(0, 65536, (5, 6), dtype=np.uint16)), "PNG"),
    "palette with alpha": encoded(photograph(5).quantize(9), "PNG", transparency=bytes(range(9))),
    "alpha": encoded(photograph(6).convert("RGBA"), "PNG"),
    "grey JPEG": encoded(photograph(7).convert("L"), "JPEG"),
    "PNG under a JPEG's name": PNG,
    "WebP under a JPEG's name": encoded(photograph(8), "WEBP"),
    "JPEG with bytes behind it": JPEG + b"behind",
}
FLIPPED = [flipped(JPEG, int(at)) for at in np.linspace(2, len(JPEG) - 3, 40)]
"""Good or bad, as it turns out."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """600 samples; what each id is. Damage also in a row, at a shard's end, and of bytes after they were indexed."""
    folder = tmp_path_factory.mktemp("corrupt")
    names = ["good"] * (PER_SHARD * SHARDS)
    members = [encoded(photograph(number), "JPEG", quality=80) for number in range(len(names))]
    odd = [*BAD.items(), *UNUSUAL.items(), *((f"flipped {n}", data) for n, data in enumerate(FLIPPED))]
    places = RNG.permutation(np.arange(0, PER_SHARD * (SHARDS - 1) - 2, 2))[: len(odd)]
    for place, (name, data) in zip(places.tolist(), odd, strict=True):
        names[place], members[place] = name, data
    for place in [*range(495, 500), PER_SHARD * SHARDS - 1]:  # five in a row; the last, whose stand-in is a first
        names[place], members[place] = "in a row", JPEG[: SCAN + 30 + place % 7]
    damaged = len(names) - 40
    names[damaged] = "damaged later"
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                info = tarfile.TarInfo(f"{number:04d}.jpg")
                info.size = len(members[number])
                tar.addfile(info, io.BytesIO(members[number]))
    dataset = open_dataset(str(folder), fallback_dir=folder)
    record = dataset.records(SHARDS - 1)[damaged - (SHARDS - 1) * PER_SHARD]
    with open(folder / f"{SHARDS - 1}.tar", "r+b") as tar_file:  # a bit in the middle of its pixels: it still decodes
        tar_file.seek(int(record["offset"]) + int(record["size"]) // 2)
        byte = tar_file.read(1)
        tar_file.seek(-1, io.SEEK_CUR)
        tar_file.write(bytes([byte[0] ^ 1]))
    time_ns = dataset.shards[SHARDS - 1].row.mtime_ns
    os.utime(folder / f"{SHARDS - 1}.tar", ns=(time_ns, time_ns))
    return folder, names


def read_all(folder: Path, num_workers: int, *, batch_size: int = 50, epochs: int = 1) -> list[Batch]:
    dataset = open_dataset(str(folder), fallback_dir=folder)
    steps = make_loader(
        reader=SampleReader(dataset=dataset, rules=RULES),
        order=Order(shard_counts=dataset.shard_counts, seed=1, shards_per_block=2),
        batch_size=batch_size,
        rank=0,
        size=1,
        accumulate=2,
        start_step=0,
        stop_step=epochs * PER_SHARD * SHARDS // batch_size,
        num_workers=num_workers,
        buffer_bytes=2**18,
    )
    return [batch for batches in steps for batch in batches]


def test_bad_samples_are_replaced_counted_and_listed(shards: tuple[Path, list[str]]) -> None:
    folder, names = shards
    batches = read_all(folder, 0)
    assert sorted(torch.cat([batch.sample_ids for batch in batches]).tolist()) == list(range(len(names)))
    bad = {record.sample_id: record for batch in batches for record in batch.bad}
    by_name = {names[sample_id] for sample_id in bad}
    assert by_name >= {*BAD, "in a row", "damaged later"}
    assert not by_name & {"good", *UNUSUAL}
    flipped_bad = sum(name.startswith("flipped") for name in by_name)
    assert 5 <= flipped_bad <= 35  # both kinds are there
    for sample_id, record in bad.items():
        assert record.shard == f"{sample_id // PER_SHARD}.tar"
        assert record.key == f"{sample_id:04d}"
        assert record.reason
        assert "\n" not in record.reason
    assert "not those that were indexed" in next(
        record.reason for record in bad.values() if names[record.sample_id] == "damaged later"
    )


def test_stand_ins_are_the_next_good_samples_of_the_shard(shards: tuple[Path, list[str]]) -> None:
    folder, _ = shards
    dataset = open_dataset(str(folder), fallback_dir=folder)
    reader = SampleReader(dataset=dataset, rules=RULES)
    assert [record.sample_id for record in reader.read(495).bad] == [495, 496, 497, 498, 499]
    assert np.array_equal(reader.read(495).pixels, reader.read(500).pixels)
    last = PER_SHARD * SHARDS - 1
    assert np.array_equal(reader.read(last).pixels, reader.read(last + 1 - PER_SHARD).pixels)


def test_unusual_images_are_what_pillow_makes_of_them() -> None:
    for name, data in UNUSUAL.items():
        if name != "16 bit":
            expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            assert np.array_equal(decode_image(data, RULES), expected), name


@pytest.mark.distributed
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_any_number_of_threads_gives_the_same(shards: tuple[Path, list[str]], num_workers: int) -> None:
    """Also where a stand-in has another size than the image that turned out bad while it was decoded."""
    alone, together = read_all(shards[0], 0, epochs=2), read_all(shards[0], num_workers, epochs=2)
    assert len(alone) == len(together) == 48
    for one, other in zip(alone, together, strict=True):
        assert one.step == other.step
        assert one.bad == other.bad
        for name in ("pixels", "sizes", "sample_ids", "epochs", "labels"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert multiprocessing.active_children() == []
