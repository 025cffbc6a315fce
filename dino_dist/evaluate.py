"""k-NN of a network on labelled shards: reading, the view of evaluation, features on all ranks, the vote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dino_dist.config import Config
from dino_dist.data.crops.augment import resize_for_eval
from dino_dist.data.loading.batch import Batch
from dino_dist.data.loading.loader import make_loader, read_batch
from dino_dist.data.order.order import Order
from dino_dist.data.reading.stream import SampleReader
from dino_dist.dist import World
from dino_dist.errors import StopAsked
from dino_dist.eval.features import LabelledFeatures, extract, go_on
from dino_dist.eval.knn import KnnAccuracy, knn_accuracy
from dino_dist.inputs import labelled_set, sample_reader
from dino_dist.models.dino import DinoNetwork
from dino_dist.models.vit import VisionTransformer

Forward = Callable[[Tensor], Tensor]
Autocast = Callable[[], AbstractContextManager[None]]


def cls_forward(network: DinoNetwork | VisionTransformer, autocast: Autocast = nullcontext) -> Forward:
    """The normed class token of the last block: what the published k-NN compares."""

    def forward(images: Tensor) -> Tensor:
        with autocast():
            return network.features(images)[-1][:, 0]

    return forward


def raw_pixels(images: Tensor) -> Tensor:
    """The images themselves: what any learned feature has to beat."""
    return images.flatten(1)


class Evaluator:
    """Labelled train and test shards of a config, opened once, evaluated as often as asked."""

    def __init__(self, config: Config, world: World, index_dir: Path, stop_word: Callable[[], int] = go_on) -> None:
        """`UserError` if `data.eval_train` and `data.eval_test` are not both given and readable.

        `stop_word`: asked before each batch; once it is not 0 on a rank, `StopAsked` ends the evaluation on all.
        """
        train, test = config.data.eval_train, config.data.eval_test
        assert train is not None, "checked with the config"
        assert test is not None, "checked with the config"
        self._config = config
        self._world = world
        self._stop_word = stop_word
        # For good: a reader holds open files, which are not to be opened again at each evaluation.
        self._readers = {
            split: sample_reader(
                world.first(partial(labelled_set, spec, config.data, index_dir, self._stop_if_asked)), config.data
            )
            for split, spec in (("train", train), ("test", test))
        }

    def knn(self, forward: Forward) -> tuple[dict[int, KnnAccuracy], LabelledFeatures]:
        """Accuracy for each `eval.knn_k`, and the test features, the same on all ranks; a collective."""
        train, test = self.features(forward, "train"), self.features(forward, "test")
        section = self._config.eval
        accuracies = knn_accuracy(
            train.features_ND,
            train.labels_N,
            test.features_ND,
            test.labels_N,
            k=section.knn_k,
            temperature=section.knn_temperature,
            world=self._world,
        )
        return accuracies, test

    def features(self, forward: Forward, split: str) -> LabelledFeatures:
        """Features of one split (`train` or `test`), ordered by sample id; a collective."""
        return extract(forward, self._batches(self._readers[split]), self._world, self._stop_word)

    def _stop_if_asked(self) -> None:
        if self._stop_word():
            raise StopAsked(self._stop_word())

    def images(self, sample_ids: list[int]) -> Tensor:
        """Some test images as evaluation sees them: normalised [n, 3, C, C] on the device."""
        return fixed_images(self._readers["test"], sample_ids, self._config, self._world.device)

    def _batches(self, reader: SampleReader) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This rank's part: whole batches through the loader's workers, then its share of the rest."""
        config, world, dataset = self._config, self._world, reader.dataset
        order = Order(shard_counts=dataset.shard_counts, seed=0, shards_per_block=1)
        batch_size = min(config.eval.batch_size * world.size, dataset.num_samples)
        full_steps = dataset.num_samples // batch_size
        if full_steps and batch_size >= world.size:
            loader = make_loader(
                reader=reader,
                order=order,
                batch_size=batch_size,
                rank=world.rank,
                size=world.size,
                start_step=0,
                stop_step=full_steps,
                num_workers=config.data.num_workers,
                buffer_bytes=config.data.buffer_mib * 2**20,
                device=world.device,
            )
            for (batch,) in loader:
                yield self._prepared(batch)
        else:
            full_steps = 0
        rest = range(full_steps * batch_size, dataset.num_samples)[world.rank :: world.size]
        for position in rest:
            yield self._prepared(read_batch(reader, order.ids(position, position + 1), device=world.device))

    def _prepared(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        section, data = self._config.eval, self._config.data
        images = resize_for_eval(
            batch.pixels,
            batch.sizes,
            resize_px=section.resize_px,
            crop_px=section.crop_px,
            mean=data.mean,
            std=data.std,
            dtype=_image_dtype(self._config),
        )
        return images, batch.labels, batch.sample_ids


def fixed_images(reader: SampleReader, sample_ids: list[int], config: Config, device: torch.device) -> Tensor:
    """Some images by id as evaluation sees them: normalised [n, 3, C, C]."""
    samples = [reader.read(sample_id) for sample_id in sample_ids]
    pixels = torch.from_numpy(np.concatenate([sample.pixels.reshape(-1) for sample in samples]))
    sizes = torch.tensor([sample.pixels.shape[:2] for sample in samples])
    return resize_for_eval(
        pixels.to(device),
        sizes,
        resize_px=config.eval.resize_px,
        crop_px=config.eval.crop_px,
        mean=config.data.mean,
        std=config.data.std,
        dtype=_image_dtype(config),
    )


def _image_dtype(config: Config) -> torch.dtype:
    return torch.float64 if config.train.precision == "fp64" else torch.float32
