"""Learning rate, weight decay, teacher momentum and temperature as functions of the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dino_dist.config import Config
from dino_dist.durations import Duration


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What the schedules say for one step; plain Python numbers."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    train_last_layer: bool


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up from 0, then half a cosine: `final + (base - final) (1 + cos(pi i / n)) / 2`, i = 0 .. n - 1.

    The warm-up's `warmup_steps` values run from 0 to `base`, both included, and the cosine never quite reaches `final`,
    as in the published code.
    """

    base: float
    final: float
    total_steps: int
    warmup_steps: int = 0

    def at(self, step: int) -> float:
        """The value at `step`, counted from 0; past the end, the last one."""
        step = min(step, self.total_steps - 1)
        if step < self.warmup_steps:
            return self.base * step / max(self.warmup_steps - 1, 1)
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class TeacherTemperature:
    """`num_stages` equal rises from `start` to `final`, then `final`; a stage lasts `images_per_stage` images.

    Published code moves once an epoch: a stage is then the data set; otherwise it is a batch.
    """

    start: float
    final: float
    num_stages: int
    images_per_stage: int
    batch_size: int

    @property
    def warmup_steps(self) -> int:
        """Steps before the last stage is over; 0 where nothing rises."""
        rises = self.start != self.final
        return math.ceil(self.num_stages * self.images_per_stage / self.batch_size) if rises else 0

    def at(self, step: int) -> float:
        """The value at `step`, counted from 0."""
        stage = step * self.batch_size // self.images_per_stage
        if stage >= self.num_stages:
            return self.final
        return self.start + (self.final - self.start) * stage / max(self.num_stages - 1, 1)


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """All schedules of a run."""

    total_steps: int
    lr: Cosine
    weight_decay: Cosine
    momentum: Cosine
    teacher_temp: TeacherTemperature
    freeze_last_layer_steps: int
    notes: tuple[str, ...] = ()
    """What resolving the durations had to change, to be said once."""

    def at(self, step: int) -> StepSettings:
        """Settings of the step that starts after `step` steps."""
        return StepSettings(
            lr=self.lr.at(step),
            weight_decay=self.weight_decay.at(step),
            momentum=self.momentum.at(step),
            teacher_temp=self.teacher_temp.at(step),
            train_last_layer=step >= self.freeze_last_layer_steps,
        )


def build_schedules(config: Config, dataset_size: int) -> Schedules:
    """Resolve every duration of the schedules for this data set; a warm-up longer than the run is cut, and noted."""
    batch_size = config.train.batch_size
    notes: list[str] = []

    def steps(text: str) -> int:
        return Duration.parse(text).steps(batch_size=batch_size, dataset_size=dataset_size)

    total_steps = max(steps(config.train.length), 1)
    warmup_steps = steps(config.optim.warmup)
    if warmup_steps >= total_steps:
        notes.append(
            f"optim.warmup={config.optim.warmup} ({warmup_steps} steps) cut to {total_steps - 1} of {total_steps} steps"
        )
        warmup_steps = total_steps - 1
    temp_length = Duration.parse(config.loss.warmup_teacher_temp_length)
    by_epoch = temp_length.unit == "ep"
    stages = math.ceil(temp_length.amount) if by_epoch else steps(config.loss.warmup_teacher_temp_length)
    lr_scale = batch_size / config.optim.lr_reference_batch
    return Schedules(
        total_steps=total_steps,
        lr=Cosine(
            base=config.optim.lr * lr_scale,
            final=config.optim.lr_final,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
        ),
        weight_decay=Cosine(
            base=config.optim.weight_decay, final=config.optim.weight_decay_final, total_steps=total_steps
        ),
        momentum=Cosine(base=config.ema.momentum, final=config.ema.momentum_final, total_steps=total_steps),
        teacher_temp=TeacherTemperature(
            start=config.loss.warmup_teacher_temp,
            final=config.loss.teacher_temp,
            num_stages=stages,
            images_per_stage=dataset_size if by_epoch else batch_size,
            batch_size=batch_size,
        ),
        freeze_last_layer_steps=steps(config.optim.freeze_last_layer),
        notes=tuple(notes),
    )
