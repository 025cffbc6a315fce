"""The process beside a rank outlives the job's signals, but neither its iterator nor its rank."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from dino_dist.data.loading.loader import Batch


def named_memory(pid: int) -> int:
    """How much of /dev/shm a process has mapped, in pieces."""
    return Path(f"/proc/{pid}/maps").read_text().count("/dev/shm/")


@pytest.mark.distributed
def test_closing_the_iterator_ends_its_process(
    shards: Path, open_parts: Callable[[Path], dict[str, Any]], load: Callable[..., Generator[list[Batch]]]
) -> None:
    named, fds = named_memory(os.getpid()), len(os.listdir("/proc/self/fd"))
    for batches_taken in (1, 3):
        loader = load(open_parts(shards), batch_size=4, stop_step=1000, num_workers=2)
        for _ in range(batches_taken):
            next(loader)
        (child,) = multiprocessing.active_children()
        assert child.name == "data"
        assert child.pid is not None
        assert (named_memory(os.getpid()), named_memory(child.pid)) == (named, 0)
        loader.close()
        assert multiprocessing.active_children() == []
    assert len(os.listdir("/proc/self/fd")) <= fds + 8  # the fork server's, which stays
    assert list(load(open_parts(shards), batch_size=4, start_step=3, stop_step=3, num_workers=2)) == []


RANK_PROGRAM = """
    import os, signal, sys
    from pathlib import Path
    from dino_dist.data.reading.decode import DecodeRules
    from dino_dist.data.shards.index import open_dataset
    from dino_dist.data.loading.loader import make_loader
    from dino_dist.data.order.order import Order
    from dino_dist.data.reading.stream import SampleReader

    def main():
        folder = Path(sys.argv[1])
        dataset = open_dataset(str(folder), fallback_dir=folder)
        loader = make_loader(
            reader=SampleReader(dataset=dataset, rules=DecodeRules(max_member_bytes=2**20, max_pixels=10**6)),
            order=Order(shard_counts=dataset.shard_counts, seed=3, shards_per_block=2),
            batch_size=4, rank=0, size=1, start_step=0, stop_step=40, num_workers=2, buffer_bytes=2**16,
        )
        signals = []
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, lambda number, frame: signals.append(number))
        next(loader)
        print("ready", flush=True)
        if "crash" in sys.argv:
            raise RuntimeError("with the loader still in use")
        sys.stdin.readline()
        print(len(list(loader)), *sorted(set(signals)), flush=True)

    if __name__ == "__main__":
        main()
"""


@contextmanager
def rank_process(shards: Path, tmp_path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of its own group that has read one batch and waits for a line; nothing of it is left afterwards."""
    program = tmp_path / "rank.py"
    program.write_text(textwrap.dedent(RANK_PROGRAM))
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen(
        [sys.executable, str(program), str(shards), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        for member in group_members(process.pid):
            with suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        process.communicate()


def group_members(group: int) -> list[int]:
    """Live processes of a process group, from /proc."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                members.append(int(entry.name))
    return members


@pytest.mark.distributed
def test_workers_work_on_after_the_jobs_signals(shards: Path, tmp_path: Path) -> None:
    """A scheduler signals all processes of a step; the rank still needs batches to end at a step boundary."""
    with rank_process(shards, tmp_path) as process:
        before = group_members(process.pid)
        assert len(before) >= 3  # the rank, the fork server, its process (and Python's resource tracker)
        signals = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT]
        for number in signals:
            os.killpg(process.pid, number)
        assert set(before) <= set(group_members(process.pid))
        out, _ = process.communicate("go\n")
    assert out == "39 " + " ".join(str(int(number)) for number in sorted(signals)) + "\n"
    assert process.returncode == 0


@pytest.mark.distributed
def test_no_worker_outlives_a_killed_rank(shards: Path, tmp_path: Path) -> None:
    with rank_process(shards, tmp_path) as process:
        process.kill()
        process.wait()
        wait_for_the_end_of(process.pid)


@pytest.mark.distributed
def test_a_rank_that_fails_is_not_held_up_by_its_workers(shards: Path, tmp_path: Path) -> None:
    """At exit Python terminates the workers and waits for them: deaf ones would make a crash a hang."""
    with rank_process(shards, tmp_path, "crash") as process:
        _, errors = process.communicate()
        assert process.returncode == 1
        assert "with the loader still in use" in errors
        wait_for_the_end_of(process.pid)


def wait_for_the_end_of(group: int) -> None:
    """Bounded by the test's own time limit."""
    while group_members(group):
        os.sched_yield()
