"""One run of the drill's job under a plan of faults: strike, watch, let it start again, compare with the reference."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from drill_faults import Act, Fault, Scene, Unexpected, mount_small_disk
from drill_job import Job, Recipe, Story
from safetensors.numpy import load_file

from dino_dist.manifest import committed, newest_verified, verify
from dino_dist.slurm import SlurmError

_POLL_S: Final = 0.01
_PATIENCE_S: Final = 120.0
_STARTS: Final = 3
"""A start may fail by itself so often, then the run is lost."""
_STEPS_AFTER: Final = 3
_ONE_STEP_S: Final = 0.1


class Lost(Exception):
    """A run did not reach its end; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The run that nothing happened to."""

    rows: dict[int, dict[str, Any]]
    """Metrics by step."""
    tensors: dict[tuple[str, str], bytes]
    saves_s: list[float]
    first_step_s: float


@dataclass(kw_only=True)
class Struck:
    """A fault that was injected, and what came of it."""

    run: int
    fault: str
    step: int
    """Last logged before it."""
    detail: str = ""
    detected_by: str = ""
    ended_s: float | None = None
    """From the fault until the job was down; None if it was to go on."""
    commit_s: float | None = None
    """From the signal to the committed checkpoint; None without a signal."""
    next_step_s: float | None = None
    """From the begin of the next start to its first step."""
    steps_lost: int = 0
    """Steps that were done and had to be repeated."""
    restored: int | None = None
    expected: int | None = None
    """The newest checkpoint that verified at the next start."""
    equal: bool | None = None
    """Every number from the next start on is the reference's, to the last bit."""
    problem: str = ""

    def blame(self, problem: str) -> None:
        """Note what should not have happened."""
        self.problem = "; ".join(filter(None, (self.problem, problem)))

    def line(self) -> str:
        """For a person who watches."""
        seconds = [(self.commit_s, "to the commit"), (self.ended_s, "to the end"), (self.next_step_s, "to a new step")]
        told = [f"{value:.1f} s {what}" for value, what in seconds if value is not None]
        told += [f"{self.steps_lost} steps lost", f"PROBLEM: {self.problem}" if self.problem else "ok"]
        return f"{self.fault} at step {self.step} ({self.detail}): {', '.join(told)}; {self.detected_by}"


def reference(job: Job, recipe: Recipe) -> Reference:
    """Let a run go to its end undisturbed."""
    first_step_s = _start(job)
    _until_done(job)
    saves = [row["seconds"] for row in job.story.ledger("save")]
    rows = {row["step"]: row for row in job.story.metrics()}
    if sorted(rows) != list(range(1, recipe.length + 1)):
        raise Lost("the reference run did not log every step")
    return Reference(rows=rows, tensors=final_tensors(job.story), saves_s=saves, first_step_s=first_step_s)


def drill(
    job: Job,
    recipe: Recipe,
    truth: Reference,
    plan: list[tuple[Fault, int]],
    rng: random.Random,
    *,
    run: int,
    tell: Callable[[str], None],
) -> list[Struck]:
    """A run under a plan of (fault, step); a run that is lost has that as the problem of its last fault."""
    struck: list[Struck] = []
    with ExitStack() as disks:
        if any(fault.name == "disk-full" for fault, _ in plan):
            mount_small_disk(job.story.folder.checkpoints, disks)
        try:
            _start(job)
            for fault, step in plan:
                _wait_for(job, lambda step=step, fault=fault: _is_time(job.story, step, fault))  # type: ignore[misc]
                struck.append(Struck(run=run, fault=fault.name, step=0))
                _one(job, recipe, truth, fault, rng, struck)
                tell(struck[-1].line())
            _until_done(job)
            _compare(job.story, truth, struck)
            _compare_end(job.story, truth, recipe, struck)
        except (Lost, Unexpected, SlurmError) as lost:
            struck = struck or [Struck(run=run, fault="none", step=job.story.last_step())]
            struck[-1].blame(f"RUN LOST: {lost}")
            tell(f"{struck[-1].line()}\n{job.output()}")
        job.close()
    return struck


def _is_time(story: Story, step: int, fault: Fault) -> bool:
    return story.last_step() >= step and len(committed(story.folder.checkpoints)) >= fault.needs_checkpoints


def _one(job: Job, recipe: Recipe, truth: Reference, fault: Fault, rng: random.Random, struck: list[Struck]) -> None:
    """Inject one fault and see the job through to the first step after it."""
    one, story = struck[-1], job.story
    time.sleep(rng.uniform(0, _ONE_STEP_S))  # anywhere in a step
    rows_before = len(story.ledger())
    one.step = story.last_step()
    with ExitStack() as cleanup:
        scene = Scene(job=job, recipe=recipe, rng=rng, cleanup=cleanup)
        struck_s = time.time()
        went_on = _act(fault.strike, scene, one) and not fault.ends
        if not went_on:
            _wait_down(job)
            one.ended_s = time.time() - struck_s
            why_not = job.verdict()
            if why_not is not None:
                raise Lost(why_not)
            _compare(story, truth, struck[:-1])
            highest = story.last_step()
            _act(fault.while_down, scene, one)
            if fault.at_start is not None:
                highest = max(highest, _strike_the_start(fault.at_start, scene, one, truth))
            _restart(job, one, highest)
        rows = story.ledger()[rows_before:]
        one.detected_by = detected(rows) or ("the next start" if one.ended_s is not None else "nobody: it went on")
        one.commit_s = _seconds_to_commit(rows, struck_s)
        _judge(one, fault, recipe)
        _act(fault.after, scene, one)


def _act(act: Callable[[Scene], str], scene: Scene, one: Struck) -> bool:
    """Do a part of a fault; False if the job did something unexpected."""
    try:
        one.detail = ", ".join(filter(None, (one.detail, act(scene))))
        return True
    except Unexpected as problem:
        one.blame(str(problem))
        return False


def _strike_the_start(act: Act, scene: Scene, one: Struck, truth: Reference) -> int:
    """Let the job start, end that start too, and return the last step that was logged then."""
    scene.job.start()
    _act(act, scene, one)
    _wait_down(scene.job)
    why_not = scene.job.verdict()
    if why_not is not None:
        raise Lost(why_not)
    _compare(scene.job.story, truth, [])
    return scene.job.story.last_step()


def _restart(job: Job, one: Struck, highest: int) -> None:
    """Let the job start again, and note where it took up the run."""
    good, _ = newest_verified(job.story.folder.checkpoints)
    one.expected = 0 if good is None else good.step
    one.next_step_s = _start(job, one)
    one.restored = job.story.ledger("start")[-1]["step"]
    one.steps_lost = highest - (one.restored or 0)


def _judge(one: Struck, fault: Fault, recipe: Recipe) -> None:
    if one.restored != one.expected:
        one.blame(f"WRONG RESUME: from step {one.restored}, not {one.expected}")
    if fault.saves and one.steps_lost:
        one.blame("steps lost in spite of the save")
    if fault.saves and one.commit_s is None:
        one.blame("no save in the ledger")
    # One interval, and one more while the save that ends it is still being written.
    if one.steps_lost > recipe.save_every * (2 + fault.needs_checkpoints // 2):
        one.blame(f"{one.steps_lost} steps lost")


def _start(job: Job, one: Struck | None = None) -> float:
    """Start, and return the seconds to the first step."""
    starts = len(job.story.ledger("start"))

    def stepped() -> bool:
        rows = job.story.ledger("start")
        return len(rows) > starts and job.story.last_step() > rows[-1]["step"]

    for _ in range(_STARTS):
        job.start()
        deadline = time.monotonic() + _PATIENCE_S
        while not stepped():
            if job.is_down():
                break
            if time.monotonic() > deadline:
                raise Lost(f"no step within {_PATIENCE_S:g} s of a start")
            time.sleep(_POLL_S)
        else:
            return time.time() - job.launched_s
        if job.verdict() is not None or one is None:
            break
        one.blame("a start ended before its first step")
    raise Lost(job.verdict() or "does not start")


def _wait_for(job: Job, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not done():
        if job.is_down():
            raise Lost(job.verdict() or "ended by itself")
        if time.monotonic() > deadline:
            raise Lost(f"no progress within {_PATIENCE_S:g} s")
        time.sleep(_POLL_S)


def _wait_down(job: Job) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not job.is_down():
        if time.monotonic() > deadline:
            raise Lost(f"still there {_PATIENCE_S:g} s after the fault")
        time.sleep(_POLL_S)


def _until_done(job: Job) -> None:
    _wait_down(job)
    if not job.story.is_done():
        raise Lost(job.verdict() or "ended before its length")


def detected(rows: list[dict[str, Any]]) -> str:
    """What the ledger said of a fault, in short; empty if nothing."""
    words: list[str] = []
    signalled: dict[str, list[int]] = {}
    for row in rows:
        if row["event"] == "signal":
            signalled.setdefault(row["why"], []).append(row["rank"])
        elif row["event"] in ("fault", "requeue"):
            who = "supervisor" if row["rank"] is None else f"rank {row['rank']}"
            words.append(f"{row['event']}, {who}: {row['why'].removeprefix('RunFailed: ').split(';')[0][:160]}")
    told = [f"signal {why}, ranks {sorted(ranks)}" for why, ranks in signalled.items()]
    return "; ".join([*told, *words])


def _seconds_to_commit(rows: list[dict[str, Any]], struck_s: float) -> float | None:
    """From the signal to the commit of the checkpoint that the job stopped at."""
    stops = [row["step"] for row in rows if row["event"] == "signal"]
    saves = [row for row in rows if row["event"] == "save" and row["step"] in stops]
    if not saves:
        return None
    return max(0.0, datetime.fromisoformat(saves[0]["time"]).timestamp() - struck_s)


def _compare(story: Story, truth: Reference, struck: list[Struck]) -> None:
    """Every row that is there now, also one that will be repeated, against the reference's."""
    different = [row["step"] for row in story.metrics() if row != truth.rows.get(row["step"])]
    pending = [one for one in struck if one.equal is None]
    for one in pending:
        one.equal = not different
        if different:
            one.blame(f"NUMBERS DIFFER from step {different[0]} on")
    if different and not pending:
        raise Lost(f"numbers differ from step {different[0]} on, without a fault")


def _compare_end(story: Story, truth: Reference, recipe: Recipe, struck: list[Struck]) -> None:
    steps = [row["step"] for row in story.metrics()]
    if steps != list(range(1, recipe.length + 1)):
        struck[-1].blame("a row is missing or double")
    if final_tensors(story) != truth.tensors:
        struck[-1].blame("THE LAST CHECKPOINT DIFFERS")


def final_tensors(story: Story) -> dict[tuple[str, str], bytes]:
    """Every tensor in each rank's file of the newest checkpoint, which verifies."""
    _, newest = committed(story.folder.checkpoints)[0]
    files = sorted(name for name in verify(newest).manifest.files if name.endswith(".safetensors"))
    return {(name, key): array.tobytes() for name in files for key, array in load_file(newest / name).items()}
