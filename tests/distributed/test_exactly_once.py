"""Through the loader as training uses it, every image comes exactly once an epoch, whoever reads and in what parts.

Of a selection, as often as it says; of a mixture, exactly once in each pass of its own data set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from dino_dist.data.loading.loader import make_loader
from dino_dist.data.order.training_set import TrainingSet, open_training_set
from dino_dist.data.reading.decode import DecodeRules
from dino_dist.data.reading.stream import SampleReader

pytestmark = pytest.mark.distributed

BATCH, EPOCHS = 14, 3
COUNTS = [11, 17, 13, 6]
SPLITS = [(1, 0, 1), (1, 0, 5), (2, 0, 3), (3, 0, 4), (5, 0, 2), (14, 0, 1), (1, 2, 2), (3, 2, 1), (2, 2, 7)]
"""Ranks, decoding threads, micro-batches a step."""

Seen = tuple[int, int, int]
"""Epoch (pass), sample id and repeat of an image."""


def read_all(training_set: TrainingSet, stop_step: int, *, size: int, workers: int, accumulate: int) -> list[Seen]:
    """What the ranks' loaders give in `stop_step` steps, in stream order; they are made again in the middle."""
    order = training_set.order(seed=11, shards_per_block=2)
    steps: dict[int, list[Seen]] = {step: [] for step in range(stop_step)}
    middle = stop_step // 2  # where the loaders are thrown away, as at a resume
    for first, last in ((0, middle), (middle, stop_step)):
        for rank in range(size):
            for step, micro_batches in enumerate(
                make_loader(
                    reader=SampleReader(
                        dataset=training_set.dataset, rules=DecodeRules(max_member_bytes=2**20, max_pixels=10**6)
                    ),
                    order=order,
                    batch_size=BATCH,
                    rank=rank,
                    size=size,
                    accumulate=accumulate,
                    start_step=first,
                    stop_step=last,
                    num_workers=workers,
                    buffer_bytes=2**20,
                ),
                start=first,
            ):
                assert len(micro_batches) == accumulate
                for batch in micro_batches:
                    assert batch.step == step
                    columns = (batch.epochs, batch.sample_ids, batch.repeats)
                    steps[step] += zip(*(column.tolist() for column in columns), strict=True)
    assert all(len(seen) == BATCH for seen in steps.values())
    return [image for step in range(stop_step) for image in steps[step]]


@pytest.mark.parametrize(("size", "workers", "accumulate"), SPLITS)
def test_no_id_is_missed_or_repeated_in_three_epochs(
    size: int, workers: int, accumulate: int, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    shards = make_shards(tmp_path / "shards", COUNTS)
    num_samples = sum(COUNTS)
    stop_step = -(-EPOCHS * num_samples // BATCH)
    training_set = open_training_set(str(shards), fallback_dir=shards)
    seen = read_all(training_set, stop_step, size=size, workers=workers, accumulate=accumulate)
    for epoch in range(EPOCHS):
        part = seen[epoch * num_samples : (epoch + 1) * num_samples]
        assert Counter(part) == Counter((epoch, sample_id, 0) for sample_id in range(num_samples))
    orders = [tuple(i for e, i, _ in seen if e == epoch) for epoch in range(EPOCHS)]
    assert len(set(orders)) == EPOCHS, "two epochs have the same order"


@pytest.fixture
def mixture(make_shards: Callable[..., Path], tmp_path: Path) -> TrainingSet:
    """47 samples at 0.6, and 5 slots of 3 selected ones out of 20 at 0.4: epochs of 52 hold 31 and 21."""
    make_shards(tmp_path / "a", COUNTS)
    make_shards(tmp_path / "b", [10, 10], seed=1)
    (tmp_path / "b.tsv").write_text("3\t1\n11\t3\n19\t1\n")
    sets = "sets: [{shards: a, weight: 0.6}, {shards: b, weight: 0.4, selection: b.tsv}]"
    (tmp_path / "mixture.yaml").write_text(sets)
    return open_training_set(str(tmp_path / "mixture.yaml"), fallback_dir=tmp_path)


@pytest.mark.parametrize(("size", "workers", "accumulate"), SPLITS[2:])
def test_a_mixture_keeps_its_counts_and_each_set_its_passes(
    size: int, workers: int, accumulate: int, mixture: TrainingSet
) -> None:
    assert mixture.num_samples == 52
    stop_step = -(-EPOCHS * 52 // BATCH)
    seen = read_all(mixture, stop_step, size=size, workers=workers, accumulate=accumulate)
    for epoch in range(EPOCHS):
        assert sum(sample_id < 47 for _, sample_id, _ in seen[epoch * 52 : (epoch + 1) * 52]) == 31
    one_pass = {True: [(i, 0) for i in range(47)], False: [(50, 0), (58, 0), (58, 1), (58, 2), (66, 0)]}
    for of_the_first, expected in one_pass.items():
        mine = [image for image in seen if (image[1] < 47) == of_the_first]
        for number in range(len(mine) // len(expected)):
            part = mine[number * len(expected) : (number + 1) * len(expected)]
            assert Counter(part) == Counter((number, *image) for image in expected)
    assert len(set(seen)) == len(seen), "each image has a key of its own, and with it crops of its own"
