"""The folder that results go to: new or empty, so that nothing of another look is mixed in or overwritten."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dino_dist.errors import UserError
from dino_dist.pictures.media import shown


def new_folder(path: Path) -> Path:
    """Make it; `UserError` if it holds something or cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise UserError(f"--out {shown(path)} is not empty: give a new folder")
    except OSError as error:
        raise UserError(f"--out {shown(path)} cannot be used ({error.strerror}): give another folder") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"--out {shown(path)} cannot be written: give another folder")
    return path


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A full disk or a folder taken away is one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {shown(folder)}: {error.strerror or error}; what is there so far stays") from error
