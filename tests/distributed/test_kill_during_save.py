"""kill -9 at any moment of a save, a commit or a purge leaves checkpoints that are exactly what their step wrote."""

from __future__ import annotations

import collections
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dino_dist.checkpoint import Checkpointer
from dino_dist.checkpoint_tensors import load_tensors
from dino_dist.dist import World
from dino_dist.ledger import read_rows
from dino_dist.manifest import committed, verify
from dino_dist.run_folder import RunFolder

FORK = multiprocessing.get_context("fork")
SEED = 7_431
KILLS_OF_ONE_RANK_RUNS = 60
KILLS_OF_TWO_RANK_RUNS = 8
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def weights(step: int) -> dict[str, Tensor]:
    """What a run holds after `step` steps: large enough that a kill finds half-written files."""
    generator = torch.Generator().manual_seed(step)
    return {f"layer{index}": torch.randn(200, 300, generator=generator) for index in range(4)}


def assert_is_of(step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    assert state == {"step": step}
    for name, wanted in weights(step).items():
        assert torch.equal(tensors[name], wanted), f"{name} is not what step {step} wrote"


def train(folder: RunFolder, world: World, connection: Connection) -> None:
    """Resume, check what was resumed, then save at every step for ever. Reports what it resumed from."""
    attempt = folder.join_attempt(world.broadcast(folder.begin_attempt().number if world.is_first else 0))
    saver = Checkpointer(folder, attempt, world, keep=2, keep_every_steps=None, async_save=True)
    tensors, step = weights(0), 0
    choice = saver.newest()
    if choice is not None:
        state = saver.load(choice, tensors)
        step = choice.step
        assert_is_of(step, tensors, state)
    connection.send(step)
    while True:
        step += 1
        for name, tensor in weights(step).items():
            tensors[name].copy_(tensor)
        saver.save(tensors, {"step": step}, step=step)


def train_alone(folder: RunFolder, connection: Connection) -> None:
    torch.set_num_threads(1)
    train(folder, World(), connection)


def train_as_rank(folder: RunFolder, store: Path, rank: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    train(folder, World(rank=rank, size=2), connection)


def kill_after(
    delay_s: float, starts: list[tuple[Callable[..., None], tuple[Any, ...]]], *, victims: list[int]
) -> list[int]:
    """Start the ranks, wait until all resumed, let them run for a while, kill the victims, then the rest."""
    pipes = [FORK.Pipe() for _ in starts]
    ranks = [
        FORK.Process(target=target, args=(*args, theirs))
        for (target, args), (_, theirs) in zip(starts, pipes, strict=True)
    ]
    for process in ranks:
        process.start()
    for _, theirs in pipes:
        theirs.close()
    try:
        resumed = []
        for ours, _ in pipes:
            assert ours.poll(60), "a rank hangs"
            resumed.append(ours.recv())
        time.sleep(delay_s)
        for victim in victims:
            ranks[victim].kill()
        # The others lose contact in the middle of whatever they do, and get a moment to do something wrong.
        if len(victims) < len(ranks):
            time.sleep(delay_s)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return resumed


def check(folder: RunFolder, at_least: int) -> int:
    """Every folder with a committed name is exactly its step's, and no commit was lost. Returns the newest step."""
    found = [verify(path) for _, path in committed(folder.checkpoints)]
    for checkpoint in found:
        tensors = weights(0)
        load_tensors(checkpoint, tensors)
        assert_is_of(checkpoint.step, tensors, checkpoint.state)
    newest = max((checkpoint.step for checkpoint in found), default=0)
    assert newest >= at_least
    return newest


def said_to_be_saved(folder: RunFolder) -> int:
    return max((row["step"] for row in read_rows(folder.ledger) if row["event"] == "save"), default=0)


def phase(folder: RunFolder) -> str:
    """What the kill interrupted, by what it left behind."""
    names = os.listdir(folder.checkpoints)
    temporary = next((folder.checkpoints / name for name in names if ".tmp-" in name), None)
    if any(name.startswith(".trash-") for name in names):
        return "purging"
    if temporary is None:
        return "between"
    return "before the rename" if (temporary / "manifest.json").exists() else "writing"


def test_sixty_kills_of_a_run_alone(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    folder = RunFolder(tmp_path / "run")
    folder.create()
    step, phases = 0, collections.Counter[str]()
    for _ in range(KILLS_OF_ONE_RANK_RUNS):
        (resumed,) = kill_after(rng.uniform(0, 0.06), [(train_alone, (folder,))], victims=[0])
        assert resumed == step, "it resumed from something else than the newest good checkpoint"
        phases[phase(folder)] += 1
        step = check(folder, at_least=max(step, said_to_be_saved(folder)))
    print(f"seed {SEED}: {step} steps committed, interrupted while {dict(phases)}")
    assert step > 0
    assert len(phases) >= 2, "the kills all came at the same kind of moment"


@pytest.mark.parametrize("victims", [[0, 1], [0], [1]], ids=["both", "first", "second"])
def test_kills_of_ranks_of_two(tmp_path: Path, victims: list[int]) -> None:
    rng = random.Random(SEED + len(victims))
    folder = RunFolder(tmp_path / "run")
    folder.create()
    step = 0
    for kill in range(KILLS_OF_TWO_RANK_RUNS):
        starts = [(train_as_rank, (folder, tmp_path / f"store{kill}", rank)) for rank in range(2)]
        assert kill_after(rng.uniform(0, 0.2), starts, victims=victims) == [step, step]
        step = check(folder, at_least=max(step, said_to_be_saved(folder)))
    assert step > 0
