"""Through the loader as training uses it, every image comes exactly once an epoch, whoever reads and in what parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from dino_dist.data.decode import DecodeRules
from dino_dist.data.index import open_dataset
from dino_dist.data.loader import make_loader
from dino_dist.data.order import Order
from dino_dist.data.stream import SampleReader

pytestmark = pytest.mark.distributed

BATCH, EPOCHS = 14, 3
COUNTS = [11, 17, 13, 6]


@pytest.mark.parametrize(
    ("size", "workers", "accumulate"),
    [(1, 0, 1), (1, 0, 5), (2, 0, 3), (3, 0, 4), (5, 0, 2), (14, 0, 1), (1, 2, 2), (3, 2, 1), (2, 2, 7)],
)
def test_no_id_is_missed_or_repeated_in_three_epochs(
    size: int, workers: int, accumulate: int, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    shards = make_shards(tmp_path / "shards", COUNTS)
    dataset = open_dataset(str(shards), fallback_dir=shards)
    num_samples = sum(COUNTS)
    stop_step = -(-EPOCHS * num_samples // BATCH)
    middle = stop_step // 2  # where the loaders are thrown away and made again, as at a resume
    seen: list[tuple[int, int, int]] = []
    for first, last in ((0, middle), (middle, stop_step)):
        for rank in range(size):
            for micro_batches in make_loader(
                SampleReader(dataset=dataset, rules=DecodeRules(max_member_bytes=2**20, max_pixels=10**6)),
                Order(shard_counts=dataset.shard_counts, seed=11, shards_per_block=2),
                batch_size=BATCH,
                rank=rank,
                size=size,
                accumulate=accumulate,
                start_step=first,
                stop_step=last,
                num_workers=workers,
            ):
                assert len(micro_batches) == accumulate
                for batch in micro_batches:
                    positions = range(batch.position, batch.position + batch.num_images)
                    seen += zip(positions, batch.epochs.tolist(), batch.sample_ids.tolist(), strict=True)
    seen.sort()
    assert [position for position, _, _ in seen] == list(range(stop_step * BATCH))
    for epoch in range(EPOCHS):
        part = seen[epoch * num_samples : (epoch + 1) * num_samples]
        assert {found for _, found, _ in part} == {epoch}
        assert Counter(sample_id for _, _, sample_id in part) == Counter(range(num_samples))
    orders = [tuple(i for _, e, i in seen if e == epoch) for epoch in range(EPOCHS)]
    assert len(set(orders)) == EPOCHS, "two epochs have the same order"
