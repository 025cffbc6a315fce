"""The line that says what bounds the loader: its figures follow from the measured cost, and it names what limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dino_dist.data.loading.loader_limits import ImageCost, limits_line, measure_images, usable_cores
from dino_dist.data.order.mixture import MixtureOrder, Part
from dino_dist.data.order.order import Order
from dino_dist.data.order.selection import Selection
from dino_dist.data.reading.decode import DecodeRules
from dino_dist.data.reading.stream import BadRecord, SampleReader
from dino_dist.data.shards.index import open_dataset
from dino_dist.errors import UserError

COST = ImageCost(decode_s=0.0021, pixel_bytes=0.5625e6)


@pytest.mark.parametrize(
    ("num_workers", "cores", "ranks", "expected"),
    [
        (4, 8, 2, "4 threads may give at most 1,900 images/s a rank (8 cores, 2 ranks: limited by threads, data.num_w"),
        (4, 2, 1, "4 threads may give at most 950 images/s a rank (2 cores, 1 rank: limited by cores)"),
        (2, 3, 2, "2 threads may give at most 710 images/s a rank (3 cores, 2 ranks: limited by cores)"),
        (1, 1, 1, "1 thread may give at most 480 images/s a rank (1 core, 1 rank: limited by threads, data.num_work"),
        (0, 4, 1, "training itself does, as data.num_workers=0, at 480 images/s a rank and no more (4 cores, 1 rank)"),
    ],
)
def test_what_limits_is_named(num_workers: int, cores: int, ranks: int, expected: str) -> None:
    line = limits_line(COST, num_workers=num_workers, cores=cores, ranks=ranks, images_per_step=64, buffer_bytes=2**28)
    assert line.startswith("data: one image takes 2.1 ms of a core to read and decode; ")
    assert expected in line
    assert ("buffer 256 MiB holds about 7 steps of 35 MiB" in line) == (num_workers > 0)


def test_a_buffer_for_less_than_a_step() -> None:
    line = limits_line(COST, num_workers=2, cores=2, ranks=1, images_per_step=1024, buffer_bytes=2**28)
    assert line.endswith("buffer 256 MiB holds only 47% of a step of 550 MiB")
    small = replace(COST, pixel_bytes=100.0)
    assert "about 1 step of" in limits_line(
        small, num_workers=2, cores=2, ranks=1, images_per_step=10, buffer_bytes=1999
    )


def test_a_few_images_are_measured(tmp_path: Path, make_shards: Callable[..., Path]) -> None:
    folder = make_shards(tmp_path / "shards", [20, 3], bad=[b"no image"])
    dataset = open_dataset(str(folder), fallback_dir=folder)
    reader = SampleReader(dataset=dataset, rules=DecodeRules(max_member_bytes=2**20, max_pixels=10**6))
    order = Order(shard_counts=dataset.shard_counts, seed=0, shards_per_block=1)
    cost = measure_images(reader, order, position=7)
    assert cost.pixel_bytes == 8 * 8 * 3
    assert 0 < cost.decode_s < 1
    assert usable_cores()


def test_only_samples_of_the_stream_are_measured(tmp_path: Path, make_shards: Callable[..., Path]) -> None:
    """A selection may have left out ones that would end the run."""
    folder = make_shards(tmp_path / "shards", [20, 20], bad=[b"no image"])
    dataset = open_dataset(str(folder), fallback_dir=folder)
    rules = DecodeRules(max_member_bytes=2**20, max_pixels=10**6)
    reader = SampleReader(dataset=dataset, rules=rules)
    bad = next(i for i in range(dataset.num_samples) if isinstance(reader.read_exactly(i), BadRecord))
    first = int(dataset.first_ids[dataset.locate_one(bad)])
    with pytest.raises(UserError, match="and so are 0 that could stand in"):
        SampleReader(dataset=dataset, rules=rules, max_substitutes=0).read(bad)
    strict = SampleReader(dataset=dataset, rules=rules, max_substitutes=0)
    taken = np.array([i for i in range(first, dataset.num_samples) if i != bad])
    selection = Selection(sample_ids=taken, first_slots=np.arange(len(taken) + 1))
    order = MixtureOrder(
        parts=(
            Part(
                order=Order(shard_counts=np.array([len(taken)]), seed=0, shards_per_block=1),
                selection=selection,
                first_id=0,
                shards=np.array([0]),
                epoch_count=len(taken),
            ),
        ),
        seed=0,
    )
    assert measure_images(strict, order).pixel_bytes == 8 * 8 * 3
