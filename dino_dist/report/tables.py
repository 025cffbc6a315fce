"""The tables of a page: attempts, events, settings, where the wall time went."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from dino_dist.report.attempts import AttemptStory
from dino_dist.report.markup import Markup, element, join
from dino_dist.report.settings import Setting
from dino_dist.report.wall_time import WallTime
from dino_dist.report.wording import DASH, moment, percent, shortened, span

_MOST_ATTEMPTS: Final = 100
_MOST_EVENTS: Final = 400
_SHORT: Final = 240
_LONG: Final = 6000
_KNOWN: Final = frozenset({"time", "event", "step", "attempt", "rank", "host", "why", "exit_code", "after_crash"})
_NUMBERS: Final = frozenset({"#", "lasted", "from step", "to step", "done again", "step", "attempt"})
_PARTS: Final = (
    ("counted", "counted", "training that is in the run"),
    ("lost", "lost", "done again after a fault"),
    ("other", "other", "evaluating, saving, ending"),
    ("starting", "starting", "joining, restoring"),
    ("between", "between attempts", "queued or down"),
)


def table(heads: Sequence[str], rows: Sequence[Markup]) -> Markup:
    """Rows under their heads, in a box that scrolls sideways where it must."""
    head = element(
        "tr", *(element("th", text, scope="col", class_="n" if text in _NUMBERS else None) for text in heads)
    )
    return element(
        "div",
        element("table", element("thead", head), element("tbody", *rows)),
        class_="scroll",
        tabindex="0",
    )


def wall_time_bar(wall: WallTime) -> Markup:
    """One bar of the whole wall time, with a legend."""
    seconds = {
        "counted": wall.counted_s or 0.0,
        "lost": wall.lost_s,
        "other": wall.other_s,
        "starting": wall.starting_s,
        "between": wall.between_s,
    }
    total_s = wall.total_s or 1.0
    shown = [(key, name, says, seconds[key]) for key, name, says in _PARTS if seconds[key] > 0]
    bar = [
        element(
            "span", class_=f"part {key}", style=f"flex-grow:{part_s / total_s:.5f}", title=f"{name}: {span(part_s)}"
        )
        for key, name, _, part_s in shown
    ]
    legend = [
        element(
            "li",
            element("span", class_=f"swatch {key}"),
            element("b", percent(part_s / total_s)),
            element("span", f" {name}", class_="strong"),
            element("small", f"{span(part_s)} · {says}"),
        )
        for key, name, says, part_s in shown
    ]
    return join([element("div", *bar, class_="parts"), element("ul", *legend, class_="legend")])


def attempts_table(attempts: Sequence[AttemptStory]) -> Markup:
    """One row an attempt; of very many the first and the last."""
    shown = list(attempts)
    if len(shown) > _MOST_ATTEMPTS:
        shown = [*shown[: _MOST_ATTEMPTS // 2], *shown[-_MOST_ATTEMPTS // 2 :]]
    rows = [_attempt(story) for story in shown]
    left_out = len(attempts) - len(shown)
    if left_out:
        gap = element("tr", element("td", f"… {left_out} attempts more …", colspan="8", class_="quiet"))
        rows.insert(_MOST_ATTEMPTS // 2, gap)
    return table(("#", "began", "lasted", "hosts", "from step", "to step", "done again", "ended"), rows)


def _attempt(story: AttemptStory) -> Markup:
    hosts = ", ".join(story.hosts[:4]) + (f" and {len(story.hosts) - 4} more" if len(story.hosts) > 4 else "")
    return element(
        "tr",
        element("td", story.number, class_="n"),
        element("td", moment(story.began_s), class_="time"),
        element("td", span(story.ended_s - story.began_s), class_="n"),
        element("td", shortened(hosts, _SHORT), class_="where"),
        element("td", f"{story.first_step:,}", class_="n"),
        element("td", f"{story.last_step:,}", class_="n"),
        element("td", f"{story.lost_steps:,}" if story.lost_steps else DASH, class_="n"),
        element("td", _pill(story.ending), " ", element("span", shortened(story.why, _SHORT), class_="why")),
    )


def _pill(ending: str) -> Markup:
    tone = {"done": "good", "running": "live", "failed": "bad", "killed": "bad"}.get(ending, "calm")
    return element("span", ending, class_=f"pill {tone}")


def events_table(ledger: Sequence[Mapping[str, Any]]) -> Markup:
    """The ledger without its saves, the newest first."""
    told = [row for row in ledger if row.get("event") != "save"]
    rows = [_event(row) for row in told[: -_MOST_EVENTS - 1 : -1]]
    if len(told) > _MOST_EVENTS:
        more = f"… {len(told) - _MOST_EVENTS} earlier events: see ledger.jsonl …"
        rows.append(element("tr", element("td", more, colspan="6", class_="quiet")))
    return table(("time", "event", "step", "attempt", "where", "why"), rows)


def _event(row: Mapping[str, Any]) -> Markup:
    event = "alarm" if row.get("event") == "fault" and "alarm" in row else str(row.get("event"))
    tone = {"fault": "bad", "alarm": "warn", "start": "live", "restore": "live"}.get(event, "calm")
    where = str(row.get("host") or "") + (f", rank {row['rank']}" if row.get("rank") is not None else "")
    return element(
        "tr",
        element("td", str(row.get("time", ""))[:19].replace("T", " "), class_="time"),
        element("td", element("span", shortened(event, 24), class_=f"pill {tone}")),
        element("td", _plain(row.get("step")), class_="n"),
        element("td", _plain(row.get("attempt")), class_="n"),
        element("td", shortened(where, _SHORT), class_="where"),
        element("td", _words(row)),
    )


def _plain(value: object) -> str:
    return f"{value:,}" if type(value) is int else DASH if value is None else shortened(value, 40)


def _words(row: Mapping[str, Any]) -> Markup:
    """The reason; what is long, and fields that only some rows have, unfold."""
    why = str(row.get("why", ""))
    more = {key: value for key, value in row.items() if key not in _KNOWN and value is not None}
    if len(why) <= _SHORT and not more:
        return element("span", why, class_="why")
    whole = "\n".join([why] * (len(why) > _SHORT) + [f"{key}: {_json(value)}" for key, value in more.items()])
    return element(
        "details",
        element("summary", element("span", shortened(why, _SHORT), class_="why")),
        element("pre", shortened(whole, _LONG)),
    )


def _json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=1, default=str).replace("\\n", "\n")


def settings_table(settings: Sequence[Setting]) -> Markup:
    """Sections with their settings; those that depart from the default are marked, and can be shown alone."""
    changed = sum(row.default is not None for row in settings)
    sections = [
        element(
            "section",
            element("h4", name),
            element("table", element("tbody", *(_setting(row) for row in rows))),
            class_="same" if all(row.default is None for row in rows) and changed else None,
        )
        for name, grouped in groupby(settings, key=lambda row: row.section)
        if (rows := list(grouped))
    ]
    switch = [
        element("input", type="checkbox", id="only-changed"),
        element("label", f" only the {changed} that differ from the defaults", for_="only-changed"),
    ]
    return element("div", *(switch if changed else ()), element("div", *sections, class_="settings"), class_="config")


def _setting(row: Setting) -> Markup:
    mark = element("small", f"default {shortened(row.default, 200)}") if row.default is not None else None
    return element(
        "tr",
        element("th", row.name, scope="row"),
        element("td", element("code", shortened(row.value, 500)), mark),
        class_="changed" if row.default is not None else None,
    )
