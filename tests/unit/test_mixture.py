"""Mixtures: exact shares, evenly spread, each data set without repetition, all of it known from the position alone."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from dino_dist.data.order.mixture import WINDOW, MixtureOrder, Part, apportioned, counts_before
from dino_dist.data.order.order import Order, StreamIds
from dino_dist.data.order.selection import Selection


def make_mixture(
    sets: list[tuple[list[int], int]], *, seed: int = 0, shards_per_block: int = 2, selected: Selection | None = None
) -> MixtureOrder:
    """Of (samples of each shard, samples an epoch) pairs; `selected` selects in the last of them."""
    parts = []
    first_id = first_shard = 0
    for number, (shard_counts, epoch_count) in enumerate(sets):
        counts = np.array(shard_counts, dtype=np.int64)
        selection = selected if number == len(sets) - 1 else None
        slots = counts
        if selection is not None:
            slots = np.diff(selection.slots_below(np.concatenate([[0], np.cumsum(counts)])))
        parts.append(
            Part(
                order=Order(shard_counts=slots[slots > 0], seed=seed, shards_per_block=shards_per_block, part=number),
                selection=selection,
                first_id=first_id,
                shards=np.flatnonzero(slots) + first_shard,
                epoch_count=epoch_count,
            )
        )
        first_id += int(counts.sum())
        first_shard += len(counts)
    return MixtureOrder(parts=tuple(parts), seed=seed)


SETS = [([5, 9, 1], 40), ([7, 7, 3, 11], 5), ([2], 7), ([100, 200], 2948)]
"""15, 28, 2 and 300 samples in epochs of 3000: 2.7 passes, 0.18, 3.5 and 9.8."""
BOUNDS = np.cumsum([15, 28, 2, 300])
REPEATED = Selection(sample_ids=np.array([3, 99, 100, 250]), first_slots=np.array([0, 2, 3, 7, 8]))
"""Sample 3 twice, 99 once, 100 four times, 250 once."""


def set_of(ids: np.ndarray) -> np.ndarray:
    return np.searchsorted(BOUNDS, ids, side="right")


def rows(stream: StreamIds) -> list[tuple[int, int, int]]:
    return list(zip(*(column.tolist() for column in stream), strict=True))


def test_every_epoch_has_the_exact_counts() -> None:
    order = make_mixture(SETS)
    for epoch in (0, 1, 2, 1000):
        ids = order.ids(epoch * 3000, (epoch + 1) * 3000).sample_ids
        assert np.bincount(set_of(ids)).tolist() == [40, 5, 7, 2948]


def test_each_set_passes_through_its_samples_exactly_once_a_pass() -> None:
    epochs, ids, repeats = make_mixture(SETS).ids(0, 20 * 3000)
    assert not repeats.any()
    for number, first in enumerate([0, *BOUNDS[:-1]]):
        mine = set_of(ids) == number
        size = int(BOUNDS[number] - first)
        passes, own_ids = epochs[mine], ids[mine] - first
        assert np.array_equal(passes, np.arange(len(passes)) // size), "passes follow each other, in full"
        for number_of_pass in range(len(passes) // size):
            assert sorted(own_ids[passes == number_of_pass].tolist()) == list(range(size))


def test_repeats_of_a_selection_come_with_their_own_replicas() -> None:
    order = make_mixture([([30, 30], 24), ([50, 50, 50, 50, 100], 16)], selected=REPEATED)
    stream = order.ids(0, 400)
    mine = stream.sample_ids >= 60
    passes = np.array(rows(stream))[mine]
    assert len(passes) == 160
    expected = sorted([(63, 0), (63, 1), (159, 0), *[(160, r) for r in range(4)], (310, 0)])
    for number in range(160 // 8):
        assert sorted((i, r) for e, i, r in passes.tolist() if e == number) == expected
    assert len(set(map(tuple, passes.tolist()))) == 160, "no two have the same key, so no two get the same crops"


def test_any_part_is_the_part_of_the_whole() -> None:
    whole = rows(make_mixture(SETS, selected=REPEATED).ids(0, 7000))
    rng = np.random.default_rng(2)
    for _ in range(40):
        start, stop = sorted(rng.integers(0, 7001, 2).tolist())
        assert rows(make_mixture(SETS, selected=REPEATED).ids(start, stop)) == whole[start:stop], "as after a resume"
    cuts = [0, *sorted(rng.integers(0, 7001, 60).tolist()), 7000]
    reader = make_mixture(SETS, selected=REPEATED)
    pieces = [rows(reader.ids(start, stop)) for start, stop in itertools.pairwise(cuts)]
    assert list(itertools.chain.from_iterable(pieces)) == whole


def test_a_position_late_in_a_long_run_costs_no_more() -> None:
    shards = [1000] * 2000
    order = make_mixture([(shards, 10**9), (shards, 3 * 10**8), ([10], 7)])
    start = 700 * order.samples_per_epoch + 123_456_789
    stream = order.ids(start, start + 5000)
    assert np.bincount(np.searchsorted([2 * 10**6, 4 * 10**6], stream.sample_ids, side="right")).tolist() == (
        pytest.approx([5000 / 1.3, 5000 * 0.3 / 1.3], abs=30)
    )
    assert len(order._windows) <= 8
    assert all(len(part.order._blocks) <= 4 for part in order.parts)


@pytest.mark.parametrize("counts", [[700, 300], [1, 9999], [3333, 3333, 3334], [5] * 60, [10, 20, 30, 40, 5000]])
def test_every_window_has_its_share_of_each_set(counts: list[int]) -> None:
    """To within the bound that `counts_before` states, at both its ends."""
    order = make_mixture([([4], count) for count in counts])
    total = sum(counts)
    whose = order.ids(0, 2 * total).sample_ids // 4
    for epoch in range(2):
        for start in range(0, total, WINDOW):
            window = whose[epoch * total + start : epoch * total + min(start + WINDOW, total)]
            found = np.bincount(window, minlength=len(counts))
            shares = np.array(counts) / total
            assert (np.abs(found - len(window) * shares) <= 1 + (2 + len(counts)) * shares + 1e-9).all()


def test_within_a_window_the_sets_are_shuffled() -> None:
    """Evenly dealt sets must not beat in time with the ranks: where a rare set comes in its window is uniform."""
    order = make_mixture([([8], 7 * WINDOW), ([8], WINDOW)])
    epochs = 4
    whose = order.ids(0, epochs * 8 * WINDOW).sample_ids // 8
    places = np.flatnonzero(whose == 1) % WINDOW
    assert kstest(places / WINDOW, "uniform").pvalue > 0.01
    of_four_ranks = np.bincount(np.flatnonzero(whose == 1) % 4)
    assert np.ptp(of_four_ranks) < 0.15 * of_four_ranks.mean()
    windows = whose.reshape(-1, WINDOW)
    assert len({window.tobytes() for window in windows}) == len(windows), "no two windows are dealt alike"


def test_seeds_epochs_and_parts_differ() -> None:
    sets = [([10, 10, 10], 30), ([10, 10, 10], 30)]
    one, other = make_mixture(sets).ids(0, 120).sample_ids, make_mixture(sets, seed=1).ids(0, 120).sample_ids
    assert np.mean(one == other) < 0.2
    assert np.mean(one[:60] == one[60:]) < 0.2
    first, second = one[one < 30], one[one >= 30] - 30
    assert np.mean(first == second) < 0.3


@pytest.mark.parametrize("epoch_samples", [43, 7, 100])
def test_a_mixture_of_one_is_its_data_set(epoch_samples: int) -> None:
    counts = [5, 9, 1, 7, 7, 3, 11]
    plain = Order(shard_counts=np.array(counts), seed=5, shards_per_block=3)
    order = make_mixture([(counts, epoch_samples)], seed=5, shards_per_block=3)
    assert order.samples_per_epoch == epoch_samples
    assert rows(order.ids(0, 300)) == rows(plain.ids(0, 300))
    assert order.shards_from(20, 4) == plain.shards_from(20, 4)


def test_the_shards_to_come_are_those_that_are_read_soonest() -> None:
    order = make_mixture([([20] * 10, 300), ([20] * 10, 100)], shards_per_block=1)
    shard_of = np.repeat(np.arange(20), 20)
    for position in range(0, 900, 37):
        read = list(dict.fromkeys(shard_of[order.ids(position, position + 1000).sample_ids].tolist()))
        promised = order.shards_from(position, 8)
        assert len(set(promised)) == 8
        open_now = {next(shard for shard in read if shard < 10), next(shard for shard in read if shard >= 10)}
        assert set(promised[:2]) == open_now
        assert len(set(promised) - set(read[:10])) <= 1, "to within the shuffle of the sets"
        assert sorted(order.shards_from(position, 100)) == list(range(20))


def test_shards_without_selected_samples_are_never_asked_for() -> None:
    order = make_mixture([([30, 30], 24), ([50, 50, 50, 50, 100], 16)], selected=REPEATED)
    assert sorted(order.shards_from(3, 100)) == [0, 1, 2, 3, 4, 6]


def test_a_copy_continues_alike_and_carries_no_permutations() -> None:
    order = make_mixture([([1000] * 50, 5000), ([1000] * 50, 5000)])
    before = order.ids(0, 3000)
    blob = pickle.dumps(order)
    assert len(blob) < 5000
    assert rows(pickle.loads(blob).ids(0, 3000)) == rows(before)


def test_a_changed_order_carries_no_permutations_of_the_other() -> None:
    order = make_mixture(SETS)
    order.ids(0, 100)
    changed, fresh = replace(order, seed=order.seed + 1), MixtureOrder(parts=order.parts, seed=order.seed + 1)
    assert changed.ids(0, 100).sample_ids.tolist() == fresh.ids(0, 100).sample_ids.tolist()


def test_the_order_is_what_it_was() -> None:
    """Golden: a change here changes every run that is resumed."""
    order = make_mixture([([3, 2], 4), ([4], 6)], seed=7)
    assert order.ids(0, 20).sample_ids.tolist() == [8, 5, 7, 6, 0, 4, 3, 6, 2, 7, 5, 8, 8, 1, 7, 1, 2, 6, 3, 5]
    assert order.ids(0, 20).epochs.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 1, 1, 2, 0, 2, 1, 1, 2, 1, 2]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_places_are_given_out_one_by_one_and_evenly(counts: list[int]) -> None:
    total = sum(counts)
    before = np.zeros(len(counts), dtype=np.int64)
    shares = np.array(counts) / total
    for position in range(total + 1):
        now = counts_before(position, counts)
        assert now.sum() == position
        assert (now >= before).all()
        assert (np.abs(now - position * shares) <= 0.5 + (1 + len(counts) / 2) * shares + 1e-9).all()
        before = now
    assert before.tolist() == counts


def test_places_are_exact_beyond_64_bits() -> None:
    counts = [10**12 - 1, 10**12, 3]
    total = sum(counts)
    for position in (0, 1, total // 3, total - 1, total):
        given_out = counts_before(position, counts)
        assert int(given_out.sum()) == position
        for found, count in zip(given_out.tolist(), counts, strict=True):
            assert abs(found - Fraction(position * count, total)) <= 3
    for position in (-1, total + 1):
        with pytest.raises(ValueError, match="position"):
            counts_before(position, counts)


@given(
    st.lists(st.fractions(min_value=Fraction(1, 1000), max_value=1000), min_size=1, max_size=9),
    st.integers(0, 10_000),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_largest_remainders(weights: list[Fraction], total: int) -> None:
    counts = apportioned(weights, total)
    assert sum(counts) == total
    quotas = [total * weight / sum(weights) for weight in weights]
    assert all(abs(count - quota) < 1 for count, quota in zip(counts, quotas, strict=True))
    up = [quota % 1 for count, quota in zip(counts, quotas, strict=True) if count > quota]
    down = [quota % 1 for count, quota in zip(counts, quotas, strict=True) if count < quota]
    assert not up or not down or min(up) >= max(down), "who is rounded up has no smaller remainder"


def test_apportioned_by_hand() -> None:
    assert apportioned([Fraction(w) for w in (7, 2, 1)], 10) == [7, 2, 1]
    assert apportioned([Fraction(1)] * 3, 10) == [4, 3, 3]
    assert apportioned([Fraction(0.5), Fraction(0.25), Fraction(0.25)], 7) == [3, 2, 2]
    assert apportioned([Fraction(1), Fraction(10**9)], 100) == [0, 100]
    assert Counter(apportioned([Fraction(5)] * 7, 100)) == {15: 2, 14: 5}


def test_impossible_arguments() -> None:
    with pytest.raises(ValueError, match="parts"):
        MixtureOrder(parts=(), seed=0)
    with pytest.raises(ValueError, match="sample an epoch"):
        make_mixture([([3], 0)])
    with pytest.raises(ValueError, match="start"):
        make_mixture(SETS).ids(3, 2)


def test_the_next_shards_are_found_beside_a_small_set_that_repeats() -> None:
    """A set of one shard passes through it hundreds of times while the other comes to its next: looked at once."""
    order = make_mixture([([10], 9_000), ([1_000] * 70, 1_000)], seed=7)
    uses = list(order._first_uses(order.parts[0], 0))
    assert len(uses) == 1
    assert sorted(order.shards_from(5, 71)) == list(range(71))
