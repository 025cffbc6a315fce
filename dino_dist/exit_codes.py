"""How a run's process ends; the supervisor of a job ends with the same."""

from __future__ import annotations

from typing import Final

DONE: Final = 0
"""`train.length` is reached."""
FAILED: Final = 1
"""A crash, or a failure that another start may get over."""
BAD_INPUT: Final = 2
"""One line said what; the same input will not work another time."""
STOPPED: Final = 3
"""A signal or the time limit stopped the run; everything is saved."""
NO_RESTART_HELPS: Final = 4
"""The run failed in a way that the same command would repeat."""
INTERRUPTED: Final = 130
"""Somebody wants an end, and there was nothing to save."""
TERMINATED: Final = 143
"""The same by SIGTERM, of a command that tidies up before it ends."""
