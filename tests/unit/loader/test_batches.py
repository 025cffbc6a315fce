"""The same batches whoever reads them: any ranks, accumulation, threads, buffers and device."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_dist.data.loading.loader import Batch, read_batch
from dino_dist.data.order.order import StreamIds
from dino_dist.errors import UserError


def describe(ids: StreamIds, sizes: NDArray[np.int64]) -> dict[str, Tensor]:
    return {
        "code": torch.from_numpy(ids.sample_ids * 1000 + ids.epochs + ids.repeats),
        "area": torch.from_numpy(sizes.prod(axis=1).astype(np.float32)[None]),
        "odd": torch.from_numpy(sizes % 2 == 1),
    }


def same(one: Batch, two: Batch) -> bool:
    tensors = ("pixels", "sizes", "sample_ids", "epochs", "repeats", "labels")
    return (
        all(torch.equal(getattr(one, name), getattr(two, name)) for name in tensors)
        and (one.step, one.bad) == (two.step, two.bad)
        and one.extra.keys() == two.extra.keys()
        and all(torch.equal(one.extra[name], two.extra[name]) for name in one.extra)
    )


def all_same(ones: list[list[Batch]], twos: list[list[Batch]]) -> bool:
    return len(ones) == len(twos) and all(
        len(one) == len(two) and all(map(same, one, two)) for one, two in zip(ones, twos, strict=True)
    )


def test_a_batch_is_the_images_of_its_ids(
    shards: Path, open_parts: Callable[[Path], dict[str, Any]], load: Callable[..., Generator[list[Batch]]]
) -> None:
    parts = open_parts(shards)
    (batch,) = next(load(parts, batch_size=19, start_step=1, stop_step=2))
    assert batch.step == 1
    assert set(batch.epochs.tolist()) == {1}
    assert set(batch.repeats.tolist()) == {0}
    assert sorted(batch.sample_ids.tolist()) == list(range(19))
    offset = 0
    for (height, width), sample_id, label in zip(
        batch.sizes.tolist(), batch.sample_ids.tolist(), batch.labels.tolist(), strict=True
    ):
        sample = parts["reader"].read(sample_id)
        stored = batch.pixels[offset : offset + height * width * 3].reshape(height, width, 3)
        assert torch.equal(stored, torch.from_numpy(sample.pixels))
        assert label == sample.label
        offset += height * width * 3
    assert offset == len(batch.pixels)
    assert [record.sample_id for record in batch.bad] == [7]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_and_micro_batches_join_to_the_whole(
    shards: Path,
    open_parts: Callable[[Path], dict[str, Any]],
    load: Callable[..., Generator[list[Batch]]],
    size: int,
    accumulate: int,
) -> None:
    parts = open_parts(shards)
    by_rank = [
        list(
            load(
                parts,
                batch_size=8,
                rank=rank,
                size=size,
                accumulate=accumulate,
                start_step=2,
                stop_step=7,
                describe=describe,
            )
        )
        for rank in range(size)
    ]
    for step in range(5):
        batches = [batch for rank in range(size) for batch in by_rank[rank][step]]
        assert len(batches) == size * accumulate
        assert max(b.num_images for b in batches) - min(b.num_images for b in batches) <= 2
        start = (step + 2) * 8
        ids = parts["order"].ids(start, start + 8)
        assert torch.cat([batch.sample_ids for batch in batches]).tolist() == ids.sample_ids.tolist()
        assert torch.cat([batch.epochs for batch in batches]).tolist() == ids.epochs.tolist()
        codes = torch.cat([batch.extra["code"] for batch in batches])
        assert codes.tolist() == (ids.sample_ids * 1000 + ids.epochs).tolist()


@pytest.mark.distributed
def test_threads_and_buffers_change_nothing(
    shards: Path, open_parts: Callable[[Path], dict[str, Any]], load: Callable[..., Generator[list[Batch]]]
) -> None:
    """Also: all batches are held to the end, in a buffer that holds but one or two of them: they own their memory."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    wanted = list(load(open_parts(shards), batch_size=6, stop_step=9, rank=1, size=2, accumulate=2, describe=describe))
    # Each of the three extras starts at a multiple of 64 bytes, and has fewer.
    largest = max(batch.pixels.nbytes for batches in wanted for batch in batches) + 4 * 64
    for num_workers, buffer_bytes in ((1, largest), (3, largest), (2, 2**20)):
        results = list(
            load(
                open_parts(shards),
                batch_size=6,
                stop_step=9,
                rank=1,
                size=2,
                accumulate=2,
                describe=describe,
                num_workers=num_workers,
                buffer_bytes=buffer_bytes,
            )
        )
        assert all_same(wanted, results)
    assert torch.equal(torch.get_rng_state(), before)  # the loader draws nothing from the process's generator


@pytest.mark.distributed
def test_memory_of_batches_that_nobody_holds_is_used_again(
    shards: Path, open_parts: Callable[[Path], dict[str, Any]], load: Callable[..., Generator[list[Batch]]]
) -> None:
    loader = load(open_parts(shards), batch_size=5, stop_step=40, num_workers=1)
    held = next(loader)[0]
    pixels = held.pixels[3:]  # a view keeps the memory as well
    copy = pixels.clone()
    del held
    places = set()
    for (batch,) in loader:
        assert batch.pixels.data_ptr() != pixels.data_ptr() - 3
        places.add(batch.pixels.data_ptr())
        del batch
    assert len(places) <= 8  # of 39 batches; sizes differ, and a few are spare
    assert torch.equal(pixels, copy)


@pytest.mark.distributed
def test_micro_batches_larger_than_the_buffer_pass_beside_it(
    shards: Path,
    open_parts: Callable[[Path], dict[str, Any]],
    load: Callable[..., Generator[list[Batch]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All of them, or some; said once, or not where there are none."""
    wanted = list(load(open_parts(shards), batch_size=10, stop_step=12, accumulate=2, describe=describe))
    sizes = sorted(batch.pixels.nbytes for batches in wanted for batch in batches)
    for buffer_bytes in (sizes[0] // 2, sizes[len(sizes) // 2] + 100, 2**16):
        caplog.clear()
        loader = load(
            open_parts(shards),
            batch_size=10,
            stop_step=12,
            accumulate=2,
            describe=describe,
            num_workers=2,
            buffer_bytes=buffer_bytes,
        )
        assert all_same(wanted, list(loader))
        assert len(caplog.messages) == (buffer_bytes < sizes[-1])
        for line in caplog.messages:
            assert (
                f"a micro-batch of 5 images that take 1 MiB, more than data.buffer_mib={buffer_bytes / 2**20:g}" in line
            )


@pytest.mark.parametrize("with_extras", [False, True])
def test_some_samples_by_their_ids(
    shards: Path,
    open_parts: Callable[[Path], dict[str, Any]],
    load: Callable[..., Generator[list[Batch]]],
    with_extras: bool,
) -> None:
    parts = open_parts(shards)
    (whole,) = next(load(parts, batch_size=19, stop_step=1, describe=describe))
    ids = parts["order"].ids(3, 7)
    batch = read_batch(parts["reader"], ids, describe=describe if with_extras else None)
    assert torch.equal(batch.sizes, whole.sizes[3:7])
    assert torch.equal(batch.labels, whole.labels[3:7])
    starts = [0, *whole.sizes.prod(dim=1).mul(3).cumsum(0).tolist()]
    assert torch.equal(batch.pixels, whole.pixels[starts[3] : starts[7]])
    assert batch.extra.keys() == ({"code", "area", "odd"} if with_extras else set())
    assert read_batch(parts["reader"], parts["order"].ids(3, 3)).num_images == 0


def test_moving_a_batch_keeps_ids_and_sizes_here(
    shards: Path, open_parts: Callable[[Path], dict[str, Any]], load: Callable[..., Generator[list[Batch]]]
) -> None:
    (batch,) = next(load(open_parts(shards), batch_size=4, stop_step=1, describe=describe))
    moved = batch.to(torch.device("meta"))
    assert moved.pixels.is_meta
    assert moved.extra["area"].is_meta
    for name in ("sizes", "sample_ids", "epochs", "repeats", "labels"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies on a stream of their own need a CUDA device")
@pytest.mark.parametrize("buffer_bytes", [5_000, 2**20])
def test_batches_on_a_gpu(
    shards: Path,
    open_parts: Callable[[Path], dict[str, Any]],
    load: Callable[..., Generator[list[Batch]]],
    buffer_bytes: int,
) -> None:
    """Each step is used by work that is queued behind other work, while later steps are copied."""
    device = torch.device("cuda")
    wanted = list(load(open_parts(shards), batch_size=6, stop_step=30, accumulate=2, describe=describe))
    loader = load(
        open_parts(shards),
        batch_size=6,
        stop_step=30,
        accumulate=2,
        describe=describe,
        num_workers=2,
        buffer_bytes=buffer_bytes,
        device=device,
    )
    busy = torch.randn(2048, 2048, device=device)
    results = []
    for batches in loader:
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        assert all(batch.pixels.device.type == "cuda" for batch in batches)
        results.append([replace(batch, pixels=batch.pixels + (busy[0, 0] * 0).byte()) for batch in batches])
    cpu = torch.device("cpu")
    assert all_same(wanted, [[batch.to(cpu) for batch in batches] for batches in results])


def test_impossible_shares_are_refused(
    shards: Path, open_parts: Callable[[Path], dict[str, Any]], load: Callable[..., Generator[list[Batch]]]
) -> None:
    with pytest.raises(UserError, match="at least 6 images"):
        load(open_parts(shards), batch_size=5, rank=0, size=3, accumulate=2, stop_step=1)
