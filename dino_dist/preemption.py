"""Stopping early in good order: signals and the wall clock set a word, and all ranks agree on it at a step boundary."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Final

import torch
from torch import Tensor

from dino_dist.errors import StopAsked
from dino_dist.slurm import SlurmError, show_job

_log = logging.getLogger(__name__)

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
_LARGEST_SHARE: Final = 0.25
"""Of the time that the job had left at its start: so much at most is kept back for an unmeasured save."""


@dataclass(frozen=True, kw_only=True)
class StopReason:
    """Why this rank asks to stop."""

    name: str
    """Of the signal, or `time limit`."""
    at_s: float
    """`time.monotonic()` when it came."""


class TimeLimit:
    """When the job will be killed by the clock."""

    def __init__(self, ask: Callable[[], float | None]) -> None:
        """`ask`: the end of the job in seconds since the epoch, None: never; `SlurmError` if it cannot be had.

        Called now and whenever the end is near: an administrator may have given the job more time.
        """
        self._ask = ask
        self._end_s = self._on_our_clock()
        now_s = time.monotonic()
        self._share_s = math.inf if self._end_s is None else max(self._end_s - now_s, 0.0) * _LARGEST_SHARE

    def is_near(self, *, save_s: float | None, step_s: float, margin_s: float) -> bool:
        """Whether what is left is less than two saves, two steps (the word is agreed one step late) and the margin."""
        needed_s = 2 * (_UNKNOWN_SAVE_S if save_s is None else save_s) + 2 * step_s + margin_s
        if save_s is None:
            needed_s = min(needed_s, self._share_s)
        if not self._is_within(needed_s):
            return False
        try:
            self._end_s = self._on_our_clock()
        except SlurmError:
            _log.warning(
                "Slurm does not say whether the job has got more time: stopping in time for what it said before"
            )
        return self._is_within(needed_s)

    def _is_within(self, needed_s: float) -> bool:
        return self._end_s is not None and self._end_s - time.monotonic() < needed_s

    def _on_our_clock(self) -> float | None:
        """On the clock of `time.monotonic()`, which nobody sets."""
        end_s = self._ask()
        return None if end_s is None else end_s - time.time() + time.monotonic()


def job_time_limit(job_id: str) -> TimeLimit | None:
    """When Slurm will end the job; a controller that does not answer now is no reason not to train."""

    def ask() -> float | None:
        job = show_job(job_id)
        return None if job is None else job.end_s

    try:
        return TimeLimit(ask)
    except SlurmError as error:
        _log.warning("the job's time limit is not known (%s): only signals stop this run", error)
        return None


class StopSignals:
    """Catches SIGUSR2, SIGTERM and SIGINT while its `with` block runs, on the main thread; the loop asks for `word`.

    The handlers only set a flag; the save happens at a step boundary that all ranks agree on. SIGUSR2 and SIGTERM ask
    to save and requeue, SIGINT to save and exit; the higher word wins, repeats do nothing. A second SIGINT (more than a
    second after the first) raises KeyboardInterrupt. SIGCONT, which Slurm sends with SIGTERM, is ignored.
    """

    def __init__(self, *, margin_s: float = 30.0, at_a_terminal: bool = True) -> None:
        """`margin_s`: left over before the time limit for the last step and the exit, besides twice `save_s`.

        `at_a_terminal`: whether a second SIGINT is a human's, who wants no save; a scheduler repeats itself.
        """
        self.margin_s = margin_s
        self._at_a_terminal = at_a_terminal
        self.time_limit: TimeLimit | None = None
        """Known on one rank: the others hear of it through the agreed word."""
        self.save_s: float | None = None
        """Seconds that a save takes, as measured; the owner of the loop keeps it up to date."""
        self.step_s = 0.0
        """Seconds that a step takes, likewise."""
        self.reason: StopReason | None = None
        """The first cause to stop; None while there is none."""
        self._word = GO_ON
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def word(self) -> int:
        """0 go on, 1 save and requeue, 2 save and exit."""
        limit = self.time_limit
        if self._word != GO_ON or limit is None:
            return self._word
        if limit.is_near(save_s=self.save_s, step_s=self.step_s, margin_s=self.margin_s):
            self._word = SAVE_AND_REQUEUE
            self.reason = StopReason(name="time limit", at_s=time.monotonic())
        return self._word

    @property
    def signalled(self) -> int:
        """The word without the clock: a start does one step at least, or it would never get anywhere."""
        return self._word

    def raise_if_asked(self) -> None:
        """`StopAsked` if there is a word: for the start, when there is nothing to save yet."""
        if self.word != GO_ON:
            raise StopAsked(self.word)

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
            if self._at_a_terminal and now_s - self.reason.at_s > _SECOND_INTERRUPT_AFTER_S:
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
