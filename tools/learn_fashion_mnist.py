"""A learning proof on Fashion-MNIST (arXiv:1708.07747): what the teacher's features are worth after so many images.

    python tools/learn_fashion_mnist.py --dir DIR --minutes 60 [--nproc 2] [key=value ...]
    python tools/learn_fashion_mnist.py --dir DIR --images 100000 --seeds 3 --against-plain

Trains the recipe `fashion_mnist` by the command line, as a user would, and judges the teacher by k-NN: 60,000 images
vote on 10,000, without labels in training. Beside it stand the random network and the raw pixels, and, if asked for,
plain DINO (`plain_dino.py`) from the same weights on the same images in the same order. Writes DIR/result.json (commit,
machine, command, hours, every figure) and DIR/curve.png. The same command goes on after a kill, and DIR takes trainings
of one commit only. Exit 1 if the system is worse than plain DINO: the 95 % interval of the mean difference over seeds
(Student's) lies below 0.
"""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_data import machine
from fashion_mnist_shards import write_shards
from learning_curve import Curve, draw_curves
from plain_dino import check_plain, train_plain
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t
from torch import Tensor

from dino_dist.build import build_network
from dino_dist.config import Config
from dino_dist.config_file import load_config, to_yaml
from dino_dist.dist import World
from dino_dist.durations import Duration
from dino_dist.errors import UserError
from dino_dist.judging.evaluator import Evaluator, cls_forward
from dino_dist.ledger import read_rows
from dino_dist.run_folder import RunFolder
from launch.local import run_ranks

CONFIDENCE = 0.95
OWN_KEYS = ("run.seed", "run.dir", "train.length", "eval.knn_every", "data.train", "data.eval_train", "data.eval_test")
"""What the options of this tool say."""
TRIAL_STEPS = 150
"""Of the training that `--minutes` is timed by."""
LEAST_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What is run, and where."""

    recipe: str
    overrides: tuple[str, ...]
    folder: Path
    shards: Path
    nproc: int
    evaluations: int

    def settings(self, images: int, seed: int, run: str) -> list[str]:
        """The overrides of one training."""
        return [
            *(f"data.train={self.shards / 'train'}", f"data.eval_train={self.shards / 'train'}"),
            *(f"data.eval_test={self.shards / 'test'}", f"run.dir={self.folder / run}", f"run.seed={seed}"),
            *(f"train.length={images}im", f"eval.knn_every={-(-images // self.evaluations)}im", *self.overrides),
        ]

    def config(self, images: int, seed: int, run: str) -> Config:
        """The whole of it."""
        return load_config(self.recipe, self.settings(images, seed, run))


def find_shards(folder: Path) -> Path:
    """The shards in `folder`, written now where there are none; complete once they have their name."""
    if not (folder / "train").is_dir():
        if folder.exists():
            raise UserError(f"{folder} holds no train/: give shards of fashion_mnist_shards.py, or a new name")
        unfinished = folder.with_name(folder.name + ".unfinished")
        write_shards(unfinished)
        unfinished.rename(folder)
    return folder


def grey_pixels(images: Tensor) -> Tensor:
    """The images themselves, once: their three channels are equal, and cosines of one are those of three."""
    return images[:, 0].flatten(1)


def baselines(config: Config, index_dir: Path, console: Console) -> dict[str, float]:
    """k-NN before any training: of the network at its start, and of the pixels."""
    evaluator, k = Evaluator(config, World(), index_dir), max(config.eval.knn_k)
    network = build_network(config, "sdpa", is_teacher=True, world_size=1)
    before = {}
    for name, forward in (("knn_random_init", cls_forward(network)), ("knn_raw_pixels", grey_pixels)):
        before[name] = evaluator.knn(forward)[0][k].top1
        console.print(f"{name} {before[name]:.4f}")
    return before


def train_system(proof: Proof, images: int, seed: int, run: str) -> Curve:
    """Train by the command line, or go on with what an earlier start has left; what its run folder says of it."""
    settings = proof.settings(images, seed, run)
    code = run_ranks([sys.executable, "-m", "launch.cli", "train", proof.recipe, *settings], proof.nproc)
    if code:
        raise SystemExit(code)
    folder = RunFolder(proof.folder / run)
    rows = read_rows(folder.metrics)
    batch = proof.config(images, seed, run).train.batch_size
    return Curve(
        name="system",
        seed=seed,
        knn_top1={row["step"] * batch: row["knn_top1"] for row in rows if row.get("knn_top1") is not None},
        images_per_s=statistics.median([row["images_per_s"] for row in rows if "images_per_s" in row]),
        seconds=seconds_of_all_starts(read_rows(folder.ledger)),
    )


def seconds_of_all_starts(ledger: list[dict[str, Any]]) -> float:
    """From the first to the last word of each start, added up; what a kill took after the last word is not in it."""
    times: dict[int, list[datetime]] = {}
    for row in ledger:
        times.setdefault(row["attempt"], []).append(datetime.fromisoformat(row["time"]))
    return sum((max(said) - min(said)).total_seconds() for said in times.values())


def train_plainly(proof: Proof, images: int, seed: int, console: Console) -> Curve:
    """Plain DINO from the same weights on the same images, or what an earlier start has kept of the same training."""
    config = proof.config(images, seed, f"plain-{seed}")
    kept = proof.folder / f"plain-{seed}.json"
    if kept.is_file() and (found := json.loads(kept.read_text(encoding="utf-8")))["config"] == to_yaml(config):
        curve = found["curve"]
        return Curve(**curve | {"knn_top1": {int(images): top1 for images, top1 in curve["knn_top1"].items()}})
    started_s = time.monotonic()
    every = -(-images // proof.evaluations)
    result = train_plain(config, proof.folder / "index", every=every, say=console.print)
    curve = Curve(
        name="plain",
        seed=seed,
        knn_top1=result.knn_top1,
        images_per_s=result.images_per_s,
        seconds=time.monotonic() - started_s,
    )
    kept.write_text(json.dumps({"config": to_yaml(config), "curve": asdict(curve)}) + "\n", encoding="utf-8")
    return curve


def images_for(proof: Proof, minutes: float, first_seed: int, console: Console) -> int:
    """How many images `minutes` are enough for, judgements included, from a short training; `UserError` if too few.

    A run that was begun keeps the length it began with.
    """
    begun = RunFolder(proof.folder / f"system-{first_seed}").config
    if begun.is_file():
        length = Duration.parse(load_config(str(begun)).train.length)
        console.print(f"going on with the run that was begun: {length.amount:.0f} images")
        return int(length.amount)
    batch = proof.config(1, 0, "trial").train.batch_size
    trial_images = TRIAL_STEPS * batch
    shutil.rmtree(proof.folder / "trial", ignore_errors=True)  # one that is over already would take no time
    started_s = time.monotonic()
    trial = train_system(replace(proof, evaluations=1), trial_images, 0, "trial")
    # What is not training is a start and a judgement: as much again for each judgement leaves some time over.
    overhead_s = time.monotonic() - started_s - trial_images / trial.images_per_s
    left_s = minutes * 60 - proof.evaluations * overhead_s
    images = int(left_s * trial.images_per_s)
    if images < LEAST_STEPS * batch:
        raise UserError(
            f"--minutes {minutes:g} is too short: {proof.evaluations} judgements of {overhead_s:.0f} s leave no time "
            "to train; give more minutes or fewer --evaluations"
        )
    console.print(f"trial: {trial.images_per_s:.0f} images/s, {overhead_s:.0f} s a judgement: {images} images")
    return images


def compare(curves: list[Curve]) -> dict[str, Any] | None:
    """The system's last k-NN minus plain DINO's, in points, seed by seed; None without plain runs or with one seed."""
    last = {(curve.name, curve.seed): 100 * curve.last for curve in curves}
    seeds = sorted({curve.seed for curve in curves if curve.name == "plain"})
    if len(seeds) < 2:
        return None
    differences = [last["system", seed] - last["plain", seed] for seed in seeds]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(seeds) ** 0.5
    reach = float(student_t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1)) * error
    return {
        "system_minus_plain_points": differences,
        "mean": mean,
        "standard_error": error,
        "interval_95": [mean - reach, mean + reach],
        "verdict": "worse" if mean + reach < 0 else "better" if mean - reach > 0 else "no difference shown",
    }


def provenance() -> dict[str, Any]:
    """The commit this file is of, whether tracked files differ from it, the machine, and the command."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    return {
        "commit": git("rev-parse", "HEAD"),
        "modified": git("status", "--porcelain", "--untracked-files=no") != "",
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
    }


def refuse_other_commits(note: Path, commit: str) -> None:
    """`UserError` if `note`, of a folder's first start, names another commit; trainings would be told of as its own."""
    begun = note.read_text(encoding="utf-8").strip() if note.is_file() else None
    if begun not in (None, commit):
        raise UserError(f"{note.parent} holds trainings of commit {begun}, this is {commit}: give another --dir")
    note.write_text(f"{commit}\n", encoding="utf-8")


def report(document: dict[str, Any], curves: list[Curve], console: Console) -> None:
    """A table for people."""
    table = Table("features", "images", "images/s", f"k-NN, k={document['k']}", title="Fashion-MNIST")
    table.add_row("random network", "0", "", f"{document['knn_random_init']:.4f}")
    table.add_row("raw pixels", "", "", f"{document['knn_raw_pixels']:.4f}")
    for curve in curves:
        images = max(curve.knn_top1)
        table.add_row(f"{curve.name}, seed {curve.seed}", f"{images}", f"{curve.images_per_s:.0f}", f"{curve.last:.4f}")
    console.print(table)
    comparison = document["comparison"]
    if comparison is not None:
        low, high = comparison["interval_95"]
        console.print(
            f"system minus plain: {comparison['mean']:+.2f} points ({low:+.2f} to {high:+.2f}, 95 %, over seeds): "
            f"{comparison['verdict']}"
        )


def prove(
    proof: Proof, console: Console, *, images: int | None, minutes: float | None, seeds: range, against_plain: bool
) -> tuple[dict[str, Any], list[Curve]]:
    """Run all trainings; the result document, and its curves."""
    origin = provenance()  # now: the tree may change while the trainings run
    refuse_other_commits(proof.folder / "commit", str(origin["commit"]))
    if against_plain:
        check_plain(proof.config(1, 0, "plain-0"))
    config = proof.config(1, 0, "system-0")
    before = baselines(config, proof.folder / "index", console)
    if images is None:
        assert minutes is not None
        images = images_for(proof, minutes, seeds[0], console)
    curves: list[Curve] = []
    for seed in seeds:
        curves.append(train_system(proof, images, seed, f"system-{seed}"))
        if against_plain:
            curves.append(train_plainly(proof, images, seed, console))
    document = {
        **origin,
        **before,
        "k": max(config.eval.knn_k),
        "recipe": proof.recipe,
        "ranks": proof.nproc,
        "hours": sum(curve.seconds for curve in curves) / 3600,
        "runs": [asdict(curve) for curve in curves],
        "comparison": compare(curves),
    }
    return document, curves


def main(
    directory: Annotated[Path, typer.Option("--dir", help="Where shards, runs, result and picture go.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    minutes: Annotated[float | None, typer.Option(help="Train for about so long, judgements included.")] = None,
    images: Annotated[int | None, typer.Option(help="Or: train on so many images.", min=1)] = None,
    seeds: Annotated[int, typer.Option(help="Trainings, of so many seeds.", min=1)] = 1,
    first_seed: Annotated[int, typer.Option(help="The first of them.", min=0)] = 0,
    against_plain: Annotated[bool, typer.Option("--against-plain", help="Train plain DINO beside each.")] = False,
    nproc: Annotated[int, typer.Option(help="Ranks of the system; plain DINO is one process.", min=1)] = 2,
    evaluations: Annotated[int, typer.Option(help="Judgements of each training.", min=1)] = 6,
    shards: Annotated[Path | None, typer.Option(help="Of fashion_mnist_shards.py; default: DIR/shards.")] = None,
    recipe: Annotated[str, typer.Option(help="A YAML file, or the name of a recipe.")] = "fashion_mnist",
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Train on Fashion-MNIST and print the teacher's k-NN over images seen."""
    torch.set_num_threads(1)
    console = Console(stderr=True)
    try:
        if (minutes is None) == (images is None):
            raise UserError("give either --minutes or --images")
        own = [word for word in overrides or () if word.split("=")[0].strip() in OWN_KEYS]
        if own:
            raise UserError(f"{own[0]}: this tool sets it by its options")
        if find_spec("matplotlib") is None:
            raise UserError("the picture needs matplotlib: pip install 'dino-dist[plots]'")
        folder = directory.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        proof = Proof(
            recipe=recipe,
            overrides=tuple(overrides or ()),
            folder=folder,
            shards=find_shards((shards or folder / "shards").absolute()),
            nproc=nproc,
            evaluations=evaluations,
        )
        document, curves = prove(
            proof,
            console,
            images=images,
            minutes=minutes,
            seeds=range(first_seed, first_seed + seeds),
            against_plain=against_plain,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    (folder / "result.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draw_curves(
        curves,
        folder / "curve.png",
        start=document["knn_random_init"],
        levels={"raw pixels": document["knn_raw_pixels"]},
    )
    if as_json:
        print(json.dumps(document))
    else:
        report(document, curves, Console())
    comparison = document["comparison"]
    raise typer.Exit(1 if comparison is not None and comparison["verdict"] == "worse" else 0)


if __name__ == "__main__":
    typer.run(main)
