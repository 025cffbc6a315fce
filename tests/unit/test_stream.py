"""Reading by id: the right bytes, a deterministic stand-in for each bad sample, shards that changed or went."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_dist.data.decode import DecodeRules
from dino_dist.data.index import open_dataset
from dino_dist.data.stream import BadRecord, Sample, SampleReader
from dino_dist.errors import UserError

RULES = DecodeRules(max_member_bytes=2**20, max_pixels=10**6)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 3, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_reader(folder: Path, shards: list[list[bytes]], **options: int) -> SampleReader:
    """Shards of samples labelled by their number in the shard."""
    folder.mkdir(exist_ok=True)
    for number, images in enumerate(shards):
        with tarfile.open(folder / f"{number:04d}.tar", "w") as tar:
            for row, data in enumerate(images):
                for suffix, content in (("png", data), ("cls", str(row).encode())):
                    info = tarfile.TarInfo(f"{number}-{row}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    dataset = open_dataset(str(folder), fallback_dir=folder)
    return SampleReader(dataset=dataset, rules=RULES, **options)


def test_reads_pixels_and_labels_in_any_order(tmp_path: Path) -> None:
    reader = make_reader(tmp_path / "s", [[png(0), png(1), png(2)], [png(3)], [png(4), png(5)]])
    for sample_id in (5, 0, 3, 2, 0, 4, 1):
        sample = reader.read(sample_id)
        assert sample.pixels.shape == (2, 3, 3)
        assert (sample.pixels == sample_id).all()
        assert sample.label == [0, 1, 2, 0, 0, 1][sample_id]
        assert sample.bad == ()
    with pytest.raises(ValueError, match=r"0\.\.5"):
        reader.read(6)


def test_a_bad_sample_is_replaced_by_the_next_of_its_shard(tmp_path: Path) -> None:
    shards = [[png(0), b"bad", b"", png(3)], [png(4), b"worse"]]
    reader = make_reader(tmp_path / "s", shards)
    sample = reader.read(1)
    assert (sample.pixels == 3).all()
    assert sample.label == 3
    assert [(record.sample_id, record.shard, record.key) for record in sample.bad] == [
        (1, "0000.tar", "0-1"),
        (2, "0000.tar", "0-2"),
    ]
    assert (reader.read(5).pixels == 4).all()  # after the last of a shard comes its first
    again = pickle.loads(pickle.dumps(reader)).read(1)
    assert again.bad == sample.bad
    assert isinstance(reader.read_exactly(1), BadRecord)
    assert isinstance(reader.read_exactly(0), Sample)


def test_too_many_bad_samples_end_the_run(tmp_path: Path) -> None:
    reader = make_reader(tmp_path / "s", [[b"bad"] * 5 + [png(5)], [b"bad"]], max_substitutes=3)
    with pytest.raises(UserError, match=r"0000\.tar: 4 bad samples in a row from key '0-0'"):
        reader.read(0)
    assert (reader.read(2).pixels == 5).all()
    with pytest.raises(UserError, match=r"0001\.tar: 1 bad samples in a row"):
        reader.read(6)


def test_members_over_the_limit_are_not_read(tmp_path: Path) -> None:
    reader = make_reader(tmp_path / "s", [[png(0), bytes(2**20 + 1)]])
    assert "at most 1048576" in reader.read(1).bad[0].reason


def test_shards_that_changed_or_went_are_named(tmp_path: Path) -> None:
    reader = make_reader(tmp_path / "s", [[png(0)], [png(1)], [png(2)]])
    os.truncate(tmp_path / "s" / "0001.tar", 700)
    (tmp_path / "s" / "0002.tar").unlink()
    assert (reader.read(0).pixels == 0).all()
    with pytest.raises(UserError, match=r"0001\.tar has 700 bytes but had \d+"):
        reader.read(1)
    with pytest.raises(UserError, match=r"0002\.tar: No such file"):
        reader.read(2)
    os.truncate(tmp_path / "s" / "0000.tar", 520)  # while it is open
    with pytest.raises(UserError, match="truncated after it was indexed"):
        reader.read(0)


def test_open_files_are_bounded(tmp_path: Path) -> None:
    reader = make_reader(tmp_path / "s", [[png(i)] for i in range(100)])
    before = len(os.listdir("/proc/self/fd"))
    for sample_id in range(100):
        reader.read(sample_id)
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * 64  # shards, and their indexes
    reader.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 64
    assert (reader.read(7).pixels == 7).all()
