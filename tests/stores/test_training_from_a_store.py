"""The loader on a store that fails: batch for batch what local shards give, each sample once an epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_dist.config import DataSection
from dino_dist.data.loading.loader import Batch, make_loader
from dino_dist.data.order.order import Order
from dino_dist.data.reading.decode import DecodeRules
from dino_dist.data.reading.shard_bytes import ShardBytes, StoreOptions
from dino_dist.data.reading.stream import SampleReader
from dino_dist.data.shards.index import open_dataset
from dino_dist.errors import UserError
from dino_dist.inputs import labelled_set, training_set

KINDS = ("reset", "cut", "500", "503", "stall", "wrong", "whole", "elsewhere")
BATCH_SIZE = 16
EPOCHS = 2


@pytest.fixture(scope="module")
def shards(make_shards: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_shards(tmp_path_factory.mktemp("train") / "shards", [40, 48, 40, 32])
    open_dataset(str(folder), fallback_dir=folder)
    return folder


def batches(spec: str, index_dir: Path, store: StoreOptions, *, num_workers: int, stop_step: int) -> list[Batch]:
    dataset = open_dataset(spec, fallback_dir=index_dir, store=store)
    reader = SampleReader(
        dataset=dataset,
        rules=DecodeRules(max_member_bytes=2**20, max_pixels=10**4),
        source=ShardBytes(dataset=dataset, options=store),
    )
    loader = make_loader(
        reader=reader,
        order=Order(shard_counts=dataset.shard_counts, seed=5, shards_per_block=2),
        batch_size=BATCH_SIZE,
        rank=0,
        size=1,
        start_step=0,
        stop_step=stop_step,
        num_workers=num_workers,
        buffer_bytes=2**20,
    )
    return [batch for step in loader for batch in step]


@pytest.mark.distributed
@pytest.mark.parametrize("cached", [False, True])
def test_batches_are_those_of_local_shards(
    shards: Path, serve: Any, seeded_plan: Any, tmp_path: Path, cached: bool
) -> None:
    server = serve(shards)
    stop_step = EPOCHS * 160 // BATCH_SIZE
    expected = batches(str(shards), shards, StoreOptions(), num_workers=0, stop_step=stop_step)
    server.plan = seeded_plan(2, KINDS, 1)
    cache_dir = str(tmp_path / "cache") if cached else None
    store = StoreOptions(timeout_s=0.4, max_attempts=16, cache_dir=cache_dir)
    read = batches(f"{server.url}/", tmp_path / "index", store, num_workers=4, stop_step=stop_step)
    assert len(read) == len(expected) == stop_step
    for one, other in zip(read, expected, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.sample_ids, other.sample_ids)
        assert torch.equal(one.labels, other.labels)
        assert not one.bad
    ids = torch.cat([batch.sample_ids for batch in read]).reshape(EPOCHS, -1)
    assert torch.equal(ids.sort(dim=1).values, torch.arange(160).expand(EPOCHS, -1))
    assert sum(server.injected.values()) > (3 if cached else 60)


@pytest.mark.distributed
def test_a_store_that_refuses_ends_the_run_in_one_line(shards: Path, serve: Any, tmp_path: Path) -> None:
    server = serve(shards)
    server.plan = lambda place, number: "403" if place.startswith("/2.tar ") and not place.endswith("bytes=0-0") else ""
    with pytest.raises(UserError, match=rf"^{server.url}/2\.tar: HTTP 403 [^\n]*$"):
        batches(f"{server.url}/", tmp_path / "index", StoreOptions(), num_workers=4, stop_step=10)


def test_shards_of_a_store_are_indexed_once_for_all_runs(shards: Path, serve: Any, tmp_path: Path) -> None:
    """`shards index --index-dir` and `data.index_dir` are one folder, wherever the run's own is."""
    server = serve(shards)
    spec, home = f"{server.url}/{{0..3}}.tar", tmp_path / "indexes"
    before = labelled_set(spec, DataSection(), home)
    assert before.shards[0].index_path.is_relative_to(home)
    asked = server.requests_of("/0.tar")
    for run in ("one", "two"):
        samples = training_set(DataSection(train=spec, index_dir=str(home)), tmp_path / run / "index")
        assert samples.dataset.hash == before.hash
        assert samples.dataset.shards[0].index_path == before.shards[0].index_path
        assert not (tmp_path / run).exists()
    assert server.requests_of("/0.tar") - asked <= 2, "each run may look whether the size is still the same"
