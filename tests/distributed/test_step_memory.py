"""What a rank holds: its part of each parameter, and nothing more for each step that it has done."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import pytest
import torch

from dino_dist.build import build_step
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
from dino_dist.optim import local_shard
from dino_dist.schedules import build_schedules
from dino_dist.step import Views

pytestmark = pytest.mark.distributed

STEPS, DEPTH, MICRO_BATCHES = 80, 4, 2
GROUPS = DEPTH + 2
"""That FSDP gathers in turn: each block, the head, and the rest."""


def small_config() -> Config:
    return Config(
        data=DataSection(train="none"),
        model=ModelSection(embed_dim=12, depth=DEPTH, num_heads=2, patch_size=4, attention="sdpa"),
        head=HeadSection(num_prototypes=11, hidden_dim=10, bottleneck_dim=5),
        augment=AugmentSection(global_px=8, local_px=8, local_crops=0),
        train=TrainSection(length="1000st", batch_size=2 * MICRO_BATCHES, accumulate=MICRO_BATCHES, device="cpu"),
        eval=EvalSection(resize_px=8, crop_px=8),
        parallel=ParallelSection(strategy="fsdp"),
    )


def kept_by_fsdp(world: World) -> int:
    """Bytes that torch's FSDP has come to hold over some steps."""
    config = small_config()
    step, settings = build_step(config, world, "sdpa"), build_schedules(config, dataset_size=20).at(500)

    def views() -> Views:
        return Views(global_crops=torch.randn(2, 3, 8, 8), local_crops=None, drop_path=torch.ones(DEPTH, 2, 2))

    def held(steps: int) -> int:
        for _ in range(steps):
            step([views] * MICRO_BATCHES, settings, torch.zeros(1))
        gc.collect()
        kept = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/_fully_shard/*")])
        return sum(statistic.size for statistic in kept.statistics("filename"))

    tracemalloc.start()
    before = held(40)  # lists of free objects fill up first
    return held(STEPS) - before


def held_of_wide_parameters(world: World) -> list[int]:
    backbone = build_step(small_config(), world, "sdpa").networks.teacher.backbone
    return [local_shard(parameter.detach()).numel() for parameter in (backbone.cls_token, backbone.pos_embed)]


@pytest.mark.parametrize(("size", "held"), [(2, [[6, 30], [6, 30]]), (5, [[12, 60], *[[0, 0]] * 4])])
def test_positions_are_spread_where_the_width_divides(ranks: Any, size: int, held: list[list[int]]) -> None:
    """12 wide, 5 tokens, first dimension 1: by that, the first rank would hold all."""
    assert ranks(size, held_of_wide_parameters) == held


def test_fsdp_keeps_no_note_of_past_steps(ranks: Any) -> None:
    """Not a pointer for each forward of a group: the teacher's have no backward that would forget them."""
    for growth_bytes in ranks(1, kept_by_fsdp):
        assert growth_bytes < 8 * STEPS * MICRO_BATCHES * GROUPS
