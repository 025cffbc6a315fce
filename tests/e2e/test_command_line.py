"""The commands as a person types them: help at once, JSON alone, exit codes, several ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dino_dist.ledger import read_rows

pytestmark = pytest.mark.e2e

COMMANDS = [
    *("", "train", "quickstart", "doctor", "shards", "shards build", "shards index", "shards check", "eval knn"),
    *("eval linear", "eval logreg", "eval retrieval", "eval copy", "eval video", "attention", "report", "export"),
]


@pytest.fixture
def python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`python("-m", "launch.cli", ...)`: a process of its own, with this checkout first on its path."""
    root = Path(__file__).parents[2]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]))
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_help_needs_no_torch(python: Callable[..., subprocess.Popen[str]]) -> None:
    program = f"""
import sys
from launch.cli import app
for command in {COMMANDS!r}:
    try:
        app([*command.split(), "--help"])
    except SystemExit as end:
        assert end.code == 0, command
assert not {{"torch", "numpy", "PIL"}} & set(sys.modules)
"""
    process = python("-c", program)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count("Usage:") == len(COMMANDS)


def test_json_alone(
    cli: Callable[..., Any],
    tiny: Callable[..., list[str]],
    make_shards: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shards = make_shards(tmp_path / "shards", [7, 5])
    assert cli("shards", "index", str(shards), "--json").json()["samples"] == 12
    assert cli("shards", "check", str(shards), "--workers", "1", "--json").json()["ok"] is True
    built = cli("shards", "build", str(shards), str(tmp_path / "built"), "--workers", "1", "--json").json()
    assert built["samples"] == 12
    assert cli("train", *tiny(tmp_path / "run", "train.length=2st")).code == 0
    judged = cli("eval", "knn", str(tmp_path / "run"), "--json").json()
    logged = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert judged["step"] == 2
    assert judged["knn_top1_k20"] == logged["knn_top1"]
    told = {row["what"] for row in cli("doctor", "--json").json()}
    assert "torch" in told
    assert "/dev/shm" not in told or "cuda:0" in told  # of what we use, NCCL alone needs room there


def test_a_check_that_finds_bad_images_says_so_twice(
    cli: Callable[..., Any], make_shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shards = make_shards(tmp_path / "shards", [7], bad=[b"no image"])
    ended = cli("shards", "check", str(shards), "--workers", "1", "--json")
    assert ended.code == 2
    assert [row["key"] for row in ended.json()["bad"]] == ["00006"]
    assert len(ended.err.splitlines()) == 1


def test_judging_a_run_without_a_checkpoint(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("data: {train: x, eval_train: x, eval_test: x}")
    assert "no checkpoint that verifies" in cli("eval", "knn", str(tmp_path / "run")).refusal()


@pytest.mark.slow
@pytest.mark.distributed
def test_bad_input_for_two_ranks_is_told_once(
    python: Callable[..., subprocess.Popen[str]],
    cli: Callable[..., Any],
    tiny: Callable[..., list[str]],
    make_shards: Callable[..., Path],
    tmp_path: Path,
) -> None:
    shards = make_shards(tmp_path / "shards", [20])
    settings = tiny(tmp_path / "run", f"data.train={shards}", "train.length=2st")
    assert cli("train", *settings).code == 0
    (shards / "1.tar").write_bytes((make_shards(tmp_path / "more", [5]) / "0.tar").read_bytes())
    one_image = tiny(tmp_path / "other", "train.batch_size=1")
    for overrides, words in ((one_image, "2 ranks for train.batch_size=1"), (settings, "is not the data set")):
        process = python("-m", "launch.cli", "train", *overrides, "--nproc", "2")
        _, err = process.communicate()
        assert process.returncode == 2, err
        # The first line of a run, which says what it is, comes before the checkpoint is read.
        (line,) = [line for line in err.splitlines() if not line.startswith("2 ranks on cpu")]
        assert line.startswith("error: ")
        assert words in line


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_ranks_still_start(
    number: signal.Signals, python: Callable[..., subprocess.Popen[str]], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    process = python("-m", "launch.cli", "train", *tiny(tmp_path / "run"), "--nproc", "2")
    wait_for_children(process, 2)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 3, err
    assert "before the first step" in err
    assert not read_rows(tmp_path / "run" / "metrics.jsonl")


def wait_for_children(process: subprocess.Popen[str], count: int) -> None:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < count:
        assert process.poll() is None


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_starts_the_ranks_too(
    python: Callable[..., subprocess.Popen[str]], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    process = python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "launch.cli"),
        *("train", *tiny(tmp_path / "run", "train.length=3st")),
    )
    _, err = process.communicate()
    assert process.returncode == 0, err
    (first, *_) = read_rows(tmp_path / "run" / "ledger.jsonl")
    assert first["why"] == "2 ranks"
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[2])["step"] == 3
