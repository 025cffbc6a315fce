"""Rounds: the threads go through the images of a micro-batch together, and an error ends all that would come after it.

Rounds are started in the order of their micro-batches, and each thread takes the lowest image that is left. So when an
image fails, all before it are in work already: letting these end, and taking no more, finds the first error of the
stream, whoever is fastest, without asking a store that is down once more for each thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from dino_dist.errors import UserError

Round = list["Future[tuple[int, UserError] | None]"]


class Rounds:
    """A pool of threads for the images of numbered micro-batches, each with one round or several."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._failed_number: float = float("inf")
        self._lock = Lock()
        self._is_ending = False

    def start(self, number: int, do: Callable[[int], None], count: int) -> Round:
        """Have the threads call do(0) ... do(count - 1) for the micro-batch of this number."""
        indices = iter(range(count))  # taking the next is atomic
        return [self._pool.submit(self._take_turns, number, do, indices) for _ in range(min(self._num_threads, count))]

    def come_after_an_error(self, number: int) -> bool:
        """Whether an earlier micro-batch failed, so that the rounds of this one may have left images out."""
        return self._failed_number < number

    def close(self) -> None:
        """Wait until each thread has ended the image that it is at."""
        self._is_ending = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _take_turns(
        self, number: int, do: Callable[[int], None], indices: Iterator[int]
    ) -> tuple[int, UserError] | None:
        while not self._is_ending and number < self._failed_number:  # looked at first: what was taken must be done
            index = next(indices, None)
            if index is None:
                break
            try:
                do(index)
            except UserError as error:
                with self._lock:
                    self._failed_number = min(self._failed_number, number)
                return index, error
        return None


def finish(threads: Round) -> None:
    """Wait for a round; raises the `UserError` of the first image that had one, whoever was fastest."""
    errors = [error for error in (thread.result() for thread in threads) if error is not None]
    if errors:
        raise min(errors, key=lambda found: found[0])[1]
