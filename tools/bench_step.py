"""Count and time the training step on random crops, on one rank.

    python tools/bench_step.py --arch vit_small --patch-size 16 --batch-size 2 --strategy ddp|fsdp|none [--json]

2 global crops of 224 px and 8 local ones of 96 px, K = 65,536, AdamW, per-parameter clipping, the guard against
non-finite numbers: the published defaults. Operators are those that reach a TorchDispatchMode; a host synchronisation
is `_local_scalar_dense`, `nonzero`, `masked_select` or a copy from the device to the host. Saved activations are the
distinct storages that autograd keeps in the student's forward pass and the loss, parameters and inputs aside, on the
meta device.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dino_dist.build import attention_backend, build_network, build_step
from dino_dist.config import (
    AugmentSection,
    Config,
    DataSection,
    HeadSection,
    ModelSection,
    ParallelSection,
    TrainSection,
)
from dino_dist.config_checks import check
from dino_dist.dist import ProcessEnvironment, World, joined_world
from dino_dist.losses import dino_loss
from dino_dist.parallelize import checkpoint_activations
from dino_dist.schedules import build_schedules
from dino_dist.step import DinoStep, StepResult, Views

SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
COPIES = ("aten::copy_", "aten::_to_copy")


class OperatorCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators by phase, and those that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "teacher_forward"
        self.by_phase: Counter[str] = Counter()
        self.by_name: Counter[str] = Counter()
        self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        self.by_phase[self.phase] += 1
        self.by_name[name] += 1
        self.syncs += name in SYNCS or (name in COPIES and _copies_to_host(args, result))
        return result

    def enter(self, phase: str) -> Callable[..., None]:
        """A hook that starts a phase."""

        def hook(*_: Any) -> None:
            self.phase = phase

        return hook


class CpuFlashAttention(TorchFunctionMode):
    """On the meta device: the attention kernel that the CPU takes. Left alone, torch takes the unfused one there, which
    saves the attention probabilities.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return func(*args, **(kwargs or {}))


def _copies_to_host(args: Any, result: Any) -> bool:
    tensors = [value for value in args if isinstance(value, Tensor)]
    return result.device.type == "cpu" and any(tensor.device.type != "cpu" for tensor in tensors)


def bench_config(arch: str, patch_size: int, batch_size: int, strategy: str, local_crops: int) -> Config:
    """The published defaults at the asked size."""
    config = Config(
        data=DataSection(train="random crops"),
        model=ModelSection(arch=arch, patch_size=patch_size, drop_path=0.0),  # type: ignore[arg-type]
        head=HeadSection(num_prototypes=65536),
        augment=AugmentSection(local_crops=local_crops),
        train=TrainSection(batch_size=batch_size),
        parallel=ParallelSection(strategy=strategy),  # type: ignore[arg-type]
    )
    check(config)
    return config


def random_views(config: Config, world: World) -> Views:
    """Crops of noise of the config's sizes."""
    n, augment = config.train.batch_size, config.augment
    return Views(
        global_crops=torch.randn(2 * n, 3, augment.global_px, augment.global_px, device=world.device),
        local_crops=torch.randn(augment.local_crops * n, 3, augment.local_px, augment.local_px, device=world.device),
    )


def count_operators(step: DinoStep, run_once: Callable[[], StepResult]) -> OperatorCount:
    """One step under the counter."""
    count = OperatorCount()
    hooks = [
        step.networks.teacher.register_forward_pre_hook(count.enter("teacher_forward")),
        step.networks.teacher.register_forward_hook(count.enter("targets")),
        step.networks.student.register_forward_pre_hook(count.enter("student_forward")),
        step.networks.student.register_forward_hook(count.enter("loss_backward_clip")),
        step.update.outer.register_step_pre_hook(count.enter("update_ema_center")),
    ]
    with count:
        run_once()
    for hook in hooks:
        hook.remove()
    return count


def saved_activations_mib(config: Config, *, activation_checkpointing: str = "none") -> float:
    """MiB an image that autograd keeps of the student's forward and the loss, for a batch of one on the meta device."""
    with torch.device("meta"):
        student = build_network(config, "sdpa", is_teacher=False, world_size=1)
    checkpoint_activations(student, activation_checkpointing)
    augment = config.augment
    crops = [torch.empty(2, 3, augment.global_px, augment.global_px, device="meta")]
    if augment.local_crops:
        crops.append(torch.empty(augment.local_crops, 3, augment.local_px, augment.local_px, device="meta"))
    targets = torch.empty(2, 1, config.head.num_prototypes, device="meta")
    ours = {_storage(tensor) for tensor in [*student.parameters(), *crops, targets]}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in ours:
            # The tensor is kept beside its size, so that its storage's address is not used again.
            kept[_storage(tensor)] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    with CpuFlashAttention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = student(crops)
        loss = dino_loss(logits.unflatten(0, (-1, 1)), targets, student_temp=0.1)
    del loss
    return sum(size for _, size in kept.values()) / 2**20


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def peak_memory_gib(world: World) -> float:
    """Of the device on CUDA, of the process on CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(
    arch: Annotated[str, typer.Option(help="vit_tiny, vit_small, vit_base or vit_large.")] = "vit_small",
    patch_size: Annotated[int, typer.Option(help="Side of a patch in px.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 2,
    strategy: Annotated[str, typer.Option(help="ddp, fsdp or none.")] = "none",
    local_crops: Annotated[int, typer.Option(help="Local crops an image.")] = 8,
    steps: Annotated[int, typer.Option(help="Timed steps.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Count and time the training step on random crops, on one rank."""
    config = bench_config(arch, patch_size, batch_size, strategy, local_crops)
    environment = ProcessEnvironment()
    with joined_world(environment, timeout_s=600) as world:
        torch.set_num_threads(config.parallel.threads_per_rank)
        backend = attention_backend(config, world.device)
        step = build_step(config, world, backend.name)
        settings = build_schedules(config, dataset_size=100 * batch_size).at(100)
        views = random_views(config, world)
        flags = torch.zeros(3, device=world.device)

        def run_once() -> StepResult:
            return step([lambda: views], settings, flags)

        run_once()
        count = count_operators(step, run_once)
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            run_once().loss.item()
            seconds.append(time.perf_counter() - started)
        median = statistics.median(seconds)
        result = {
            "strategy": strategy,
            "arch": arch,
            "patch_size": patch_size,
            "batch_size": batch_size,
            "attention": backend.name,
            "device": str(world.device),
            "operators_per_step": sum(count.by_phase.values()),
            "operators_by_phase": dict(count.by_phase),
            "host_syncs_per_step": count.syncs,
            "seconds_per_step": median,
            "images_per_s": batch_size / median,
            "peak_memory_gib": peak_memory_gib(world),
            "saved_activations_mib_per_image": saved_activations_mib(config),
            "saved_activations_mib_per_image_checkpointed": saved_activations_mib(
                config, activation_checkpointing="torch"
            ),
        }
    if as_json:
        print(json.dumps(result))
        return
    table = Table("figure", "value", title="training step, random crops")
    for key, value in result.items():
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
