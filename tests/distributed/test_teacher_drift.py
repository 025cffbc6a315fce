"""Replicas whose teachers have come apart are found out, and all take replica 0's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from dino_dist.build import build_step
from dino_dist.config import (
    AugmentSection,
    Config,
    DataSection,
    EvalSection,
    HeadSection,
    ModelSection,
    ParallelSection,
)
from dino_dist.dist import World
from dino_dist.optim import local_shard

pytestmark = pytest.mark.distributed


def small_config(strategy: str, replicate: int) -> Config:
    return Config(
        data=DataSection(train="none"),
        model=ModelSection(embed_dim=12, depth=2, num_heads=2, patch_size=4, attention="sdpa"),
        head=HeadSection(num_prototypes=11, hidden_dim=10, bottleneck_dim=5),
        augment=AugmentSection(global_px=8, local_px=8, local_crops=0),
        eval=EvalSection(resize_px=8, crop_px=8),
        parallel=ParallelSection(strategy=strategy, replicate=replicate),  # type: ignore[arg-type]
    )


@torch.no_grad()
def fault(world: World, strategy: str, replicate: int) -> dict[str, Any]:
    networks = build_step(small_config(strategy, replicate), world, "sdpa").networks
    before = networks.teacher_drift()
    name = "backbone.blocks.1.mlp.fc1.weight"
    for network in (networks.teacher, networks.student):  # the teacher's, perhaps, because of the student's
        weight = local_shard(network.get_parameter(name).detach())
        if world.rank == world.size - 1 and weight.numel():
            weight[0, 0] += 0.25  # a bit flips on the last rank
    after = networks.teacher_drift()
    networks.take_first_replica()
    repaired = networks.teacher_drift()
    whole = [network.get_parameter(name).detach() for network in (networks.teacher, networks.student)]
    return {
        "drift": [None if d is None else d.item() for d in (before, after, repaired)],
        "weights": [(one.full_tensor() if isinstance(one, DTensor) else one).numpy() for one in whole],
    }


@pytest.mark.parametrize(("size", "strategy", "replicate"), [(4, "hsdp", 2), (3, "ddp", 0), (2, "oss", 0)])
def test_a_flipped_bit_is_measured_and_replica_zero_wins(ranks: Any, size: int, strategy: str, replicate: int) -> None:
    expected = build_step(small_config("none", 0), World(), "sdpa").networks.teacher
    weight = expected.get_parameter("backbone.blocks.1.mlp.fc1.weight").detach().numpy()
    for result in ranks(size, fault, strategy, replicate):
        assert result["drift"] == [0.0, pytest.approx(0.25, abs=1e-6), 0.0]
        for found in result["weights"]:  # both begin with the same
            np.testing.assert_array_equal(found, weight)


def test_one_copy_cannot_drift(ranks: Any) -> None:
    for result in ranks(2, fault, "fsdp", 0):
        assert result["drift"] == [None, None, None]
