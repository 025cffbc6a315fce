"""The step gives the same losses and weights however it is spread: ranks, strategies, micro-batches."""

from __future__ import annotations

from dataclasses import replace
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
    LossSection,
    ModelSection,
    OptimSection,
    ParallelSection,
    TrainSection,
)
from dino_dist.config_checks import check
from dino_dist.data.order.order import micro_slices, rank_slice
from dino_dist.dist import World
from dino_dist.schedules import build_schedules
from dino_dist.step import Views

pytestmark = pytest.mark.distributed

BATCH, STEPS, LOCALS = 7, 4, 2  # an odd batch: no number of ranks or parts divides it


def small_config(**parallel: Any) -> Config:
    config = Config(
        data=DataSection(train="crops made in the test"),
        model=ModelSection(embed_dim=24, depth=3, num_heads=2, patch_size=4, drop_path=0.3, attention="sdpa"),
        head=HeadSection(num_prototypes=37, hidden_dim=20, bottleneck_dim=9, norm_last_layer=False),
        augment=AugmentSection(global_px=16, local_px=8, local_crops=LOCALS),
        loss=LossSection(warmup_teacher_temp=0.05, warmup_teacher_temp_length="3st"),
        train=TrainSection(length="6st", batch_size=BATCH, precision="fp64", device="cpu"),
        optim=OptimSection(lr=0.05, warmup="2st", clip=0.3, freeze_last_layer="1st"),
        eval=EvalSection(resize_px=16, crop_px=16),
        parallel=ParallelSection(**parallel),
    )
    check(config)
    return config


def views_of_batch(step: int, start: int, stop: int, *, poison: bool = False) -> Views:
    """Crops of the images start..stop of a step, the same whoever asks for them."""
    generator = torch.Generator().manual_seed(step)
    globals_ = torch.randn(2, BATCH, 3, 16, 16, generator=generator, dtype=torch.float64)
    locals_ = torch.randn(LOCALS, BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
    drop = (torch.rand(3, 2, 2 + LOCALS, BATCH, generator=generator) > 0.2).double() / 0.8
    if poison:
        globals_[0, 0, 0, 0, 0] = float("inf")
    part = slice(start, stop)
    return Views(
        global_crops=globals_[:, part].flatten(0, 1),
        local_crops=locals_[:, part].flatten(0, 1),
        drop_path=drop[..., part].flatten(2, 3),
    )


def full(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().numpy()


def trajectory(world: World, config: Config, poisoned_steps: tuple[int, ...] = ()) -> dict[str, Any]:
    """Losses, and all weights, center and moments after a few steps."""
    schedules = build_schedules(config, dataset_size=20)
    step = build_step(config, world, "sdpa")
    losses = []
    for index in range(STEPS):
        first, last = rank_slice(0, BATCH, rank=world.rank, size=world.size)
        parts = [
            (lambda a=first + a, b=first + b: views_of_batch(index, a, b, poison=index in poisoned_steps))  # noqa: B023
            for a, b in micro_slices(last - first, config.train.accumulate)
        ]
        result = step(parts, schedules.at(index), torch.tensor([1.0, world.rank], dtype=torch.float64))
        assert result.flags_F.tolist() == [world.size, sum(range(world.size))]
        losses.append((result.loss.item(), result.teacher_entropy.item(), result.accepted.item()))
    tensors = {name: full(tensor) for name, tensor in step.tensors().items()}
    drift = step.networks.teacher_drift()
    assert drift is None or drift.item() == 0.0
    return {"losses": losses, "tensors": tensors}


def assert_same(ours: dict[str, Any], reference: dict[str, Any], *, tolerance: float = 1e-10) -> None:
    np.testing.assert_allclose(ours["losses"], reference["losses"], rtol=tolerance)
    for name, expected in reference["tensors"].items():
        if name not in ours["tensors"] and name.startswith("optimizer."):
            continue  # oss: another rank holds this moment
        error = np.abs(ours["tensors"][name] - expected).max() / max(np.abs(expected).max(), 1e-3)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.fixture(scope="module", params=[False, True], ids=["plain head", "batch norm head"])
def batch_norm(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def reference(batch_norm: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    return trajectory(World(), with_head(small_config(strategy="none"), batch_norm))


def with_head(config: Config, batch_norm: bool) -> Config:
    if not batch_norm:
        return config
    # Batch norm makes the gradient of every bias before it a rounding error around 0, which AdamW would blow up to full
    # steps of either sign; SGD leaves it what it is.
    optim = replace(config.optim, name="sgd")
    return replace(config, head=replace(config.head, batch_norm=True), optim=optim)


CASES = [
    (1, {"strategy": "fsdp"}),
    (2, {"strategy": "fsdp"}),
    (3, {"strategy": "fsdp", "blocks_per_group": 2}),
    (2, {"strategy": "fsdp", "blocks_per_group": 3}),
    (4, {"strategy": "hsdp", "replicate": 2}),
    (2, {"strategy": "ddp"}),
    (3, {"strategy": "ddp"}),
    (1, {"strategy": "oss"}),
    (2, {"strategy": "oss"}),
    (3, {"strategy": "oss"}),
]


@pytest.mark.parametrize(("size", "parallel"), CASES, ids=lambda value: str(value))
def test_any_strategy_on_any_ranks_is_one_rank(
    ranks: Any, reference: dict[str, Any], batch_norm: bool, size: int, parallel: dict[str, Any]
) -> None:
    results = ranks(size, trajectory, with_head(small_config(**parallel), batch_norm))
    for result in results:
        assert_same(result, reference)


@pytest.mark.parametrize(
    ("size", "strategy", "accumulate"), [(1, "none", 3), (2, "fsdp", 3), (2, "ddp", 2), (2, "oss", 2)]
)
def test_micro_batches_are_the_whole_batch(ranks: Any, size: int, strategy: str, accumulate: int) -> None:
    config = small_config(strategy=strategy)
    config = replace(config, train=replace(config.train, accumulate=accumulate))
    expected = trajectory(World(), small_config(strategy="none"))
    for result in ranks(size, trajectory, config):
        assert_same(result, expected)


@pytest.mark.parametrize("kind", ["torch", "fairscale", "fairscale_offload"])
def test_recomputed_activations_change_nothing(ranks: Any, kind: str) -> None:
    expected = trajectory(World(), small_config(strategy="none"))
    (result,) = ranks(1, trajectory, small_config(strategy="fsdp", activation_checkpointing=kind))
    assert_same(result, expected)


@pytest.mark.parametrize("name", ["sgd", "lars"])
@pytest.mark.parametrize(("size", "parallel"), [(2, {"strategy": "fsdp"}), (2, {"strategy": "oss"})], ids=str)
def test_other_optimizers_shard_too(ranks: Any, name: str, size: int, parallel: dict[str, Any]) -> None:
    def optimized(config: Config) -> Config:
        return replace(config, optim=replace(config.optim, name=name))

    expected = trajectory(World(), optimized(small_config(strategy="none")))
    for result in ranks(size, trajectory, optimized(small_config(**parallel))):
        assert_same(result, expected)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("strategy", ["fsdp", "oss"])
def test_a_bad_number_on_one_rank_changes_nothing_on_any(ranks: Any, name: str, strategy: str) -> None:
    """Every step is poisoned on rank 0's first image: all must be refused by all, and nothing may move."""
    config = small_config(strategy=strategy)
    config = replace(config, optim=replace(config.optim, name=name))
    results = ranks(2, trajectory, config, tuple(range(STEPS)))
    untouched = build_step(replace(config, parallel=ParallelSection(strategy="none")), World(), "sdpa").tensors()
    for result in results:
        assert [accepted for _, _, accepted in result["losses"]] == [0.0] * STEPS
        for name_, tensor in result["tensors"].items():
            np.testing.assert_array_equal(tensor, full(untouched[name_]), err_msg=name_)
