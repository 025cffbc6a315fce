"""The attempts of a run out of its ledger: when each began and ended, which of its steps counted, how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dino_dist.exit_codes import DONE, STOPPED
from dino_dist.report.json_rows import step_of
from dino_dist.report.wording import seconds_of
from dino_dist.run_folder import RunFolder

_NO_WORD: Final = "no word of its end: killed, or its node was lost"
_SAME_TIME_S: Final = 120.0
"""config.yaml is written seconds before the `start` row of an attempt, unless the folder was copied since."""


@dataclass(frozen=True, kw_only=True)
class AttemptStory:
    """One start of the run; times in seconds since 1970."""

    number: int
    hosts: tuple[str, ...]
    began_s: float
    """It took the run folder."""
    ready_s: float | None
    """It began to train; None: it ended before."""
    ended_s: float
    """Its last word, or its last heartbeat where it was killed; of a running one, now."""
    first_step: int
    """Steps done when it began."""
    last_step: int
    """The last step that it is known to have reached."""
    kept_step: int
    """The last of its steps that the run did not lose at a later restart."""
    saved_all: bool
    """It ended with all its steps in a checkpoint."""
    ending: str
    """done, stopped, requeued, failed, killed, running."""
    why: str
    """The words of the ledger for it."""
    rows: tuple[Mapping[str, Any], ...]
    """Its rows of the ledger."""

    @property
    def lost_steps(self) -> int:
        """Steps that had to be done again, as far as the ledger knows."""
        return max(0, self.last_step - max(self.kept_step, self.first_step))

    def safe_from_s(self) -> float | None:
        """When the last of its kept steps was in a checkpoint; its begin where none was; None: it was never ready."""
        if self.ready_s is None:
            return None
        saves = [
            time
            for row in self.rows
            if row.get("event") == "save" and (step_of(row) or 0) <= self.kept_step
            if (time := seconds_of(row.get("time"))) is not None
        ]
        return max(saves, default=self.ready_s)


def read_attempts(
    folder: RunFolder, ledger: Sequence[Mapping[str, Any]], *, running: bool, now_s: float, last_step: int
) -> list[AttemptStory]:
    """The attempts by number. `last_step`: the newest one known of the run, by its metrics."""
    by_number: dict[int, list[Mapping[str, Any]]] = {number: [] for number in _numbers(folder.attempts)}
    for row in ledger:
        number = row.get("attempt")
        if type(number) is int and seconds_of(row.get("time")) is not None:
            by_number.setdefault(number, []).append(row)
    newest = max(by_number, default=0)
    trusts_files = _times_are_original(folder, ledger)
    found: list[AttemptStory] = []
    for number in sorted(by_number):
        lives = running and number == newest
        heartbeat_s = _heartbeat_s(folder, number) if trusts_files else None
        story = _story(folder, number, by_number[number], heartbeat_s=heartbeat_s, lives_at_s=now_s if lives else None)
        if story is not None:
            found.append(story)
    return _with_what_was_kept(found, last_step)


def _story(
    folder: RunFolder,
    number: int,
    rows: list[Mapping[str, Any]],
    *,
    heartbeat_s: float | None,
    lives_at_s: float | None,
) -> AttemptStory | None:
    times = [time for row in rows if (time := seconds_of(row.get("time"))) is not None]
    owner = folder.owner(number)
    began_s = None if owner is None else seconds_of(owner.time)
    if began_s is None:
        began_s = min(times, default=heartbeat_s)
    if began_s is None:
        return None
    start = next((row for row in rows if row.get("event") == "start"), None)
    first_step = 0 if start is None else step_of(start) or 0
    ending, why = ("running", "") if lives_at_s is not None else _ending(rows)
    ended_s = max([began_s, *times])
    if lives_at_s is not None:
        ended_s = max(ended_s, lives_at_s)
    elif ending == "killed" and heartbeat_s is not None:
        ended_s = max(ended_s, heartbeat_s)
    last_step = max([first_step, *(step_of(row) or 0 for row in rows)])
    hosts = dict.fromkeys(str(row["host"]) for row in rows if row.get("host"))
    if not hosts and owner is not None:
        hosts = {owner.host: None}
    return AttemptStory(
        number=number,
        hosts=tuple(hosts),
        began_s=began_s,
        ready_s=None if start is None else seconds_of(start.get("time")),
        ended_s=ended_s,
        first_step=first_step,
        last_step=last_step,
        kept_step=last_step,
        saved_all=_saved_all(rows, last_step),
        ending=ending,
        why=why,
        rows=tuple(rows),
    )


def _with_what_was_kept(stories: list[AttemptStory], last_step: int) -> list[AttemptStory]:
    """A restart goes back to a checkpoint: earlier steps after it are done again."""
    kept_step = max([last_step, *(story.last_step for story in stories[-1:])])
    told: list[AttemptStory] = []
    next_began_s: float | None = None
    for story in reversed(stories):
        last = max(story.last_step, kept_step) if not told else story.last_step
        ended_s = story.ended_s if next_began_s is None else max(story.began_s, min(story.ended_s, next_began_s))
        told.append(replace(story, kept_step=kept_step, last_step=last, ended_s=ended_s))
        if story.ready_s is not None:
            kept_step = min(kept_step, story.first_step)
        next_began_s = story.began_s
    return told[::-1]


def _ending(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The last word on it: a supervisor's row counts too."""
    telling = [row for row in rows if row.get("event") in ("stop", "requeue", "fault")]
    if not telling:
        return "killed", _NO_WORD
    last = telling[-1]
    faults = [row for row in telling if row.get("event") == "fault" and "alarm" not in row]
    why = str(last.get("why", ""))
    if last.get("event") == "stop":
        code = last.get("exit_code", STOPPED)
        return ("done" if code == DONE else "stopped" if code == STOPPED else "failed"), why
    if last.get("event") == "requeue" and not last.get("after_crash"):
        return "requeued", why
    if not faults or "alarm" in last:
        return "killed", _NO_WORD
    blamed = [row for row in faults if row.get("suspect_host")]
    return "failed", str([*blamed[-1:], *faults][0].get("why", ""))


def _saved_all(rows: Sequence[Mapping[str, Any]], last_step: int) -> bool:
    saved = max((step_of(row) or 0 for row in rows if row.get("event") == "save"), default=-1)
    asked = any(row.get("event") in ("signal", "stop") for row in rows)
    return asked and saved >= last_step


def _numbers(attempts: Path) -> list[int]:
    if not attempts.is_dir():
        return []
    return [int(path.stem) for path in attempts.glob("*.json") if path.stem.isdecimal() and len(path.stem) <= 12]


def _heartbeat_s(folder: RunFolder, number: int) -> float | None:
    try:
        return folder.attempt_file(number).stat().st_mtime
    except OSError:
        return None


def _times_are_original(folder: RunFolder, ledger: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the files' own times are still those of the run: a copy that does not keep them would tell nonsense."""
    starts = [time for row in ledger if row.get("event") == "start" if (time := seconds_of(row.get("time")))]
    try:
        return bool(starts) and abs(folder.config.stat().st_mtime - starts[-1]) < _SAME_TIME_S
    except OSError:
        return False
