"""Locks on files in a folder that several processes and users share."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def lock_file(path: Path) -> int:
    """A descriptor to lock: that of another user's file too, which may be there to be read only."""
    try:
        return _lockable(path)
    except FileNotFoundError:
        # Not at once: in a folder for all, systems refuse to "create" another user's file.
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def _lockable(path: Path) -> int:
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDWR | flags)  # network file systems lock no other
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags)


def is_locked_now(fd: int) -> bool:
    """Take the lock if nobody has it, and say whether this descriptor holds it now; closing gives it back."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def removed_if_abandoned(part: Path) -> bool:
    """Whether nobody writes to this file any more; then it is removed."""
    try:
        fd = _lockable(part)
    except FileNotFoundError:
        return True
    except PermissionError:
        return False
    try:
        if not is_locked_now(fd):
            return False
        part.unlink(missing_ok=True)
        return True
    except PermissionError:  # another user's, in a folder where each removes their own
        return False
    finally:
        os.close(fd)
