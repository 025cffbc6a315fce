"""What the fault drill does to a running job: each fault, what must come of it, and how it is done."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil
from drill_job import Job, Recipe, gone_is_fine, send

from dino_dist.manifest import committed, folder_name

_POLL_S: Final = 0.01
_PATIENCE_S: Final = 60.0
_PAUSE_S: Final = 2.0
"""Of a straggler; well below the job's time-out."""
_START_S: Final = 8.0
"""A start takes about so long."""
_BALLAST: Final = "ballast"
TMPFS_MIB: Final = 48


class Unexpected(Exception):
    """The job did something else than a fault allows; the message says what."""


@dataclass(kw_only=True)
class Scene:
    """A job under a fault, and what the fault has to put right later."""

    job: Job
    recipe: Recipe
    rng: random.Random
    cleanup: ExitStack
    """Closed once the job has taken its next step."""
    left_behind: list[psutil.Process] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    bring_back: Callable[[], None] = lambda: None

    @property
    def checkpoints(self) -> Path:
        """Of the run."""
        return self.job.story.folder.checkpoints

    def wait(self, done: Callable[[], bool], what: str, *, patience_s: float = _PATIENCE_S) -> None:
        """Until `done()`; `Unexpected` if the job ends before, or patience does."""
        deadline = time.monotonic() + patience_s
        while not done():
            if self.job.is_down() and not done():
                raise Unexpected(f"ended before {what}")
            if time.monotonic() > deadline:
                raise Unexpected(f"no {what} within {patience_s:g} s")
            time.sleep(_POLL_S)

    def pick(self, ranks: dict[int, psutil.Process], *, but_first: bool = False) -> tuple[int, psutil.Process]:
        """One of the ranks."""
        candidates = sorted(rank for rank in ranks if rank or not but_first) or sorted(ranks)
        if not candidates:
            raise Unexpected("no rank to be found")
        rank = self.rng.choice(candidates)
        return rank, ranks[rank]


Act = Callable[[Scene], str]
"""Does something, and says to whom or how much."""


def nothing(scene: Scene) -> str:
    """For a fault without this part."""
    return ""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A kind of fault."""

    name: str
    strike: Act
    while_down: Act = nothing
    """Between the end of the job and its next start."""
    at_start: Act | None = None
    """Ends that start too, before or after its first step; then comes another."""
    after: Act = nothing
    """Once the next start has taken some steps."""
    ends: bool = True
    """The job goes down; else it must go on."""
    saves: bool = False
    """All is saved before the end: no step may be repeated."""
    needs_checkpoints: int = 0
    """Committed before it can strike without making the run hopeless."""
    needs_root: bool = False
    on: tuple[str, ...] = ("local", "slurm")


def signals(number: signal.Signals, *, all_ranks: bool) -> Act:
    """Send a signal to all ranks or to one."""

    def strike(scene: Scene) -> str:
        ranks = scene.job.ranks()
        if all_ranks:
            send(list(ranks.values()), number)
            return f"{len(ranks)} ranks"
        rank, process = scene.pick(ranks)
        send([process], number)
        return f"rank {rank}"

    return strike


def later(act: Act) -> Act:
    """The same, at a random moment of a start: from its first process to some steps after."""

    def strike(scene: Scene) -> str:
        scene.wait(lambda: len(scene.job.ranks()) > 1, "rank of the next start")
        delay_s = scene.rng.uniform(0, _START_S)
        time.sleep(delay_s)
        return f"{act(scene)} again after {delay_s:.1f} s"

    return strike


def second_signal_in_the_save(scene: Scene) -> str:
    """SIGUSR2, and once the save is under way another signal."""
    ranks = list(scene.job.ranks().values())
    earlier = set(_unfinished(scene))
    saves = len(scene.job.story.ledger("save"))
    second = scene.rng.choice([signal.SIGUSR2, signal.SIGTERM])
    send(ranks, signal.SIGUSR2)
    scene.wait(lambda: bool(set(_unfinished(scene)) - earlier) or len(scene.job.story.ledger("save")) > saves, "a save")
    send(ranks, second)
    return f"then {second.name}"


def _unfinished(scene: Scene) -> list[str]:
    return [name for name in os.listdir(scene.checkpoints) if ".tmp-" in name]


def kill_other(scene: Scene) -> str:
    """SIGKILL a rank that is not the first."""
    rank, process = scene.pick(scene.job.ranks(), but_first=True)
    send([process], signal.SIGKILL)
    return f"rank {rank}"


def kill_first(scene: Scene) -> str:
    """SIGKILL rank 0, which commits, keeps the ledger and requeues."""
    send([process for rank, process in scene.job.ranks().items() if rank == 0], signal.SIGKILL)
    return "rank 0"


def stop_one(scene: Scene) -> str:
    """SIGSTOP a rank: it hangs."""
    rank, process = scene.pick(scene.job.ranks())
    send([process], signal.SIGSTOP)
    return f"rank {rank}"


def straggle(scene: Scene) -> str:
    """SIGSTOP a rank, SIGCONT it before anybody's patience ends; more steps must follow."""
    rank, process = scene.pick(scene.job.ranks())
    step = scene.job.story.last_step()
    send([process], signal.SIGSTOP)
    time.sleep(_PAUSE_S)
    send([process], signal.SIGCONT)
    scene.wait(lambda: scene.job.story.last_step() >= step + 5, "more steps")
    return f"rank {rank}, {_PAUSE_S:g} s"


def flip_a_bit(scene: Scene) -> str:
    """One bit of one file of the newest checkpoint."""
    _, newest = committed(scene.checkpoints)[0]
    file = scene.rng.choice(sorted(path for path in newest.iterdir() if path.stat().st_size))
    content = bytearray(file.read_bytes())
    content[scene.rng.randrange(len(content))] ^= 1 << scene.rng.randrange(8)
    file.write_bytes(content)
    return f"{newest.name}/{file.name}"


def leave_leftovers(scene: Scene) -> str:
    """A half-written save of the attempt before, and lines that a kill tore."""
    found = committed(scene.checkpoints)
    step = (found[0][0] if found else 0) + scene.recipe.save_every
    attempt = scene.job.story.folder.newest_attempt()
    stale = scene.checkpoints / f"{folder_name(step)}.tmp-{attempt}"
    stale.mkdir(exist_ok=True)
    (stale / "00000-of-00002.safetensors").write_bytes(scene.rng.randbytes(1000))
    row = json.dumps({"time": "2000-01-01T00:00:00+00:00", "event": "save", "step": step, "why": "torn"})
    for path in (scene.job.story.folder.ledger, scene.job.story.folder.metrics):
        with open(path, "a", encoding="utf-8") as file:
            file.write(row[: scene.rng.randrange(5, len(row) - 1)])
    return stale.name


def fill_the_disk(scene: Scene) -> str:
    """No room for a checkpoint until one has failed; then there is again, and the next must succeed."""
    story, failed = scene.job.story, len(_failed_saves(scene))
    ballast = scene.checkpoints / _BALLAST
    scene.cleanup.callback(ballast.unlink, missing_ok=True)
    _fill(ballast)
    scene.wait(lambda: len(_failed_saves(scene)) > failed, "failed save")
    ballast.unlink()
    saves = len(story.ledger("save"))
    scene.wait(lambda: len(story.ledger("save")) > saves, "save after there was room again")
    return f"{TMPFS_MIB} MiB"


def _failed_saves(scene: Scene) -> list[str]:
    return [row["why"] for row in scene.job.story.ledger("fault") if "save failed" in row["why"]]


def _fill(file: Path) -> None:
    with open(file, "wb", buffering=0) as ballast:
        for size_bytes in (2**20, 2**12, 1):
            try:
                while True:
                    ballast.write(bytes(size_bytes))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def mount_small_disk(folder: Path, cleanup: ExitStack) -> None:
    """Put a small disk of its own under `folder`, until `cleanup`; needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MIB}m", "tmpfs", str(folder)], check=True)
    cleanup.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)


def kill_all_noting_ports(scene: Scene) -> str:
    """SIGKILL all ranks, having noted where they listen."""
    ranks = list(scene.job.ranks().values())
    for process in ranks:
        with gone_is_fine():
            listening = [one for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
            scene.ports += [one.laddr.port for one in listening]
            scene.ports += [int(process.environ().get("MASTER_PORT", "0"))]
    send(ranks, signal.SIGKILL)
    return f"{len(ranks)} ranks"


def occupy_ports(scene: Scene) -> str:
    """Listen on every port that the last start used, until the next start runs."""
    taken = []
    for port in sorted(set(scene.ports) - {0}):
        listener = scene.cleanup.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("0.0.0.0", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # somebody was faster: it is in use, as asked
                raise
        else:
            listener.listen()
        taken.append(port)
    return f"ports {taken}"


def leave_zombies(scene: Scene) -> str:
    """SIGSTOP all ranks, and let another host start the run: to it they are gone."""
    send(list(scene.job.ranks().values()), signal.SIGSTOP)
    scene.left_behind = scene.job.abandon()
    return f"{len(scene.left_behind)} ranks"


def wake_zombies(scene: Scene) -> str:
    """SIGCONT what was left behind; it must end by itself and write nothing."""
    story = scene.job.story
    attempt = story.folder.newest_attempt()
    rows = [row for row in story.ledger() if row["attempt"] < attempt]
    send(scene.left_behind, signal.SIGCONT)
    _, alive = psutil.wait_procs(scene.left_behind, timeout=_PATIENCE_S)
    send(alive, signal.SIGKILL)
    if alive:
        raise Unexpected(f"{len(alive)} ranks of an older start run on")
    if [row for row in story.ledger() if row["attempt"] < attempt] != rows:
        raise Unexpected("an older start wrote into the ledger")
    return "woken: gave way"


_KILL_ALL: Final = signals(signal.SIGKILL, all_ranks=True)
_USR2_ALL: Final = signals(signal.SIGUSR2, all_ranks=True)

FAULTS: Final = (
    Fault(name="usr2-all", strike=_USR2_ALL, saves=True),
    Fault(name="usr2-one", strike=signals(signal.SIGUSR2, all_ranks=False), saves=True),
    Fault(name="term-all", strike=signals(signal.SIGTERM, all_ranks=True), saves=True),
    Fault(name="second-signal", strike=second_signal_in_the_save, saves=True),
    Fault(name="usr2-at-start", strike=_USR2_ALL, at_start=later(_USR2_ALL), saves=True),
    Fault(name="kill-at-start", strike=_KILL_ALL, at_start=later(_KILL_ALL)),
    Fault(name="kill-one", strike=kill_other),
    Fault(name="kill-first", strike=kill_first),
    Fault(name="kill-all", strike=_KILL_ALL),
    Fault(name="stop-one", strike=stop_one),
    Fault(name="straggler", strike=straggle, ends=False),
    Fault(name="corrupt", strike=_KILL_ALL, while_down=flip_a_bit, needs_checkpoints=2),
    Fault(name="leftovers", strike=_KILL_ALL, while_down=leave_leftovers),
    Fault(name="disk-full", strike=fill_the_disk, ends=False, needs_root=True),
    Fault(name="port-in-use", strike=kill_all_noting_ports, while_down=occupy_ports),
    Fault(name="zombie", strike=leave_zombies, after=wake_zombies, needs_root=True, on=("local",)),
)
"""Those that need nothing but processes and files; a Slurm can do more."""

GRACEFUL: Final = ("usr2-all", "usr2-one", "term-all")
"""For the trials of signal to committed checkpoint."""
