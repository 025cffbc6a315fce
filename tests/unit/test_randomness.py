"""The counter-based generator: published vectors, an independent scalar form, and independence of batch and order."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from dino_dist.errors import UserError
from dino_dist.randomness import (
    Purpose,
    below,
    drop_path_uniforms,
    permutation,
    philox_words,
    sample_words,
    substream,
    uniform,
)


def scalar_philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 on Python integers, written from the paper's description of one round."""
    mask = 0xFFFFFFFF
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for round_index in range(10):
        if round_index:
            k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
        high_0, low_0 = divmod(0xD2511F53 * c0, 1 << 32)
        high_1, low_1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(key: tuple[int, int], counter: tuple[int, ...], expected: tuple[int, ...]) -> None:
    words = philox_words(key, np.array([counter], dtype=np.uint32))
    assert words.dtype == np.uint32
    assert tuple(words[0].tolist()) == expected


def test_vectorised_equals_scalar_form() -> None:
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, size=(200, 4), dtype=np.uint32)
    keys = rng.integers(0, 2**32, size=(200, 2), dtype=np.uint32)
    words = philox_words((keys[:, 0], keys[:, 1]), counters)
    for row, key, counter in zip(words.tolist(), keys.tolist(), counters.tolist(), strict=True):
        assert tuple(row) == scalar_philox(tuple(key), tuple(counter))


def test_uniform_and_below_stay_inside_their_range() -> None:
    words = np.array([0, 1, 2**31, 2**32 - 1], dtype=np.uint32)
    assert uniform(words).tolist() == [0.0, 2.0**-32, 0.5, 1.0 - 2.0**-32]
    assert below(words, np.array(7)).tolist() == [0, 0, 3, 6]
    assert below(words, np.array(1)).tolist() == [0, 0, 0, 0]


def test_sample_words_follow_the_documented_layout() -> None:
    sample_id = 5 << 32 | 9
    words = sample_words(11, np.array([3]), np.array([sample_id]), 2, purpose=Purpose.DROP_PATH, num_words=6)
    first, second = (scalar_philox((11, 3), (block | 2 << 8 | 2 << 16, 0, 9, 5)) for block in (0, 1))
    assert tuple(words[0].tolist()) == (*first, *second[:2])
    again = sample_words(11, np.array([3]), np.array([sample_id]), 2, purpose=Purpose.CROP, num_words=4, repeats=7)
    assert tuple(again[0].tolist()) == scalar_philox((11, 3), (2 << 8 | 1 << 16, 7, 9, 5))


def test_a_draw_depends_on_nothing_but_its_own_row() -> None:
    rng = np.random.default_rng(1)
    epochs, ids, views = rng.integers(0, 5, 40), rng.integers(0, 2**62, 40), rng.integers(0, 12, 40)
    whole = sample_words(7, epochs, ids, views, purpose=Purpose.CROP, num_words=33)
    order = rng.permutation(40)
    shuffled = sample_words(7, epochs[order], ids[order], views[order], purpose=Purpose.CROP, num_words=33)
    assert np.array_equal(whole[order], shuffled)
    alone = sample_words(7, epochs[:1], ids[:1], views[:1], purpose=Purpose.CROP, num_words=5)
    assert np.array_equal(whole[:1, :5], alone), "asking for fewer words changed the first ones"


def test_every_coordinate_changes_the_draw() -> None:
    def words(seed: int = 1, epoch: int = 1, sample: int = 1, view: int = 1, purpose: Purpose = Purpose.CROP) -> bytes:
        row = sample_words(seed, np.array([epoch]), np.array([sample]), view, purpose=purpose, num_words=4)
        return row.tobytes()

    draws = [words(), words(seed=2), words(epoch=2), words(sample=2), words(sample=1 | 1 << 32), words(view=2)]
    draws.append(words(purpose=Purpose.MASK))
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 1000])
def test_permutation_is_one(n: int) -> None:
    order = permutation(n, key=(5, 2), stream=substream(Purpose.ORDER_SHARDS))
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


def test_permutation_depends_on_key_and_stream() -> None:
    orders = {
        permutation(50, key=key, stream=stream).tobytes()
        for key in ((0, 0), (0, 1), (1, 0))
        for stream in (substream(Purpose.ORDER_SHARDS), substream(Purpose.ORDER_SAMPLES), substream(Purpose.SPLIT, 1))
    }
    assert len(orders) == 9


def test_permutation_is_pinned() -> None:
    """Runs resume by recomputing the order: these numbers may never change."""
    order = permutation(11, key=(3, 1), stream=substream(Purpose.ORDER_SHARDS))
    assert order.tolist() == [2, 7, 6, 3, 5, 4, 9, 0, 1, 10, 8]


def test_permutations_are_uniform() -> None:
    """All 24 orders of four elements, over 4,800 streams."""
    seen = [tuple(permutation(4, key=(0, 0), stream=substream(Purpose.SPLIT, i)).tolist()) for i in range(4800)]
    counts = np.unique(np.array(seen), axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert chisquare(counts).pvalue > 0.001


def test_drop_path_uniforms() -> None:
    ids, epochs = np.arange(500), np.full(500, 4)
    whole = drop_path_uniforms(9, epochs, ids, 1, 12)
    assert whole.shape == (500, 12, 2)
    assert np.array_equal(whole[[17, 3]], drop_path_uniforms(9, epochs[:2], ids[[17, 3]], 1, 12))
    assert not np.array_equal(whole, drop_path_uniforms(9, epochs, ids, 2, 12))
    assert kstest(whole.ravel(), "uniform").pvalue > 0.001


def test_out_of_range_arguments_are_refused() -> None:
    with pytest.raises(UserError, match=r"run\.seed=-1"):
        permutation(3, key=(-1, 0), stream=0)
    with pytest.raises(ValueError, match="sample id"):
        sample_words(0, np.array([0]), np.array([-1]), 0, purpose=Purpose.CROP, num_words=1)
    with pytest.raises(ValueError, match="view"):
        sample_words(0, np.array([0]), np.array([0]), 256, purpose=Purpose.CROP, num_words=1)
    with pytest.raises(ValueError, match="num_words"):
        drop_path_uniforms(0, np.array([0]), np.array([0]), 0, 513)
