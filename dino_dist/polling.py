"""How long work is ended early: it calls `poll` now and then, which may raise; ranks compare a word to stop."""

from __future__ import annotations

from collections.abc import Callable

Poll = Callable[[], None]
StopWord = Callable[[], int]
"""0 as long as this rank may go on; ranks that share collectives compare theirs and end together."""


def nothing_to_poll() -> None:
    """For callers whom nothing interrupts."""


def go_on() -> int:
    """The word to stop of callers whom nothing interrupts."""
    return 0
