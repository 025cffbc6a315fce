"""Stopping early in good order: signals and the wall clock set a word, and all ranks agree on it at a step boundary."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Final

import torch
from torch import Tensor

GO_ON: Final = 0
SAVE_AND_REQUEUE: Final = 1
SAVE_AND_EXIT: Final = 2

_WORD_OF: Final = {
    signal.SIGUSR2: SAVE_AND_REQUEUE,
    signal.SIGTERM: SAVE_AND_REQUEUE,
    signal.SIGINT: SAVE_AND_EXIT,
}
# A terminal's Ctrl-C reaches a rank twice when its launcher passes it on too; a human needs longer for the second.
_SECOND_INTERRUPT_AFTER_S: Final = 1.0
_UNKNOWN_SAVE_S: Final = 60.0
"""Assumed before the first save was measured: too long costs a little work, too short all since the last save."""


@dataclass(frozen=True, kw_only=True)
class StopReason:
    """Why this rank asks to stop."""

    name: str
    """Of the signal, or `time limit`."""
    at_s: float
    """`time.monotonic()` when it came."""


class StopSignals:
    """Catches SIGUSR2, SIGTERM and SIGINT while its `with` block runs, on the main thread; the loop asks for `word`.

    The handlers only set a flag; the save happens at a step boundary that all ranks agree on. SIGUSR2 and SIGTERM ask
    to save and requeue, SIGINT to save and exit; the higher word wins, repeats do nothing. A second SIGINT (more than a
    second after the first) raises KeyboardInterrupt. SIGCONT, which Slurm sends with SIGTERM, is ignored.
    """

    def __init__(self, *, deadline_s: float | None = None, margin_s: float = 30.0) -> None:
        """`deadline_s`: when the job will be killed, on the clock of `time.monotonic()`; None: never.

        `margin_s`: left over for the last step and the exit, besides twice `save_s`.
        """
        self.deadline_s = deadline_s
        self.margin_s = margin_s
        self.save_s = _UNKNOWN_SAVE_S
        """Seconds that a save takes, as measured; the owner of the loop keeps it up to date."""
        self.reason: StopReason | None = None
        """The first cause to stop; None while there is none."""
        self._word = GO_ON
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def word(self) -> int:
        """0 go on, 1 save and requeue, 2 save and exit."""
        if self._word == GO_ON and self.deadline_s is not None:
            now_s = time.monotonic()
            if self.deadline_s - now_s < 2 * self.save_s + self.margin_s:
                self._word = SAVE_AND_REQUEUE
                self.reason = StopReason(name="time limit", at_s=now_s)
        return self._word

    def __enter__(self) -> StopSignals:
        for number in _WORD_OF:
            self._previous[number] = signal.signal(number, self._on_signal)
        self._previous[signal.SIGCONT] = signal.signal(signal.SIGCONT, signal.SIG_IGN)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: it was not set from Python, and cannot be from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        came = signal.Signals(number)
        if self.reason is None:
            self.reason = StopReason(name=came.name, at_s=now_s)
        elif came == signal.SIGINT and self._word == SAVE_AND_EXIT:
            if now_s - self.reason.at_s > _SECOND_INTERRUPT_AFTER_S:
                raise KeyboardInterrupt
        self._word = max(self._word, _WORD_OF[came])


class AgreedWord:
    """Reads a small vector that all ranks reduced, one step late, so that no step waits for the device.

    Each step: put this rank's flags into a float vector, all-reduce it (SUM), `post` it, `read` the one before. All
    ranks read the same numbers at the same step, hence decide alike. Waiting for the event of a step ago costs nothing
    in a healthy run.
    """

    def __init__(self) -> None:
        self._slots: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._posts = 0

    def post(self, reduced: Tensor) -> None:
        """Start the copy of a reduced vector (float, 1-D, the same length each time) to the CPU."""
        on_cuda = reduced.device.type == "cuda"
        if not self._slots:
            self._slots = [
                (
                    torch.empty(reduced.shape, dtype=reduced.dtype, pin_memory=on_cuda),
                    torch.cuda.Event() if on_cuda else None,  # type: ignore[no-untyped-call]
                )
                for _ in range(2)
            ]
        values, copied = self._slots[self._posts % 2]
        values.copy_(reduced.detach(), non_blocking=on_cuda)
        if copied is not None:
            copied.record(torch.cuda.current_stream(reduced.device))
        self._posts += 1

    def read(self) -> list[float] | None:
        """The values of the post before the last one; None until there were two posts."""
        return self._values(self._posts - 2) if self._posts >= 2 else None

    def latest(self) -> list[float] | None:
        """The values of the last post, waiting for it: for the end of a run, when no step follows."""
        return self._values(self._posts - 1) if self._posts else None

    def _values(self, post: int) -> list[float]:
        values, copied = self._slots[post % 2]
        if copied is not None:
            copied.synchronize()
        return [float(value) for value in values.tolist()]
