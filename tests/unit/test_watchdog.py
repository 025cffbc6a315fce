"""The watchdog's threads on ranks that share one process and one store; their leaving is recorded, not done."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from dino_dist.liveness import Fault, Limits, Pulse
from dino_dist.watchdog import Watchdog

PATIENCE_S = 60.0
SHORT = Limits(timeout_s=1.5, timeout_start_s=1.5)
LONG = Limits(timeout_s=300.0, timeout_start_s=1800.0)


@dataclass
class Rank:
    """One of several ranks in this process."""

    dog: Watchdog
    pulse: Pulse
    reports: list[Fault] = field(default_factory=list)
    left: list[int] = field(default_factory=list)

    def ended(self) -> bool:
        return bool(self.left)


def join(store: Store, rank: int, size: int, limits: Limits, report: Callable[[Fault], None] | None = None) -> Rank:
    pulse, reports, left = Pulse(), list[Fault](), list[int]()
    dog = Watchdog(
        store,
        rank=rank,
        size=size,
        host=f"n{rank // 2}",
        pulse=pulse,
        limits=limits,
        heartbeat_s=0.1,
        report=report or reports.append,
        leave=left.append,
    )
    return Rank(dog, pulse, reports, left)


@contextmanager
def several(size: int, limits: Limits) -> Iterator[list[Rank]]:
    store = HashStore()
    ranks = [join(store, rank, size, limits) for rank in range(size)]
    with ExitStack() as stack:
        for rank in reversed(ranks):
            stack.enter_context(rank.dog)
        yield ranks


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def watchdog_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("watchdog")]


@pytest.mark.parametrize("size", [1, 3])
def test_a_healthy_run_is_left_alone_and_leaves_nothing(size: int) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with several(size, LONG) as ranks:
        for step in range(1, 30):
            for rank in ranks:
                rank.pulse.enter("data", step)
                rank.pulse.enter("step", step)
            time.sleep(0.01)
        assert ranks[0].dog.suspects() == ""
    assert not any(rank.reports or rank.left or rank.dog.fault for rank in ranks)
    wait_until(lambda: not watchdog_threads())
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_closing_twice_or_without_a_start_of_the_others_is_harmless() -> None:
    rank = join(HashStore(), 0, 4, LONG)
    with rank.dog:
        rank.dog.close()
    assert rank.dog.fault is None
    wait_until(lambda: not watchdog_threads())


def test_a_heartbeat_too_slow_for_the_time_out_is_refused() -> None:
    with pytest.raises(ValueError, match="quarter"):
        Watchdog(
            HashStore(), rank=0, size=1, host="", pulse=Pulse(), limits=SHORT, report=print, heartbeat_s=SHORT.timeout_s
        )


def test_a_hang_is_named_once_with_all_stacks_and_ends_all_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    with several(3, SHORT) as ranks:
        for rank, phase in zip(ranks, ("step", "data", "step"), strict=True):
            rank.pulse.enter(phase, 12)  # type: ignore[arg-type]
        wait_until(lambda: all(rank.ended() for rank in ranks))
    ending = [fault for fault in ranks[0].reports if fault.ends]
    assert [(fault.kind, fault.ranks, fault.hosts, fault.step, fault.phase) for fault in ending] == [
        ("hang", (1,), ("n0",), 12, "data")
    ]
    assert sorted(ending[0].stacks) == [0, 1, 2]
    assert all("test_a_hang_is_named_once" in stack for stack in ending[0].stacks.values())
    assert not ranks[1].reports
    assert not ranks[2].reports
    assert [rank.left for rank in ranks] == [[1]] * 3
    said = capfd.readouterr().err
    assert all(f"rank {rank} on n{rank // 2} ends: hang: rank 1 on n0 holds up all others" in said for rank in range(3))
    assert "thread MainThread:" in said
    assert "thread watchdog-guard:" in said


def test_a_straggler_is_named_once_a_step_before_anything_ends() -> None:
    with several(2, SHORT) as ranks:
        ranks[0].pulse.enter("step", 12)
        ranks[1].pulse.enter("data", 12)
        wait_until(lambda: ranks[0].ended())
    kinds = [fault.kind for fault in ranks[0].reports]
    assert kinds == ["straggler", "hang"]
    assert ranks[0].reports[0].ranks == (1,)


def test_a_straggler_that_goes_on_ends_nothing() -> None:
    with several(2, Limits(timeout_s=8.0, timeout_start_s=8.0)) as ranks:
        ranks[0].pulse.enter("step", 12)
        ranks[1].pulse.enter("data", 12)
        wait_until(lambda: bool(ranks[0].reports))
        ranks[1].pulse.enter("step", 12)
    assert not any(rank.left or rank.dog.fault for rank in ranks)


def test_a_report_that_hangs_keeps_nobody() -> None:
    never = threading.Event()
    rank = join(HashStore(), 0, 1, SHORT, report=lambda fault: never.wait() and None)
    with rank.dog:
        wait_until(rank.ended)
    never.set()
    assert rank.left == [1]


def test_a_rank_that_fails_is_a_suspect_at_once() -> None:
    with several(3, LONG) as ranks:
        for rank in ranks:
            rank.pulse.enter("step", 5)
        ranks[1].dog.close(MemoryError("no 3 GiB left\nsecond line"))
        for other in (ranks[0], ranks[2]):
            wait_until(lambda other=other: "MemoryError" in other.dog.suspects())  # type: ignore[misc]
            assert other.dog.suspects() == "rank 1 on n0 failed (MemoryError: no 3 GiB left)"


def test_a_silent_rank_is_a_suspect_long_before_it_is_judged() -> None:
    store = HashStore()
    alive, silent = join(store, 0, 2, LONG), join(store, 1, 2, LONG)
    with alive.dog:
        store.set(
            "pulse/1",
            '{"beats": 4, "progress": 1, "phase": "step", "step": 3, "data_wait_s": 0, "host": "n7", "ended": ""}',
        )
        wait_until(lambda: alive.dog.suspects() != "")
        assert alive.dog.suspects() == "no sign of life from rank 1 on n7"
    assert not alive.reports
    assert not silent.left


def test_after_rank_zero_left_the_others_go_on_and_end_alone_if_they_hang() -> None:
    with several(3, SHORT) as ranks:
        for rank in ranks:
            rank.pulse.enter("step", 12)
        ranks[0].dog.close(RuntimeError("out of memory"))
        wait_until(lambda: "RuntimeError: out of memory" in ranks[2].dog.suspects())
        wait_until(lambda: all(rank.ended() for rank in ranks[1:]))
    assert [rank.left for rank in ranks] == [[], [1], [1]]
    (report,) = [fault for rank in ranks for fault in rank.reports]
    assert report.kind == "hang"
    assert "rank 0 on n0 ended (RuntimeError: out of memory)" in report.why
