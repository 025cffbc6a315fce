"""Judging the checkpoint of a run folder, on one process, without touching the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dino_dist.build import attention_backend, build_network
from dino_dist.checkpoint_tensors import load_tensors
from dino_dist.config import Config
from dino_dist.config_file import load_config
from dino_dist.dist import World
from dino_dist.errors import UserError
from dino_dist.evaluate import Evaluator, cls_forward
from dino_dist.manifest import VerifiedCheckpoint, newest_verified
from dino_dist.models.dino import DinoNetwork
from dino_dist.run_folder import RunFolder


def run_config(run: Path, overrides: Sequence[str]) -> Config:
    """The config of a run folder, with overrides for the evaluation; `UserError` if it is not a run folder."""
    file = RunFolder(run).config
    if not file.is_file():
        raise UserError(f"{run} is not a run folder (it has no {file.name}): give the run.dir of a training run")
    return load_config(str(file), overrides)


def newest_checkpoint(run: Path) -> VerifiedCheckpoint:
    """The newest checkpoint of a run folder that verifies; `UserError` if there is none."""
    folder = RunFolder(run).checkpoints
    choice, bad = newest_verified(folder) if folder.is_dir() else (None, {})
    if choice is None:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in bad.items())
        raise UserError(f"{run} has no checkpoint that verifies{f' ({reasons})' if reasons else ''}: train first")
    return choice


def load_network(config: Config, checkpoint: VerifiedCheckpoint, role: str, device: torch.device) -> DinoNetwork:
    """The `teacher` or `student` of a checkpoint, whatever number of ranks wrote it."""
    # Evaluation computes in the weights' own type, whatever training computed in.
    weights = replace(config.train, precision="fp64" if config.train.precision == "fp64" else "fp32", compile=False)
    attention = attention_backend(replace(config, train=weights), device).name
    network = build_network(config, attention, is_teacher=role == "teacher", world_size=1)
    if config.train.precision == "fp64":
        network.double()
    load_tensors(checkpoint, {f"{role}.{name}": tensor for name, tensor in network.state_dict().items()}, subset=True)
    return network.to(device).requires_grad_(False)


def knn_of_run(run: Path, overrides: Sequence[str], *, role: str) -> dict[str, Any]:
    """k-NN accuracies of the newest checkpoint on the run's labelled shards, or on those that `overrides` name."""
    if role not in ("teacher", "student"):
        raise UserError(f"--network {role}: choose teacher or student")
    config = run_config(run, overrides)
    if config.data.eval_train is None:
        raise UserError("k-NN needs labelled shards: give data.eval_train=PATH data.eval_test=PATH")
    checkpoint = newest_checkpoint(run)
    use_cuda = torch.cuda.is_available() and config.train.device != "cpu"
    world = World(device=torch.device("cuda" if use_cuda else "cpu"))
    network = load_network(config, checkpoint, role, world.device)
    accuracies, _ = Evaluator(config, world, run / "index").knn(cls_forward(network))
    result: dict[str, Any] = {"run": str(run), "step": checkpoint.step, "network": role}
    for k, accuracy in accuracies.items():
        result |= {f"knn_top1_k{k}": accuracy.top1, f"knn_top5_k{k}": accuracy.top5}
    return result
