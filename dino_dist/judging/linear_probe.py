"""Linear classifiers on a network that is judged: many settings on shared features, going on after a kill."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_dist.config_file import to_plain
from dino_dist.errors import SaidByRankZero, UserError
from dino_dist.eval.linear import Columns, Group, Recipe, accuracies, new_group, stacked_features, train_epoch
from dino_dist.eval.linear_state import load_group, make_folder, save_group
from dino_dist.judging.classifier_crops import RandomCrops
from dino_dist.judging.judge import BadImages, Judge, check_usable
from dino_dist.judging.judged_network import together

_SAVE_EVERY_S = 30.0
_PUBLISHED_EPOCHS, _PUBLISHED_BATCH_SIZE = 100, 1024
_LEAST_IMAGES, _LEAST_STEPS_AN_EPOCH = 500_000, 10
"""On a small data set the published length and batch would end long before the classifiers have converged."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One classifier of the sweep, judged on the test images."""

    blocks: int
    avgpool: bool
    lr: float
    """As configured: for 256 images a step."""
    top1: float
    top5: float


def judge_linear(judge: Judge, out: Path | None = None, *, save_every_s: float = _SAVE_EVERY_S) -> dict[str, Any]:
    """Train a classifier with each of eval.linear_lr on each choice of features, and judge them; a collective.

    The best by the test images is named, as published evaluations do, and all are listed. With `out` the state of the
    sweep is kept there (a folder that all ranks share), and the same command goes on from it after a kill, on any
    number of ranks; states of other networks and settings stay untouched beside it. `UserError` on all ranks for more
    blocks than the network has, for features that are not finite or of one class, and if `out` cannot be written or
    holds a damaged state of this sweep.
    """
    section, world = judge.config.eval, judge.world
    most_blocks, depth = max(section.linear_blocks), judge.weights.shape.depth
    if most_blocks > depth:  # on all ranks alike
        message = f"eval.linear_blocks={[*section.linear_blocks]}: the network has only {depth} blocks"
        raise UserError(message) if world.is_first else SaidByRankZero(message)
    if out is not None:
        world.first(lambda: make_folder(out))

    def forward(images: Tensor) -> Tensor:
        return stacked_features(judge.backbone.features(images, most_blocks))

    test = judge.features(forward, "test")
    sweep = together(world, lambda: _Sweep(judge=judge, folder=out, save_every_s=save_every_s, like=test.features_ND))
    first_epoch = min(world.gather(min((group.epochs_done for group in sweep.groups), default=sweep.recipe.epochs)))
    if first_epoch:
        judge.tell("epochs of classifiers", first_epoch, sweep.recipe.epochs)
    train = None
    for epoch in range(first_epoch, sweep.recipe.epochs):
        if train is None or section.linear_augment:
            views = RandomCrops(crop_px=section.crop_px, seed=sweep.recipe.seed, epoch=epoch)
            train = judge.features(forward, "train", views if section.linear_augment else None)
            check_usable(world, train=train, test=test)
            sweep.bad_train = judge.bad_images("train")
        together(world, partial(sweep.train, epoch, train.features_ND, train.labels_N))
        judge.tell("epochs of classifiers", epoch + 1, sweep.recipe.epochs)
    parts = world.gather(sweep.scores(test.features_ND, test.labels_N))
    scores = sorted((one for part in parts for one in part), key=lambda one: (one.blocks, one.avgpool, one.lr))
    best = max(scores, key=lambda one: one.top1)
    # No train images are read for a sweep that was finished before: ranks that hold states of it know the bad ones.
    bad_train = max(world.gather(sweep.bad_train), key=lambda bad: bad.count)
    return judge.about(bad_train) | {
        "linear_top1": best.top1,
        "linear_top5": best.top5,
        "linear_blocks": best.blocks,
        "linear_avgpool": best.avgpool,
        "linear_lr": best.lr,
        "results": [asdict(score) for score in scores],
    }


@dataclass(kw_only=True, eq=False)
class _Sweep:
    """This rank's groups of classifiers, and their files."""

    judge: Judge
    folder: Path | None
    save_every_s: float
    like: Tensor
    """Features of the type, and on the device, of those to come."""
    recipe: Recipe = field(init=False)
    groups: list[Group] = field(init=False)
    bad_train: BadImages = field(init=False, default=BadImages(count=0, first=()))
    """As far as this rank knows."""
    _classes: Tensor = field(init=False)
    """Labels of the train images, ascending: class c of the classifiers is the label `_classes[c]`."""
    _fingerprint: str = field(init=False)
    _saved_at_s: float = field(init=False)

    def __post_init__(self) -> None:
        section, world = self.judge.config.eval, self.judge.world
        labels = self.judge.evaluator.labels("train").tolist()
        few = math.ceil(len(labels) / _LEAST_STEPS_AN_EPOCH)
        self.recipe = Recipe(
            rates=tuple(sorted(set(section.linear_lr))),
            epochs=section.linear_epochs or max(_PUBLISHED_EPOCHS, math.ceil(_LEAST_IMAGES / len(labels))),
            batch_size=section.linear_batch_size or min(_PUBLISHED_BATCH_SIZE, few),
            seed=self.judge.config.run.seed,
        )
        choices = [
            Columns(blocks=blocks, avgpool=avgpool)
            for blocks in sorted(set(section.linear_blocks))
            for avgpool in sorted(set(section.linear_avgpool))
        ]
        self._classes = torch.tensor(sorted(set(labels)), device=self.like.device)
        self._fingerprint = _fingerprint(self.judge)
        self._saved_at_s = time.monotonic()
        self.groups = [self._begin(columns) for columns in choices[world.rank :: world.size]]

    def train(self, epoch: int, features_ND: Tensor, labels_N: Tensor) -> None:
        """One epoch, for the groups that have not done it yet; then what is to be saved is saved."""
        numbers_N = torch.searchsorted(self._classes, labels_N)
        for group in self.groups:
            if group.epochs_done == epoch:
                train_epoch(group, self._seen_by(group, features_ND), numbers_N, self.recipe)
        is_due = time.monotonic() - self._saved_at_s >= self.save_every_s or epoch + 1 == self.recipe.epochs
        if self.folder is not None and is_due:
            for group in self.groups:
                save_group(self.folder, group, self._fingerprint, asdict(self.bad_train))
            self._saved_at_s = time.monotonic()

    def scores(self, features_MD: Tensor, labels_M: Tensor) -> list[Score]:
        """Of this rank's classifiers on the test images."""
        number_M = torch.searchsorted(self._classes, labels_M).clamp(max=len(self._classes) - 1)
        number_M = number_M.where(self._classes[number_M] == labels_M, -1)
        return [
            Score(blocks=group.columns.blocks, avgpool=group.columns.avgpool, lr=rate, top1=top1, top5=top5)
            for group in self.groups
            for rate, (top1, top5) in zip(
                self.recipe.rates, accuracies(group, self._seen_by(group, features_MD), number_M), strict=True
            )
        ]

    def _begin(self, columns: Columns) -> Group:
        seen = columns.of(self.like, embed_dim=self.judge.weights.shape.embed_dim)
        group = new_group(
            columns, self.recipe, num_features=seen.shape[1], num_classes=len(self._classes), like=self.like
        )
        beside = None if self.folder is None else load_group(self.folder, group, self._fingerprint)
        if beside is not None:
            self.bad_train = BadImages(count=beside["count"], first=tuple(beside["first"]))
        return group

    def _seen_by(self, group: Group, features: Tensor) -> Tensor:
        return group.columns.of(features, embed_dim=self.judge.weights.shape.embed_dim)


def _fingerprint(judge: Judge) -> str:
    """Of all that the classifiers depend on: weights, images, settings."""
    plain = to_plain(judge.config)
    settings = {
        **{name: value for name, value in plain["eval"].items() if name.startswith("linear_")},
        **{name: plain["eval"][name] for name in ("resize_px", "crop_px")},
        **{name: plain["data"][name] for name in ("mean", "std", "dct_scale_min_px")},
        "seed": judge.config.run.seed,
        "images": judge.evaluator.dataset_hash("train"),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(judge.weights.backbone.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
