"""Features of labelled images: reading, the view of evaluation or random crops, the network, all ranks; and k-NN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_dist.config import Config
from dino_dist.data.crops.augment import MultiCropRenderer, resize_for_eval
from dino_dist.data.loading.batch import Batch
from dino_dist.data.loading.loader import Describe, make_loader, read_batch
from dino_dist.data.order.order import Order
from dino_dist.data.reading.stream import BadRecord, SampleReader
from dino_dist.dist import World
from dino_dist.errors import StopAsked
from dino_dist.eval.attention_maps import to_unit_range
from dino_dist.eval.features import LabelledFeatures, extract
from dino_dist.eval.knn import KnnAccuracy, knn_accuracy
from dino_dist.inputs import labelled_sets, sample_reader
from dino_dist.judging.classifier_crops import RandomCrops
from dino_dist.judging.judged_network import together
from dino_dist.models.dino import DinoNetwork
from dino_dist.models.vit import VisionTransformer
from dino_dist.polling import StopWord, go_on

Forward = Callable[[Tensor], Tensor]
Tell = Callable[[str, int, int], None]
"""What is being done, how much of it is done, of how much."""
SPLITS = ("train", "test")
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


def tell_nobody(what: str, done: int, total: int) -> None:
    """For callers that show no progress."""


class Evaluator:
    """Labelled train and test images of a config, opened once, evaluated as often as asked.

    An image that cannot be decoded is left out, and counted: a stand-in would be judged by a label of its own.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        index_dir: Path,
        stop_word: StopWord = go_on,
        tell: Tell = tell_nobody,
    ) -> None:
        """`UserError` if `data.eval_train` and `data.eval_test`, which must be given, cannot be read.

        `stop_word`: asked before each batch; once it is not 0 on a rank, `StopAsked` ends the evaluation on all.
        `tell`: of how many images this rank and, as far as it knows, the others have read.
        """
        train, test = config.data.eval_train, config.data.eval_test
        assert train is not None, "checked with the config"
        assert test is not None, "checked with the config"
        self._config = config
        self._world = world
        self._stop_word = stop_word
        self._tell = tell
        datasets = world.first(partial(labelled_sets, [train, test], config.data, index_dir, self._stop_if_asked))
        # For good: a reader holds open files, which are not to be opened again at each evaluation.
        self._readers = {
            split: sample_reader(dataset, config.data) for split, dataset in zip(SPLITS, datasets, strict=True)
        }
        self._bad: dict[str, dict[int, BadRecord]] = {split: {} for split in SPLITS}

    def labels(self, split: str) -> Tensor:
        """The label of every image of a split (`train` or `test`) by id, int64 [N]; negative where there is none."""
        return torch.from_numpy(self._readers[split].dataset.labels())

    def dataset_hash(self, split: str) -> str:
        """Tells a split from any other."""
        return self._readers[split].dataset.hash

    def bad(self) -> dict[str, list[BadRecord]]:
        """The images of each split that were found undecodable so far, by id, on all ranks; a collective."""
        found = self._world.gather(self._bad)
        return {
            split: [record for _, record in sorted({k: v for rank in found for k, v in rank[split].items()}.items())]
            for split in SPLITS
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

    def features(self, forward: Forward, split: str, views: RandomCrops | None = None) -> LabelledFeatures:
        """Features of one split (`train` or `test`), ordered by sample id; a collective.

        `views`: of random crops instead of the center crop.
        """
        view = self._centered
        if views is not None:
            dtype = _image_dtype(self._config)
            view = partial(_cropped, views.renderer(self._config.data, self._world.device, dtype))
        batches = self._batches(split, view, views)
        return extract(forward, batches, self._world, self._stop_word)

    def _stop_if_asked(self) -> None:
        if self._stop_word():
            raise StopAsked(self._stop_word())

    def thumbnails(self, sample_ids: list[int], size_px: int) -> Tensor:
        """Test images as evaluation sees them, small: [n, 3, size_px, size_px] in [0, 1] on the CPU, on all ranks.

        A collective: each rank reads a share, some at a time, since photographs are large and stores are slow.
        """
        mine = sample_ids[self._world.rank :: self._world.size]
        share = together(self._world, partial(self._thumbnails, mine, size_px))
        images = torch.empty(len(sample_ids), 3, size_px, size_px)
        for rank, part in enumerate(self._world.gather(share)):
            images[rank :: self._world.size] = part
        return images

    def _thumbnails(self, sample_ids: list[int], size_px: int) -> Tensor:
        config, size = self._config, (size_px, size_px)
        parts = [torch.empty(0, 3, *size)]
        for start in range(0, len(sample_ids), config.eval.batch_size):
            some = sample_ids[start : start + config.eval.batch_size]
            images = to_unit_range(
                fixed_images(self._readers["test"], some, config, self._world.device),
                mean=config.data.mean,
                std=config.data.std,
            )
            parts.append(F.interpolate(images, size=size, mode="bilinear", antialias=True))
        return torch.cat(parts)

    def _batches(
        self, split: str, view: Callable[[Batch], Tensor], describe: Describe | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The good images of this rank's part, with labels and ids."""
        total, seen = self._readers[split].dataset.num_samples, 0
        for batch in self._read(self._readers[split], describe):
            bad = {record.sample_id: record for record in batch.bad}
            self._bad[split] |= bad
            seen += batch.num_images
            good = torch.tensor([sample_id not in bad for sample_id in batch.sample_ids.tolist()], dtype=torch.bool)
            if bool(good.any()):
                yield view(batch)[good.to(batch.pixels.device)], batch.labels[good], batch.sample_ids[good]
            self._tell(f"features of {split}", min(total, seen * self._world.size), total)
        self._tell(f"features of {split}", total, total)

    def _read(self, reader: SampleReader, describe: Describe | None) -> Iterator[Batch]:
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
                describe=describe,
            )
            for (batch,) in loader:
                yield batch
        else:
            full_steps = 0
        rest = range(full_steps * batch_size, dataset.num_samples)[world.rank :: world.size]
        for position in rest:
            yield read_batch(reader, order.ids(position, position + 1), describe=describe, device=world.device)

    def _centered(self, batch: Batch) -> Tensor:
        section, data = self._config.eval, self._config.data
        return resize_for_eval(
            batch.pixels,
            batch.sizes,
            resize_px=section.resize_px,
            crop_px=section.crop_px,
            mean=data.mean,
            std=data.std,
            dtype=_image_dtype(self._config),
        )


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


def _cropped(renderer: MultiCropRenderer, batch: Batch) -> Tensor:
    (images,), _ = renderer(batch.pixels, batch.sizes, batch.extra["crops"])
    return images


def _image_dtype(config: Config) -> torch.dtype:
    return torch.float64 if config.train.precision == "fp64" else torch.float32
