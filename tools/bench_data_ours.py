"""This project's way of an image to its views, to be measured: the loader alone, with the renderer, and on CUDA.

The one place that follows the loader's and the renderer's interfaces; both are used as a training rank uses them.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_data_process import Stream

from dino_dist.config import Config
from dino_dist.data.loading.loader import Batch, make_loader
from dino_dist.data.order.training_set import open_training_set
from dino_dist.data.reading.shard_bytes import ShardBytes
from dino_dist.data.reading.stream import SampleReader
from dino_dist.errors import UserError
from dino_dist.inputs import decode_rules, store_options
from dino_dist.views import ViewDescription, ViewRenderer, view_recipes

_ENDLESS = 10**9


@dataclass(frozen=True, kw_only=True)
class Ours:
    """What is read, and how it is rendered."""

    config: Config
    """Of a run on one rank: its data, augment.* and train.batch_size are used."""
    index_dir: Path


def open_decode_only(ours: Ours) -> Stream:
    """Read, decode, draw the crops, hand over the batch: all that the CPU does for a rank with a GPU."""

    def stream(num_workers: int) -> Generator[int, None, None]:
        with closing(_loader(ours, num_workers, torch.device("cpu"))) as steps:
            for (batch,) in steps:
                yield batch.num_images

    return stream


def open_render(ours: Ours, device_type: str) -> Stream:
    """The same and the views, rendered on a device; `UserError` where there is none of this type.

    As one rank does it, with its `parallel.threads_per_rank` threads of torch: on the CPU, further cores only decode.
    """
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device")
    device = torch.device(device_type)
    torch.set_num_threads(ours.config.parallel.threads_per_rank)

    def stream(num_workers: int) -> Generator[int, None, None]:
        render = ViewRenderer(ours.config, device, torch.float32)
        with closing(_loader(ours, num_workers, device)) as steps:
            for (batch,) in steps:
                views = render(batch)
                yield len(views.global_crops) // 2

    return stream


def _loader(ours: Ours, num_workers: int, device: torch.device) -> Generator[list[Batch], None, None]:
    config = ours.config
    store = store_options(config.data)
    training = open_training_set(config.data.train, fallback_dir=ours.index_dir, store=store)
    describe = ViewDescription(
        recipes=tuple(view_recipes(config.augment)),
        seed=config.run.seed,
        share_jitter=config.augment.share_jitter,
        drop_path_rates=(),
    )
    source = ShardBytes(dataset=training.dataset, options=store)
    return make_loader(
        reader=SampleReader(dataset=training.dataset, rules=decode_rules(config.data), source=source),
        order=training.order(seed=config.run.seed, shards_per_block=config.data.shards_per_block),
        batch_size=config.train.batch_size,
        rank=0,
        size=1,
        start_step=0,
        stop_step=_ENDLESS,
        num_workers=num_workers,
        buffer_bytes=config.data.buffer_mib * 2**20,
        device=device,
        describe=describe,
    )
