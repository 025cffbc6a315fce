"""Append-only JSON lines files of a run folder: the ledger of what happened, and the rows of metrics."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dino_dist.fencing import utc_now
from dino_dist.run_folder import Attempt, fsync_folder

Event = Literal["start", "restore", "save", "signal", "requeue", "stop", "fault"]


class JsonLines:
    """A file of JSON objects, one a line, that only the live attempt can write."""

    def __init__(self, path: Path, attempt: Attempt, *, sync: bool = False) -> None:
        """`sync`: each row survives a power cut (fsync), not only a killed process."""
        self.path = path
        self._attempt = attempt
        self._sync = sync

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row in one piece, floats at full precision.

        A number that is not finite becomes null, and its key is listed under `not_finite`. Raises `Superseded`, or
        `OSError` where the row could not be written whole; then nothing of it stays.
        """
        line = (json.dumps(finite_row(row), allow_nan=False) + "\n").encode()
        with self._attempt.exclusive():
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                _append_whole(descriptor, line)
                if self._sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def read(self) -> list[dict[str, Any]]:
        """All whole rows; see `read_rows`."""
        return read_rows(self.path)

    def cut_after(self, step: int) -> int:
        """Drop the rows of later steps than `step` and torn lines; returns how many lines went.

        Rows without a step stay. The file is replaced in one rename.
        """
        if not self.path.exists():
            return 0
        with self._attempt.exclusive():
            lines = self.path.read_bytes().splitlines()
            kept = [line for line in lines if (row := _parsed(line)) is not None and _is_up_to(row, step)]
            if len(kept) < len(lines):
                _replace(self.path, b"".join(line + b"\n" for line in kept))
            return len(lines) - len(kept)


class Ledger:
    """The story of a run: who started, saved, restored, stopped, and what went wrong, with the reasons."""

    def __init__(self, attempt: Attempt, *, rank: int | None, host: str = "") -> None:
        self._lines = JsonLines(attempt.folder.ledger, attempt, sync=True)
        self._attempt = attempt
        self._rank = rank
        self._host = host or socket.gethostname()

    def append(self, event: Event, *, step: int | None, why: str, **more: Any) -> None:
        """Write one row `{time, event, step, attempt, rank, host, why, ...}`; raises what `JsonLines.append` raises."""
        row = {
            "time": utc_now(),
            "event": event,
            "step": step,
            "attempt": self._attempt.number,
            "rank": self._rank,
            "host": self._host,
            "why": why,
        }
        self._lines.append(row | more)

    def read(self) -> list[dict[str, Any]]:
        """All whole rows of all attempts."""
        return self._lines.read()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a JSON lines file, in order; a line that a kill or a full disk tore is left out.

    A missing file has no rows.
    """
    if not path.exists():
        return []
    rows = (_parsed(line) for line in path.read_bytes().splitlines())
    return [row for row in rows if row is not None]


def finite_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` as JSON can hold it: non-finite floats as null, with `not_finite: {key: "nan" | "inf" | "-inf"}`."""
    bad = {key: str(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    if not bad:
        return dict(row)
    return {key: None if key in bad else value for key, value in row.items()} | {"not_finite": bad}


def _append_whole(descriptor: int, line: bytes) -> None:
    size_bytes = os.fstat(descriptor).st_size
    if size_bytes and os.pread(descriptor, 1, size_bytes - 1) != b"\n":
        # An earlier attempt died in a write: its torn row must not swallow this one.
        line = b"\n" + line
    written = os.write(descriptor, line)
    if written < len(line):
        os.ftruncate(descriptor, size_bytes)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _is_up_to(row: Mapping[str, Any], step: int) -> bool:
    row_step = row.get("step")
    return not isinstance(row_step, int | float) or row_step <= step


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)
