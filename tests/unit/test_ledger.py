"""JSON lines keep every row whole and exact, through torn writes, full disks and restarts."""

from __future__ import annotations

import json
import math
import multiprocessing
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from dino_dist.ledger import JsonLines, Ledger, read_rows
from dino_dist.run_folder import Attempt, RunFolder


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Attempt]:
    folder = RunFolder(tmp_path)
    folder.create()
    with folder.begin_attempt() as begun:
        yield begun


def test_floats_come_back_to_the_last_bit(attempt: Attempt, tmp_path: Path) -> None:
    rng = random.Random(5)
    values = [rng.uniform(-1, 1) * 10.0 ** rng.randint(-300, 300) for _ in range(200)]
    lines = JsonLines(tmp_path / "metrics.jsonl", attempt)
    for step, value in enumerate(values):
        lines.append({"step": step, "loss": value})
    assert [row["loss"] for row in lines.read()] == values


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_number_is_null_and_said(attempt: Attempt, tmp_path: Path, value: float) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl", attempt)
    lines.append({"step": 1, "loss": value, "lr": 0.5})
    line = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert strict == {"step": 1, "loss": None, "lr": 0.5, "not_finite": {"loss": str(value)}}


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2}\n{"st', b"\x00\x00\x00", b"\xff\xfe{"])
def test_torn_line_costs_no_whole_row(attempt: Attempt, tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    whole = [{"step": 1}, {"step": 2}] if b"\n" in torn else [{"step": 1}]
    assert read_rows(path) == whole
    JsonLines(path, attempt).append({"step": 3})
    assert read_rows(path) == [*whole, {"step": 3}]


def test_rows_after_the_restored_step_are_cut(attempt: Attempt, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, attempt)
    assert lines.cut_after(0) == 0
    path.write_bytes(b"".join(b'{"step": %d, "loss": 0.1}\n' % step for step in range(10)) + b'{"kind": "note"}\n{"st')
    assert lines.cut_after(6) == 4
    assert [row.get("step") for row in lines.read()] == [0, 1, 2, 3, 4, 5, 6, None]
    before = path.stat().st_ino
    assert lines.cut_after(6) == 0
    assert path.stat().st_ino == before


def test_ledger_row_has_its_fields(attempt: Attempt, tmp_path: Path) -> None:
    Ledger(attempt, rank=3, host="node7").append("save", step=12, why="asked", seconds=0.5)
    (row,) = read_rows(tmp_path / "ledger.jsonl")
    assert row.pop("time").endswith("+00:00")
    assert row == {
        "event": "save",
        "step": 12,
        "attempt": 1,
        "rank": 3,
        "host": "node7",
        "why": "asked",
        "seconds": 0.5,
    }


def append_until_full(path: Path, attempt: Attempt) -> None:
    lines = JsonLines(path, attempt)
    lines.append({"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match=r"space|large"):
        lines.append({"step": 2, "padding": "x" * 100})
    with pytest.raises(OSError, match=r"space|large"):
        lines.append({"step": 3, "padding": "x" * 100})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    lines.append({"step": 4})


@pytest.mark.distributed
def test_full_disk_leaves_no_half_row(attempt: Attempt, tmp_path: Path) -> None:
    # In a child, since the limit on file sizes would hold for the whole test run.
    child = multiprocessing.get_context("fork").Process(
        target=append_until_full, args=(tmp_path / "metrics.jsonl", attempt)
    )
    child.start()
    child.join()
    assert child.exitcode == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 4}\n'
