"""This project's way of an image to its views, to be measured: the loader alone, with the renderer, and on CUDA.

The one place that follows the loader's and the renderer's interfaces; both are used as a training rank uses them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from bench_data_process import Stream

from dino_dist.config import Config
from dino_dist.data.loading.loader import Batch, make_loader
from dino_dist.data.order.training_set import open_training_set
from dino_dist.errors import UserError
from dino_dist.inputs import sample_reader, store_options
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

    On the CPU as users train there: with as many ranks as there are workers, each with one thread that decodes and
    `parallel.threads_per_rank` threads of torch.
    """
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device")
    device = torch.device(device_type)
    torch.set_num_threads(ours.config.parallel.threads_per_rank)

    def stream(num_workers: int) -> Generator[int, None, None]:
        if device_type == "cpu" and num_workers > 1:
            yield from _render_on_ranks(ours, num_workers)
        else:
            yield from _render(ours, device, num_workers)

    return stream


def _render(
    ours: Ours, device: torch.device, num_workers: int, rank: int = 0, size: int = 1
) -> Generator[int, None, None]:
    render = ViewRenderer(ours.config, device, torch.float32)
    with closing(_loader(ours, num_workers, device, rank, size)) as steps:
        for (batch,) in steps:
            views = render(batch)
            yield len(views.global_crops) // 2


def _render_on_ranks(ours: Ours, size: int) -> Generator[int, None, None]:
    """The batches of all ranks, once each has made its first."""
    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    for rank in range(size):
        receiving, sending = context.Pipe(duplex=False)
        processes.append(context.Process(target=_serve_rank, args=(sending, ours, rank, size)))
        processes[-1].start()
        sending.close()
        connections.append(receiving)
    try:
        yield sum(connection.recv() for connection in connections)
        while True:
            for ready in wait(connections):
                assert isinstance(ready, Connection)
                yield ready.recv()
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _serve_rank(connection: Connection, ours: Ours, rank: int, size: int) -> None:
    torch.set_num_threads(ours.config.parallel.threads_per_rank)
    for num_images in _render(ours, torch.device("cpu"), 1, rank, size):
        connection.send(num_images)


def _loader(
    ours: Ours, num_workers: int, device: torch.device, rank: int = 0, size: int = 1
) -> Generator[list[Batch], None, None]:
    config = ours.config
    store = store_options(config.data)
    training = open_training_set(config.data.train, fallback_dir=ours.index_dir, store=store)
    describe = ViewDescription(
        recipes=tuple(view_recipes(config.augment)),
        seed=config.run.seed,
        share_jitter=config.augment.share_jitter,
        drop_path_rates=(),
    )
    return make_loader(
        reader=sample_reader(training, config.data),
        order=training.order(seed=config.run.seed, shards_per_block=config.data.shards_per_block),
        batch_size=config.train.batch_size * size,
        rank=rank,
        size=size,
        start_step=0,
        stop_step=_ENDLESS,
        num_workers=num_workers,
        buffer_bytes=config.data.buffer_mib * 2**20,
        device=device,
        describe=describe,
    )
