"""What a run trains on: one data set, or a mixture of several, joined under one numbering of samples and shards.

The sets of a mixture follow each other: set 0 has the first sample ids and shards, and its shards' names begin with
`0/`. A set that is listed twice counts as two: its samples then have two ids, and crops of their own under each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dino_dist.data.order.mixture import MixtureOrder, Part, apportioned
from dino_dist.data.order.mixture_file import MixtureSpec, is_mixture, read_mixture
from dino_dist.data.order.order import Order, SampleOrder
from dino_dist.data.order.selection import Selection, read_selection
from dino_dist.data.shards.index import DatasetIndex, open_dataset
from dino_dist.data.stores.store_options import StoreOptions
from dino_dist.errors import UserError
from dino_dist.polling import Poll, nothing_to_poll

Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedSet:
    """One set of a mixture and its place in the joined data set."""

    label: str
    """What the user called it, for messages."""
    selection: Selection | None
    first_id: int
    shards: Ids
    """Joined numbers of the shards that hold anything selected, int64 [S]."""
    shard_counts: Ids
    """Slots of each of them (samples, repeats counted), int64 [S]."""
    epoch_count: int
    """Its samples in each epoch."""

    @property
    def num_slots(self) -> int:
        """Samples of one pass through the set, repeats counted."""
        return int(self.shard_counts.sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingSet:
    """The samples of a run, and how they make up an epoch."""

    dataset: DatasetIndex
    """All samples, selected or not, under their joined ids."""
    hash: str
    """Equal if and only if `order` means the same samples at the same positions; for a plain data set, its own hash."""
    num_samples: int
    """Positions of one epoch."""
    sets: tuple[MixedSet, ...] = ()
    """Of a mixture; none: all of `dataset`, once an epoch."""

    def order(self, *, seed: int, shards_per_block: int) -> SampleOrder:
        """The endless stream of its samples; `shards_per_block` as in `order.Order`, for each set by itself."""
        if not self.sets:
            return Order(shard_counts=self.dataset.shard_counts, seed=seed, shards_per_block=shards_per_block)
        parts = tuple(
            Part(
                order=Order(shard_counts=each.shard_counts, seed=seed, shards_per_block=shards_per_block, part=number),
                selection=each.selection,
                first_id=each.first_id,
                shards=each.shards,
                epoch_count=each.epoch_count,
            )
            for number, each in enumerate(self.sets)
        )
        return MixtureOrder(parts=parts, seed=seed)

    def members(self, shard: int) -> Ids:
        """Ids of a shard's samples that an epoch may hold, ascending: only these may stand in for one another."""
        first, stop = (int(value) for value in self.dataset.first_ids[shard : shard + 2])
        home = max((each for each in self.sets if each.first_id <= first), key=lambda each: each.first_id, default=None)
        if home is None or home.selection is None:
            return np.arange(first, stop, dtype=np.int64)
        ids = home.selection.sample_ids
        inside = slice(*np.searchsorted(ids, [first - home.first_id, stop - home.first_id]).tolist())
        return ids[inside] + home.first_id

    def shares(self) -> list[str]:
        """One line for each set of a mixture: its share of an epoch and how often an epoch passes through it."""
        return [
            f"set {number} ({each.label}): {each.num_slots} samples, {each.epoch_count} an epoch "
            f"({each.epoch_count / self.num_samples:.2%}; {each.epoch_count / each.num_slots:.3g} passes)"
            for number, each in enumerate(self.sets)
        ]


def open_training_set(
    spec: str, *, fallback_dir: Path, store: StoreOptions | None = None, poll: Poll = nothing_to_poll
) -> TrainingSet:
    """The training data that `spec` names: what `open_dataset` takes, or the path of a mixture (.yaml, .yml).

    `fallback_dir`, `store` and `poll` as for `open_dataset`. An epoch of a mixture has `epoch_samples` samples, or as
    many as its sets hold together (repeats counted). They are split in proportion to the weights, or to what the sets
    hold, by largest remainders, the same in each epoch; so without weights and `epoch_samples` every epoch passes
    through each set exactly once.
    `UserError` for what is wrong with a file, a data set or a selection, or for a set too rare for one sample an epoch.
    """
    if not is_mixture(spec):
        dataset = open_dataset(spec, fallback_dir=fallback_dir, store=store, poll=poll)
        return TrainingSet(dataset=dataset, hash=dataset.hash, num_samples=dataset.num_samples)
    mixture = read_mixture(Path(spec).absolute())
    datasets = [open_dataset(each.shards, fallback_dir=fallback_dir, store=store, poll=poll) for each in mixture.sets]
    selections = [
        read_selection(each.selection, dataset) if each.selection is not None else None
        for each, dataset in zip(mixture.sets, datasets, strict=True)
    ]
    return _mixed(spec, mixture, datasets, selections)


def _mixed(
    spec: str, mixture: MixtureSpec, datasets: Sequence[DatasetIndex], selections: Sequence[Selection | None]
) -> TrainingSet:
    counts = [_slots_of_shards(*pair) for pair in zip(datasets, selections, strict=True)]
    sizes = [int(each.sum()) for each in counts]
    num_samples = mixture.epoch_samples or sum(sizes)
    weights = [each.weight or Fraction(size) for each, size in zip(mixture.sets, sizes, strict=True)]
    epoch_counts = apportioned(weights, num_samples)
    if 0 in epoch_counts:
        rare = epoch_counts.index(0)
        raise UserError(
            f"{spec}: sets[{rare}] ({mixture.sets[rare].shards}) gets no sample in an epoch of {num_samples}; raise "
            f"its weight or epoch_samples, or take it out"
        )
    joined = join(datasets)
    first_shards = np.cumsum([0, *(len(each.shards) for each in datasets)])
    sets = tuple(
        MixedSet(
            label=each.shards,
            selection=selections[number],
            first_id=int(joined.first_ids[first_shards[number]]),
            shards=np.flatnonzero(counts[number]) + first_shards[number],
            shard_counts=counts[number][counts[number] > 0],
            epoch_count=epoch_counts[number],
        )
        for number, each in enumerate(mixture.sets)
    )
    return TrainingSet(dataset=joined, hash=_hash(datasets, sets), num_samples=num_samples, sets=sets)


def join(datasets: Sequence[DatasetIndex]) -> DatasetIndex:
    """Data sets one after the other as one: shard `x.tar` of set k becomes `k/x.tar`."""
    digest = hashlib.sha256(b"dino_dist joined data sets 1\n")
    for dataset in datasets:
        digest.update(f"{dataset.hash}\n".encode())
    shards = tuple(
        replace(shard, name=f"{number}/{shard.name}")
        for number, dataset in enumerate(datasets)
        for shard in dataset.shards
    )
    counts = np.concatenate([dataset.shard_counts for dataset in datasets])
    first_ids = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return DatasetIndex(shards=shards, first_ids=first_ids, hash=digest.hexdigest())


def _slots_of_shards(dataset: DatasetIndex, selection: Selection | None) -> Ids:
    """Samples taken from each shard in one pass, int64 [S]."""
    if selection is None:
        return dataset.shard_counts
    return np.diff(selection.slots_below(dataset.first_ids))


def _hash(datasets: Sequence[DatasetIndex], sets: Sequence[MixedSet]) -> str:
    # Counts stand for the weights: weights of 1 and 1 mean what 2 and 2 do.
    digest = hashlib.sha256(b"dino_dist mixture 1\n")
    for dataset, each in zip(datasets, sets, strict=True):
        selected = each.selection.digest if each.selection is not None else "all"
        digest.update(f"{dataset.hash} {selected} {each.epoch_count}\n".encode())
    return digest.hexdigest()
