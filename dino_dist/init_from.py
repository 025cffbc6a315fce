"""Weights of an earlier training as a run's start (`model.init_from`): read by rank 0, the same on any ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from dino_dist.config import Config
from dino_dist.dist import World
from dino_dist.errors import UserError
from dino_dist.manifest import committed
from dino_dist.run_folder import RunFolder
from dino_dist.step import DinoStep
from dino_dist.weights.fit import Fit, fit
from dino_dist.weights.network_weights import NetworkWeights
from dino_dist.weights.opened import ROLES
from dino_dist.weights.read_network import open_weights
from dino_dist.weights.weights_file import ReadOptions

_KEY = "model.init_from"
_CENTER = "center"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Start:
    tensors: dict[str, Tensor]
    """By the names of `DinoStep.tensors`, and of their shapes."""
    lines: list[str]


def check_source(config: Config, folder: RunFolder) -> None:
    """Before the data are read: `UserError` if a run that begins now has nothing to start from.

    The folder need not exist yet.
    """
    source = config.model.init_from
    if source is None or (folder.checkpoints.is_dir() and committed(folder.checkpoints)):
        return
    try:
        Path(source).stat()
    except (OSError, ValueError) as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(
            f"{_KEY}={source} {why}: give a run folder, one of its checkpoints, or a file of weights"
        ) from None


def start_from(config: Config, step: DinoStep, world: World) -> list[str]:
    """Fill student, teacher and center from `model.init_from`; returns the report, a line each. A collective.

    Student from student and teacher from teacher; a file of one network fills both. The head and, with it, the center
    are taken over where they have the same shapes. Only rank 0 needs the file.
    """
    targets = {name: tensor for name, tensor in step.tensors().items() if name.split(".")[0] in (*ROLES, _CENTER)}
    found: dict[str, Tensor] = {}

    def read() -> tuple[list[str], list[str]]:
        start = _read_start(config, step, {name: tensor.shape for name, tensor in targets.items()})
        found.update(start.tensors)
        return list(found), start.lines

    names, lines = world.first(read)
    for name in names:
        _fill(targets[name], found.pop(name, None), world)
    return lines


@torch.no_grad()
def _fill(target: Tensor, full: Tensor | None, world: World) -> None:
    """Rank 0's `full` into every rank's part of the target."""
    if full is None:
        sent = torch.empty(target.shape, dtype=target.dtype, device=world.device)
    else:
        sent = full.to(world.device, target.dtype).contiguous()
    if world.size > 1:
        dist.broadcast(sent, src=0)
    if isinstance(target, DTensor):
        # Each rank cuts its part out of the whole that it has already.
        sent = distribute_tensor(sent, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(sent)


def _read_start(config: Config, step: DinoStep, shapes: dict[str, torch.Size]) -> _Start:
    model, shape = config.model, step.networks.student.backbone.shape
    # A width that tells the number of heads must agree with this run; for others the run's is as good as any.
    options = ReadOptions(assumed_heads=shape.num_heads, strict=model.init_from_strict)
    opened = open_weights(str(model.init_from), options)
    read = {name: opened.read(name) for name in opened.networks}
    lines = [f"{_KEY}={opened.source}: {', '.join(read)}"]
    tensors: dict[str, Tensor] = {}
    fits: list[Fit] = []
    for role in ROLES:
        weights = read.get(role) or next(iter(read.values()))
        wanted = {name.removeprefix(f"{role}."): size for name, size in shapes.items() if name.startswith(f"{role}.")}
        matched = fit(weights, wanted, shape, key=_KEY, strict=model.init_from_strict)
        if weights.shape.num_heads != shape.num_heads:
            lines.append(f"{role}: {weights.shape.num_heads} attention heads there, {shape.num_heads} here")
        tensors |= {f"{role}.{name}": tensor for name, tensor in matched.tensors.items()}
        lines.append(f"{role} <- {weights.network}: {matched.describe()}")
        fits.append(matched)
    any_weights = next(iter(read.values()))
    lines += _about_pixels(any_weights, config) + list(any_weights.notes)
    center_1K = any_weights.center_1K
    takes_center = center_1K is not None and center_1K.shape == shapes[_CENTER] and all(each.has_head for each in fits)
    if center_1K is not None and takes_center:
        tensors[_CENTER] = center_1K
    lines.append(f"center: {'taken over' if takes_center else 'starts at 0'}")
    return _Start(tensors=tensors, lines=lines)


def _about_pixels(weights: NetworkWeights, config: Config) -> list[str]:
    if (weights.pixel_mean, weights.pixel_std) == (config.data.mean, config.data.std):
        return []
    return [
        f"its images were normalised with mean {list(weights.pixel_mean)} and std {list(weights.pixel_std)}, which "
        "data.mean and data.std are not"
    ]
