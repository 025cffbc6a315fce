"""The command line `dino-dist`: what each command takes, and how an ending becomes an exit code.

Torch is imported inside the commands that need it, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dino_dist.errors import FailedTogether, NoRestartHelps, RunFailed, SaidByRankZero, Superseded, UserError
from dino_dist.exit_codes import BAD_INPUT, DONE, FAILED, INTERRUPTED, NO_RESTART_HELPS
from launch.cli_cluster import cluster_app
from launch.cli_eval import eval_app
from launch.cli_export import export_app
from launch.cli_pictures import pictures_app
from launch.cli_report import report_app
from launch.cli_retrieval import retrieval_app
from launch.results import AsJson, Overrides, print_result, say

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
IndexDir = Annotated[Path, typer.Option(help="Of indexes that cannot lie beside their shards (data.index_dir).")]
_INDEX_DIR = Path("shard-index")
shards_app = typer.Typer(no_args_is_help=True, help="Make, index and check WebDataset tar shards.")
app.add_typer(shards_app, name="shards")
app.add_typer(eval_app, name="eval")
# Without a name: their commands stand beside ours.
eval_app.add_typer(retrieval_app)
for commands in (cluster_app, pictures_app, report_app, export_app):
    app.add_typer(commands)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe.")],
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(help="Ranks to start on this machine.", min=1)] = 1,
    accept_changes: Annotated[
        bool, typer.Option(help="Resume although the config differs in a way that changes the result.")
    ] = False,
) -> None:
    """Train, or go on with, the run of run.dir. Also under torchrun and srun, which start the ranks themselves."""
    from dino_dist.config_file import load_config

    loaded = load_config(config, overrides or [])  # found wrong here, before anything starts
    if nproc > 1:
        if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            raise UserError(f"--nproc {nproc} cannot go with torchrun or srun, which start the ranks themselves")
        from launch.local import run_ranks

        command = [sys.executable, "-m", "launch.cli", "train", config, *(overrides or [])]
        raise typer.Exit(run_ranks(command + ["--accept-changes"] * accept_changes, nproc))
    # Importing torch takes seconds: a signal that comes meanwhile waits for the run, which then stops in good order.
    held_back = [signal.SIGTERM, signal.SIGUSR2]
    if "SLURM_PROCID" in os.environ:
        held_back.append(signal.SIGINT)  # from `dino-dist cancel`; at a terminal Ctrl-C works at once
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held_back)
    try:
        from dino_dist.dist import ProcessEnvironment
        from dino_dist.train import train as train_run

        code = train_run(loaded, ProcessEnvironment.read(), accept_changes=accept_changes)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    raise typer.Exit(code)


@app.command()
def quickstart(
    directory: Annotated[Path, typer.Option("--dir", help="Where shards, run and summary go.")] = Path("quickstart"),
    nproc: Annotated[int, typer.Option(help="Ranks to start on this machine.", min=1)] = 2,
    as_json: AsJson = False,
) -> None:
    """Train a small DINO on the digit images that scikit-learn ships, on two ranks, and judge it by k-NN."""
    from launch.quickstart import run_quickstart

    summary = run_quickstart(directory, nproc=nproc)
    print_result(summary, as_json)


@app.command()
def doctor(
    slurm: Annotated[bool, typer.Option("--slurm", help="Look at the Slurm cluster too.")] = False,
    partition: Annotated[str | None, typer.Option(help="Of Slurm; default: as launch would take.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="A run folder that its nodes must share.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Measure these shards (as data.train) instead.")] = None,
    images_per_s: Annotated[float | None, typer.Option(help="Of --data: what one of your GPUs trains on.")] = None,
    num_threads: Annotated[int | None, typer.Option("--threads", help="Of --data: decode threads.", min=1)] = None,
    index_dir: IndexDir = _INDEX_DIR,
    as_json: AsJson = False,
) -> None:
    """Say what works on this machine and, with --slurm, on the cluster; what does not, and why.

    With --data: what reading, decoding and rendering one's own shards costs, and how many cores a GPU needs.
    """
    if not slurm and (partition is not None or run_dir is not None):
        raise UserError("--partition and --run-dir are about a cluster: give --slurm with them")
    if data is None and (images_per_s is not None or num_threads is not None):
        raise UserError("--images-per-s and --threads are about a data set: give --data with them")
    if data is not None:
        if slurm:
            raise UserError("--data and --slurm are two examinations: ask for one at a time")
        _examine_data(data, images_per_s, num_threads, index_dir, as_json)
        return
    from launch.cluster_file import Settings, cluster_file_path, job_options, read_cluster_file
    from launch.doctor import examine, table

    options = None
    if slurm:
        options = job_options("1", Settings(partition=partition).over(read_cluster_file(cluster_file_path())))
    findings = examine(slurm=options, run_dir=run_dir)
    if as_json:
        print(json.dumps(findings))
    else:
        table(findings)


def _examine_data(
    spec: str, images_per_s: float | None, num_threads: int | None, index_dir: Path, as_json: bool
) -> None:
    from dataclasses import asdict

    from launch.data_doctor import DataQuestions, examine_data, table

    questions = DataQuestions(num_threads=num_threads, images_per_s=images_per_s)
    report = examine_data(spec, questions, fallback_dir=index_dir.absolute())
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        table(report)


@shards_app.command("build")
def shards_build(
    source: Annotated[str, typer.Argument(help="A folder of images, a list of files, or existing tar shards.")],
    destination: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    samples_per_shard: Annotated[int, typer.Option(help="Images a shard (equal counts, rounded).", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Of the global shuffle.", min=0)] = 0,
    resize_short_px: Annotated[
        int | None, typer.Option(help="Shrink to this short side; default: keep bytes.", min=1)
    ] = None,
    jpeg_quality: Annotated[int, typer.Option(help="Of resized JPEGs.", min=1, max=100)] = 95,
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = os.cpu_count() or 1,
    max_bad_fraction: Annotated[float, typer.Option(help="Fail above this share of unreadable images.")] = 0.01,
    as_json: AsJson = False,
) -> None:
    """Build shuffled, indexed shards; started again after a kill it goes on where it was."""
    from dino_dist.data.prepare.build import BuildOptions, build_shards

    options = BuildOptions(
        samples_per_shard=samples_per_shard, seed=seed, resize_short_px=resize_short_px, jpeg_quality=jpeg_quality
    )
    report = build_shards(source, destination, options, num_workers=workers, max_bad_fraction=max_bad_fraction)
    result = {
        "shards": len(report.dataset.shards),
        "samples": report.dataset.num_samples,
        "rejected": report.num_rejected,
        "written_now": report.num_written,
        "hash": report.dataset.hash,
    }
    print_result(result, as_json)


@shards_app.command("index")
def shards_index(
    shards: Annotated[str, typer.Argument(help="A folder, a brace or glob pattern, or a manifest.")],
    index_dir: IndexDir = _INDEX_DIR,
    as_json: AsJson = False,
) -> None:
    """Index shards made by others (img2dataset, public webdatasets), beside them or where `indexes` says."""
    from dino_dist.config import Config
    from dino_dist.inputs import labelled_set

    dataset = labelled_set(shards, Config().data, index_dir.absolute())
    result = {
        "shards": len(dataset.shards),
        "samples": dataset.num_samples,
        "hash": dataset.hash,
        "indexes": str(dataset.shards[0].index_path.parent),
    }
    print_result(result, as_json)


@shards_app.command("check")
def shards_check(
    shards: Annotated[str, typer.Argument(help="A folder, a brace or glob pattern, or a manifest.")],
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = os.cpu_count() or 1,
    index_dir: IndexDir = _INDEX_DIR,
    as_json: AsJson = False,
) -> None:
    """Decode every image and report; exit code 2 if any is bad."""
    from dataclasses import asdict

    from dino_dist.config import Config
    from dino_dist.data.prepare.check import check_shards
    from dino_dist.inputs import decode_rules, store_options

    data = Config().data
    report = check_shards(
        shards,
        rules=decode_rules(data),
        fallback_dir=index_dir.absolute(),
        num_workers=workers,
        store=store_options(data),
    )
    print_result(asdict(report) | {"ok": report.ok}, as_json)
    if not report.ok:
        raise UserError(
            f"{len(report.bad)} bad images, {len(report.unreadable)} unreadable shards and "
            f"{len(report.wrong_indexes)} wrong indexes in {shards}"
        )


def main() -> None:
    """Entry point: 0 done, 1 crash or may pass, 2 bad input, 3 stopped by a signal, all saved, 4 no restart helps."""
    sys.exit(_exit_code(app))


def _exit_code(command: Callable[[], Any]) -> int:
    try:
        command()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except UserError as error:
        if not isinstance(error, SaidByRankZero):
            say(f"error: {error}")
        return FAILED if error.may_pass else BAD_INPUT
    except (RunFailed, Superseded) as error:
        if not isinstance(error, FailedTogether) or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            say(f"failed: {error}")
        return NO_RESTART_HELPS if isinstance(error, NoRestartHelps) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return DONE


if __name__ == "__main__":
    main()
