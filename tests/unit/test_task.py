"""How the ranks of a job are started, and what the pickle of the task holds."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from dino_dist.run_folder import RunFolder
from launch.task import TrainTask, srun_command


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def task(folder: RunFolder, **more: Any) -> TrainTask:
    return TrainTask(run_dir=str(folder.path), tasks_per_node=4, cpus_per_task=None, **more)


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
