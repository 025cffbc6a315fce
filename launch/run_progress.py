"""How far a run is, read from the files of its folder alone, while it runs or long after; nothing is written."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dino_dist.config import Config
from dino_dist.config_file import load_config
from dino_dist.data.shards.shard_list import MANIFEST_NAME, is_manifest, list_shards
from dino_dist.durations import Duration
from dino_dist.errors import UserError
from dino_dist.exit_codes import DONE, STOPPED
from dino_dist.fencing import Owner, is_live
from dino_dist.ledger import read_rows
from dino_dist.manifest import STATE, committed
from dino_dist.run_folder import RunFolder

_TAIL_BYTES: Final = 1 << 17
"""Of metrics.jsonl, which may hold a million rows: some hundred rows."""
_SPEED_ROWS: Final = 10
_SILENT_AFTER_BEATS: Final = 6
"""Another host's heartbeat is read by this host's clock and through a network file system's cache."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What the files of a run say at one moment; None where they do not say."""

    state: str
    """NEW: never started; RUNNING; COMPLETED: reached its length; STOPPED: by a signal, saved; FAILED: ended otherwise;
    KILLED: gone without a word."""
    step: int
    total_steps: int | None
    images_per_s: float | None
    """Mean over the last rows."""
    left_s: float | None
    """Seconds of training left at that speed: without queueing, evaluation and saves."""
    attempts: int
    """Starts that got as far as taking the run folder."""
    restarts: int
    """Starts that began to train, less the first."""
    checkpoint_step: int | None
    """Of the newest committed checkpoint."""
    save_s: float | None
    """Seconds that the last save took."""
    last_row_age_s: float | None
    """Since metrics.jsonl was last written."""
    last_event: dict[str, Any] | None
    last_fault: dict[str, Any] | None
    ledger: list[dict[str, Any]]
    notes: list[str]
    """Why something is None, one line each."""


def progress_of(folder: RunFolder) -> Progress:
    """Read a run folder; `UserError` if it is no folder or may not be read."""
    try:
        return _progress_of(folder)
    except OSError as error:
        raise UserError(f"{error.filename or folder.path} cannot be read ({error.strerror})") from error


def is_running(folder: RunFolder) -> bool:
    """Whether the newest start of the run still lives, as far as can be seen from here."""
    attempt = folder.newest_attempt() if folder.attempts.is_dir() else 0
    return bool(attempt) and not folder.ended_file(attempt).exists() and _lives(folder, attempt)


def _progress_of(folder: RunFolder) -> Progress:
    ledger = read_rows(folder.ledger)
    rows = _last_rows(folder.metrics)
    saved = committed(folder.checkpoints) if folder.checkpoints.is_dir() else []
    attempts = folder.newest_attempt() if folder.attempts.is_dir() else 0
    state_file = _json(saved[0][1] / STATE) if saved else {}
    notes: list[str] = []
    config = _config(folder, notes)
    dataset_size = state_file.get("dataset_samples") or _dataset_size(rows, config)
    total_steps = _total_steps(config, dataset_size, notes)
    step = max(
        (_step(row) for row in [*rows[-1:], *_of_attempt(ledger, attempts)]), default=saved[0][0] if saved else 0
    )
    speed = _images_per_s(rows)
    left_s = None
    if config is not None and total_steps is not None and speed is not None:
        left_s = _number(max(0, total_steps - step) * config.train.batch_size / speed)
    return Progress(
        state=_state(folder, attempts, ledger, total_steps),
        step=step,
        total_steps=total_steps,
        images_per_s=speed,
        left_s=left_s,
        attempts=attempts,
        restarts=max(0, sum(row.get("event") == "start" for row in ledger) - 1),
        checkpoint_step=saved[0][0] if saved else None,
        save_s=_newest([*rows, state_file], "save_s"),
        last_row_age_s=max(0.0, time.time() - folder.metrics.stat().st_mtime) if rows else None,
        last_event=ledger[-1] if ledger else None,
        last_fault=next((row for row in reversed(ledger) if row.get("event") == "fault"), None),
        ledger=ledger,
        notes=notes,
    )


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows at the end of a JSON lines file."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        size_bytes = file.seek(0, os.SEEK_END)
        file.seek(max(0, size_bytes - _TAIL_BYTES))
        lines = file.read().splitlines()[int(size_bytes > _TAIL_BYTES) :]  # the first may be cut
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # torn by a kill, or being written
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _json(path: Path) -> dict[str, Any]:
    """A small JSON file that may be gone or damaged by now."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _config(folder: RunFolder, notes: list[str]) -> Config | None:
    """The config that was written last: of the last start, or of a submission that has not started yet."""
    files = [file for file in (folder.config, folder.path / "submitted.yaml") if file.is_file()]
    if not files:
        return None
    file = max(files, key=lambda file: file.stat().st_mtime_ns)
    try:
        return load_config(str(file))
    except UserError as error:
        notes.append(f"number of steps unknown: {error}")
        return None


def _dataset_size(rows: Sequence[Mapping[str, Any]], config: Config | None) -> int | None:
    """Images of the training set, before there is a checkpoint that says it."""
    for row in reversed(rows):
        images_seen, epoch = _number(row.get("images_seen")), _number(row.get("epoch"))
        size = _number(images_seen / epoch) if images_seen and epoch else None
        if size is not None and size > 0:
            return round(size)
    return None if config is None else _indexed_samples(config.data.train)


def _indexed_samples(spec: str) -> int | None:
    """The number of samples by the manifests beside the shards; None if one is missing."""
    try:
        if is_manifest(spec):
            return sum(_counted(_json(Path(spec))).values()) or None
        paths = list_shards(spec)
        counts = {folder: _counted(_json(folder / MANIFEST_NAME)) for folder in {path.parent for path in paths}}
        return sum(counts[path.parent][path.name] for path in paths)
    except (KeyError, TypeError, ValueError, UserError):
        return None


def _counted(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Samples by shard name."""
    return {str(row["name"]): int(row["samples"]) for row in manifest.get("shards", [])}


def _total_steps(config: Config | None, dataset_size: int | None, notes: list[str]) -> int | None:
    if config is None:
        return None
    length = Duration.parse(config.train.length)
    if length.unit == "ep" and dataset_size is None:
        notes.append(f"number of steps unknown: train.length={config.train.length}, and the data is not indexed yet")
        return None
    return length.steps(batch_size=config.train.batch_size, dataset_size=dataset_size or 0)


def _of_attempt(ledger: Sequence[Mapping[str, Any]], attempt: int) -> list[Mapping[str, Any]]:
    return [row for row in ledger if row.get("attempt") == attempt]


def _step(row: Mapping[str, Any]) -> int:
    step = row.get("step")
    return step if isinstance(step, int) else 0


def _newest(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    found = (_number(row.get(key)) for row in reversed(rows))
    return next((value for value in found if value is not None), None)


def _number(value: object) -> float | None:
    """A finite number; None for anything else that a damaged file may hold."""
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _images_per_s(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Harmonic, since the rows are of equal numbers of images and not of equal times."""
    speeds = [speed for row in rows if (speed := _number(row.get("images_per_s"))) is not None]
    recent = [speed for speed in speeds[-_SPEED_ROWS:] if speed > 0]
    return statistics.harmonic_mean(recent) or None if recent else None  # it may be too small to be told from 0


def _state(folder: RunFolder, attempts: int, ledger: Sequence[Mapping[str, Any]], total_steps: int | None) -> str:
    if not attempts:
        return "NEW"
    if is_running(folder):
        return "RUNNING"
    if not folder.ended_file(attempts).exists():
        return "KILLED"
    told = [row for row in _of_attempt(ledger, attempts) if row.get("event") in ("stop", "requeue", "fault")]
    if not told or told[-1]["event"] == "fault" or told[-1].get("exit_code", STOPPED) not in (DONE, STOPPED):
        return "FAILED"
    return "COMPLETED" if total_steps is not None and _step(told[-1]) >= total_steps else "STOPPED"


def _lives(folder: RunFolder, attempt: int) -> bool:
    """Whether the attempt's process runs, if it is of this host, else whether its heartbeat is fresh."""
    file, theirs = folder.attempt_file(attempt), folder.owner(attempt)
    heartbeat_s = folder.heartbeat_s if theirs is None else theirs.heartbeat_s
    mine = Owner.of_this_process(attempt, job_id=None, restarts=None, heartbeat_s=heartbeat_s)
    if theirs is not None and (theirs.host, theirs.pid_namespace) == (mine.host, mine.pid_namespace):
        return is_live(file, theirs, mine)
    with open(file, "rb") as opened:  # opening makes a network file system look
        return time.time() - os.fstat(opened.fileno()).st_mtime < _SILENT_AFTER_BEATS * heartbeat_s
