"""Where the threads of this process are, as text, without a lock or a disk that may be what hangs."""

from __future__ import annotations

import sys
import threading
import traceback
from types import FrameType
from typing import Final

_FRAMES: Final = 15
"""Of a stack that travels to another rank."""


def all_stacks() -> str:
    """The Python stacks of all threads, the last call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = sys._current_frames().items()
    return "\n".join(f"thread {names.get(ident, ident)}:\n{_stack(frame)}" for ident, frame in stacks) + "\n"


def main_stack() -> str:
    """The innermost frames of the main thread's Python stack, the last call last."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "" if frame is None else "\n".join(_stack(frame).split("\n")[-_FRAMES:])


def _stack(frame: FrameType) -> str:
    # Without the source lines, which would be read from a disk.
    calls = [f"  {at.f_code.co_filename}:{line} {at.f_code.co_qualname}" for at, line in traceback.walk_stack(frame)]
    return "\n".join(reversed(calls))
