"""What a run shows of itself: rows, alarms, pictures and the profiler, at the steps where they are due."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_dist.alarms import CollapseWatch
from dino_dist.config import Config
from dino_dist.dist import World
from dino_dist.eval.attention_maps import cls_attention_maps
from dino_dist.eval.features import LabelledFeatures
from dino_dist.eval.projector import THUMBNAIL_PX
from dino_dist.judging.evaluator import Evaluator
from dino_dist.ledger import JsonLines
from dino_dist.metrics import MetricsWriter
from dino_dist.progress import Progress
from dino_dist.run_session import RunSession
from dino_dist.schedules import Schedules
from dino_dist.step import DinoStep, Views

Row = Mapping[str, float | int | None]
_PROJECTED = 1000
"""Points in the projector at most."""


@contextmanager
def _deaf_terminal() -> Iterator[None]:
    """A log on a full disk, or a terminal that is gone, is no reason to end a run."""
    with suppress(OSError):
        yield


class Monitor:
    """Rank 0 writes; the other ranks make the same calls, since pictures need their shards of the networks."""

    def __init__(
        self, config: Config, world: World, session: RunSession, schedules: Schedules, *, every_pictures: int
    ) -> None:
        warmups = (
            *(schedules.lr.warmup_steps, schedules.teacher_temp.warmup_steps),
            schedules.freeze_last_layer_steps,
        )
        self.watch = CollapseWatch(num_prototypes=config.head.num_prototypes, warmup_steps=max(warmups))
        self._config = config
        self._world = world
        self._session = session
        self._every_pictures = every_pictures
        self._total_steps = schedules.total_steps
        self._progress = Progress(total_steps=schedules.total_steps) if world.is_first else None
        self._writer: MetricsWriter | None = None
        self._profiler: torch.profiler.profile | None = None

    def begin(self, steps_done: int, settings: Mapping[str, Any]) -> None:
        """Open the files, going on after `steps_done`."""
        self._writer = MetricsWriter(
            append=JsonLines(self._session.folder.metrics, self._session.attempt).append,
            tensorboard_dir=self._session.folder.tensorboard if self._config.metrics.tensorboard else None,
            purge_step=steps_done + 1 if steps_done else 0,
            world=self._world,
            progress=self._progress,
            exclusive=self._session.attempt.exclusive,
        )
        flat = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
        self._writer.hparams(flat, ["knn_top1", "loss"])

    def say(self, line: str) -> None:
        """One line for the person at the terminal, from rank 0."""
        if self._progress is not None:
            with _deaf_terminal():
                self._progress.say(line)

    def row(self, step: int, row: Row) -> None:
        """Write a row and raise the alarms that begin with it, in the ledger too."""
        assert self._writer is not None, "begin() comes first"
        with _deaf_terminal():
            self._writer.log(step, row)  # sees to its files, and tells the terminal last
        for alarm in self.watch.observe({"step": step, **row}):
            self.say(alarm.line)
            self._session.ledger_row("fault", step, alarm.line, alarm=alarm.name)

    def first_crops(self, step: int, views: Views) -> None:
        """The first crops that a start trains on, once a run."""
        if self._session.first_step or self._writer is None:
            return
        style = {"mean": self._config.data.mean, "std": self._config.data.std}
        self._writer.image_grid(step, "crops/global", views.global_crops[:16], **style)
        if views.local_crops is not None:
            self._writer.image_grid(step, "crops/local", views.local_crops[:32], **style)

    def pictures(self, step: int, training: DinoStep, pictured: Callable[[], Tensor]) -> None:
        """Histograms and the teacher's attention on a few fixed images [n, 3, C, C], where they are due."""
        if self._writer is None or not (step % self._every_pictures == 0 or step == self._total_steps):
            return
        self._writer.histogram(step, "health/center", training.centering.center_1K)
        self._writer.histogram(step, "health/prototype_usage", training.usage.share() * len(training.usage.average_K))
        images = pictured()
        with torch.no_grad(), training.autocast():
            attention = training.networks.teacher.last_attention(images)
        patches = self._config.eval.crop_px // self._config.model.patch_size
        maps = cls_attention_maps(attention, grid=(patches, patches))
        self._writer.attention(step, images, maps, mean=self._config.data.mean, std=self._config.data.std)

    def embedding(self, step: int, features: LabelledFeatures, evaluator: Evaluator) -> None:
        """Test features of the last evaluation in TensorBoard's projector; a collective, as all ranks read pictures."""
        assert self._writer is not None
        if not self._config.metrics.tensorboard:
            return
        rows = torch.linspace(0, len(features.ids_N) - 1, min(_PROJECTED, len(features.ids_N))).long()
        images = evaluator.thumbnails(features.ids_N[rows].tolist(), THUMBNAIL_PX)
        self._writer.embedding(step, features.features_ND[rows], features.labels_N[rows], images)

    def profile(self, step: int, start: int | None) -> None:
        """Trace the steps `start + 1 .. start + metrics.profile_steps` on rank 0 into the run folder."""
        if start is None or not self._world.is_first:
            return
        if step == start:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        elif self._profiler is not None and step >= start + self._config.metrics.profile_steps:
            self._profiler.stop()
            path = Path(self._session.folder.path) / f"profile-step-{start:08d}.json"
            self._profiler.export_chrome_trace(str(path))
            self._profiler = None
            self.say(f"profile of {self._config.metrics.profile_steps} steps in {path}")

    def close(self) -> None:
        """Close the files and leave the terminal in order."""
        if self._writer is not None:
            self._writer.close()
        elif self._progress is not None:
            self._progress.close()
