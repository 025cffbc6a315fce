"""The figures that a reader wants first, and the checks that say whether something is wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dino_dist.report.run_record import RunRecord
from dino_dist.report.series import Point, Series
from dino_dist.report.wording import count, number, percent, shortened, span


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number with its name and what belongs to it."""

    name: str
    value: str
    below: str
    curve: tuple[Point, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    verdict: str
    """good, warn, bad."""
    name: str
    words: str


def figures(record: RunRecord) -> list[Figure]:
    """Those that the run can give yet."""
    series = record.metrics.series
    made = (_judged(series), _loss(record), _seen(record), _speed(record), _goodput(record), _faults(record))
    return [figure for figure in made if figure is not None]


def _judged(series: dict[str, Series]) -> Figure | None:
    curve = series.get("knn_top1") or next((series[key] for key in sorted(series) if key.startswith("knn_")), None)
    if curve is None or curve.last is None or curve.highest is None:
        return None
    best = f"best {percent(curve.highest)} at step {curve.highest_step:,.0f}"
    return Figure(
        name="k-NN top-1",
        value=percent(curve.last),
        below=f"the best so far, step {curve.last_step:,.0f}" if curve.last >= curve.highest else best,
        curve=tuple(curve.points()),
    )


def _loss(record: RunRecord) -> Figure | None:
    curve = record.metrics.series.get("loss")
    if curve is None or curve.last is None:
        return None
    config = record.settings.config
    below = f"at step {curve.last_step:,.0f}"
    if config is not None:
        above = curve.last - math.log(config.head.num_prototypes)
        below = f"{abs(above):.3f} {'above' if above > 0 else 'below'} ln K = {curve.last - above:.3f}"
    return Figure(name="Loss", value=number(curve.last), below=below, curve=tuple(curve.points()))


def _seen(record: RunRecord) -> Figure | None:
    seen, epoch = record.metrics.series.get("images_seen"), record.metrics.series.get("epoch")
    if seen is None or seen.last is None:
        return None
    epochs = "" if epoch is None or epoch.last is None else f"{number(round(epoch.last, 2))} epochs"
    return Figure(name="Images seen", value=count(seen.last), below=epochs)


def _speed(record: RunRecord) -> Figure | None:
    curve = record.metrics.series.get("images_per_s")
    if curve is None:
        return None
    points = curve.points()
    middle = sorted(point.mean for point in points)[len(points) // 2]
    wait = record.metrics.series.get("data_wait")
    waits = [] if wait is None else sorted(point.mean for point in wait.points())
    below = f"median; {percent(waits[len(waits) // 2])} waiting for data" if waits else "median"
    return Figure(name="Images a second", value=count(middle), below=below, curve=tuple(points))


def _goodput(record: RunRecord) -> Figure | None:
    wall = record.wall
    if wall is None:
        return None
    if wall.goodput is None:
        return Figure(name="Wall time", value=span(wall.total_s), below="no row says how long a step takes")
    return Figure(name="Goodput", value=percent(wall.goodput), below=f"of {span(wall.total_s)} wall time")


def _faults(record: RunRecord) -> Figure | None:
    if not record.attempts:
        return None
    lost = sum(story.lost_steps for story in record.attempts)
    faults = sum(row.get("event") == "fault" and "alarm" not in row for row in record.ledger)
    parts = [f"{faults:,} faults reported" if faults != 1 else "1 fault reported"]
    if lost:
        parts.append(f"{lost:,} steps done again")
    return Figure(name="Restarts", value=f"{record.restarts:,}", below=", ".join(parts))


def checks(record: RunRecord) -> list[Check]:
    """Alarms first, then what was counted; a run that has not begun has none."""
    found = [
        Check(verdict="bad", name=str(row["alarm"]), words=shortened(row.get("why", ""), 600))
        for row in record.ledger
        if row.get("event") == "fault" and "alarm" in row
    ]
    shown = found[-8:]
    if len(found) > len(shown):
        shown.insert(
            0, Check(verdict="bad", name="alarms", words=f"{len(found) - len(shown)} earlier ones: see events")
        )
    if record.metrics.num_rows:
        if not found:
            shown.append(Check(verdict="good", name="No alarm", words="no collapse, no starving, no drift was seen"))
        shown.extend(_counted(record))
    shown.extend(Check(verdict="warn", name="Note", words=shortened(note, 600)) for note in record.notes)
    return shown


def _counted(record: RunRecord) -> list[Check]:
    series = record.metrics.series
    skipped = _last(series, "skipped_steps")
    bad = _last(series, "bad_samples")
    drift = series.get("teacher_drift")
    found = [
        _nothing_or(skipped, "Skipped steps", "loss and gradients were finite in all steps", "steps were not finite"),
        _nothing_or(
            record.metrics.non_finite,
            "Logged numbers",
            "every one was finite",
            "were not finite; curves and figures leave them out",
        ),
        _nothing_or(bad, "Bad samples", "every image could be decoded", "images could not be decoded; see logs/"),
    ]
    if drift is not None and drift.highest is not None:
        equal = drift.highest == 0.0
        words = "equal on all replicas" if equal else f"replicas differed by up to {number(drift.highest)}"
        found.append(Check(verdict="good" if equal else "bad", name="Teachers", words=words))
    return [check for check in found if check is not None]


def _nothing_or(value: float | None, name: str, none: str, some: str) -> Check | None:
    if value is None:
        return None
    return Check(verdict="warn" if value else "good", name=name, words=f"{count(value)} {some}" if value else none)


def _last(series: dict[str, Series], key: str) -> float | None:
    return series[key].last if key in series else None
