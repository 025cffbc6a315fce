"""One network out of a run's sharded checkpoint, whatever number of ranks wrote it; nothing else of it is read."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dino_dist.checkpoint_tensors import load_tensors, one_line
from dino_dist.errors import UserError
from dino_dist.manifest import MANIFEST, BadCheckpoint, TensorSpec, VerifiedCheckpoint, newest_verified, verify
from dino_dist.models.vit import VIT_SIZES
from dino_dist.run_folder import RunFolder
from dino_dist.weights.network_weights import NetworkWeights
from dino_dist.weights.opened import ROLES
from dino_dist.weights.shapes import shape_of

_BACKBONE, _HEAD, _CENTER = "backbone.", "head.", "center"


def is_run_folder(path: Path) -> bool:
    """Whether a folder is that of a training run."""
    return os.path.isfile(RunFolder(path).config)  # says no, as a Path does not, where a name is too long


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a folder is one checkpoint of a run."""
    return os.path.isfile(path / MANIFEST)


def run_of(source: Path) -> Path | None:
    """The run folder that `source` is, or is a checkpoint of; None if there is none."""
    if is_run_folder(source):
        return source
    run = source.absolute().parent.parent
    is_place = source.absolute().parent == RunFolder(run).checkpoints
    return run if is_place and is_checkpoint_folder(source) and is_run_folder(run) else None


def newest_checkpoint(run: Path) -> VerifiedCheckpoint:
    """The newest checkpoint of a run folder that verifies; `UserError` if there is none."""
    folder = RunFolder(run).checkpoints
    choice, bad = newest_verified(folder) if folder.is_dir() else (None, {})
    if choice is None:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in bad.items())
        raise UserError(f"{run} has no checkpoint that verifies{f' ({reasons})' if reasons else ''}: train first")
    return choice


def one_checkpoint(folder: Path) -> VerifiedCheckpoint:
    """That checkpoint and no other; `UserError` if it does not verify."""
    try:
        return verify(folder)
    except BadCheckpoint as error:
        raise UserError(f"{folder} is no sound checkpoint ({error}): take another one of its run") from None


def read_run_network(checkpoint: VerifiedCheckpoint, network: str) -> NetworkWeights:
    """The `teacher` or `student` with its head and the center; `UserError` for another role."""
    if network not in ROLES:
        raise UserError(f"--network {network}: choose teacher or student")
    specs = checkpoint.manifest.tensors
    prefix = f"{network}."
    tensors = {name: _empty(spec) for name, spec in specs.items() if name.startswith(prefix) or name == _CENTER}
    try:
        load_tensors(checkpoint, tensors, subset=True)
    except CheckpointException as error:  # such as a run that goes on and has deleted it meanwhile
        raise UserError(f"{checkpoint.path} cannot be read ({one_line(error)}): take another one of its run") from None
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    backbone = _below(own, _BACKBONE)
    state = checkpoint.state
    data, model = state["config"]["data"], state["config"]["model"]
    return NetworkWeights(
        source=str(checkpoint.path),
        network=network,
        step=checkpoint.step,
        epoch=state["samples_consumed"] // state["dataset_samples"],
        pixel_mean=tuple(data["mean"]),
        pixel_std=tuple(data["std"]),
        # What the tensors do not tell stands in the config that the checkpoint carries.
        shape=shape_of(
            backbone, num_heads=model["num_heads"] or VIT_SIZES[model["arch"]].num_heads, source=str(checkpoint.path)
        ),
        backbone=backbone,
        head=_below(own, _HEAD),
        center_1K=tensors.get(_CENTER),
    )


def _empty(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype.removeprefix("torch.")))


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
