"""A run folder belongs to one attempt at a time: live ones are respected, dead ones replaced, old ones shut out."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from dino_dist.errors import Superseded, UserError
from dino_dist.ledger import JsonLines, Ledger, read_rows
from dino_dist.run_folder import Attempt, RunFolder

BEAT_S = 0.05
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run", heartbeat_s=BEAT_S)
    made.create()
    return made


def rewrite_owner(folder: RunFolder, number: int, **changes: Any) -> None:
    file = folder.attempt_file(number)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@contextmanager
def beating(file: Path) -> Iterator[None]:
    """Touch the attempt's file as its owner would."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT_S / 4):
            os.utime(file)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def hold_folder(folder: RunFolder, connection: Connection) -> None:
    folder.begin_attempt()
    connection.send("begun")
    signal.pause()


@contextmanager
def other_process_holding(folder: RunFolder) -> Iterator[Any]:
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=hold_folder, args=(folder, theirs))
    process.start()
    try:
        assert ours.recv() == "begun"
        yield process
    finally:
        process.kill()
        process.join()


def abandoned_attempt(folder: RunFolder, **changes: Any) -> None:
    """Attempt 1, without a heartbeat, its owner as `changes` say."""
    folder.begin_attempt(job_id="7").close()
    folder.ended_file(1).unlink()
    rewrite_owner(folder, 1, **changes)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def test_attempts_count_up_and_a_closed_one_makes_room(folder: RunFolder) -> None:
    for number in (1, 2, 3):
        with folder.begin_attempt() as attempt:
            assert attempt.number == number
            attempt.check()


@pytest.mark.distributed
def test_second_live_start_is_refused_with_host_and_process(folder: RunFolder) -> None:
    with other_process_holding(folder) as process:
        with pytest.raises(UserError, match=f"host {socket.gethostname()} as process {process.pid}") as refused:
            folder.begin_attempt()
        assert "\n" not in str(refused.value)
    assert folder.newest_attempt() == 1


@pytest.mark.distributed
@pytest.mark.parametrize("reaped", [True, False])
def test_killed_owner_on_this_host_is_replaced(folder: RunFolder, reaped: bool) -> None:
    with other_process_holding(folder) as process:
        os.kill(process.pid, signal.SIGKILL)
        # WNOWAIT leaves the dead process in the table, as a launcher does that has not looked yet.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        if reaped:
            process.join()
        with folder.begin_attempt() as attempt:
            assert attempt.number == 2


def test_reused_pid_is_judged_by_the_heartbeat(folder: RunFolder) -> None:
    abandoned_attempt(folder, process_started=12.0)
    with beating(folder.attempt_file(1)), pytest.raises(UserError, match="in use"):
        folder.begin_attempt()
    with folder.begin_attempt() as attempt:
        assert attempt.number == 2


def test_owner_on_another_host_is_judged_by_the_heartbeat(folder: RunFolder) -> None:
    abandoned_attempt(folder, host="elsewhere", pid=99)
    with beating(folder.attempt_file(1)), pytest.raises(UserError, match="host elsewhere as process 99"):
        folder.begin_attempt(job_id="8")
    with folder.begin_attempt(job_id="8") as attempt:
        assert attempt.number == 2


def test_requeued_job_supersedes_its_lost_node_at_once(folder: RunFolder) -> None:
    abandoned_attempt(folder, host="elsewhere")
    with beating(folder.attempt_file(1)), folder.begin_attempt(job_id="7") as attempt:
        assert attempt.number == 2


@pytest.mark.parametrize(("restarts", "gets_in"), [(0, False), (1, True)])
def test_restart_count_tells_a_requeue_from_a_second_step_of_one_job(
    folder: RunFolder, restarts: int, gets_in: bool
) -> None:
    first = folder.begin_attempt(job_id="7", restarts=0)
    if gets_in:
        folder.begin_attempt(job_id="7", restarts=restarts).close()
        assert not first.still_ours()
    else:
        with pytest.raises(UserError, match="in use"):
            folder.begin_attempt(job_id="7", restarts=restarts)
        assert first.still_ours()
    first.close()


def test_owner_file_torn_by_a_kill_is_judged_by_the_heartbeat(folder: RunFolder) -> None:
    abandoned_attempt(folder)
    folder.attempt_file(1).write_text('{"number": 1, "ho')
    with folder.begin_attempt() as attempt:
        assert attempt.number == 2


def begin_and_tell(folder: RunFolder, gate: Any, connection: Connection) -> None:
    gate.wait()
    try:
        folder.begin_attempt()
        connection.send(True)
    except UserError:
        connection.send(False)
    signal.pause()


@pytest.mark.distributed
def test_of_many_starts_at_once_one_gets_in(folder: RunFolder) -> None:
    gate = FORK.Barrier(6)
    pipes = [FORK.Pipe() for _ in range(6)]
    processes = [FORK.Process(target=begin_and_tell, args=(folder, gate, theirs)) for _, theirs in pipes]
    for process in processes:
        process.start()
    try:
        assert sorted(ours.recv() for ours, _ in pipes) == [False] * 5 + [True]
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize("owns", [True, False])
def test_superseded_attempt_writes_nothing_and_notices(folder: RunFolder, owns: bool) -> None:
    first = folder.begin_attempt(job_id="7", restarts=0)
    old = first if owns else folder.join_attempt(first.number)
    metrics, ledger = JsonLines(folder.metrics, old), Ledger(old, rank=0)
    metrics.append({"step": 1})
    metrics.append({"step": 2})
    ledger.append("start", step=0, why="test")
    before = folder.metrics.read_bytes(), folder.ledger.read_bytes()

    with folder.begin_attempt(job_id="7", restarts=1):
        for write in (
            lambda: metrics.append({"step": 3}),
            lambda: metrics.cut_after(1),
            lambda: ledger.append("stop", step=3, why="test"),
        ):
            with pytest.raises(Superseded, match="gave way to attempt 2"):
                write()
        wait_for(lambda: old.superseded)

    assert (folder.metrics.read_bytes(), folder.ledger.read_bytes()) == before
    first.close()
    old.close()


def test_watcher_notices_a_newer_attempt_without_a_write(folder: RunFolder) -> None:
    old = folder.begin_attempt(job_id="7", restarts=0)
    assert not old.superseded
    with folder.begin_attempt(job_id="7", restarts=1):
        wait_for(lambda: old.superseded)
    old.close()


def append_rows(folder: RunFolder, number: int, rank: int) -> None:
    ledger = Ledger(Attempt(folder, number, owns=False), rank=rank)
    for step in range(20):
        ledger.append("signal", step=step, why="x" * 500)


@pytest.mark.distributed
def test_rows_of_many_ranks_stay_whole(folder: RunFolder) -> None:
    with folder.begin_attempt() as attempt:
        processes = [FORK.Process(target=append_rows, args=(folder, attempt.number, rank)) for rank in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    rows = read_rows(folder.ledger)
    assert sorted((row["rank"], row["step"]) for row in rows) == [
        (rank, step) for rank in range(4) for step in range(20)
    ]


def test_unwritable_place_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write there") as refused:
        RunFolder(tmp_path / "file" / "run").create()
    assert "\n" not in str(refused.value)
