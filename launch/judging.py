"""What the commands that judge a network share: their arguments, starting ranks, and showing how far they are."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dino_dist.errors import UserError
from launch.results import say_notes

if TYPE_CHECKING:
    from dino_dist.judging.evaluator import Tell
    from dino_dist.judging.judged_network import JudgedNetwork

Checkpoint = Annotated[
    Path,
    typer.Argument(help="A run folder, one of its checkpoints, an exported file, or published weights (DINO, timm)."),
]
Network = Annotated[str, typer.Option(help="teacher or student.")]
NumRanks = Annotated[int, typer.Option(help="Ranks to start on this machine.", min=1)]


def start_ranks(arguments: Sequence[str], nproc: int) -> None:
    """Run this command on `nproc` ranks and end; return where there is only this one, or it is a rank already.

    `UserError` under torchrun or srun, which start the ranks themselves.
    """
    if nproc == 1:
        # Nothing is saved on a signal: a rank whose starter held signals back ends at once.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2))
        return
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise UserError(f"--nproc {nproc} cannot go with torchrun or srun, which start the ranks themselves")
    from launch.local import run_ranks

    raise typer.Exit(run_ranks([sys.executable, "-m", "launch.cli", *arguments], nproc))


@contextmanager
def judging(checkpoint: Path, overrides: Sequence[str] | None, network: str) -> Iterator[tuple[JudgedNetwork, Tell]]:
    """Be one of the ranks: the network on this rank, and what shows how far the first is; it tells of the network."""
    import torch

    from dino_dist.dist import ProcessEnvironment
    from dino_dist.judging.judged_network import judged_network

    environment = ProcessEnvironment.read()
    with judged_network(checkpoint, overrides or [], role=network, environment=environment) as judged:
        # As in training. More only help one rank alone, and cost dearly where the cores are shared.
        torch.set_num_threads(judged.config.parallel.threads_per_rank)
        if judged.world.is_first:
            say_notes(judged.weights.notes)
        with progress(shown=judged.world.is_first) as tell:
            yield judged, tell


@contextmanager
def progress(*, shown: bool) -> Iterator[Tell]:
    """A bar on stderr for each thing that is done; on no terminal a line once it is done; nothing unless `shown`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(bar_width=30), TimeRemainingColumn())
    # No refresh thread: a process forked while it holds the console's lock would wait for ever.
    bars = Progress(*columns, console=console, auto_refresh=False, disable=not (shown and console.is_terminal))
    tasks: dict[str, TaskID] = {}

    def tell(what: str, done: int, total: int) -> None:
        if not shown:
            return
        if not console.is_terminal:
            if done == total and what not in tasks:
                console.print(f"{what}: {total}", markup=False, highlight=False, soft_wrap=True)
                tasks[what] = TaskID(0)
            return
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, refresh=True)

    with bars:
        yield tell
