"""The run folder: where its files lie, and the fencing that leaves one attempt at a time the right to write in it."""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from types import TracebackType

from dino_dist.errors import Superseded, UserError
from dino_dist.fencing import Owner, file_lock, is_live

_ATTEMPT_FILE = re.compile(r"^(\d{6,})\.json$")


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run (`run.dir`), and the way to become the attempt that may write there."""

    path: Path
    _: KW_ONLY
    heartbeat_s: float = 5.0
    """Between two signs of life of an attempt; a start from another host watches for two of them."""

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        """What happened to the run, one JSON object an event."""
        return self.path / "ledger.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint."""
        return self.path / "checkpoints"

    @property
    def code(self) -> Path:
        """The source that was submitted."""
        return self.path / "code"

    @property
    def logs(self) -> Path:
        """Output of the ranks."""
        return self.path / "logs"

    @property
    def attempts(self) -> Path:
        """One file an attempt; its modification time is the attempt's heartbeat."""
        return self.path / "attempts"

    def create(self) -> None:
        """Make the folder and its sub-folders; `UserError` if nothing can be written there."""
        try:
            for folder in (self.tensorboard, self.checkpoints, self.code, self.logs, self.attempts):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as probe:
                probe.write(b"writable")
        except OSError as error:
            raise UserError(
                f"run.dir={self.path}: cannot write there ({error.strerror}): choose a folder that you may write to"
            ) from error

    def newest_attempt(self) -> int:
        """The highest attempt number so far; 0 before the first."""
        found = (_ATTEMPT_FILE.match(name) for name in os.listdir(self.attempts))
        return max((int(match.group(1)) for match in found if match), default=0)

    def attempt_file(self, number: int) -> Path:
        """The file that makes `number` taken."""
        return self.attempts / f"{number:06d}.json"

    def owner(self, number: int) -> Owner | None:
        """Who made attempt `number`; None if its file is missing or was torn by a kill."""
        try:
            return Owner(**json.loads(self.attempt_file(number).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def begin_attempt(self, job_id: str | None = None, *, restarts: int | None = None) -> Attempt:
        """Take the next attempt number, on rank 0 alone; the other ranks join the number it got.

        A live earlier attempt is a `UserError` that names its host and process. It counts as live when its process
        exists on this host, or, seen from another host, when its heartbeat moves within two intervals. An attempt of
        the same Slurm job is superseded at once: with `restarts` (the job's requeue count) given on both sides if ours
        is higher, without it if it ran on another host.
        """
        while True:
            newest = self.newest_attempt()
            owner = Owner.of_this_process(newest + 1, job_id=job_id, restarts=restarts, heartbeat_s=self.heartbeat_s)
            if newest and self._lives(newest, owner):
                raise UserError(self._in_use_message(newest))
            with file_lock(self.attempts / "lock"):
                if self.newest_attempt() == newest and self._take(owner):
                    return Attempt(self, owner.number, owns=True)

    def join_attempt(self, number: int) -> Attempt:
        """The attempt that rank 0 began, on another rank: it checks and watches, and leaves the heartbeat to rank 0."""
        return Attempt(self, number, owns=False)

    def _take(self, owner: Owner) -> bool:
        content = json.dumps(asdict(owner)).encode()
        try:
            descriptor = os.open(self.attempt_file(owner.number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return True

    def _lives(self, number: int, mine: Owner) -> bool:
        if self.ended_file(number).exists():
            return False
        return is_live(self.attempt_file(number), self.owner(number), mine)

    def ended_file(self, number: int) -> Path:
        """Exists once attempt `number` ended in good order."""
        return self.attempts / f"{number:06d}.ended"

    def _in_use_message(self, number: int) -> str:
        owner = self.owner(number)
        where = "an unknown process" if owner is None else f"host {owner.host} as process {owner.pid}"
        return f"run.dir={self.path} is in use: attempt {number} runs on {where}: stop it, or choose another run.dir"


class Attempt:
    """One start of a run, from its exclusive number to its end: every write into the run folder asks it first.

    A daemon thread shows the sign of life (rank 0) and notices a newer attempt (all ranks).
    """

    def __init__(self, folder: RunFolder, number: int, *, owns: bool) -> None:
        self.folder = folder
        self.number = number
        self._owns = owns
        self._superseded = threading.Event()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name=f"attempt-{number}", daemon=True)
        self._watcher.start()

    @property
    def superseded(self) -> bool:
        """True once a newer attempt was seen; costs nothing, so that a loop can ask at each step."""
        return self._superseded.is_set()

    def still_ours(self) -> bool:
        """Look whether no higher number was taken: one listing of a small folder."""
        return not self.superseded and self.folder.newest_attempt() <= self.number

    def check(self) -> None:
        """Raise `Superseded` if a newer attempt owns the folder."""
        if self.still_ours():
            return
        self._superseded.set()
        newest = self.folder.newest_attempt()
        owner = self.folder.owner(newest)
        where = "" if owner is None else f" (host {owner.host}, process {owner.pid})"
        raise Superseded(f"attempt {self.number} of {self.folder.path} gave way to attempt {newest}{where}")

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the folder's lock, checked: what happens inside cannot interleave with the begin of a newer attempt.

        Where the file system has no locks the check alone guards.
        """
        with file_lock(self.folder.attempts / "lock"):
            self.check()
            yield

    def close(self) -> None:
        """End in good order: the next start need not wait for missed heartbeats. May be called twice."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._watcher.join()
        if self._owns:
            self.folder.ended_file(self.number).touch()

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _watch(self) -> None:
        file = self.folder.attempt_file(self.number)
        while not self._stop.wait(self.folder.heartbeat_s):
            try:
                if self._owns:
                    os.utime(file)
                if not self.still_ours():
                    self._superseded.set()
                    return
            except FileNotFoundError:
                # Somebody removed the run folder: whoever uses the place now, it is not ours.
                self._superseded.set()
                return
            except OSError:
                # A network file system may be away for a while; a write that needs it reports that itself.
                continue


def fsync_folder(path: Path) -> None:
    """Make the names in a folder (creations and renames) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
