"""The one place where numbers leave a run: rows of metrics.jsonl and their TensorBoard, one curve over all restarts."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dino_dist.dist import World
from dino_dist.errors import Superseded
from dino_dist.eval import attention_maps, projector
from dino_dist.progress import Progress

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Value = float | int | None
HParam = bool | int | float | str | None

_GROUPS: Mapping[str, tuple[str, ...]] = {
    "train": ("loss", "kl", "images_seen", "epoch"),
    "optim": ("lr", "weight_decay", "momentum", "teacher_temp", "grad_norm"),
    "health": (
        "teacher_entropy",
        "center_norm",
        "prototype_perplexity",
        "live_prototypes",
        "top_share",
        "teacher_drift",
        "skipped_steps",
        "bad_samples",
    ),
    "store": (
        "rank0_store_retries",
        "rank0_store_read_gib",
        "rank0_cache_hits",
        "rank0_cache_fills",
        "rank0_cache_evictions",
        "rank0_uncached_reads",
    ),
    "speed": ("images_per_s", "data_wait", "step_s", "peak_memory_gib", "host_memory_gib", "save_s"),
}
_EVENT_FILE_PREFIX = "events.out.tfevents."


def tensorboard_tag(key: str) -> str:
    """The TensorBoard tag of a row's key: `loss` -> `train/loss`, `knn_*` -> `eval/knn_*`; one with a slash stays."""
    if "/" in key:
        return key
    if key.startswith(("knn_", "linear_")):
        return f"eval/{key}"
    return f"{next((group for group, keys in _GROUPS.items() if key in keys), 'train')}/{key}"


class MetricsWriter:
    """Writes rows, pictures and histograms on rank 0; the same calls do nothing on the other ranks.

    `append` adds one row to metrics.jsonl (fenced: it raises `Superseded` in a process that must not write any more,
    and it comes before TensorBoard for that reason). `purge_step` is the first step that is going to be written again:
    the restored step + 1, or 0 when a run starts over; TensorBoard drops what an earlier attempt wrote from there on.
    None in an empty folder. A disk that is full or gone does not end a run: rows wait in memory and are tried again,
    and TensorBoard stops until the next start; each is said once, as an error.
    """

    def __init__(
        self,
        *,
        append: Callable[[dict[str, object]], None],
        tensorboard_dir: Path | None,
        purge_step: int | None,
        world: World,
        progress: Progress | None = None,
        exclusive: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`exclusive`: the run folder's lock; what TensorBoard gets is on the disk before it is let go."""
        self._exclusive = exclusive
        self._active = world.is_first
        self._append = append
        self._waiting_rows: list[dict[str, object]] = []
        self._dir = tensorboard_dir
        self._progress = progress if self._active else None
        self._board: SummaryWriter | None = None
        if self._active and tensorboard_dir is not None:
            self._board = _open_board(tensorboard_dir, purge_step)

    def log(self, step: int, row: Mapping[str, Value]) -> None:
        """One row: to metrics.jsonl at full precision, to TensorBoard under its tags, to the progress line.

        A number that is not finite is null in the JSON row, which names it under `non_finite`; TensorBoard gets it as
        it is. Null values and absent ones mean "not measured". Flushed, so that a checkpoint never outlives its row.
        """
        if not self._active:
            return
        self._write_row(json_row(step, row))
        self._to_board(lambda board: _add_scalars(board, step, row))
        if self._progress is not None:
            self._progress.update(step, row)

    def image_grid(self, step: int, tag: str, images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> None:
        """A grid of normalised images [N, 3, h, w], shown with their normalisation undone."""
        if self._active:
            pixels = attention_maps.to_unit_range(images, mean=mean, std=std)
            picture = attention_maps.picture_sheet(pixels, columns=math.ceil(math.sqrt(len(pixels))))
            self._to_board(lambda board: board.add_image(tag, picture, step))

    def attention(
        self, step: int, images: Tensor, maps: Tensor, *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        """Attention of the CLS token, maps [N, heads, h, w] of normalised images [N, 3, H, W]: one row an image."""
        if self._active:
            pixels = attention_maps.to_unit_range(images, mean=mean, std=std)
            picture = attention_maps.attention_sheet(pixels, maps)
            self._to_board(lambda board: board.add_image("attention/cls", picture, step))

    def histogram(self, step: int, tag: str, values: Tensor) -> None:
        """A histogram of all finite elements; nothing where there is none (a host copy: on log steps only)."""
        if self._active:
            flat = values.detach().float().flatten().cpu()
            finite = flat[torch.isfinite(flat)]
            if finite.numel():
                self._to_board(lambda board: board.add_histogram(tag, finite, step))

    def embedding(
        self,
        step: int,
        features: Tensor,
        labels: Tensor,
        images: Tensor | None = None,
        *,
        max_points: int = 1000,
    ) -> None:
        """Features [N, D], labels [N], images [N, 3, h, w] in [0, 1] for the projector; replaces the last ones."""
        directory = self._dir
        if self._active and directory is not None:
            chosen = torch.linspace(0, len(features) - 1, min(max_points, len(features))).long()
            self._to_board(
                lambda _: projector.write_projector(
                    directory,
                    features=features[chosen.to(features.device)],
                    labels=labels[chosen.to(labels.device)],
                    images=None if images is None else images[chosen.to(images.device)],
                    name=f"step-{step:08d}",
                )
            )

    def hparams(self, config: Mapping[str, HParam], metric_keys: Sequence[str]) -> None:
        """Enter the run, with its flat config, in the HParams table; its metrics are the last points of logged keys.

        Call it at the start: the table follows the curves (`knn_top1`, say), so a killed run shows its last value.
        """
        if self._active:
            flat = {name: str(value) if isinstance(value, bool) else value for name, value in config.items()}
            self._to_board(lambda board: _add_hparams(board, flat, metric_keys))

    def close(self) -> None:
        """Write what waits and close the files. `OSError` if rows of metrics.jsonl could not be written to the end."""
        if self._progress is not None:
            self._progress.close()
        with suppress(Superseded):  # nothing waits in it: every write was flushed
            self._to_board(lambda board: board.close())
        self._board = None
        while self._waiting_rows:
            self._append(self._waiting_rows[0])
            del self._waiting_rows[0]

    def _write_row(self, row: dict[str, object]) -> None:
        self._waiting_rows.append(row)
        try:
            while self._waiting_rows:
                self._append(self._waiting_rows[0])
                del self._waiting_rows[0]
        except OSError as error:
            if len(self._waiting_rows) == 1:
                logging.getLogger(__name__).error(
                    "metrics.jsonl cannot be written (%s): rows wait in memory, training goes on", error
                )

    def _to_board(self, write: Callable[[SummaryWriter], object]) -> None:
        if self._board is None:
            return
        try:
            with self._exclusive():
                write(self._board)
                self._board.flush()
        except OSError as error:
            logging.getLogger(__name__).error(
                "%s cannot be written (%s): no TensorBoard until the next start", self._dir, error
            )
            self._board = None


def json_row(step: int, row: Mapping[str, Value]) -> dict[str, object]:
    """The row as metrics.jsonl keeps it: `step` first, null and an entry in `non_finite` for NaN and infinities.

    `TypeError` for a value that is no plain number: a tensor here would be a hidden synchronisation.
    """
    given: Mapping[str, object] = row
    bad = [key for key, value in given.items() if not isinstance(value, int | float | None)]
    if bad:
        raise TypeError(f"metrics take int, float or None, not {type(row[bad[0]]).__name__} ({bad[0]})")
    non_finite = [key for key, value in row.items() if value is not None and not math.isfinite(value)]
    clean: dict[str, object] = {"step": step}
    clean.update((key, None if key in non_finite else value) for key, value in row.items())
    if non_finite:
        clean["non_finite"] = non_finite
    return clean


def _open_board(directory: Path, purge_step: int | None) -> SummaryWriter | None:
    # Imported here: it costs a second that the other ranks and the tests of the rest need not pay.
    from torch.utils.tensorboard import SummaryWriter

    try:
        directory.mkdir(parents=True, exist_ok=True)
        order_event_files(directory, now_s=int(time.time()))
        return SummaryWriter(log_dir=str(directory), purge_step=purge_step)
    except OSError as error:
        logging.getLogger(__name__).error(
            "%s cannot be written (%s): no TensorBoard until the next start", directory, error
        )
        return None


def order_event_files(directory: Path, *, now_s: int) -> None:
    """Rename event files of earlier attempts that would be read after one that starts now (seconds since 1970).

    Readers take event files in the order of their names, which begin with the second of their creation, and the mark
    that drops replayed steps works only on what was read before it. A restart within the same second, or on a node
    whose clock is behind, would leave both curves.
    """
    late: list[Path] = []
    for path in sorted(directory.glob(f"{_EVENT_FILE_PREFIX}*")):
        stamp, _, _ = path.name.removeprefix(_EVENT_FILE_PREFIX).partition(".")
        if stamp.isdecimal() and int(stamp) >= now_s - 1:
            late.append(path)
    for index, path in enumerate(late):
        # '-' sorts before '.', so these come before any other file of the same second, in their own order.
        _, _, rest = path.name.removeprefix(_EVENT_FILE_PREFIX).partition(".")
        os.rename(path, directory / f"{_EVENT_FILE_PREFIX}{now_s - 1:010d}-{index:04d}.{rest}")


def _add_scalars(board: SummaryWriter, step: int, row: Mapping[str, Value]) -> None:
    for key, value in row.items():
        if value is not None:
            board.add_scalar(tensorboard_tag(key), value, step)


def _add_hparams(board: SummaryWriter, config: dict[str, HParam], metric_keys: Sequence[str]) -> None:
    # `SummaryWriter.add_hparams` would open a second event file and repeat the metrics as points of their own.
    from torch.utils.tensorboard.summary import hparams

    metrics: dict[str, float] = {tensorboard_tag(key): 0.0 for key in metric_keys}
    event_file: Any = board.file_writer
    for summary in hparams(config, metrics):  # type: ignore[no-untyped-call]
        event_file.add_summary(summary)
