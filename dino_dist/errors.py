"""The ways in which a command ends early on purpose; the command line turns them into exit codes."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """The input is wrong: the message is one line that names the thing, its value, what is allowed and what to do.

    The command line prints it without a traceback and exits with 2. Where the input `may_pass` another time (a store
    or a file system that fails at the moment) it exits with 1, and a launched job is requeued.
    """

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


@contextmanager
def reading(place: str) -> Iterator[None]:
    """What the system says of a file or folder at or below `place` becomes a `UserError` that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or place}: {error.strerror or error}; see to it, or remove it") from error


class SaidByRankZero(UserError):
    """The same `UserError` on another rank: it ends with the same code, but rank 0 prints the line."""


def for_rank(problem: UserError, *, is_first: bool) -> UserError:
    """What each rank raises for an error that one of them has met: all of them end alike, and rank 0 says it."""
    return (UserError if is_first else SaidByRankZero)(str(problem), may_pass=problem.may_pass)


class RunFailed(Exception):
    """The run cannot go on, for a reason that is no fault of the program; one line, exit code 1."""


class FailedTogether(RunFailed):
    """A `RunFailed` that every rank raises alike; only rank 0 prints the line."""


class Superseded(Exception):
    """A newer attempt owns the run folder: this process must write nothing more and end."""


class StopAsked(Exception):
    """A signal or the wall clock asks to stop, outside the loop; all ranks raise it alike once they share a world."""

    def __init__(self, word: int) -> None:
        super().__init__(f"asked to stop (word {word})")
        self.word = word
        """As `preemption` defines it."""


class NoRestartHelps(FailedTogether):
    """The same command would fail in the same way again: a requeue would only waste the cluster's time; exit code 4."""
