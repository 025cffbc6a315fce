"""One step of DINO: the paper's algorithm 1 over ranks, micro-batches and shards, without waiting for the device.

But for oss on CUDA: fairscale's optimizer waits for the device when it hands the new weights round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from dino_dist.centering import Centering
from dino_dist.config import Config
from dino_dist.dist import World
from dino_dist.health import PrototypeUsage
from dino_dist.losses import dino_loss
from dino_dist.optim import ShardedParameters, apply_settings, build_optimizer, clip_, optimizer_tensors, squared_norms
from dino_dist.parallelize import forget_forwards, gradients_synchronised, num_replicas
from dino_dist.schedules import StepSettings
from dino_dist.student_teacher import StudentTeacher


@dataclass(frozen=True, kw_only=True)
class Views:
    """The crops of n images on this rank, crop-major: all of view 0, then all of view 1, and so on."""

    global_crops: Tensor
    """[2 n, 3, H, W]: both global views."""
    local_crops: Tensor | None
    """[L n, 3, h, w], or None without local views."""
    drop_path: Tensor | None = None
    """[depth, 2, (2 + L) n] factors for the branches of the student's blocks."""
    plain_global_crops: Tensor | None = None
    """The global crops without any change of colour, for a teacher that sees no others; None: it sees the student's."""

    @property
    def num_images(self) -> int:
        """n"""
        return self.global_crops.shape[0] // 2

    @property
    def teacher_crops(self) -> Tensor:
        """What the teacher sees: [2 n, 3, H, W]."""
        return self.global_crops if self.plain_global_crops is None else self.plain_global_crops

    @property
    def student_crops(self) -> list[Tensor]:
        """What the student sees, one tensor a resolution."""
        return [self.global_crops] if self.local_crops is None else [self.global_crops, self.local_crops]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step leaves on the device, the same on all ranks; reading it waits for the device."""

    loss: Tensor
    """Mean over the batch (0-dim)."""
    teacher_entropy: Tensor
    """Mean entropy of the targets in nats (0-dim)."""
    accepted: Tensor
    """1 if loss and gradients were finite; else 0, and nothing was changed (0-dim)."""
    grad_norms_P: Tensor
    """Norm of every trainable parameter's gradient before clipping, in the order of `ShardedParameters.names`."""
    flags_F: Tensor
    """The flags of all ranks, added up."""


class DinoStep:
    """Networks, center and optimizer, and the one way in which they change."""

    def __init__(
        self,
        config: Config,
        networks: StudentTeacher,
        world: World,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.networks = networks
        self.parameters = ShardedParameters(networks.student)
        dtype, device = self.parameters.shards[0].dtype, world.device
        self.centering = Centering(
            config.head.num_prototypes, momentum=config.loss.center_momentum, device=device, dtype=dtype
        )
        self.usage = PrototypeUsage(config.head.num_prototypes, device=device)
        self._world = world
        self._replicas = num_replicas(config.parallel, world)
        self.update = build_optimizer(
            self.parameters, config.optim, self._sum_over_shards, oss=config.parallel.strategy == "oss"
        )
        self._batch_size = config.train.batch_size
        self._student_temp = config.loss.student_temp
        self._clip, self._clip_scope = config.optim.clip, config.optim.clip_scope
        self.autocast = autocast

    def __call__(
        self, micro_batches: Sequence[Callable[[], Views]], settings: StepSettings, flags_F: Tensor
    ) -> StepResult:
        """One step over this rank's micro-batches, each rendered when it is its turn.

        `flags_F`: numbers of this rank whose sum all ranks want to know; they travel with the loss.
        """
        parts = []
        for index, render in enumerate(micro_batches):
            with gradients_synchronised(self.networks.student_call, index == len(micro_batches) - 1):
                parts.append(self._forward_backward(render(), settings.teacher_temp))
        forget_forwards(self.networks.teacher)
        means_2K = self._world.all_reduce_sum_(self.centering.take_sums()) / (2 * self._batch_size)
        with torch.no_grad():
            gradients = self.parameters.load_gradients()
            # The one word of a step: whatever is bad on any rank makes the total bad on all of them, before the update.
            # Replicas hold the same gradients, so each adds its share of the squares.
            word = torch.cat([reduce(torch.add, parts), flags_F, squared_norms(gradients) / self._replicas])
            word = self._world.all_reduce_sum_(word)
            norms_P = word[2 + len(flags_F) :].sqrt()
            finite = torch.isfinite(word.sum())
            accepted = finite.to(word.dtype)

            clip_(gradients, norms_P, largest=self._clip, scope=self._clip_scope)
            if not settings.train_last_layer:
                self.parameters.drop_prototype_gradients()
            apply_settings(self.update, settings)
            self.update.step(found_inf=(~finite).to(torch.float32))
            self.parameters.clear_gradients()
            self.networks.update_teacher(settings.momentum, accepted)
            mean_logits_K, mean_target_K = means_2K.unbind()
            self.centering.update(mean_logits_K, finite)
            self.usage.update_(torch.where(finite, mean_target_K, self.usage.average_K))
        return StepResult(
            loss=word[0],
            teacher_entropy=word[1],
            accepted=accepted,
            grad_norms_P=norms_P,
            flags_F=word[2 : 2 + len(flags_F)],
        )

    def _forward_backward(self, views: Views, teacher_temp: float) -> Tensor:
        """Gradients of this rank's part of the mean loss; returns its part of [loss, teacher entropy]."""
        with torch.no_grad(), self.autocast():
            teacher_logits = self.networks.teacher([views.teacher_crops])
        targets_NK = self.centering.targets(teacher_logits, teacher_temp)
        target_GBK = targets_NK.view(2, views.num_images, -1)
        with self.autocast():
            student_logits = self.networks.student_call(views.student_crops, views.drop_path)
        student_SBK = student_logits.view(-1, views.num_images, student_logits.shape[-1])
        loss = dino_loss(student_SBK, target_GBK, student_temp=self._student_temp) / self._batch_size
        # Gradients are averaged over ranks; the mean over the batch is their sum.
        (loss * self._world.size).backward()  # type: ignore[no-untyped-call]
        entropy = torch.special.entr(target_GBK).sum() / (2 * self._batch_size)
        return torch.stack([loss.detach(), entropy])

    def _sum_over_shards(self, squares: Tensor) -> Tensor:
        if self.networks.mesh is None:  # every rank holds whole parameters, and with oss updates others than its peers
            return squares
        return self._world.all_reduce_sum_(squares / self._replicas)

    def tensors(self) -> dict[str, Tensor]:
        """The whole state by name, sharing memory with it: what a checkpoint holds and a load fills in place."""
        return {
            **self.networks.tensors(),
            "center": self.centering.center_1K,
            "prototype_usage": self.usage.average_K,
            **optimizer_tensors(self.update.inner, self.parameters),
        }
