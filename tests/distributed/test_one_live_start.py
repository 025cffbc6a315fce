"""A run folder belongs to one start at a time: a second is refused, an older one silent; launchers take ranks along."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from dino_dist.ledger import read_rows
from dino_dist.manifest import committed, verify
from dino_dist.run_folder import RunFolder

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_second_start_is_refused_and_the_first_unharmed(
    tiny: Callable[..., list[str]],
    start: Callable[..., Any],
    assert_same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    first = start(tiny(tmp_path / "run"), 2)
    first.wait_for_step(2)
    second = start(tiny(tmp_path / "run"), 2)
    second.end(2)
    (line,) = second.output().splitlines()
    assert line.startswith("error: run.dir=")
    assert socket.gethostname() in line
    assert str(first.pid(0)) in line
    first.end(0)
    start(tiny(tmp_path / "alone"), 2).end(0)
    assert_same_run(tmp_path / "run", tmp_path / "alone")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but the signs of life."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "attempts"
    }


def stop_between_writes(run: Any, lock: Path) -> None:
    """SIGSTOP, but not in the middle of a write: nothing can keep a system call that has begun from ending."""
    rank = psutil.Process(run.pid(0))
    while True:
        rank.suspend()
        while rank.status() != psutil.STATUS_STOPPED:
            pass
        with open(lock, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                rank.resume()


def test_a_rank_that_comes_back_from_an_older_start_writes_nothing(
    tiny: Callable[..., list[str]], start: Callable[..., Any], tmp_path: Path
) -> None:
    old = start(tiny(tmp_path / "run"), 1, job_id="17", restarts=0)
    old.wait_for_step(4)
    stop_between_writes(old, tmp_path / "run" / "attempts" / "lock")
    start(tiny(tmp_path / "run"), 1, job_id="17", restarts=1).end(0)
    before = contents(tmp_path / "run")
    old.send(signal.SIGCONT, [0])
    old.end(1)
    assert "gave way to attempt 2" in old.output()
    assert contents(tmp_path / "run") == before


@pytest.mark.timeout(240)
def test_kills_of_the_launcher_during_a_save(
    tiny: Callable[..., list[str]],
    start: Callable[..., Any],
    assert_same_run: Callable[[Path, Path], None],
    gone: Callable[[Sequence[psutil.Process]], None],
    tmp_path: Path,
) -> None:
    settings = ["train.length=9st", "checkpoint.every=1st", "eval.knn_every=null"]
    folder = RunFolder(tmp_path / "run")
    command = [sys.executable, "-m", "launch.cli", "train", *tiny(folder.path, *settings), "--nproc", "2"]
    root = Path(__file__).parents[2]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]))
    newest = 0
    for kill in range(3):
        saves_before = unfinished_saves(folder)
        launcher = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        try:
            wait_for_a_save(folder, saves_before, launcher)
            ranks = psutil.Process(launcher.pid).children(recursive=True)
        finally:
            launcher.kill()
            launcher.communicate()
        gone(ranks)
        assert len(ranks) >= 2
        found = [verify(path).step for _, path in committed(folder.checkpoints)]
        said = [row["step"] for row in read_rows(folder.ledger) if row["event"] in ("save", "restore")]
        assert max(found, default=0) >= max(said, default=0), f"kill {kill}: a committed checkpoint is gone"
        newest = max(found, default=0)
    end = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert end.returncode == 0, end.stderr
    restored = [row["step"] for row in read_rows(folder.ledger) if row["event"] == "restore"]
    assert restored[-1:] == ([newest] if newest else [])
    start(tiny(tmp_path / "whole", *settings), 2).end(0)
    assert_same_run(folder.path, tmp_path / "whole")


def unfinished_saves(folder: RunFolder) -> set[str]:
    names = os.listdir(folder.checkpoints) if folder.checkpoints.is_dir() else []
    return {name for name in names if ".tmp-" in name}


def wait_for_a_save(folder: RunFolder, earlier: set[str], launcher: subprocess.Popen[bytes]) -> None:
    """Until a save is under way that an earlier start did not leave behind."""
    while not unfinished_saves(folder) - earlier:
        assert launcher.poll() is None, "the run ended before a save"
