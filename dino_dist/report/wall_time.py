"""Where the wall time of a run went: training that counted, work that was lost, starting, waiting, and the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dino_dist.report.attempts import AttemptStory


class StepClock:
    """Seconds of training up to a step, from rows that each give the mean time of the steps since the row before."""

    def __init__(self, boundaries: Iterable[int]) -> None:
        """`boundaries`: the steps that will be asked for."""
        self._targets = sorted({step for step in boundaries if step > 0}, reverse=True)
        self._at = {0: 0.0}
        self._step = 0
        self._seconds = 0.0

    def add(self, step: int, step_s: float) -> None:
        """One row, by rising step; others are ignored."""
        if step <= self._step or step_s < 0:
            return
        while self._targets and self._targets[-1] <= step:
            target = self._targets.pop()
            self._at[target] = self._seconds + (target - self._step) * step_s
        self._seconds += (step - self._step) * step_s
        self._step = step

    def seconds(self, step: int) -> float | None:
        """Up to the end of `step`; None where no row told how long steps take."""
        return self._at.get(step, self._seconds) if self._step else None


@dataclass(frozen=True, kw_only=True)
class WallTime:
    """Seconds from the first start to the last word; the parts make up the total."""

    total_s: float
    counted_s: float | None
    """Steps whose result is in the run; None: no row tells how long steps take."""
    lost_s: float
    """From the last checkpoint that was used to the end of an attempt: training that was done again, and silence."""
    starting_s: float
    """From the start of an attempt to its first step: rendezvous, indexing, restoring."""
    between_s: float
    """No attempt: queued, or down."""
    other_s: float
    """Evaluations, pictures, saves that hold the steps up, endings."""

    @property
    def goodput(self) -> float | None:
        """Share of the wall time, waiting in the queue included, that became training which counted."""
        return self.counted_s / self.total_s if self.counted_s is not None and self.total_s > 0 else None


def wall_time(attempts: Sequence[AttemptStory], clock: StepClock) -> WallTime | None:
    """The parts; None where no attempt has a time."""
    if not attempts:
        return None
    total_s = max(story.ended_s for story in attempts) - attempts[0].began_s
    counted_s = lost_s = starting_s = other_s = 0.0
    told = True
    for number, story in enumerate(attempts):
        if story.ready_s is None:
            starting_s += story.ended_s - story.began_s
            continue
        starting_s += max(0.0, story.ready_s - story.began_s)
        training_s = max(0.0, story.ended_s - story.ready_s)
        before, after = clock.seconds(story.first_step), clock.seconds(max(story.first_step, story.kept_step))
        told = told and before is not None
        useful_s = min(training_s, (after or 0.0) - (before or 0.0))
        wasted_s = 0.0
        if number + 1 < len(attempts) and not story.saved_all:
            wasted_s = min(training_s - useful_s, story.ended_s - (story.safe_from_s() or story.ready_s))
        counted_s += useful_s
        lost_s += max(0.0, wasted_s)
        other_s += max(0.0, training_s - useful_s - max(0.0, wasted_s))
    between_s = sum(max(0.0, after.began_s - before.ended_s) for before, after in pairwise(attempts))
    return WallTime(
        total_s=max(total_s, counted_s + lost_s + starting_s + between_s + other_s),
        counted_s=counted_s if told and counted_s > 0 else None,
        lost_s=lost_s,
        starting_s=starting_s,
        between_s=between_s,
        other_s=other_s if told and counted_s > 0 else 0.0,
    )
