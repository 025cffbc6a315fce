"""What every judgement of a network starts from: settings, the ranks that share the work, the network on each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from dino_dist.config import Config
from dino_dist.config_file import load_config
from dino_dist.dist import ProcessEnvironment, World, joined_world
from dino_dist.errors import SaidByRankZero, UserError, for_rank
from dino_dist.models.vit import VisionTransformer
from dino_dist.run_folder import RunFolder
from dino_dist.weights.network_weights import NetworkWeights, build_backbone
from dino_dist.weights.read_network import read_network
from dino_dist.weights.run_checkpoint import run_of

T = TypeVar("T")

_LONGEST_WAIT_S = 86400.0
"""Of a rank for another: one may have a long video while the others have nothing to do."""
_UNUSED = ("data.train=unused", "model.patch_size=1")
"""Settings that a config insists on and that only training reads."""


@dataclass(frozen=True, kw_only=True, eq=False)
class JudgedNetwork:
    """A network on this rank's device, and how it is to be judged."""

    backbone: VisionTransformer
    weights: NetworkWeights
    config: Config
    world: World
    index_dir: Path
    """Where indexes of shards go that cannot stand beside them."""

    def described(self) -> dict[str, Any]:
        """What was judged, for a result."""
        weights = self.weights
        return {
            "source": weights.source,
            "network": weights.network,
            "step": weights.step,
            "notes": list(weights.notes),
        }


@contextmanager
def judged_network(
    source: Path, overrides: Sequence[str], *, role: str, environment: ProcessEnvironment
) -> Iterator[JudgedNetwork]:
    """Join the other ranks, read the network of `source` (see `read_network`) on each, leave again.

    Settings are those of the run that `source` is or belongs to; else the defaults, with the colors that the network
    knows; with `overrides` over them.
    """
    run = run_of(source)
    try:
        config = _config(run, overrides, ())
    except UserError as error:
        if environment.rank:
            raise SaidByRankZero(str(error)) from None
        raise
    own = run is not None and os.access(run, os.W_OK)
    index_dir = run / "index" if run is not None and own else Path.cwd() / "shard-index"
    with joined_world(environment, timeout_s=_LONGEST_WAIT_S, run_dir=index_dir, device=config.train.device) as world:
        weights = _read_alike(source, role, world)
        together(world, lambda: _check_channels(weights))
        if run is None:
            colors = (f"data.mean={[*weights.pixel_mean]}", f"data.std={[*weights.pixel_std]}")
            config = _config(run, overrides, colors)
        backbone = together(world, lambda: build_backbone(weights, world.device, config.model.attention))
        yield JudgedNetwork(backbone=backbone, weights=weights, config=config, world=world, index_dir=index_dir)


def together(world: World, action: Callable[[], T]) -> T:
    """Every rank acts; a `UserError` of any becomes one of all, said by rank 0. A collective."""
    problem: UserError | None = None
    result = None
    try:
        result = action()
    except UserError as error:
        problem = error
    problems = [found for found in world.gather(problem) if found is not None]
    if problems:
        raise for_rank(problems[0], is_first=world.is_first)
    return cast(T, result)


def _config(run: Path | None, overrides: Sequence[str], colors: Sequence[str]) -> Config:
    if run is None:
        return load_config(None, [*_UNUSED, *colors, *overrides])
    file = str(RunFolder(run).config)
    try:
        load_config(file)
    except UserError as error:
        raise UserError(str(error) if file in str(error) else f"{file}: {error}") from None
    return load_config(file, overrides)


def _check_channels(weights: NetworkWeights) -> None:
    if weights.shape.in_channels != 3:
        raise UserError(f"{weights.source} sees images of {weights.shape.in_channels} channels: it must be 3 (RGB)")


def _read_alike(source: Path, role: str, world: World) -> NetworkWeights:
    """The same network on all ranks: a run may commit a newer checkpoint between two ranks' looks at it."""
    read: list[NetworkWeights] = []

    def first() -> str:
        read.append(read_network(source, network=role))
        return read[0].source

    chosen = world.first(first)
    return together(world, lambda: read[0] if read else read_network(chosen, network=role))
