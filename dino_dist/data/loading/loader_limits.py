"""What bounds the images a second that a rank's loader can give: said at the start, from a few images measured then."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from math import ceil

from dino_dist.data.order.order import SampleOrder
from dino_dist.data.reading.stream import SampleReader

_MEASURED_IMAGES = 32
_SEARCHED_POSITIONS = 1024
"""Among which they are looked for."""


@dataclass(frozen=True, kw_only=True)
class ImageCost:
    """What an image of the data costs, on average over a few."""

    decode_s: float
    """Of one core, for its bytes to be there and to become pixels."""
    pixel_bytes: float
    """Decoded."""


def measure_images(reader: SampleReader, order: SampleOrder, *, position: int = 0) -> ImageCost:
    """Read and decode a few images in the calling thread: those next in the stream from `position` on that lie in the
    first one's shard, so that a store is asked for no other. Errors as in `SampleReader`.

    Only the time that this thread spends on a core counts: not waiting for a disk or a store, which is not what threads
    are scarce for, nor the work of other threads, such as those that fetch from a store.
    """
    stop = position + min(_SEARCHED_POSITIONS, order.samples_per_epoch)
    stream_ids = order.ids(position, stop).sample_ids
    shards, _ = reader.dataset.locate(stream_ids)
    ids = stream_ids[shards == shards[0]][:_MEASURED_IMAGES].tolist()
    reader.read(ids[0])  # opens files
    start_s = time.thread_time()
    pixel_bytes = sum(reader.read(sample_id).pixels.nbytes for sample_id in ids)
    return ImageCost(decode_s=(time.thread_time() - start_s) / len(ids), pixel_bytes=pixel_bytes / len(ids))


def usable_cores() -> set[int]:
    """Numbers of the CPU cores that this process may run on."""
    return os.sched_getaffinity(0)


def limits_line(
    cost: ImageCost, *, num_workers: int, cores: int, ranks: int, images_per_step: float, buffer_bytes: int
) -> str:
    """One line on what limits a rank's loader.

    `cores`: those that the `ranks` ranks of a node share. `images_per_step`: of one rank.
    """
    measured = f"one image takes {cost.decode_s * 1e3:.1f} ms of a core to read and decode"
    threads = max(1, num_workers)
    usable = min(threads, cores / ranks)
    rate = f"{_rounded(usable / cost.decode_s)} images/s a rank"
    where = f"{_counted(cores, 'core')}, {_counted(ranks, 'rank')}"
    if not num_workers:
        return f"data: {measured}; training itself does, as data.num_workers=0, at {rate} and no more ({where})"
    limit = "threads, data.num_workers" if threads <= cores / ranks else "cores"
    step_bytes = images_per_step * cost.pixel_bytes
    held = buffer_bytes / step_bytes
    steps = f"about {_counted(int(held), 'step')}" if held >= 1 else f"only {held:.0%} of a step"
    return (
        f"data: {measured}; {_counted(threads, 'thread')} may give at most {rate} ({where}: limited by {limit}); "
        f"buffer {buffer_bytes / 2**20:.0f} MiB holds {steps} of {ceil(step_bytes / 2**20)} MiB"
    )


def _rounded(rate: float) -> str:
    """Two digits are more than such a measurement is worth."""
    digits = max(0, len(str(int(rate))) - 2)
    return f"{round(rate, -digits):,.0f}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
