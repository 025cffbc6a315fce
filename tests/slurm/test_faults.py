"""What happens to jobs on clusters, done to one: the run gets to its end by itself, and the ledger names the cause."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dino_dist.ledger import read_rows
from dino_dist.manifest import committed

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

Launch = Callable[..., Any]
Compare = Callable[[Path], None]
SAVE_EVERY = 25


def test_ranks_that_are_killed_and_one_that_hangs(
    cluster: Any, launch: Launch, assert_undisturbed: Compare, tmp_path: Path
) -> None:
    run = launch(tmp_path / "run", overrides=["parallel.timeout_s=10"])
    for start, (number, ranks, names) in enumerate(
        [
            (signal.SIGKILL, [1], ["rank 1", "n1", "Killed"]),
            (signal.SIGKILL, [0, 1], ["Killed"]),
            (signal.SIGSTOP, [1], ["rank 1", "n1"]),
        ],
        start=1,
    ):
        run.wait_for_step(30 * start, starts=start)
        cluster.signal_tasks(run.job_id, number, ranks)
        run.wait_until(lambda start=start: len(run.events("start")) > start, f"start {start + 1}")
        faults = " | ".join(f"{row['why']} ({row['host']})" for row in run.events("fault") if row["attempt"] == start)
        assert [name for name in names if name not in faults] == [], faults
    run.wait_for_end()
    assert_at_most_one_interval_lost(run)
    assert_undisturbed(tmp_path / "run")


def test_a_lost_node_comes_back(cluster: Any, launch: Launch, assert_undisturbed: Compare, tmp_path: Path) -> None:
    """The first node, with the supervisor: its slurmd is gone, and nothing there is ended by Slurm."""
    run = launch(tmp_path / "run")
    run.wait_for_step(30)
    cluster.stop_node("n0")
    cluster.wait_for(lambda: run.state() == "PENDING", "requeue", 60)
    cluster.start_node("n0")
    # Slurm ends what is left there; a new start beside it would make Slurm drain the node.
    cluster.wait_for(lambda: not cluster.processes_of_job(run.job_id), "end of the first start's processes", 60)
    run.wait_for_end()
    assert len(run.events("start")) >= 2
    assert_at_most_one_interval_lost(run)
    assert_undisturbed(tmp_path / "run")


def test_a_run_on_one_or_two_nodes_goes_on_without_a_lost_one(
    cluster: Any, launch: Launch, undisturbed_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = launch(tmp_path / "run", "--nodes", "1-2")
    run.wait_for_step(30)
    cluster.stop_node("n1")
    run.wait_for_end()
    assert [row["why"] for row in run.events("start")] == ["2 ranks", "1 ranks"]
    assert "n1" in " ".join(f"{row['why']} {row.get('suspect_host')}" for row in run.events("fault"))
    assert_at_most_one_interval_lost(run)
    found = read_rows(run.folder.metrics)
    assert [row["step"] for row in found] == [row["step"] for row in undisturbed_rows]
    for one, other in zip(found, undisturbed_rows, strict=True):
        # The sums over ranks are rounded otherwise; what is trained on is the same.
        assert (one["images_seen"], one["lr"]) == (other["images_seen"], other["lr"])
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)


def test_requeue_fails_at_first(cluster: Any, launch: Launch, assert_undisturbed: Compare, tmp_path: Path) -> None:
    """Longer than the ranks try: the supervisor goes on trying."""
    run = launch(tmp_path / "run", "--setup", broken_requeue(tmp_path, failures=5))
    run.wait_for_step(30)
    cluster.signal_tasks(run.job_id, signal.SIGUSR2, [0])
    run.wait_for_end()
    assert "Connection refused" in " ".join(row["why"] for row in run.events("fault"))
    assert [row["step"] for row in run.events("start")][1:] == [row["step"] for row in run.events("signal")]
    assert_undisturbed(tmp_path / "run")


def test_requeue_fails_under_preemption(
    cluster: Any, launch: Launch, assert_undisturbed: Compare, tmp_path: Path
) -> None:
    """Slurm requeues the job itself once it has killed it: until then the ranks stay."""
    run = launch(tmp_path / "run", "--setup", broken_requeue(tmp_path, failures=1000))
    run.wait_for_step(30)
    cluster.preempt(1)
    run.wait_for_end()
    assert len(run.events("start")) == 2
    assert "Connection refused" in " ".join(row["why"] for row in run.events("fault"))
    assert [row["step"] for row in run.events("start")][1:] == [row["step"] for row in run.events("signal")[:1]]
    assert_undisturbed(tmp_path / "run")


def test_cancelled_within_the_grace_time_it_stays_gone(cluster: Any, launch: Launch, tmp_path: Path) -> None:
    """A cancelled job still has the PreemptTime of its preemption, and Slurm would take a requeue."""
    run = launch(tmp_path / "run", "--setup", broken_requeue(tmp_path, failures=4))  # so that the ranks wait there
    run.wait_for_step(30)
    cluster.preempt(1)
    run.wait_until(lambda: any("Connection refused" in row["why"] for row in run.events("fault")), "refusal")
    cluster.run("scancel", run.job_id)
    cluster.wait_for(lambda: run.state() not in ("RUNNING", "COMPLETING", "PENDING"), "end of the job", 60)
    cluster.wait_for(lambda: not cluster.processes_of_job(run.job_id), "end of its processes", 60)
    assert run.state() == "CANCELLED"
    assert not run.events("requeue")


def broken_requeue(folder: Path, *, failures: int) -> str:
    """A setup line with which `scontrol requeue` fails so often; all else that scontrol is asked is answered."""
    script = folder / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = requeue ] && [ "$(cat {folder}/failures 2>/dev/null | wc -l)" -lt {failures} ]; then\n'
        f"  echo failed >> {folder}/failures\n"
        '  echo "slurm_requeue error: Connection refused" >&2\n'
        "  exit 1\n"
        "fi\n"
        f'exec {shutil.which("scontrol")} "$@"\n'
    )
    script.chmod(0o755)
    return f"export PATH={script.parent}:$PATH"


def test_signals_during_the_save_and_damage_before_the_next_start(
    cluster: Any, launch: Launch, assert_undisturbed: Compare, tmp_path: Path
) -> None:
    run = launch(tmp_path / "run")
    run.wait_for_step(30)
    storm = itertools.cycle([signal.SIGUSR2, signal.SIGTERM])
    cluster.wait_for(lambda: send_to_all(cluster, run, next(storm)) or run.events("requeue"), "requeue", 60)
    cluster.wait_for(lambda: run.state() == "PENDING", "requeued job", 60)
    (saved,) = {row["step"] for row in run.events("requeue")}
    step, newest = max(committed(run.folder.checkpoints))
    assert step == saved
    flip_a_byte(max(newest.glob("*.safetensors"), key=lambda file: file.stat().st_size))

    run.wait_for_end()
    assert [row["step"] for row in run.events("start")] == [0, SAVE_EVERY]
    assert f"step-{saved:08d}" in " ".join(row["why"] for row in run.events("fault"))
    assert_undisturbed(tmp_path / "run")


def send_to_all(cluster: Any, run: Any, number: signal.Signals) -> None:
    for pid in cluster.task_pids(run.job_id).values():
        with suppress(ProcessLookupError):  # it has left
            os.kill(pid, number)


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def assert_at_most_one_interval_lost(run: Any) -> None:
    """Each start goes on at the newest commit, which is never older than one interval."""
    starts = [row["step"] for row in run.events("start")]
    restored = [row["step"] for row in run.events("restore")]
    assert starts == [0, *restored]
    assert len(set(restored)) == len(restored), f"no progress between starts: {starts}"
    assert all(step >= SAVE_EVERY for step in restored)
