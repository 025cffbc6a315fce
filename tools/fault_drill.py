"""Run a small job to its end under random faults, and show that every number is as if nothing had happened.

    python tools/fault_drill.py --on local --faults 15 [--seed 7] [--ranks 2] [--kinds kill-one,corrupt] [--json]
    python tools/fault_drill.py --on slurm --faults 60
    python tools/fault_drill.py --on local --faults 0 --signal-trials 30

First the job runs alone; then again and again, a few faults at random steps each time, until enough faults struck.
With `--on local` the tool starts the command again when it ended, as a requeue would; with `--on slurm` nobody does but
Slurm and the job itself. Exit code 1 if a run was lost, a resume was wrong or a number differs. Seconds come from the
clock of the ledger's rows; those to the next step count from the start of the job, so no queue wait is in them.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from drill_faults import FAULTS, GRACEFUL, Fault, Unexpected
from drill_job import Job, LocalJob, Recipe
from drill_report import costs, estimates, show_faults, show_goodput, show_trials, summary
from drill_run import Lost, Reference, Struck, drill, reference
from rich.console import Console

from dino_dist.slurm import SlurmError

FAULTS_A_RUN: Final = 5
BAND: Final = 20
"""Steps from one fault to the next."""
SAVE_EVERY: Final = 10


def known_faults(place: str) -> dict[str, Fault]:
    """Those that can be done there by this user."""
    every: list[Fault] = list(FAULTS)
    if place == "slurm":
        from drill_slurm import SLURM_FAULTS

        every += SLURM_FAULTS
    return {one.name: one for one in every if place in one.on and (not one.needs_root or os.geteuid() == 0)}


def chosen_faults(place: str, kinds: str | None, console: Console) -> list[Fault]:
    """The faults to draw from; says which cannot be done."""
    known = known_faults(place)
    unable = [one.name for one in FAULTS if place in one.on and one.name not in known]
    if unable:
        console.print(f"left out, since they need root: {', '.join(unable)}")
    if kinds is None:
        return list(known.values())
    unknown = [name for name in kinds.split(",") if name not in known]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: not among {', '.join(known)}")
    return [known[name] for name in kinds.split(",")]


def schedule(faults: list[Fault], count: int, rng: random.Random) -> list[Fault]:
    """`count` faults in a random order, each kind as often as the others."""
    dealt: list[Fault] = []
    while len(dealt) < count:
        dealt += rng.sample(faults, len(faults))
    return dealt[:count]


def make_job(place: str, recipe: Recipe, run_dir: Path, ranks: int) -> Job:
    """A run of the job where it shall run."""
    if place == "local":
        return LocalJob(recipe, run_dir, ranks)
    from drill_slurm import SlurmJob

    return SlurmJob(recipe, run_dir, ranks)


def play(
    place: str, recipe: Recipe, truth: Reference, plan: list[Fault], folder: Path, ranks: int, rng: random.Random
) -> list[Struck]:
    """All faults of a plan, a few a run; prints each as it is over."""
    struck: list[Struck] = []
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    for number, first in enumerate(range(0, len(plan), FAULTS_A_RUN)):
        here = plan[first : first + FAULTS_A_RUN]
        steps = [BAND * index + rng.randrange(4, 14) for index in range(len(here))]
        run_dir = folder / f"run-{number + 1:03d}"
        with ExitStack() as stack:
            job = make_job(place, recipe, run_dir, ranks)
            stack.callback(job.close)
            console.print(f"{run_dir.name}: {', '.join(f'{f.name} at {s}' for f, s in zip(here, steps, strict=True))}")
            struck += drill(
                job, recipe, truth, list(zip(here, steps, strict=True)), rng, run=number + 1, tell=console.print
            )
    return struck


def main(
    on: Annotated[str, typer.Option(help="local or slurm.")] = "local",
    faults: Annotated[int, typer.Option(help="How many to inject.", min=0)] = 15,
    signal_trials: Annotated[int, typer.Option(help="Trials of signal to committed checkpoint.", min=0)] = 0,
    seed: Annotated[int | None, typer.Option(help="Of the schedule; default: another one each time.")] = None,
    ranks: Annotated[int, typer.Option(help="Of the job.", min=2)] = 2,
    directory: Annotated[Path | None, typer.Option("--dir", help="Kept; default: a temporary folder.")] = None,
    kinds: Annotated[str | None, typer.Option(help="Only these faults, with commas between.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Run a small job to its end under random faults, and compare it with one that nothing happened to."""
    if on not in ("local", "slurm"):
        raise typer.BadParameter(f"--on {on}: local or slurm")
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    rng = random.Random(seed)
    folder = (directory or Path(tempfile.mkdtemp(prefix="fault-drill-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    console.print(f"repeat with --seed {seed}; runs in {folder}")
    plan = schedule(chosen_faults(on, kinds, console), faults, rng)
    trials = schedule([known_faults(on)[name] for name in GRACEFUL], signal_trials, rng)
    recipe = Recipe.write(folder, length=BAND * FAULTS_A_RUN + 50, save_every=SAVE_EVERY)
    with ExitStack() as stack:
        job = make_job(on, recipe, folder / "reference", ranks)
        stack.callback(job.close)
        truth = reference(job, recipe)
    struck = play(on, recipe, truth, plan, folder, ranks, rng)
    signalled = play(on, recipe, truth, trials, folder / "trials", ranks, rng)
    result: dict[str, Any] = {"seed": seed, "on": on, "ranks": ranks, **summary(struck + signalled)}
    measured = costs(truth, struck + signalled)
    if as_json:
        rows = [asdict(one) for one in struck]
        goodput = {"costs": asdict(measured), "fleets": [asdict(one) for one in estimates(measured)]}
        print(json.dumps({**result, "faults": rows, "trials": [asdict(one) for one in signalled], "goodput": goodput}))
    else:
        show_faults(struck, result)
        show_trials(signalled)
        if struck:  # signals alone do not tell how long a fault takes to be noticed
            show_goodput(measured)
    if result["problems"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    try:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(main)
        app()
    except (Lost, Unexpected, SlurmError) as problem:
        raise SystemExit(f"failed: {problem}") from None
