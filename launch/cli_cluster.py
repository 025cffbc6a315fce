"""The commands that need a cluster: `launch` submits a run, `status`, `logs` and `cancel` look after it.

Whatever takes long to import is imported inside the command that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.results import AsJson, Overrides

if TYPE_CHECKING:
    from launch.submit import Request, Submitted

cluster_app = typer.Typer()

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


@cluster_app.command()
def launch(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe.")],
    overrides: Overrides = None,
    nodes: Annotated[str, typer.Option(metavar="N|MIN-MAX", help="Nodes; with a range, what can be had.")] = "1",
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of each node; default 0.", min=0)] = None,
    tasks_per_node: Annotated[int | None, typer.Option(help="Ranks a node; default one a GPU.", min=1)] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="Cores of a rank and its data workers.", min=1)] = None,
    mem: Annotated[str | None, typer.Option(help="Memory a node, as in 64G.")] = None,
    partition: Annotated[str | None, typer.Option(help="Of the cluster.")] = None,
    account: Annotated[str | None, typer.Option(help="Who pays.")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Features that nodes must have.")] = None,
    time: Annotated[
        str | None, typer.Option(metavar="TIME", help="Limit of each start: 30 (minutes), 90m, 72h, 2d, 3-00:00:00.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Nodes not to use; may be repeated.")] = None,
    comment: Annotated[str | None, typer.Option(help="For the site's records.")] = None,
    setup: Annotated[list[str] | None, typer.Option(help="A shell line to run first; may be repeated.")] = None,
    slurm: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Another option of sbatch; true: a bare flag.")
    ] = None,
    srun_arg: Annotated[list[str] | None, typer.Option(help="Another argument of the srun that starts ranks.")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="'KEY=VALUE ...'", help="A run of a job array; repeat it.")
    ] = None,
    array_parallelism: Annotated[int | None, typer.Option(help="Runs of a sweep at the same time.", min=1)] = None,
    exclude_faulty: Annotated[bool, typer.Option(help="Restart without nodes that failed repeatedly.")] = False,
    accept_changes: Annotated[
        bool, typer.Option(help="Resume although the config differs in a way that changes the result.")
    ] = False,
    probe: Annotated[bool, typer.Option(help="Ask a free node first if it can write into the run folder.")] = True,
    dry_run: Annotated[bool, typer.Option(help="Print the batch script and the plan; submit nothing.")] = False,
    wait: Annotated[bool, typer.Option(help="Stay until the run is over; exit code 0 if it reached its end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a run to Slurm; it is requeued until it has reached its length."""
    from launch.cluster_file import Settings, cluster_file_path, job_options, read_cluster_file
    from launch.job_options import parse_slurm
    from launch.submit import Request, load_runs, submit

    given = Settings(
        gpus_per_node=gpus_per_node,
        tasks_per_node=tasks_per_node,
        cpus_per_task=cpus_per_task,
        mem=mem,
        partition=partition,
        account=account,
        qos=qos,
        constraint=constraint,
        exclude=",".join(exclude) if exclude else None,
        comment=comment,
        time=time,
        setup=tuple(setup or ()),
        slurm=parse_slurm(slurm or ()),
    )
    settings = given.over(read_cluster_file(cluster_file_path()))
    base_dir, configs = load_runs(config, overrides or [], sweep or [])
    request = Request(
        configs=configs,
        base_dir=base_dir,
        options=job_options(nodes, settings, srun_args=tuple(srun_arg or ())),
        argv=("dino-dist", *sys.argv[1:]),
        accept_changes=accept_changes,
        exclude_faulty=exclude_faulty,
        array_parallelism=array_parallelism,
        probe=probe,
    )
    if dry_run:
        _show(request, as_json=as_json)
        return
    submitted = submit(request)
    _say_submitted(submitted, as_json=as_json)
    if wait:
        raise typer.Exit(_wait(submitted))


@cluster_app.command()
def status(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run folder; default: your submissions.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say how a run does: its job, step, images/s, time left, restarts and last fault."""
    from launch.status import all_runs, print_runs, print_status, status_of

    found: Mapping[str, Any] | Sequence[Mapping[str, Any]] = all_runs() if run is None else status_of(run)
    if as_json:
        print(json.dumps(found))
    elif isinstance(found, Mapping):
        print_status(found)
    else:
        print_runs(found)


@cluster_app.command()
def logs(
    run: Run,
    rank: Annotated[int, typer.Option(help="Whose output.", min=0)] = 0,
    lines: Annotated[int, typer.Option("--lines", "-n", help="From the end of each file.", min=0)] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is added, until it is over.")] = False,
    job: Annotated[
        bool, typer.Option("--job", help="The supervisor's log instead: starts, crashes, requeues.")
    ] = False,
) -> None:
    """Show what a rank of a run has printed, over all its restarts."""
    from launch.logs import show_logs

    show_logs(run, rank=rank, lines=lines, follow=follow, supervisor=job)


@cluster_app.command()
def cancel(run: Run, as_json: AsJson = False) -> None:
    """End a run's job for good; it saves first if it can."""
    from dataclasses import asdict

    from launch.cancel import cancel as cancel_run

    cancelled = cancel_run(run)
    print(json.dumps(asdict(cancelled)) if as_json else cancelled.line)


def _show(request: Request, *, as_json: bool) -> None:
    """The script, with the plan below as comments: the output is still a script."""
    from launch.batch_job import script_text
    from launch.submit import plan_all

    plans, script = plan_all(request, dry_run=True), script_text(request.job)
    if as_json:
        print(json.dumps({"script": script, "plans": [plan.as_json() for plan in plans]}))
        return
    print(script)
    for plan in plans:
        print("# plan")
        for name, text in plan.rows().items():
            print(f"#   {name}: {text}")


def _say_submitted(submitted: Sequence[Submitted], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"jobs": [run.as_json() for run in submitted]}), flush=True)
        return
    for run in submitted:
        rows = run.plan.rows()
        print(f"job {run.job_id}: {run.run_dir}", flush=True)
        print("; ".join(rows[key] for key in ("world", "batch", "length", "checkpoint")), flush=True)
        for note in run.plan.notes:
            print(f"note: {note}", flush=True)
    print(f"how it does: dino-dist status {submitted[0].run_dir}", flush=True)


def _wait(submitted: Sequence[Submitted]) -> int:
    from launch.wait import wait_for

    try:
        unfinished = wait_for({run.job_id: run.run_dir for run in submitted})
    except KeyboardInterrupt:
        ids = ", ".join(run.job_id for run in submitted)
        print(f"detached: job {ids} goes on; `dino-dist cancel RUN` ends it", file=sys.stderr)
        return 130
    for run in submitted:
        if run.job_id in unfinished:
            print(f"job {run.job_id} ended before {run.run_dir} reached train.length: see status", file=sys.stderr)
    return 1 if unfinished else 0
