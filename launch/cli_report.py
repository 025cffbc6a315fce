"""`dino-dist report`: a run as one HTML page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dino_dist.errors import UserError, reading
from launch.results import AsJson, print_result

if TYPE_CHECKING:
    from dino_dist.report.run_record import RunRecord, Standing
    from launch.run_progress import Progress
    from launch.submission import Submission

report_app = typer.Typer()


@report_app.command("report")
def report(
    run: Annotated[Path, typer.Argument(help="A run folder, of any state.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; default: report.html in the run folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page of a run: figures, curves, pictures, faults, goodput, config. It needs no network."""
    from dino_dist.report.write import write_report
    from dino_dist.run_folder import RunFolder
    from launch.run_progress import progress_of
    from launch.submission import Submission

    run_dir = run.absolute()
    with reading(str(run)):
        if not run_dir.is_dir():
            raise UserError(f"no run folder {run}: give the run.dir of a run")
        submission = Submission.read(run_dir)
        progress = progress_of(RunFolder(run_dir))
    if submission is None and progress.state == "NEW" and not (run_dir / "config.yaml").exists():
        raise UserError(f"{run} holds no run (neither config.yaml nor attempts/): give the run.dir of a run")
    written = write_report(run_dir, out or run_dir / "report.html", _standing(progress, submission))
    print_result({"report": str(written.path), "mib": written.size_bytes / 2**20, **_summary(written.record)}, as_json)


def _standing(progress: Progress, submission: Submission | None) -> Standing:
    from dino_dist.report.run_record import Standing

    facts = []
    if submission is not None:
        where = f" on {submission.partition}" if submission.partition else ""
        facts.append(("Slurm job", f"{submission.job_id}{where}"))
        if submission.code.get("commit"):
            facts.append(("commit", str(submission.code["commit"])))
        facts.append(("submitted", submission.submitted))
    return Standing(
        state=progress.state,
        now_s=time.time(),
        total_steps=progress.total_steps,
        left_s=progress.left_s,
        facts=tuple(facts),
        notes=tuple(progress.notes),
    )


def _summary(record: RunRecord) -> dict[str, Any]:
    """What a script or a person at the terminal wants without opening the page."""
    knn = record.metrics.series.get("knn_top1")
    loss = record.metrics.series.get("loss")
    return {
        "state": record.standing.state,
        "step": record.step,
        "total_steps": record.standing.total_steps,
        "loss": None if loss is None else loss.last,
        "knn_top1": None if knn is None else knn.last,
        "attempts": len(record.attempts),
        "restarts": record.restarts,
        "steps_done_again": sum(story.lost_steps for story in record.attempts),
        "wall_s": None if record.wall is None else record.wall.total_s,
        "goodput": None if record.wall is None else record.wall.goodput,
        "notes": list(record.notes),
    }
