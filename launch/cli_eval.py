"""`dino-dist eval ...`: judging a checkpoint by its features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.results import AsJson, Overrides, print_result

eval_app = typer.Typer(no_args_is_help=True, help="Judge a checkpoint by its features.")


@eval_app.command("knn")
def eval_knn(
    run: Annotated[Path, typer.Argument(help="A run folder; its newest checkpoint that verifies is taken.")],
    overrides: Overrides = None,
    network: Annotated[str, typer.Option(help="teacher or student.")] = "teacher",
    as_json: AsJson = False,
) -> None:
    """Weighted k-NN on data.eval_train and data.eval_test (protocol of the published eval_knn)."""
    from dino_dist.judge import knn_of_run

    print_result(knn_of_run(run, overrides or [], role=network), as_json)
