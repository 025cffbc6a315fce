"""`dino-dist eval ...`: judging a checkpoint by its features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.judging import Checkpoint, Network, NumRanks, judging, start_ranks
from launch.results import AsJson, Overrides, print_result

if TYPE_CHECKING:
    from dino_dist.judging.judge import Judge

eval_app = typer.Typer(no_args_is_help=True, help="Judge a checkpoint by its features.")


@eval_app.command("knn")
def eval_knn(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    network: Network = "teacher",
    nproc: NumRanks = 1,
    as_json: AsJson = False,
) -> None:
    """Weighted k-NN on data.eval_train and data.eval_test (protocol of the published eval_knn).

    Several numbers of neighbours (eval.knn_k) and temperatures (eval.knn_temperatures) at once.
    """

    def judge(judge: Judge) -> dict[str, Any]:
        from dino_dist.judging.judge import judge_knn

        return judge_knn(judge)

    _judge("knn", judge, checkpoint, overrides, network, nproc, as_json)


@eval_app.command("linear")
def eval_linear(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the sweep's state, from which the same command on the same checkpoint goes on after a "
            "kill; default: eval/ in the run folder, none for other weights."
        ),
    ] = None,
    network: Network = "teacher",
    nproc: NumRanks = 1,
    as_json: AsJson = False,
) -> None:
    """Linear classifiers on frozen features: a sweep over learning rates, last blocks and average pooling at once.

    Features are those of center crops, computed once; eval.linear_augment=true: of random crops, as published.
    """

    def judge(judge: Judge) -> dict[str, Any]:
        from dino_dist.judging.linear_probe import judge_linear
        from dino_dist.weights.run_checkpoint import run_of

        run = run_of(checkpoint)
        return judge_linear(judge, out or (None if run is None else run / "eval"))

    more = [] if out is None else ["--out", str(out)]
    _judge("linear", judge, checkpoint, overrides, network, nproc, as_json, more)


@eval_app.command("logreg")
def eval_logreg(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    network: Network = "teacher",
    nproc: NumRanks = 1,
    as_json: AsJson = False,
) -> None:
    """Logistic regression (scikit-learn) on frozen features; its strength is chosen on a tenth of data.eval_train."""

    def judge(judge: Judge) -> dict[str, Any]:
        from dino_dist.judging.judge import judge_logreg

        return judge_logreg(judge)

    _judge("logreg", judge, checkpoint, overrides, network, nproc, as_json)


def _judge(
    command: str,
    judge: Callable[[Judge], dict[str, Any]],
    checkpoint: Path,
    overrides: list[str] | None,
    network: str,
    nproc: int,
    as_json: bool,
    more: list[str] | None = None,
) -> None:
    """Be one of the ranks, after starting them if that is asked for; rank 0 prints what all have found."""
    settings = [*(overrides or []), "--network", network, *(more or []), *["--json"] * as_json]
    start_ranks(["eval", command, str(checkpoint), *settings], nproc)
    from dino_dist.judging.judge import labelled_judge

    with judging(checkpoint, overrides, network) as (judged, tell):
        result = judged.described() | judge(labelled_judge(judged, tell))
    if judged.world.is_first:
        _print(result, as_json)


def _print(result: dict[str, Any], as_json: bool) -> None:
    """For people: what was judged, and a row a setting."""
    if as_json:
        print_result(result, as_json)
        return
    from rich.console import Console
    from rich.table import Table

    rows: list[dict[str, Any]] = result.pop("results")
    del result["notes"]
    shown = {key: f"{value:g}" if key in ("linear_lr", "logreg_C") else value for key, value in result.items()}
    print_result({key: value for key, value in shown.items() if value not in ([], None)}, as_json)
    table = Table(*(rows[0] if rows else ()))
    for row in rows:
        table.add_row(
            *(
                f"{value:.4f}" if "top" in key else f"{value:g}" if isinstance(value, float) else str(value)
                for key, value in row.items()
            )
        )
    if rows:
        Console().print(table)
