"""Write the report of a run folder to a file, whole or not at all."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dino_dist.errors import UserError
from dino_dist.report.page import FIRST_LINE, page
from dino_dist.report.run_record import RunRecord, Standing, read_run


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written."""

    path: Path
    size_bytes: int
    record: RunRecord


def write_report(run_dir: Path, out: Path, standing: Standing) -> Report:
    """Read the run in `run_dir` and write its page to `out`.

    `UserError` if the run cannot be read, or `out` is a folder, cannot be written, or is a file that is no report:
    only a report is replaced.
    """
    _refuse_to_replace(out)
    try:
        record = read_run(run_dir, standing)
    except OSError as error:
        raise UserError(f"{error.filename or run_dir} cannot be read ({error.strerror})") from error
    content = page(record).encode("utf-8")
    try:
        _replace(out, content)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): choose another file") from error
    return Report(path=out, size_bytes=len(content), record=record)


def _refuse_to_replace(out: Path) -> None:
    try:
        if out.is_dir():
            raise UserError(f"--out {out} is a folder: give the name of a file, such as {out / 'report.html'}")
        if not out.exists():
            return
        with open(out, "rb") as file:
            known = file.read(len(FIRST_LINE)) == FIRST_LINE.encode()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): choose another file") from error
    if not known:
        raise UserError(f"--out {out} is there already and is no report: choose another file, or remove it")


def _replace(out: Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{out.name[:100]}.", suffix=".tmp", dir=out.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, out)
    except BaseException:  # Ctrl-C too
        os.unlink(temporary)
        raise
