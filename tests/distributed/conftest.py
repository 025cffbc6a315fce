"""Whole training runs as ranks forked from this process (torch is warm there), to be watched, signalled and killed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.numpy import load_file

from dino_dist.config import Config
from dino_dist.config_file import load_config
from dino_dist.dist import ProcessEnvironment
from dino_dist.ledger import read_rows
from dino_dist.manifest import committed, verify
from dino_dist.run_folder import RunFolder
from dino_dist.train import train
from launch.cli import _exit_code

FORK = multiprocessing.get_context("fork")
PATIENCE_S = 60.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
MEASURED = frozenset({"host_memory_gib", "save_s", "images_per_s", "step_s", "data_wait"})
"""Keys of a row that tell of this machine at that moment."""


class Start:
    """One start of a run: its ranks, until they end."""

    def __init__(self, config: Config, size: int, log: Path, **environment: Any) -> None:
        self.folder = RunFolder(Path(config.run.dir))
        self.log = log
        self._starts_before = len(self.events("start"))
        # As the launcher does: bound here, handed to rank 0; and signals wait until a rank can save.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.ranks = [
                FORK.Process(target=_rank_main, args=(config, rank, size, listener, log, environment))
                for rank in range(size)
            ]
            for process in self.ranks:
                process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def pid(self, rank: int) -> int:
        """Of the rank's process."""
        pid = self.ranks[rank].pid
        assert pid is not None
        return pid

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """The ledger's rows of these kinds, of all starts."""
        return [row for row in read_rows(self.folder.ledger) if row["event"] in kinds]

    def last_logged_step(self) -> int:
        """Of the last row of metrics.jsonl; 0 before the first."""
        found = read_rows(self.folder.metrics)
        return int(found[-1]["step"]) if found else 0

    def wait_for_step(self, step: int) -> None:
        """Until this start has logged `step`."""
        self.wait_until(
            lambda: (
                len(self.events("start")) > self._starts_before
                and any(row["step"] >= step for row in read_rows(self.folder.metrics)[-2:])
            ),
            f"step {step}",
        )

    def wait_until(self, done: Callable[[], bool], what: str) -> None:
        """Poll for a condition; the ranks' output in the failure if it does not come."""
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            alive = any(process.is_alive() for process in self.ranks)
            assert alive or done(), f"ended before {what}\n{self.output()}"
            assert time.monotonic() < deadline, f"no {what}\n{self.output()}"
            time.sleep(0.005)

    def send(self, number: signal.Signals, ranks: Sequence[int]) -> None:
        """Signal some ranks."""
        for rank in ranks:
            os.kill(self.pid(rank), number)

    def codes(self) -> list[int]:
        """Exit codes once all ranks have ended by themselves; negative: killed by that signal."""
        for rank, process in enumerate(self.ranks):
            process.join(PATIENCE_S)
            assert process.exitcode is not None, f"rank {rank} hangs\n{self.output()}"
        return [process.exitcode if process.exitcode is not None else 0 for process in self.ranks]

    def end(self, code: int) -> None:
        """Wait for the end, which must be `code` on all ranks."""
        codes = self.codes()
        assert codes == [code] * len(codes), f"{codes}\n{self.output()}"

    def output(self) -> str:
        """Standard output and error of all ranks."""
        return self.log.read_text() if self.log.exists() else ""

    def kill_what_is_left(self) -> None:
        """At the end of a test."""
        for process in self.ranks:
            if process.is_alive():
                process.kill()
            process.join()


def _rank_main(
    config: Config, rank: int, size: int, listener: socket.socket, log: Path, environment: dict[str, Any]
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    logging.getLogger().handlers.clear()  # pytest's
    torch.set_num_threads(1)
    port = listener.getsockname()[1]
    if rank:
        listener.close()
    code = 1
    try:
        me = ProcessEnvironment(
            rank=rank,
            size=size,
            local_rank=rank,
            local_size=size,
            master_port=port,
            master_listen_fd=listener.fileno() if rank == 0 else None,
            **environment,
        )
        code = _exit_code(lambda: sys.exit(train(config, me)))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # skip the interpreter's shutdown, which a forked torch process does not survive cleanly


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Start]]:
    """`start([recipe, *overrides], size, **environment)`; whatever still runs is killed afterwards."""
    import torch.utils.tensorboard  # noqa: F401  imported once, here, not in each rank

    started: list[Start] = []

    def begin(settings: Sequence[str], size: int, **environment: Any) -> Start:
        log = tmp_path / f"start-{len(started) + 1}.log"
        started.append(Start(load_config(settings[0], settings[1:]), size, log, **environment))
        return started[-1]

    yield begin
    for one in started:
        one.kill_what_is_left()


def rows(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says that does not depend on the machine's speed; null is as good as absent."""
    found = read_rows(RunFolder(folder).metrics)
    return [{key: value for key, value in row.items() if key not in MEASURED and value is not None} for row in found]


def bad_samples(folder: Path) -> list[str]:
    """The listed samples, in an order of their own: ranks write as they come."""
    return sorted(str(row) for row in read_rows(RunFolder(folder).logs / "bad_samples.jsonl"))


def final_tensors(folder: Path) -> dict[tuple[str, str], bytes]:
    """Every tensor in each rank's file of the newest checkpoint, which verifies."""
    _, newest = committed(RunFolder(folder).checkpoints)[0]
    files = sorted(name for name in verify(newest).manifest.files if name.endswith(".safetensors"))
    return {(name, key): array.tobytes() for name in files for key, array in load_file(newest / name).items()}


@pytest.fixture(scope="session")
def assert_same_run() -> Callable[[Path, Path], None]:
    """`assert_same_run(resumed, whole)`: every number of every row to the last bit, and the final tensors."""

    def compare(resumed: Path, whole: Path) -> None:
        ours, theirs = rows(resumed), rows(whole)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs], "a row is missing or double"
        for one, other in zip(ours, theirs, strict=True):
            assert one == other
        assert bad_samples(resumed) == bad_samples(whole)
        one, other = final_tensors(resumed), final_tensors(whole)
        assert one.keys() == other.keys()
        assert not [key for key in one if one[key] != other[key]]

    return compare


def wait_gone(processes: Sequence[psutil.Process]) -> None:
    """Until none of them runs."""
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
    assert not alive


@pytest.fixture(scope="session")
def gone() -> Callable[[Sequence[psutil.Process]], None]:
    """See `wait_gone`."""
    return wait_gone
