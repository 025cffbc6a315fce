"""The costs that the project promises of a step: operators, host synchronisations, saved activations.

The number of operators does not depend on any width, so it is counted on a network of ViT-S's depth that is thin.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dino_dist.build import build_step
from dino_dist.config import (
    AugmentSection,
    Config,
    EvalSection,
    HeadSection,
    ModelSection,
    ParallelSection,
    TrainSection,
)
from dino_dist.dist import World
from dino_dist.schedules import build_schedules
from dino_dist.step import StepResult

TOOL = Path(__file__).parents[2] / "tools" / "bench_step.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    torch.set_num_threads(1)
    return load_tool()


def load_tool() -> ModuleType:
    spec = spec_from_file_location("bench_step", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["bench_step"] = module
    spec.loader.exec_module(module)
    return module


def thin_config(tool: ModuleType, *, strategy: str = "none", depth: int = 12) -> Config:
    """The benchmark's config with every width cut down; depth, crops and schedule of ops as they are."""
    config: Config = tool.bench_config("vit_small", 16, 2, strategy, 8)
    return replace(
        config,
        model=ModelSection(embed_dim=12, num_heads=6, depth=depth, patch_size=8, drop_path=0.0, attention="sdpa"),
        head=HeadSection(num_prototypes=64, hidden_dim=16, bottleneck_dim=8),
        augment=AugmentSection(global_px=16, local_px=8, local_crops=8),
        eval=EvalSection(resize_px=16, crop_px=16),
        train=TrainSection(batch_size=2, device="cpu"),
        parallel=ParallelSection(strategy=strategy),  # type: ignore[arg-type]
    )


def count_once(world: World, config: Config) -> dict[str, Any]:
    """Operators, by phase too, and synchronisations of one step after a first one."""
    tool = load_tool()
    step = build_step(config, world, "sdpa")
    settings = build_schedules(config, dataset_size=200).at(100)
    views = tool.random_views(config, world)

    def run_once() -> StepResult:
        return step([lambda: views], settings, torch.zeros(3))

    run_once()
    count = tool.count_operators(step, run_once)
    return {"phases": dict(count.by_phase), "syncs": count.syncs, "operators": sum(count.by_phase.values())}


def test_operators_of_a_step_without_sharding(tool: ModuleType) -> None:
    counted = count_once(World(), thin_config(tool))
    assert counted["operators"] <= 1900, counted
    assert counted["syncs"] == 0, counted
    assert {"teacher_forward", "student_forward", "loss_backward_clip", "update_ema_center"} <= counted["phases"].keys()


@pytest.mark.distributed
def test_operators_of_a_step_with_fsdp(ranks: Callable[..., list[Any]], tool: ModuleType) -> None:
    (counted,) = ranks(1, count_once, thin_config(tool, strategy="fsdp"))
    assert counted["operators"] <= 3000, counted
    assert counted["syncs"] == 0, counted


def test_widths_do_not_change_the_count(tool: ModuleType) -> None:
    thin = thin_config(tool, depth=2)
    wide = replace(
        thin,
        model=replace(thin.model, embed_dim=48),
        head=HeadSection(num_prototypes=300, hidden_dim=50, bottleneck_dim=20),
        augment=replace(thin.augment, global_px=32, local_px=16),
        eval=EvalSection(resize_px=32, crop_px=32),
    )
    assert count_once(World(), thin)["phases"] == count_once(World(), wide)["phases"]


def test_the_counter_sees_synchronisations(tool: ModuleType) -> None:
    """What must be 0 in a step is not 0 where there is one."""
    count = tool.OperatorCount()
    x = torch.arange(4.0)
    with count:
        x.sum().item()
        torch.nonzero(x)
        torch.masked_select(x, x > 1)
        bool((x > 1).any())
    assert count.syncs == 4, count.by_name


def test_saved_activations_of_vit_b_8(tool: ModuleType) -> None:
    """An image, fp32, 2 + 10 crops, 65,536 prototypes, shapes alone: no memory is taken."""
    config = tool.bench_config("vit_base", 8, 1, "none", 10)
    whole = tool.saved_activations_mib(config)
    recomputed = tool.saved_activations_mib(config, activation_checkpointing="torch")
    assert whole <= 1750, whole
    assert recomputed <= 300, recomputed
    # The block inputs must be kept: 12 blocks x 3,020 tokens x 768 x 4 bytes.
    assert recomputed >= 12 * 3020 * 768 * 4 / 2**20, recomputed
    # q, k, v, both norms and the MLP's two halves cannot be avoided: 12 x 3,020 x 768 x (3 + 2 + 8) x 4 bytes.
    assert whole >= 12 * 3020 * 768 * 13 * 4 / 2**20, whole


def test_saved_activations_are_those_that_the_cpu_saves(tool: ModuleType) -> None:
    """The count on the meta device equals the count on real tensors."""
    config = thin_config(tool, depth=2)
    config = replace(config, train=replace(config.train, batch_size=1))
    on_meta = tool.saved_activations_mib(config)
    step = build_step(config, World(), "sdpa")
    views = tool.random_views(config, World())
    kept: dict[int, tuple[torch.Tensor, int]] = {}
    owned = {p.untyped_storage().data_ptr() for p in step.networks.student.parameters()}
    owned |= {crops.untyped_storage().data_ptr() for crops in views.student_crops}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in owned:
            kept[address] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    targets = torch.rand(2, 1, 64)
    owned.add(targets.untyped_storage().data_ptr())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = step.networks.student(views.student_crops)
        loss = tool.dino_loss(logits.view(-1, 1, 64), targets, student_temp=0.1)
    del loss
    on_cpu = sum(size for _, size in kept.values()) / 2**20
    assert on_meta == pytest.approx(on_cpu, rel=0.01), (on_meta, on_cpu)
