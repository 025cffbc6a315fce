"""How a network is spread over ranks, in this order: activation checkpointing, compilation, sharding.

Mesh axes: `replicate` (ranks that hold copies; in hsdp, the nodes) and `shard` (ranks that share one copy). fsdp has
only the second; ddp is hsdp whose shard axis has one rank, so clipping, EMA and checkpoints are one code path. oss is
the exception: whole parameters, torch's DDP and fairscale's sharded optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dino_dist.config import ParallelSection
from dino_dist.dist import World
from dino_dist.models.dino import DinoNetwork


def num_replicas(parallel: ParallelSection, world: World) -> int:
    """How many ranks hold the same shard of a parameter."""
    if parallel.strategy in ("ddp", "oss"):
        return world.size
    if parallel.strategy == "hsdp":
        return parallel.replicate or max(world.size // world.local_size, 1)
    return 1


def build_mesh(parallel: ParallelSection, world: World) -> DeviceMesh | None:
    """The device mesh of a strategy; None where parameters are plain tensors (none, oss)."""
    if parallel.strategy in ("none", "oss"):
        return None
    if parallel.strategy == "fsdp":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    replicas = num_replicas(parallel, world)
    shape = (replicas, world.size // replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def parallelize(
    network: DinoNetwork,
    parallel: ParallelSection,
    mesh: DeviceMesh | None,
    *,
    compute_dtype: torch.dtype,
    compile_blocks: bool,
    is_teacher: bool,
) -> None:
    """Apply a strategy to a network in place; student and teacher get the same groups."""
    if not is_teacher:
        checkpoint_activations(network, parallel.activation_checkpointing)
    if compile_blocks:
        for block in network.backbone.blocks:
            block.compile()
    if mesh is not None:
        shard(network, mesh, parallel.blocks_per_group, compute_dtype=compute_dtype, is_teacher=is_teacher)


def checkpoint_activations(network: DinoNetwork, kind: str) -> None:
    """Recompute each block in the backward pass; names of parameters stay as they are.

    Blocks draw no random numbers (drop path comes in as factors), so no generator state needs to be kept.
    """
    for block in network.backbone.blocks:
        if kind == "torch":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        elif kind in ("fairscale", "fairscale_offload"):
            from fairscale.nn import checkpoint_wrapper

            checkpoint_wrapper(block, offload_to_cpu=kind == "fairscale_offload")


def shard(
    network: DinoNetwork, mesh: DeviceMesh, blocks_per_group: int, *, compute_dtype: torch.dtype, is_teacher: bool
) -> None:
    """fully_shard in groups of blocks, the head, and the rest; one single group if the blocks fit in one.

    Every group of the teacher reshards after its forward, the root's included: a root left gathered (the default) would
    go on computing with its old copy and never see the EMA.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.promote_types(compute_dtype, torch.float32)
    )
    blocks = list(network.backbone.blocks)
    if blocks_per_group < len(blocks):
        for start in range(0, len(blocks), blocks_per_group):
            group = blocks[start : start + blocks_per_group]
            fully_shard(group, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        fully_shard(network.head, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(
        network,
        mesh=mesh,
        mp_policy=policy,
        reshard_after_forward=True if is_teacher else None,
        shard_placement_fn=partial(_placement, shards=mesh.shape[-1]),
    )
    for method in ("features", "last_attention"):
        register_fsdp_forward_method(network, method)


def _placement(parameter: nn.Parameter, *, shards: int) -> Shard | None:
    """Class token and positions are split by width, if it divides evenly; None: by the first dimension.

    Theirs is 1: split by it, one rank holds all, and FSDP pads the other ranks' shares of a gather to the same size.
    """
    even = parameter.shape[-1] % shards == 0
    return Shard(parameter.ndim - 1) if parameter.shape[0] == 1 and shards > 1 and even else None


def replicate_with_ddp(network: DinoNetwork, world: World) -> nn.Module:
    """The network under torch's DDP, for oss.

    `find_unused_parameters` keeps the buckets as they are first built: rebuilt after the first step they would sum in
    another order than in a resumed run.
    """
    if world.size == 1:
        return network
    return DistributedDataParallel(network, find_unused_parameters=True)


def forget_forwards(network: nn.Module) -> None:
    """Drop what FSDP notes of each forward for a backward: of a network that has none, the notes would pile up."""
    if isinstance(network, FSDPModule):
        network.reset_iter_state()


@contextmanager
def gradients_synchronised(network: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether the backward pass inside also sums gradients over ranks; off for all micro-batches but the last."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(network, DistributedDataParallel) and not enabled:
        with network.no_sync():
            yield
    else:
        yield
