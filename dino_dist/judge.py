"""Judging the checkpoint of a run folder, on one process, without touching the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dino_dist.config import Config
from dino_dist.config_file import load_config
from dino_dist.dist import World
from dino_dist.errors import UserError
from dino_dist.evaluate import Evaluator, cls_forward
from dino_dist.run_folder import RunFolder
from dino_dist.weights.network_weights import build_backbone
from dino_dist.weights.read_network import read_network


def run_config(run: Path, overrides: Sequence[str]) -> Config:
    """The config of a run folder, with overrides for the evaluation; `UserError` if it is not a run folder."""
    file = RunFolder(run).config
    if not file.is_file():
        raise UserError(f"{run} is not a run folder (it has no {file.name}): give the run.dir of a training run")
    return load_config(str(file), overrides)


def knn_of_run(run: Path, overrides: Sequence[str], *, role: str) -> dict[str, Any]:
    """k-NN accuracies of the newest checkpoint on the run's labelled shards, or on those that `overrides` name."""
    config = run_config(run, overrides)
    if config.data.eval_train is None:
        raise UserError("k-NN needs labelled shards: give data.eval_train=PATH data.eval_test=PATH")
    use_cuda = torch.cuda.is_available() and config.train.device != "cpu"
    world = World(device=torch.device("cuda" if use_cuda else "cpu"))
    weights = read_network(run, network=role)
    backbone = build_backbone(weights, world.device, config.model.attention)
    accuracies, _ = Evaluator(config, world, run / "index").knn(cls_forward(backbone))
    result: dict[str, Any] = {"run": str(run), "step": weights.step, "network": role}
    for k, accuracy in accuracies.items():
        result |= {f"knn_top1_k{k}": accuracy.top1, f"knn_top5_k{k}": accuracy.top5}
    return result
