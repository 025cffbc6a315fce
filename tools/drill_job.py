"""The small job of the fault drill, and one start of it after the other on local ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import psutil

from dino_dist.ledger import read_rows
from dino_dist.run_folder import RunFolder
from launch.quickstart import build_digit_shards

ROOT: Final = Path(__file__).parents[1]
RECIPE: Final = """\
# The job of tools/fault_drill.py: small enough for two CPU cores, with everything that a resume can get wrong.
data: {num_workers: 0, mean: [0.305, 0.305, 0.305], std: [0.376, 0.376, 0.376]}
model: {arch: vit_tiny, embed_dim: 32, depth: 2, num_heads: 2, patch_size: 4, drop_path: 0.1, init_std: 0.1}
head: {num_prototypes: 256, hidden_dim: 64, bottleneck_dim: 32, batch_norm: true}
augment: {global_px: 16, local_px: 8, local_crops: 2, blur_local_p: 0.0}
train: {batch_size: 32, device: cpu, precision: fp32, deterministic: true}
optim: {lr: 2.0e-3, lr_reference_batch: 32, warmup: 20st}
ema: {momentum: 0.99}
checkpoint: {keep: 3}
metrics: {every: 1st, tensorboard: false}
eval: {resize_px: 16, crop_px: 16}
parallel: {blocks_per_group: 2}
"""
TIMEOUT_S: Final = 8.0
"""parallel.timeout_s of the job: how long the ranks wait for one that hangs."""
MEASURED: Final = frozenset({"host_memory_gib", "save_s", "images_per_s", "step_s", "data_wait"})
"""Keys of a metrics row that tell of the machine at that moment, not of the run."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The job's config: a file, and what the drill sets beside it."""

    file: Path
    shards: Path
    length: int
    """Steps."""
    save_every: int
    """Steps."""

    @staticmethod
    def write(folder: Path, *, length: int, save_every: int) -> Recipe:
        """Write the config and build its tar shards under `folder`."""
        file = folder / "drill.yaml"
        shards, _ = build_digit_shards(folder / "shards")
        file.write_text(RECIPE, encoding="utf-8")
        return Recipe(file=file, shards=shards, length=length, save_every=save_every)

    def settings(self, run_dir: Path) -> list[str]:
        """CONFIG and KEY=VALUE of the command line."""
        return [
            str(self.file),
            f"run.dir={run_dir}",
            f"data.train={self.shards}",
            f"train.length={self.length}st",
            f"checkpoint.every={self.save_every}st",
            f"parallel.timeout_s={TIMEOUT_S}",
            "parallel.timeout_start_s=120",
        ]


class Story:
    """What a run folder tells of its run."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = RunFolder(run_dir)

    def ledger(self, *events: str) -> list[dict[str, Any]]:
        """Rows of these events, or all."""
        return [row for row in read_rows(self.folder.ledger) if not events or row["event"] in events]

    def metrics(self) -> list[dict[str, Any]]:
        """Rows without what was measured of the machine."""
        found = read_rows(self.folder.metrics)
        return [{key: value for key, value in row.items() if key not in MEASURED} for row in found]

    def last_step(self) -> int:
        """The last that was logged; 0 before the first."""
        rows = read_rows(self.folder.metrics)
        return int(rows[-1]["step"]) if rows else 0

    def is_done(self) -> bool:
        """The run has reached its length."""
        return any(row["why"] == "reached train.length" for row in self.ledger("stop"))


class Job(Protocol):
    """The run on ranks that can be watched and hurt, from start to start."""

    story: Story
    launched_s: float
    """When the present start began, in seconds since the epoch; queue wait is over then."""

    def start(self) -> None:
        """Begin the next start, or let it begin."""

    def ranks(self) -> dict[int, psutil.Process]:
        """The rank processes that exist now."""

    def is_down(self) -> bool:
        """No rank runs, and the next start can begin, or none will."""

    def verdict(self) -> str | None:
        """Why no start can follow; None if one can."""

    def abandon(self) -> list[psutil.Process]:
        """Forget the present start without ending it, so that another can follow; its processes."""

    def output(self) -> str:
        """The end of what the last start said."""

    def close(self) -> None:
        """End everything that still runs."""


class LocalJob:
    """`dino-dist train --nproc N`, again and again, as a requeue would."""

    def __init__(self, recipe: Recipe, run_dir: Path, num_ranks: int) -> None:
        self.story = Story(run_dir)
        self.launched_s = 0.0
        self._command = [sys.executable, "-m", "launch.cli", "train", *recipe.settings(run_dir)]
        self._command += ["--nproc", str(num_ranks)]
        self._log = run_dir.with_suffix(".log")
        self._launcher: subprocess.Popen[bytes] | None = None
        self._abandoned: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        command = self._command
        if self._abandoned:
            # Seen from another host the ranks left behind may live or not; here the process table would tell.
            host = f"drill-host-{len(self._abandoned)}"
            command = ["unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "sh", *command]
        self.launched_s = time.time()
        with open(self._log, "ab") as log:
            self._launcher = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def ranks(self) -> dict[int, psutil.Process]:
        return {} if self._launcher is None else rank_processes(self._launcher.pid, "RANK")

    def launcher(self) -> psutil.Process:
        """The process that started the ranks."""
        assert self._launcher is not None
        return psutil.Process(self._launcher.pid)

    def is_down(self) -> bool:
        return self._launcher is None or self._launcher.poll() is not None

    def verdict(self) -> str | None:
        code = None if self._launcher is None else self._launcher.poll()
        if code == 2:
            return "refused to start (exit code 2)"
        if code == 0 and not self.story.is_done():
            return "ended with exit code 0 before its length"
        return None

    def abandon(self) -> list[psutil.Process]:
        assert self._launcher is not None
        left = list(self.ranks().values())
        self._abandoned.append(self._launcher)
        self._launcher = None
        return left

    def output(self) -> str:
        return tail(self._log)

    def close(self) -> None:
        for launcher in [*self._abandoned, self._launcher]:
            if launcher is not None:
                ranks = rank_processes(launcher.pid, "RANK")
                launcher.kill()  # its ranks die with it
                launcher.wait()
                psutil.wait_procs(list(ranks.values()), timeout=10)


def rank_processes(parent: int, variable: str) -> dict[int, psutil.Process]:
    """The children of `parent` that are ranks, by the number in their environment."""
    found: dict[int, psutil.Process] = {}
    try:
        for child in psutil.Process(parent).children():
            with gone_is_fine():
                if child.status() != psutil.STATUS_ZOMBIE and variable in (environment := child.environ()):
                    found[int(environment[variable])] = child
    except psutil.NoSuchProcess:
        return {}
    return found


@contextmanager
def gone_is_fine() -> Iterator[None]:
    """A process that ended meanwhile is none that we look for."""
    try:
        yield
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return


def send(processes: list[psutil.Process], number: signal.Signals) -> None:
    """Signal them, one right after the other."""
    for process in processes:
        with gone_is_fine():
            process.send_signal(number)


def tail(file: Path, size_bytes: int = 3000) -> str:
    """The end of a text file."""
    if not file.exists():
        return ""
    with open(file, "rb") as opened:
        opened.seek(max(0, os.fstat(opened.fileno()).st_size - size_bytes))
        return opened.read().decode(errors="replace")
