"""A step on a CUDA device is the step on the CPU, never waits for the device, and stays finite in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from dino_dist.build import attention_backend, build_step
from dino_dist.config import (
    AugmentSection,
    Config,
    DataSection,
    EvalSection,
    HeadSection,
    ModelSection,
    OptimSection,
    ParallelSection,
    TrainSection,
)
from dino_dist.config_checks import check
from dino_dist.dist import ProcessEnvironment, World, joined_world
from dino_dist.schedules import build_schedules
from dino_dist.step import DinoStep, StepResult, Views

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BATCH, LOCALS, DEPTH = 6, 4, 3
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def small_config(precision: str, **changes: Any) -> Config:
    config = Config(
        data=DataSection(train="crops made in the test"),
        model=ModelSection(embed_dim=64, depth=DEPTH, num_heads=2, patch_size=8, drop_path=0.2),
        head=HeadSection(num_prototypes=257, hidden_dim=96, bottleneck_dim=32, norm_last_layer=False),
        augment=AugmentSection(global_px=32, local_px=16, local_crops=LOCALS),
        train=TrainSection(length="20st", batch_size=BATCH, precision=precision),  # type: ignore[arg-type]
        optim=OptimSection(lr=0.02, warmup="2st", clip=0.3, freeze_last_layer="1st"),
        eval=EvalSection(resize_px=32, crop_px=32),
        parallel=ParallelSection(strategy="none"),
    )
    config = replace(config, **changes)
    check(config)
    return config


def views_of(index: int, device: torch.device, dtype: torch.dtype) -> Views:
    generator = torch.Generator().manual_seed(index)
    drop = (torch.rand(DEPTH, 2, (2 + LOCALS) * BATCH, generator=generator) > 0.2) / 0.8
    return Views(
        global_crops=torch.randn(2 * BATCH, 3, 32, 32, generator=generator, dtype=torch.float64).to(device, dtype),
        local_crops=torch.randn(LOCALS * BATCH, 3, 16, 16, generator=generator, dtype=torch.float64).to(device, dtype),
        drop_path=drop.to(device, dtype),
    )


def build(config: Config, world: World) -> DinoStep:
    return build_step(config, world, attention_backend(config, world.device).name)


def run(config: Config, world: World, *, steps: int = 4) -> tuple[DinoStep, list[StepResult]]:
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    schedules = build_schedules(config, dataset_size=60)
    step = build(config, world)
    flags = torch.zeros(2, device=world.device, dtype=dtype)
    results = []
    for index in range(steps):
        views = views_of(index, world.device, dtype)
        results.append(step([lambda views=views: views], schedules.at(index), flags))  # type: ignore[misc]
    return step, results


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def world_for(strategy: str) -> Iterator[World]:
    if strategy == "none":
        yield World(device=CUDA)
    else:
        with joined_world(ProcessEnvironment(), timeout_s=60, device="cuda") as world:
            yield world


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_cuda_is_cpu_in_float64(optimizer: str, attention: str) -> None:
    config = small_config("fp64")
    config = replace(
        config,
        optim=replace(config.optim, name=optimizer),  # type: ignore[arg-type]
        model=replace(config.model, attention=attention),  # type: ignore[arg-type]
    )
    on_cpu, expected = run(config, World(device=CPU))
    on_cuda, ours = run(config, World(device=CUDA))
    for a, b in zip(ours, expected, strict=True):
        assert a.accepted.item() == b.accepted.item() == 1.0
        assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-9)
        assert a.teacher_entropy.item() == pytest.approx(b.teacher_entropy.item(), rel=1e-9)
        torch.testing.assert_close(a.grad_norms_P.cpu(), b.grad_norms_P, rtol=1e-7, atol=1e-12)
    theirs = on_cpu.tensors()
    for name, tensor in on_cuda.tensors().items():
        scale = max(float(theirs[name].abs().max()), 1e-3)
        error = float((tensor.detach().cpu() - theirs[name].detach()).abs().max()) / scale
        assert error <= 1e-8, f"{name}: {error:.1e}"


def test_cuda_is_cpu_in_float32_at_first() -> None:
    """Convolutions may use TF32 on CUDA, so the tolerance is its; later steps drift apart as any two devices do."""
    config = small_config("fp32")
    _, (expected,) = run(config, World(device=CPU), steps=1)
    _, (ours,) = run(config, World(device=CUDA), steps=1)
    assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=5e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", ["none", "fsdp"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_a_step_never_waits_for_the_device(optimizer: str, strategy: str, precision: str) -> None:
    config = small_config(precision, parallel=ParallelSection(strategy=strategy))  # type: ignore[arg-type]
    config = replace(config, optim=replace(config.optim, name=optimizer))  # type: ignore[arg-type]
    schedules = build_schedules(config, dataset_size=60)
    with world_for(strategy) as world:
        step = build(config, world)
        flags = torch.zeros(2, device=world.device)
        views = [views_of(index, world.device, torch.float32) for index in range(5)]

        def once(index: int) -> StepResult:
            return step([lambda: views[index]], schedules.at(index), flags)

        once(0)  # kernels, buffers and position matrices are made here
        once(1)
        with waiting_is_an_error():
            results = [once(index) for index in (2, 3, 4)]
        assert all(result.accepted.item() == 1.0 for result in results)


def test_the_watch_over_waiting_sees_it() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), waiting_is_an_error():
        torch.ones(3, device=CUDA).sum().item()


@pytest.mark.parametrize("strategy", ["none", "fsdp"])
def test_bf16_stays_finite_and_near_float32(strategy: str) -> None:
    config = small_config("bf16", parallel=ParallelSection(strategy=strategy))  # type: ignore[arg-type]
    with world_for(strategy) as world:
        step, results = run(config, world, steps=10)
        assert all(result.accepted.item() == 1.0 for result in results)
        for name, tensor in step.tensors().items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert bool(torch.isfinite(whole).all()), name
            assert whole.dtype == torch.float32, name
        losses = [result.loss.item() for result in results]
    _, exact = run(small_config("fp32"), World(device=CUDA), steps=1)
    assert losses[0] == pytest.approx(exact[0].loss.item(), rel=0.02)


def test_a_bad_number_leaves_every_bit() -> None:
    config = small_config("fp32")
    step, _ = run(config, World(device=CUDA), steps=2)
    before = {name: tensor.detach().clone() for name, tensor in step.tensors().items()}
    views = views_of(9, CUDA, torch.float32)
    views.global_crops[0, 0, 0, 0] = float("inf")
    settings = build_schedules(config, dataset_size=60).at(2)
    result = step([lambda: views], settings, torch.zeros(2, device=CUDA))
    assert result.accepted.item() == 0.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in step.tensors().items())
