"""What a run folder says of a run: while it runs, after any end, torn or empty, submitted or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dino_dist.config_file import load_config, to_yaml
from dino_dist.data.shards.index import open_dataset
from dino_dist.errors import UserError
from dino_dist.ledger import JsonLines, Ledger
from dino_dist.manifest import STATE, folder_name
from dino_dist.run_folder import Attempt, RunFolder
from launch.faulty_hosts import repeat_offenders
from launch.run_progress import progress_of
from launch.status import all_runs, duration_text, print_runs, print_status, status_of
from launch.submission import FILE, Submission

TINY = Path(__file__).parents[1] / "tiny.yaml"
TOTAL_STEPS, BATCH_SIZE = 16, 12


@pytest.fixture(autouse=True)
def no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without Slurm and with a list of submissions of its own."""
    monkeypatch.setenv("PATH", str(tmp_path / "no programs here"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return new_run(tmp_path / "run")


def new_run(path: Path, *settings: str) -> RunFolder:
    folder = RunFolder(path)
    folder.create()
    config = load_config(str(TINY), [f"run.dir={path}", "data.train=/nowhere", *settings])
    folder.config.write_text(to_yaml(config))
    return folder


@pytest.fixture
def attempt(folder: RunFolder) -> Iterator[Attempt]:
    with folder.begin_attempt() as begun:
        yield begun


def log_rows(attempt: Attempt, steps: range, **more: Any) -> None:
    lines = JsonLines(attempt.folder.metrics, attempt)
    for step in steps:
        images_seen = step * BATCH_SIZE
        lines.append({"step": step, "images_seen": images_seen, "epoch": images_seen / 61, **more})


def checkpoint(folder: RunFolder, step: int, state: bytes) -> None:
    place = folder.checkpoints / folder_name(step)
    place.mkdir()
    (place / STATE).write_bytes(state)


def a_submission(run_dir: Path, **changes: Any) -> Submission:
    facts: dict[str, Any] = {
        "job_id": "123",
        "submitted": "2030-01-01T00:00:00+00:00",
        "run_dir": str(run_dir),
        "argv": [],
        "config_file": str(run_dir / "submitted.yaml"),
        "nodes_min": 1,
        "nodes_max": 1,
        "tasks_per_node": 1,
        "gpus_per_node": 0,
        "time_min": None,
        "partition": None,
        "slurm_folder": str(run_dir / "slurm"),
        "code": {"commit": "abc"},
    }
    return Submission(**(facts | changes))


def test_a_run_that_was_never_submitted(folder: RunFolder, attempt: Attempt) -> None:
    ledger = Ledger(attempt, rank=0)
    ledger.append("start", step=0, why="2 ranks")
    log_rows(attempt, range(1, 7), images_per_s=24.0, save_s=1.5)
    checkpoint(folder, 4, b"{}")
    checkpoint(folder, 8, b"torn")
    (folder.checkpoints / "step-00000012.tmp-000001").mkdir()
    found = status_of(folder.path)
    assert (found["state"], found["state_from"], found["run_state"]) == ("RUNNING", "ledger", "RUNNING")
    assert (found["job_id"], found["requeues"], found["notes"]) == (None, None, [])
    assert (found["step"], found["total_steps"], found["checkpoint_step"]) == (6, TOTAL_STEPS, 8)
    assert found["images_per_s"] == pytest.approx(24.0)
    assert found["eta_s"] == pytest.approx((TOTAL_STEPS - 6) * BATCH_SIZE / 24.0)
    assert (found["attempts"], found["restarts"]) == (1, 0)
    assert found["last_event"]["event"] == "start"
    assert found["last_fault"] is None
    assert json.loads(json.dumps(found)) == found
    assert progress_of(folder).save_s == 1.5


def test_the_speed_is_that_of_the_last_rows(folder: RunFolder, attempt: Attempt) -> None:
    log_rows(attempt, range(1, 50), images_per_s=1000.0)
    log_rows(attempt, range(50, 55), images_per_s=10.0)
    log_rows(attempt, range(55, 60), images_per_s=30.0)
    log_rows(attempt, range(60, 61), knn_top1=0.5)
    found = status_of(folder.path)
    assert found["images_per_s"] == pytest.approx(15.0), "as many images at 10/s as at 30/s"
    assert found["step"] == 60


def test_only_the_end_of_a_long_file_of_metrics_is_read(folder: RunFolder, attempt: Attempt) -> None:
    log_rows(attempt, range(1, 2), images_per_s=1.0)
    row = json.dumps({"step": 2, "images_per_s": 2.0, "filler": "x" * 100})
    with open(folder.metrics, "a") as file:
        file.write("".join(f"{row}\n" for _ in range(3000)))
        file.write('{"step": 9, "images_p')
    assert status_of(folder.path)["step"] == 2


@pytest.mark.parametrize(
    ("last", "state"),
    [
        ({"event": "stop", "step": TOTAL_STEPS, "why": "done"}, "COMPLETED"),
        ({"event": "stop", "step": 5, "why": "stopped early"}, "STOPPED"),
        ({"event": "stop", "step": 5, "why": "stopped early", "exit_code": 3}, "STOPPED"),
        ({"event": "stop", "step": 5, "why": "gave up", "exit_code": 1}, "FAILED"),
        ({"event": "requeue", "step": 5, "why": "preempted"}, "STOPPED"),
        ({"event": "fault", "step": 5, "why": "no memory"}, "FAILED"),
        ({"event": "start", "step": 5, "why": "2 ranks"}, "FAILED"),
    ],
)
def test_how_a_run_ended(folder: RunFolder, last: dict[str, Any], state: str) -> None:
    with folder.begin_attempt() as earlier:
        Ledger(earlier, rank=0).append("stop", step=TOTAL_STEPS, why="of an earlier attempt")
    with folder.begin_attempt() as attempt:
        Ledger(attempt, rank=0).append("start", step=0, why="2 ranks")
        Ledger(attempt, rank=0).append(**last)
    found = status_of(folder.path)
    assert (found["state"], found["attempts"]) == (state, 2)


def test_a_killed_run(folder: RunFolder) -> None:
    program = (
        "import os, sys; from pathlib import Path; from dino_dist.run_folder import RunFolder; "
        "RunFolder(Path(sys.argv[1])).begin_attempt(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(folder.path)], cwd=TINY.parents[1], check=False)
    assert status_of(folder.path)["state"] == "KILLED"


@pytest.mark.parametrize(("age_s", "state"), [(5.0, "RUNNING"), (3600.0, "KILLED")])
def test_a_run_on_another_host_is_known_by_its_heartbeat(folder: RunFolder, age_s: float, state: str) -> None:
    with folder.begin_attempt() as attempt:
        owner = json.loads(folder.attempt_file(1).read_text())
    folder.ended_file(attempt.number).unlink()
    folder.attempt_file(1).write_text(json.dumps(owner | {"host": "another"}))
    now_s = folder.attempt_file(1).stat().st_mtime
    os.utime(folder.attempt_file(1), (now_s - age_s, now_s - age_s))
    assert status_of(folder.path)["state"] == state


@pytest.mark.parametrize("torn", [b"", b'{"event": "sta', b"\x00\xff\n[]\n3\nnull\n"])
def test_a_torn_ledger_and_torn_metrics(folder: RunFolder, attempt: Attempt, torn: bytes) -> None:
    folder.ledger.write_bytes(torn)
    folder.metrics.write_bytes(torn)
    found = status_of(folder.path)
    assert (found["step"], found["last_event"], found["images_per_s"], found["eta_s"]) == (0, None, None, None)
    Ledger(attempt, rank=0).append("save", step=4, why="due")
    found = status_of(folder.path)
    assert (found["step"], found["last_event"]["event"]) == (4, "save")


def test_rows_with_surprises(folder: RunFolder, attempt: Attempt) -> None:
    folder.metrics.write_text('{"step": null, "images_per_s": "fast", "epoch": 0, "images_seen": 0}\n{"epoch": 0.0}\n')
    folder.ledger.write_text('{"event": "fault"}\n{"attempt": 1, "step": "4", "event": 7}\n{"step": true}\n')
    found = status_of(folder.path)
    assert (found["step"], found["last_fault"]) == (0, {})
    print_status(found)


def test_the_last_fault_is_named(folder: RunFolder, attempt: Attempt, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(attempt, rank=1, host="n[1]")
    ledger.append("fault", step=3, why="first")
    ledger.append("fault", step=7, why="rank 0 hangs", suspect_host="n0", stacks={"0": "long"})
    ledger.append("restore", step=4, why="newest")
    found = status_of(folder.path)
    fault = found["last_fault"]
    assert {key: fault[key] for key in ("step", "host", "suspect_host", "why")} == {
        "step": 7,
        "host": "n[1]",
        "suspect_host": "n0",
        "why": "rank 0 hangs",
    }
    assert "stacks" not in fault
    assert fault["time"] == ledger.read()[1]["time"]
    print_status(found)
    assert "n[1]" in capsys.readouterr().out, "taken for markup"


@pytest.mark.parametrize("source", ["checkpoint", "rows", "manifest", "nothing"])
def test_epochs_become_steps(tmp_path: Path, source: str, make_shards: Callable[..., Path]) -> None:
    shards = make_shards(tmp_path / "shards", [23, 20, 18])
    folder = new_run(tmp_path / "run", "train.length=10ep", f"data.train={shards}")
    with folder.begin_attempt() as attempt:
        if source == "checkpoint":
            checkpoint(folder, 4, b'{"dataset_samples": 61}')
        elif source == "rows":
            log_rows(attempt, range(1, 8))
        elif source == "manifest":
            open_dataset(str(shards), fallback_dir=tmp_path)
        found = status_of(folder.path)
    if source == "nothing":
        assert found["total_steps"] is None
        assert len(found["notes"]) == 1
        assert not (shards / "manifest.json").exists(), "asking changes nothing"
    else:
        assert (found["total_steps"], found["notes"]) == (51, [])


def test_the_config_that_was_written_last_counts(folder: RunFolder, attempt: Attempt) -> None:
    submitted = folder.path / "submitted.yaml"
    submitted.write_text(folder.config.read_text().replace("length: 16st", "length: 99st"))
    os.utime(submitted, (1, 1))
    assert status_of(folder.path)["total_steps"] == 16
    os.utime(folder.config, (0, 0))
    assert status_of(folder.path)["total_steps"] == 99


def test_a_broken_config_costs_the_number_of_steps_only(folder: RunFolder, attempt: Attempt) -> None:
    folder.config.write_text("train: {lenght: 5}\n")
    log_rows(attempt, range(1, 4), images_per_s=5.0)
    found = status_of(folder.path)
    assert (found["step"], found["total_steps"], found["eta_s"]) == (3, None, None)
    assert "lenght" in found["notes"][0]


def test_without_slurm_a_submitted_run_is_told_by_its_files(folder: RunFolder, attempt: Attempt) -> None:
    a_submission(folder.path, job_id="123_4", partition="low").write(folder.path)
    found = status_of(folder.path)
    assert (found["job_id"], found["state"], found["state_from"]) == ("123_4", "RUNNING", "ledger")
    assert "scontrol is not on the PATH" in found["notes"][0]
    assert (found["commit"], found["partition"]) == ("abc", "low")


def test_no_run_is_a_user_error(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match=str(path)) as caught:
            status_of(path)
        assert "\n" not in str(caught.value)


def test_all_runs_newest_first_and_each_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert all_runs() == []
    print_runs([])
    for name in ("a", "b", "gone", "a", "torn"):
        folder = new_run(tmp_path / name)
        a_submission(folder.path).write(folder.path)
    (tmp_path / "gone").rename(tmp_path / "elsewhere")
    (tmp_path / "torn" / FILE).write_text("{")
    found = all_runs()
    assert [Path(run["run_dir"]).name for run in found] == ["torn", "a", "b"]
    assert FILE in found[0]["error"]
    assert [run["state"] for run in found[1:]] == ["NEW", "NEW"]
    assert len(all_runs(newest=2)) == 2
    print_runs(found)
    printed = capsys.readouterr().out
    folded = "".join(line.rstrip().rpartition(" ")[2] for line in printed.splitlines())
    assert str(tmp_path / "b") in folded, "a name that is cut short cannot be copied"
    assert found[0]["error"] in printed


def test_status_needs_no_torch() -> None:
    program = "import sys, launch.status, launch.logs, launch.cancel, launch.snapshot; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=TINY.parents[1], check=True)


@pytest.mark.parametrize(("seconds", "text"), [(None, ""), (0.4, "0:00:00"), (3723.0, "1:02:03")])
def test_durations_in_words(seconds: float | None, text: str) -> None:
    assert duration_text(seconds) == text


def fault(attempt: int | None, host: Any, why: str = "", event: str = "fault") -> dict[str, Any]:
    return {"event": event, "attempt": attempt, "suspect_host": host, "host": "reporter", "why": why, "time": "t"}


def test_hosts_with_faults_in_two_attempts_are_proposed() -> None:
    rows = [
        fault(1, "n1"),
        fault(1, "n2"),
        fault(1, "n2", "two reports of one fault"),
        fault(2, "n1", "again"),
        fault(2, "n3"),
        fault(3, "n3"),
        fault(4, "n3", "worst"),
        fault(3, "n2", event="save"),
        fault(None, "n2"),
        fault(5, None),
        fault(6, None),
        fault(5, ""),
        {"event": "fault", "attempt": 7, "host": "n2"},
    ]
    found = repeat_offenders(rows)
    assert [(host.host, host.attempts, host.last_why) for host in found] == [("n3", 3, "worst"), ("n1", 2, "again")]
    assert repeat_offenders([]) == []


def test_the_proposal_is_in_the_status(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with folder.begin_attempt() as attempt:
            Ledger(attempt, rank=0).append("fault", step=1, why="lost", suspect_host="n7")
    found = status_of(folder.path)
    assert found["suggest_exclude"] == ["n7"]
    print_status(found)
    assert "n7 (repeated faults)" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["1e308", "Infinity", "1" + "0" * 400, "1e-320", "NaN", '"ten"', "null"])
@pytest.mark.parametrize("key", ["images_seen", "epoch", "images_per_s"])
def test_a_number_that_nothing_can_be_reckoned_with_is_left_out(key: str, value: str, folder: RunFolder) -> None:
    folder.config.write_text("data: {train: x}\ntrain: {length: 10ep}\n")
    row = {"step": 7, "images_seen": 700, "epoch": 0.5, "images_per_s": 10.0}
    line = json.dumps(row | {key: "HERE"}).replace('"HERE"', value)
    folder.metrics.write_text(f"{json.dumps(row)}\n{line}\n")
    progress = progress_of(folder)
    assert progress.step == 7
    assert progress.left_s is None or progress.left_s >= 0
