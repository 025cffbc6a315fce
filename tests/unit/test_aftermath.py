"""What a job's supervisor makes of the end of its ranks; Slurm itself is asked in tests/slurm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dino_dist.ledger import Ledger, read_rows
from dino_dist.run_folder import RunFolder
from launch.aftermath import Ending, cause, idle_restarts, max_idle_restarts, settle


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def write(folder: RunFolder, *rows: dict[str, Any]) -> None:
    """One attempt with these rows in its ledger."""
    with folder.begin_attempt() as attempt:
        ledger = Ledger(attempt, rank=0, host="n0")
        for row in rows:
            ledger.append(row.pop("event"), step=row.pop("step", 0), why="", **row)


def settled(folder: RunFolder, code: int, said: Sequence[str] = (), *, attempts_before: int = 0) -> int:
    """The exit code of the job."""
    ending = Ending(job_id="1", attempts_before=attempts_before, code=code, said=said)
    return settle(folder, ending, exclude_faulty=False)


@pytest.mark.parametrize("code", [0, 1, 3, 137, 143])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"event": "stop", "exit_code": 0}, 0),
        ({"event": "stop", "exit_code": 2}, 2),
        ({"event": "stop", "exit_code": 3}, 3),
        ({"event": "stop", "exit_code": 4}, 4),
        ({"event": "requeue"}, 3),
    ],
    ids=str,
)
def test_the_ledger_tells_more_than_the_exit_code(
    folder: RunFolder, code: int, row: dict[str, Any], expected: int
) -> None:
    """The first rank that leaves makes srun end the others, and it reports those."""
    write(folder, {"event": "start"}, {"event": "save", "step": 4}, dict(row))
    assert settled(folder, code) == expected


@pytest.mark.parametrize("code", [0, 4, 130])
def test_without_a_word_in_the_ledger_these_exit_codes_end_the_job(folder: RunFolder, code: int) -> None:
    write(folder, {"event": "stop", "exit_code": 0})  # of an earlier start
    assert settled(folder, code, attempts_before=1) == code


def test_a_lost_node_is_named_although_the_ranks_left_in_good_order(folder: RunFolder) -> None:
    write(folder, {"event": "stop", "exit_code": 3})
    said = ["srun: error: Node failure on n1", "srun: error: n0: task 0: Exited with exit code 3"]
    assert settled(folder, 143, said) == 3
    (fault,) = [row for row in read_rows(folder.ledger) if row["event"] == "fault"]
    assert (fault["suspect_host"], fault["rank"]) == ("n1", None)


@pytest.mark.parametrize("code", [4, 130])
def test_what_the_first_rank_says_counts(folder: RunFolder, code: int) -> None:
    """srun's own code is that of the ranks that it ended."""
    said = [f"srun: error: n1: task 1: Exited with exit code {code}", "srun: error: n0: task 0: Terminated"]
    assert settled(folder, 143, said) == code


@pytest.mark.parametrize(
    ("said", "why", "host"),
    [
        (["srun: error: n1: task 1: Killed", "srun: Terminating StepId=2.0"], "rank 1 on n1: Killed", "n1"),
        (["srun: error: gpu-7: tasks 8-15: Exited with exit code 1"], "rank 8-15 on gpu-7: Exited", None),
        (["srun: error: n3: task 3: Bus error"], "rank 3 on n3: Bus error", "n3"),
        (["srun: error: n3: task 3: Terminated"], "rank 3 on n3: Terminated", None),
        (["srun: error: n3: task 3: User defined signal 2"], "rank 3 on n3: User defined signal 2", None),
        (
            ["srun: launch", "srun: error: n0: task 0: Out Of Memory", "srun: error: n1: task 1: Killed"],
            "rank 0 on n0: Out Of Memory",
            None,
        ),
        (
            ["srun: error: Unable to create step for job 3: Requested nodes are busy"],
            "srun ended with exit code 1: srun: error: Unable to create step for job 3: Requested nodes are busy",
            None,
        ),
        ([], "srun ended with exit code 1", None),
    ],
)
def test_the_task_that_ended_first_is_the_cause(said: list[str], why: str, host: str | None) -> None:
    found, suspect = cause(Ending(job_id="1", attempts_before=0, code=1, said=said))
    assert found.startswith(why)
    assert suspect == host


def requeues(*steps: int, crash: bool = True) -> list[dict[str, Any]]:
    return [{"event": "requeue", "step": step, **({"after_crash": True} if crash else {})} for step in steps]


@pytest.mark.parametrize(
    ("rows", "newest", "idle"),
    [
        ([], 0, 0),
        (requeues(0, 0), 0, 2),
        (requeues(0, 0), 5, 0),
        (requeues(0, 5, 5, 5), 5, 3),
        (requeues(5, 0, 5), 5, 1),
        (requeues(5) + requeues(5, crash=False) + requeues(5), 5, 2),
        # A job that gave up, or was cancelled, and was submitted again once it was mended.
        ([*requeues(0, 0, 0), {"event": "stop", "step": 0, "exit_code": 1}], 0, 0),
        ([*requeues(0, 0, 0), {"event": "stop", "step": 0, "exit_code": 1}, *requeues(0)], 0, 1),
        # Slurm was ending this job, and then ran it again.
        ([*requeues(0, 0), {"event": "stop", "step": 0}, *requeues(0)], 0, 3),
    ],
)
def test_only_restarts_after_a_crash_without_a_new_checkpoint_are_idle(
    rows: list[dict[str, Any]], newest: int, idle: int
) -> None:
    assert idle_restarts(rows, newest) == idle


def test_what_the_disk_does_not_hold_ends_no_supervisor(tmp_path: Path) -> None:
    gone = RunFolder(tmp_path / "gone")
    assert max_idle_restarts(gone) == 3
    said = ["srun: error: Node failure on n1", "srun: error: n0: task 0: Exited with exit code 4"]
    assert settled(gone, 143, said) == 4
