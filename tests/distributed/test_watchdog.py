"""The watchdog over forked ranks and a real store: ranks are stopped, killed, stuck, paused, or leave."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dino_dist.liveness import Fault, Limits, Pulse
from dino_dist.watchdog import Watchdog

pytestmark = pytest.mark.distributed

FORK = multiprocessing.get_context("fork")
PATIENCE_S = 60.0
TIMEOUT_S = 2.5
"""Short, but longer than a busy machine leaves a process without a processor."""
NEVER = 10**9

Behave = Callable[["Me", int], None]


class Me:
    """A rank as its own main thread sees it."""

    def __init__(self, rank: int, pulse: Pulse, dog: Watchdog, folder: Path) -> None:
        self.rank, self.pulse, self.dog, self.folder = rank, pulse, dog, folder

    def wait_for_all(self, done: Any, step: int) -> None:
        """The collective of a step, which fails when the test says so."""
        done[self.rank] = step
        while min(done) < step:
            if (self.folder / "broken").exists():
                raise ConnectionError
            time.sleep(0.001)

    def say(self, what: str) -> None:
        """One line to the test."""
        with open(self.folder / f"said-{self.rank}", "a") as file:
            file.write(what + "\n")


class Ranks:
    """Ranks that step in lock step; `behave(me, step)` is a step's own part on each of them."""

    def __init__(self, folder: Path, hosts: Sequence[str], timeout_s: float, steps: int, behave: Behave) -> None:
        self.folder = folder
        done = FORK.RawArray(ctypes.c_long, len(hosts))
        limits = Limits(timeout_s=timeout_s, timeout_start_s=10 * timeout_s)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.processes = [
                FORK.Process(target=_main, args=(rank, hosts, listener, folder, limits, steps, done, behave))
                for rank in range(len(hosts))
            ]
            for process in self.processes:
                process.start()

    def send(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks:
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def said(self, rank: int) -> list[str]:
        file = self.folder / f"said-{rank}"
        return file.read_text().splitlines() if file.exists() else []

    def reports(self, rank: int, *, ends: bool) -> list[dict[str, Any]]:
        """The faults that a rank reported, those that end the run or the others."""
        lines = [line.removeprefix("report ") for line in self.said(rank) if line.startswith("report ")]
        return [row for line in lines if (row := json.loads(line))["ends"] == ends]

    def wait_until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < deadline, [self.said(rank) for rank in range(len(self.processes))]
            time.sleep(0.01)

    def wait_for_steps(self, steps: int) -> None:
        self.wait_until(lambda: all(self.said(rank).count("step") >= steps for rank in range(len(self.processes))))

    def codes(self, *ranks: int) -> list[int | None]:
        """Exit codes of ranks that end by themselves."""
        for rank in ranks:
            self.processes[rank].join(PATIENCE_S)
        return [self.processes[rank].exitcode for rank in ranks]

    def kill_what_is_left(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _main(
    rank: int,
    hosts: Sequence[str],
    listener: socket.socket,
    folder: Path,
    limits: Limits,
    steps: int,
    done: Any,
    behave: Behave,
) -> None:
    timeout = timedelta(seconds=PATIENCE_S)
    port = listener.getsockname()[1]
    if rank == 0:
        server = TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.fileno(),
            timeout=timeout,
        )
    else:
        listener.close()
        server = None
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timeout)
    pulse = Pulse()

    def report(fault: Fault) -> None:
        stacks = {str(other): stack for other, stack in fault.stacks.items()}
        me.say("report " + json.dumps(fault.to_json() | {"ends": fault.ends, "stacks": stacks}))

    dog = Watchdog(store, rank=rank, size=len(hosts), host=hosts[rank], pulse=pulse, limits=limits, report=report)
    me = Me(rank, pulse, dog, folder)
    code = 7
    try:
        with dog:
            try:
                for step in range(1, steps + 1):
                    pulse.enter("data", step)
                    behave(me, step)
                    pulse.enter("step", step)
                    me.wait_for_all(done, step)
                    me.say("step")
                    time.sleep(0.01)
            except ConnectionError:
                me.say(f"suspects {dog.suspects()}")
                raise
            pulse.enter("leaving", steps)
            behave(me, NEVER)
        code = 0
    except ConnectionError:
        code = 5
    finally:
        del server
        os._exit(code)


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """`begin(hosts, behave, timeout_s=..., steps=...)`; what still runs is killed afterwards."""
    begun: list[Ranks] = []

    def start(
        hosts: Sequence[str],
        behave: Behave = lambda me, step: None,
        *,
        timeout_s: float = TIMEOUT_S,
        steps: int = NEVER,
    ) -> Ranks:
        begun.append(Ranks(tmp_path, hosts, timeout_s, steps, behave))
        return begun[-1]

    yield start
    for ranks in begun:
        ranks.kill_what_is_left()


def test_a_rank_that_falls_silent_is_named_and_all_others_end(begin: Callable[..., Ranks]) -> None:
    ranks = begin(["n0", "n1", "n2"])
    ranks.wait_for_steps(3)
    ranks.send(signal.SIGSTOP, 1)
    assert ranks.codes(0, 2) == [1, 1]
    (fault,) = ranks.reports(0, ends=True)
    assert (fault["kind"], fault["ranks"], fault["hosts"]) == ("silent", [1], ["n1"])
    assert sorted(fault["stacks"]) == ["0", "2"]
    assert all("_main" in stack for stack in fault["stacks"].values())
    assert not ranks.reports(2, ends=True)


@pytest.mark.parametrize(
    ("hosts", "lost", "reporter", "number"),
    [
        (["n0", "n1", "n2"], [0], 1, signal.SIGSTOP),
        (["n0", "n0", "n1"], [0, 1], 2, signal.SIGSTOP),
        (["n0", "n0", "n0"], [0], 1, signal.SIGKILL),
    ],
)
def test_without_rank_zero_or_its_node_the_first_rank_elsewhere_reports(
    begin: Callable[..., Ranks], hosts: list[str], lost: list[int], reporter: int, number: signal.Signals
) -> None:

    def behave(me: Me, step: int) -> None:
        if me.dog._news.deputy == reporter and me.dog._news.beat > 2:
            me.say("knows")

    ranks = begin(hosts, behave)
    ranks.wait_until(lambda: all("knows" in ranks.said(rank) for rank in range(len(hosts))))
    ranks.send(number, *lost)
    left = [rank for rank in range(len(hosts)) if rank not in lost]
    assert ranks.codes(*left) == [1] * len(left)
    (fault,) = ranks.reports(reporter, ends=True)
    assert (fault["kind"], fault["ranks"], fault["hosts"]) == ("lost contact", [0], ["n0"])
    assert f"rank {reporter} on {hosts[reporter]} is at step" in fault["why"]
    assert not any(ranks.reports(rank, ends=True) for rank in left if rank != reporter)


@pytest.mark.parametrize("stuck", [0, 1])
def test_a_main_thread_stuck_in_c_is_named_with_its_stack_and_ends(begin: Callable[..., Ranks], stuck: int) -> None:
    def read_from_a_hanging_disk() -> None:
        ctypes.CDLL(None).pause()

    def behave(me: Me, step: int) -> None:
        if step == 4 and me.rank == stuck:
            read_from_a_hanging_disk()

    ranks = begin(["n0", "n1"], behave)
    assert ranks.codes(0, 1) == [1, 1]
    (fault,) = ranks.reports(0, ends=True)
    assert (fault["kind"], fault["ranks"], fault["step"], fault["phase"]) == ("hang", [stuck], 4, "data")
    assert f"rank {stuck} on n{stuck} holds up all others" in fault["why"]
    assert "read_from_a_hanging_disk" in fault["stacks"][str(stuck)]
    assert "read_from_a_hanging_disk" not in fault["stacks"][str(1 - stuck)]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_whose_collective_failed_learns_who_was_killed(begin: Callable[..., Ranks], killed: int) -> None:
    ranks = begin(["n0", "n1", "n2"], timeout_s=20.0)
    ranks.wait_for_steps(3)
    ranks.send(signal.SIGKILL, killed)
    (ranks.folder / "broken").touch()
    others = [rank for rank in range(3) if rank != killed]
    assert ranks.codes(*others) == [5, 5]
    for rank in others:
        (line,) = [line for line in ranks.said(rank) if line.startswith("suspects ")]
        assert f"rank {killed} on n{killed}" in line


def test_leaving_in_any_order_and_long_apart_is_no_fault(begin: Callable[..., Ranks]) -> None:
    def behave(me: Me, step: int) -> None:
        if step == NEVER:
            for _ in range(me.rank * 15):
                me.pulse.enter("log", step)
                time.sleep(TIMEOUT_S / 10)

    ranks = begin(["n0", "n1"], behave, steps=5)
    assert ranks.codes(0, 1) == [0, 0]
    assert not ranks.reports(0, ends=True)
    assert not ranks.reports(1, ends=True)


def test_a_pause_below_the_limit_is_a_straggler_and_ends_nothing(begin: Callable[..., Ranks]) -> None:
    ranks = begin(["n0", "n1"], timeout_s=8.0)
    ranks.wait_for_steps(3)
    ranks.send(signal.SIGSTOP, 1)
    ranks.wait_until(lambda: bool(ranks.reports(0, ends=False)))
    ranks.send(signal.SIGCONT, 1)
    ranks.wait_for_steps(ranks.said(0).count("step") + 10)
    told = ranks.reports(0, ends=False)[0]
    assert (told["kind"], told["ranks"], told["hosts"]) == ("straggler", [1], ["n1"])
    assert not ranks.reports(0, ends=True)


def test_ranks_that_were_all_paused_beyond_the_limit_accuse_nobody(begin: Callable[..., Ranks]) -> None:
    ranks = begin(["n0", "n1"])
    ranks.wait_for_steps(3)
    for _ in range(2):
        ranks.send(signal.SIGSTOP, 0, 1)
        time.sleep(1.2 * TIMEOUT_S)
        ranks.send(signal.SIGCONT, 0, 1)
        ranks.wait_for_steps(ranks.said(0).count("step") + 10)
    assert not ranks.reports(0, ends=True)
    assert not ranks.reports(1, ends=True)
