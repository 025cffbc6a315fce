"""What fails in the process beside the rank is one clear error, at the batch that it concerns."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_dist.data.loading.batch_copies import HostCopies
from dino_dist.data.loading.decode_process import DecodeJob
from dino_dist.data.loading.loader import Batch, DataProcess, Describe
from dino_dist.data.loading.worker_process import map_in_processes
from dino_dist.data.order.order import StreamIds
from dino_dist.data.order.step_plan import StepPlan
from dino_dist.errors import RunFailed, UserError


def one_job(parts: dict[str, Any], *, describe: Describe | None = None) -> DecodeJob:
    """A step of all samples."""
    plan = StepPlan(order=parts["order"], batch_size=19, rank=0, size=1, accumulate=1)
    return DecodeJob(reader=parts["reader"], plan=plan, describe=describe, start_step=0, stop_step=1, num_threads=2)


def describe_at_length(ids: StreamIds, sizes: NDArray[np.int64]) -> dict[str, Tensor]:
    return {"long": torch.full((2**20,), int(ids.sample_ids[0]))}


@pytest.mark.distributed
@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_in_a_worker_stays_one_line(
    own_shards: Path,
    open_parts: Callable[[Path], dict[str, Any]],
    load: Callable[..., Generator[list[Batch]]],
    num_workers: int,
) -> None:
    parts = open_parts(own_shards)
    missing = range(8, 15)
    good = next(step for step in range(19) if parts["order"].ids(step, step + 1).sample_ids[0] in missing)
    (own_shards / "2.tar").unlink()
    loader = load(parts, batch_size=1, stop_step=19, num_workers=num_workers)
    for _ in range(good):
        next(loader)  # what comes before it still arrives
    with pytest.raises(UserError, match=r"2\.tar: No such file") as caught:
        next(loader)
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []


@pytest.mark.distributed
def test_a_process_killed_within_a_message_is_one_clear_error(
    shards: Path, open_parts: Callable[[Path], dict[str, Any]]
) -> None:
    with closing(DataProcess(one_job(open_parts(shards), describe=describe_at_length), 2**16)) as beside:
        beside._connection.poll(None)  # for its first bytes: the rest is more than a socket takes
        (process,) = multiprocessing.active_children()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        assert not beside.has_batch()
        with pytest.raises(RunFailed, match=rf"pid {process.pid}\) was killed by SIGKILL: by the kernel"):
            beside.receive()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGKILL, r"was killed by SIGKILL: by the kernel, if the memory"),
        (signal.SIGSEGV, r"crashed \(SIGSEGV\): a defect of"),
        (signal.SIGRTMIN + 3, rf"was killed by signal {signal.SIGRTMIN + 3}; the same command"),
    ],
)
def test_a_killed_process_is_one_clear_error(
    shards: Path,
    open_parts: Callable[[Path], dict[str, Any]],
    load: Callable[..., Generator[list[Batch]]],
    number: int,
    how: str,
) -> None:
    loader = load(open_parts(shards), batch_size=4, stop_step=10**6, num_workers=1)
    next(loader)
    (process,) = multiprocessing.active_children()
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    with pytest.raises(RunFailed, match=rf"pid {process.pid}\) {how}") as caught:
        for _ in loader:  # those that were ready may still come
            pass
    assert "\n" not in str(caught.value)


@pytest.mark.distributed
def test_an_error_that_came_ahead_of_time_waits_until_it_is_asked_for(
    own_shards: Path, open_parts: Callable[[Path], dict[str, Any]]
) -> None:
    parts = open_parts(own_shards)
    (own_shards / "2.tar").unlink()
    with closing(DataProcess(one_job(parts), 2**16)) as beside:
        beside._connection.poll(None)
        assert not beside.has_batch()
        for _ in range(2):
            with pytest.raises(UserError, match=r"2\.tar: No such file"):
                beside.receive()
            assert not beside.has_batch()


class CopiesAside(HostCopies):
    """As on a GPU, steps are copied before they are asked for."""

    runs_aside = True


@pytest.mark.distributed
@pytest.mark.parametrize("accumulate", [1, 2])
def test_copying_ahead_ends_with_the_stream(
    own_shards: Path,
    open_parts: Callable[[Path], dict[str, Any]],
    load: Callable[..., Generator[list[Batch]]],
    monkeypatch: pytest.MonkeyPatch,
    accumulate: int,
) -> None:
    parts = open_parts(own_shards)
    good = next(step for step in range(19) if parts["order"].ids(2 * step, 2 * step + 2).sample_ids.max() >= 15)
    (own_shards / "3.tar").unlink()
    monkeypatch.setattr("dino_dist.data.loading.loader.batch_copies", lambda device, memory: CopiesAside(device))
    loader = load(parts, batch_size=2, stop_step=9, accumulate=accumulate, num_workers=2)
    assert [next(loader)[0].step for _ in range(good)] == list(range(good))
    with pytest.raises(UserError, match=r"3\.tar: No such file"):
        next(loader)


def describe_wrongly(ids: StreamIds, sizes: NDArray[np.int64]) -> dict[str, Tensor]:
    raise ZeroDivisionError(f"a defect, at {ids.sample_ids[0]} of {sizes.shape}")


@pytest.mark.distributed
def test_a_defect_in_the_process_is_told_with_its_place(
    shards: Path, open_parts: Callable[[Path], dict[str, Any]], load: Callable[..., Generator[list[Batch]]]
) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)images failed:.*in describe_wrongly.*ZeroDivisionError: a defect, at"):
        next(load(open_parts(shards), batch_size=4, stop_step=1, num_workers=1, describe=describe_wrongly))


def die_of(number: int) -> int:
    os.kill(os.getpid(), number)
    return number


@pytest.mark.distributed
def test_a_worker_of_a_build_that_is_killed_is_one_clear_error() -> None:
    with pytest.raises(RunFailed, match=r"^one of 2 worker processes was killed: by the kernel, if .*") as caught:
        list(map_in_processes(die_of, [0, signal.SIGKILL, 0], num_workers=2))
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []
