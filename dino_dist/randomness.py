"""Counter-based random numbers: every draw is a pure function of (seed, epoch, purpose, sample id, view).

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Nothing here
has state, so a draw is the same on any rank, in any worker, in any batch and in any order, and no generator state has
to be saved for an exact resume.

Layout of the 128-bit counter (four 32-bit words) under the 64-bit key (seed, epoch):

    word 0: block (bits 0-7) | view (bits 8-15) | purpose (bits 16-31)
    word 1: repeat (which one, of a sample that an epoch holds several times); for a permutation, the index of the pair
        of elements
    words 2, 3: sample id, low and high half; for a permutation, the stream

Fields lie side by side and are never mixed by xor, so two different draws can never share a counter.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from dino_dist.errors import UserError

Words = NDArray[np.uint32]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))  # added to the key between rounds
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MAX_WORDS = 4 * 256  # the block field has eight bits


class Purpose(IntEnum):
    """What a draw is for. Numbers are part of the reproducibility contract: add, never renumber."""

    CROP = 1
    DROP_PATH = 2
    ORDER_SHARDS = 3
    ORDER_SAMPLES = 4
    INIT = 5
    PERMUTATION = 6
    MASK = 7
    SPLIT = 8
    MIXTURE = 9


def philox_words(key: tuple[int | Words, int | Words], counters: Words) -> Words:
    """Philox4x32-10 of each row of `counters` [n, 4]; returns uint32 [n, 4].

    A half of the key is one number for all rows, or an array of n.
    """
    counter = np.ascontiguousarray(np.asarray(counters, dtype=np.uint32).T)
    words = [counter[i].astype(np.uint64) for i in range(4)]
    keys = [np.asarray(half, dtype=np.uint32).reshape(-1) for half in key]
    for _ in range(_ROUNDS):
        product_0, product_2 = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            (product_2 >> _HALF) ^ words[1] ^ keys[0],
            product_2 & _LOW,
            (product_0 >> _HALF) ^ words[3] ^ keys[1],
            product_0 & _LOW,
        ]
        keys = [half + weyl for half, weyl in zip(keys, _WEYL, strict=True)]  # arrays wrap silently, as wanted
    return np.stack(words, axis=1).astype(np.uint32)


def uniform(words: Words) -> NDArray[np.float64]:
    """Numbers in [0, 1) with the 32 bits of each word: w / 2^32, exact in float64, same shape."""
    return words.astype(np.float64) * 2.0**-32


def below(words: Words, bound: NDArray[np.int64]) -> NDArray[np.int64]:
    """Integers in [0, bound): the high half of word * bound, in integers alone; `bound` broadcasts, 1 <= bound <= 2^32.

    The bias is below bound / 2^32, far below what a crop offset could show.
    """
    return ((words.astype(np.uint64) * bound.astype(np.uint64)) >> _HALF).astype(np.int64)


def sample_words(
    seed: int,
    epochs: NDArray[np.int64],
    sample_ids: NDArray[np.int64],
    views: int | NDArray[np.int64],
    *,
    purpose: Purpose,
    num_words: int,
    repeats: int | NDArray[np.int64] = 0,
) -> Words:
    """The first `num_words` words of the draw of each (epoch, sample id, repeat, view); uint32 [n, num_words].

    `epochs` and `sample_ids` are [n], `views` and `repeats` (which repeat of the sample in its epoch) one number
    or [n].
    Asking for more words never changes the first ones.
    """
    _check_seed(seed)
    if not 0 < num_words <= _MAX_WORDS:
        raise ValueError(f"num_words={num_words} must be 1..{_MAX_WORDS}")
    epochs = _in_range("epoch", np.asarray(epochs, dtype=np.int64), 2**32)
    views = _in_range("view", np.broadcast_to(np.asarray(views, dtype=np.int64), epochs.shape), 2**8)
    repeats = _in_range("repeat", np.broadcast_to(np.asarray(repeats, dtype=np.int64), epochs.shape), 2**32)
    ids = _in_range("sample id", np.asarray(sample_ids, dtype=np.int64), 2**63)
    num_blocks = -(-num_words // 4)
    blocks = np.arange(num_blocks, dtype=np.int64)
    counters = np.zeros((len(ids), num_blocks, 4), dtype=np.uint32)
    counters[:, :, 0] = (blocks | (views << 8)[:, None]) | (int(purpose) << 16)
    counters[:, :, 1] = repeats[:, None]
    counters[:, :, 2] = (ids & 0xFFFFFFFF)[:, None]
    counters[:, :, 3] = (ids >> 32)[:, None]
    epoch_key = np.repeat(epochs, num_blocks).astype(np.uint32)
    words = philox_words((seed, epoch_key), counters.reshape(-1, 4))
    return words.reshape(len(ids), num_blocks * 4)[:, :num_words]


def substream(purpose: Purpose, index: int = 0) -> int:
    """The stream of `permutation` for the index-th permutation of one purpose, such as a block of shards."""
    if not 0 <= index < 2**32:
        raise ValueError(f"index={index} must be 0..2^32-1")
    return int(purpose) | index << 32


def permutation(n: int, *, key: tuple[int, int], stream: int) -> NDArray[np.int64]:
    """A permutation of range(n) that depends on (n, key, stream) only; key = (seed, epoch), 0 <= stream < 2^63.

    The stable argsort of n 64-bit words: ties (never seen in practice) keep their order, so the result is defined by
    the words alone, whatever the NumPy version.
    """
    _check_seed(key[0])
    if n < 0 or not 0 <= stream < 2**63:
        raise ValueError(f"n={n} must not be negative and stream={stream} must be 0..2^63-1")
    num_pairs = -(-n // 2)
    counters = np.zeros((num_pairs, 4), dtype=np.uint32)
    counters[:, 0] = int(Purpose.PERMUTATION) << 16
    counters[:, 1] = np.arange(num_pairs, dtype=np.int64)
    counters[:, 2] = stream & 0xFFFFFFFF
    counters[:, 3] = stream >> 32
    words = philox_words(key, counters).astype(np.uint64)
    sort_keys = (words[:, 0::2] | words[:, 1::2] << _HALF).reshape(-1)[:n]
    return np.argsort(sort_keys, kind="stable").astype(np.int64)


def drop_path_uniforms(
    seed: int,
    epochs: NDArray[np.int64],
    sample_ids: NDArray[np.int64],
    view: int,
    depth: int,
    *,
    repeats: int | NDArray[np.int64] = 0,
) -> NDArray[np.float64]:
    """Uniforms of stochastic depth: float64 [n, depth, 2], for the attention and the MLP branch of each block."""
    words = sample_words(
        seed, epochs, sample_ids, view, purpose=Purpose.DROP_PATH, num_words=2 * depth, repeats=repeats
    )
    return uniform(words).reshape(len(words), depth, 2)


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise UserError(f"run.seed={seed} is out of range: give an integer from 0 to 4294967295")


def _in_range(name: str, values: NDArray[np.int64], stop: int) -> NDArray[np.int64]:
    if values.size and (int(values.min()) < 0 or int(values.max()) >= stop):
        raise ValueError(f"{name} must be 0..{stop - 1}, got {int(values.min())}..{int(values.max())}")
    return values
