"""One start of a run on all ranks: the attempt that owns the folder, the config it may continue with, the ledger."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from dino_dist.config import Config
from dino_dist.config_file import differences, to_yaml
from dino_dist.data.reading.stream import BadRecord
from dino_dist.dist import ProcessEnvironment, World
from dino_dist.errors import NoRestartHelps, SaidByRankZero, StopAsked, Superseded, UserError, for_rank
from dino_dist.exit_codes import BAD_INPUT, NO_RESTART_HELPS
from dino_dist.ledger import Event, JsonLines, Ledger, read_rows
from dino_dist.liveness import Fault
from dino_dist.manifest import committed
from dino_dist.preemption import StopReason
from dino_dist.run_folder import Attempt, RunFolder

_log = logging.getLogger(__name__)


class RunSession:
    """The run folder as this rank may use it during this start."""

    def __init__(
        self, folder: RunFolder, attempt: Attempt, world: World, changes: list[str], job_to_requeue: str | None
    ) -> None:
        self.folder = folder
        self.attempt = attempt
        self.job_to_requeue = job_to_requeue
        """The Slurm job that is to run again after a stop; None: there is none, or `run.requeue` is off."""
        self.first_step = 0
        """Steps done when this start began its own."""
        self._world = world
        self._changes = changes
        self._ledger = Ledger(attempt, rank=world.rank, host=world.host)
        self._bad_samples = JsonLines(self.bad_samples_file, attempt)

    @property
    def bad_samples_file(self) -> Path:
        """The list of samples that could not be decoded, one JSON object each."""
        return self.folder.logs / "bad_samples.jsonl"

    def begin(self, config: Config, steps_done: int) -> None:
        """Enter the start into the ledger and cut what an earlier start wrote after the restored step.

        Only now is the folder's config replaced: one that its checkpoint does not fit was refused before.
        """
        self.first_step = steps_done
        if self._world.is_first:
            JsonLines(self.folder.metrics, self.attempt).cut_after(steps_done)
            self._bad_samples.cut_after(steps_done)
            with self.attempt.exclusive():
                write_config(self.folder, config)
            changes = f"; changed: {', '.join(self._changes)}" if self._changes else ""
            self._write("start", steps_done, f"{self._world.size} ranks{changes}{self._word_of_the_last()}")
        self._world.barrier()  # rows that other ranks write from now on are not cut

    def _word_of_the_last(self) -> str:
        before = self.attempt.number - 1
        if not before or self.folder.ended_file(before).exists():
            return ""
        return f"; attempt {before} left no word of its end: it was killed, or its node is lost"

    def last_logged(self, key: str) -> int:
        """The step of the last row of metrics.jsonl with `key`, the same on all ranks; 0 if there is none."""
        rows = read_rows(self.folder.metrics) if self._world.is_first else []
        steps = [row["step"] for row in rows if row.get(key) is not None]
        return self._world.broadcast(int(max(steps, default=0)))

    def check_superseded(self) -> None:
        """Raise `Superseded` if a newer start took the folder over; costs nothing."""
        if self.attempt.superseded:
            self.attempt.check()

    def ledger_row(self, event: Event, step: int | None, why: str, **more: Any) -> None:
        """A row that all ranks ask for and rank 0 writes."""
        if self._world.is_first:
            self._write(event, step, why, **more)

    def signal_row(self, step: int, reason: StopReason | None) -> None:
        """Each rank that was signalled says so; the others are silent."""
        if reason is not None:
            self._write("signal", step, reason.name)

    def report_fault(self, step: int, error: Exception) -> None:
        """A `fault` row from the rank where it happened, unless the folder is no longer ours.

        What a restart would not mend is a `stop` with its exit code besides: nobody is to requeue for it.
        """
        if isinstance(error, Superseded | SaidByRankZero | StopAsked):
            return
        first_line = f"{type(error).__name__}: {error}".split("\n")[0]
        final = _exit_code_for_good(error)
        try:
            self._write("fault", step, first_line)
            if final is not None and self._world.is_first:
                self._write("stop", step, "the same command would fail in the same way again", exit_code=final)
        except Superseded:
            return  # the error itself is on its way to the user

    def report_hang(self, fault: Fault) -> None:
        """What the watchdog found: who, where, in which phase, and the Python stacks of the ranks that answered."""
        blamed = fault.ends and fault.blames and fault.hosts
        suspect = {"suspect_host": fault.hosts[0], "hosts": list(fault.hosts)} if blamed else {}
        stacks = {"stacks": {str(rank): stack for rank, stack in fault.stacks.items()}} if fault.stacks else {}
        with suppress(Superseded):
            self._write("fault", fault.step, f"{fault.kind}: {fault.why}", **suspect, **stacks)

    def _write(self, event: Event, step: int | None, why: str, **more: Any) -> None:
        """A ledger row; a disk that is full or gone is no reason to end a run, so the log gets it then."""
        try:
            self._ledger.append(event, step=step, why=why, **more)
        except OSError as error:
            _log.error(
                "%s cannot be written (%s); lost: %s at step %s, %s", self.folder.ledger, error, event, step, why
            )

    def list_bad_samples(self, step: int, bad: Sequence[BadRecord]) -> None:
        """Append this rank's undecodable samples to the list."""
        for record in bad:
            try:
                self._bad_samples.append({"step": step, **asdict(record)})
            except OSError as error:
                _log.error("%s cannot be written (%s); lost: %s", self.bad_samples_file, error, record)


@contextmanager
def open_session(
    config: Config, world: World, environment: ProcessEnvironment, *, accept_changes: bool
) -> Iterator[RunSession]:
    """Take the next attempt of `config.run.dir` on all ranks, if its config may be continued.

    `UserError` if the folder cannot be written, another start lives, or the config would change the result (with
    `accept_changes` it may).
    """
    folder = RunFolder(Path(config.run.dir).absolute())

    def begin() -> tuple[int, list[str]]:
        folder.create()
        changes = check_continues(folder, config, accept_changes=accept_changes)
        attempt = folder.begin_attempt(environment.job_id, restarts=environment.restarts)
        owned.append(attempt)
        return attempt.number, changes

    owned: list[Attempt] = []
    number, changes = world.first(begin)
    attempt = owned[0] if owned else folder.join_attempt(number)
    with attempt:
        yield RunSession(folder, attempt, world, changes, environment.job_id if config.run.requeue else None)


@contextmanager
def said_by_rank_zero(world: World) -> Iterator[None]:
    """For what all ranks do and refuse alike: a `UserError` inside is said once."""
    try:
        yield
    except UserError as error:
        if world.is_first:
            raise
        raise for_rank(error, is_first=False) from None


def check_continues(folder: RunFolder, config: Config, *, accept_changes: bool) -> list[str]:
    """The harmless changes against the folder's config; `UserError` lists those that would change the result.

    Before the first checkpoint there is nothing to continue, so everything may be set otherwise.
    """
    if not folder.config.exists() or not committed(folder.checkpoints):
        return []
    try:
        saved = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{folder.config} cannot be read ({' '.join(str(error).split())}): restore or remove it"
        ) from None
    if not isinstance(saved, dict) or not all(isinstance(section, dict) for section in saved.values()):
        raise UserError(f"{folder.config} is not a run's config: restore or remove it")
    batch_size = saved.get("train", {}).get("batch_size")
    if batch_size != config.train.batch_size:
        raise UserError(
            f"train.batch_size={config.train.batch_size} on run.dir={folder.path}, which trains with {batch_size}: the "
            "position in the data is counted in batches; set it back or choose another run.dir"
        )
    refused, allowed = differences(saved, config)
    if refused and not accept_changes:
        raise UserError(
            f"run.dir={folder.path} was started with another config ({'; '.join(refused)}): choose another run.dir, "
            "set these back, or add --accept-changes"
        )
    return refused + allowed


def write_config(folder: RunFolder, config: Config) -> None:
    """Put the resolved config into the folder, whole or not at all."""
    temporary = folder.config.with_suffix(".yaml.tmp")
    temporary.write_text(to_yaml(config), encoding="utf-8")
    temporary.replace(folder.config)


def _exit_code_for_good(error: Exception) -> int | None:
    """The exit code of an error that a restart would not mend; None for others."""
    if isinstance(error, UserError):
        return None if error.may_pass else BAD_INPUT
    return NO_RESTART_HELPS if isinstance(error, NoRestartHelps) else None
