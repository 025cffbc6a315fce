"""Who is alive and how far: what a rank says of itself, and what follows when one falls silent or all stand still."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple

Phase = Literal["starting", "data", "step", "log", "save", "evaluate", "leaving"]
Kind = Literal["silent", "hang", "lost contact", "straggler", "stall", "slow data"]

_ORDER: Final = {
    name: place for place, name in enumerate(("starting", "data", "step", "log", "save", "evaluate", "leaving"))
}
_LONG_PHASES: Final = frozenset({"starting", "save", "evaluate", "leaving"})
_ENDING_KINDS: Final = frozenset({"silent", "hang", "lost contact"})

LEFT: Final = "left"
"""How a rank ended that left in good order; any other text says what it failed of; empty: it has not ended."""

_WINDOW_STEPS: Final = 20
_WINDOW_S: Final = 60.0
"""Waits for data are compared over at least so many steps and seconds: one slow batch is no slow rank."""
_SLOW_SHARE: Final = 0.2
_SLOW_FACTOR: Final = 2.0
_REPEAT_SLOW_DATA_S: Final = 600.0


class Standing(NamedTuple):
    """Where the training thread is: one object, so that another thread never reads half of a change."""

    phase: Phase
    step: int
    progress: int
    data_wait_s: float


class Pulse:
    """What the training thread says of itself; a few plain attribute writes, for it runs several times a step.

    `step` is the step that is worked at, counted from 1: the save and the evaluation after step 12 are step 12 too, and
    the wait for the data of the next step is `("data", 13)`. A rank that has done fewer steps, or is in an earlier
    phase of the same step (in the order of `Phase`), is less far. Everything up to the end of the first step of a start
    is `starting`, since it compiles.
    """

    def __init__(self) -> None:
        self.standing = Standing("starting", 0, 0, 0.0)
        self._since_s = time.monotonic()

    def enter(self, phase: Phase, step: int) -> None:
        """A phase begins. Only the training thread calls this."""
        now_s = time.monotonic()
        before = self.standing
        waited_s = before.data_wait_s + (now_s - self._since_s if before.phase == "data" else 0.0)
        self._since_s = now_s
        self.standing = Standing(phase, step, before.progress + 1, waited_s)

    def tick(self) -> None:
        """Progress within a long phase. Only the training thread calls this."""
        phase, step, progress, data_wait_s = self.standing
        self.standing = Standing(phase, step, progress + 1, data_wait_s)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a rank may be silent, and how long all may stand still, in seconds."""

    timeout_s: float
    """For silence, and for standing still in `data`, `step` and `log`."""
    timeout_start_s: float
    """For standing still in the long phases: `starting`, `save`, `evaluate`, `leaving`."""

    def of(self, phase: Phase) -> float:
        """Longest stand-still in a phase."""
        return self.timeout_start_s if phase in _LONG_PHASES else self.timeout_s

    def halved(self) -> Limits:
        """Those at which a straggler is named."""
        return Limits(timeout_s=self.timeout_s / 2, timeout_start_s=self.timeout_start_s / 2)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What the judge knows of a rank; all times are the judge's own, for clocks of two hosts cannot be compared."""

    rank: int
    host: str = "an unknown host"
    phase: Phase = "starting"
    step: int = 0
    data_wait_s: float = 0.0
    """In all, since the rank started."""
    ended: str = ""
    """See `LEFT`."""
    beats: int = 0
    """0: it was never heard of."""
    progress: int = 0
    beat_at_s: float = 0.0
    """When its last beat arrived."""
    moved_at_s: float = 0.0
    """When it was last seen to have made progress."""

    @property
    def place(self) -> tuple[int, int]:
        """How far it is, to be compared."""
        return self.step, _ORDER[self.phase]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong with which ranks."""

    kind: Kind
    """`silent`, `hang` and `lost contact` end the run; `straggler`, `stall` and `slow data` are only told."""
    ranks: tuple[int, ...]
    """Those at fault; all of them where none is less far than the others."""
    hosts: tuple[str, ...]
    """Of `ranks`, in their order."""
    step: int
    phase: Phase
    why: str
    """One line that names all this."""
    blames: bool = True
    """Whether `ranks` and their hosts are to blame; False where several ranks all wait in the same place."""
    stacks: Mapping[int, str] = field(default_factory=dict)
    """The main thread's Python stack, of those ranks that could still say."""

    @property
    def ends(self) -> bool:
        """Whether all ranks must end."""
        return self.kind in _ENDING_KINDS

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the stacks."""
        return {name: value for name, value in asdict(self).items() if name != "stacks"}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Fault:
        """The inverse of `to_json`."""
        return Fault(**{**values, "ranks": tuple(values["ranks"]), "hosts": tuple(values["hosts"])})


class AwakeClock:
    """Seconds during which this thread was awake, read at each of its wake-ups.

    A gap longer than `longest_gap_s` between two readings counts as that: a process that was stopped and went on, or a
    starved one, must not take its own absence for the silence of the others.
    """

    def __init__(self, longest_gap_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._longest_gap_s = longest_gap_s
        self._clock = clock
        self._last_s = clock()
        self.now_s = 0.0

    def tick(self) -> float:
        """The time now."""
        last_s, self._last_s = self._last_s, self._clock()
        self.now_s += min(self._last_s - last_s, self._longest_gap_s)
        return self.now_s


def judge(observations: Sequence[Observation], now_s: float, limits: Limits) -> Fault | None:
    """The gravest fault that the observations show at `now_s`, on the clock of their times; None in a healthy run.

    Silence comes before standing still: a dead rank holds up the others. What passed half of a limit is a `straggler`
    (some ranks) or a `stall` (all alike) and ends nothing.
    """
    fault = _beyond(observations, now_s, limits)
    if fault is not None:
        return fault
    early = _beyond(observations, now_s, limits.halved())
    if early is None:
        return None
    alone = early.kind == "silent" or len(early.ranks) < len(observations)
    return replace(early, kind="straggler" if alone else "stall")


def _beyond(observations: Sequence[Observation], now_s: float, limits: Limits) -> Fault | None:
    present = [one for one in observations if not one.ended]
    if not present:
        return None
    silent = [one for one in present if now_s - one.beat_at_s > _longest_silence_s(one, limits)]
    if silent:
        since_s = now_s - max(one.beat_at_s for one in silent)
        why = (
            f"no sign of life for {since_s:.3g} s from {named(silent)} ({_last_place(silent)}): "
            "dead or stopped, or its node is lost"
        )
        return _fault("silent", silent, why)
    behind = least_far(present)
    still_s = now_s - max(one.moved_at_s for one in present)
    if still_s <= limits.of(behind[0].phase):
        return None
    return _hang(observations, present, behind, still_s)


def _longest_silence_s(one: Observation, limits: Limits) -> float:
    return limits.timeout_s if one.beats else limits.timeout_start_s


def _hang(
    observations: Sequence[Observation], present: Sequence[Observation], behind: Sequence[Observation], still_s: float
) -> Fault:
    where = f"at step {behind[0].step} in phase {behind[0].phase}"
    ended = [one for one in observations if one.ended]
    failed = [one for one in ended if one.ended != LEFT]
    gone = failed or (ended if behind[0].phase != "leaving" else [])
    if gone:
        how = f"failed ({gone[0].ended})" if failed else "left"
        why = f"{named(gone)} {how} and {named(behind)} cannot go on since {still_s:.3g} s {where}"
        return _fault("hang", gone, why)
    if len(behind) < len(present):
        why = f"{named(behind)} {'holds' if len(behind) == 1 else 'hold'} up all others since {still_s:.3g} s {where}"
    elif len(present) == 1:
        why = f"{named(behind)} makes no progress since {still_s:.3g} s {where}"
    else:
        why = f"all ranks wait in the same place since {still_s:.3g} s {where}: {named(behind)}"
        return replace(_fault("hang", behind, why), blames=False)
    return _fault("hang", behind, why)


def _fault(kind: Kind, culprits: Sequence[Observation], why: str) -> Fault:
    return Fault(
        kind=kind,
        ranks=tuple(one.rank for one in culprits),
        hosts=tuple(one.host for one in culprits),
        step=culprits[0].step,
        phase=culprits[0].phase,
        why=why,
    )


def least_far(observations: Sequence[Observation]) -> list[Observation]:
    """Those in the earliest place."""
    earliest = min(one.place for one in observations)
    return [one for one in observations if one.place == earliest]


def named(observations: Sequence[Observation]) -> str:
    """`rank 3 on n3`, `ranks 8-15, 17 on n2, n3`."""
    runs: list[list[int]] = []
    for rank in sorted(one.rank for one in observations):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    ranks = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    hosts = ", ".join(dict.fromkeys(one.host for one in observations))
    return f"rank{'s' if len(observations) > 1 else ''} {ranks} on {hosts}"


def _last_place(observations: Sequence[Observation]) -> str:
    first = least_far(observations)[0]
    return f"last at step {first.step} in phase {first.phase}" if first.beats else "never heard of"


class RollCall:
    """What the judge has heard from each rank so far, and when."""

    def __init__(self, size: int) -> None:
        self.observations = [Observation(rank=rank) for rank in range(size)]

    def take(self, pulses: Sequence[Mapping[str, Any]], now_s: float) -> None:
        """The newest pulse of each rank, in rank order; an empty one is of a rank that has not spoken yet."""
        self.observations = [_updated(old, new, now_s) for old, new in zip(self.observations, pulses, strict=True)]


def _updated(old: Observation, pulse: Mapping[str, Any], now_s: float) -> Observation:
    if not pulse or pulse["beats"] == old.beats:
        return old
    moved = pulse["progress"] != old.progress or not old.beats
    said = {name: pulse[name] for name in ("host", "phase", "step", "data_wait_s", "ended", "beats", "progress")}
    return replace(old, **said, beat_at_s=now_s, moved_at_s=now_s if moved else old.moved_at_s)


class DataWaits:
    """Finds ranks that make all others wait for their data, step after step."""

    def __init__(self) -> None:
        self._start: list[Observation] = []
        self._start_s = 0.0
        self._named_at_s: dict[int, float] = {}

    def take(self, observations: Sequence[Observation], now_s: float) -> Fault | None:
        """A `slow data` fault at the end of a window with such ranks, each at most once in ten minutes."""
        if any(one.phase == "starting" for one in observations):
            return None
        if not self._start:
            self._start, self._start_s = list(observations), now_s
        steps = min(now.step - then.step for now, then in zip(observations, self._start, strict=True))
        if steps < _WINDOW_STEPS or now_s - self._start_s < _WINDOW_S:
            return None
        waits_s = [
            (now.data_wait_s - then.data_wait_s) / (now.step - then.step)
            for now, then in zip(observations, self._start, strict=True)
        ]
        step_s = (now_s - self._start_s) / steps
        self._start, self._start_s = list(observations), now_s
        slow = [
            observations[index]
            for index in slow_data(waits_s, step_s)
            if now_s - self._named_at_s.get(index, -_REPEAT_SLOW_DATA_S) >= _REPEAT_SLOW_DATA_S
        ]
        if not slow:
            return None
        self._named_at_s |= {one.rank: now_s for one in slow}
        share = max(waits_s[one.rank] for one in slow) / step_s
        why = f"{named(slow)} waits for data {share:.0%} of each step, and all others for it"
        return _fault("slow data", slow, why)


def slow_data(waits_s: Sequence[float], step_s: float) -> list[int]:
    """Ranks whose wait for data a step is over 20 % of the step and over twice the median of the other ranks."""
    if len(waits_s) < 2:
        return []
    slow = []
    for rank, wait_s in enumerate(waits_s):
        others_s = statistics.median([*waits_s[:rank], *waits_s[rank + 1 :]])
        if wait_s > _SLOW_SHARE * step_s and wait_s > _SLOW_FACTOR * others_s:
            slow.append(rank)
    return slow
