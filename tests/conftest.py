"""What several rooms of the tests share: ranks as forked processes, and small real objects."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dino_dist.dist import World

TIMEOUT_S = 90.0


def _run_rank(function: Callable[..., Any], rank: int, size: int, store: str, pipe: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        world = World(rank=rank, size=size, local_rank=rank, local_size=size, host="here")
        pipe.send((True, function(world, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)  # skip the interpreter's shutdown, which a forked torch process does not survive cleanly


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(world, *args)` on `size` forked gloo ranks; their results in rank order (numpy and plain values)."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        pipes, processes = [], []
        for rank in range(size):
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=_run_rank, args=(function, rank, size, store, sending, args), daemon=True)
            process.start()
            sending.close()
            pipes.append(receiving)
            processes.append(process)
        results = [_receive(pipe, rank) for rank, pipe in enumerate(pipes)]
        for process in processes:
            process.join(TIMEOUT_S)
    failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(results) if not ok]
    if failed:
        raise AssertionError("\n".join(failed))
    return [value for _, value in results]


def _receive(pipe: Any, rank: int) -> tuple[bool, Any]:
    if not pipe.poll(TIMEOUT_S):
        return False, f"no answer within {TIMEOUT_S} s"
    try:
        answer: tuple[bool, Any] = pipe.recv()
        return answer
    except EOFError:
        return False, "died without an answer"


@pytest.fixture(scope="session")
def ranks() -> Callable[..., list[Any]]:
    """`ranks(size, function, *args)`: see `run_ranks`."""
    torch.set_num_threads(1)
    return run_ranks
