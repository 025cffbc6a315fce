"""Rounds of threads: every image once; after an error only what comes before it is done; the first error is raised."""

from __future__ import annotations

import threading
from concurrent.futures import FIRST_COMPLETED, wait

import numpy as np
import pytest

from dino_dist.data.loading.rounds import Rounds, finish
from dino_dist.errors import UserError


@pytest.mark.parametrize("num_threads", [1, 3])
def test_every_image_is_done_once(num_threads: int) -> None:
    rounds = Rounds(num_threads)
    done: list[tuple[int, int]] = []
    started = [rounds.start(number, lambda index, n=number: done.append((n, index)), 20) for number in range(5)]
    for threads in started:
        assert len(threads) == num_threads
        finish(threads)
    assert sorted(done) == [(number, index) for number in range(5) for index in range(20)]
    assert not rounds.come_after_an_error(4)
    rounds.close()


def test_a_thread_that_was_busy_takes_nothing_after_an_error() -> None:
    rounds = Rounds(2)
    both_are_busy, failed = threading.Barrier(2), threading.Event()
    done: list[int] = []

    def do(index: int) -> None:
        if index < 2:
            both_are_busy.wait()
        if index == 0:
            raise UserError("the store is down")
        failed.wait()
        done.append(index)

    threads = rounds.start(0, do, 10)
    later = rounds.start(1, do, 10)
    wait(threads, return_when=FIRST_COMPLETED)
    failed.set()
    with pytest.raises(UserError, match="the store is down"):
        finish(threads)
    finish(later)
    assert done == [1]
    rounds.close()


@pytest.mark.parametrize("seed", range(5))
def test_the_first_error_of_the_stream_is_raised_whoever_is_fastest(seed: int) -> None:
    """And all that comes before it is done."""
    rng = np.random.default_rng(seed)
    fails = rng.random((6, 30)) < 0.02
    fails[rng.integers(6), rng.integers(30)] = True
    number, index = np.argwhere(fails)[0].tolist()
    rounds = Rounds(4)
    done: set[tuple[int, int]] = set()

    def do(this_number: int, this_index: int) -> None:
        if fails[this_number, this_index]:
            raise UserError(f"{this_number}, {this_index}")
        done.add((this_number, this_index))

    started = [rounds.start(n, lambda i, n=n: do(n, i), 30) for n in range(6)]
    for threads in started[:number]:
        finish(threads)
    with pytest.raises(UserError, match=f"^{number}, {index}$"):
        finish(started[number])
    assert done >= {(n, i) for n in range(number) for i in range(30)} | {(number, i) for i in range(index)}
    assert rounds.come_after_an_error(number + 1)
    assert not rounds.come_after_an_error(number)
    rounds.close()
