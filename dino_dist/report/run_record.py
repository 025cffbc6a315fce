"""All that the files of a run say about it, read once, in memory that does not grow with the run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from dino_dist.manifest import MANIFEST, STATE, committed
from dino_dist.report.attempts import AttemptStory, read_attempts
from dino_dist.report.event_files import Sights, read_sights
from dino_dist.report.json_rows import JsonRows, number_of, step_of
from dino_dist.report.series import Series
from dino_dist.report.settings import Settings, read_settings
from dino_dist.report.wall_time import StepClock, WallTime, wall_time
from dino_dist.run_folder import RunFolder

_MOST_KEYS: Final = 200
_BATCH: Final = 4096
_LARGEST: Final = 1e100
"""No curve is drawn through more: sums and axes would overflow."""
_TEACHER_BACKBONE: Final = "teacher.backbone."


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How the run does at this moment, as `dino-dist status` sees it."""

    state: str
    """NEW, RUNNING, COMPLETED, STOPPED, FAILED, KILLED."""
    now_s: float
    """Seconds since 1970."""
    total_steps: int | None = None
    left_s: float | None = None
    """Of training, at the last speed."""
    facts: tuple[tuple[str, str], ...] = ()
    """More to say about where it comes from: name and value."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """metrics.jsonl as curves."""

    series: dict[str, Series]
    num_rows: int
    broken: int
    non_finite: int
    """Numbers in rows that were no numbers."""
    last_step: int
    clock: StepClock


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run."""

    path: Path
    standing: Standing
    metrics: Metrics
    ledger: tuple[Mapping[str, Any], ...]
    attempts: tuple[AttemptStory, ...]
    wall: WallTime | None
    settings: Settings
    sights: Sights
    provenance: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def step(self) -> int:
        """The newest step that is known."""
        return max([self.metrics.last_step, *(story.last_step for story in self.attempts[-1:])])

    @property
    def restarts(self) -> int:
        """Starts that began to train, less the first."""
        return max(0, sum(story.ready_s is not None for story in self.attempts) - 1)

    @property
    def name(self) -> str:
        """The last two names of its path: many a run folder is called `run`."""
        return "/".join(self.path.parts[-2:]) if len(self.path.parts) > 2 else self.path.name


def read_run(path: Path, standing: Standing) -> RunRecord:
    """Read the run folder `path`; what is missing, torn or damaged is left out, and said in `notes`."""
    folder = RunFolder(path)
    ledger_rows = JsonRows(folder.ledger)
    ledger = tuple(ledger_rows)
    resumed_at = [step_of(row) for row in ledger if row.get("event") == "start"]
    metrics = read_metrics(folder.metrics, {step for step in resumed_at if step})
    running = standing.state == "RUNNING"
    attempts = read_attempts(folder, ledger, running=running, now_s=standing.now_s, last_step=metrics.last_step)
    settings = read_settings(path)
    sights = read_sights(folder.tensorboard)
    notes = [*standing.notes, *settings.notes, *sights.notes]
    for file, broken in (("metrics.jsonl", metrics.broken), ("ledger.jsonl", ledger_rows.broken)):
        if broken:
            notes.append(f"{broken} lines of {file} are torn or no JSON objects and were left out")
    return RunRecord(
        path=path,
        standing=standing,
        metrics=metrics,
        ledger=ledger,
        attempts=tuple(attempts),
        wall=wall_time(attempts, metrics.clock),
        settings=settings,
        sights=sights,
        provenance=(*_provenance(folder), *standing.facts),
        notes=tuple(notes),
    )


def read_metrics(path: Path, resumed_at: set[int]) -> Metrics:
    """The curves of all numbers in the rows; `resumed_at`: steps where an attempt began."""
    rows = JsonRows(path)
    series: dict[str, Series] = {}
    clock = StepClock(resumed_at)
    num_rows = non_finite = last_step = 0
    good = ((step, row) for row in rows if (step := step_of(row)) is not None)
    while batch := list(islice(good, _BATCH)):
        num_rows += len(batch)
        last_step = max(last_step, *(step for step, _ in batch))
        non_finite += sum(len(listed) for _, row in batch if isinstance(listed := row.get("non_finite"), list))
        for step, row in batch:
            step_s = number_of(row.get("step_s"))
            if step_s is not None:
                clock.add(step, step_s)
        _take_in(series, batch)
    return Metrics(
        series=series,
        num_rows=num_rows,
        broken=rows.broken,
        non_finite=non_finite,
        last_step=last_step,
        clock=clock,
    )


def _take_in(series: dict[str, Series], batch: list[tuple[int, dict[str, Any]]]) -> None:
    """Column by column: a long run has many millions of numbers."""
    steps = np.array([step for step, _ in batch], dtype=np.float64)
    for key in dict.fromkeys(key for _, row in batch for key in row):
        if key == "step" or (key not in series and len(series) >= _MOST_KEYS):
            continue
        column = [value if type(value := row.get(key)) is float else number_of(value) for _, row in batch]
        values = np.array([math.nan if value is None else value for value in column])
        finite = np.abs(values) <= _LARGEST
        if finite.any():
            series.setdefault(key, Series()).extend(steps[finite], values[finite])


def _provenance(folder: RunFolder) -> list[tuple[str, str]]:
    """What the newest checkpoint says of the data, the network and the versions."""
    saved = committed(folder.checkpoints) if folder.checkpoints.is_dir() else []
    if not saved:
        return []
    step, place = saved[0]
    state, manifest = _json(place / STATE), _json(place / MANIFEST)
    facts = [("newest checkpoint", f"step {step:,}")]
    if isinstance(state.get("dataset_samples"), int):
        facts.append(("training images", f"{state['dataset_samples']:,}"))
    if state.get("dataset_hash"):
        facts.append(("data set hash", str(state["dataset_hash"])[:16]))
    parameters = _parameters(manifest.get("tensors"))
    if parameters:
        facts.append(("backbone", f"{parameters / 1e6:,.2f} M parameters"))
    if isinstance(state.get("world_size"), int):
        facts.append(("ranks", str(state["world_size"])))
    versions = state.get("versions")
    if isinstance(versions, dict):
        facts.extend((str(name), str(version)) for name, version in list(versions.items())[:12])
    return facts


def _parameters(tensors: object) -> int:
    total = 0
    for name, spec in tensors.items() if isinstance(tensors, dict) else ():
        shape = spec.get("shape") if isinstance(spec, dict) else None
        if str(name).startswith(_TEACHER_BACKBONE) and isinstance(shape, list):
            size = 1
            for side in shape:
                size *= side if isinstance(side, int) else 0
            total += size
    return total


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
