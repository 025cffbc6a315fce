"""The page: header, figures, checks, curves, pictures, the story of the attempts, speed, settings."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Final

from dino_dist.report.chart_choice import LEARNING, SCHEDULES, SPEED, Choice, Drawn, drawn, judged, others
from dino_dist.report.gallery import USAGE_TAG, gallery, none_yet, usage_card
from dino_dist.report.headline import Check, Figure, checks, figures
from dino_dist.report.line_chart import sparkline
from dino_dist.report.markup import Markup, element, join
from dino_dist.report.run_record import RunRecord
from dino_dist.report.tables import attempts_table, events_table, settings_table, wall_time_bar
from dino_dist.report.timeline import timeline
from dino_dist.report.wording import TIMES, moment, percent, span

FIRST_LINE: Final = "<!DOCTYPE html><!-- dino-dist report -->"
"""By which a report is known again."""
_NOTHING_FROM_OUTSIDE: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_TONES: Final = {"RUNNING": "live", "COMPLETED": "good", "FAILED": "bad", "KILLED": "bad"}


def page(record: RunRecord) -> str:
    """The whole document. It loads nothing and runs nothing: its own policy forbids both."""
    sections = [
        ("learning", "Learning", _learning(record)),
        ("pictures", "Pictures", _pictures(record)),
        ("story", "Attempts and faults", _story(record)),
        ("speed", "Speed", _charts(SPEED, record)),
        ("schedules", "Schedules", _charts(SCHEDULES, record)),
        ("more", "More curves", _more(record)),
        ("config", "Config", _config(record)),
    ]
    shown = [(name, title, content) for name, title, content in sections if content]
    body = element(
        "body",
        _header(record, [(name, title) for name, title, _ in shown]),
        element(
            "main",
            _overview(record),
            *(
                element("section", element("h2", title), content, id=name, class_="part-of-page")
                for name, title, content in shown
            ),
        ),
        element("footer", f"Written {moment(record.standing.now_s)} by dino-dist report. Needs no network."),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_NOTHING_FROM_OUTSIDE),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{record.name} · DINO run"),
        element("style", Markup(files("dino_dist.report").joinpath("page.css").read_text(encoding="utf-8"))),
    )
    return f"{FIRST_LINE}\n{element('html', head, body, lang='en')}\n"


def _header(record: RunRecord, sections: Sequence[tuple[str, str]]) -> Markup:
    standing = record.standing
    pill = element("span", standing.state.lower(), class_=f"pill big {_TONES.get(standing.state, 'calm')}")
    links = [element("a", title, href=f"#{name}") for name, title in sections]
    return element(
        "header",
        element("p", "DINO pretraining", class_="kicker"),
        element("h1", record.name, " ", pill),
        element("p", _subtitle(record), class_="subtitle"),
        _progress(record),
        element("nav", *links),
        class_="page-head",
    )


def _subtitle(record: RunRecord) -> str:
    config = record.settings.config
    parts = []
    if config is not None:
        arch = config.model.arch.replace("_", " ")
        parts.append(f"{arch}, patch {config.model.patch_size}")
        parts.append(f"{config.head.num_prototypes:,} prototypes")
        crops = f"2 {TIMES} {config.augment.global_px} px"
        if config.augment.local_crops:
            crops += f" + {config.augment.local_crops} {TIMES} {config.augment.local_px} px"
        parts.append(f"{crops} crops")
        parts.append(f"batch {config.train.batch_size:,}")
        parts.append(f"{config.optim.name}, {config.parallel.strategy}")
    if record.attempts:
        parts.append(f"since {moment(record.attempts[0].began_s)}")
    return " · ".join(parts)


def _progress(record: RunRecord) -> Markup | None:
    total = record.standing.total_steps
    if not total:
        return element("p", f"step {record.step:,}", class_="progress-words")
    share = min(1.0, record.step / total)
    left = record.standing.left_s
    words = f"step {record.step:,} of {total:,} ({percent(share)})"
    if left and record.standing.state == "RUNNING":
        words += f", {span(left)} left at this speed"
    return join(
        [
            element("div", element("span", style=f"width:{100 * share:.2f}%"), class_="progress"),
            element("p", words, class_="progress-words"),
        ]
    )


def _overview(record: RunRecord) -> Markup:
    tiles = [_tile(figure) for figure in figures(record)]
    found = checks(record)
    facts = [
        join([element("dt", name), element("dd", value)])
        for name, value in (*record.provenance, ("folder", record.path))
    ]
    cards = [
        element("article", element("h3", "Checks"), _checks(found), class_="card") if found else None,
        element("article", element("h3", "Provenance"), element("dl", *facts, class_="facts"), class_="card"),
    ]
    return join(
        [
            element("section", *tiles, class_="tiles") if tiles else None,
            None if record.metrics.num_rows else _not_yet(record),
            element("section", *cards, class_="two"),
        ]
    )


def _not_yet(record: RunRecord) -> Markup:
    words = "This run has just begun: it has logged no row yet." if record.attempts else "This run has not begun."
    return element("p", words, class_="empty")


def _tile(figure: Figure) -> Markup:
    curve = sparkline(figure.curve) if len(figure.curve) > 1 else None
    return element(
        "div",
        element("p", figure.name, class_="name"),
        element("p", figure.value, class_="value"),
        element("p", figure.below, class_="below"),
        curve,
        class_="tile",
    )


def _checks(found: Sequence[Check]) -> Markup:
    signs = {"good": "✓", "warn": "!", "bad": "✕"}
    return element(
        "ul",
        *(
            element(
                "li",
                element("span", signs[check.verdict], class_=f"sign {check.verdict}", aria_label=check.verdict),
                element("b", check.name),
                " ",
                element("span", check.words, class_="why"),
            )
            for check in found
        ),
        class_="checks",
    )


def _learning(record: RunRecord) -> Markup | None:
    return _charts((LEARNING[0], *judged(record.metrics.series), *LEARNING[1:]), record)


def _more(record: RunRecord) -> Markup | None:
    cards = _charts(others(record.metrics.series), record)
    if cards is None:
        return None
    return element("details", element("summary", "Everything else that was logged"), cards)


def _charts(choices: Sequence[Choice], record: RunRecord) -> Markup | None:
    restarts = [story.first_step for story in record.attempts[1:] if story.ready_s is not None]
    found = drawn(
        choices,
        record.metrics.series,
        config=record.settings.config,
        restarts=restarts if len(restarts) <= 40 else (),
        last_step=record.metrics.last_step,
    )
    return element("div", *(_chart_card(each) for each in found), class_="charts") if found else None


def _chart_card(each: Drawn) -> Markup:
    lines = each.chart.lines
    single = len(lines) == 1
    now = each.chart.show(lines[0].points[-1].mean) if single else None
    keys = [
        element(
            "li",
            element("span", class_=f"swatch line h{line.hue}"),
            f"{line.label} ",
            element("b", each.chart.show(line.points[-1].mean)),
        )
        for line in lines
    ]
    return element(
        "article",
        element(
            "header",
            element("h3", each.choice.title),
            element("span", now, class_="now") if now else None,
            element("p", each.choice.says) if each.choice.says else None,
        ),
        None if single else element("ul", *keys, class_="keys"),
        each.chart.svg(),
        class_="card",
    )


def _pictures(record: RunRecord) -> Markup | None:
    usage = record.sights.histograms.get(USAGE_TAG)
    cards = [*gallery(record.sights.pictures), *([usage_card(usage)] if usage else [])]
    return element("div", *cards, class_="gallery") if cards else none_yet()


def _story(record: RunRecord) -> Markup | None:
    if not record.attempts:
        return None
    picture = timeline(record.attempts, record.ledger, total_steps=record.standing.total_steps)
    wall = record.wall
    time_card = None
    if wall is not None and wall.counted_s is not None:
        says = f"{span(wall.total_s)} from the first start to the last word, waiting in the queue included"
        time_card = element(
            "article",
            element("header", element("h3", "Where the wall time went"), element("p", says)),
            wall_time_bar(wall),
            class_="card",
        )
    says = "Steps over time: blue counts, red was lost at a restart and done again. Hover for the words of the ledger."
    return join(
        [
            element(
                "article",
                element("header", element("h3", "Timeline"), element("p", says)),
                element("div", picture, class_="scroll", tabindex="0"),
                class_="card",
            ),
            time_card,
            element("article", element("h3", "Attempts"), attempts_table(record.attempts), class_="card"),
            element("article", element("h3", "Events"), events_table(record.ledger), class_="card"),
        ]
    )


def _config(record: RunRecord) -> Markup | None:
    rows = record.settings.rows
    return element("article", settings_table(rows), class_="card") if rows else None
