"""From the data section of a config to what reads it: limits of decoding, access to stores, data sets and readers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dino_dist.config import DataSection
from dino_dist.data.order.training_set import TrainingSet, open_training_set
from dino_dist.data.prepare.image_files import (
    FileBytes,
    ImageFiles,
    class_numbers,
    find_image_files,
    open_image_files,
)
from dino_dist.data.reading.decode import DecodeRules
from dino_dist.data.reading.shard_bytes import ShardBytes, StoreOptions
from dino_dist.data.reading.stream import ByteSource, SampleReader
from dino_dist.data.shards.index import DatasetIndex, open_dataset
from dino_dist.polling import Poll, nothing_to_poll


def decode_rules(data: DataSection) -> DecodeRules:
    """The limits of the config for members and images."""
    return DecodeRules(
        max_member_bytes=int(data.max_member_mib * 2**20),
        max_pixels=int(data.max_image_mpx * 1_000_000),
        dct_scale_min_px=data.dct_scale_min_px,
    )


def store_options(data: DataSection) -> StoreOptions:
    """How shards behind a URL are read and kept."""
    return StoreOptions(
        cache_dir=data.cache_dir,
        cache_bytes=int(data.cache_gib * 2**30),
        max_attempts=data.store_attempts,
        timeout_s=data.store_timeout_s,
        prefetch_shards=data.cache_ahead_shards,
    )


def index_home(data: DataSection, index_dir: Path) -> Path:
    """Where the indexes go that cannot lie beside their shards: `data.index_dir` if it is set, else `index_dir`."""
    return index_dir if data.index_dir is None else Path(data.index_dir)


def training_set(data: DataSection, index_dir: Path, poll: Poll = nothing_to_poll) -> TrainingSet:
    """What `data.train` names, indexed; `poll` is called between shards and may raise."""
    return open_training_set(data.train, fallback_dir=index_home(data, index_dir), store=store_options(data), poll=poll)


def labelled_set(spec: str, data: DataSection, index_dir: Path, poll: Poll = nothing_to_poll) -> DatasetIndex:
    """What `data.eval_train` or `data.eval_test` names by itself, indexed; see `labelled_sets`."""
    return labelled_sets([spec], data, index_dir, poll)[0]


def labelled_sets(
    specs: Sequence[str], data: DataSection, index_dir: Path, poll: Poll = nothing_to_poll
) -> list[DatasetIndex]:
    """Labelled shards, folders of images or lists of them, whose labels mean the same in all `specs`.

    The sub-folders of a folder of images are its classes. `UserError` as `open_dataset` and `class_numbers` say.
    """
    home = index_home(data, index_dir)
    found = [find_image_files(spec) for spec in specs]
    # First, as one that does not exist says more than classes that do not match.
    opened = {
        spec: open_dataset(spec, fallback_dir=home, store=store_options(data), poll=poll)
        for spec, files in zip(specs, found, strict=True)
        if files is None
    }
    numbers = class_numbers(found, specs)
    return [
        opened[spec] if files is None else open_image_files(files, spec, numbers, home)
        for spec, files in zip(specs, found, strict=True)
    ]


def sample_reader(samples: TrainingSet | DatasetIndex, data: DataSection) -> SampleReader:
    """Reads the samples of a data set as the config says; what a selection leaves out stands in for nothing."""
    dataset = samples if isinstance(samples, DatasetIndex) else samples.dataset
    members = samples.members if isinstance(samples, TrainingSet) and samples.sets else None
    source: ByteSource = ShardBytes(dataset=dataset, options=store_options(data))
    if isinstance(dataset, ImageFiles):
        source = FileBytes(dataset=dataset)
    return SampleReader(dataset=dataset, rules=decode_rules(data), source=source, members=members)
