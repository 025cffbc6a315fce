"""What the disk does to a run: a checkpoint that was damaged, a disk that is full for a while."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dino_dist.ledger import read_rows
from dino_dist.run_folder import RunFolder

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_the_newest_good_checkpoint_is_taken(
    tiny: Callable[..., list[str]],
    start: Callable[..., Any],
    assert_same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    settings = ["train.length=12st", "eval.knn_every=null"]
    start(tiny(tmp_path / "whole", *settings), 2).end(0)
    start(tiny(tmp_path / "run", *settings), 2).end(0)
    for damage in (flip, truncate, Path.unlink):
        newest = RunFolder(tmp_path / "run").checkpoints / "step-00000012"
        damage(sorted(newest.glob("*.safetensors"))[1])
        again = start(tiny(tmp_path / "run", *settings), 2)
        again.end(0)
        assert again.events("restore")[-1]["step"] == 8
        why = again.events("fault")[-1]["why"]
        assert "step-00000012 does not verify" in why
        assert "safetensors" in why
        assert_same_run(tmp_path / "run", tmp_path / "whole")


def limit_files(run: Any, limit_bytes: int) -> None:
    """No rank can make a file longer than this: the error of a full disk, without a disk to fill."""
    for rank in range(len(run.ranks)):
        resource.prlimit(run.pid(rank), resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))


def test_a_save_on_a_full_disk_is_told_and_training_goes_on(
    tiny: Callable[..., list[str]], start: Callable[..., Any], tmp_path: Path
) -> None:
    settings = ["train.length=26st", "eval.knn_every=null", "metrics.tensorboard=false", "head.hidden_dim=512"]
    run = start(tiny(tmp_path / "run", *settings), 2)
    run.wait_until(lambda: bool(run.events("save")), "first save")
    limit_files(run, 2**19)
    run.wait_until(lambda: bool(run.events("fault")), "fault in the ledger")
    limit_files(run, resource.RLIM_INFINITY)
    run.end(0)
    failed = run.events("fault")
    assert all("save failed" in row["why"] for row in failed)
    assert "training goes on without it" in run.output()
    saved = [row["step"] for row in run.events("save")]
    assert saved[0] == 4
    assert saved[-1] == 26
    assert not {row["step"] for row in failed} & set(saved)
    assert [row["step"] for row in read_rows(run.folder.metrics) if "loss" in row] == list(range(1, 27))


def test_a_disk_too_full_for_rows_and_words_loses_no_row(
    tiny: Callable[..., list[str]],
    start: Callable[..., Any],
    assert_same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    settings = ["train.length=26st", "eval.knn_every=null"]
    (tmp_path / "start-1.log").write_bytes(bytes(8192))  # so that nothing more can be printed either
    run = start(tiny(tmp_path / "run", *settings), 2)
    run.wait_for_step(10)
    assert run.folder.metrics.stat().st_size > 4096
    limit_files(run, 4096)
    run.wait_until(lambda: bool(run.events("fault")), "fault in the ledger")
    limit_files(run, resource.RLIM_INFINITY)
    run.end(0)
    assert [row["step"] for row in read_rows(run.folder.metrics) if "loss" in row] == list(range(1, 27))
    start(tiny(tmp_path / "whole", *settings), 2).end(0)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_disk_that_stays_full_fails_the_run_and_keeps_its_checkpoint(
    tiny: Callable[..., list[str]], start: Callable[..., Any], tmp_path: Path
) -> None:
    settings = ["eval.knn_every=null", "metrics.tensorboard=false", "head.hidden_dim=512"]
    run = start(tiny(tmp_path / "run", *settings), 2)
    run.wait_until(lambda: bool(run.events("save")), "first save")
    limit_files(run, 2**19)
    run.end(1)
    assert "could not be written" in run.output()
    assert "Traceback" not in run.output()
    again = start(tiny(tmp_path / "run", *settings), 2)
    again.end(0)
    assert again.events("restore")[-1]["step"] == again.events("save")[0]["step"]
