"""`dino-dist quickstart`: the main job, small, on data that every installation has."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from dino_dist.build import build_network
from dino_dist.config import Config
from dino_dist.config_file import load_config
from dino_dist.data.prepare.build import BuildOptions, build_shards
from dino_dist.dist import World
from dino_dist.errors import RunFailed, UserError
from dino_dist.judging.evaluator import Evaluator, Forward, cls_forward, raw_pixels
from dino_dist.ledger import read_rows
from dino_dist.run_folder import RunFolder
from launch.local import run_ranks

_NUM_TEST = 360
"""The last digits are for the test, as in scikit-learn's own examples; the rest trains."""


def run_quickstart(directory: Path, *, nproc: int) -> dict[str, Any]:
    """Build the shards, train, evaluate; the summary, also in `directory/summary.json`."""
    started_s = time.monotonic()
    console = Console(stderr=True, markup=False)
    directory = directory.absolute()
    train_shards, eval_shards = build_digit_shards(directory / "shards")
    overrides = [
        f"run.dir={directory / 'run'}",
        f"data.train={train_shards}",
        f"data.eval_train={train_shards}",
        f"data.eval_test={eval_shards}",
    ]
    config = load_config("quickstart", overrides)
    before = baselines(config, directory / "run" / "index")
    console.print(
        f"k-NN of a random network {before['knn_random_init']:.3f}, of the raw pixels {before['knn_raw_pixels']:.3f}; "
        f"training {config.train.length} on {nproc} ranks"
    )
    code = run_ranks([sys.executable, "-m", "launch.cli", "train", "quickstart", *overrides], nproc)
    if code:
        if code in (2, 3):
            raise SystemExit(code)
        raise RunFailed(f"training ended with exit code {code}; its reason is above and in {directory / 'run'}")
    rows = read_rows(RunFolder(directory / "run").metrics)
    trained = [row["knn_top1"] for row in rows if row.get("knn_top1") is not None]
    summary = {
        **before,
        "knn_trained": trained[-1],
        "seconds": time.monotonic() - started_s,
        "steps": rows[-1]["step"],
        "ranks": nproc,
        "run": str(directory / "run"),
    }
    (directory / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    console.print(f"look at it: tensorboard --logdir {directory / 'run' / 'tensorboard'}")
    return summary


def build_digit_shards(folder: Path) -> tuple[Path, Path]:
    """scikit-learn's digits as PNG in tar shards: 1,437 to train, the last 360 to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    parts = {"train": range(len(levels) - _NUM_TEST), "eval": range(len(levels) - _NUM_TEST, len(levels))}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--dir {folder.parent}: cannot write there ({error.strerror}): choose another folder"
        ) from None
    for name, indices in parts.items():
        with tempfile.TemporaryDirectory() as images:
            for index in indices:
                path = Path(images) / str(digits.target[index]) / f"digit{index:04d}.png"
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(levels[index]).save(path)
                os.utime(path, (0, 0))  # the same input whenever it is made: a second start finds its shards
            build_shards(images, folder / name, BuildOptions(samples_per_shard=180))
    return folder / "train", folder / "eval"


def baselines(config: Config, index_dir: Path) -> dict[str, float]:
    """k-NN before training: the network at its start, and the pixels themselves."""
    world = World()
    evaluator = Evaluator(config, world, index_dir)
    k = max(config.eval.knn_k)

    def top1(forward: Forward) -> float:
        return evaluator.knn(forward)[0][k].top1

    network = build_network(config, "sdpa", is_teacher=True, world_size=1)
    return {"knn_random_init": top1(cls_forward(network)), "knn_raw_pixels": top1(raw_pixels)}
