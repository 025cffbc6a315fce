"""A run that is killed, signalled and started again is, bit for bit, the run that nobody touched."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dino_dist.manifest import committed, verify
from dino_dist.run_folder import RunFolder

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(240)]

LENGTH = 24
SAVE_EVERY = 5
FAULTS = ("kill all", "kill one", "SIGTERM", "SIGUSR2")
# Every strategy meets every fault; starts are what costs time, so not at both sizes.
CASES = [
    ("fsdp", 2, ("kill one", "SIGUSR2")),
    ("fsdp", 3, FAULTS),
    ("hsdp", 2, ("kill all", "SIGTERM")),
    ("hsdp", 3, ("kill one", "SIGTERM")),
    ("hsdp", 4, ("kill one", "SIGUSR2")),
    ("ddp", 2, ("kill all", "SIGTERM")),
    ("ddp", 3, FAULTS),
    ("oss", 2, ("kill one", "SIGUSR2")),
    ("oss", 3, FAULTS),
]


@pytest.mark.parametrize(("strategy", "size", "faults"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_faults_change_nothing(
    strategy: str,
    size: int,
    faults: tuple[str, ...],
    rng: random.Random,
    tiny: Callable[..., list[str]],
    start: Callable[..., Any],
    assert_same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    settings = [f"train.length={LENGTH}st", f"checkpoint.every={SAVE_EVERY}st", f"parallel.strategy={strategy}"]
    settings += [f"parallel.replicate={3 if size == 3 else 2}"] * (strategy == "hsdp")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start(tiny(whole, *settings), size).end(0)

    # Far enough apart that each fault meets a run that goes on, and before the end.
    bands = sorted(rng.sample((2, 7, 12, 17), len(faults)))
    plan = [(fault, rng.randrange(band, band + 3)) for fault, band in zip(shuffled(faults, rng), bands, strict=True)]
    print(f"{strategy} on {size} ranks: {plan}")
    restored = 0
    for fault, step in plan:
        run = start(tiny(broken, *settings), size)
        run.wait_for_step(step)
        if fault.startswith("kill"):
            restored = kill(run, [rng.randrange(size)] if fault == "kill one" else range(size))
        else:
            restored = stop(run, signal.Signals[fault], rng.sample(range(size), rng.randint(1, size)))
        check_restores(run)
    last = start(tiny(broken, *settings), size)
    last.end(0)
    assert last.events("restore")[-1]["step"] == restored
    assert len(last.events("start")) == len(plan) + 1
    assert_same_run(broken, whole)


def test_a_stop_between_a_step_and_what_follows_from_it(
    tiny: Callable[..., list[str]],
    make_shards: Callable[..., Path],
    start: Callable[..., Any],
    assert_same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    """Each step has an evaluation and a bad sample, and a stop comes before the one is made and the other counted."""
    shards = make_shards(tmp_path / "shards", [12], bad=[b"no image"])
    settings = [f"data.train={shards}", "train.length=12st", "eval.knn_every=1st", "checkpoint.every=50st"]
    start(tiny(tmp_path / "whole", *settings), 1).end(0)
    broken = tiny(tmp_path / "broken", *settings)
    run = start(broken, 1)
    run.wait_for_step(3)
    stopped_at = stop(run, signal.SIGTERM, [0])
    again = start(broken, 1)
    again.wait_for_step(stopped_at + 2)
    kill(again, [0])
    start(broken, 1).end(0)
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def shuffled(faults: tuple[str, ...], rng: random.Random) -> list[str]:
    return rng.sample(faults, len(faults))


def kill(run: Any, victims: Sequence[int]) -> int:
    """kill -9; ranks that are left must end by themselves, with an error. Returns the step to go on from."""
    run.send(signal.SIGKILL, victims)
    codes = run.codes()
    for rank, code in enumerate(codes):
        assert code == (-signal.SIGKILL if rank in victims else 1), f"{codes}\n{run.output()}"
    if len(victims) < len(codes):
        assert "lost contact" in run.output()
        assert any(f"rank {rank}" in run.output() for rank in victims), "the dead are named"
        assert "Traceback" not in run.output(), run.output()
    return newest_step(run.folder)


def stop(run: Any, number: signal.Signals, ranks: list[int]) -> int:
    """A signal to some of the ranks: all save at one step, the last that was logged. Returns it."""
    run.send(number, ranks)
    run.end(3)
    signals = [row for row in run.events("signal") if row["attempt"] == len(run.events("start"))]
    assert sorted(row["rank"] for row in signals) == sorted(ranks)
    assert {row["why"] for row in signals} == {number.name}
    (step,) = {row["step"] for row in signals}
    assert run.events("save")[-1]["step"] == step
    assert run.events("stop")[-1]["step"] == step
    assert newest_step(run.folder) == step == run.last_logged_step(), "a step was lost"
    return step


def check_restores(run: Any) -> None:
    """Each start but the first restored the newest commit of the one before, which the ledger says."""
    events = run.events("save", "restore", "start")
    newest = 0
    for row in events:
        if row["event"] == "save":
            newest = row["step"]
        elif row["event"] == "restore":
            # A kill may come between the commit and its row.
            assert newest <= row["step"] <= newest + SAVE_EVERY
            newest = row["step"]
        else:
            assert row["step"] == newest


def newest_step(folder: RunFolder) -> int:
    found = committed(folder.checkpoints)
    return verify(found[0][1]).step if found else 0
