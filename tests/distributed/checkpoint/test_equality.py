"""A checkpoint comes back equal on any number of ranks, whatever became of the tensors since."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_dist.checkpoint import Checkpointer
from dino_dist.checkpoint_tensors import load_tensors
from dino_dist.dist import World
from dino_dist.errors import UserError
from dino_dist.ledger import read_rows
from dino_dist.manifest import verify
from dino_dist.run_folder import Attempt, RunFolder

# Torch warns of each save without a process group, which is what the tests in this process mean to do.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save_on_two(world: World, begin: Callable[[World], Checkpointer], contents: Any) -> None:
    saver = begin(world)
    tensors = contents.sharded(world, 10)
    assert saver.save(tensors, contents.state, step=10)
    contents.overwrite(tensors)
    assert saver.finish()
    assert saver.last_save_s is not None


def load_on_any(world: World, begin: Callable[[World], Checkpointer], contents: Any) -> None:
    loader = begin(world)
    tensors = contents.sharded(world, 99)
    choice = loader.newest()
    assert choice is not None
    assert loader.load(choice, tensors) == contents.state
    contents.assert_same(tensors, contents.values(10))
    loader.close()


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_save_and_any_number_loads(
    contents: Any,
    folder: RunFolder,
    ranks: Callable[..., list[Any]],
    checkpointer: Callable[..., Checkpointer],
    rank_checkpointer: Callable[[World], Checkpointer],
    names: Callable[[], list[str]],
) -> None:
    ranks(2, save_on_two, rank_checkpointer, contents)
    assert names() == ["step-00000010"]
    for size in (1, 2, 3):
        ranks(size, load_on_any, rank_checkpointer, contents)
    restored = [row for row in read_rows(folder.ledger) if row["event"] == "restore"]
    assert [(row["step"], row["rank"]) for row in restored] == [(10, 0)] * 3

    with folder.begin_attempt() as attempt:
        loader, tensors = checkpointer(attempt), contents.values(99)
        choice = loader.newest()
        assert choice is not None
        assert loader.load(choice, tensors) == contents.state
        contents.assert_same(tensors, contents.values(10))


def test_tensors_may_change_as_soon_as_save_returns(
    contents: Any, folder: RunFolder, attempt: Attempt, checkpointer: Callable[..., Checkpointer]
) -> None:
    saver = checkpointer(attempt, keep=3)
    tensors, state = contents.values(0), dict(contents.state)
    for step in (1, 2, 3):
        for name, tensor in contents.values(step).items():
            tensors[name].copy_(tensor)
        state["step"] = step
        assert saver.save(tensors, state, step=step)
        contents.overwrite(tensors)
        state["step"] = -1
    assert saver.finish()
    for step in (1, 2, 3):
        checkpoint = verify(folder.checkpoints / f"step-{step:08d}")
        load_tensors(checkpoint, tensors)
        contents.assert_same(tensors, contents.values(step))
        assert checkpoint.state == contents.state | {"step": step}


def test_synchronous_save_is_committed_at_return(
    contents: Any, attempt: Attempt, checkpointer: Callable[..., Checkpointer], names: Callable[[], list[str]]
) -> None:
    assert checkpointer(attempt, async_save=False).save(contents.values(1), contents.state, step=1)
    assert names() == ["step-00000001"]


def test_same_step_is_not_written_again(three: Checkpointer, contents: Any, folder: RunFolder) -> None:
    before = os.stat(folder.checkpoints / "step-00000030").st_ino
    assert three.save(contents.values(0), contents.state, step=30, wait=True)
    assert os.stat(folder.checkpoints / "step-00000030").st_ino == before


def test_new_run_has_no_checkpoint(attempt: Attempt, checkpointer: Callable[..., Checkpointer]) -> None:
    assert checkpointer(attempt).newest() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda wanted: wanted.pop("center"), "center is in it but not in the model"),
        (lambda wanted: wanted.update(extra=torch.zeros(1)), "extra is missing from it"),
        (
            lambda wanted: wanted.update(center=torch.zeros(1, 9)),
            r"center is torch.float64\[1, 9\] in it, torch.float32",
        ),
        (lambda wanted: wanted.update(half=torch.zeros(4).bfloat16()), r"half is torch.bfloat16\[3\] in it"),
    ],
)
def test_only_exactly_fitting_tensors_are_loaded(
    three: Checkpointer, contents: Any, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    choice, wanted = three.newest(), contents.values(0)
    assert choice is not None
    change(wanted)
    before = {name: tensor.clone() for name, tensor in wanted.items()}
    with pytest.raises(UserError, match=message):
        three.load(choice, wanted)
    contents.assert_same(wanted, before)


def test_evaluation_may_load_a_part(three: Checkpointer, contents: Any) -> None:
    choice = three.newest()
    assert choice is not None
    part = {"center": torch.zeros(1, 9, dtype=torch.float64)}
    load_tensors(choice, part, subset=True)
    contents.assert_same(part, {"center": contents.values(30)["center"]})
