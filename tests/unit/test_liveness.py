"""The judgement over what ranks said of themselves: tables of cases, no threads, no clock."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from dino_dist.liveness import (
    AwakeClock,
    DataWaits,
    Fault,
    Limits,
    Observation,
    Pulse,
    RollCall,
    judge,
    named,
    slow_data,
)

LIMITS = Limits(timeout_s=100.0, timeout_start_s=1000.0)
NOW_S = 5000.0


def ranks(*places: str, still_s: float = 0.0, silent_s: dict[int, float] | None = None) -> list[Observation]:
    """`12 data`, `12 step left`: a rank each, all of which moved last `still_s` ago."""
    found = []
    for rank, place in enumerate(places):
        step, phase, *ended = place.split(" ", 2)
        found.append(
            Observation(
                rank=rank,
                host=f"n{rank}",
                phase=phase,  # type: ignore[arg-type]
                step=int(step),
                ended="".join(ended),
                beats=7,
                beat_at_s=NOW_S - (silent_s or {}).get(rank, 0.0),
                moved_at_s=NOW_S - still_s,
            )
        )
    return found


@pytest.mark.parametrize(
    ("seen", "kind", "culprits"),
    [
        (ranks("12 step", "12 data", still_s=49), None, ()),
        (ranks("12 step", "12 data", "12 step", still_s=51), "straggler", (1,)),
        (ranks("12 step", "12 data", "12 step", still_s=101), "hang", (1,)),
        (ranks("12 step", "12 step", still_s=51), "stall", (0, 1)),
        (ranks("12 step", "12 step", still_s=101), "hang", (0, 1)),
        (ranks("13 data", "12 log", "13 step", still_s=101), "hang", (1,)),
        (ranks("13 data", "12 save", "13 step", still_s=499), None, ()),
        (ranks("13 data", "12 save", "13 step", still_s=501), "straggler", (1,)),
        (ranks("13 data", "12 save", "13 step", still_s=1001), "hang", (1,)),
        (ranks("12 data", "12 save", still_s=101), "hang", (0,)),
        (ranks("0 starting", "1 starting", still_s=999), "straggler", (0,)),
        (ranks("0 starting", "1 starting", still_s=1001), "hang", (0,)),
        (ranks("9 evaluate", "9 evaluate", still_s=400), None, ()),
        (ranks("5 data", still_s=51), "stall", (0,)),
        (ranks("5 data", still_s=101), "hang", (0,)),
    ],
)
def test_those_least_far_are_to_blame_for_standing_still(
    seen: list[Observation], kind: str | None, culprits: tuple[int, ...]
) -> None:
    fault = judge(seen, NOW_S, LIMITS)
    if kind is None:
        assert fault is None
        return
    assert fault is not None
    assert (fault.kind, fault.ranks) == (kind, culprits)
    assert fault.hosts == tuple(f"n{rank}" for rank in culprits)
    assert (fault.step, fault.phase) == (seen[culprits[0]].step, seen[culprits[0]].phase)
    assert fault.ends == (kind == "hang")
    assert fault.blames == (len(seen) == 1 or len(culprits) < len(seen))


def test_the_progress_of_one_rank_is_progress_of_all() -> None:
    """Ranks move in lock step: where one goes on, none holds the others up for long."""
    seen = ranks("12 step", "12 data", still_s=101)
    seen[0] = ranks("12 step", still_s=3)[0]
    assert judge(seen, NOW_S, LIMITS) is None


@pytest.mark.parametrize(
    ("silent_s", "still_s", "kind", "culprits"),
    [
        ({1: 49}, 0, None, ()),
        ({1: 51}, 0, "straggler", (1,)),
        ({1: 101}, 0, "silent", (1,)),
        ({1: 101, 2: 300}, 0, "silent", (1, 2)),
        ({1: 51}, 101, "hang", (0,)),
        ({1: 101}, 101, "silent", (1,)),
    ],
)
def test_silence_is_judged_before_standing_still(
    silent_s: dict[int, float], still_s: float, kind: str | None, culprits: tuple[int, ...]
) -> None:
    fault = judge(ranks("12 data", "12 step", "12 step", still_s=still_s, silent_s=silent_s), NOW_S, LIMITS)
    assert (fault.kind if fault else None) == kind
    assert (fault.ranks if fault else ()) == culprits


def test_a_rank_never_heard_of_has_the_time_of_a_start() -> None:
    seen = [*ranks("1 step"), Observation(rank=1)]
    assert judge(seen, 400.0, LIMITS) is None
    fault = judge(seen, 1001.0, LIMITS)
    assert fault is not None
    assert fault.kind == "silent"
    assert "never heard of" in fault.why


def test_who_left_is_not_dead() -> None:
    assert judge(ranks("99 leaving", "99 leaving left", silent_s={1: 5000}), NOW_S, LIMITS) is None
    assert judge(ranks("99 leaving left", "99 leaving left", silent_s={0: 5000, 1: 5000}), NOW_S, LIMITS) is None


@pytest.mark.parametrize(
    ("places", "culprits"),
    [
        (("12 step", "12 step MemoryError: of 3 GiB", "12 step"), (1,)),
        (("12 step", "12 step left", "12 step"), (1,)),
        (("99 save", "99 leaving left", "99 leaving"), (1,)),
        (("99 leaving", "99 leaving left", "99 leaving"), (0, 2)),
        (("99 leaving left", "12 step MemoryError: of 3 GiB", "12 step"), (1,)),
    ],
)
def test_who_is_gone_is_to_blame_for_those_who_wait(places: tuple[str, ...], culprits: tuple[int, ...]) -> None:
    fault = judge(ranks(*places, still_s=1001), NOW_S, LIMITS)
    assert fault is not None
    assert (fault.kind, fault.ranks) == ("hang", culprits)
    assert ("MemoryError: of 3 GiB" in fault.why) == any("MemoryError" in place for place in places)


def test_a_fault_names_rank_host_step_and_phase_and_travels_as_json() -> None:
    fault = judge(ranks("12 step", "12 data", still_s=150), NOW_S, LIMITS)
    assert fault is not None
    assert fault.why == "rank 1 on n1 holds up all others since 150 s at step 12 in phase data"
    assert Fault.from_json(json.loads(json.dumps(fault.to_json()))) == fault


def test_many_ranks_are_named_shortly() -> None:
    seen = [Observation(rank=rank, host=f"n{rank // 8}") for rank in (3, 8, 9, 10, 15, 16)]
    assert named(seen[:1]) == "rank 3 on n0"
    assert named(seen) == "ranks 3, 8-10, 15-16 on n0, n1, n2"


def pulse(beats: int, progress: int, step: int = 3, data_wait_s: float = 0.0) -> dict[str, Any]:
    return {
        "beats": beats,
        "progress": progress,
        "step": step,
        "phase": "step",
        "data_wait_s": data_wait_s,
        "host": "n0",
        "ended": "",
    }


def test_the_roll_dates_beats_and_progress_by_the_judges_clock() -> None:
    roll = RollCall(3)
    roll.take([pulse(1, 1), pulse(1, 1), {}], 10.0)
    roll.take([pulse(2, 1), pulse(1, 1), {}], 20.0)
    roll.take([pulse(3, 2), pulse(1, 1), {}], 30.0)
    assert [one.beat_at_s for one in roll.observations] == [30.0, 10.0, 0.0]
    assert [one.moved_at_s for one in roll.observations] == [30.0, 10.0, 0.0]
    assert [one.beats for one in roll.observations] == [3, 1, 0]


def test_the_own_absence_counts_as_one_gap() -> None:
    times = iter([0.0, 1.0, 2.0, 500.0, 501.0])
    clock = AwakeClock(3.0, clock=lambda: next(times))
    assert [clock.tick() for _ in range(4)] == [1.0, 2.0, 5.0, 6.0]


def test_a_pulse_counts_progress_and_the_wait_for_data() -> None:
    mine = Pulse()
    assert (mine.standing.phase, mine.standing.progress) == ("starting", 0)
    mine.enter("data", 1)
    mine.tick()
    mine.enter("step", 1)
    waited_s = mine.standing.data_wait_s
    mine.enter("log", 1)
    assert mine.standing == ("log", 1, 4, waited_s)
    assert waited_s > 0.0


@pytest.mark.parametrize(
    ("waits_s", "slow"),
    [
        ([0.0, 0.0, 0.0], []),
        ([0.01, 0.30, 0.02], [1]),
        ([0.01, 0.19, 0.02], []),
        ([0.30, 0.31, 0.30], []),
        ([0.01, 0.50], [1]),
        ([0.9], []),
        ([0.0, 0.5, 0.0, 0.5, 0.0], [1, 3]),
    ],
)
def test_a_rank_is_slow_at_reading_against_the_step_and_the_others(waits_s: list[float], slow: list[int]) -> None:
    assert slow_data(waits_s, step_s=1.0) == slow


def test_slow_data_is_told_once_in_ten_minutes() -> None:
    waits, roll, told = DataWaits(), RollCall(3), []
    for now_s in range(0, 1500, 5):
        said = [pulse(now_s + 1, now_s + 1, now_s + 1, data_wait_s=now_s * share) for share in (0.01, 0.6, 0.02)]
        roll.take(said, float(now_s))
        fault = waits.take(roll.observations, float(now_s))
        if fault is not None:
            told.append(now_s)
            assert (fault.kind, fault.ranks, fault.ends) == ("slow data", (1,), False)
            assert "60%" in fault.why
    assert len(told) == 3
    assert all(later - earlier >= 600 for earlier, later in itertools.pairwise(told))
