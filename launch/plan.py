"""What a job will do, worked out before it is submitted: ranks, batch, steps; any error of the config shows here."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dino_dist.config import Config
from dino_dist.config_checks import check_for_world
from dino_dist.durations import Duration
from dino_dist.errors import UserError
from dino_dist.inputs import labelled_set, training_set
from dino_dist.run_folder import RunFolder
from dino_dist.schedules import build_schedules
from launch.job_options import JobOptions


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The resolved sizes of a run; for a range of nodes those of the fewest and the most."""

    run_dir: str
    dataset_size: int
    """Images."""
    nodes_min: int
    nodes_max: int
    world_min: int
    """Ranks."""
    world_max: int
    batch_size: int
    """Images a step over all ranks."""
    micro_batch_max: int
    """Images that a rank works on at once, where it has most of them: on the fewest nodes."""
    accumulate: int
    steps: int
    images: int
    epochs: float
    checkpoint_steps: int
    """Between saves."""
    notes: tuple[str, ...]
    """What resolving the durations had to change."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"notes": list(self.notes)}

    def rows(self) -> dict[str, str]:
        """For a person to read."""
        nodes = str(self.nodes_max) if self.nodes_min == self.nodes_max else f"{self.nodes_min}-{self.nodes_max}"
        world = str(self.world_max) if self.world_min == self.world_max else f"{self.world_min}-{self.world_max}"
        at_once = f"at most {self.micro_batch_max} at once" if self.accumulate > 1 or self.world_min > 1 else "at once"
        return {
            "run.dir": self.run_dir,
            "data": f"{self.dataset_size} images",
            "world": f"{world} {'rank' if world == '1' else 'ranks'} on {nodes} {'node' if nodes == '1' else 'nodes'}",
            "batch": f"{self.batch_size} images a step over all ranks, {at_once} on a rank",
            "length": f"{self.steps} steps, {self.images} images, {self.epochs:.4g} epochs",
            "checkpoint": f"every {self.checkpoint_steps} steps",
        } | {f"note {number}": note for number, note in enumerate(self.notes, 1)}


def make_plan(config: Config, options: JobOptions, *, index_dir: Path, accept_changes: bool = False) -> Plan:
    """Resolve a config for a job and find whatever its ranks would refuse, as the same `UserError`.

    Opens the data sets, which are indexed if they are new: beside the shards, or below `index_dir` where that cannot
    be written to. What depends on the GPUs of the compute nodes is not checked, nor whether the weights of
    `model.init_from` fit: only that they are there.
    """
    _check_worlds(config, options)
    samples = training_set(config.data, index_dir)
    for labelled in (config.data.eval_train, config.data.eval_test):
        if labelled is not None:
            labelled_set(labelled, config.data, index_dir)
    _check_networks(config, accept_changes=accept_changes)
    schedules = build_schedules(config, samples.num_samples)
    batch_size, accumulate = config.train.batch_size, config.train.accumulate
    images = schedules.total_steps * batch_size
    every = Duration.parse(config.checkpoint.every).steps(batch_size=batch_size, dataset_size=samples.num_samples)
    return Plan(
        run_dir=config.run.dir,
        dataset_size=samples.num_samples,
        nodes_min=options.nodes_min,
        nodes_max=options.nodes_max,
        world_min=options.world_min,
        world_max=options.world_max,
        batch_size=batch_size,
        micro_batch_max=_ceil(_ceil(batch_size, options.world_min), accumulate),
        accumulate=accumulate,
        steps=schedules.total_steps,
        images=images,
        epochs=images / samples.num_samples,
        checkpoint_steps=max(every, 1),
        notes=schedules.notes,
    )


@contextmanager
def index_dir_of(run_dir: Path, *, dry_run: bool) -> Iterator[Path]:
    """Where indexes go whose shards lie where nothing can be written: with the run, but a dry run leaves nothing.

    `data.index_dir`, where it is set, comes before this.
    """
    if not dry_run:
        yield run_dir / "index"
        return
    with tempfile.TemporaryDirectory(prefix="dino-dist-index-") as folder:
        yield Path(folder)


def _check_worlds(config: Config, options: JobOptions) -> None:
    """Of all numbers of nodes that Slurm may give, the most first: it bounds the work of the others."""
    for nodes in (options.nodes_max, *range(options.nodes_min, options.nodes_max)):
        try:
            check_for_world(config, _local_sizes(nodes, options.tasks_per_node, limit=config.train.batch_size))
        except UserError as error:
            where = "node" if nodes == 1 else "nodes"
            raise UserError(f"on {nodes} {where}, {options.tasks_per_node} ranks each: {error}") from None


def _local_sizes(nodes: int, tasks_per_node: int, *, limit: int) -> list[int]:
    """Of each rank, how many share its node; more ranks than images are refused before they fill the memory."""
    world = nodes * tasks_per_node
    if world > limit:
        raise UserError(f"{world} ranks for train.batch_size={limit} images a step: use at most {limit} ranks")
    return [tasks_per_node] * world


def _check_networks(config: Config, *, accept_changes: bool) -> None:
    """Sizes of the networks, what they start from, and whether the run folder may go on with this config."""
    # These modules import torch, which takes seconds: after all that fails sooner.
    import torch

    from dino_dist.build import check_strategy
    from dino_dist.init_from import check_source
    from dino_dist.run_session import check_continues

    folder = RunFolder(Path(config.run.dir))
    check_strategy(config, torch.device("cpu"))
    check_continues(folder, config, accept_changes=accept_changes)
    check_source(config, folder)


def _ceil(number: int, parts: int) -> int:
    return -(-number // parts)
