"""What the images of a data set cost: a random sample read and decoded with a stopwatch, rendered, and loaded."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch

from dino_dist.config import Config
from dino_dist.data.crops.augment import MultiCropRenderer
from dino_dist.data.loading.loader import make_loader
from dino_dist.data.order.order import StreamIds
from dino_dist.data.order.training_set import TrainingSet
from dino_dist.data.reading.decode import BadSample, DecodeRules, Pixels, decode_image, image_format
from dino_dist.data.reading.shard_bytes import ShardBytes
from dino_dist.data.reading.stream import BadRecord
from dino_dist.data.shards.index import DatasetIndex
from dino_dist.data.shards.tar_members import printable
from dino_dist.inputs import decode_rules, sample_reader, store_options
from dino_dist.views import ViewDescription, render_rules, view_recipes

_SEED = 0
_RENDERED = 16
"""Images that are rendered, at most; a CPU needs some tens of milliseconds for each."""
_RENDERED_BYTES = 2**28
"""Above this much of decoded images, fewer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LookedAt:
    """What came of each image; the lists of the usable ones go together."""

    bad: list[BadRecord] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    sizes_px: list[tuple[int, int]] = field(default_factory=list)
    """Height and width."""
    image_bytes: list[int] = field(default_factory=list)
    read_s: list[float] = field(default_factory=list)
    """By the wall clock."""
    decode_s: list[float] = field(default_factory=list)
    """CPU time."""
    core_s: list[float] = field(default_factory=list)
    """CPU time of reading and decoding."""
    pixels: list[Pixels] = field(default_factory=list)
    """Some decoded images, to be rendered."""


def look_at(training: TrainingSet, config: Config, *, count: int) -> LookedAt:
    """Read and decode `count` samples of an epoch, or all if there are fewer, at positions that a fixed seed draws.

    So the sets of a mixture take their shares. `UserError` if a shard is gone, has changed, or its store refuses.
    """
    order = training.order(seed=config.run.seed, shards_per_block=config.data.shards_per_block)
    size = min(count, training.num_samples)
    positions = np.random.default_rng(_SEED).choice(training.num_samples, size, replace=False)
    looked, rules = LookedAt(), decode_rules(config.data)
    source = ShardBytes(dataset=training.dataset, options=store_options(config.data))
    try:
        for position in sorted(positions.tolist()):  # the order works block by block
            sample_id = int(order.ids(position, position + 1).sample_ids[0])
            _look_at_one(looked, training.dataset, source, sample_id, rules)
    finally:
        source.close()
    return looked


def _look_at_one(
    looked: LookedAt, dataset: DatasetIndex, source: ShardBytes, sample_id: int, rules: DecodeRules
) -> None:
    shard = dataset.locate_one(sample_id)
    record = dataset.records(shard)[sample_id - int(dataset.first_ids[shard])]
    offset, size, crc32 = int(record["offset"]), int(record["size"]), int(record["crc32"])
    try:
        if size > rules.max_member_bytes:
            raise BadSample(f"{size} bytes; at most {rules.max_member_bytes}")
        started_s, started_core_s = time.perf_counter(), time.process_time()
        data = source.read(shard, offset, size, crc32)
        read_s, read_core_s = time.perf_counter() - started_s, time.process_time()
        pixels = decode_image(data, rules)
        ended_core_s = time.process_time()
        kind = image_format(data)
    except BadSample as error:
        key = printable(bytes(record["key"]))
        name = dataset.shards[shard].name
        looked.bad.append(BadRecord(sample_id=sample_id, shard=name, key=key, reason=str(error)))
        return
    looked.formats[kind] += 1
    looked.sizes_px.append(pixels.shape[:2])
    looked.image_bytes.append(size)
    looked.read_s.append(read_s)
    looked.decode_s.append(ended_core_s - read_core_s)
    looked.core_s.append(ended_core_s - started_core_s)
    if len(looked.pixels) < _RENDERED and sum(kept.nbytes for kept in looked.pixels) < _RENDERED_BYTES:
        looked.pixels.append(pixels)


def render_core_s(images: Sequence[Pixels], config: Config) -> float:
    """CPU seconds of all views of an image, rendered in batches on one thread; the second pass of two counts."""
    count = len(images)
    sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
    ids = StreamIds(
        epochs=np.zeros(count, dtype=np.int64),
        sample_ids=np.arange(count, dtype=np.int64),
        repeats=np.zeros(count, dtype=np.int64),
    )
    describe = _description(config)
    renderer = MultiCropRenderer(view_recipes(config.augment), rules=render_rules(config), device=torch.device("cpu"))
    pixels = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = []
        for _ in range(2):
            started_s = time.process_time()
            renderer(pixels, torch.from_numpy(sizes), describe(ids, sizes)["crops"])
            seconds.append(time.process_time() - started_s)
    finally:
        torch.set_num_threads(threads)
    return seconds[-1] / count


def _description(config: Config) -> ViewDescription:
    return ViewDescription(
        recipes=tuple(view_recipes(config.augment)),
        seed=config.run.seed,
        share_jitter=config.augment.share_jitter,
        drop_path_rates=(),
    )


def measure_loader(
    training: TrainingSet, config: Config, num_threads: int, *, image_bytes: float, least_s: float
) -> float:
    """Images a second that the loader hands over to a consumer that does nothing else, after its first batches.

    In batches of which the buffer holds four at least, so that reading goes on ahead.
    """
    batch_size = max(1, min(config.train.batch_size, int(config.data.buffer_mib * 2**20 / (4 * image_bytes))))
    steps = make_loader(
        reader=sample_reader(training, config.data),
        order=training.order(seed=config.run.seed, shards_per_block=config.data.shards_per_block),
        batch_size=batch_size,
        rank=0,
        size=1,
        start_step=0,
        stop_step=10**9,
        num_workers=num_threads,
        buffer_bytes=config.data.buffer_mib * 2**20,
        describe=_description(config),
    )
    with closing(steps):
        for _ in range(2):
            next(steps)
        images, started_s, passed_s = 0, time.perf_counter(), 0.0
        while not images or passed_s < least_s:
            images += sum(batch.num_images for batch in next(steps))
            passed_s = time.perf_counter() - started_s
        return images / passed_s
