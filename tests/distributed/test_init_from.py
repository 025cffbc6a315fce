"""A run that starts from earlier weights has them on any ranks, says so, and needs the file no more afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from dino_dist.build import build_network, build_step
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
from dino_dist.dist import World
from dino_dist.init_from import start_from
from dino_dist.weights.read_network import read_network

pytestmark = pytest.mark.distributed


def config_from(source: str, strategy: str) -> Config:
    return Config(
        data=DataSection(train="none"),
        model=ModelSection(embed_dim=20, depth=2, num_heads=2, patch_size=4, attention="sdpa", init_from=source),
        head=HeadSection(num_prototypes=13, hidden_dim=12, bottleneck_dim=6, norm_last_layer=False),
        augment=AugmentSection(global_px=16, local_px=8),
        train=TrainSection(device="cpu", batch_size=6),
        eval=EvalSection(resize_px=16, crop_px=16),
        parallel=ParallelSection(strategy=strategy, replicate=2 if strategy == "hsdp" else 0),  # type: ignore[arg-type]
    )


def started(world: World, config: Config) -> dict[str, np.ndarray]:
    """What a run would begin with on these ranks; only the first of them can see the file."""
    if not world.is_first:
        config = replace(config, model=replace(config.model, init_from="/nowhere/on/this/node.pth"))
    step = build_step(config, world, "sdpa")
    lines = start_from(config, step, world)
    assert len(lines) == 4
    tensors = {name: value for name, value in step.tensors().items() if name.startswith(("student", "teacher", "cent"))}
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}
    return {name: value.detach().numpy().copy() for name, value in whole.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In DINO's original format; its network is of another seed than the run's, its positions of another grid."""
    file = tmp_path_factory.mktemp("original") / "checkpoint.pth"
    config = config_from("", "none")
    config = replace(config, augment=replace(config.augment, global_px=24))
    content: dict[str, Any] = {"dino_loss": {"center": torch.arange(13.0)[None]}}
    for role, seed in (("student", 5), ("teacher", 6)):
        network = build_network(
            replace(config, run=replace(config.run, seed=seed)), "sdpa", is_teacher=False, world_size=1
        )
        content[role] = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save(content, file)
    return file


def test_the_same_weights_on_any_ranks(checkpoint: Path, ranks: Callable[..., list[Any]]) -> None:
    alone = started(World(), config_from(str(checkpoint), "none"))
    for size, strategy in ((2, "fsdp"), (3, "fsdp"), (2, "oss"), (2, "ddp"), (2, "hsdp")):
        for found in ranks(size, started, config_from(str(checkpoint), strategy)):
            assert found.keys() == alone.keys()
            for name, value in alone.items():
                assert np.array_equal(found[name], value), (size, strategy, name)
    for role in ("student", "teacher"):
        weights = read_network(checkpoint, network=role, num_heads=2)
        for name, tensor in weights.backbone.items():
            if name != "pos_embed":
                assert np.array_equal(alone[f"{role}.backbone.{name}"], tensor.numpy()), name
        for name, tensor in weights.head.items():
            assert np.array_equal(alone[f"{role}.head.{name}"], tensor.numpy()), name
        assert alone[f"{role}.backbone.pos_embed"].shape == (1, 17, 20)
    assert np.array_equal(alone["center"][0], np.arange(13.0))


STAND_STILL = ("optim.lr=0", "optim.lr_final=0", "ema.momentum=1", "loss.center_momentum=1")


def test_pretraining_goes_on_where_another_run_ended(
    start: Callable[..., Any], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    start(tiny(tmp_path / "first", "train.length=4st"), 1).end(0)
    more = (f"model.init_from={tmp_path / 'first'}", "train.length=2st", "run.seed=9", *STAND_STILL)
    second = start(tiny(tmp_path / "second", *more), 2)
    second.end(0)
    assert "left as drawn" not in second.output()
    assert "center: taken over" in second.output()
    (row,) = second.events("restore")
    assert str(tmp_path / "first") in row["why"]
    assert "tensors matched" in row["why"]
    for role in ("student", "teacher"):
        before, after = (read_network(tmp_path / run, network=role) for run in ("first", "second"))
        assert all(torch.equal(after.backbone[name], tensor) for name, tensor in before.backbone.items())
        assert all(torch.equal(after.head[name], tensor) for name, tensor in before.head.items())
        assert before.center_1K is not None
        assert after.center_1K is not None
        assert torch.equal(after.center_1K, before.center_1K)
        assert before.center_1K.any()

    shutil.rmtree(tmp_path / "first")
    again = start(tiny(tmp_path / "second", *more), 1)
    again.end(0)
    assert "init_from" not in again.output(), "a resumed run does not look at it"
