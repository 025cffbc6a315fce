"""Saving and loading checkpoints: asynchronous, sharded, verified, committed by one rename.

A save is copied to CPU memory while the caller waits, written by every rank in the background (safetensors, through
torch.distributed.checkpoint), hashed, listed in a manifest, and becomes a checkpoint when rank 0 renames its folder.
Until then, and after a kill at any moment, the folder has a name that nothing loads.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from dino_dist.checkpoint_tensors import load_tensors, one_line, spec_of, start_write, written_by
from dino_dist.dist import World
from dino_dist.errors import Superseded, UserError
from dino_dist.ledger import Event, Ledger
from dino_dist.manifest import (
    STATE,
    TENSOR_SUFFIX,
    FileRecord,
    Manifest,
    TensorSpec,
    VerifiedCheckpoint,
    committed,
    folder_name,
    newest_verified,
    record_file,
    write_manifest,
    write_text,
)
from dino_dist.run_folder import Attempt, RunFolder, fsync_folder

_log = logging.getLogger(__name__)
_GROUP_TIMEOUT = timedelta(hours=2)

T = TypeVar("T")


class _SaveFailed(Exception):
    """A rank could not write its part; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What one rank wrote, or why it could not."""

    files: dict[str, FileRecord]
    tensors: dict[str, TensorSpec]
    """Those that rank 0 does not hold."""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    """What became of a save, the same on all ranks."""

    step: int
    error: str | None = None
    superseded: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Save:
    """A save under way."""

    step: int
    folder: Path
    state_json: str
    tensors: dict[str, TensorSpec]
    started_s: float


class Checkpointer:
    """Writes and reads the checkpoints of one attempt; made, and each method called, on all ranks alike.

    `tensors` are DTensors (each rank writes its part) or plain tensors: those that several ranks hold are equal there
    (one rank writes), and a rank may hold some alone.
    Everything else goes through `state`, as JSON: tuples come back as lists, keys as text.
    """

    def __init__(
        self,
        run_folder: RunFolder,
        attempt: Attempt,
        world: World,
        *,
        keep: int,
        keep_every_steps: int | None,
        async_save: bool,
    ) -> None:
        """`keep`: newest checkpoints kept, besides the first at or after each multiple of `keep_every_steps`."""
        self._folder = run_folder.checkpoints
        self._attempt = attempt
        self._world = world
        self._keep = keep
        self._keep_every_steps = keep_every_steps
        self._async_save = async_save
        self._ledger = Ledger(attempt, rank=world.rank, host=world.host)
        # On the default group the background collectives could mix with training's, or time out and abort it.
        self._group = _own_group(world)
        on_cuda = world.device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_cuda,
            )
        )
        self._thread: threading.Thread | None = None
        self._verdict: _Verdict | None = None
        self._committed_step: int | None = None
        self._last_save_s: float | None = None
        if world.is_first:
            self._remove_leftovers()

    @property
    def last_save_s(self) -> float | None:
        """Seconds from the call of `save` to the commit of the last save that succeeded; None before the first."""
        return self._last_save_s

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, step: int, wait: bool = False) -> bool:
        """Save; return once the tensors are copied (they may change then), or with `wait` once it is committed.

        False: it failed (a full disk, say): the ledger and the log say why, earlier checkpoints stay, training may go
        on; without `wait` only the next `finish` tells. A save asked while one runs waits for that one; a step that
        this attempt already committed or loaded is not written again. Raises `Superseded`, also for the save before.
        """
        self.finish()
        if step == self._committed_step:
            return True
        self._attempt.check()
        save = _Save(
            step=step,
            folder=self._folder / f"{folder_name(step)}.tmp-{self._attempt.number}",
            state_json=json.dumps(state),
            tensors={name: spec_of(tensor) for name, tensor in tensors.items()},
            started_s=time.monotonic(),
        )
        if self._world.is_first:
            shutil.rmtree(save.folder, ignore_errors=True)
        self._verdict = _Verdict(step=step, error="its background thread died")
        upload = start_write(save.folder, tensors, group=self._group, stager=self._stager)
        self._thread = threading.Thread(target=self._complete, args=(save, upload), name=f"save-{step}", daemon=True)
        self._thread.start()
        return self.finish() if wait or not self._async_save else True

    def finish(self) -> bool:
        """Wait for the save under way, if any. False if the last save failed; raises `Superseded` if it was fenced."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._verdict is None:
            return True
        if self._verdict.superseded is not None:
            raise Superseded(self._verdict.superseded)
        return self._verdict.error is None

    def close(self) -> None:
        """Wait for the save under way and free the staging memory; before the process group is destroyed."""
        try:
            self.finish()
        finally:
            self._stager.close()

    def newest(self) -> VerifiedCheckpoint | None:
        """The newest checkpoint that verifies, chosen by rank 0 for all; None in a run without checkpoints.

        Newer ones that do not verify get a `fault` row each and are renamed to `.bad-*`. If none of them verifies that
        is a `UserError`: starting from scratch is not for us to decide.
        """
        self.finish()
        answer = self._broadcast(self._choose() if self._world.is_first else None)
        if isinstance(answer, str):
            raise UserError(answer)
        return answer

    def load(self, choice: VerifiedCheckpoint, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fill `tensors` in place from a checkpoint, whatever number of ranks wrote it, and return its state.

        Exactly the names, shapes and types of the checkpoint are accepted; `UserError` names what differs.
        """
        self.finish()
        load_tensors(choice, tensors, group=self._group)
        self._committed_step = choice.step
        if self._world.is_first:
            self._ledger.append("restore", step=choice.step, why=f"from {choice.path.name}")
        return choice.state

    def _choose(self) -> VerifiedCheckpoint | str | None:
        good, bad = newest_verified(self._folder)
        for folder, reason in bad.items():
            self._report("fault", step=None, why=f"{folder.name} does not verify: {reason}")
        if good is None:
            if not bad:
                return None
            return (
                f"no checkpoint in {self._folder} verifies ({'; '.join(f'{k.name}: {v}' for k, v in bad.items())}): "
                "put a good copy back, remove them to start anew, or choose another run.dir"
            )
        for folder in bad:
            with self._attempt.exclusive():
                os.rename(folder, self._folder / f".bad-{folder.name}-{self._attempt.number}")
        return good

    def _complete(self, save: _Save, upload: Future[Any]) -> None:
        """In the background, on each rank: see the files of this rank done, then agree on the end with all."""
        files, error = self._own_files(save, upload)
        try:
            known = self._broadcast(set(save.tensors))
            tensors = {name: spec for name, spec in save.tensors.items() if name not in known}
            outcomes = self._gather(_Outcome(files=files, tensors=tensors, error=error))
            verdict = self._broadcast(self._commit_or_discard(save, outcomes) if self._world.is_first else None)
        except RuntimeError as lost:
            # A rank is gone, or hangs for longer than the group's timeout: training will notice on its own group.
            verdict = _Verdict(step=save.step, error=f"lost contact with the other ranks ({one_line(lost)})")
            _log.error("checkpoint of step %d failed: %s", save.step, verdict.error)
        assert verdict is not None
        if verdict.error is None and verdict.superseded is None:
            self._committed_step = save.step
            self._last_save_s = time.monotonic() - save.started_s
        self._verdict = verdict

    def _own_files(self, save: _Save, upload: Future[Any]) -> tuple[dict[str, FileRecord], str | None]:
        # Whatever went wrong here must reach the other ranks, or they wait for this one: hence the wide net.
        try:
            upload.result()
            return written_by(save.folder, self._world.rank), None
        except (Exception, CheckpointException) as error:
            return {}, one_line(error)

    def _commit_or_discard(self, save: _Save, outcomes: list[_Outcome]) -> _Verdict:
        """On rank 0: make the folder a checkpoint, or remove it and say why."""
        try:
            failed = [(rank, one.error) for rank, one in enumerate(outcomes) if one.error is not None]
            if failed:
                # One cause usually fails all ranks with the same words, which then name the rank already.
                rank, error = failed[0]
                named = error if error.startswith("rank ") else f"rank {rank}: {error}"
                raise _SaveFailed(f"{named} ({len(failed)} of {len(outcomes)} ranks failed)")
            files = {name: record for one in outcomes for name, record in one.files.items()}
            tensors = save.tensors | {name: spec for one in outcomes for name, spec in one.tensors.items()}
            self._commit(save, files, tensors)
        except Superseded as newer:
            return _Verdict(step=save.step, superseded=str(newer))
        except (_SaveFailed, OSError, ValueError) as problem:
            shutil.rmtree(save.folder, ignore_errors=True)
            reason = str(problem) if isinstance(problem, _SaveFailed) else one_line(problem)
            _log.error("CHECKPOINT OF STEP %d FAILED, training goes on without it: %s", save.step, reason)
            self._report("fault", step=save.step, why=f"save failed: {reason}")
            return _Verdict(step=save.step, error=reason)
        seconds = time.monotonic() - save.started_s
        self._report("save", step=save.step, why=f"{folder_name(save.step)} committed", seconds=round(seconds, 3))
        self._purge(save.step)
        return _Verdict(step=save.step)

    def _commit(self, save: _Save, files: dict[str, FileRecord], tensors: dict[str, TensorSpec]) -> None:
        written = {name for name in os.listdir(save.folder) if name.endswith(TENSOR_SUFFIX)}
        if written != set(files):
            raise ValueError(f"{save.folder} holds other tensor files than the ranks wrote: {written ^ set(files)}")
        write_text(save.folder / STATE, save.state_json)
        write_manifest(
            save.folder,
            Manifest(
                step=save.step,
                attempt=self._attempt.number,
                world=self._world.size,
                files=files | {STATE: record_file(save.folder / STATE)},
                tensors=tensors,
            ),
        )
        fsync_folder(save.folder)
        final = self._folder / folder_name(save.step)
        with self._attempt.exclusive():
            if final.exists():
                os.rename(final, self._trash(final))
            os.rename(save.folder, final)
        fsync_folder(self._folder)

    def _purge(self, just_committed: int) -> None:
        """Remove what `keep` and `keep_every_steps` do not ask for, by renaming first: no half folder keeps its name.

        Later steps than the one just committed are left to `newest`, which knows whether they verify.
        """
        older = [(step, path) for step, path in committed(self._folder) if step <= just_committed]
        surplus = [path for step, path in older[max(self._keep, 1) :] if step not in self._milestones(older)]
        surplus += self._folder.glob(".bad-*")
        try:
            for path in surplus:
                with self._attempt.exclusive():
                    os.rename(path, self._trash(path))
            for path in self._folder.glob(f".trash-{self._attempt.number}-*"):
                shutil.rmtree(path)
        except (OSError, Superseded) as error:
            # The save itself is safe; what is left over goes at the next purge or start.
            _log.warning("old checkpoints could not be removed: %s", one_line(error))

    def _milestones(self, older: list[tuple[int, Path]]) -> set[int]:
        """Of each span of `keep_every_steps`, the first checkpoint in it: saves need not fall on its multiples."""
        first_of_span: dict[int, int] = {}
        if self._keep_every_steps:
            for step, _ in sorted(older):
                first_of_span.setdefault(step // self._keep_every_steps, step)
        first_of_span.pop(0, None)  # before the first multiple
        return set(first_of_span.values())

    def _trash(self, path: Path) -> Path:
        return self._folder / f".trash-{self._attempt.number}-{path.name.lstrip('.')}"

    def _remove_leftovers(self) -> None:
        self._attempt.check()
        for pattern in ("step-*.tmp-*", ".trash-*"):
            for path in self._folder.glob(pattern):
                # A dying process of an older attempt may still write in there: what resists goes at the next start.
                shutil.rmtree(path, ignore_errors=True)

    def _report(self, event: Event, *, step: int | None, why: str, **more: Any) -> None:
        """A ledger row that a full disk or a newer attempt may refuse without harm: the log has it too."""
        level = logging.INFO if event == "save" else logging.ERROR
        _log.log(level, "%s: %s", event, why)
        try:
            self._ledger.append(event, step=step, why=why, **more)
        except (OSError, Superseded) as error:
            _log.error("the ledger did not take it: %s", one_line(error))

    def _gather(self, value: T) -> list[T]:
        """All ranks' values in rank order on rank 0; an empty list on the others."""
        if self._group is None:
            return [value]
        values: list[Any] | None = [None] * self._world.size if self._world.is_first else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def _broadcast(self, value: T) -> T:
        """Rank 0's value, on the checkpointer's own group: its timeout bears the verification of a large file."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def _own_group(world: World) -> dist.ProcessGroup | None:
    """A gloo group of all ranks for the checkpointer alone; None in a world of one without process groups."""
    if world.size == 1 and not (dist.is_initialized() and dist.get_world_size() == 1):
        return None
    group = dist.new_group(backend="gloo", timeout=_GROUP_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)  # all ranks are members
    return group
