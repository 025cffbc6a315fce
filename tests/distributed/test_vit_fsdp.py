"""A sharded backbone answers like a whole one at all of its entry points, also in turn and again."""

from __future__ import annotations

import multiprocessing
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from dino_dist.models.vit import VisionTransformer, ViTShape

SHAPE = ViTShape(embed_dim=24, depth=4, num_heads=3, patch_size=4, image_px=16)


def differences(blocks_per_group: int, world_size: int) -> list[float]:
    """Largest absolute difference of sharded and whole, for each call of two rounds."""
    torch.manual_seed(0)
    whole = VisionTransformer(SHAPE, "sdpa").double()
    torch.manual_seed(0)
    sharded = VisionTransformer(SHAPE, "sdpa").double()
    mesh = init_device_mesh("cpu", (world_size,))
    blocks = list(sharded.blocks)
    for start in range(0, len(blocks), blocks_per_group):
        fully_shard(blocks[start : start + blocks_per_group], mesh=mesh, reshard_after_forward=True)
    fully_shard(sharded, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(sharded, "features")
    register_fsdp_forward_method(sharded, "last_attention")
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    small = torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    found: list[float] = []
    for _ in range(2):
        with torch.no_grad():
            found.append(float((sharded.last_attention(images) - whole.last_attention(images)).abs().max()))
            found.append(float((sharded.features(images)[0] - whole.features(images)[0]).abs().max()))
        ours, reference = sharded([images, small]), whole([images, small])
        found.append(float((ours - reference).detach().abs().max()))
        ours.square().sum().backward()
    return found


def rank_main(rank: int, world_size: int, store_path: str, blocks_per_group: int, results: Connection) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=dist.FileStore(store_path, world_size), rank=rank, world_size=world_size)
        results.send(differences(blocks_per_group, world_size))
        dist.destroy_process_group()
    except Exception:
        results.send(traceback.format_exc())
        raise


@pytest.mark.distributed
@pytest.mark.parametrize("blocks_per_group", [1, 2])
def test_sharded_is_whole_at_every_entry_point(blocks_per_group: int, tmp_path: Path) -> None:
    world_size = 2
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    ranks = [
        context.Process(
            target=rank_main, args=(rank, world_size, str(tmp_path / "store"), blocks_per_group, pipes[rank][1])
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        for receiver, _ in pipes:
            assert receiver.poll(60), "a rank did not answer"
            found = receiver.recv()
            assert not isinstance(found, str), found
            assert len(found) == 6
            assert max(found) <= 1e-12
        for process in ranks:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in ranks:
            process.kill()
