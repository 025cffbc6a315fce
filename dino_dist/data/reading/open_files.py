"""A bounded number of open files that several threads read at once; none is closed while it is being read."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class _Handle:
    """A descriptor, the reads under way on it, and whether it is to be closed when they end."""

    fd: int
    readers: int = 0
    dropped: bool = False


@dataclass(slots=True)
class _Opening:
    """A file that one thread opens and others wait for."""

    is_done: bool = False
    error: BaseException | None = None


def _close_all(handles: OrderedDict[int, _Handle]) -> None:
    while handles:
        os.close(handles.popitem()[1].fd)


class OpenFiles:
    """Descriptors of the `capacity` files used last, opened by `open_file(key)` when asked for."""

    def __init__(self, capacity: int, open_file: Callable[[int], int]) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be at least 1")
        self._capacity = capacity
        self._open_file = open_file
        self._handles: OrderedDict[int, _Handle] = OrderedDict()
        self._opening: dict[int, _Opening] = {}
        self._lock = threading.Condition()
        # For owners that are dropped without a word: numbers of descriptors are not closed with what holds them.
        weakref.finalize(self, _close_all, self._handles).atexit = False

    @contextmanager
    def lease(self, key: int) -> Iterator[int]:
        """The descriptor of one file, which stays open at least as long as the context does.

        Threads that want the same file open it once. If that fails, all that waited for it have the same exception: a
        store that stalls is not asked once for each of them.
        """
        handle = self._taken(key) or self._opened(key)
        try:
            yield handle.fd
        finally:
            with self._lock:
                handle.readers -= 1
                self._close_if_done(handle)

    def __contains__(self, key: int) -> bool:
        """Whether a file is open here."""
        return key in self._handles

    def drop(self, key: int) -> None:
        """Forget one file, if it is open: the next lease opens it anew."""
        with self._lock:
            self._drop(key)

    def drop_where(self, is_done: Callable[[int, int], bool]) -> None:
        """Forget the files of which `is_done(key, descriptor)` is true."""
        with self._lock:
            for key in [key for key, handle in self._handles.items() if is_done(key, handle.fd)]:
                self._drop(key)

    def close(self) -> None:
        """Forget all files."""
        with self._lock:
            for key in list(self._handles):
                self._drop(key)

    def _taken(self, key: int) -> _Handle | None:
        """The handle of a file that is open; None makes it the caller's task to open it."""
        with self._lock:
            while (opening := self._opening.get(key)) is not None:
                self._lock.wait_for(lambda awaited=opening: awaited.is_done)  # type: ignore[misc]
                if opening.error is not None:
                    raise opening.error
            handle = self._handles.get(key)
            if handle is None:
                self._opening[key] = _Opening()
            else:
                self._handles.move_to_end(key)
                handle.readers += 1
            return handle

    def _opened(self, key: int) -> _Handle:
        try:
            fd = self._open_file(key)  # outside the lock: a network may take its time
        except BaseException as error:
            with self._lock:
                self._end_opening(key, error)
            raise
        with self._lock:
            while len(self._handles) >= self._capacity:
                self._drop(next(iter(self._handles)))
            handle = self._handles[key] = _Handle(fd, readers=1)
            self._end_opening(key, None)
        return handle

    def _end_opening(self, key: int, error: BaseException | None) -> None:
        opening = self._opening.pop(key)
        opening.is_done, opening.error = True, error if isinstance(error, Exception) else None
        self._lock.notify_all()

    def _drop(self, key: int) -> None:
        handle = self._handles.pop(key, None)
        if handle is not None:
            handle.dropped = True
            self._close_if_done(handle)

    def _close_if_done(self, handle: _Handle) -> None:
        if handle.dropped and not handle.readers:
            os.close(handle.fd)
