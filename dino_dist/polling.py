"""Long work calls `poll` now and then, which may raise to end it."""

from __future__ import annotations

from collections.abc import Callable

Poll = Callable[[], None]


def nothing_to_poll() -> None:
    """For callers whom nothing interrupts."""
