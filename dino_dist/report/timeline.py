"""The story of a run over wall time: how its step rose and fell back, its attempts, saves, signals and faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

from dino_dist.report.attempts import AttemptStory
from dino_dist.report.json_rows import step_of
from dino_dist.report.markup import Markup, element, join
from dino_dist.report.scales import Axis, ticks, time_ticks
from dino_dist.report.wording import moment, seconds_of, shortened, span, step_count

_WIDTH: Final = 1240
_LEFT, _RIGHT = 92, 1226
_TOP, _BOTTOM = 16, 176
_BAR_TOP, _BAR_HEIGHT = 192, 18
_LANES: Final = (
    ("saves", ("save",)),
    ("signals, ends", ("signal", "requeue", "stop")),
    ("alarms", ("alarm",)),
    ("faults", ("fault",)),
)
_LANE_TOP, _LANE_HEIGHT = 232, 24
_CELL_PX: Final = 5
"""Events that are closer than this are drawn as one."""
_MOST_WORDS: Final = 400


def timeline(
    attempts: Sequence[AttemptStory], ledger: Sequence[Mapping[str, Any]], *, total_steps: int | None
) -> Markup:
    """The picture; there is an attempt at least."""
    begin_s = attempts[0].began_s
    total_s = max(1.0, max(story.ended_s for story in attempts) - begin_s)
    x = Axis(low=0.0, high=total_s, start_px=_LEFT, end_px=_RIGHT)
    highest = max([1, *(story.last_step for story in attempts)])
    y = Axis(low=0.0, high=highest * 1.05, start_px=_BOTTOM, end_px=_TOP)
    goal = total_steps if total_steps is not None and total_steps <= 1.05 * highest else None
    foot = _LANE_TOP + len(_LANES) * _LANE_HEIGHT + 6
    return element(
        "svg",
        _grid(x, y, foot),
        element("line", x1=_LEFT, x2=_RIGHT, y1=f"{y.place(goal):.1f}", y2=f"{y.place(goal):.1f}", class_="reference")
        if goal
        else None,
        join(_climb(story, x, y, begin_s) for story in attempts),
        join(_fall(before, after, x, y, begin_s) for before, after in pairwise(attempts)),
        element("text", "attempts", x=_LEFT - 10, y=_BAR_TOP + 13, class_="tick y"),
        join(_bar(story, x, begin_s) for story in attempts),
        join(_lane(number, name, kinds, ledger, x, begin_s) for number, (name, kinds) in enumerate(_LANES)),
        viewBox=f"0 0 {_WIDTH} {foot + 26}",
        role="img",
        aria_label=f"Steps, {len(attempts)} attempts and events over {span(total_s)}",
        class_="chart timeline",
    )


def _grid(x: Axis, y: Axis, foot: int) -> Markup:
    parts = [element("text", "step", x=_LEFT - 10, y=_TOP - 4, class_="tick y")]
    for value in ticks(0.0, y.high, most=4):
        at = f"{y.place(value):.1f}"
        parts.append(element("line", x1=_LEFT, x2=_RIGHT, y1=at, y2=at, class_="grid"))
        if value > 0:
            parts.append(element("text", step_count(value), x=_LEFT - 10, y=at, dy="0.32em", class_="tick y"))
    for seconds in time_ticks(x.high):
        at = f"{x.place(seconds):.1f}"
        parts.append(element("line", x1=at, x2=at, y1=_TOP, y2=foot, class_="grid"))
        parts.append(element("text", _clock(seconds, x.high), x=at, y=foot + 17, class_="tick x"))
    return join(parts)


def _clock(seconds: float, total_s: float) -> str:
    """A time since the begin, in the unit that suits the axis."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if total_s >= 2 * size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds:.3g} s"


def _climb(story: AttemptStory, x: Axis, y: Axis, begin_s: float) -> Markup | None:
    """The steps that the ledger knows of one attempt, joined; those that were lost later are of another colour."""
    if story.ready_s is None:
        return None
    known = [(story.ready_s, story.first_step)]
    for row in story.rows:
        time, step = seconds_of(row.get("time")), step_of(row)
        if row.get("event") in ("save", "signal", "fault", "stop") and time is not None and step is not None:
            if time >= known[-1][0] and step >= known[-1][1]:
                known.append((time, step))
    if story.last_step > known[-1][1]:
        known.append((story.ended_s, story.last_step))
    kept = [place for place in known if place[1] <= story.kept_step]
    lost = [*kept[-1:], *(place for place in known if place[1] > story.kept_step)]
    return join([_path(kept, "curve h1", x, y, begin_s), _path(lost, "curve lost", x, y, begin_s)])


def _path(places: Sequence[tuple[float, int]], style: str, x: Axis, y: Axis, begin_s: float) -> Markup | None:
    if len(places) < 2:
        return None
    points = [f"{x.place(time - begin_s):.1f} {y.place(step):.1f}" for time, step in places]
    return element("path", d="M" + "L".join(points), class_=style)


def _fall(before: AttemptStory, after: AttemptStory, x: Axis, y: Axis, begin_s: float) -> Markup | None:
    """From where an attempt ended to where the next one went on."""
    if after.ready_s is None or before.ready_s is None:
        return None
    places = [(before.ended_s, before.last_step), (after.ready_s, after.first_step)]
    return _path(places, "gap", x, y, begin_s)


def _bar(story: AttemptStory, x: Axis, begin_s: float) -> Markup:
    left, right = x.place(story.began_s - begin_s), x.place(story.ended_s - begin_s)
    width = max(2.0, right - left - 1.0)
    words = (
        f"attempt {story.number}, {moment(story.began_s)}, {span(story.ended_s - story.began_s)}: "
        f"steps {story.first_step:,} to {story.last_step:,}, {story.ending}. {shortened(story.why, _MOST_WORDS)}"
    )
    place = {"x": f"{left:.1f}", "y": _BAR_TOP, "width": f"{width:.1f}", "height": _BAR_HEIGHT, "rx": 3}
    safe_s = story.safe_from_s()
    wasted = None
    if story.lost_steps and safe_s is not None:
        begun = max(left, x.place(safe_s - begin_s))
        wasted = element(
            "rect",
            x=f"{begun:.1f}",
            y=_BAR_TOP,
            width=f"{max(1.5, left + width - begun):.1f}",
            height=_BAR_HEIGHT,
            rx=3,
            class_="bar lost",
        )
    label = (
        element("text", story.number, x=f"{left + width / 2:.1f}", y=_BAR_TOP + 13, class_="on-bar")
        if width > 16
        else None
    )
    return element(
        "g", element("title", words), element("rect", **place, class_="bar h1"), wasted, label, class_="event"
    )


def _lane(
    number: int, name: str, kinds: Sequence[str], ledger: Sequence[Mapping[str, Any]], x: Axis, begin_s: float
) -> Markup:
    middle = _LANE_TOP + number * _LANE_HEIGHT + _LANE_HEIGHT / 2
    cells: dict[int, list[Mapping[str, Any]]] = {}
    for row in ledger:
        time = seconds_of(row.get("time"))
        kind = "alarm" if row.get("event") == "fault" and "alarm" in row else row.get("event")
        if kind in kinds and time is not None:
            cells.setdefault(int(x.place(time - begin_s) // _CELL_PX), []).append(row)
    marks = [_mark(name, rows, x, middle, begin_s) for rows in cells.values()]
    return join(
        [
            element("text", name, x=_LEFT - 10, y=f"{middle:.1f}", dy="0.32em", class_="tick y"),
            element("line", x1=_LEFT, x2=_RIGHT, y1=f"{middle:.1f}", y2=f"{middle:.1f}", class_="grid"),
            *marks,
        ]
    )


def _mark(lane: str, rows: Sequence[Mapping[str, Any]], x: Axis, middle: float, begin_s: float) -> Markup:
    time = seconds_of(rows[0].get("time")) or begin_s
    at = x.place(time - begin_s)
    lines = [
        f"{moment(seconds_of(row.get('time')) or 0.0)}, step {row.get('step')}, {row.get('event')}"
        f" on {row.get('host')}: {shortened(row.get('why', ''), _MOST_WORDS)}"
        for row in rows[:4]
    ]
    if len(rows) > 4:
        lines.append(f"and {len(rows) - 4} more")
    return element("g", element("title", "\n".join(lines)), _shape(lane, rows, at, middle), class_="event")


def _shape(lane: str, rows: Sequence[Mapping[str, Any]], at: float, middle: float) -> Markup:
    """A form of its own for each kind: colour alone does not reach everybody."""
    if lane == "saves":
        return element(
            "rect", x=f"{at - 1.5:.1f}", y=f"{middle - 6:.1f}", width=3, height=12, rx=1.5, class_="mark save"
        )
    if lane == "faults":
        cross = f"M{at - 4:.1f} {middle - 4:.1f}l8 8m0 -8l-8 8"
        return element("path", d=cross, class_="mark fault")
    if lane == "alarms":
        return element("path", d=f"M{at:.1f} {middle - 6:.1f}l6 11h-12Z", class_="mark alarm")
    ended = any(row.get("event") == "stop" for row in rows)
    if ended:
        return element("rect", x=f"{at - 5:.1f}", y=f"{middle - 5:.1f}", width=10, height=10, rx=2, class_="mark stop")
    return element("path", d=f"M{at:.1f} {middle - 6:.1f}l6 6l-6 6l-6 -6Z", class_="mark signal")
