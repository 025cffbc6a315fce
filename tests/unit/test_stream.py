"""Reading by id: the right bytes, a deterministic stand-in for each bad sample, shards that changed or went."""

from __future__ import annotations

import gc
import io
import os
import pickle
import resource
import tarfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_dist.data.reading.decode import DecodeRules
from dino_dist.data.reading.stream import BadRecord, Sample, SampleReader
from dino_dist.data.shards.index import open_dataset
from dino_dist.data.stores.store_options import StoreCounts
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


def test_damage_of_any_length_has_a_stand_in(tmp_path: Path) -> None:
    """Nearby, then all over the shard, then in the next: after the last shard comes the first."""
    reader = make_reader(tmp_path / "s", [[b"bad"] * 40 + [png(40)] * 10, [b"bad"], [png(2), png(3)]])
    for sample_id in range(40):
        sample = reader.read(sample_id)
        assert (sample.pixels == 40).all()
        asked = [record.sample_id for record in sample.bad]
        assert asked[:17] == [*range(sample_id, min(sample_id + 17, 40))]
        assert len(set(asked)) == len(asked)
        assert set(asked) <= set(range(40))
    other = reader.read(50)
    assert [record.sample_id for record in other.bad] == [50]
    assert (other.pixels == 2 + 50 % 2).all()
    last = make_reader(tmp_path / "t", [[png(0)], [b"bad", b"bad"]])
    assert (last.read(1).pixels == 0).all()
    assert [record.sample_id for record in last.read(1).bad] == [1, 2]


def test_only_members_stand_in(tmp_path: Path) -> None:
    dataset = make_reader(tmp_path / "s", [[b"bad", png(1), b"bad", png(3)], [png(4)], [b"bad", png(6)]]).dataset
    taken = {0: [0, 2], 1: [], 2: [5, 6]}
    reader = SampleReader(dataset=dataset, rules=RULES, members=lambda shard: np.array(taken[shard], dtype=np.int64))
    sample = reader.read(0)
    assert (sample.pixels == 6).all()
    assert [record.sample_id for record in sample.bad] == [0, 2, 5]


def test_where_nothing_can_stand_in_the_run_ends(tmp_path: Path) -> None:
    reader = make_reader(tmp_path / "s", [[b"bad"] * 5 + [png(5)], [b"bad"]], max_substitutes=3)
    with pytest.raises(UserError, match=r"0000\.tar: .* key '0-0' is bad \(.*\), and so are 3 that could stand in"):
        reader.read(0)
    assert (reader.read(2).pixels == 5).all()
    everything = make_reader(tmp_path / "t", [[b"bad"] * 30, [b"bad"] * 2])
    with pytest.raises(UserError, match=r"0001\.tar: .* key '1-1' is bad \(.*\), and so are 31 that"):
        everything.read(31)


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
    cut = reader.read_exactly(0)
    assert isinstance(cut, BadRecord)
    assert "truncated after it was indexed" in cut.reason


@pytest.fixture
def few_descriptors(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many this process is told that it may have open."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (320, 320))
    gc.collect()  # those of earlier tests would be closed in the midst of the count
    return 320


def test_open_files_are_bounded(tmp_path: Path, few_descriptors: int) -> None:
    reader = make_reader(tmp_path / "s", [[png(i)] for i in range(100)])
    before = len(os.listdir("/proc/self/fd"))
    for sample_id in range(100):
        reader.read(sample_id)
    assert len(os.listdir("/proc/self/fd")) <= before + few_descriptors // 2  # shards, and their indexes
    reader.close()
    assert len(os.listdir("/proc/self/fd")) <= before + few_descriptors // 4
    assert (reader.read(7).pixels == 7).all()


def test_many_threads_read_as_one(tmp_path: Path) -> None:
    shards = [[png(shard * 5 + row) if (shard + row) % 4 else b"bad" for row in range(5)] for shard in range(30)]
    reader = make_reader(tmp_path / "s", shards)
    ids = [int(sample_id) for sample_id in np.random.default_rng(0).permutation(150)]
    alone = {sample_id: reader.read(sample_id) for sample_id in ids}
    fresh = pickle.loads(pickle.dumps(reader))
    with ThreadPoolExecutor(8) as threads:
        for sample_id, sample in zip(ids, threads.map(fresh.read, ids), strict=True):
            assert np.array_equal(sample.pixels, alone[sample_id].pixels)
            assert (sample.label, sample.bad) == (alone[sample_id].label, alone[sample_id].bad)


def test_decoding_to_a_place_is_reading(tmp_path: Path) -> None:
    """Also where pixels turn out bad after the header was good: the stand-in goes there if it has the same shape."""
    cut = png(9)[:-30]
    wide = io.BytesIO()
    Image.fromarray(np.full((2, 9, 3), 8, dtype=np.uint8)).save(wide, "PNG")
    reader = make_reader(tmp_path / "s", [[png(0), cut, png(2), cut, wide.getvalue(), b"bad", cut]])
    for sample_id in range(7):
        expected = reader.read(sample_id)
        opened = reader.open(sample_id)
        assert opened.asked_id == sample_id
        place = np.full((opened.image.height, opened.image.width, 3), 77, dtype=np.uint8)
        sample = reader.decode_into(opened, place)
        assert np.array_equal(sample.pixels, expected.pixels)
        assert (sample.label, sample.bad) == (expected.label, expected.bad)
        assert (sample.pixels is place) == (sample_id != 3)  # whose stand-in is wide
    assert [record.sample_id for record in reader.read(5).bad] == [5, 6]


@dataclass(frozen=True)
class Elsewhere:
    """Bytes that are nobody's shard; the last one asked for is kept."""

    asked: list[tuple[int, int, int]]

    def read(self, shard: int, offset: int, size: int, crc32: int) -> bytes:
        data = png(100 + shard)
        self.asked.append((shard, size, crc32))
        return data

    def will_need(self, shards: Sequence[int]) -> None:
        self.asked.extend((shard, 0, 0) for shard in shards)

    def counts(self) -> StoreCounts:
        return StoreCounts(requests=len(self.asked))

    def close(self) -> None:
        self.asked.clear()


def test_the_source_of_bytes_may_be_another(tmp_path: Path) -> None:
    dataset = make_reader(tmp_path / "s", [[png(0)], [png(1), png(2)]]).dataset
    source = Elsewhere([])
    reader = SampleReader(dataset=dataset, rules=RULES, source=source)
    assert (reader.read(2).pixels == 101).all()
    assert source.asked == [(1, len(png(2)), zlib.crc32(png(2)))]
    reader.will_need([1, 0])
    assert source.asked[1:] == [(1, 0, 0), (0, 0, 0)]
    assert reader.store_counts() == StoreCounts(requests=3)
    reader.close()
    assert source.asked == []
