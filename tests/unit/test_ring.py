"""The ring: regions never overlap, are contiguous, come back in any order; waiting ends; the memory has no name."""

from __future__ import annotations

import os
import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_dist.data.loading.ring import ALIGNMENT_BYTES, Region, RingClosed, RingSpace, mapped, shared_memory
from dino_dist.errors import UserError


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(1, 40 * ALIGNMENT_BYTES), st.randoms(use_true_random=False)), max_size=40),
)
def test_regions_in_use_never_overlap(blocks: int, wanted: list[tuple[int, object]]) -> None:
    """Whatever is asked for and given back: a request that waits is granted once all that is in use is back."""
    space = RingSpace(blocks * ALIGNMENT_BYTES)
    used: list[Region] = []
    for num_bytes, random in wanted:
        num_bytes = min(num_bytes, space.capacity)
        done = threading.Event()

        def reserve(num_bytes: int = num_bytes, done: threading.Event = done) -> None:
            used.append(space.reserve(num_bytes))
            done.set()

        others = list(used)
        # Drawn before the thread starts: drawing may end this example, and nobody would end the thread.
        random.shuffle(others)  # type: ignore[attr-defined]
        at_once = others[: random.randrange(len(others) + 1)]  # type: ignore[attr-defined]
        thread = threading.Thread(target=reserve)
        thread.start()
        for region in at_once:
            used.remove(region)
            space.release(region)
            others.remove(region)
        while not done.is_set() and others:
            region = others.pop()
            used.remove(region)
            space.release(region)
        thread.join()
        for region in used:
            assert 0 <= region.start < region.stop <= space.capacity
            assert region.start % ALIGNMENT_BYTES == 0
        assert used[-1].stop - used[-1].start == num_bytes
        for one, two in pairwise(sorted(used, key=lambda region: region.start)):
            assert one.stop <= two.start
    for region in used:
        space.release(region)
    assert space.reserve(space.capacity).start == 0


def test_room_comes_back_in_order() -> None:
    space = RingSpace(4 * ALIGNMENT_BYTES)
    first, second, third = (space.reserve(ALIGNMENT_BYTES) for _ in range(3))
    space.release(second)
    assert space.reserve(1).start == third.stop  # the first is still in use: the circle goes on behind the third
    space.release(first)
    assert space.reserve(2 * ALIGNMENT_BYTES).start == 0


def test_what_never_fits_is_no_wait() -> None:
    space = RingSpace(100)
    for num_bytes in (0, 101):
        with pytest.raises(ValueError, match=r"1\.\.100"):
            space.reserve(num_bytes)
    assert space.reserve(100).stop == 100


def test_closing_ends_all_waiting() -> None:
    space = RingSpace(10)
    space.reserve(10)
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises(RingClosed):
            space.reserve(1)
        ended.set()

    thread = threading.Thread(target=wait)
    thread.start()
    space.close()
    thread.join()
    assert ended.is_set()


def maps() -> str:
    """What this process has mapped."""
    with open("/proc/self/maps", encoding="utf-8") as file:
        return file.read()


def test_memory_is_shared_has_no_name_and_goes_with_its_maps() -> None:
    named = maps().count("/dev/shm/")  # semaphores of earlier tests
    fd = shared_memory(10_000)
    one, two = mapped(fd), mapped(fd)
    os.close(fd)
    one[9_999] = 7
    assert two[9_999] == 7
    assert maps().count("/dev/shm/") == named
    assert "dino-dist-batches" in maps()
    view = one[:3]
    del one, two
    assert (np.asarray(view) == 0).all()
    del view
    assert "dino-dist-batches" not in maps()


def test_too_much_memory_is_one_line() -> None:
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UserError, match=r"data\.buffer_mib=\d+: this machine has \d+ MiB") as caught:
        shared_memory(2**60)
    assert "\n" not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == fds
