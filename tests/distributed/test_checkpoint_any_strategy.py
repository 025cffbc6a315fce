"""A checkpoint of any strategy and number of ranks loads, bit for bit, under any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from dino_dist.build import build_step
from dino_dist.checkpoint import Checkpointer
from dino_dist.config import (
    AugmentSection,
    Config,
    DataSection,
    EvalSection,
    HeadSection,
    ModelSection,
    ParallelSection,
    TrainSection,
)
from dino_dist.config_checks import check
from dino_dist.dist import World
from dino_dist.run_folder import RunFolder

pytestmark = pytest.mark.distributed


def small_config(strategy: str, replicate: int = 0) -> Config:
    config = Config(
        data=DataSection(train="none"),
        model=ModelSection(embed_dim=12, depth=2, num_heads=2, patch_size=4, attention="sdpa"),
        head=HeadSection(num_prototypes=11, hidden_dim=10, bottleneck_dim=5),
        augment=AugmentSection(global_px=8, local_px=8, local_crops=0),
        train=TrainSection(batch_size=8, device="cpu"),
        eval=EvalSection(resize_px=8, crop_px=8),
        parallel=ParallelSection(strategy=strategy, replicate=replicate),  # type: ignore[arg-type]
    )
    check(config)
    return config


def fill(tensors: dict[str, torch.Tensor]) -> None:
    """Every tensor gets values of its own that depend on its name alone, moments included."""
    for name, tensor in tensors.items():
        generator = torch.Generator().manual_seed(sum(name.encode()) * 7919 % 2**31)
        values = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        if isinstance(tensor, DTensor):
            whole = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.to_local().copy_(whole.to_local())
        else:
            tensor.copy_(values)


@torch.no_grad()
def save(world: World, folder: Path, strategy: str, replicate: int) -> None:
    step = build_step(small_config(strategy, replicate), world, "sdpa")
    tensors = step.tensors()
    fill(tensors)
    with open_checkpointer(world, folder) as (checkpointer, _):
        assert checkpointer.save(tensors, {"note": 1}, step=5, wait=True)


@torch.no_grad()
def load(world: World, folder: Path, strategy: str, replicate: int) -> dict[str, np.ndarray]:
    step = build_step(small_config(strategy, replicate), world, "sdpa")
    tensors = step.tensors()
    with open_checkpointer(world, folder) as (checkpointer, _):
        choice = checkpointer.newest()
        assert choice is not None
        assert checkpointer.load(choice, tensors) == {"note": 1}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone().numpy() for name, t in tensors.items()}


class open_checkpointer:
    """A checkpointer in the next attempt of a folder."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, RunFolder(folder)

    def __enter__(self) -> tuple[Checkpointer, Any]:
        if self.world.is_first:
            self.folder.create()
            self.attempt = self.folder.begin_attempt()
        number = self.world.broadcast(self.attempt.number if self.world.is_first else 0)
        if not self.world.is_first:
            self.attempt = self.folder.join_attempt(number)
        self.checkpointer = Checkpointer(
            self.folder, self.attempt, self.world, keep=2, keep_every_steps=None, async_save=True
        )
        return self.checkpointer, self.attempt

    def __exit__(self, *_: object) -> None:
        self.checkpointer.close()
        self.attempt.close()


LAYOUTS = [(1, "none", 0), (2, "fsdp", 0), (3, "fsdp", 0), (4, "hsdp", 2), (2, "ddp", 0), (3, "oss", 0), (2, "oss", 0)]
PAIRS = list(zip(LAYOUTS, LAYOUTS[2:] + LAYOUTS[:2], strict=True))


@pytest.mark.parametrize(("written", "read"), PAIRS, ids=str)
def test_any_layout_loads_any_other(
    ranks: Any, tmp_path: Path, written: tuple[int, str, int], read: tuple[int, str, int]
) -> None:
    ranks(written[0], save, tmp_path, *written[1:])
    expected = dict(build_step(small_config("none"), World(), "sdpa").tensors())
    with torch.no_grad():
        fill(expected)
    results = ranks(read[0], load, tmp_path, *read[1:])
    seen: set[str] = set()
    for result in results:
        for name, value in result.items():
            np.testing.assert_array_equal(value, expected[name].detach().numpy(), err_msg=name)
        seen |= result.keys()
    assert seen == expected.keys()
