"""Features of image files that a list names: read, resized, put through a network, each rank a share of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dino_dist.config import Config, DataSection
from dino_dist.data.reading.decode import BadSample, Pixels, decode_image
from dino_dist.dist import World
from dino_dist.errors import UserError
from dino_dist.eval.features import Batch, extract
from dino_dist.inputs import decode_rules
from dino_dist.judging.evaluator import Tell, tell_nobody

View = Callable[[int, Pixels], Pixels]
"""The number of an image and its pixels [H, W, 3] -> those that the network is to see; `BadSample` if it cannot."""


def listed_features(
    forward: Callable[[Tensor], Tensor],
    files: Sequence[Path],
    view: View,
    config: Config,
    world: World,
    *,
    what: str = "images",
    tell: Tell = tell_nobody,
) -> Tensor:
    """`forward` ([b, 3, h, w], normalised -> [b, D]) of each file, [N, D] in their order, on all ranks; a collective.

    Views may differ in size: a batch holds those of one size that follow each other. `UserError` on all ranks for the
    first file that cannot be read, decoded or viewed: what is on a list is not replaced.
    """
    if not files:
        raise UserError(f"there are no {what}: give at least one")
    share = _Share(files, view, config, world)
    return extract(forward, _counted(share.batches(), what, len(files), world.size, tell), world).features_ND


def read_pixels(file: Path, data: DataSection) -> Pixels:
    """RGB pixels of an image file; `BadSample` with the reason if it cannot be read, is damaged or over a limit."""
    try:
        size_bytes = file.stat().st_size
        if size_bytes > data.max_member_mib * 2**20:
            raise BadSample(f"{size_bytes} bytes; data.max_member_mib is {data.max_member_mib:g}")
        return decode_image(file.read_bytes(), decode_rules(data))
    except OSError as error:
        raise BadSample(error.strerror or type(error).__name__) from None


class _Share:
    """This rank's part of the files."""

    def __init__(self, files: Sequence[Path], view: View, config: Config, world: World) -> None:
        self._files, self._view, self._config, self._world = files, view, config, world

    def batches(self) -> Iterator[Batch]:
        waiting: list[tuple[int, Pixels]] = []
        numbers = range(self._world.rank, len(self._files), self._world.size)
        views = _in_order(self._read, numbers, num_threads=self._config.data.num_workers)
        for number, pixels in views:
            full = len(waiting) == self._config.eval.batch_size
            if waiting and (full or waiting[0][1].shape != pixels.shape):
                yield self._batch(waiting)
                waiting = []
            waiting.append((number, pixels))
        if waiting:
            yield self._batch(waiting)

    def _read(self, number: int) -> tuple[int, Pixels]:
        file = self._files[number]
        try:
            return number, self._view(number, read_pixels(file, self._config.data))
        except BadSample as error:
            raise UserError(f"{file} cannot be used ({error}): mend it or take it off the list") from None

    def _batch(self, views: Sequence[tuple[int, Pixels]]) -> Batch:
        images = normalised(np.stack([pixels for _, pixels in views]), self._config, self._world.device)
        ids = torch.tensor([number for number, _ in views])
        return images, torch.full_like(ids, -1), ids


def normalised(pixels: Pixels, config: Config, device: torch.device) -> Tensor:
    """uint8 [n, h, w, 3] -> [n, 3, h, w] on the device, with data.mean and data.std."""
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).to(dtype).div_(255.0)
    mean, std = (
        torch.tensor(row, device=device, dtype=dtype).view(3, 1, 1) for row in (config.data.mean, config.data.std)
    )
    return images.sub_(mean).div_(std).contiguous()


def _in_order(
    read: Callable[[int], tuple[int, Pixels]], numbers: Iterable[int], *, num_threads: int
) -> Iterator[tuple[int, Pixels]]:
    """What `read` gives for each number, in order; threads are a few images ahead. Without threads: read here."""
    if not num_threads:
        yield from map(read, numbers)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        ahead: deque[Future[tuple[int, Pixels]]] = deque()
        try:
            for number in numbers:
                ahead.append(pool.submit(partial(read, number)))
                if len(ahead) > 2 * num_threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _counted(batches: Iterable[Batch], what: str, total: int, num_ranks: int, tell: Tell) -> Iterator[Batch]:
    """Tells of all ranks' images, as far as this one knows."""
    done = 0
    for batch in batches:
        yield batch
        done += len(batch[2])
        tell(what, min(total, done * num_ranks), total)
