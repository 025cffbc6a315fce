"""A save that fails on one rank fails for all, aloud; training goes on and the last checkpoint stays."""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dino_dist.checkpoint import Checkpointer
from dino_dist.dist import World
from dino_dist.ledger import read_rows
from dino_dist.manifest import newest_verified
from dino_dist.run_folder import Attempt, RunFolder

# Torch warns of each save without a process group, which is what the tests in this process mean to do.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def fail_on_last_rank(world: World, begin: Callable[[World], Checkpointer], contents: Any) -> list[Any]:
    saver = begin(world)
    assert saver.save(contents.sharded(world, 10), contents.state, step=10, wait=True)
    if world.rank == world.size - 1:
        # Writing beyond this size fails, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    answers = [saver.save(contents.sharded(world, 20), contents.state, step=20, wait=True)]
    answers += [saver.save(contents.sharded(world, 30), contents.state, step=30), saver.finish()]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    answers += [saver.save(contents.sharded(world, 40), contents.state, step=40, wait=True)]
    return answers


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
def test_full_disk_on_one_rank_fails_the_save_for_all_and_training_goes_on(
    contents: Any,
    folder: RunFolder,
    ranks: Callable[..., list[Any]],
    rank_checkpointer: Callable[[World], Checkpointer],
    names: Callable[[], list[str]],
    faults: Callable[[], list[str]],
    size: int,
) -> None:
    if size == 1:
        # Alone, the ledger cannot be written either: the log must say it, and nothing may raise.
        assert ranks(1, fail_on_last_rank, rank_checkpointer, contents) == [[False, True, False, True]]
    else:
        assert ranks(2, fail_on_last_rank, rank_checkpointer, contents) == [[False, True, False, True]] * 2
        assert [row["step"] for row in read_rows(folder.ledger) if row["event"] == "fault"] == [20, 30]
        assert all("File too large" in why for why in faults())
    assert names() == ["step-00000010", "step-00000040"]


def test_failed_save_is_loud(
    folder: RunFolder,
    attempt: Attempt,
    checkpointer: Callable[..., Checkpointer],
    names: Callable[[], list[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    saver = checkpointer(attempt)
    shared = torch.ones(3)
    with caplog.at_level(logging.ERROR):
        assert not saver.save({"a": shared, "b": shared}, {}, step=5, wait=True)
    assert any("CHECKPOINT OF STEP 5 FAILED" in record.message for record in caplog.records)
    assert [row["step"] for row in read_rows(folder.ledger)] == [5]
    assert names() == []


def die_in_the_second_save(world: World, begin: Callable[[World], Checkpointer], contents: Any) -> Any:
    saver = begin(world)
    assert saver.save(contents.sharded(world, 10), contents.state, step=10, wait=True)
    if world.rank == 1:
        return None
    return saver.save(contents.sharded(world, 20), contents.state, step=20, wait=True)


@pytest.mark.distributed
def test_lost_rank_fails_the_save_and_keeps_the_last_one(
    contents: Any,
    folder: RunFolder,
    ranks: Callable[..., list[Any]],
    rank_checkpointer: Callable[[World], Checkpointer],
) -> None:
    assert ranks(2, die_in_the_second_save, rank_checkpointer, contents) == [False, None]
    good, bad = newest_verified(folder.checkpoints)
    assert good is not None
    assert (good.step, bad) == (10, {})
