"""`dino-dist launch` on a real Slurm: from submission to the last step, whatever Slurm does to the job meanwhile."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(400)]

Launch = Callable[..., Any]
Compare = Callable[[Path], None]


def test_from_submission_to_the_last_step(
    cluster: Any,
    launch: Launch,
    dino: Launch,
    small: Callable[..., list[str]],
    assert_undisturbed: Compare,
    tmp_path: Path,
) -> None:
    path = tmp_path / "run"
    run = launch(path)
    again = ["launch", *small(path), "--nodes", "2", "--no-probe"]
    assert f"job {run.job_id}" in dino(*again).refusal()

    run.wait_for_step(30)
    cluster.signal_tasks(run.job_id, signal.SIGSTOP, [0, 1])  # or it could be over before the answer
    status = json.loads(dino("status", str(path), "--json").ok().out)
    assert (status["job_id"], status["state"], status["total_steps"]) == (run.job_id, "RUNNING", 120)
    assert 30 <= status["step"] <= 120
    assert f"job {run.job_id}" in dino(*again).refusal()
    cluster.signal_tasks(run.job_id, signal.SIGCONT, [0, 1])

    run.wait_for_end()
    assert_undisturbed(path)
    assert [row["why"] for row in run.events("stop")] == ["reached train.length"]
    assert not run.events("fault", "requeue", "signal")
    status = json.loads(dino("status", str(path), "--json").ok().out)
    assert (status["state"], status["step"], status["restarts"]) == ("COMPLETED", 120, 0)
    (listed,) = json.loads(dino("status", "--json").ok().out)
    assert listed["run_dir"] == str(path)
    assert "done: 120 steps" in dino("logs", str(path)).ok().out
    dino("logs", str(path), "--rank", "1").ok()


@pytest.mark.parametrize(("user_signal", "name"), [(True, "SIGUSR2"), (False, "SIGTERM")])
def test_preempted(
    user_signal: bool, name: str, cluster: Any, launch: Launch, assert_undisturbed: Compare, tmp_path: Path
) -> None:
    """Slurm needs the nodes for others: no step is lost, with a warning signal and with SIGTERM alone."""
    cluster.set_user_signal(user_signal)
    run = launch(tmp_path / "run")
    run.wait_for_step(30)
    other = cluster.preempt(1)
    run.wait_until(lambda: len(run.events("start")) == 2, "second start")
    assert cluster.job(other).state == "COMPLETED", "the job that needed the nodes has not had them"
    run.wait_for_end()
    assert_stopped_without_loss(run, {name})
    assert_undisturbed(tmp_path / "run")


def test_time_limit(launch: Launch, assert_undisturbed: Compare, tmp_path: Path) -> None:
    """A run that needs longer than its job may take gets there in several starts."""
    # The first start has less left than the 30 s that are kept back: it stops at its first save, however fast it is.
    waste = "test ${SLURM_RESTART_COUNT:-0} -gt 0 || sleep 28"
    run = launch(tmp_path / "run", "--time", "1", "--setup", waste)
    run.wait_for_end(patience_s=330)  # half a minute a start: slow machines need several
    # Slurm warns up to a minute early; otherwise the run's own clock is first.
    assert_stopped_without_loss(run, {"SIGUSR2", "time limit"})
    assert_undisturbed(tmp_path / "run")


def assert_stopped_without_loss(run: Any, reasons: set[str]) -> None:
    """Each stop: signal, save, requeue at one step, where the next start goes on."""
    story = [(row["event"], row["step"]) for row in run.events("signal", "save", "requeue", "restore", "stop")]
    stops = [step for event, step in story if event == "requeue"]
    assert stops
    for step in stops:
        assert [event for event, at in story if at == step if event != "signal"] == ["save", "requeue", "restore"]
    assert {row["why"] for row in run.events("signal")} <= reasons
    assert {row["step"] for row in run.events("signal")} == set(stops)
    assert [row["step"] for row in run.events("start")] == [0, *stops]
    assert not run.events("fault")


def test_a_cancelled_run_is_saved_and_stays_gone(
    cluster: Any, launch: Launch, dino: Launch, assert_undisturbed: Compare, tmp_path: Path
) -> None:
    """Slurm sends SIGTERM for scancel as it does for a preemption; the run must tell them apart."""
    path = tmp_path / "run"
    first = launch(path)
    first.wait_for_step(30)
    cluster.run("scancel", first.job_id)
    assert_gone(cluster, first)
    assert first.state() == "CANCELLED"
    saved = first.newest_checkpoint()

    second = launch(path)
    second.wait_for_step(saved + 20, starts=2)
    said = json.loads(dino("cancel", str(path), "--json").ok().out)
    assert_gone(cluster, second)
    assert (said["saved_step"], said["saved_now"]) == (second.newest_checkpoint(), True)

    queued = launch(path, "--slurm", "begin=now+1hour")
    dino("cancel", str(path)).ok()
    assert_gone(cluster, queued)
    assert queued.state() == "CANCELLED"

    last = launch(path)
    last.wait_for_end()
    last.assert_restarted_at_the_saved_steps()
    assert len(last.events("start")) == 3
    assert_undisturbed(path)


def assert_gone(cluster: Any, run: Any) -> None:
    """The job is over, no process of it is left that could bring it back, and the last step that it did is saved."""
    cluster.wait_for(lambda: run.state() not in ("RUNNING", "COMPLETING", "PENDING"), "end of the job", 60)
    cluster.wait_for(lambda: not cluster.processes_of_job(run.job_id), "end of its processes", 60)
    assert cluster.job(run.job_id).is_over
    assert not run.events("requeue")
    assert run.newest_checkpoint() == run.last_logged_step(), "a step was lost"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--partition", "nope"], "nope"),
        (["--time", "3 days"], "--time"),
        (["--nodes", "3"], "3"),
        (["--partition", "closed", "--account", "chemistry"], "account"),
        (["--slurm", "frobnicate=1"], "frobnicate"),
    ],
    ids=["partition", "time", "nodes", "account", "option"],
)
def test_what_slurm_refuses_is_one_line_and_submits_nothing(
    options: list[str], words: str, cluster: Any, dino: Launch, small: Callable[..., list[str]], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    ended = dino("launch", *small(path), "--nodes", "2", "--no-probe", *options)
    assert words in ended.refusal()
    assert ended.out == ""
    assert not cluster.run("squeue", "-h")
    assert not path.exists()


def test_without_sbatch(
    cluster: Any, dino: Launch, small: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert "sbatch" in dino("launch", *small(tmp_path / "run"), "--nodes", "2").refusal()
    assert os.listdir(tmp_path) == ["bin"]
