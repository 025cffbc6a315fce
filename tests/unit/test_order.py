"""The order of samples: exactly once an epoch, pure, independent of who reads which part."""

from __future__ import annotations

import hashlib
import itertools
import pickle
from dataclasses import replace

import numpy as np
import pytest

from dino_dist.data.order.order import Order, micro_slices, rank_slice


def make_order(counts: list[int], seed: int = 0, shards_per_block: int = 3) -> Order:
    return Order(shard_counts=np.array(counts, dtype=np.int64), seed=seed, shards_per_block=shards_per_block)


COUNTS = [5, 9, 1, 7, 7, 3, 11]  # 43 samples: no batch size divides it


@pytest.mark.parametrize("batch_size", [1, 4, 13, 64, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_exactly_once_an_epoch(batch_size: int, size: int, num_workers: int, accumulate: int) -> None:
    """Every id once in each of three epochs, when workers with orders of their own read the steps in turn."""
    workers = [[make_order(COUNTS) for _ in range(num_workers)] for _ in range(size)]
    num_samples = sum(COUNTS)
    stream: list[tuple[int, int]] = []
    step = 0
    while len(stream) < 3 * num_samples:
        for rank in range(size):
            order = workers[rank][step % num_workers]
            start, stop = rank_slice(step * batch_size, (step + 1) * batch_size, rank, size)
            for first, last in micro_slices(stop - start, accumulate):
                epochs, ids, _ = order.ids(start + first, start + last)
                stream += zip(epochs.tolist(), ids.tolist(), strict=True)
        step += 1
    for epoch in range(3):
        part = stream[epoch * num_samples : (epoch + 1) * num_samples]
        assert {e for e, _ in part} == {epoch}
        assert sorted(i for _, i in part) == list(range(num_samples))


@pytest.mark.parametrize("shards_per_block", [1, 2, 3, 7, 100])
def test_any_part_is_the_part_of_the_whole(shards_per_block: int) -> None:
    whole = make_order(COUNTS, shards_per_block=shards_per_block).ids(0, 200)
    rng = np.random.default_rng(1)
    reader = make_order(COUNTS, shards_per_block=shards_per_block)
    for _ in range(100):
        start, stop = sorted(rng.integers(0, 201, 2).tolist())
        part = reader.ids(start, stop)
        assert all(np.array_equal(some, all_of_them[start:stop]) for some, all_of_them in zip(part, whole, strict=True))
        assert not part.repeats.any()


def test_a_copy_continues_alike_and_carries_no_permutations() -> None:
    order = make_order([1000] * 50)
    before = order.ids(0, 10)
    blob = pickle.dumps(order)
    assert len(blob) < 2000
    assert np.array_equal(pickle.loads(blob).ids(0, 10).sample_ids, before.sample_ids)


def test_a_changed_order_carries_no_permutations_of_the_other() -> None:
    order = make_order(COUNTS)
    order.ids(0, 10)
    changed = replace(order, seed=order.seed + 1)
    fresh = make_order(COUNTS, seed=order.seed + 1)
    assert changed.ids(0, 10).sample_ids.tolist() == fresh.ids(0, 10).sample_ids.tolist()


def test_epochs_and_seeds_differ() -> None:
    num_samples = sum(COUNTS)
    order = make_order(COUNTS)
    epochs = [order.ids(e * num_samples, (e + 1) * num_samples).sample_ids for e in range(3)]
    other = make_order(COUNTS, seed=1).ids(0, num_samples).sample_ids
    for one, two in [(epochs[0], epochs[1]), (epochs[1], epochs[2]), (epochs[0], other)]:
        assert np.mean(one == two) < 0.3


def test_a_block_mixes_its_shards_and_no_others() -> None:
    order = make_order([100] * 12, shards_per_block=4)
    shards = order.ids(0, 1200).sample_ids // 100
    blocks = [shards[start : start + 400] for start in (0, 400, 800)]
    assert sorted(s for block in blocks for s in set(block.tolist())) == list(range(12))
    for block in blocks:
        assert len(set(block.tolist())) == 4
        # Neighbours of the same shard: a quarter if well mixed (399 pairs: standard deviation 0.022).
        assert np.mean(block[1:] == block[:-1]) == pytest.approx(0.25, abs=0.09)


def test_positions_late_in_a_long_run_cost_one_block() -> None:
    order = make_order([100] * 10_000, shards_per_block=4)
    start = 799 * order.samples_per_epoch + 123_456
    epochs, ids, _ = order.ids(start, start + 1000)
    assert set(epochs.tolist()) == {799}
    assert len(set(ids.tolist())) == 1000
    assert len(order._blocks) <= 4


def test_the_order_is_what_it_was() -> None:
    """Golden: a change here changes every run that is resumed."""
    order = Order(shard_counts=np.array([3, 2, 4]), seed=7, shards_per_block=2)
    assert order.ids(0, 18).sample_ids.tolist() == [5, 4, 3, 7, 6, 8, 2, 0, 1, 4, 8, 3, 5, 7, 6, 2, 0, 1]
    large = Order(shard_counts=np.full(50, 1000), seed=11, shards_per_block=16)
    first = [45672, 31502, 28846, 22821, 5522, 38240, 22396, 5012, 22626, 32186, 532, 39922]
    epochs, ids, _ = large.ids(25_000, 150_005)
    assert ids[:12].tolist() == first
    digest = hashlib.sha256(np.stack([epochs, ids]).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "5a8af744f16c84fe"


@pytest.mark.parametrize("shards_per_block", [1, 3, 100])
def test_the_shards_to_come_are_those_that_are_read(shards_per_block: int) -> None:
    """From any position, across epochs: the block at hand in exact order, each later block's shards together."""
    order = make_order(COUNTS, shards_per_block=shards_per_block)
    shard_of = np.repeat(np.arange(len(COUNTS)), COUNTS)
    for position in range(0, 100):
        read = shard_of[order.ids(position, position + 2 * sum(COUNTS)).sample_ids]
        promised = order.shards_from(position, 100)
        assert sorted(promised) == list(range(len(COUNTS)))
        uses = order.first_uses(position)
        for at, shard in itertools.islice(uses, 12):
            assert shard in read[at - position :][: shards_per_block * max(COUNTS)]
        first_used = list(dict.fromkeys(read.tolist()))
        exact = 1 if shards_per_block > 1 else len(COUNTS)  # one shard a block leaves no choice
        for count in range(1, len(COUNTS) + 1):
            assert order.shards_from(position, count) == promised[:count]
        assert promised[:exact] == first_used[:exact]


def test_a_part_of_a_mixture_is_shuffled_in_its_own_way() -> None:
    orders = [Order(shard_counts=np.full(5, 20), seed=3, shards_per_block=2, part=part) for part in range(3)]
    ids = [order.ids(0, 100).sample_ids for order in orders]
    assert all(sorted(some.tolist()) == list(range(100)) for some in ids)
    assert not any(np.array_equal(one, other) for one, other in itertools.combinations(ids, 2))
    assert np.array_equal(ids[0], Order(shard_counts=np.full(5, 20), seed=3, shards_per_block=2).ids(0, 100).sample_ids)


@pytest.mark.parametrize("count", [0, 1, 5, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_slices_are_even_and_join(count: int, size: int) -> None:
    slices = [rank_slice(100, 100 + count, rank, size) for rank in range(size)]
    assert slices[0][0] == 100
    assert slices[-1][1] == 100 + count
    assert all(one[1] == two[0] for one, two in itertools.pairwise(slices))
    lengths = {stop - start for start, stop in slices}
    assert max(lengths) - min(lengths) <= 1
    assert micro_slices(count, size) == [(start - 100, stop - 100) for start, stop in slices]


def test_impossible_arguments() -> None:
    with pytest.raises(ValueError, match="shards_per_block"):
        make_order([1], shards_per_block=0)
    for counts in ([], [1, 0]):
        with pytest.raises(ValueError, match="every shard"):
            make_order(counts)
    with pytest.raises(ValueError, match="start"):
        make_order([5]).ids(3, 2)
    with pytest.raises(ValueError, match="part"):
        Order(shard_counts=np.array([1]), seed=0, shards_per_block=1, part=2**16)
    with pytest.raises(ValueError, match="rank"):
        rank_slice(0, 5, 2, 2)
