"""What the supervisor of a job makes of the end of its ranks; Slurm itself is asked in tests/slurm."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from dino_dist.ledger import Ledger, read_rows
from dino_dist.run_folder import RunFolder
from launch.task import TrainTask, after_the_step, cause, idle_restarts, srun_command


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def task(folder: RunFolder, **more: Any) -> TrainTask:
    return TrainTask(run_dir=str(folder.path), tasks_per_node=4, cpus_per_task=None, **more)


def write(folder: RunFolder, *rows: dict[str, Any]) -> None:
    """One attempt with these rows in its ledger."""
    with folder.begin_attempt() as attempt:
        ledger = Ledger(attempt, rank=0, host="n0")
        for row in rows:
            ledger.append(row.pop("event"), step=row.pop("step", 0), why="", **row)


def test_the_ranks_are_started_on_the_nodes_that_the_job_has_got(folder: RunFolder) -> None:
    for num_nodes in (1, 3):
        command = srun_command(task(folder), num_nodes=num_nodes)
        assert {f"--nodes={num_nodes}", f"--ntasks={4 * num_nodes}", "--ntasks-per-node=4"} <= set(command)
    assert "--kill-on-bad-exit=1" in command
    assert command[-2:] == ["train", str(folder.path / "submitted.yaml")]
    assert not any("cpus-per-task" in word for word in command)


def test_cores_and_further_options_reach_srun(folder: RunFolder) -> None:
    more = TrainTask(
        run_dir=str(folder.path), tasks_per_node=1, cpus_per_task=6, srun_args=("--mpi=none",), accept_changes=True
    )
    command = srun_command(more, num_nodes=1)
    assert "--cpus-per-task=6" in command
    assert command.index("--mpi=none") < command.index("train")
    assert command[-1] == "--accept-changes"


def test_the_pickle_holds_no_state(folder: RunFolder) -> None:
    assert pickle.loads(pickle.dumps(task(folder))) == task(folder)
    assert len(pickle.dumps(task(folder))) < 2000
    again = task(folder).checkpoint()
    assert again.function == task(folder)


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
    assert after_the_step(task(folder), folder, 0, "1", code=code, said=[]) == expected


@pytest.mark.parametrize("code", [0, 2, 3, 4])
def test_without_a_word_in_the_ledger_an_orderly_exit_code_counts(folder: RunFolder, code: int) -> None:
    write(folder, {"event": "stop", "exit_code": 0})  # of an earlier start
    assert after_the_step(task(folder), folder, 1, "1", code=code, said=[]) == code


def test_a_lost_node_is_named_although_the_ranks_left_in_good_order(folder: RunFolder) -> None:
    write(folder, {"event": "stop", "exit_code": 3})
    said = ["srun: error: Node failure on n1", "srun: error: n0: task 0: Exited with exit code 3"]
    assert after_the_step(task(folder), folder, 0, "1", code=143, said=said) == 3
    (fault,) = [row for row in read_rows(folder.ledger) if row["event"] == "fault"]
    assert (fault["suspect_host"], fault["rank"]) == ("n1", None)


@pytest.mark.parametrize("settled", [2, 3, 4])
def test_what_the_first_rank_says_in_good_order_is_settled(folder: RunFolder, settled: int) -> None:
    """srun's own code is that of the ranks that it ended."""
    said = [f"srun: error: n1: task 1: Exited with exit code {settled}", "srun: error: n0: task 0: Terminated"]
    assert after_the_step(task(folder), folder, 0, "1", code=143, said=said) == settled


@pytest.mark.parametrize(
    ("said", "why", "host"),
    [
        (["srun: error: n1: task 1: Killed", "srun: Terminating StepId=2.0"], "rank 1 on n1: Killed", "n1"),
        (["srun: error: gpu-7: tasks 8-15: Exited with exit code 1"], "rank 8-15 on gpu-7: Exited", None),
        (["srun: error: n3: task 3: Bus error"], "rank 3 on n3: Bus error", "n3"),
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
    found, suspect = cause(1, said)
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
    ],
)
def test_only_restarts_after_a_crash_without_a_new_checkpoint_are_idle(
    rows: list[dict[str, Any]], newest: int, idle: int
) -> None:
    assert idle_restarts(rows, newest) == idle
