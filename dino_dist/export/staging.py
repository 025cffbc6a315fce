"""Output that appears under its name whole or not at all: written beside it, checked, forced to the disk, renamed."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dino_dist.errors import UserError
from dino_dist.run_folder import fsync_folder


@contextmanager
def staged(out: Path, *, folder: bool) -> Iterator[Path]:
    """A path beside `out` to write a file or a new folder to; it becomes `out` if the block ends well, else nothing.

    `UserError`, before anything is written, if `out` exists (an empty folder may, where a folder is to be written) or
    nothing can be written there; and for what the system refuses within the block, such as a full disk.
    """
    _refuse_existing(out, folder=folder)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}.part-", dir=out.parent))
    except OSError as error:
        raise _unwritable(out, error) from None
    try:
        part = beside / out.name
        if folder:
            part.mkdir()
        yield part
        _finish(part, beside)
        _refuse_existing(out, folder=folder)
        os.rename(part, out)
        fsync_folder(out.parent)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def size_bytes(path: Path) -> int:
    """Of a file, or of all files in a flat folder."""
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else (path,)))


def _refuse_existing(out: Path, *, folder: bool) -> None:
    try:
        os.lstat(out)
        if folder and out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
            return
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unwritable(out, error) from None
    allowed = "a new name or an empty folder" if folder else "the name of a new file"
    raise UserError(f"--out {out} exists already: give {allowed}")


def _finish(part: Path, beside: Path) -> None:
    """Readable as the user's other new files are, whatever a library thinks of it, and on the disk."""
    usual = beside / ".usual"
    usual.touch()
    mode = stat.S_IMODE(usual.stat().st_mode)
    for path in part.iterdir() if part.is_dir() else (part,):
        path.chmod(mode)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if part.is_dir():
        fsync_folder(part)


def _unwritable(out: Path, error: OSError) -> UserError:
    return UserError(f"--out {out} cannot be written ({error.strerror or error}): choose another place")
