"""What the tests of checkpoints share: tensors and state to save, and a run's folder with those who save into it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dino_dist.checkpoint import Checkpointer
from dino_dist.dist import World
from dino_dist.ledger import read_rows
from dino_dist.run_folder import Attempt, RunFolder


class Contents:
    """Of a checkpoint."""

    state: ClassVar = {
        "step": 10,
        "samples_consumed": 640,
        "lr": 0.1 + 0.2,
        "groups": [{"betas": [0.9, 0.999]}],
        "name": "é",
    }

    @staticmethod
    def values(seed: int) -> dict[str, Tensor]:
        """Tensors of every kind that a run saves; sizes that 2 and 3 ranks cannot split evenly."""
        return _with_moments(_model(seed), seed)

    @staticmethod
    def sharded(world: World, seed: int) -> dict[str, Tensor]:
        """`values(seed)` with the model's tensors as FSDP2 shards them over the ranks."""
        model = _model(seed)
        fully_shard(model, mesh=init_device_mesh("cpu", (world.size,)))
        return _with_moments(model, seed)

    @staticmethod
    def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
        """The whole of each tensor found, and no other ones."""
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            assert tensor.dtype == wanted[name].dtype, name
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(whole, wanted[name]), name

    @staticmethod
    def overwrite(tensors: dict[str, Tensor]) -> None:
        """In place, as the next training step would."""
        for tensor in tensors.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(1)


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 1))


def _with_moments(model: nn.Module, seed: int) -> dict[str, Tensor]:
    student = {f"student.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    return {
        **student,
        **{f"moment.{name}": tensor * 2 for name, tensor in student.items()},
        "center": torch.randn(1, 9, generator=generator, dtype=torch.float64),
        "count": torch.tensor(seed),
        "temperature": torch.tensor(0.04 + seed),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "transposed": torch.randn(4, 3, generator=generator).t(),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True, False, seed % 2 == 0]),
    }


@pytest.fixture(scope="session")
def contents() -> type[Contents]:
    """See `Contents`."""
    return Contents


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Of a new run."""
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


@pytest.fixture
def attempt(folder: RunFolder) -> Iterator[Attempt]:
    """One that has begun."""
    with folder.begin_attempt() as begun:
        yield begun


@pytest.fixture
def checkpointer(folder: RunFolder) -> Callable[..., Checkpointer]:
    """`checkpointer(attempt, world=World(), **options)`."""

    def make(attempt: Attempt, world: World | None = None, **options: Any) -> Checkpointer:
        settings: dict[str, Any] = {"keep": 2, "keep_every_steps": None, "async_save": True} | options
        return Checkpointer(folder, attempt, world or World(), **settings)

    return make


@pytest.fixture
def rank_checkpointer(folder: RunFolder, checkpointer: Callable[..., Checkpointer]) -> Callable[[World], Checkpointer]:
    """`rank_checkpointer(world)`: of a rank, in an attempt that all ranks begin together."""

    def make(world: World) -> Checkpointer:
        number = world.broadcast(folder.begin_attempt().number if world.is_first else 0)
        return checkpointer(folder.join_attempt(number), world)

    return make


@pytest.fixture
def three(attempt: Attempt, checkpointer: Callable[..., Checkpointer]) -> Checkpointer:
    """Of a run with the checkpoints of steps 10, 20, 30; that of step s holds `values(s)`."""
    saver = checkpointer(attempt, keep=3)
    for step in (10, 20, 30):
        assert saver.save(Contents.values(step), Contents.state | {"step": step}, step=step, wait=True)
    return saver


@pytest.fixture
def names(folder: RunFolder) -> Callable[[], list[str]]:
    """`names()`: what lies beside the checkpoints, and these."""
    return lambda: sorted(os.listdir(folder.checkpoints))


@pytest.fixture
def faults(folder: RunFolder) -> Callable[[], list[str]]:
    """`faults()`: those in the ledger."""
    return lambda: [row["why"] for row in read_rows(folder.ledger) if row["event"] == "fault"]
