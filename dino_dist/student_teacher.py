"""The student, its exponential moving average the teacher, and the replicas' agreement on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dino_dist.config import Config
from dino_dist.dist import World
from dino_dist.models.dino import DinoNetwork
from dino_dist.optim import local_shard
from dino_dist.parallelize import build_mesh, parallelize, replicate_with_ddp


class StudentTeacher:
    """Two networks of one architecture, sharded alike; only the student has gradients.

    `student_call` is what a step calls: the student itself, or its DDP wrapper.
    """

    def __init__(
        self, student: DinoNetwork, teacher: DinoNetwork, student_call: nn.Module, mesh: DeviceMesh | None
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.student_call = student_call
        self.mesh = mesh

    @cached_property
    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Shards of teacher and student, taken at the first update: building fairscale's OSS moves parameters."""
        return _local_pairs(self.student, self.teacher)

    @torch.no_grad()
    def update_teacher(self, momentum: float, accept: Tensor) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, on local shards, where `accept` (0 or 1) is 1.

        Written as teacher + w (student - teacher): at w = 0 nothing moves.
        """
        teacher, student = self._pairs
        change = torch._foreach_sub(student, teacher)
        torch._foreach_mul_(change, accept * (1.0 - momentum))
        torch._foreach_add_(teacher, change)

    @torch.no_grad()
    def teacher_drift(self) -> Tensor | None:
        """Largest difference (0-dim) between replicas' copies of the teacher; None where there is one copy.

        Replicas compute the same sums, so anything but 0 is a fault of a device.
        """
        group = self._replicate_group()
        if group is None:
            return None
        flat = torch.cat([shard.flatten() for shard in self._pairs[0]])
        largest, smallest = flat.clone(), flat
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=group)
        drift = (largest - smallest).abs().max() if flat.numel() else flat.new_zeros(())
        dist.all_reduce(drift, op=dist.ReduceOp.MAX)
        return drift

    @torch.no_grad()
    def take_first_replica(self) -> None:
        """Every replica takes replica 0's weights; averaging equal floats would change them.

        The student's too: a teacher that drifts may follow a student that differs. The optimizer's moments stay: under
        equal gradients they forget a difference by themselves, and what it does until then is seen at the next check.
        """
        group = self._replicate_group()
        if group is not None:
            for shard in (*self._pairs[0], *self._pairs[1]):
                dist.broadcast(shard, group=group, group_src=0)

    def mesh_groups(self) -> list[dist.ProcessGroup]:
        """The process groups of the mesh's axes; one of all ranks may be the world's own or another."""
        if self.mesh is None:
            return []
        return [self.mesh.get_group(axis) for axis in range(self.mesh.ndim)]

    def _replicate_group(self) -> dist.ProcessGroup | None:
        if self.mesh is not None:
            names = self.mesh.mesh_dim_names or ()
            return self.mesh.get_group("replicate") if "replicate" in names else None
        return dist.group.WORLD if isinstance(self.student_call, nn.parallel.DistributedDataParallel) else None

    def tensors(self) -> dict[str, Tensor]:
        """All weights by name (`student.*`, `teacher.*`), for checkpoints; to be filled in place on load."""
        tensors = {}
        for role, network in (("student", self.student), ("teacher", self.teacher)):
            for name, tensor in network.state_dict().items():
                tensors[f"{role}.{name}"] = tensor
        return tensors


def build_student_teacher(
    config: Config, make_network: Callable[[bool], DinoNetwork], world: World, compute_dtype: torch.dtype
) -> StudentTeacher:
    """Build both networks from the same initial weights, then shard both the same way.

    `make_network(is_teacher)` returns a network whose weights are a pure function of the seed. Each rank makes the
    whole network on the CPU and keeps its part, so the weights do not depend on the number of ranks.
    """
    student, teacher = make_network(False), make_network(True)
    missing = teacher.load_state_dict(student.state_dict(), strict=True)
    assert not missing.missing_keys
    teacher.requires_grad_(False)
    mesh = build_mesh(config.parallel, world)
    master_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
    for network, is_teacher in ((student, False), (teacher, True)):
        network.to(world.device, master_dtype)
        parallelize(
            network,
            config.parallel,
            mesh,
            compute_dtype=compute_dtype,
            compile_blocks=config.train.compile,
            is_teacher=is_teacher,
        )
    student_call = replicate_with_ddp(student, world) if config.parallel.strategy == "oss" else student
    return StudentTeacher(student, teacher, student_call, mesh)


def _local_pairs(student: nn.Module, teacher: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Teacher and student shards in the same order, checked to be laid out alike."""
    teacher_shards, student_shards = [], []
    for (name, ours), (other, theirs) in zip(teacher.named_parameters(), student.named_parameters(), strict=True):
        assert name == other, (name, other)
        assert ours.shape == theirs.shape, name
        if isinstance(ours, DTensor):
            assert ours.placements == cast(DTensor, theirs).placements, name
        teacher_shards.append(local_shard(ours.detach()))
        student_shards.append(local_shard(theirs.detach()))
    return teacher_shards, student_shards
